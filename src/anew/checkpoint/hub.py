"""Download GPT-2 models from the Hugging Face hub into its cache, and check their weights.

    folder = download("gpt2")                     # OpenAI's 124M, always the same revision
    folder = download("distilbert/distilgpt2")    # any GPT-2; logs the revision, the newest one

The package huggingface_hub transfers the files: it resumes interrupted downloads, honours
HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE and access tokens, and shares its cache with transformers. It
does not verify what it received, so this module compares the SHA-256 of the weights with the one
that the hub announced. Only safetensors weights are downloaded.
"""

import contextlib
import functools
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path

from anew.data.hub_datasets import is_network_error
from anew.errors import UserError
from anew.utils.files import sha256_of

log = logging.getLogger("anew")

# OpenAI's four models: repository and commit.
OPENAI_MODELS = {
    "gpt2": ("openai-community/gpt2", "607a30d783dfa663caf39e06633721c8d4cfcd7e"),
    "gpt2-medium": ("openai-community/gpt2-medium", "6dcaa7a952f72f9298047fd5137cd6e4f05f41da"),
    "gpt2-large": ("openai-community/gpt2-large", "32b71b12589c2f8d625668d2335a01cac3249519"),
    "gpt2-xl": ("openai-community/gpt2-xl", "15ea56dee5df4983c59b2538573817e1667135e2"),
}
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
OWNER_AND_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt")


class _MissingFileError(UserError):
    """The repository exists and does not have the file."""


def is_hub_name(model: str) -> bool:
    """Return whether `model` is one of OpenAI's four, owner/name or owner/name@revision."""
    return model in OPENAI_MODELS or OWNER_AND_NAME.fullmatch(model) is not None


def download(model: str) -> Path:
    """Return the folder of `model` in the hub's cache, after downloading what the cache lacks.

    Raises UserError if there is no such model, if the hub cannot be reached or refuses, and if a
    file is not the one that the hub announced.
    """
    repository, _, revision = model.partition("@")
    revision = revision or "main"
    if model in OPENAI_MODELS:
        repository, revision = OPENAI_MODELS[model]
    config = _fetch(model, repository, revision, "config.json")
    # All other files come from the same commit, even if the branch moves meanwhile.
    commit = config.parent.name
    if model not in OPENAI_MODELS:
        log.info(f"{model}: revision {commit}")
    fetch = functools.partial(_fetch, model, repository, commit)
    try:
        fetch(WEIGHTS)
    except _MissingFileError:
        for shard in _shards(model, index=fetch(INDEX)):
            fetch(shard)
    if model not in OPENAI_MODELS:  # Their tokenizer is part of this package.
        for name in TOKENIZER_FILES:
            with contextlib.suppress(_MissingFileError):
                fetch(name)
    return config.parent


def _shards(model: str, index: Path) -> list[str]:
    """Return the names of the weights files that an index lists."""
    try:
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"the {INDEX} of {model} cannot be read ({error!r}).") from error
    return sorted({str(name) for name in files})


def _fetch(model: str, repository: str, revision: str, file: str) -> Path:
    """Return the path of a verified file in the cache, after downloading it if necessary."""
    from huggingface_hub import hf_hub_download

    with _hub_errors(model, revision, file):
        path = Path(hf_hub_download(repository, file, revision=revision))
    _verify(model, path)
    return path


@contextlib.contextmanager
def _hub_errors(model: str, revision: str, file: str) -> Iterator[None]:
    """Turn the errors of huggingface_hub into a UserError."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{model} is neither a local folder nor a public model on the hub; check the name."
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"{model} has no revision {revision} on the hub.") from error
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"{model} is neither a local folder nor in the hub's cache, and the hub cannot be "
            "reached; pass the path of its folder, or try again with a network connection."
        ) from error
    except EntryNotFoundError as error:
        raise _MissingFileError(
            f"{model} has no {file} on the hub; only safetensors weights are downloaded."
        ) from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "an error")
        raise UserError(
            f"{model} could not be downloaded: the hub answered {status}; try again later, the "
            "download resumes where it stopped."
        ) from error
    except Exception as error:
        if not (isinstance(error, OSError | ValueError | RuntimeError) or is_network_error(error)):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{model} could not be downloaded ({reason}); try again, the download resumes where it "
            "stopped."
        ) from error


def _verify(model: str, path: Path) -> None:
    """Remove a downloaded file and raise UserError if its SHA-256 is not the announced one.

    The cache names a large file after its announced SHA-256 and gives `path` as a link to it. On
    Windows without symbolic links it does not, and files are not verified.
    """
    stored = path.resolve()
    announced = stored.name
    is_sha256 = re.fullmatch(r"[0-9a-f]{64}", announced) is not None
    if is_sha256 and sha256_of(stored) != announced:
        path.unlink()
        stored.unlink(missing_ok=True)
        raise UserError(
            f"the downloaded {path.name} of {model} is damaged: its SHA-256 is not the one that "
            "the hub announced. It was removed; try again."
        )
