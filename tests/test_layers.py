"""Which module may import and call what, read from the source."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import PROJECT

STEPS = PROJECT / "steps"
FILES = {path.relative_to(PROJECT).as_posix(): ast.parse(path.read_text()) for path in STEPS.rglob("*.py")}
LIBRARY = [name for name in FILES if name.startswith("steps/text2sql/")]
MAY_IMPORT_MLFLOW = {
    f"steps/text2sql/{name}.py"
    for name in (
        "active_run",
        "artifacts",
        "assessments",
        "child_runs",
        "earlier_runs",
        "evaluation_run",
        "lost_runs",
        "model_versions",
        "packaging",
        "project_source",
        "promotion_lock",
        "promotions",
        "prompt_registry",
        "remote_step",
        "retries",
        "run_log",
        "run_page",
        "sql_model",
        "step_run",
        "transformers_flavor",
    )
}
MAY_IMPORT_SQLITE = {f"steps/text2sql/{name}.py" for name in ("sql_worker", "sample_data")}
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def imported(file: str) -> Iterator[str]:
    """Full names of what a file imports, wherever in it; relative imports are counted as this project's."""
    for node in ast.walk(FILES[file]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            base = "steps." * bool(node.level) + (node.module or "")
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def importers(package: str) -> set[str]:
    """Files that import a package or a part of it."""
    return {file for file in FILES if package in {name.split(".")[0] for name in imported(file)}}


def calls(tree: ast.AST) -> Iterator[ast.Call]:
    """Every call in a file."""
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def test_the_files_are_found():
    assert {"steps/main.py", "steps/train.py", *MAY_IMPORT_MLFLOW, *MAY_IMPORT_SQLITE} <= set(FILES)


@pytest.mark.parametrize("file", LIBRARY)
def test_the_library_imports_no_step(file):
    own = {name for name in imported(file) if name.split(".")[0] == "steps"}
    assert {name for name in own if name != "steps" and not name.startswith("steps.text2sql")} == set()


@pytest.mark.parametrize("file", FILES)
def test_imports_are_absolute(file):
    assert [n.lineno for n in ast.walk(FILES[file]) if isinstance(n, ast.ImportFrom) and n.level] == []


@pytest.mark.parametrize("file", sorted(set(LIBRARY) - MAY_IMPORT_MLFLOW))
def test_of_the_library_only_these_modules_import_mlflow(file):
    assert file not in importers("mlflow")


def test_each_of_them_does_import_mlflow():
    assert importers("mlflow") >= MAY_IMPORT_MLFLOW


def test_the_served_file_imports_nothing_of_the_project():
    project = {path.stem for path in PROJECT.iterdir() if path.is_dir()}
    assert {name.split(".")[0] for name in imported("steps/text2sql/sql_model.py")} & project == set()


@pytest.mark.parametrize("step", ["main", "promote", "sweep"])
def test_main_promote_and_sweep_load_neither_torch_nor_transformers(step):
    ask = f"import sys, steps.{step}; print(sorted({{'torch', 'transformers'}} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", ask], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("file", FILES)
def test_everything_public_says_what_it_does(file):
    assert ast.get_docstring(FILES[file]) or Path(file).name == "__init__.py"
    public = [
        node
        for scope in (FILES[file], *(n for n in FILES[file].body if isinstance(n, ast.ClassDef)))
        for node in scope.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
    ]
    assert [node.name for node in public if not ast.get_docstring(node)] == []


@pytest.mark.parametrize("file", FILES)
def test_no_code_of_a_model_repository_is_trusted(file):
    arguments = [(n.arg, n.value) for n in ast.walk(FILES[file]) if isinstance(n, ast.keyword)]
    entries = [
        (ast.literal_eval(key), value)
        for node in ast.walk(FILES[file])
        if isinstance(node, ast.Dict)
        for key, value in zip(node.keys, node.values, strict=True)
        if isinstance(key, ast.Constant)
    ]
    given = {ast.unparse(value) for name, value in arguments + entries if name == "trust_remote_code"}
    assert given <= {"False"}


@pytest.mark.parametrize("file", FILES)
def test_nothing_is_pickled_or_unpickled(file):
    assert {name.split(".")[0] for name in imported(file)} & PICKLES == set()
    found = {ast.unparse(call.func) for call in calls(FILES[file])}
    banned = {"torch.load", "torch.save", "numpy.load", "pandas.read_pickle", "pd.read_pickle"}
    assert found & banned == set()
    assert not {name for name in found if name.endswith(".to_pickle")}


@pytest.mark.parametrize("file", FILES)
def test_no_command_goes_through_a_shell(file):
    keywords = {f"{k.arg}={ast.unparse(k.value)}" for call in calls(FILES[file]) for k in call.keywords}
    assert "shell=True" not in keywords
    found = {ast.unparse(call.func) for call in calls(FILES[file])}
    assert found & {"os.system", "os.popen", "subprocess.getoutput", "eval", "exec"} == set()


def test_only_two_modules_open_databases():
    assert importers("sqlite3") <= MAY_IMPORT_SQLITE
    assert importers("sqlalchemy") | importers("duckdb") == set()


def test_steps_run_no_sql():
    found = {
        file
        for file, tree in FILES.items()
        for call in calls(tree)
        if isinstance(call.func, ast.Attribute)
        and call.func.attr in ("execute", "executemany", "executescript", "read_sql")
    }
    assert found <= MAY_IMPORT_SQLITE
