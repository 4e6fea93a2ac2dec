"""The tokenizer files of a Hugging Face folder: tokenizer.json, vocab.json and merges.txt.

    vocabulary = read(Path("gpt2"))
    for name, content in contents(vocabulary, n_positions=1024).items():
        (folder / name).write_bytes(content)

These files write every byte of a token as one printable character, so that they contain no control
characters and no spaces: a space is "Ġ". Words and merges in this module are in that form.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anew.utils.files import parse_json

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"


@dataclass(frozen=True)
class Vocabulary:
    """A byte-level BPE as its files write it."""

    ids: dict[str, int]  # word -> id; end of text is one of the words
    merges: list[str]  # "left right", in the order in which they are applied


def byte_characters() -> dict[int, str]:
    """Return the character that stands for each byte, in the order of GPT-2's ids.

    Printable bytes (! to ~ and two parts of Latin-1) come first and stand for themselves; the
    others follow and are written as U+0100, U+0101, ...
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable}
    characters |= {byte: chr(0x100 + i) for i, byte in enumerate(others)}
    return characters


def has_tokenizer(folder: Path) -> bool:
    """Return whether `folder` has files that `read` can read."""
    return (folder / TOKENIZER_JSON).is_file() or (folder / "merges.txt").is_file()


def read(folder: Path) -> Vocabulary:
    """Read tokenizer.json or, in a folder without it, vocab.json and merges.txt.

    Raises ValueError if the tokenizer normalizes or splits text in another way than GPT-2's, and
    OSError, KeyError, TypeError or AttributeError if files are missing or malformed.
    """
    if not (folder / TOKENIZER_JSON).is_file():
        return read_vocab_and_merges(folder)
    raw = parse_json(folder / TOKENIZER_JSON)
    splitting = raw["pre_tokenizer"]
    is_byte_level = splitting["type"] == "ByteLevel" and splitting.get("use_regex", True)
    if raw.get("normalizer") or splitting["add_prefix_space"] or not is_byte_level:
        raise ValueError("it normalizes or splits text in another way")
    added = {token["content"]: token["id"] for token in raw["added_tokens"]}
    # Older files write a merge as one string, newer ones as a pair.
    merges = [
        merge if isinstance(merge, str) else " ".join(merge) for merge in raw["model"]["merges"]
    ]
    return Vocabulary({**raw["model"]["vocab"], **added}, merges)


def read_vocab_and_merges(folder: Path) -> Vocabulary:
    """Read vocab.json and merges.txt. Raises as `read` does."""
    ids = parse_json(folder / "vocab.json")
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    merges = [line for line in lines if line and not line.startswith("#version")]
    return Vocabulary(ids, merges)


def contents(vocabulary: Vocabulary, n_positions: int, chat_template: str = "") -> dict[str, bytes]:
    """Return the files that `AutoTokenizer` opens, by name, for a model of `n_positions`.

    `chat_template` is that of a model for conversations. For GPT-2's vocabulary, vocab.json and
    merges.txt equal OpenAI's own files byte for byte.
    """
    merges_txt = "\n".join(["#version: 0.2", *vocabulary.merges]) + "\n"
    config: dict[str, Any] = {
        "tokenizer_class": "GPT2Tokenizer",
        "add_prefix_space": False,
        "model_max_length": n_positions,
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    if chat_template:
        config["chat_template"] = chat_template
    return {
        "vocab.json": json.dumps(vocabulary.ids).encode(),
        "merges.txt": merges_txt.encode(),
        TOKENIZER_JSON: tokenizer_json(vocabulary),
        TOKENIZER_CONFIG: (json.dumps(config, indent=2) + "\n").encode(),
    }


def tokenizer_json(vocabulary: Vocabulary) -> bytes:
    """Return the content of tokenizer.json, the format of the `tokenizers` library.

    If end of text is not one of the words, the file describes a tokenizer without special tokens.
    """
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    end_of_text = {
        "id": vocabulary.ids.get(END_OF_TEXT),
        "content": END_OF_TEXT,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end_of_text] if END_OF_TEXT in vocabulary.ids else [],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": {**byte_level, "trim_offsets": False},
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocabulary.ids,
            "merges": vocabulary.merges,
        },
    }
    return json.dumps(tokenizer, ensure_ascii=False, separators=(",", ":")).encode()
