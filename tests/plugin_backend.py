"""An MLflow project backend as a plugin has it: runs an entry point as a process of this machine, elsewhere.

`backend_config` may say `exit_status`, to end so without running anything, and `seconds` to wait before.
"""

import os
import subprocess
import threading
import time

from mlflow.projects import SubmittedRun
from mlflow.projects.backend.abstract_backend import AbstractBackend
from mlflow.projects.utils import fetch_and_validate_project, get_or_create_run, load_project

# How the distribution of a plugin names it; see `install`.
ENTRY_POINTS = "[mlflow.project_backend]\nelsewhere = tests.plugin_backend:Elsewhere\n"
submitted: list["Job"] = []
# What has happened, for who waits for it.
happened = {"submitting": threading.Event(), "waiting": threading.Event()}


def install(folder, monkeypatch):
    """Make the plugin known, as installing its package would."""
    information = folder / "elsewhere-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: elsewhere\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(str(folder))
    submitted.clear()
    for event in happened.values():
        event.clear()


class Elsewhere(AbstractBackend):
    """Submits jobs."""

    def run(self, project_uri, entry_point, params, version, backend_config, tracking_uri, experiment_id):
        """Start the entry point."""
        folder = fetch_and_validate_project(project_uri, version, entry_point, params)
        run = get_or_create_run(None, project_uri, experiment_id, folder, version, entry_point, params)
        command = load_project(folder).get_entry_point(entry_point).compute_command(params, None)
        if "exit_status" in backend_config:
            seconds, status = backend_config.get("seconds", 0), backend_config["exit_status"]
            command = f"sleep {seconds}; exit {status}"
        submitted.append(Job(run.info.run_id, command, folder, tracking_uri))
        happened["submitting"].set()
        return submitted[-1]


class Job(SubmittedRun):
    """A process with a run."""

    def __init__(self, run_id, command, folder, tracking_uri):
        self._run_id = run_id
        kept = {name: value for name, value in os.environ.items() if not name.startswith("TEXT2SQL")}
        self.process = subprocess.Popen(
            command,
            shell=True,
            cwd=folder,
            env=kept | {"MLFLOW_RUN_ID": run_id, "MLFLOW_TRACKING_URI": tracking_uri},
            start_new_session=True,
        )

    @property
    def run_id(self):
        """Id of its run."""
        return self._run_id

    def wait(self):
        """Whether it succeeded."""
        happened["waiting"].set()
        while self.process.poll() is None:  # as MLflow's backend for Databricks does
            time.sleep(0.1)
        return self.process.returncode == 0

    def get_status(self):
        """Its status."""
        return {None: "RUNNING", 0: "FINISHED"}.get(self.process.poll(), "FAILED")

    def cancel(self):
        """End it."""
        os.killpg(self.process.pid, 15)
        self.process.wait()
