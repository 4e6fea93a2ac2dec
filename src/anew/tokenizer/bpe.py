"""Text to token ids and back: GPT-2's byte-pair encoding, a plain byte tokenizer for tiny models, and vocabularies of one's own.

    Tokenizer.named("gpt2").encode("Hello world")       # [15496, 995]
    Tokenizer.named("bytes").encode("Hi")               # [72, 105]
    Tokenizer.of_folder(Path("data/deutsch"))           # what `anew prepare --tokenizer train:8000` learnt (vocabulary.py)

GPT-2's merges travel with the package (`gpt2_bpe/`), so no network is needed. What a user writes never becomes a special token: text that
spells `<|endoftext|>` is encoded as those thirteen characters. The end-of-text id is put in by code alone.
"""

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from anew.config.values import TOKENIZERS, own_name
from anew.errors import UserError
from anew.utils.files import write_atomic

END_OF_TEXT = "<|endoftext|>"
FILE = "tokenizer.json"
PIECE_BYTES, MOST_BYTES = 1 << 18, 1 << 22
CUT = re.compile(rb"[A-Za-z] (?=[A-Za-z])")
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""  # openai/gpt-2 src/encoder.py


class Tokenizer:
    """`name` is "gpt2", "bytes" or, of one's own, "bpe-8000-" and a hash; the last of `n_vocab` ids, `end_of_text`, separates documents."""

    def __init__(self, name: str, tokens: list[bytes], merges: list[tuple[int, int]]) -> None:
        self.name, self.tokens, self.merges = name, tokens, merges
        self.n_vocab = len(tokens) + 1
        self.end_of_text = len(tokens)
        assert self.n_vocab == TOKENIZERS.get(name, self.n_vocab)

    @staticmethod
    @functools.cache
    def named(name: str) -> "Tokenizer":
        """The tokenizer "gpt2" or "bytes"."""
        if name == "bytes":
            return Tokenizer("bytes", [bytes([b]) for b in range(256)], [])
        if name == "gpt2":
            table = np.frombuffer(
                resources.files("anew").joinpath("tokenizer/gpt2_bpe/merges.bin").read_bytes(),
                dtype="<u2",
            )
            merges = [(int(a), int(b)) for a, b in table.reshape(-1, 2)]
            return Tokenizer("gpt2", _tokens_of(merges), merges)
        raise UserError(
            f"there is no tokenizer '{name}'; choose gpt2, bytes, train:N or a folder that holds a {FILE}."
        )

    @staticmethod
    def of_words(pairs: Iterable[tuple[str, str]]) -> "Tokenizer":
        """A byte-level BPE from its merges, as vocabulary files write them. Ids as GPT-2's: 256 bytes, one a merge, end of text."""
        ids = {_byte_characters()[b]: i for i, b in enumerate(_byte_order())}
        merges = []
        for left, right in pairs:
            merges.append((ids[left], ids[right]))
            ids[left + right] = 256 + len(merges) - 1
        if len(ids) != 256 + len(merges):
            raise ValueError("two of its merges give the same token")
        known = next((t for t in map(Tokenizer.named, TOKENIZERS) if t.merges == merges), None)
        digest = hashlib.sha256(repr(merges).encode()).hexdigest()
        return known or Tokenizer(own_name(257 + len(merges), digest), _tokens_of(merges), merges)

    @staticmethod
    def of_folder(folder: Path) -> "Tokenizer":
        """The tokenizer of the files in `folder`: tokenizer.json, or vocab.json and merges.txt. One not of GPT-2's kind is refused."""
        try:
            vocab, pairs = _read_files(folder)
            tokenizer = Tokenizer.of_words(pairs)
            if vocab != {word: i for i, word in enumerate(tokenizer.words()[0])}:
                raise ValueError(f"its ids are not 256 bytes, one for each merge and {END_OF_TEXT}")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"the tokenizer in {folder} is no byte-level BPE as GPT-2's ({error})."
            ) from error
        return tokenizer

    @staticmethod
    def of_model(path: Path, n_vocab: int) -> "Tokenizer":
        """The tokenizer of the model at `path` with `n_vocab` ids: of its files, or, where there are none, the one of that size."""
        if (path / FILE).is_file() or (path / "merges.txt").is_file():
            tokenizer = Tokenizer.of_folder(path)
            if tokenizer.n_vocab != n_vocab:
                raise UserError(
                    f"{path} has a tokenizer of {tokenizer.n_vocab:,} ids, and its model has {n_vocab:,}."
                )
            return tokenizer
        for name, size in TOKENIZERS.items():
            if size == n_vocab:
                return Tokenizer.named(name)
        known = ", ".join(f"{n} ({s})" for n, s in TOKENIZERS.items())
        raise UserError(
            f"{path} holds no {FILE}, and no tokenizer here has {n_vocab:,} ids; known are {known}."
        )

    @staticmethod
    def find(name: str, folder: Path) -> "Tokenizer":
        """The tokenizer called `name`: built in, or of one's own, which then is in `folder`."""
        if name in TOKENIZERS:
            return Tokenizer.named(name)
        tokenizer = Tokenizer.of_folder(folder)
        if tokenizer.name != name:
            raise UserError(
                f"{folder} should hold the tokenizer {name}, and holds {tokenizer.name}."
            )
        return tokenizer

    @functools.cached_property
    def _tiktoken(self) -> Any:
        import tiktoken

        ranks = {token: rank for rank, token in enumerate(self.tokens)}
        return tiktoken.Encoding(
            self.name,
            pat_str=GPT2_PATTERN,
            mergeable_ranks=ranks,
            special_tokens={END_OF_TEXT: self.end_of_text},
        )

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; never the end-of-text id. Lone surrogates become U+FFFD, as no UTF-8 can hold them."""
        text = _without_surrogates(text)
        return list(text.encode()) if self.name == "bytes" else self._tiktoken.encode_ordinary(text)

    def encode_document(self, document: bytes) -> np.ndarray:
        """(tokens,) uint16. Bytes that are no UTF-8 stay for "bytes" and become U+FFFD for BPE. A long document is read in pieces."""
        if self.name == "bytes":
            return np.frombuffer(document, dtype=np.uint8).astype(np.uint16)
        parts = [
            self._tiktoken.encode_to_numpy(
                piece.decode("utf-8", errors="replace"), disallowed_special=()
            ).astype(np.uint16)
            for piece in pieces(document)
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes that `ids` stand for; end of text is written out. Ids no tokenizer emits (padding rows) are refused."""
        for i in ids:
            if not 0 <= i < self.n_vocab:
                raise UserError(
                    f"token id {i} does not exist; {self.name} has ids 0 to {self.n_vocab - 1}."
                )
        return b"".join(
            END_OF_TEXT.encode() if i == self.end_of_text else self.tokens[i] for i in ids
        )

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; bytes that form no UTF-8 (a character cut in half) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def words(self) -> tuple[list[str], list[str]]:
        """The vocabulary in id order and the merges, each byte written as vocabulary files write it."""
        as_text = _byte_characters()
        words = ["".join(as_text[b] for b in token) for token in self.tokens]
        return [*words, END_OF_TEXT], [f"{words[a]} {words[b]}" for a, b in self.merges]

    def files(self, n_positions: int = 1024) -> dict[str, bytes]:
        """The files that `AutoTokenizer` opens, by name, for a model of `n_positions`.

        For gpt2, vocab.json and merges.txt are OpenAI's own, byte for byte.
        """
        words, pairs = self.words()
        vocab = {word: i for i, word in enumerate(words)}
        special = {
            "content": END_OF_TEXT,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        byte_level = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        }
        tokenizer = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": self.end_of_text, **special, "special": True}],
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
                "vocab": vocab,
                "merges": pairs,
            },
        }
        config = {
            "tokenizer_class": "GPT2Tokenizer",
            "add_prefix_space": False,
            "model_max_length": n_positions,
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT,
            "unk_token": END_OF_TEXT,
            "clean_up_tokenization_spaces": False,
        }
        return {
            "vocab.json": json.dumps(vocab).encode(),
            "merges.txt": ("\n".join(["#version: 0.2", *pairs]) + "\n").encode(),
            "tokenizer.json": json.dumps(
                tokenizer, ensure_ascii=False, separators=(",", ":")
            ).encode(),
            "tokenizer_config.json": (json.dumps(config, indent=2) + "\n").encode(),
        }

    def save(self, folder: Path, n_positions: int = 1024) -> None:
        """Write `files(n_positions)` into `folder`."""
        for name, content in self.files(n_positions).items():
            (folder / name).write_bytes(content)

    def keep(self, folder: Path) -> None:
        """Put tokenizer.json into `folder`, whole or not at all, where the tokenizer is not built in."""
        if self.name not in TOKENIZERS and not (folder / FILE).is_file():
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(folder / FILE, self.files()[FILE])


def _tokens_of(merges: Sequence[tuple[int, int]]) -> list[bytes]:
    """The bytes of each id but the last: the 256 bytes, then what each merge joins."""
    tokens = [bytes([b]) for b in _byte_order()]
    for left, right in merges:
        tokens.append(tokens[left] + tokens[right])
    return tokens


def _read_files(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges as the files in `folder` write them. ValueError if they split text in another way than GPT-2 does."""
    if not (folder / FILE).is_file():
        lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        return json.loads((folder / "vocab.json").read_text(encoding="utf-8")), [
            (left, right) for left, right in pairs
        ]
    raw = json.loads((folder / FILE).read_text(encoding="utf-8"))
    before = raw["pre_tokenizer"]
    if (
        raw.get("normalizer")
        or before["type"] != "ByteLevel"
        or before["add_prefix_space"]
        or not before.get("use_regex", True)
    ):
        raise ValueError("it normalises or splits text in another way")
    vocab = {
        **raw["model"]["vocab"],
        **{token["content"]: token["id"] for token in raw["added_tokens"]},
    }
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in raw["model"]["merges"]]
    return vocab, [(left, right) for left, right in pairs]


def pieces(document: bytes) -> Iterator[bytes]:
    """A long document cut where no token can cross: before a single space between two ASCII letters.

    GPT-2's pattern takes such a space into the word behind it and nothing across it. Text without one (a million equal characters) is cut
    every MOST_BYTES wherever that is, which may split a token.
    """
    start = 0
    while len(document) - start > PIECE_BYTES:
        match = CUT.search(document, start + PIECE_BYTES, start + MOST_BYTES)
        end = match.start() + 1 if match else min(len(document), start + MOST_BYTES)
        while (
            end < len(document) and not match and document[end] & 0xC0 == 0x80
        ):  # not within a character
            end += 1
        yield document[start:end]
        start = end
    yield document[start:]


def _byte_order() -> list[int]:
    """GPT-2 numbers printable bytes first: ! to ~, then two printable parts of Latin-1, then all others."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return printable + [b for b in range(256) if b not in printable]


def _byte_characters() -> dict[int, str]:
    """The character each byte is written as in vocabulary files: itself if printable, else one from U+0100 on."""
    order = _byte_order()
    return {b: chr(b) if i < 188 else chr(256 + i - 188) for i, b in enumerate(order)}


def _without_surrogates(text: str) -> str:
    try:
        text.encode()
        return text
    except UnicodeEncodeError:  # pairs of surrogates are joined, lone ones replaced
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
