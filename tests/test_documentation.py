"""README.md says what the code does."""

import re
import shlex

import pytest

from benchmarks import what_fits
from steps.text2sql import mlproject, parameter_table
from steps.text2sql.params import STEPS, OwnMainParams
from tests.conftest import PROJECT

README = (PROJECT / "README.md").read_text(encoding="utf-8")
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md"]


def section(title: str) -> str:
    """The text of a section of the README."""
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_the_table_of_parameters_is_the_one_that_mlproject_and_the_dataclasses_give(tmp_path):
    copy = tmp_path / "README.md"
    copy.write_text(README)
    parameter_table.write(copy)
    assert copy.read_text() == README, "run python -m steps.text2sql.parameter_table"


def test_the_table_has_every_parameter_of_every_entry_point_with_default_limits_and_meaning():
    rows = parameter_table.render().splitlines()
    for kind in (OwnMainParams, *STEPS.values()):
        for name in kind.__dataclass_fields__:
            found = [row.split(" | ") for row in rows if row.startswith(f"| `{name}` |")]
            assert found, name
            assert all(len(cells[2]) > 10 for cells in found), name
    [row] = [row for row in rows if row.startswith("| `batch_size` |")]
    assert row.startswith("| `batch_size` | `8` | ")
    assert row.endswith("at least 1, at most 4096 |")


def code_blocks(page: str) -> list[str]:
    """Commands of a page, lines that go on joined."""
    text = (PROJECT / page).read_text(encoding="utf-8")
    return [
        line
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
        for line in block.replace("\\\n", " ").splitlines()
    ]


@pytest.mark.parametrize("page", PAGES)
def test_commands_name_entry_points_and_parameters_that_there_are(page):
    for command in (line for line in code_blocks(page) if "mlflow run" in line):
        words = shlex.split(command.partition("mlflow run")[2], comments=True)
        entry_point = words[words.index("-e") + 1] if "-e" in words else "main"
        names = {words[i + 1].partition("=")[0] for i, word in enumerate(words) if word == "-P"}
        known = set(mlproject.entry_points()[entry_point].get("parameters", {}))
        if entry_point in ("main", "sweep"):
            known |= {name for step in STEPS.values() for name in step.__dataclass_fields__}
        assert names <= known, command


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_are_there(page):
    text = (PROJECT / page).read_text(encoding="utf-8")
    named = re.findall(r"`((?:steps|tests|benchmarks|examples)/[\w./]*)", text)
    assert [name for name in named if not (PROJECT / name).exists()] == []
    modules = re.findall(r"python -m ([\w.]+)", text)
    own = [name for name in modules if name.startswith(("steps.", "benchmarks."))]
    assert [name for name in own if not (PROJECT / f"{name.replace('.', '/')}.py").is_file()] == []


def test_every_entry_point_and_every_module_of_the_map_is_there():
    assert [name for name in mlproject.entry_points() if name not in README] == []
    named = re.findall(r"\b(\w+\.py)\b", section("Where to change what"))
    there = {path.name for path in (PROJECT / "steps").rglob("*.py")}
    assert [name for name in named if name not in there] == []


@pytest.mark.parametrize("base", ["SmolLM2-135M", "Mistral-7B"])
def test_the_cards_that_a_base_needs_are_what_the_plan_says(base):
    cards = " | ".join(map(str, what_fits.smallest_cards(what_fits.BASES[base])))
    assert f"| {base} | {cards} |" in section("Hardware")


def test_troubleshooting_lists_messages_that_the_code_has():
    # Neighbouring literals are one text.
    source = "".join(path.read_text(encoding="utf-8") for path in (PROJECT / "steps").rglob("*.py"))
    source = re.sub(r'"\s*f?"', "", source)
    for row in section("Troubleshooting").splitlines()[4:]:
        message = row.split(" | ")[0]
        if "(MLflow's)" not in message:
            assert re.search(r"`([^`]+)`", message)[1] in source, message
