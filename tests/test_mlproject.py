"""MLproject and python_env.yaml: entry points, parameters, defaults, commands and versions."""

import dataclasses
import importlib
import re
import shlex
from typing import Any

import pytest
import yaml
from mlflow.projects._project_spec import load_project

from steps.text2sql.params import CHAIN, SET_BY_MAIN, STEPS, OwnMainParams
from tests.conftest import PROJECT

SPEC = yaml.safe_load((PROJECT / "MLproject").read_text())
ENTRY_POINTS: dict[str, dict[str, Any]] = SPEC["entry_points"]
DECLARED = {name: entry.get("parameters", {}) for name, entry in ENTRY_POINTS.items()}
STEP_MODULES = [name for name in ENTRY_POINTS if name != "tests"]
# Parameters that some entry points can do without, though others of that name have a value.
OPTIONAL = {"evaluate": ("dataset_uri", "dataset"), "sweep": ("dataset_uri",)}
# As the README and DESIGN.md promise them.
MAIN = {
    "base_model": "auto",
    "dataset": "auto",
    "max_steps": 500,
    "batch_size": 8,
    "max_length": 512,
    "learning_rate": "auto",
    "lora_r": 32,
    "lora_alpha": 64,
    "lora_dropout": 0.0,
    "target_modules": "all-linear",
    "quantization": "nf4",
    "test_size": 0.2,
    "split_by": "schema",
    "eval_rows": 100,
    "seed": 42,
    "registered_model_name": "text2sql",
    "promotion": "auto",
    "resume": "auto",
    "reuse": "auto",
    "launch": "single",
}


def fields(step: str) -> set[str]:
    """Fields of a step's dataclass."""
    return {field.name for field in dataclasses.fields(STEPS[step])}


def test_mlflow_loads_the_project_with_exactly_these_entry_points():
    entry_points = load_project(str(PROJECT))._entry_points
    assert sorted(entry_points) == sorted(["main", *STEPS, "tests"])
    assert list(CHAIN) == ["prepare_data", "train", "register", "evaluate", "promote"]
    assert list(STEPS) == [*CHAIN, "export", "sweep"]
    assert set(entry_points) == set(ENTRY_POINTS)


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_mlflow_reads_the_defaults_as_they_are_written(name):
    read = load_project(str(PROJECT)).get_entry_point(name).parameters
    assert {n: p.default for n, p in read.items()} == {n: p.get("default") for n, p in DECLARED[name].items()}


@pytest.mark.parametrize("step", [name for name in ENTRY_POINTS if name not in ("main", "tests")])
def test_an_entry_point_declares_the_fields_of_its_dataclass(step):
    assert set(DECLARED[step]) == fields(step)


def test_main_declares_the_promised_parameters_and_defaults():
    assert {name: kind["default"] for name, kind in DECLARED["main"].items()} == MAIN
    assert len(DECLARED["main"]) <= 20


def test_main_declares_only_what_is_its_own_or_a_steps():
    own = {field.name for field in dataclasses.fields(OwnMainParams)}
    assert own <= set(DECLARED["main"])
    assert set(DECLARED["main"]) - own <= set().union(*map(fields, CHAIN)) - SET_BY_MAIN


@pytest.mark.parametrize("step", STEP_MODULES)
def test_a_command_runs_the_module_of_its_name_and_passes_each_parameter_once_bare(step):
    # Quotes around {name} would end those that MLflow puts around the value.
    expected = [word for name in DECLARED[step] for word in (f"--{name}", f"{{{name}}}")]
    start, *words = re.split(r"(?= --)", ENTRY_POINTS[step]["command"].strip(), maxsplit=1)
    assert start == f"python -m steps.{step}"
    found = " ".join(words).split()
    assert sorted(zip(found[0::2], found[1::2], strict=True)) == sorted(
        zip(expected[0::2], expected[1::2], strict=True)
    )


@pytest.mark.parametrize("step", STEP_MODULES)
def test_a_command_is_one_line_that_a_shell_splits_into_whole_words(step):
    given = {name: f"it's {name}" for name in DECLARED[step]}
    command = load_project(str(PROJECT)).get_entry_point(step).compute_command(given, None)
    assert shlex.split(command)[:3] == ["python", "-m", f"steps.{step}"]
    assert "\n" not in command
    assert sorted(shlex.split(command)[4::2]) == sorted(given.values())


def test_the_entry_point_tests_runs_pytest_without_parameters():
    assert set(ENTRY_POINTS["tests"]) == {"command"}
    assert ENTRY_POINTS["tests"]["command"].split()[:4] == ["python", "-m", "pytest", "tests"]


def shared(entry_point: str) -> dict[str, dict[str, str]]:
    """Parameters that mean the same in every entry point."""
    return {n: kind for n, kind in DECLARED[entry_point].items() if n not in OPTIONAL.get(entry_point, ())}


def test_a_parameter_of_several_entry_points_has_one_default():
    seen: dict[str, object] = {}
    for name, kind in ((n, k) for entry_point in DECLARED for n, k in shared(entry_point).items()):
        default = kind.get("default", "none given")
        assert seen.setdefault(name, default) == default, name


def test_what_an_entry_point_can_do_without_is_empty_by_default():
    assert {DECLARED[point][name]["default"] for point, names in OPTIONAL.items() for name in names} == {""}


def test_every_default_is_written_once():
    text = (PROJECT / "MLproject").read_text()
    written = re.findall(r"^\s*(\w+): \{type: string, default:", text, re.MULTILINE)
    names = {n for point in DECLARED for n, kind in shared(point).items() if "default" in kind}
    assert sorted(written) == sorted([*names, *{name for names in OPTIONAL.values() for name in names}])


def test_no_field_of_a_dataclass_has_a_default():
    for kind in (*STEPS.values(), OwnMainParams):
        assert all(f.default is f.default_factory is dataclasses.MISSING for f in dataclasses.fields(kind))


def test_only_what_main_finds_out_and_where_to_export_lack_a_default():
    missing = {n for declared in DECLARED.values() for n, kind in declared.items() if "default" not in kind}
    assert missing == SET_BY_MAIN - {"evaluation_run_id"} | {"output"}


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_every_parameter_is_a_string_to_mlflow(name):
    # path and uri make MLflow act before the step can check; int and float are not checked.
    assert {kind["type"] for kind in DECLARED[name].values()} <= {"string"}


@pytest.mark.parametrize("step", ["main", *STEPS])
def test_a_step_has_main_and_runs_as_a_module(step):
    module = importlib.import_module(f"steps.{step}")
    assert callable(module.main)
    assert '\nif __name__ == "__main__":\n' in (PROJECT / "steps" / f"{step}.py").read_text()


def test_steps_are_the_modules_of_the_entry_points():
    modules = {path.stem for path in (PROJECT / "steps").glob("*.py")} - {"__init__"}
    assert modules == set(STEP_MODULES)


@pytest.mark.parametrize("section", ["build_dependencies", "dependencies"])
def test_every_dependency_is_pinned(section):
    pins = yaml.safe_load((PROJECT / "python_env.yaml").read_text())[section]
    assert [pin for pin in pins if not re.fullmatch(r"[\w-]+(\[[\w,]+\])?==[\d.]+(\.?\w+)?", pin)] == []


def test_no_dependency_stands_twice_with_two_versions():
    env = yaml.safe_load((PROJECT / "python_env.yaml").read_text())
    names = [pin.split("==")[0] for pin in env["dependencies"]]
    assert len(names) == len(set(names))
    both = {*env["build_dependencies"], *env["dependencies"]}
    assert len(both) == len({pin.split("==")[0] for pin in both})


def test_python_is_the_launchers():
    # With a `python` key MLflow would look for that very version, or build it.
    assert set(yaml.safe_load((PROJECT / "python_env.yaml").read_text())) == {
        "build_dependencies",
        "dependencies",
    }


def test_versions_stand_in_python_env_alone():
    names = (
        "requirements*",
        "conda.y*ml",
        "setup.*",
        "Pipfile*",
        "poetry.lock",
        "uv.lock",
        "environment.y*ml",
    )
    assert [path for name in names for path in PROJECT.glob(name)] == []
    pins = re.compile(r"\b(mlflow|torch|transformers|peft|bitsandbytes|accelerate|datasets)\s*[=~><]=\s*\d")
    files = [PROJECT / "MLproject", PROJECT / "pyproject.toml", *(PROJECT / "steps").rglob("*.py")]
    assert [str(file) for file in files if pins.search(file.read_text())] == []
    assert "\n[project]" not in f"\n{(PROJECT / 'pyproject.toml').read_text()}"


def test_the_environment_is_the_one_that_mlproject_names():
    assert SPEC["python_env"] == "python_env.yaml"
    assert "docker_env" not in SPEC
    assert "conda_env" not in SPEC
