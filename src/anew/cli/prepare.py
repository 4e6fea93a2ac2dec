"""`anew prepare SOURCE --out DIR`: turn text into a folder of tokens; say beforehand what it will take; show what is in one."""

import json
import logging
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from anew.config.values import bytes_of, ids_of
from anew.data import holdout as splits
from anew.data import prepare, shards, sources
from anew.data.shards import DataFolder
from anew.data.token_formats import open_others, write_others
from anew.errors import UserError
from anew.tokenizer.bpe import Tokenizer

log = logging.getLogger("anew")

# For --dry-run: bytes a token of web text, MB a second a thread (docs/log.md, 6), and rough sizes of text a packed byte.
BYTES_A_TOKEN, THREAD_MB = 4.4, 11.0
RATIOS = {".parquet": 1.7, ".gz": 2.6, ".zst": 2.9, ".bz2": 3.5, ".xz": 3.6}


@dataclass(frozen=True)
class PrepareArgs:
    """Turn text into a folder of tokens. Example: anew prepare fineweb-edu --out data/edu --limit-tokens 1000000000"""

    source: Annotated[
        str,
        tyro.conf.Positional,
        tyro.conf.arg(help="a file, folder, glob, known name or repo:config:split:column"),
    ] = ""
    out: Annotated[str, tyro.conf.arg(help="data folder to write, or to go on with")] = ""
    tokenizer: Annotated[
        str,
        tyro.conf.arg(
            help="gpt2: 50,257 tokens; bytes: 257; train:N: learn N; or a folder that has one"
        ),
    ] = "gpt2"
    workers: Annotated[int, tyro.conf.arg(help="threads that tokenise; 0: one a core")] = 0
    limit_tokens: Annotated[
        int, tyro.conf.arg(help="stop after this many training tokens; 0: the whole source")
    ] = 0
    disk_budget: Annotated[
        str,
        tyro.conf.arg(
            help="most bytes on the disk, fetched files and shards together, e.g. 30GB; 0: no bound"
        ),
    ] = "0"
    shard_tokens: Annotated[int, tyro.conf.arg(help="tokens a shard, 2 bytes each")] = (
        shards.SHARD_TOKENS
    )
    val_tokens: Annotated[
        int | None,
        tyro.conf.arg(help="tokens to hold out; by default 10,485,760, with first 100,000,000"),
    ] = None
    validation: Annotated[
        Literal["hash", "first"],
        tyro.conf.arg(
            help="hold out documents by their hash, or the first tokens (build-nanogpt's shard 0)"
        ),
    ] = "hash"
    seed: Annotated[
        int, tyro.conf.arg(help="decides the order of documents within a block of 32 MB")
    ] = 1337
    to: Annotated[
        Literal["anew", "llm.c", "build-nanogpt", "nanogpt"],
        tyro.conf.arg(help="write the files of this project, from a data folder"),
    ] = "anew"
    dry_run: Annotated[
        bool, tyro.conf.arg(help="only say what it will take: bytes, tokens, disk, hours")
    ] = False
    show: Annotated[str, tyro.conf.arg(help="only say what is in this data folder")] = ""
    json: Annotated[
        bool, tyro.conf.arg(help="the last line of standard output is one JSON object")
    ] = False


def run_prepare(argv: list[str]) -> None:
    """Turn text into a folder of tokens that training reads."""
    a = tyro.cli(PrepareArgs, args=argv, prog="anew prepare")
    if a.show:
        shown = Path(a.show)
        return _show(
            (None if (shown / prepare.INDEX).is_file() else open_others(shown))
            or DataFolder.open(shown),
            a.json,
        )
    if not a.source:
        raise UserError("name a source to prepare, or a data folder with --show.")
    if min(a.workers, a.limit_tokens, a.val_tokens or 0) < 0 or a.shard_tokens < 2:
        raise UserError(
            "--workers, --limit-tokens and --val-tokens must be 0 or above, and --shard-tokens at least 2."
        )
    own = Tokenizer.of_folder(Path(a.tokenizer)) if ids_of(a.tokenizer) is None else None
    val_tokens = (
        (splits.SHARD_0_TOKENS if a.validation == "first" else splits.VAL_TOKENS)
        if a.val_tokens is None
        else a.val_tokens
    )
    name = own.name if own else a.tokenizer
    settings = splits.Settings(
        name, a.limit_tokens, val_tokens, a.shard_tokens, a.seed, validation=a.validation
    )
    budget = bytes_of(a.disk_budget)
    if a.dry_run:
        return _dry_run(sources.find(a.source), a, budget)
    if not a.out:
        raise UserError("name the data folder to write with --out.")
    out = Path(a.out)
    if a.to != "anew":
        return _convert(a, out)
    if own:
        own.keep(out)
    revision = prepare.begun_at(out)
    source = sources.find(a.source, revision or "main")
    with _progress() as report:
        folder = prepare.prepare(source, settings, out, a.workers, budget, report=report)
    counts = {split: folder.n_tokens(split) for split in ("train", "val")}
    print(
        f"{out}: {counts['train']:,} training and {counts['val']:,} validation tokens ({folder.tokenizer}) of {source.name}"
    )
    if a.json:
        print(
            json.dumps(
                {
                    "out": str(out),
                    "tokenizer": folder.tokenizer,
                    "revision": folder.revision,
                    **counts,
                }
            )
        )
    return None


def _convert(a: PrepareArgs, out: Path) -> None:
    """A data folder as another project's files."""
    source = Path(a.source)
    folder = (
        open_others(source) if source.is_dir() and not (source / prepare.INDEX).is_file() else None
    )
    if folder is None and not (source / prepare.INDEX).is_file():
        raise UserError(f"--to {a.to} takes a data folder, and {source} is none; prepare it first.")
    files = write_others(folder or DataFolder.open(source), a.to, out)
    print(f"{out}: {len(files)} files for {a.to}, {shards.disk_bytes(out) / 1e6:,.1f} MB")
    if a.json:
        print(json.dumps({"out": str(out), "files": [file.name for file in files]}))


@contextmanager
def _progress() -> Iterator[Any]:
    """A bar on a terminal, a line every ten seconds elsewhere."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        with Progress(
            BarColumn(bar_width=10),
            TextColumn("{task.description}"),
            console=Console(stderr=True),
            transient=True,
        ) as bar:
            task = bar.add_task("reading", total=None)
            yield lambda status: bar.update(
                task, description=_line(status), completed=status.share, total=1.0
            )
        return
    last = 0.0

    def say(status: prepare.Status) -> None:
        nonlocal last
        if status.seconds - last >= 10:
            last = status.seconds
            log.info(_line(status))

    yield say


def _line(s: prepare.Status) -> str:
    left = s.seconds * (1 / s.share - 1) if s.share > 0 else 0
    return (
        f"{s.tokens / 1e6:,.1f}M tokens, {s.documents:,} documents, {s.bytes / 1e6 / max(s.seconds, 1e-9):.1f} MB/s, "
        f"disk {s.disk_bytes / 1e9:.2f} GB, {left / 60:,.0f} min left"
    )


def _dry_run(source: sources.Source, a: PrepareArgs, budget: int) -> None:
    """What a preparation will take, from the sizes of the files alone."""
    text = source.total_bytes * RATIOS.get(
        Path(str(getattr(source.files[0], "path", source.files[0]))).suffix, 1.0
    )
    a_token = 1 if a.tokenizer == "bytes" else BYTES_A_TOKEN
    tokens = min(text / a_token, a.limit_tokens or float("inf"))
    workers = a.workers or prepare.cores()
    hours = tokens * a_token / (THREAD_MB * 1e6 * workers) / 3600
    largest = max((getattr(f, "size", 0) for f in source.files), default=0)
    disk = 2 * tokens + 2 * largest
    facts = {
        "files": len(source.files), "bytes_to_read": source.total_bytes, "tokens": int(tokens), "shard_bytes": int(2 * tokens),
        "disk_bytes": int(disk), "hours": round(hours, 2),
    }  # fmt: skip
    print(
        f"{source.name} at revision {source.revision[:12]}: {len(source.files)} files, {source.total_bytes / 1e9:,.2f} GB to read"
    )
    print(
        f"about {tokens / 1e6:,.0f}M tokens in {2 * tokens / 1e9:,.2f} GB of shards; {disk / 1e9:,.2f} GB of disk with files in flight"
    )
    print(
        f"about {hours:,.2f} hours of {workers} threads, if the network keeps up (an estimate from web text)"
    )
    free = shutil.disk_usage(
        Path(a.out).parent if a.out and Path(a.out).parent.is_dir() else Path()
    ).free
    if disk > free:
        print(f"the disk has {free / 1e9:,.2f} GB free: not enough")
    if budget and disk > budget:
        print(
            f"the budget of {budget / 1e9:,.2f} GB is less: only a training run, which removes shards it is done with, can stay within it"
        )
    if a.json:
        print(json.dumps(facts))


def _show(folder: DataFolder, as_json: bool) -> None:
    """Counts, the lengths of documents as a picture, what an epoch is, and some documents."""
    tokenizer = Tokenizer.find(folder.tokenizer, folder.path)
    facts: dict[str, Any] = {
        "path": str(folder.path),
        "source": folder.source,
        "revision": folder.revision,
        "tokenizer": folder.tokenizer,
    }
    print(
        f"{folder.path}: {folder.source}, revision {folder.revision[:12]}, tokenizer {folder.tokenizer}"
    )
    for split in ("train", "val"):
        facts[split] = {"tokens": folder.n_tokens(split), "shards": len(folder.splits[split])}
        print(
            f"{split:<6}{folder.n_tokens(split):>15,} tokens in {len(folder.splits[split])} shards"
        )
    steps = facts["steps_an_epoch"] = folder.n_tokens("train") / 524_288
    print(f"an epoch is {steps:,.1f} steps of 524,288 tokens;")
    print(f"10B tokens are 19,073 steps, {19_073 / max(steps, 1e-9):,.1f} epochs")
    if not folder.splits["train"]:
        return
    tokens = folder.splits["train"][0].tokens
    starts = (tokens[:20_000_000] == tokenizer.end_of_text).nonzero()[0]
    lengths = [int(n) - 1 for n in (starts[1:] - starts[:-1])]
    print(f"tokens of each of the first {len(lengths):,} documents:")
    counts: dict[int, int] = {}
    for length in lengths:
        counts[max(length, 1).bit_length()] = counts.get(max(length, 1).bit_length(), 0) + 1
    facts["lengths"] = {f"{2 ** (b - 1)}": n for b, n in sorted(counts.items())}
    for bits, count in sorted(counts.items()):
        print(
            f"{2 ** (bits - 1):>10,} to {2**bits - 1:<10,} {count:>9,}  {'#' * max(1, round(40 * count / max(counts.values())))}"
        )
    for start in starts[:: max(1, len(starts) // 3)][:3]:
        sample = tokens[start + 1 : start + 41].tolist()
        text = tokenizer.decode([i for i in sample if i != tokenizer.end_of_text]).replace(
            "\n", " "
        )
        print(f"  ...{text[:70]}")
    if as_json:
        print(json.dumps(facts))
