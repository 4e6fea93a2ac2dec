"""Datasets of the Hugging Face hub, as lists of parquet files at a fixed commit.

    files = listing("HuggingFaceFW/fineweb-edu", "sample/10BT/")    # at the newest commit
    path = fetch(files[0], Path("parts"))                           # verified by its SHA-256

| name | repository | files | tokens |
|---|---|---|---|
| `fineweb-edu` | HuggingFaceFW/fineweb-edu | sample/10BT | 10B |
| `fineweb-edu-100b` | HuggingFaceFW/fineweb-edu | sample/100BT | 100B |
| `fineweb` | HuggingFaceFW/fineweb | sample/10BT | 10B |
| `openwebtext` | Skylion007/openwebtext | plain_text | 9B |
| `wikitext-103` | Salesforce/wikitext | wikitext-103-raw-v1/train | 0.1B |

Any other dataset is given as `repo:config:split:column`. The hub converts every dataset to parquet
files on the branch `refs/convert/parquet`, and those files are read.
"""

import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path

from anew.errors import UserError
from anew.utils.files import sha256_of
from anew.utils.hub_errors import HubError, hub_errors

log = logging.getLogger("anew")

NAMED = {  # name: (repository, what the paths of its files begin with)
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample/10BT/"),
    "fineweb-edu-100b": ("HuggingFaceFW/fineweb-edu", "sample/100BT/"),
    "fineweb": ("HuggingFaceFW/fineweb", "sample/10BT/"),
    "openwebtext": ("Skylion007/openwebtext", "plain_text/"),
    "wikitext-103": ("Salesforce/wikitext", "wikitext-103-raw-v1/train"),
}
CONVERTED = "refs/convert/parquet"
ATTEMPTS = 5
PAUSE_SECONDS = 2.0  # before the second attempt; each further pause is twice as long


@dataclass(frozen=True)
class HubFile:
    """One file of a dataset at one commit."""

    repository: str
    revision: str
    path: str
    size: int  # bytes
    sha256: str


def listing(repository: str, prefix: str, revision: str = "main") -> list[HubFile]:
    """Return the parquet files whose path begins with `prefix`, sorted by path.

    `revision` may be a branch. The returned files name the commit that it stands for.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    log.info(f"reading the list of files of {repository} on the hub")
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    folder = prefix.rpartition("/")[0] or None
    with hub_errors("dataset", repository, revision, prefix):
        commit = api.dataset_info(repository, revision=revision).sha
        assert commit is not None
        tree = api.list_repo_tree(
            repository, folder, recursive=True, revision=commit, repo_type="dataset"
        )
        entries = list(tree)
    files = []
    for entry in entries:
        is_wanted = entry.path.startswith(prefix) and entry.path.endswith(".parquet")
        if isinstance(entry, RepoFile) and is_wanted:
            sha256 = entry.lfs.sha256 if entry.lfs else ""
            files.append(HubFile(repository, commit, entry.path, entry.size, sha256))
    if not files:
        raise UserError(
            f"dataset {repository} has no parquet files under {prefix} at revision {commit}."
        )
    return sorted(files, key=lambda file: file.path)


def fetch(file: HubFile, folder: Path) -> Path:
    """Download `file` into `folder` and return its path. Its SHA-256 is the one of the listing.

    huggingface_hub continues a download that was cut. A temporary failure, or content with another
    SHA-256, is tried again, ATTEMPTS times in all; anything else raises HubError at once.
    """
    from huggingface_hub import hf_hub_download

    for attempt in range(ATTEMPTS):
        if attempt > 0:
            time.sleep(PAUSE_SECONDS * 2 ** (attempt - 1))
        try:
            with hub_errors("dataset", file.repository, file.revision, file.path):
                path = hf_hub_download(
                    file.repository,
                    file.path,
                    local_dir=folder,
                    repo_type="dataset",
                    revision=file.revision,
                    endpoint=os.environ.get("HF_ENDPOINT"),
                )
        except HubError as error:
            if not error.is_temporary or attempt == ATTEMPTS - 1:
                raise
            continue
        if not file.sha256 or sha256_of(Path(path)) == file.sha256:
            return Path(path)
        drop(file, folder)
    raise HubError(
        f"{file.repository}/{file.path} could not be fetched: what was received has another sha256 "
        "than the hub's list gives; run the same command again."
    )


def drop(file: HubFile, folder: Path) -> None:
    """Remove a fetched file from `folder`, and what huggingface_hub stores about it."""
    (folder / file.path).unlink(missing_ok=True)
    metadata = folder / ".cache" / "huggingface" / "download" / file.path
    for path in metadata.parent.glob(f"{metadata.name}.*"):
        path.unlink()
