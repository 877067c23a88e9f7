"""Command lines: what each parameter accepts, and what the error of each bad one says."""

import errno
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import get_type_hints

import psutil
import pytest
from mlflow.projects._project_spec import load_project

from steps import main
from steps.text2sql import processes, reuse
from steps.text2sql.command_line import parse, parse_main
from steps.text2sql.errors import UserError
from steps.text2sql.params import CHAIN, NOT_FROM_MAIN, SET_BY_MAIN
from tests.conftest import PROJECT, defaults, words

# What the steps before find out, so that the defaults of MLproject make a whole command line.
FOUND = {
    "dataset_uri": "runs:/0a1b/dataset",
    "adapter_uri": "runs:/0a1b/adapter",
    "model_uri": "models:/text2sql/1",
    "version": "1",
}


def parsed(step: str, **values: object) -> object:
    """A step's parameters: the defaults and these values."""
    needed = {name: FOUND[name] for name in CHAIN[step].__annotations__ if name in FOUND}
    return parse(CHAIN[step], words(defaults(step) | needed | values))


def refusal(step: str, **values: object) -> str:
    """The message with which a step refuses these values."""
    with pytest.raises(UserError) as caught:
        parsed(step, **values)
    return str(caught.value)


def main_refusal(**values: object) -> str:
    """The message with which main refuses these values."""
    with pytest.raises(UserError) as caught:
        parse_main(words(defaults("main") | values))
    return str(caught.value)


@pytest.fixture
def users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for the one in which the user typed the command."""
    monkeypatch.setattr(processes, "users_folder", lambda: tmp_path)
    return tmp_path


@pytest.mark.parametrize("step", CHAIN)
def test_the_defaults_of_mlproject_are_valid(step):
    parsed(step)


def test_the_defaults_of_main_are_valid_and_reach_every_step_that_declares_them():
    found = parse_main(words(defaults("main")))
    assert found.own.promotion == "auto"
    for step, values in found.steps.items():
        declared = set(CHAIN[step].__annotations__) - NOT_FROM_MAIN.get(step, set())
        assert values == {n: v for n, v in defaults("main").items() if n in declared}
    assert {name for values in found.steps.values() for name in values} == set(defaults("main")) - {
        *("promotion", "resume", "reuse")
    }


def test_main_hands_its_dataset_to_prepare_data_alone():
    found = parse_main(words(defaults("main") | {"dataset": "sample"}))
    assert [step for step, values in found.steps.items() if "dataset" in values] == ["prepare_data"]


def test_main_takes_every_dataset_that_prepare_data_takes(users_folder):
    assert (
        parse_main(words(defaults("main") | {"dataset": "auto"})).steps["prepare_data"]["dataset"] == "auto"
    )
    assert main_refusal(dataset="").startswith("dataset=: must be auto, sample")


def test_evaluate_takes_exactly_one_kind_of_rows(tmp_path):
    assert parsed("evaluate", dataset_uri="", dataset="sample").dataset == "sample"
    for dataset_uri, dataset in (("", ""), ("runs:/0a1b/dataset", "sample")):
        message = refusal("evaluate", dataset_uri=dataset_uri, dataset=dataset)
        assert message.startswith(f"dataset_uri={dataset_uri}, dataset={dataset}: give exactly one of them")


def test_evaluate_refuses_auto_which_says_what_to_train_on():
    message = refusal("evaluate", dataset_uri="", dataset="auto")
    assert message.startswith("dataset=auto: must be sample, a hub id or an absolute path")


def test_values_arrive_with_the_type_of_their_field():
    found = parsed("train", max_steps="7", learning_rate="2e-4", lora_dropout="0.1", warmup_steps="3")
    assert (found.max_steps, found.learning_rate, found.lora_dropout) == (7, 0.0002, 0.1)
    assert found.warmup_steps == 3
    assert isinstance(found.max_steps, int)


def test_a_misspelt_name_is_refused_with_the_name_that_is_meant():
    assert refusal("train", lora_rr=8) == "lora_rr=8: no such parameter; did you mean lora_r?"


def test_a_shortened_name_is_not_completed():
    assert refusal("train", max_step=7) == "max_step=7: no such parameter; did you mean max_steps?"


def test_a_name_like_no_other_is_refused_with_the_names_that_exist():
    names = "dataset, dataset_uri, eval_batch_size, eval_rows, model_uri, query_timeout_seconds"
    assert refusal("evaluate", zzz=1) == f"zzz=1: no such parameter; there are: {names}"


def test_a_missing_parameter_is_named():
    with pytest.raises(UserError, match="^adapter_uri: missing$"):
        parse(CHAIN["register"], words({"dataset_uri": "/d", "registered_model_name": "text2sql"}))


def test_all_problems_come_in_one_message_a_line_each():
    lines = refusal("train", max_steps=0, quantization="int3", max_step=7, seed=-1).split("\n")
    assert [line.split("=")[0] for line in lines] == ["max_step", "max_steps", "quantization", "seed"]


@pytest.mark.parametrize(
    ("step", "name", "value", "reason"),
    [
        ("train", "max_steps", "0", "must be at least 1, or -1"),
        ("train", "max_steps", "-2", "must be at least 1, or -1"),
        ("train", "max_steps", "many", "valid integer"),
        ("train", "batch_size", "0", "greater than or equal to 1"),
        ("train", "learning_rate", "fast", "'auto' or a valid number"),
        ("train", "learning_rate", "0", "'auto' or greater than 0"),
        ("train", "learning_rate", "nan", "'auto' or a finite number"),
        ("train", "learning_rate", "inf", "'auto' or a finite number"),
        ("train", "lora_r", "1.5", "valid integer"),
        ("train", "lora_r", "0", "greater than or equal to 1"),
        ("train", "lora_alpha", "inf", "finite number"),
        ("train", "lora_dropout", "1", "less than 1"),
        ("train", "lora_dropout", "nan", "less than 1"),
        ("train", "target_modules", "q_proj,,v_proj", "must be all-linear, or names of modules with commas"),
        ("train", "target_modules", "", "must be all-linear"),
        ("train", "quantization", "int3", "'nf4' or 'none'"),
        ("train", "launch", "twice", "'single'"),
        ("train", "num_train_epochs", "0", "greater than 0"),
        ("train", "warmup_steps", "-1", "'auto' or greater than or equal to 0"),
        ("train", "lr_scheduler_type", "step", "'cosine'"),
        ("train", "weight_decay", "-0.1", "greater than or equal to 0"),
        ("train", "weight_decay", "nan", "finite number"),
        ("train", "max_grad_norm", "-1", "greater than or equal to 0"),
        ("train", "max_grad_norm", "inf", "finite number"),
        ("train", "use_rslora", "True", "'no' or 'yes'"),
        ("train", "quantization_correction", "True", "'auto', 'no' or 'yes'"),
        ("train", "optim", "sgd", "'auto'"),
        ("train", "gradient_checkpointing", "True", "'auto', 'yes' or 'no'"),
        ("train", "save_steps", "0", "greater than or equal to 1"),
        ("train", "logging_steps", "0", "greater than or equal to 1"),
        ("prepare_data", "max_length", "8", "greater than or equal to 16"),
        ("prepare_data", "test_size", "0", "greater than 0"),
        ("prepare_data", "test_size", "1", "less than 1"),
        ("prepare_data", "test_size", "nan", "less than 1"),
        ("prepare_data", "split_by", "row", "'schema' or 'random'"),
        ("prepare_data", "seed", "-1", "greater than or equal to 0"),
        ("prepare_data", "seed", "4294967296", "less than 4294967296"),
        ("evaluate", "eval_rows", "0", "greater than or equal to 1"),
        ("evaluate", "eval_batch_size", "0", "'auto' or greater than or equal to 1"),
        ("evaluate", "eval_batch_size", "many", "'auto' or a valid integer"),
        ("evaluate", "query_timeout_seconds", "0", "greater than 0"),
        ("evaluate", "query_timeout_seconds", "3e6", "less than or equal to 86400"),
        ("promote", "version", "0", "greater than or equal to 1"),
        ("promote", "version", "latest", "valid integer"),
        ("promote", "min_execution_accuracy", "1.1", "less than or equal to 1"),
        ("promote", "min_execution_accuracy", "nan", "less than or equal to 1"),
        ("promote", "gate_alpha", "0", "greater than 0"),
        ("promote", "gate_alpha", "1.1", "less than or equal to 1"),
        ("promote", "gate_alpha", "nan", "less than or equal to 1"),
        ("promote", "evaluation_run_id", "runs:/0a1b", "must be the id of a run"),
        ("promote", "registered_model_name", "", "must be letters"),
        ("promote", "registered_model_name", "-a", "and begin with a letter"),
        ("promote", "registered_model_name", "team/sql", "must be letters"),
        ("promote", "registered_model_name", "it's", "must be letters"),
        ("promote", "registered_model_name", "name\n", "must be letters"),
        ("promote", "registered_model_name", "name ", "must be letters"),
        ("train", "warmup_steps", "500", "would not reach its value in 500 steps"),
    ],
)
def test_a_bad_value_is_refused_with_its_parameter_its_value_and_the_reason(step, name, value, reason):
    message = refusal(step, **{name: value})
    assert message.startswith(f"{name}={value}: ")
    assert reason in message


def test_minus_one_trains_for_epochs():
    assert parsed("train", max_steps=-1).max_steps == -1


@pytest.mark.parametrize("name", ["text2sql", "Text to SQL-1.0", "a"])
def test_a_model_name_may_have_letters_digits_spaces_dots_and_dashes(name):
    assert parsed("promote", registered_model_name=name).registered_model_name == name


# --- base_model and dataset


@pytest.mark.parametrize(
    "value",
    ["auto", "smollm2-135m", "gpt2", "mistralai/Mistral-7B-v0.1", "owner/name@main", "owner/name@refs/pr/1"],
)
def test_base_model_may_be_a_word_or_a_hub_id_with_a_revision(value, users_folder):
    assert parsed("prepare_data", base_model=value).base_model == value


@pytest.mark.parametrize("value", ["auto", "sample", "b-mc2/sql-create-context", "owner/name@9d80a6a1"])
def test_dataset_may_be_a_word_or_a_hub_id_with_a_revision(value, users_folder):
    assert parsed("prepare_data", dataset=value).dataset == value


@pytest.mark.parametrize("value", ["a/b/c", "owner/name@", "https://huggingface.co/owner/name"])
def test_base_model_of_another_form_is_refused_with_the_forms_that_exist(value, users_folder):
    message = refusal("prepare_data", base_model=value)
    assert message.startswith(f"base_model={value}: must be auto, smollm2-135m, a hub id")


def test_a_relative_model_folder_is_refused_with_its_absolute_form(users_folder):
    (users_folder / "models").mkdir()
    message = refusal("prepare_data", base_model="models")
    assert message.startswith("base_model=models: is a relative path")
    assert message.endswith(f": {users_folder}/models")


@pytest.mark.parametrize("value", ["rows.jsonl", "data/rows.csv", "./rows.jsonl"])
def test_a_relative_dataset_path_is_refused_with_its_absolute_form(value, users_folder):
    message = refusal("prepare_data", dataset=value)
    assert message.startswith(f"dataset={value}: is a relative path")
    assert message.endswith(f": {users_folder / value}")


def test_a_model_folder_is_accepted_from_home(users_folder, monkeypatch):
    monkeypatch.setenv("HOME", str(users_folder))
    (users_folder / "base").mkdir()
    (users_folder / "base" / "config.json").write_text("{}")
    assert parsed("prepare_data", base_model="~/base").base_model == f"{users_folder}/base"


def test_a_folder_without_config_json_is_no_model(tmp_path):
    assert refusal("prepare_data", base_model=tmp_path) == (
        f"base_model={tmp_path}: is no model directory: it has no config.json"
    )


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_a_dataset_file_is_accepted_by_its_suffix(suffix, tmp_path):
    file = tmp_path / f"rows{suffix}"
    file.touch()
    assert parsed("prepare_data", dataset=file).dataset == str(file)


def test_a_missing_dataset_file_is_refused(tmp_path):
    file = tmp_path / "rows.jsonl"
    assert refusal("prepare_data", dataset=file) == f"dataset={file}: is no file"


def test_a_folder_with_data_files_is_a_dataset(tmp_path):
    (tmp_path / "rows.csv").touch()
    assert parsed("prepare_data", dataset=tmp_path).dataset == str(tmp_path)


def test_a_folder_that_may_not_be_listed_is_the_users_error(tmp_path, monkeypatch):
    def refuse(folder):
        raise PermissionError(errno.EACCES, "Permission denied", str(folder))

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert (
        refusal("prepare_data", dataset=tmp_path) == f"dataset={tmp_path}: cannot be read: Permission denied"
    )


def test_a_folder_without_data_files_is_no_dataset(tmp_path):
    (tmp_path / "rows.xlsx").touch()
    assert "is a folder without files that end in .jsonl" in refusal("prepare_data", dataset=tmp_path)


def test_a_validation_file_is_checked_like_a_dataset_file(tmp_path, users_folder):
    assert "is no file" in refusal("prepare_data", validation_dataset=tmp_path / "gone.csv")
    assert "must end in" in refusal("prepare_data", validation_dataset=__file__)
    message = refusal("prepare_data", validation_dataset="dev.csv")
    assert message.endswith(f"give the absolute form: {users_folder}/dev.csv")


def test_a_prompt_template_is_checked_before_any_step_starts(tmp_path, users_folder):
    (tmp_path / "prompt.txt").write_text("{question}\n")
    assert "lacks {context}" in main_refusal(prompt_template=tmp_path / "prompt.txt")
    assert "is no file" in refusal("prepare_data", prompt_template=tmp_path / "gone.txt")
    assert refusal("prepare_data", prompt_template="prompt.txt").endswith(f": {users_folder}/prompt.txt")
    (tmp_path / "prompt.txt").write_text("{question}{context}\n")
    assert parsed("prepare_data", prompt_template=tmp_path / "prompt.txt").prompt_template.endswith(
        "/prompt.txt"
    )


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("question_column", "", "at least 1 character"),
        ("dataset_split", "train; x", "pattern"),
        ("prompt_style", "xml", "'plain' or 'chat'"),
    ],
)
def test_a_bad_setting_of_the_data_is_refused(name, value, reason):
    assert reason in refusal("prepare_data", **{name: value})


def test_a_dataset_file_with_another_suffix_is_refused_with_those_that_are_read(tmp_path):
    file = tmp_path / "rows.xlsx"
    file.touch()
    assert refusal("prepare_data", dataset=file) == (
        f"dataset={file}: must end in .jsonl, .json, .csv, .parquet"
    )


@pytest.mark.parametrize("name", ["base_model", "dataset"])
def test_an_empty_value_is_refused_with_the_forms_that_exist(name, users_folder):
    assert refusal("prepare_data", **{name: ""}).startswith(f"{name}=: must be auto, ")


@pytest.mark.parametrize(
    "value", ["x" * 300, "/" + "x" * 300, "~nobody-has-this-name/x"], ids=["name", "path", "home"]
)
@pytest.mark.parametrize("name", ["base_model", "dataset"])
def test_a_path_that_cannot_be_looked_up_is_the_users_error(name, value, users_folder):
    assert refusal("prepare_data", **{name: value}).startswith(f"{name}={value}: ")


# --- URIs


@pytest.mark.parametrize("value", ["runs:/0a1b/dataset", "mlflow-artifacts:/x", "s3://bucket/x", "/data/set"])
def test_an_artifact_uri_or_an_absolute_path_is_accepted(value):
    assert parsed("train", dataset_uri=value).dataset_uri == value


def test_a_home_path_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert parsed("train", dataset_uri="~/set").dataset_uri == "/home/someone/set"


def test_a_home_path_of_nobody_is_the_users_error():
    assert refusal("train", dataset_uri="~nobody-has-this-name/x").startswith("dataset_uri=~nobody")


def test_a_relative_artifact_path_is_refused_with_its_absolute_form(users_folder):
    assert refusal("train", dataset_uri="out/set").endswith(f": {users_folder}/out/set")


def test_an_empty_artifact_uri_is_refused():
    assert refusal("train", dataset_uri="") == (
        "dataset_uri=: must be an artifact URI (runs:/<run id>/<path>) or an absolute path"
    )


@pytest.mark.parametrize("value", ["models:/text2sql/12", "models:/text2sql@champion", "models:/my model/1"])
def test_a_model_uri_names_a_version_or_an_alias(value):
    assert parsed("evaluate", model_uri=value).model_uri == value


@pytest.mark.parametrize(
    "value", ["", "text2sql/1", "models:/text2sql", "models:/text2sql/latest", "runs:/0a1b/model", "/m"]
)
def test_a_model_uri_of_another_form_is_refused(value):
    assert refusal("evaluate", model_uri=value) == (
        f"model_uri={value}: must be models:/<name>/<version> or models:/<name>@<alias>"
    )


# --- text that a shell or an option parser would take for something else


@pytest.mark.parametrize(
    "value",
    [
        "--seed",
        "-x",
        "it's",
        'say "x"',
        "a\nb",
        "$(touch pwned)",
        "`touch pwned`",
        "x; touch pwned",
        "{seed}",
    ],
)
def test_a_value_goes_through_mlprojects_command_as_one_text(value, tmp_path):
    entry = load_project(str(PROJECT)).get_entry_point("prepare_data")
    given = {"dataset": value}
    argv = shlex.split(entry.compute_command(given, str(tmp_path)))
    found = dict(zip(argv[3::2], argv[4::2], strict=True))
    assert found == {f"--{name}": text for name, text in (defaults("prepare_data") | given).items()}


@pytest.mark.parametrize(
    "value", ["it's", 'say "x"', "a\nb", "$(touch pwned)", "`touch pwned`", "x; y", "a b"]
)
@pytest.mark.parametrize("name", ["base_model", "dataset"])
def test_text_of_a_shell_is_refused_as_a_value(name, value, users_folder):
    assert refusal("prepare_data", **{name: value}).startswith(f"{name}={value}: must be auto, ")


def test_a_value_with_a_dash_is_a_value_and_no_option():
    found = parsed("train", dataset_uri="/--max_steps", target_modules="--seed")
    assert (found.dataset_uri, found.target_modules) == ("/--max_steps", "--seed")
    assert found.seed == 42


def test_a_hub_id_does_not_begin_with_a_dash(users_folder):
    assert refusal("prepare_data", base_model="--quantization").startswith(
        "base_model=--quantization: must be"
    )


def test_a_path_keeps_quotes_spaces_and_dollar_signs(tmp_path):
    file = tmp_path / 'it\'s $(a) "b"\nc.jsonl'
    file.touch()
    assert parsed("prepare_data", dataset=file).dataset == str(file)


@pytest.mark.parametrize(
    "argv", [["--max_steps"], ["max_steps", "7"], ["--max_steps=7"], ["-m", "7"], ["--a", "1", "stray"]]
)
def test_words_that_are_no_pairs_are_refused(argv):
    with pytest.raises(UserError, match="parameters must come as --name value pairs"):
        parse(CHAIN["train"], argv)


def test_a_name_given_twice_is_refused():
    with pytest.raises(UserError, match="seed"):
        parse(CHAIN["prepare_data"], [*words(defaults("prepare_data")), "--seed", "7"])


# --- main


def test_main_hands_on_what_one_of_its_steps_declares():
    found = parse_main(words(defaults("main") | {"save_steps": 7, "min_execution_accuracy": 0.5}))
    assert [step for step, values in found.steps.items() if "save_steps" in values] == ["train"]
    assert found.steps["train"]["save_steps"] == "7"
    assert found.steps["promote"]["min_execution_accuracy"] == "0.5"


def test_main_hands_on_the_whole_of_a_path_from_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rows.csv").touch()
    (tmp_path / "two.yaml").write_text("distributed_type: MULTI_CPU\nnum_processes: 2\nuse_cpu: true\n")
    given = {"dataset": "~/rows.csv", "launch": "~/two.yaml", "learning_rate": "1e-3"}
    found = parse_main(words(defaults("main") | given))
    assert found.steps["prepare_data"]["dataset"] == str(tmp_path / "rows.csv")
    assert found.steps["train"]["launch"] == str(tmp_path / "two.yaml")
    assert found.steps["train"]["learning_rate"] == "1e-3"
    main.check_devices(found.steps["train"])
    assert not reuse.may_have_moved("prepare_data", found.steps["prepare_data"], device="cpu")
    assert found.given["dataset"] == "~/rows.csv"


def test_main_checks_what_it_hands_on_before_the_first_step():
    assert main_refusal(save_steps=0).startswith("save_steps=0: must be greater than or equal to 1")


def test_main_refuses_a_misspelt_name_of_a_step():
    assert main_refusal(save_step=7) == "save_step=7: no such parameter; did you mean save_steps?"


@pytest.mark.parametrize("name", sorted(SET_BY_MAIN))
def test_main_refuses_what_it_finds_out_itself(name):
    assert f"{name}: main finds this out itself" in main_refusal(**{name: FOUND.get(name, "0a1b")})


def test_main_sets_every_parameter_that_has_no_default():
    needed = {n for step in CHAIN for n in CHAIN[step].__annotations__ if n not in defaults(step)}
    assert needed <= SET_BY_MAIN


def test_main_names_its_own_bad_values_with_those_of_its_steps():
    lines = main_refusal(promotion="always", max_steps=0, test_size=2).split("\n")
    assert [line.split("=")[0] for line in lines] == ["max_steps", "promotion", "test_size"]


def test_main_names_its_missing_parameters():
    with pytest.raises(UserError, match="^promotion: missing\nresume: missing\nreuse: missing$"):
        parse_main([])


def test_a_parameter_that_several_steps_declare_has_one_meaning():
    hints: dict[str, object] = {}
    for step, kind in CHAIN.items():
        for name, hint in get_type_hints(kind, include_extras=True).items():
            if (step, name) not in {("evaluate", "dataset"), ("evaluate", "dataset_uri")}:  # may be empty
                assert hints.setdefault(name, hint) == hint


# --- the folder in which the user stands


def process(*cmdline: str, cwd: str = "/nowhere") -> SimpleNamespace:
    """A process as far as `users_folder` looks."""
    return SimpleNamespace(cmdline=lambda: list(cmdline), cwd=lambda: cwd)


@pytest.fixture
def ancestors(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets the processes above this one, nearest first."""

    def put(*processes: SimpleNamespace) -> None:
        monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(parents=lambda: list(processes)))

    return put


def test_the_users_folder_is_that_of_the_nearest_mlflow_which_may_be_run_by_another(ancestors):
    typed = process("/env/bin/python", "/env/bin/mlflow", "run", ".", cwd="/home/me")
    other = process("/env/bin/python", "/env/bin/mlflow", "run", ".", "-e", "tests", cwd="/project")
    ancestors(
        process("bash", "-c", "python -m steps.main", cwd="/project"), typed, other, process("zsh", cwd="/")
    )
    assert processes.users_folder() == Path("/home/me")


def test_python_m_mlflow_is_a_launcher_too(ancestors):
    ancestors(process("python", "-m", "mlflow", "run", ".", cwd="/home/me"))
    assert processes.users_folder() == Path("/home/me")


def test_without_mlflow_the_users_folder_is_this_one(ancestors, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ancestors(process("zsh"), process("/sbin/init"))
    assert processes.users_folder() == tmp_path


def test_a_process_that_may_not_be_looked_at_is_passed_over(ancestors):
    # On macOS every process of root, launchd among them, refuses.
    def refuse() -> list[str]:
        raise psutil.AccessDenied(1)

    launchd = SimpleNamespace(cmdline=refuse, cwd=refuse)
    ancestors(process("python", "mlflow", "run", ".", cwd="/home/me"), launchd)
    assert processes.users_folder() == Path("/home/me")


def test_a_terminal_session_named_mlflow_is_no_launcher(ancestors):
    typed = process("python", "/env/bin/mlflow", "run", ".", cwd="/home/me/project")
    ancestors(typed, process("screen", "-S", "mlflow", cwd="/home/me"))
    assert processes.users_folder() == Path("/home/me/project")


@pytest.mark.parametrize("refused", [partial(refusal, "train"), main_refusal], ids=["train", "main"])
def test_a_correction_of_a_base_that_is_not_quantized_is_refused_before_any_work(refused):
    message = refused(quantization="none", quantization_correction="yes")
    assert message.startswith("quantization_correction=yes: with quantization=none ")
    assert message.endswith("give quantization_correction=no")
