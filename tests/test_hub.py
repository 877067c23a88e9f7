"""Names of the hub become commits, or errors that say what to do; against a hub of one thread."""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from huggingface_hub import HfApi, hf_hub_download

from steps.text2sql import hub
from steps.text2sql.base_model import INSTEAD
from steps.text2sql.errors import UserError
from tests.conftest import PROJECT

COMMIT = "a" * 40
OLDER = "b" * 40
LICENSE = "Licence of the base, with an é\n"


class Answer(NamedTuple):
    """One answer of the fake hub."""

    status: int
    body: bytes = b""
    headers: dict[str, str] = {}


def info(**changes: Any) -> Answer:
    """What the hub says of a repository."""
    files = {"config.json": 2, "LICENSE": len(LICENSE.encode()), "a.safetensors": 300, "b.safetensors": 40}
    said = {
        "id": "owner/name",
        "sha": COMMIT,
        "gated": False,
        "cardData": {"license": "apache-2.0"},
        "siblings": [{"rfilename": name, "size": size} for name, size in files.items()],
    }
    return Answer(200, json.dumps(said | changes).encode(), {"Content-Type": "application/json"})


def file(body: bytes) -> Answer:
    """A file of a repository."""
    return Answer(200, body, {"X-Repo-Commit": COMMIT, "ETag": '"0a1b2c"'})


def error(status: int, code: str = "", message: str = "") -> Answer:
    """An error as the hub writes it."""
    headers = {"X-Error-Code": code, "X-Error-Message": message}
    return Answer(status, b"", {name: text for name, text in headers.items() if text})


UNKNOWN = error(404, "RepoNotFound", "Repository not found")


@contextmanager
def serving(answers: dict[str, Answer]) -> Iterator[str]:
    """A hub that knows these paths; its address."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            status, body, headers = answers.get(self.path.split("?")[0], UNKNOWN)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_GET = do_HEAD = answer

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[SimpleNamespace]:
    """A hub in this process: `answers` by path; every call of `hub` goes to it."""
    answers: dict[str, Answer] = {}
    with serving(answers) as address:
        fake = SimpleNamespace(answers=answers, point_to=partial(point_to, monkeypatch, tmp_path))
        fake.point_to(address)
        yield fake


def point_to(monkeypatch: pytest.MonkeyPatch, cache: Path, address: str) -> None:
    """Make `hub` talk to an address, with an empty cache and no token."""
    monkeypatch.setattr(hub, "HfApi", partial(HfApi, endpoint=address, token=False))
    monkeypatch.setattr(
        hub, "hf_hub_download", partial(hf_hub_download, endpoint=address, cache_dir=cache, token=False)
    )


def resolve(value: str = "owner/name") -> hub.HubRepository:
    """Resolve a model."""
    return hub.resolve(value, parameter="base_model", kind="model", instead=INSTEAD)


def refusal(value: str = "owner/name") -> str:
    """The message with which a model is refused."""
    with pytest.raises(UserError) as caught:
        resolve(value)
    message = str(caught.value)
    assert message.startswith(f"base_model={value}: ")
    return message


def assert_names_the_ways_out(message: str, page: str = "https://huggingface.co/owner/name") -> None:
    """The page, the token, a directory, and the embedded base."""
    ways = (page, "HF_TOKEN", "directory of a downloaded model", "base_model=smollm2-135m")
    assert [way for way in ways if way not in message] == []


def closed_port() -> int:
    """A port at which nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_a_name_becomes_its_newest_commit(fake):
    fake.answers["/api/models/owner/name"] = info()
    found = resolve()
    assert found.reference == f"owner/name@{COMMIT}"
    assert (found.name, found.commit, found.license) == ("owner/name", COMMIT, "apache-2.0")


def test_a_revision_becomes_its_own_commit(fake):
    fake.answers["/api/models/owner/name"] = info()
    fake.answers["/api/models/owner/name/revision/v1"] = info(sha=OLDER)
    assert resolve("owner/name@v1").reference == f"owner/name@{OLDER}"


def test_a_pull_request_is_a_revision(fake):
    fake.answers["/api/models/owner/name/revision/refs%2Fpr%2F1"] = info(sha=OLDER)
    assert resolve("owner/name@refs/pr/1").commit == OLDER


def test_a_dataset_is_looked_up_among_the_datasets(fake):
    fake.answers["/api/datasets/owner/rows"] = info(id="owner/rows")
    found = hub.resolve("owner/rows", parameter="dataset", kind="dataset", instead="dataset=sample")
    assert found.reference == f"owner/rows@{COMMIT}"


def test_size_is_that_of_the_files_with_a_suffix(fake):
    fake.answers["/api/models/owner/name"] = info()
    assert resolve().size(".safetensors") == 340


def test_a_repository_without_a_card_has_an_unknown_licence(fake):
    fake.answers["/api/models/owner/name"] = info(cardData=None)
    assert resolve().license == "unknown"


def test_an_unknown_model_names_the_ways_out(fake):
    message = refusal()
    assert "no such model" in message
    assert_names_the_ways_out(message)


def test_a_model_that_needs_a_login_names_the_ways_out(fake):
    # What the hub says of a private and of a missing repository to one who is not logged in.
    fake.answers["/api/models/owner/name"] = error(401, "RepoNotFound", "Repository not found")
    assert_names_the_ways_out(refusal())


def test_an_unknown_dataset_names_its_own_page(fake):
    with pytest.raises(UserError, match="^dataset=owner/rows: the hub has no such dataset") as caught:
        hub.resolve("owner/rows", parameter="dataset", kind="dataset", instead="dataset=sample")
    assert "https://huggingface.co/datasets/owner/rows," in str(caught.value)


def test_an_unknown_revision_is_named_with_the_page_of_those_that_exist(fake):
    fake.answers["/api/models/owner/name/revision/v9"] = error(404, "RevisionNotFound")
    assert refusal("owner/name@v9") == (
        "base_model=owner/name@v9: owner/name has no revision v9; "
        "see https://huggingface.co/owner/name/commits."
    )


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_model_names_the_ways_out(fake, status):
    fake.answers["/api/models/owner/name"] = info(gated="auto")
    fake.answers[f"/owner/name/resolve/{COMMIT}/config.json"] = error(status, "GatedRepo")
    message = refusal()
    assert "gated. Accept its terms" in message
    assert_names_the_ways_out(message)


def test_a_gated_model_is_resolved_for_one_whose_access_was_granted(fake):
    fake.answers["/api/models/owner/name"] = info(gated="manual")
    fake.answers[f"/owner/name/resolve/{COMMIT}/config.json"] = file(b"{}")
    assert resolve().commit == COMMIT


def test_a_gated_dataset_without_access_is_said_to_be_gated(fake):
    fake.answers["/api/datasets/owner/rows"] = info(gated="auto")
    for name in ("config.json", "README.md", "rows.jsonl"):
        fake.answers[f"/datasets/owner/rows/resolve/{COMMIT}/{name}"] = error(403, "GatedRepo")
    with pytest.raises(UserError, match="^dataset=owner/rows: gated. Accept its terms on .* HF_TOKEN"):
        hub.resolve("owner/rows", parameter="dataset", kind="dataset", instead="dataset=sample")


def test_a_gated_dataset_is_resolved_for_one_whose_access_was_granted(fake):
    # A dataset has no config.json.
    fake.answers["/api/datasets/owner/rows"] = info(
        gated="auto",
        siblings=[{"rfilename": ".gitattributes", "size": 2}, {"rfilename": "rows.jsonl", "size": 9}],
    )
    for name in (".gitattributes", "rows.jsonl"):
        fake.answers[f"/datasets/owner/rows/resolve/{COMMIT}/{name}"] = file(b"{}")
    missing = error(404, "EntryNotFound")
    fake.answers[f"/datasets/owner/rows/resolve/{COMMIT}/config.json"] = missing
    found = hub.resolve("owner/rows", parameter="dataset", kind="dataset", instead="dataset=sample")
    assert found.commit == COMMIT


def test_a_hub_out_of_reach_names_the_ways_out(fake):
    fake.point_to(f"http://127.0.0.1:{closed_port()}")
    message = refusal()
    assert "out of reach" in message
    assert_names_the_ways_out(message)


def test_a_hub_in_trouble_names_the_ways_out(fake):
    fake.answers["/api/models/owner/name"] = error(500)
    message = refusal()
    assert "500" in message
    assert_names_the_ways_out(message)


def test_a_refused_token_is_named(fake):
    fake.answers["/api/models/owner/name"] = error(401, message="Invalid credentials in Authorization header")
    assert "HF_TOKEN" in refusal()


def test_an_answer_that_is_no_hubs_is_the_users_error(fake):
    # A login page of a hotel, for one.
    fake.answers["/api/models/owner/name"] = Answer(200, b"<html>", {"Content-Type": "text/html"})
    assert_names_the_ways_out(refusal())


def test_offline_mode_names_the_ways_out():
    ask = (
        "from steps.text2sql import hub\n"
        "try:\n"
        f"    hub.resolve('owner/name', parameter='base_model', kind='model', instead={INSTEAD!r})\n"
        "except hub.UserError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", ask],
        cwd=PROJECT,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": f"http://127.0.0.1:{closed_port()}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "HF_HUB_OFFLINE" in done.stdout
    assert_names_the_ways_out(done.stdout)


@pytest.mark.parametrize(
    "value", ["-x/name", "owner/na--me", "owner/na..me", "owner/name.git", "o/" + "n" * 96]
)
def test_a_name_that_the_hub_does_not_allow_is_the_users_error(fake, value):
    refusal(value)


# --- the text of the licence


def test_the_licence_is_the_repositorys_file(fake):
    fake.answers["/api/models/owner/name"] = info()
    fake.answers[f"/owner/name/resolve/{COMMIT}/LICENSE"] = file(LICENSE.encode())
    assert hub.license_text(resolve()) == LICENSE


@pytest.mark.parametrize("name", ["LICENSE.md", "License.txt", "LICENCE", "COPYING"])
def test_the_licences_file_may_have_a_usual_name(fake, name):
    fake.answers["/api/models/owner/name"] = info(siblings=[{"rfilename": name, "size": 3}])
    fake.answers[f"/owner/name/resolve/{COMMIT}/{name}"] = file(b"MIT")
    assert hub.license_text(resolve()) == "MIT"


def test_without_a_file_the_licence_is_what_the_card_says_and_where(fake):
    fake.answers["/api/models/owner/name"] = info(siblings=[])
    assert hub.license_text(resolve()) == "apache-2.0, see https://huggingface.co/owner/name\n"


def test_a_licence_that_cannot_be_fetched_is_the_users_error(fake):
    fake.answers["/api/models/owner/name"] = info()
    fake.answers[f"/owner/name/resolve/{COMMIT}/LICENSE"] = error(403)
    with pytest.raises(UserError):
        hub.license_text(resolve())
