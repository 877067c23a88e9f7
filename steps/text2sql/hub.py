"""The model hub: from a name to one commit, with errors that a user can act on."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import httpx
from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from steps.text2sql.errors import UserError


@dataclass(frozen=True)
class HubRepository:
    """One commit of a hub repository; `files` maps names to bytes, `license` is its card's identifier."""

    name: str
    commit: str
    files: dict[str, int]
    license: str

    @property
    def reference(self) -> str:
        """`owner/name@commit`."""
        return f"{self.name}@{self.commit}"

    def size(self, suffix: str) -> int:
        """Bytes of all files that end in `suffix`."""
        return sum(size for name, size in self.files.items() if name.endswith(suffix))


def resolve(value: str, *, parameter: str, kind: Literal["model", "dataset"], instead: str) -> HubRepository:
    """Look up `owner/name` or `owner/name@revision` and pin it to a commit.

    `instead` says what else the user can give for `parameter`.

    Raises:
        UserError: unknown name or revision, gated, or the hub is out of reach.
    """
    name, _, revision = value.partition("@")
    with _errors(f"{parameter}={value}", _page(name, kind), instead, kind=kind):
        info = HfApi().repo_info(name, revision=revision or None, repo_type=kind, files_metadata=True)
        files = {file.rfilename: file.size or 0 for file in info.siblings or []}
        if info.gated and files:  # the list of files is public, their contents are not
            hf_hub_download(name, min(files, key=files.get), revision=info.sha, repo_type=kind)
    return HubRepository(name, info.sha, files, str((info.card_data or {}).get("license") or "unknown"))


def missing_bytes(repository: HubRepository, suffix: str) -> int:
    """Bytes of those files that end in `suffix` and are not in this machine's cache."""
    cached = {
        name: isinstance(try_to_load_from_cache(repository.name, name, revision=repository.commit), str)
        for name in repository.files
    }
    return sum(size for name, size in repository.files.items() if name.endswith(suffix) and not cached[name])


def license_text(repository: HubRepository) -> str:
    """Text of a base model's LICENSE file, or its card's identifier and where it stands.

    Raises:
        UserError: the file cannot be fetched.
    """
    names = [
        name for name in repository.files if name.upper().split(".")[0] in ("LICENSE", "LICENCE", "COPYING")
    ]
    page = _page(repository.name, "model")
    if not names:
        return f"{repository.license}, see {page}\n"
    with _errors(
        f"base_model={repository.name}", page, "base_model=<absolute directory of a downloaded model>"
    ):
        path = hf_hub_download(repository.name, names[0], revision=repository.commit)
    return Path(path).read_text(encoding="utf-8", errors="replace")


def _page(name: str, kind: str) -> str:
    return f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{name}"


@contextmanager
def _errors(problem: str, page: str, instead: str, *, kind: str = "model") -> Iterator[None]:
    """What the hub's client raises, as what the user can do."""
    try:
        yield
    except GatedRepoError as error:
        raise UserError(
            f"{problem}: gated. Accept its terms on {page} and set HF_TOKEN, or give {instead}."
        ) from error
    except RevisionNotFoundError as error:
        name, _, revision = problem.partition("=")[2].partition("@")
        raise UserError(f"{problem}: {name} has no revision {revision}; see {page}/commits.") from error
    except HFValidationError as error:
        raise UserError(f"{problem}: is no name that the hub allows: {error}. Give {instead}.") from error
    except (
        LocalEntryNotFoundError
    ) as error:  # an EntryNotFoundError too, but it says that the hub did not answer
        raise UserError(_unreachable(problem, page, instead, error)) from error
    except (RepositoryNotFoundError, EntryNotFoundError) as error:
        raise UserError(
            f"{problem}: the hub has no such {kind}; look at {page}, set HF_TOKEN if it is private, "
            f"or give {instead}."
        ) from error
    # ValueError: something that is no hub answered with a page of its own
    except (httpx.HTTPError, HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(_unreachable(problem, page, instead, error)) from error


def _unreachable(problem: str, page: str, instead: str, error: Exception) -> str:
    if isinstance(error, HfHubHTTPError) and error.response.status_code == 401:
        return f"{problem}: the hub refused the token ({error}); renew HF_TOKEN, or give {instead}."
    return (
        f"{problem}: the hub is out of reach ({page}: {error}). Give {instead}; "
        "where the hub wants to know you, set HF_TOKEN."
    )
