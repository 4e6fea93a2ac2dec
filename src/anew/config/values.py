"""Parse the values of settings that are text: names of tokenizers and sizes in bytes.

vocabulary_size("gpt2")  # 50257
parse_bytes("30GB")      # 30_000_000_000
"""

import re
from pathlib import Path
from typing import TypedDict

from anew.errors import UserError

TOKENIZERS = {"gpt2": 50257, "bytes": 257}  # vocabulary sizes; the last id is <|endoftext|>
MOST_IDS = 65_536  # shards hold tokens as uint16
FEWEST_BYTES = 10_000  # a size without a unit that is below this was meant to have one
BYTES_OF_UNIT = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


class Reading(TypedDict):
    """How documents are read from files: arguments of `sources.find` and of `open_data`."""

    column: str
    encoding: str
    conversations: bool


def learned_name(n_vocab: int, digest: str) -> str:
    """Return the name of a learned vocabulary. Equal names mean equal token ids."""
    return f"bpe-{n_vocab}-{digest[:12]}"


def tokenizer_matches(wanted: str, tokenizer: str) -> bool:
    """Say whether data of `tokenizer` serves a run that asks for `wanted`.

    `train:N` asks for any learned vocabulary of N ids; every other name asks for itself.
    """
    if wanted.startswith("train:"):
        size = wanted.removeprefix("train:")
        return tokenizer == wanted or tokenizer.startswith(f"bpe-{size}-")
    return tokenizer == wanted


def vocabulary_size(tokenizer: str) -> int | None:
    """Return the vocabulary size that a tokenizer's name states, or None for a folder.

    Raises UserError if there is no tokenizer of this name.
    """
    if tokenizer in TOKENIZERS:
        return TOKENIZERS[tokenizer]
    match = re.fullmatch(r"(?:train:|bpe-)(\d+)(?:-[0-9a-f]{12})?", tokenizer)
    if match is None:
        if Path(tokenizer).is_dir():
            return None
        raise UserError(
            f"there is no tokenizer '{tokenizer}'; "
            "choose gpt2, bytes, train:N or a folder that holds one."
        )
    size = int(match[1])
    if not 257 < size <= MOST_IDS:
        raise UserError(
            f"tokenizer {tokenizer}: a learned vocabulary has 258 to {MOST_IDS:,} ids "
            "(256 bytes, end of text, and at least one merged token)."
        )
    return size


def parse_bytes(size: str) -> int:
    """Return a size such as 30GB, 500M or 1234 as a number of bytes (1 GB = 10^9 bytes)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)B?", size.strip(), re.IGNORECASE)
    if match is None:
        raise UserError(f"disk budget {size} is no size; write it as 30GB or 500MB.")
    number = float(match[1])
    unit = match[2].upper()
    n_bytes = int(number * BYTES_OF_UNIT[unit])
    if 0 < n_bytes < FEWEST_BYTES and not unit:
        raise UserError(f"disk budget {size} is {n_bytes} bytes; write it as {size}GB or {size}MB.")
    return n_bytes
