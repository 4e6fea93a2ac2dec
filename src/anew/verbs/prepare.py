"""`anew prepare SOURCE --out DIR`: turn text into a folder of tokens."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from anew.config import UserError
from anew.data import prepare, sources
from anew.data.shards import DataFolder
from anew.tokenizer import Tokenizer


@dataclass(frozen=True)
class PrepareArgs:
    """Turn text into a folder of tokens. Example: anew prepare my-texts/ --out data/mine --tokenizer gpt2"""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(help="a file, folder, glob, stdlib or tinyshakespeare")]
    out: Annotated[str, tyro.conf.arg(help="data folder to write; it must not exist yet")]
    tokenizer: Annotated[Literal["gpt2", "bytes"], tyro.conf.arg(help="gpt2: 50,257 tokens; bytes: 257")] = "gpt2"
    json: Annotated[bool, tyro.conf.arg(help="the last line of standard output is one JSON object")] = False


def run_prepare(argv: list[str]) -> None:
    """Turn text into a folder of tokens that training reads."""
    a = tyro.cli(PrepareArgs, args=argv, prog="anew prepare")
    out = Path(a.out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists already; choose another --out or remove it.")
    source = sources.find(a.source)
    prepare.prepare(source, source.revision(), Tokenizer.named(a.tokenizer), out)
    folder = DataFolder.open(out)
    counts = {split: folder.n_tokens(split) for split in ("train", "val")}
    print(f"{out}: {counts['train']:,} training and {counts['val']:,} validation tokens ({a.tokenizer}) of {source.name}")
    if a.json:
        print(json.dumps({"out": str(out), "tokenizer": a.tokenizer, "revision": folder.revision, **counts}))
