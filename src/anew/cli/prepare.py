"""`anew prepare SOURCE --out DIR`: turn text into a folder of tokens.

anew prepare fineweb-edu --out data/edu --limit-tokens 1000000000
anew prepare fineweb-edu --dry-run      # estimate tokens, disk and hours
anew prepare --show data/edu            # describe a data folder
anew prepare data/edu --to llm.c --out other/
"""

import json
import shlex
import shutil
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from anew.cli.parse import parse
from anew.cli.progress import progress_bar
from anew.config.values import TOKENIZERS, parse_bytes, vocabulary_size
from anew.data import sources
from anew.data.conversations import conversation_bounds
from anew.data.holdout import SHARD_0_TOKENS, VAL_TOKENS, Settings
from anew.data.prepare import INDEX, Status, begun_at, prepare_data
from anew.data.shards import SHARD_TOKENS, DataFolder, disk_bytes
from anew.data.token_formats import open_others, write_others
from anew.errors import UserError
from anew.tokenizer.bpe import Tokenizer
from anew.utils.files import parse_json
from anew.utils.words import counted

# For --dry-run: measured on web text, and with two threads on two cores (docs/log.md, 6 and 26).
# One thread reads, shuffles and writes, so the time does not shrink with the number of threads.
BYTES_PER_TOKEN = 4.4
BYTES_PER_SECOND = 22.0e6
# For --dry-run: bytes of text in one byte of a file, by the ending of its name. Rough figures.
EXPANSION = {".parquet": 1.7, ".gz": 2.6, ".zst": 2.9, ".bz2": 3.5, ".xz": 3.6}

# For --show: the steps and tokens of the recipe gpt2-124m, and how many documents are measured.
STEP_TOKENS = 524_288
GPT2_STEPS = 19_073
MEASURED_TOKENS = 20_000_000


@dataclass(frozen=True)
class PrepareArgs:
    """Turn text into token files for training.

    Example: anew prepare fineweb-edu --out data/edu --limit-tokens 1000000000
    """

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")] = ""
    """a file, folder, glob, the name of a source, or repo:config:split:column"""
    out: str = ""
    """data folder to write or to continue"""
    tokenizer: str = "gpt2"
    """gpt2: 50,257 tokens; bytes: 257; train:N: learn N tokens; or a folder with a tokenizer"""
    column: str = "text"
    """column of .csv, .tsv and .parquet files, or key of .jsonl files, that holds the text"""
    encoding: str = ""
    """encoding of files that are not UTF-8 and have no byte-order mark, such as latin-1"""
    conversations: bool = False
    """the rows are conversations: "messages", or "prompt" and "response" (see anew train chat)"""
    workers: int = 0
    """threads that tokenise; 0: one for each core"""
    limit_tokens: int = 0
    """stop after this many training tokens; 0: use the whole source"""
    disk_budget: str = "0"
    """largest size on disk of downloaded files and shards together, such as 30GB; 0: no limit"""
    shard_tokens: int = SHARD_TOKENS
    """tokens in a shard; each takes 2 bytes"""
    val_tokens: int | None = None
    """tokens to hold out, at most a tenth of the text; a single text holds out its last tenth; 0:
    none; the default is 10,485,760, or 100,000,000 with --validation first"""
    validation: Literal["hash", "first"] = "hash"
    """hold out documents by their hash, or the first tokens (as build-nanogpt's shard 0)"""
    seed: int = 1337
    """determines the order of documents within a block of 32 MB"""
    to: Literal["anew", "llm.c", "build-nanogpt", "nanogpt"] = "anew"
    """convert a data folder to the files of this project"""
    dry_run: bool = False
    """only estimate bytes, tokens, disk and hours"""
    show: str = ""
    """only describe this data folder"""
    json: bool = False
    """the last line of standard output is one JSON object"""


def run_prepare(argv: list[str]) -> None:
    """Turn text into token files for training."""
    args = parse(PrepareArgs, argv, "prepare")
    if args.show:
        facts = _show(_open_any(Path(args.show)))
    else:
        _check(args)
        if args.dry_run:
            facts = _estimate(args)
        elif args.to != "anew":
            facts = _convert(args)
        else:
            try:
                facts = _prepare(args)
            except KeyboardInterrupt:
                print("anew: stopped; the same command continues from here.", file=sys.stderr)
                raise
    if args.json:
        print(json.dumps(facts))


def _check(args: PrepareArgs) -> None:
    if not args.source:
        raise UserError("name a source to prepare, or a data folder with --show.")
    smallest = min(args.workers, args.limit_tokens, args.val_tokens or 0)
    if smallest < 0 or args.shard_tokens < 2:
        raise UserError(
            "--workers, --limit-tokens and --val-tokens must be 0 or above, "
            "and --shard-tokens at least 2."
        )
    vocabulary_size(args.tokenizer)  # refuses a name that is unknown
    parse_bytes(args.disk_budget)  # refuses a size that is malformed
    if not args.out and not args.dry_run:
        raise UserError("name the data folder to write with --out.")


def _prepare(args: PrepareArgs) -> dict[str, Any]:
    out = Path(args.out)
    tokenizer = args.tokenizer
    if vocabulary_size(tokenizer) is None:
        own = Tokenizer.of_folder(Path(tokenizer))
        own.keep(out)
        tokenizer = own.name
    val_tokens = args.val_tokens
    if val_tokens is None:
        val_tokens = SHARD_0_TOKENS if args.validation == "first" else VAL_TOKENS
    settings = Settings(
        tokenizer=tokenizer,
        limit_tokens=args.limit_tokens,
        val_tokens=val_tokens,
        shard_tokens=args.shard_tokens,
        seed=args.seed,
        validation=args.validation,
    )
    revision = begun_at(out) or "main"
    source = sources.find(args.source, revision, args.column, args.encoding, args.conversations)
    budget = parse_bytes(args.disk_budget)
    with progress_bar() as update:
        folder = prepare_data(
            source,
            settings,
            out,
            args.workers,
            budget,
            report=lambda status: update(status.share, _describe(status)),
        )
    counts = {split: folder.n_tokens(split) for split in ("train", "val")}
    index = parse_json(out / INDEX)
    print(
        f"{source.name}: {counted(len(source.files), 'file')} read, "
        f"{len(source.skipped):,} skipped; "
        f"{counted(index.get('documents', 0), 'document')}, {index.get('bytes', 0):,} bytes of text"
    )
    print(
        f"{out}: {counts['train']:,} training and {counts['val']:,} validation tokens "
        f"({folder.tokenizer})"
    )
    print(f"to train on it: {_training_command(folder)}")
    return {
        "out": str(out),
        "files": len(source.files),
        "skipped": {str(path): reason for path, reason in source.skipped},
        "documents": index.get("documents", 0),
        "bytes": index.get("bytes", 0),
        "tokenizer": folder.tokenizer,
        "revision": folder.revision,
        **counts,
    }


def _training_command(folder: DataFolder) -> str:
    """Return a command that trains on a data folder: a small model, or one for conversations."""
    path = shlex.quote(str(folder.path))
    if folder.conversations:
        return (
            f"anew train chat --init MODEL --data {path}, with a model that has the tokenizer "
            f"{folder.tokenizer}"
        )
    tokenizer = folder.tokenizer if folder.tokenizer in TOKENIZERS else path
    return f"anew train gpt2-5m --data {path} --tokenizer {tokenizer}"


def _describe(status: Status) -> str:
    rate = status.bytes / max(status.seconds, 1e-9)
    return (
        f"{status.tokens / 1e6:,.1f}M tokens, {status.documents:,} documents, "
        f"{rate / 1e6:.1f} MB/s, disk {status.disk_bytes / 1e9:.2f} GB"
    )


def _open_any(path: Path) -> DataFolder:
    """Open a data folder of this or of another project."""
    folder = None if (path / INDEX).is_file() else open_others(path)
    return folder or DataFolder.open(path)


def _convert(args: PrepareArgs) -> dict[str, Any]:
    source = Path(args.source)
    is_prepared = (source / INDEX).is_file()
    if not is_prepared and (not source.is_dir() or open_others(source) is None):
        raise UserError(
            f"--to {args.to} takes a data folder, and {source} is none; prepare it first."
        )
    out = Path(args.out)
    files = write_others(_open_any(source), args.to, out)
    print(f"{out}: {counted(len(files), 'file')} for {args.to}, {disk_bytes(out) / 1e6:,.1f} MB")
    return {"out": str(out), "files": [file.name for file in files]}


def _estimate(args: PrepareArgs) -> dict[str, Any]:
    """Print what a preparation will take, estimated from the sizes of the source's files."""
    source = sources.find(args.source, column=args.column, encoding=args.encoding)
    first_file = source.files[0]
    suffix = Path(str(getattr(first_file, "path", first_file))).suffix
    text_bytes = source.total_bytes * EXPANSION.get(suffix, 1.0)
    bytes_per_token = 1 if args.tokenizer == "bytes" else BYTES_PER_TOKEN
    tokens = min(text_bytes / bytes_per_token, args.limit_tokens or float("inf"))
    hours = tokens * bytes_per_token / BYTES_PER_SECOND / 3600
    largest_file = max((getattr(file, "size", 0) for file in source.files), default=0)
    shard_bytes = 2 * tokens
    peak_bytes = shard_bytes + 2 * largest_file
    print(
        f"{source.name} at revision {source.revision[:12]}: {counted(len(source.files), 'file')}, "
        f"{source.total_bytes / 1e9:,.2f} GB to read"
    )
    print(
        f"about {tokens / 1e6:,.0f}M tokens in {shard_bytes / 1e9:,.2f} GB of shards; "
        f"{peak_bytes / 1e9:,.2f} GB of disk with files in flight"
    )
    print(
        f"about {hours:,.2f} hours, if the network keeps up "
        "(an estimate from text of the web and two CPU cores)"
    )
    parent = Path(args.out).parent
    free = shutil.disk_usage(parent if args.out and parent.is_dir() else Path()).free
    if peak_bytes > free:
        print(f"the disk has {free / 1e9:,.2f} GB free: not enough")
    budget = parse_bytes(args.disk_budget)
    if budget and peak_bytes > budget:
        print(
            f"the budget of {budget / 1e9:,.2f} GB is less: only a training run, which removes "
            "shards it no longer needs, can stay within it"
        )
    return {
        "files": len(source.files),
        "bytes_to_read": source.total_bytes,
        "tokens": int(tokens),
        "shard_bytes": int(shard_bytes),
        "disk_bytes": int(peak_bytes),
        "hours": round(hours, 2),
    }


def _show(folder: DataFolder) -> dict[str, Any]:
    """Print the size of a data folder, the lengths of its documents, and some of their text."""
    print(
        f"{folder.path}: {folder.source}, revision {folder.revision[:12]}, "
        f"tokenizer {folder.tokenizer}"
    )
    facts: dict[str, Any] = {
        "path": str(folder.path),
        "source": folder.source,
        "revision": folder.revision,
        "tokenizer": folder.tokenizer,
    }
    for split in ("train", "val"):
        tokens = folder.n_tokens(split)
        shards = len(folder.splits[split])
        print(f"{split:<6}{tokens:>15,} tokens in {counted(shards, 'shard')}")
        facts[split] = {"tokens": tokens, "shards": shards}
    steps = folder.n_tokens("train") / STEP_TOKENS
    epochs = GPT2_STEPS / max(steps, 1e-9)
    amount = f"{steps:,.1f} steps" if steps >= 0.1 else "less than a tenth of a step"
    print(f"an epoch is {amount} of {STEP_TOKENS:,} tokens;")
    if epochs < 100:
        print(f"10B tokens are {GPT2_STEPS:,} steps, {epochs:,.1f} epochs")
    facts["steps_an_epoch"] = steps
    if folder.splits["train"]:
        tokenizer = Tokenizer.find(folder.tokenizer, folder.path)
        first_shard = folder.splits["train"][0].tokens
        starts = (first_shard[:MEASURED_TOKENS] == tokenizer.end_of_text).nonzero()[0]
        if folder.conversations:
            bounds = next(conversation_bounds(folder.splits["train"], tokenizer.end_of_text))
            starts = np.array([start for start, _ in bounds], dtype=np.int64)
        facts["lengths"] = _show_lengths(starts)
        _show_texts(first_shard, starts, tokenizer)
    return facts


def _show_lengths(starts: np.ndarray) -> dict[str, int]:
    """Print a histogram of document lengths. `starts` are the positions of end-of-text tokens.

    Return the number of documents by the smallest length of their bar, a power of two.
    """
    lengths = np.diff(starts) - 1
    if len(lengths) == 0:
        return {}
    print(f"tokens of each of the first {counted(len(lengths), 'document')}:")
    counts = Counter(max(int(length), 1).bit_length() for length in lengths)
    histogram = {}
    for bits, count in sorted(counts.items()):
        shortest = 2 ** (bits - 1)
        longest = 2**bits - 1
        bar = "#" * max(1, round(40 * count / max(counts.values())))
        print(f"{shortest:>10,} to {longest:<10,} {count:>9,}  {bar}")
        histogram[str(shortest)] = count
    return histogram


def _show_texts(tokens: np.ndarray, starts: np.ndarray, tokenizer: Tokenizer) -> None:
    """Print the beginnings of three documents."""
    every_third = max(1, len(starts) // 3)
    for start in starts[::every_third][:3]:
        ids = tokens[start + 1 : start + 41].tolist()
        text = tokenizer.decode([id for id in ids if id != tokenizer.end_of_text])
        print(f"  ...{text.replace(chr(10), ' ')[:70]}")
