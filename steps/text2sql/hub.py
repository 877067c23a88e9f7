"""The model hub: from a name to one commit, with errors that a user can act on."""

from dataclasses import dataclass
from typing import Literal

import httpx
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
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
    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{name}"
    problem = f"{parameter}={value}"
    try:
        info = HfApi().repo_info(name, revision=revision or None, repo_type=kind, files_metadata=True)
        if info.gated:
            hf_hub_download(name, "config.json", revision=info.sha, repo_type=kind)
    except GatedRepoError as error:
        raise UserError(
            f"{problem}: gated. Accept its terms on {page} and set HF_TOKEN, or give {instead}."
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"{problem}: {name} has no revision {revision}; see {page}/commits.") from error
    except (RepositoryNotFoundError, EntryNotFoundError) as error:
        raise UserError(
            f"{problem}: the hub has no such {kind}; look at {page}, set HF_TOKEN if it is private, "
            f"or give {instead}."
        ) from error
    except (httpx.HTTPError, HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        raise UserError(f"{problem}: the hub is out of reach ({page}: {error}). Give {instead}.") from error
    files = {file.rfilename: file.size or 0 for file in info.siblings or []}
    return HubRepository(name, info.sha, files, str((info.card_data or {}).get("license") or "unknown"))


def license_text(repository: HubRepository) -> str:
    """Text of the repository's LICENSE file, or its card's identifier and where it stands."""
    names = [
        name for name in repository.files if name.upper().split(".")[0] in ("LICENSE", "LICENCE", "COPYING")
    ]
    if names:
        with open(
            hf_hub_download(repository.name, names[0], revision=repository.commit), encoding="utf-8"
        ) as file:
            return file.read()
    return f"{repository.license}, see https://huggingface.co/{repository.name}\n"
