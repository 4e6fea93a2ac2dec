"""How wishes are spelt: tokenizers by name, sizes in bytes, and what is said of a wish that cannot be met."""

import re
from pathlib import Path

from anew.errors import UserError

TOKENIZERS = {"gpt2": 50257, "bytes": 257}  # ids each can emit; the last one is <|endoftext|>
MOST_IDS = 65_536  # shards hold tokens as uint16


def own_name(n_vocab: int, digest: str) -> str:
    """What a vocabulary of one's own is called: equal names, equal ids."""
    return f"bpe-{n_vocab}-{digest[:12]}"


def fits(wanted: str, tokenizer: str) -> bool:
    """Is the tokenizer of this name the one that was asked for? Any vocabulary of N ids is what `train:N` asks for."""
    return wanted == tokenizer or (
        wanted.startswith("train:") and tokenizer.startswith(f"bpe-{wanted[6:]}-")
    )


def ids_of(tokenizer: str) -> int | None:
    """How many ids a tokenizer has, where its name says so; None for a folder, which has to be looked into."""
    if tokenizer in TOKENIZERS:
        return TOKENIZERS[tokenizer]
    match = re.fullmatch(r"(?:train:|bpe-)(\d+)(?:-[0-9a-f]{12})?", tokenizer)
    if match is None:
        if Path(tokenizer).is_dir():
            return None
        raise UserError(
            f"there is no tokenizer '{tokenizer}'; choose gpt2, bytes, train:N or a folder that holds one."
        )
    if not 257 < int(match[1]) <= MOST_IDS:
        raise UserError(
            f"tokenizer {tokenizer}: a vocabulary has 258 ids (256 bytes, end of text, and a word) to {MOST_IDS:,}."
        )
    return int(match[1])


def bytes_of(size: str) -> int:
    """30GB, 500M or plain bytes as a number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)B?", size.strip(), re.IGNORECASE)
    if match is None:
        raise UserError(f"disk budget {size} is no size; write it as 30GB or 500MB.")
    return int(
        float(match[1]) * {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}[match[2].upper()]
    )
