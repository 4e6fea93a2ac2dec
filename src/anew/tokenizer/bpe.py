"""Turn text into token ids and back with byte-pair encoding (BPE).

    Tokenizer.named("gpt2").encode("Hello world")   # [15496, 995]
    Tokenizer.named("bytes").encode("Hi")           # [72, 105]; one id a byte, for tiny models
    Tokenizer.of_folder(Path("data/deutsch"))       # from `anew prepare --tokenizer train:8000`

GPT-2's merges are part of the package (`gpt2_bpe/`), so no download is needed. Text never becomes a
special token: "<|endoftext|>" in a text is encoded as its 13 characters. Only code adds the
end-of-text id, between documents.
"""

import functools
import hashlib
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from anew.config.values import TOKENIZERS, learned_name
from anew.errors import UserError
from anew.tokenizer import files
from anew.tokenizer.files import END_OF_TEXT, TOKENIZER_JSON, Vocabulary, byte_characters
from anew.utils.files import write_atomic

FILE = TOKENIZER_JSON
# How GPT-2 splits text before it merges bytes; from openai/gpt-2 src/encoder.py.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Documents above PIECE_BYTES are encoded in pieces of at most about MOST_BYTES. They are cut before
# a single space between two ASCII letters: in GPT2_PATTERN such a space is the first character of a
# word, and nothing matches across it, so no token is split.
PIECE_BYTES = 1 << 18
MOST_BYTES = 1 << 22
CUT = re.compile(rb"[A-Za-z] (?=[A-Za-z])")


class Tokenizer:
    """A byte-level BPE tokenizer.

    `name` is "gpt2", "bytes" or, for a learned vocabulary, "bpe-8000-" and a hash of its merges.
    `tokens` has the bytes of each id but the last, `end_of_text`, which separates documents.
    `merges` has the two ids that each merge joins. `n_vocab` is the number of ids.
    """

    def __init__(self, name: str, tokens: list[bytes], merges: list[tuple[int, int]]) -> None:
        self.name = name
        self.tokens = tokens
        self.merges = merges
        self.end_of_text = len(tokens)
        self.n_vocab = len(tokens) + 1
        assert self.n_vocab == TOKENIZERS.get(name, self.n_vocab)

    def __repr__(self) -> str:
        return f"Tokenizer('{self.name}', {self.n_vocab} ids)"

    @staticmethod
    def from_pretrained(model: str | Path) -> "Tokenizer":
        """Return the tokenizer of a run, checkpoint or Hugging Face folder (see `load_model`)."""
        # An import of a room above, as in `GPT.from_pretrained`.
        from anew.checkpoint.huggingface import load_tokenizer

        return load_tokenizer(model)

    @staticmethod
    @functools.cache
    def named(name: str) -> "Tokenizer":
        """Return the tokenizer "gpt2" or "bytes"."""
        if name == "bytes":
            return Tokenizer("bytes", [bytes([byte]) for byte in range(256)], [])
        if name == "gpt2":
            table = resources.files("anew").joinpath("tokenizer/gpt2_bpe/merges.bin").read_bytes()
            pairs = np.frombuffer(table, dtype="<u2").reshape(-1, 2)
            merges = [(int(left), int(right)) for left, right in pairs]
            return Tokenizer("gpt2", _tokens_of(merges), merges)
        raise UserError(
            f"there is no tokenizer '{name}'; choose gpt2, bytes, train:N or a folder with a "
            f"{TOKENIZER_JSON}."
        )

    @staticmethod
    def of_words(pairs: Iterable[tuple[str, str]]) -> "Tokenizer":
        """Return the tokenizer with these merges, given as words in the form of vocabulary files.

        Ids are numbered as in GPT-2: 256 bytes, one id for each merge, end of text.
        """
        ids = {character: i for i, character in enumerate(byte_characters().values())}
        merges = []
        for left, right in pairs:
            merges.append((ids[left], ids[right]))
            ids[left + right] = 255 + len(merges)
        if len(ids) != 256 + len(merges):
            raise ValueError("two of its merges give the same token")
        for name in TOKENIZERS:
            if Tokenizer.named(name).merges == merges:
                return Tokenizer.named(name)
        digest = hashlib.sha256(repr(merges).encode()).hexdigest()
        return Tokenizer(learned_name(257 + len(merges), digest), _tokens_of(merges), merges)

    @staticmethod
    def of_folder(folder: Path) -> "Tokenizer":
        """Return the tokenizer whose files are in `folder`; refuse one that is unlike GPT-2's."""
        try:
            vocabulary = files.read(folder)
            pairs = [merge.split(" ") for merge in vocabulary.merges]
            tokenizer = Tokenizer.of_words((left, right) for left, right in pairs)
            if vocabulary.ids != tokenizer.vocabulary().ids:
                raise ValueError(f"its ids are not 256 bytes, one for each merge and {END_OF_TEXT}")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"the tokenizer in {folder} is not a byte-level BPE like GPT-2's ({error})."
            ) from error
        return tokenizer

    @staticmethod
    def of_model(path: Path, n_vocab: int) -> "Tokenizer":
        """Return the tokenizer of the model at `path`, which has `n_vocab` ids.

        A model without tokenizer files has the built-in tokenizer of that size.
        """
        if files.has_tokenizer(path):
            tokenizer = Tokenizer.of_folder(path)
            if tokenizer.n_vocab != n_vocab:
                raise UserError(
                    f"{path} has a tokenizer of {tokenizer.n_vocab:,} ids and a model of "
                    f"{n_vocab:,}."
                )
            return tokenizer
        for name, size in TOKENIZERS.items():
            if size == n_vocab:
                return Tokenizer.named(name)
        known = ", ".join(f"{name} ({size})" for name, size in TOKENIZERS.items())
        raise UserError(
            f"{path} has no {TOKENIZER_JSON}, and no built-in tokenizer has {n_vocab:,} ids; there "
            f"are {known}."
        )

    @staticmethod
    def find(name: str, folder: Path) -> "Tokenizer":
        """Return the tokenizer called `name`: a built-in one, or else the one in `folder`."""
        if name in TOKENIZERS:
            return Tokenizer.named(name)
        tokenizer = Tokenizer.of_folder(folder)
        if tokenizer.name != name:
            raise UserError(
                f"{folder} should have the tokenizer {name}, and it has {tokenizer.name}."
            )
        return tokenizer

    @functools.cached_property
    def _tiktoken(self) -> Any:
        """The encoder of the library tiktoken for these tokens."""
        import tiktoken

        return tiktoken.Encoding(
            self.name,
            pat_str=GPT2_PATTERN,
            mergeable_ranks={token: rank for rank, token in enumerate(self.tokens)},
            special_tokens={END_OF_TEXT: self.end_of_text},
        )

    @functools.cached_property
    def _encode_long(self) -> Callable[[str], np.ndarray]:
        """Function from a text to its ids, uint16 or wider. They are the ids of tiktoken.

        The library gigatoken is about twenty times as fast as tiktoken (docs/log.md, 26). It takes
        longer to load, so `encode` does not use it. Where it is not installed, as on Windows, the
        function is tiktoken's.
        """
        try:
            import gigatoken
        except ImportError:
            return functools.partial(self._tiktoken.encode_to_numpy, disallowed_special=())
        words = self.vocabulary()
        del words.ids[END_OF_TEXT]  # otherwise it would be a special token in any text
        encoder = gigatoken.Tokenizer.from_json(files.tokenizer_json(words))
        lock = threading.Lock()

        def encode(text: str) -> np.ndarray:
            with lock:  # gigatoken raises an error if two threads use one encoder at a time
                return encoder.encode(text)

        return encode

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, which never include end of text.

        Lone surrogates, which UTF-8 cannot represent, become U+FFFD. Raises TypeError if `text` is
        not a string.
        """
        if not isinstance(text, str):
            raise TypeError(f"encode takes a text, and not {text!r}")
        text = _without_surrogates(text)
        if self.name == "bytes":
            return list(text.encode())
        return self._tiktoken.encode_ordinary(text)

    def encode_document(self, document: bytes) -> np.ndarray:
        """Return the ids of a document, uint16 (tokens).

        Bytes that are not UTF-8 are kept by "bytes", and become U+FFFD in a BPE.
        """
        if self.name == "bytes":
            return np.frombuffer(document, dtype=np.uint8).astype(np.uint16)
        parts = []
        for piece in pieces(document):
            text = piece.decode("utf-8", errors="replace")
            parts.append(self._encode_long(text).astype(np.uint16))
        return np.concatenate(parts)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Return the bytes that `ids` stand for, with end of text as "<|endoftext|>".

        Raises UserError for an id that does not exist, such as that of a padding row.
        """
        for token_id in ids:
            if not 0 <= token_id < self.n_vocab:
                raise UserError(
                    f"token id {token_id} does not exist; {self.name} has ids 0 to "
                    f"{self.n_vocab - 1}."
                )
        return b"".join(
            END_OF_TEXT.encode() if token_id == self.end_of_text else self.tokens[token_id]
            for token_id in ids
        )

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`; bytes that are not UTF-8 (half a character) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def vocabulary(self) -> Vocabulary:
        """Return ids and merges as vocabulary files write them."""
        characters = byte_characters()
        words = ["".join(characters[byte] for byte in token) for token in self.tokens]
        ids = {word: i for i, word in enumerate([*words, END_OF_TEXT])}
        return Vocabulary(ids, [f"{words[left]} {words[right]}" for left, right in self.merges])

    def save(self, folder: Path, n_positions: int = 1024, chat_template: str = "") -> None:
        """Write the files that `AutoTokenizer` opens for a model of `n_positions` into `folder`."""
        contents = files.contents(self.vocabulary(), n_positions, chat_template)
        for name, content in contents.items():
            (folder / name).write_bytes(content)

    def keep(self, folder: Path) -> None:
        """Write tokenizer.json into `folder`, unless it exists or the tokenizer is built in."""
        if self.name not in TOKENIZERS and not (folder / TOKENIZER_JSON).is_file():
            folder.mkdir(parents=True, exist_ok=True)
            content = files.contents(self.vocabulary(), n_positions=1024)[TOKENIZER_JSON]
            write_atomic(folder / TOKENIZER_JSON, content)


def _tokens_of(merges: Sequence[tuple[int, int]]) -> list[bytes]:
    """Return the bytes of each id but end of text: the 256 bytes, then what each merge joins."""
    tokens = [bytes([byte]) for byte in byte_characters()]
    for left, right in merges:
        tokens.append(tokens[left] + tokens[right])
    return tokens


def pieces(document: bytes) -> Iterator[bytes]:
    """Cut a long document where no token is split (see CUT).

    Text without such a place, such as a million equal characters, is cut every MOST_BYTES, between
    two characters, which may split a token.
    """
    start = 0
    while len(document) - start > PIECE_BYTES:
        match = CUT.search(document, start + PIECE_BYTES, start + MOST_BYTES)
        if match:
            end = match.start() + 1
        else:
            end = min(len(document), start + MOST_BYTES)
            while end < len(document) and document[end] & 0xC0 == 0x80:  # within a character
                end += 1
        yield document[start:end]
        start = end
    yield document[start:]


def _without_surrogates(text: str) -> str:
    """Join pairs of surrogates and replace lone ones by U+FFFD."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
