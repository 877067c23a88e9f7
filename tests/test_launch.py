"""Starting a step in several processes: what is refused before, how they end, and what is left then."""

import os
import signal
import subprocess
import sys

import mlflow
import psutil
import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from mlflow.artifacts import download_artifacts
from safetensors.torch import load_file
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from steps.text2sql import artifacts, launch_config, launching, ranks
from steps.text2sql.errors import Interrupted, UserError
from tests.conftest import PROJECT, QUICK, call_step, defaults, failure, words

END_LIMIT_SECONDS = 120
ON_CPU = {"distributed_type": "MULTI_CPU", "num_processes": 2, "use_cpu": True}


@pytest.fixture
def config(tmp_path):
    """Writes an accelerate configuration; its path comes back."""

    def write(**values):
        file = tmp_path / "accelerate.yaml"
        file.write_text(yaml.safe_dump(values))
        return str(file)

    return write


# Configurations


@pytest.mark.parametrize(("name", "kind"), [("ddp", "MULTI_GPU"), ("fsdp", "FSDP")])
def test_accelerate_reads_the_projects_own_configurations(name, kind):
    read = load_config_from_file(str(launch_config.OWN[name]))
    assert read.distributed_type == kind
    assert launch_config.read(name).processes is None


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"distributed_type": "DEEPSPEED"}, "distributed_type=DEEPSPEED: must be MULTI_GPU, FSDP, MULTI_CPU"),
        ({"num_processes": 1}, "num_processes=1: must be 2 or more"),
        ({"num_processes": None}, "num_processes=None: must be 2 or more"),
        ({"num_machines": 3}, "num_machines=3: must divide num_processes=2"),
        ({"num_machines": 2}, "main_process_ip and main_process_port: needed"),
        ({"compute_environment": "AMAZON_SAGEMAKER"}, "compute_environment: must be LOCAL_MACHINE"),
        ({"distributed_type": "FSDP", "fsdp_config": "yes"}, "fsdp_config: must be a mapping"),
        ({"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 1}}, "fsdp_version: must be 2"),
        (
            {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2}},
            "fsdp_cpu_ram_efficient_loading: must be false",
        ),
        (
            {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2, "fsdp_offload_params": True}},
            "fsdp_offload_params: is not supported",
        ),
    ],
)
def test_a_configuration_that_cannot_work_is_refused_with_the_reason(config, changed, reason):
    with pytest.raises(ValueError, match=reason):
        launch_config.read(config(**ON_CPU | changed))


@pytest.mark.parametrize("text", ["", "- 1", "a: [", "\x00"])
def test_a_file_that_is_no_configuration_is_refused(tmp_path, text):
    file = tmp_path / "x.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match="is no configuration of accelerate|cannot be read"):
        launch_config.read(str(file))


@pytest.mark.parametrize(("launch", "gpus"), [("ddp", 0), ("ddp", 1), ("fsdp", 1)])
def test_fewer_gpus_than_two_are_refused_with_the_way_out(launch, gpus):
    with pytest.raises(
        UserError, match=f"launch={launch}: needs 2 GPUs or more .*and {gpus} .*launch=single"
    ):
        launch_config.check_gpus(launch, gpus)


def test_as_many_gpus_as_processes_on_this_machine_are_needed(config):
    two = {"num_machines": 2, "main_process_ip": "10.0.0.1", "main_process_port": 29500}
    file = config(distributed_type="MULTI_GPU", num_processes=8, **two)
    launch_config.check_gpus(file, 4)
    with pytest.raises(UserError, match="needs 4 GPUs on this machine, and 3 are visible"):
        launch_config.check_gpus(file, 3)


def test_one_process_and_processes_on_the_cpu_need_no_gpu(config):
    launch_config.check_gpus("single", 0)
    launch_config.check_gpus(config(**ON_CPU), 0)


def test_all_visible_gpus_are_taken_and_a_free_port():
    given = launching.accelerate_words(launch_config.read("fsdp"), gpus=4)
    assert given[given.index("--num_processes") + 1] == "4"
    assert given[given.index("--main_process_port") + 1] == "0"


def test_the_port_of_several_machines_is_the_users(config):
    file = config(**ON_CPU, num_machines=2, main_process_ip="10.0.0.1", main_process_port=29500)
    assert "--main_process_port" not in launching.accelerate_words(launch_config.read(file), gpus=0)


# The step


def test_train_without_two_gpus_is_refused_before_any_process_is_started(store, monkeypatch, tmp_path):
    monkeypatch.setattr(launching, "_launch", lambda words: pytest.fail("started"))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    message, run = failure("train", dataset_uri=str(tmp_path), launch="ddp", **QUICK)
    assert message.startswith("\nError: launch=ddp: needs 2 GPUs or more on this machine, and 1 is visible;")
    assert run.info.status == "FAILED"


def test_a_training_that_main_did_not_send_elsewhere_is_refused(store, tmp_path):
    message, _ = failure("train", dataset_uri=str(tmp_path), project_backend="databricks", **QUICK)
    assert "project_backend=databricks: is for main" in message


@pytest.mark.slow
def test_two_processes_leave_what_one_leaves(chain, config, capfd):
    run = call_step("train", dataset_uri=chain.dataset_uri, launch=config(**ON_CPU), **QUICK)
    assert run.info.status == "FINISHED"
    client = mlflow.MlflowClient()
    for metric in ("train_loss", "eval_loss", "train_loss_mean"):
        one, two = (
            [(point.step, point.value) for point in client.get_metric_history(found.info.run_id, metric)]
            for found in (chain.train, run)
        )
        assert [step for step, _ in two] == [step for step, _ in one]
        assert [value for _, value in two] == pytest.approx([value for _, value in one], rel=1e-3)
    one, two = (
        load_file(download_artifacts(f"runs:/{found.info.run_id}/adapter/adapter_model.safetensors"))
        for found in (chain.train, run)
    )
    assert one.keys() == two.keys()
    # AdamW moves a weight by the learning rate where its gradient is near zero, whatever its sign.
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-3
    for path in ("", "checkpoints"):
        assert artifacts.listed(run.info.run_id, path) == artifacts.listed(chain.train.info.run_id, path)
    assert chain.train.data.params.keys() <= run.data.params.keys()
    assert run.data.params["chosen/processes"] == "2, 2 on this machine, rows divided among them"
    printed = capfd.readouterr()
    assert printed.out.count("trainable  ") == 1
    assert "Traceback" not in printed.err


@pytest.mark.slow
def test_sigterm_ends_all_processes_with_a_checkpoint_of_the_last_step(chain, config, tmp_path):
    values = defaults("train") | QUICK | {"dataset_uri": chain.dataset_uri, "launch": config(**ON_CPU)}
    process = subprocess.Popen(
        [sys.executable, "-m", "steps.train", *words(values | {"max_steps": 1_000_000})],
        cwd=PROJECT,
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    first = next((line for line in process.stdout if line.startswith("Checkpoint: ")), "")
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    assert len([one for one in family if "LOCAL_RANK" in one.environ()]) == 2
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=END_LIMIT_SECONDS)[0]
    assert psutil.wait_procs(family, timeout=0)[1] == []
    assert process.returncode == 1
    assert "Traceback" not in output
    assert "Stopped by SIGTERM.\n\nTo go on:\n  mlflow run " in output
    assert " -P resume_from=" in output
    assert "dry_run" not in output
    run = mlflow.get_run(first.removeprefix("Checkpoint: runs:/").split("/")[0])
    assert (run.info.status, run.data.tags["stopped_by"]) == ("KILLED", "SIGTERM")
    newest = max(artifacts.listed(run.info.run_id, "checkpoints"), key=lambda path: int(path.split("-")[-1]))
    last = max(p.step for p in mlflow.MlflowClient().get_metric_history(run.info.run_id, "train_loss"))
    assert newest == f"checkpoints/checkpoint-{last}"


@pytest.mark.parametrize(
    ("how", "error", "reason"),
    [
        ("fails", UserError, "^rows: there are none$"),
        ("fails_and_is_blocked", UserError, "^rows: there are none$"),
        ("breaks", UserError, "^process 1: ZeroDivisionError: division by zero$"),
        ("is_killed", UserError, "process 1 was killed by SIGKILL"),
        ("is_killed_beside_a_busy_one", UserError, "process 1 was killed by SIGKILL"),
        ("is_killed_beside_one_stopped_late", UserError, "process 1 was killed by SIGKILL"),
        ("is_stopped", Interrupted, "^SIGTERM$"),
        ("is_left", UserError, "process . ended with exit status 1; another process is gone: "),
    ],
)
def test_one_that_does_not_end_well_ends_all_with_its_reason(store, config, capfd, how, error, reason):
    before = psutil.Process().children(recursive=True)
    with mlflow.start_run(), pytest.raises(error, match=reason):
        launching.run("tests.restless_processes", {"how": how}, launch=config(**ON_CPU))
    assert set(psutil.Process().children(recursive=True)) <= set(before)
    printed = capfd.readouterr()
    assert "from 0" in printed.out
    assert "from 1" not in printed.out
    assert printed.err.count("Traceback") == (how == "breaks")


SIGKILL, SIGTERM = -signal.SIGKILL, -signal.SIGTERM


@pytest.mark.parametrize(
    ("ended", "told", "problem"),
    [
        # process: (second, exit status), in the order in which torch noticed; process: (kind, time)
        ({0: (5, 1), 1: (5, SIGKILL)}, {0: ("left", 2.0)}, "process 1 was killed by SIGKILL"),
        ({0: (5, 1), 1: (5, SIGKILL)}, {0: ("stopped", 2.0)}, "process 1 was killed by SIGKILL"),
        ({0: (5, 1), 1: (6, SIGKILL)}, {0: ("left", 2.0)}, "process 1 was killed by SIGKILL"),
        ({0: (5, 1), 1: (5, 1)}, {0: ("left", 3.0), 1: ("stopped", 2.0)}, ""),
        (
            {0: (5, 1), 1: (5, 1)},
            {0: ("stopped", 3.0), 1: ("left", 2.0)},
            "process 1 ended with exit status 1",
        ),
        ({1: (5, 1), 0: (25, SIGKILL)}, {1: ("stopped", 2.0)}, ""),  # 0 did not end by itself when asked to
        ({1: (5, 1), 0: (5, SIGTERM)}, {1: ("stopped", 2.0)}, ""),
        ({1: (5, SIGTERM), 0: (6, SIGTERM)}, {}, "process 1 was killed by SIGTERM"),
        ({0: (5, 3), 1: (5, SIGTERM)}, {}, "process 0 ended with exit status 3"),
    ],
)
def test_the_process_is_named_that_ended_all(ended, told, problem):
    failures = {}
    for process, (second, status) in ended.items():
        failures[process] = ProcessFailure(process, 100 + process, status, "/no/such/file")
        failures[process].timestamp = second
    endings = {process: ranks.Ending(kind, "", "", time, process) for process, (kind, time) in told.items()}
    found = launching._problem(ChildFailedError("a step", failures), endings)
    assert found.startswith(problem) if problem else found == ""
