"""Datasets of the Hugging Face hub as lists of parquet files, at a revision that is resolved once.

    files = listing("HuggingFaceFW/fineweb-edu", "sample/10BT")       # at the newest commit, which is recorded
    fetch(files[0], Path("parts"))                                    # verified by its sha256, resumed where it was cut

| name | repository | files | tokens |
|---|---|---|---|
| `fineweb-edu` | HuggingFaceFW/fineweb-edu | sample/10BT | 10B |
| `fineweb-edu-100b` | HuggingFaceFW/fineweb-edu | sample/100BT | 100B |
| `fineweb` | HuggingFaceFW/fineweb | sample/10BT | 10B |
| `openwebtext` | Skylion007/openwebtext | plain_text | 9B |
| `wikitext-103` | Salesforce/wikitext | wikitext-103-raw-v1/train | 0.1B |

Any other dataset is `repo:config:split:column`; its files are those that the hub converts every dataset to (`refs/convert/parquet`).
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anew.errors import UserError
from anew.utils.files import sha256_of

NAMED = {
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample/10BT/"),
    "fineweb-edu-100b": ("HuggingFaceFW/fineweb-edu", "sample/100BT/"),
    "fineweb": ("HuggingFaceFW/fineweb", "sample/10BT/"),
    "openwebtext": ("Skylion007/openwebtext", "plain_text/"),
    "wikitext-103": ("Salesforce/wikitext", "wikitext-103-raw-v1/train"),
}
CONVERTED = "refs/convert/parquet"
ATTEMPTS, PAUSE_SECONDS = 5, 2.0


@dataclass(frozen=True)
class HubFile:
    """One file of a dataset at one commit."""

    repository: str
    revision: str
    path: str
    size: int  # bytes
    sha256: str


def listing(repository: str, prefix: str, revision: str = "main") -> list[HubFile]:
    """The parquet files whose path begins with `prefix`, in order. `revision` may be a branch; the files name its commit."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.hf_api import RepoFile

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    folder = prefix.rpartition("/")[0]
    try:
        commit = api.dataset_info(repository, revision=revision).sha
        assert commit is not None
        entries = list(
            api.list_repo_tree(
                repository, folder or None, recursive=True, revision=commit, repo_type="dataset"
            )
        )
    except RepositoryNotFoundError as error:
        raise UserError(f"there is no public dataset '{repository}' on the hub.") from error
    except RevisionNotFoundError as error:
        raise UserError(f"dataset {repository} has no revision {revision} on the hub.") from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "an error")
        raise UserError(
            f"the hub answered {status} when asked for the files of {repository}; try again later."
        ) from error
    except Exception as error:
        if not (isinstance(error, OSError | RuntimeError | ValueError) or is_network_error(error)):
            raise
        raise UserError(
            f"the hub cannot be reached for {repository} ({str(error).splitlines()[0]})."
        ) from error
    files = [
        e
        for e in entries
        if isinstance(e, RepoFile) and e.path.startswith(prefix) and e.path.endswith(".parquet")
    ]
    if not files:
        raise UserError(
            f"dataset {repository} has no parquet files under {prefix} at revision {commit}."
        )
    return [
        HubFile(repository, commit, e.path, e.size, e.lfs.sha256 if e.lfs else "")
        for e in sorted(files, key=lambda e: e.path)
    ]


def fetch(file: HubFile, folder: Path) -> Path:
    """`file` in `folder`, whole, with the sha256 of the listing; what was cut goes on where it was, what is wrong is fetched again.

    Full disks and refusals are a UserError at once; other failures after ATTEMPTS tries.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    problem = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(PAUSE_SECONDS * 2 ** (attempt - 1))
        try:
            where: dict[str, Any] = {
                "repo_type": "dataset",
                "revision": file.revision,
                "endpoint": os.environ.get("HF_ENDPOINT"),
            }
            path = Path(hf_hub_download(file.repository, file.path, local_dir=folder, **where))
        except EntryNotFoundError as error:
            raise UserError(
                f"{file.path} is no longer in {file.repository} at revision {file.revision[:12]}."
            ) from error
        except HfHubHTTPError as error:
            status = getattr(error.response, "status_code", 0)
            problem = f"the hub answered {status}"
            if status in (401, 403, 404):
                break
            continue
        except OSError as error:
            if error.errno == 28:
                raise UserError(
                    f"the disk is full: {file.path} needs {file.size / 1e6:,.0f} MB in {folder}; free some and run again."
                ) from error
            problem = str(error).splitlines()[0] if str(error) else type(error).__name__
            continue
        except Exception as error:
            if not (isinstance(error, RuntimeError | ValueError) or is_network_error(error)):
                raise
            problem = (str(error) or type(error).__name__).splitlines()[0]
            continue
        if not file.sha256 or sha256_of(path) == file.sha256:
            return path
        problem = "the bytes received have another sha256 than the hub's list says"
        drop(file, folder)
    raise UserError(
        f"{file.path} of {file.repository} could not be fetched ({problem}); run the same command again, it goes on."
    )


def is_network_error(error: Exception) -> bool:
    """Is it the HTTP client's? huggingface_hub lets some through; they are no OSErrors, and their package has changed its name."""
    return type(error).__module__.startswith(("httpx", "httpcore"))


def drop(file: HubFile, folder: Path) -> None:
    """Remove what `fetch` put into `folder`, and what huggingface_hub noted about it."""
    (folder / file.path).unlink(missing_ok=True)
    notes = folder / ".cache" / "huggingface" / "download" / file.path
    for note in notes.parent.glob(f"{notes.name}.*"):
        note.unlink()
