"""Download GPT-2 models from the Hugging Face hub into its cache, and upload models to it.

    folder = download("gpt2")                     # OpenAI's 124M, always the same revision
    folder = download("distilbert/distilgpt2")    # any GPT-2; logs the revision, the newest one
    address = upload(Path("my-gpt2"), "me/my-gpt2", private=True)

The package huggingface_hub transfers the files: it resumes interrupted downloads, honours
HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE and access tokens, and shares its cache with transformers. It
does not verify what it received, so this module compares the SHA-256 of the weights with the one
that the hub announced. Only safetensors weights are downloaded.
"""

import contextlib
import functools
import logging
import re
import socket
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from anew.errors import UserError
from anew.utils.files import parse_json, sha256_of
from anew.utils.hub_errors import MissingFileError, hub_errors

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
TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "chat_template.jinja",
)


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
    log.info(f"looking for {model} in the hub's cache and on the hub")
    config = _fetch(model, repository, revision, "config.json")
    # All other files come from the same commit, even if the branch moves meanwhile.
    commit = config.parent.name
    if model not in OPENAI_MODELS:
        log.info(f"{model}: revision {commit}")
    fetch = functools.partial(_fetch, model, repository, commit)
    try:
        fetch(WEIGHTS)
    except MissingFileError:
        for shard in _shards(model, fetch):
            fetch(shard)
    if model not in OPENAI_MODELS:  # Their tokenizer is part of this package.
        for name in TOKENIZER_FILES:
            with contextlib.suppress(MissingFileError):
                fetch(name)
    return config.parent


def check_repository(repository: str) -> None:
    """Raise UserError if `repository` is not owner/name."""
    if "@" in repository or OWNER_AND_NAME.fullmatch(repository) is None:
        raise UserError(
            f"'{repository}' is no repository of the hub; name it as OWNER/NAME, with your own "
            "name or that of your organisation."
        )


def upload(folder: Path, repository: str, private: bool) -> str:
    """Upload the files in `folder` as one commit; return the address of the repository.

    The repository is created if it does not exist. Files that it has already are not sent again.
    Raises UserError if the hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    check_repository(repository)
    api = HfApi()
    again = "run the same command again; files that have arrived are not sent again"
    with hub_errors("model", repository, "main", "", again):
        try:
            address = api.create_repo(repository, private=private, exist_ok=True)
            api.upload_folder(
                repo_id=repository, folder_path=folder, commit_message="Upload a model of anew"
            )
        except (HfHubHTTPError, LocalTokenNotFoundError) as error:
            status = getattr(getattr(error, "response", None), "status_code", 401)
            if status not in (401, 403):
                raise
            raise UserError(
                f"the hub does not let you write to {repository}; run `hf auth login` with a "
                "token that may write."
            ) from error
    return str(address)


def _shards(model: str, fetch: Callable[[str], Path]) -> list[str]:
    """Return the names of the weights files that the index of a model lists."""
    try:
        index = fetch(INDEX)
    except MissingFileError as error:
        raise UserError(
            f"{model} has no {WEIGHTS} on the hub; only safetensors weights are downloaded."
        ) from error
    try:
        files = parse_json(index)["weight_map"].values()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"the {INDEX} of {model} cannot be read ({error!r}).") from error
    return sorted({str(name) for name in files})


def _fetch(model: str, repository: str, revision: str, file: str) -> Path:
    """Return the path of a verified file in the cache, after downloading it if necessary."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    is_offline = not hub_has_address()
    with hub_errors("model", repository, revision, file):
        try:
            path = Path(
                hf_hub_download(repository, file, revision=revision, local_files_only=is_offline)
            )
        except LocalEntryNotFoundError as error:
            if not is_offline:
                raise
            raise UserError(
                f"{model} is neither a local folder nor in the hub's cache, and the hub cannot be "
                "reached: its address is not known here. Name a local folder, or connect to a "
                "network."
            ) from error
    _verify(model, path)
    return path


@functools.cache
def hub_has_address() -> bool:
    """Return whether the name of the hub's server is known here, as it is with a network.

    Without this question, huggingface_hub asks six times within 25 seconds. Behind a proxy the
    answer is always yes, because the proxy looks the name up.
    """
    from huggingface_hub import constants

    if urllib.request.getproxies():
        return True
    host = urlsplit(constants.ENDPOINT).hostname
    for _ in range(2):
        try:
            socket.getaddrinfo(host, None)
            return True
        except socket.gaierror:
            time.sleep(0.5)
    return False


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
