"""OpenAI's weights, and any other GPT-2, from the Hugging Face hub into its own cache: safetensors only, checked before they are used.

    folder = hub.download("gpt2")                       # OpenAI's 124M, at a revision that never changes
    folder = hub.download("distilbert/distilgpt2")      # any GPT-2; its newest revision, which is logged

huggingface_hub does the transfer: it resumes what was cut, honours HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE and tokens, and shares its cache
with transformers. It does not hash what it received; here the weights must have the sha256 that the hub announced for them.
"""

import contextlib
import json
import logging
import os
import re
from pathlib import Path
from typing import Any

from anew.data.hub_datasets import is_network_error
from anew.errors import UserError
from anew.utils.files import sha256_of

log = logging.getLogger("anew")

# OpenAI's four releases: repository and commit.
NAMES = {
    "gpt2": ("openai-community/gpt2", "607a30d783dfa663caf39e06633721c8d4cfcd7e"),
    "gpt2-medium": ("openai-community/gpt2-medium", "6dcaa7a952f72f9298047fd5137cd6e4f05f41da"),
    "gpt2-large": ("openai-community/gpt2-large", "32b71b12589c2f8d625668d2335a01cac3249519"),
    "gpt2-xl": ("openai-community/gpt2-xl", "15ea56dee5df4983c59b2538573817e1667135e2"),
}
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def is_name(model: str) -> bool:
    """Could `model` be on the hub: one of OpenAI's four, or owner/name, with @revision if wanted?"""
    return model in NAMES or re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?", model) is not None


def download(model: str) -> Path:
    """The folder of `model` in the hub's cache, downloaded if it is not there; the cache alone is enough once it is.

    UserError says what failed: no such model, no network, a server that refuses, a body that is not what was announced.
    """
    repository, _, revision = model.partition("@")
    repository, revision = NAMES.get(repository, (repository, revision or "main"))
    config = _fetch(model, repository, "config.json", revision)
    revision = (
        config.parent.name
    )  # the commit that a branch stands for: all files from the same one
    if model not in NAMES:
        log.info(f"{model}: revision {revision}")
    try:
        _fetch(model, repository, WEIGHTS, revision)
    except _MissingError:
        index = _fetch(model, repository, INDEX, revision)
        try:
            shards = sorted(
                {
                    str(name)
                    for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
                }
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{model}: its {INDEX} cannot be read ({error!r}).") from error
        for shard in shards:
            _fetch(model, repository, shard, revision)
    if model not in NAMES:  # OpenAI's are gpt2's, which is built in
        for name in TOKENIZER_FILES:
            with contextlib.suppress(_MissingError):
                _fetch(model, repository, name, revision)
    return config.parent


class _MissingError(UserError):
    pass


def _fetch(model: str, repository: str, name: str, revision: str) -> Path:
    """One file of one revision, in the cache and verified."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        path = Path(hf_hub_download(repository, name, revision=revision))
    except RepositoryNotFoundError as error:
        raise UserError(f"{model} is no folder here and no public model on the hub.") from error
    except RevisionNotFoundError as error:
        raise UserError(f"{model} has no revision {revision} on the hub.") from error
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"{model} is no folder here, it is not in the hub's cache, and the hub cannot be reached; pass the path of its folder."
        ) from error
    except EntryNotFoundError as error:
        raise _MissingError(
            f"{model} on the hub has no {name}; only safetensors weights are downloaded."
        ) from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "an error")
        raise UserError(
            f"{model} could not be downloaded: the hub answered {status}; try again later, it goes on where it was."
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{model} could not be downloaded ({_first_line(error)}); try again, it goes on where it was."
        ) from error
    except Exception as error:
        if not is_network_error(error):
            raise
        raise UserError(
            f"{model} could not be downloaded ({_first_line(error)}); try again, it goes on where it was."
        ) from error
    _verify(model, path)
    return path


def _verify(model: str, path: Path) -> None:
    """In the cache a large file is called by its announced sha256 (but on Windows without symlinks); it must have it, or it is removed."""
    blob = path.resolve()
    announced = blob.name
    if re.fullmatch(r"[0-9a-f]{64}", announced) and sha256_of(blob) != announced:
        os.unlink(path)
        blob.unlink(missing_ok=True)
        raise UserError(
            f"{model}: the {path.name} received is not what the hub announced (another sha256); it was removed, try again."
        )


def _first_line(error: Any) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
