"""Open the data that `--data` names: a data folder, token files, text, or a dataset of the hub.

    with open_data("fineweb-edu", "gpt2", disk_budget=30_000_000_000) as folder:
        folder.splits["train"]      # the shards that exist

Text on this machine is prepared before `open_data` returns. A dataset of the hub is opened as soon
as its validation split and a first training shard exist; `folder.preparation` waits for further
shards (streaming.py).
"""

import logging
import shlex
import threading
from pathlib import Path

from anew.config.values import TOKENIZERS, Reading, tokenizer_matches
from anew.data import prepare, sources
from anew.data.holdout import Settings
from anew.data.shards import INDEX, DataFolder
from anew.data.sources import Source
from anew.data.streaming import ShardsInPreparation, Stopped, remove_used, start_preparation
from anew.data.token_formats import open_others
from anew.errors import UserError
from anew.tokenizer.bpe import Tokenizer
from anew.utils.files import cache_folder
from anew.utils.words import counted

__all__ = ["Stopped", "open_data", "remove_used", "settings_for"]

log = logging.getLogger("anew")


def open_data(
    data: str,
    tokenizer: str | Tokenizer,
    disk_budget: int = 0,
    stop: threading.Event | None = None,
    prepares: bool = True,
    model: str = "",
    column: str = "text",
    encoding: str = "",
    conversations: bool | None = False,
) -> DataFolder:
    """Open the data folder that `data` names, or prepare it in the cache.

    `tokenizer` is a tokenizer or a name, which may be train:N. `model` is the model that determines
    the tokenizer, if one does; an error names it. On each machine one rank has `prepares` set: it
    starts the preparation of a dataset of the hub, and the other ranks read the same folder. Raises
    Stopped if `stop` is set while this waits for the first shards.

    `column` and `encoding` are those of files that are not prepared yet, as for `sources.find`.
    With `conversations` the documents are conversations, and all are prepared before this returns.
    None accepts a data folder of either form; anything else is read as text.
    """
    wanted = tokenizer if isinstance(tokenizer, str) else tokenizer.name
    prepared = _open_folder(Path(data).expanduser(), wanted, model, conversations)
    if prepared is not None:
        return prepared
    conversations = bool(conversations)
    revision = "main"
    earlier = None
    if sources.is_hub_name(data):
        earlier = _earlier_preparation(data, wanted, conversations)
    if earlier is not None:
        if (earlier / INDEX).is_file():
            return DataFolder.open(earlier)
        revision = prepare.begun_at(earlier)
    source = sources.find(data, revision, column, encoding, conversations)
    folder = _cached(source.name, wanted, source.revision[:12], conversations)
    if (folder / INDEX).is_file():
        return DataFolder.open(folder)
    log.info(f"preparing {data} with the {wanted} tokenizer into {folder}")
    settings = settings_for(wanted)
    if isinstance(tokenizer, Tokenizer):
        tokenizer.keep(folder)
    if not source.is_remote or conversations:
        return prepare.prepare_data(source, settings, folder, wait=True)
    process = None
    if prepares:
        process = start_preparation(data, source.revision, settings, folder, disk_budget)
    preparation = ShardsInPreparation(folder, process)
    return _open_growing(source, wanted, preparation, stop or threading.Event())


def describe(data: str, tokenizer: str, model: str, reading: Reading) -> str:
    """Return a line about the data that `--data` names, without preparing or downloading any.

    Raises UserError as `open_data` does if there is no such data, or if it has other tokens.
    """
    folder = None
    if not tokenizer.startswith("train:"):
        path = Path(data).expanduser()
        folder = _open_folder(path, tokenizer, model, reading["conversations"])
    if folder is not None:
        train, val = (folder.n_tokens(split) for split in ("train", "val"))
        return f"{data}: {train:,} training and {val:,} validation tokens ({folder.tokenizer})"
    if sources.is_hub_name(data) or data == "tinyshakespeare":
        return f"{data}: not read yet; unless it is here already, it is downloaded"
    source = sources.find(data, **reading)
    return f"{data}: {counted(len(source.files), 'file')}, {source.total_bytes:,} bytes"


def is_at_hand(data: str, tokenizer: str, conversations: bool = False) -> bool:
    """Return whether `open_data` can open `data` without preparing a dataset of the hub."""
    if (Path(data).expanduser() / INDEX).is_file() or not sources.is_hub_name(data):
        return True
    earlier = _earlier_preparation(data, tokenizer, conversations)
    return earlier is not None and (earlier / INDEX).is_file()


def settings_for(tokenizer: str) -> Settings:
    """Return how `--data` is prepared."""
    return Settings(tokenizer)


def _open_folder(
    path: Path, tokenizer: str, model: str, conversations: bool | None
) -> DataFolder | None:
    """Open a data folder or a folder of token files. Return None if `path` is neither.

    Raises UserError if its tokens are not those of `tokenizer`, which is that of `model` if a model
    is given, or if it has texts instead of `conversations`, or the reverse.
    """
    if (path / INDEX).is_file():
        folder = DataFolder.open(path)
    else:
        others = open_others(path) if path.is_dir() else None
        if others is None:
            return None
        folder = others
    if folder.conversations and conversations is False:
        raise UserError(f"{path} has conversations; train on them with anew train chat.")
    if conversations and not folder.conversations:
        flag = tokenizer if tokenizer in TOKENIZERS else shlex.quote(model or tokenizer)
        raise UserError(
            f"{path} has texts and no conversations; prepare them again: "
            f"anew prepare FILE --conversations --tokenizer {flag} --out NEW"
        )
    if tokenizer_matches(tokenizer, folder.tokenizer):
        return folder
    difference = f"{path} was prepared with the tokenizer {folder.tokenizer}"
    if model:
        flag = tokenizer if tokenizer in TOKENIZERS else shlex.quote(model)
        raise UserError(
            f"{difference}, and {model} has {tokenizer}; prepare the text again for this model: "
            f"anew prepare TEXT {'--conversations ' * folder.conversations}--tokenizer {flag} "
            "--out NEW"
        )
    flag = folder.tokenizer if folder.tokenizer in TOKENIZERS else shlex.quote(str(path))
    raise UserError(
        f"{difference}, and this run uses {tokenizer}; add --tokenizer {flag} here, or prepare the "
        f"text again with --tokenizer {tokenizer}."
    )


def _open_growing(
    source: Source, tokenizer: str, preparation: ShardsInPreparation, stop: threading.Event
) -> DataFolder:
    splits = preparation.wait_for_start(stop)
    if tokenizer.startswith("train:"):
        tokenizer = Tokenizer.of_folder(preparation.path).name
    return DataFolder(
        preparation.path, tokenizer, source.name, source.revision, splits, preparation
    )


def _earlier_preparation(data: str, tokenizer: str, conversations: bool) -> Path | None:
    """Return the folder of the newest preparation of a dataset of the hub, if there is one.

    A run continues with the commit that it began with, and needs no network once the data is
    complete.
    """
    pattern = _cached(sources.cache_name(data), tokenizer, "*", conversations)
    folders = [path for path in pattern.parent.glob(pattern.name) if prepare.begun_at(path)]
    return max(folders, key=lambda path: path.stat().st_mtime, default=None)


def _cached(source: str, tokenizer: str, revision: str, conversations: bool) -> Path:
    # In front, so that a pattern for texts does not match it.
    form = "chat-" if conversations else ""
    return cache_folder() / "data" / f"{form}{source}-{tokenizer.replace(':', '-')}-{revision}"
