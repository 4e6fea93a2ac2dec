"""Text becomes ids and is recovered; tests/integration/test_bpe.py compares with transformers."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anew import GPT, GPTConfig, Tokenizer, UserError
from anew.checkpoint.huggingface import save_model

GPT2 = Tokenizer.named("gpt2")
BYTES = Tokenizer.named("bytes")
# As learned from a text: "ab" is one token, "ba" is not.
LEARNED = Tokenizer.of_words([("a", "b"), ("Ġ", "a"), ("ab", "ab"), ("Ã", "©"), ("Ġa", "b")])


def test_known_ids() -> None:
    assert GPT2.encode("Hello world") == [15496, 995]
    assert GPT2.n_vocab == 50257
    assert GPT2.end_of_text == 50256
    assert BYTES.n_vocab == 257
    assert BYTES.end_of_text == 256


any_text = st.text(st.characters(codec=None))
special_text = st.lists(st.sampled_from(["<|endoftext|>", "\ud800", "\udc00", "a", " "]))


@settings(max_examples=300, deadline=None)
@given(any_text | special_text.map("".join))
def test_text_never_becomes_end_of_text_and_is_recovered(text: str) -> None:
    expected = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    for tokenizer in (GPT2, BYTES):
        ids = tokenizer.encode(text)
        assert tokenizer.end_of_text not in ids
        assert tokenizer.decode(ids) == expected


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=60), max_size=4))
def test_documents_of_any_bytes_are_recovered(documents: list[bytes]) -> None:
    for document in documents:
        assert bytes(BYTES.encode_document(document).astype("uint8")) == document
        ids = GPT2.encode_document(document)
        assert GPT2.decode(ids.tolist()) == document.decode(errors="replace")


WORDS = "a b S T 1 . , ! - ' 's 'll 're 'VE _ é ß 漢 字 ٣ ² Ⅷ ก็ 👩‍👩‍👧 <|endoftext|>"
SPACES = (" ", "  ", "\n", " \n", "\t", "\r", "\x00", "\x1c", "\x85", "\u00a0", "\u200b", "\u2028")
parts_of_text = st.sampled_from((*WORDS.split(" "), *SPACES, "\u0301", "\u3000", "\ufeff"))


@settings(max_examples=300, deadline=None)
@given(st.lists(parts_of_text, max_size=60).map("".join) | st.text())
def test_document_has_the_ids_that_tiktoken_gives(text: str) -> None:
    for tokenizer in (GPT2, LEARNED):
        assert tokenizer.encode_document(text.encode()).tolist() == tokenizer.encode(text)


def test_every_character_is_split_as_tiktoken_splits_it() -> None:
    """GPT-2's pattern depends on Unicode's categories, which two libraries may know differently."""
    characters = [*range(0xD800), *range(0xE000, 0x110000)]
    for start in range(0, len(characters), 20_000):
        block = map(chr, characters[start : start + 20_000])
        text = "".join(f"a{c}1{c} {c}{c}." for c in block)
        assert GPT2.encode_document(text.encode()).tolist() == GPT2.encode(text)


def test_threads_can_share_a_tokenizer() -> None:
    text = "The king, who is 12 years old, can't see it. " * 2000
    ids = GPT2.encode(text)
    with ThreadPoolExecutor(4) as threads:
        for found in threads.map(GPT2.encode_document, [text.encode()] * 40):
            assert found.tolist() == ids


def test_ids_are_the_same_without_gigatoken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    text = "It's 12 <|endoftext|>"
    plain = Tokenizer("gpt2", GPT2.tokens, GPT2.merges)
    assert plain.encode_document(text.encode()).tolist() == GPT2.encode(text)


@pytest.mark.parametrize("token_id", [50257, 50303, -1])
def test_ids_that_do_not_exist_are_refused(token_id: int) -> None:
    with pytest.raises(UserError, match="does not exist"):
        GPT2.decode([0, token_id])


def test_end_of_text_is_decoded_as_text() -> None:
    assert GPT2.decode([50256]) == "<|endoftext|>"


def test_unknown_tokenizer_is_refused() -> None:
    with pytest.raises(UserError, match="no tokenizer 'gpt4'"):
        Tokenizer.named("gpt4")


def test_tokenizer_of_a_model_folder_is_found_by_the_name_of_the_model(tmp_path: Path) -> None:
    config = GPTConfig(n_layer=1, n_head=1, n_embd=8, n_positions=8, vocab_size=257)
    save_model(tmp_path, GPT(config), Tokenizer.named("bytes"))
    assert Tokenizer.from_pretrained(tmp_path).name == "bytes"
    with pytest.raises(UserError, match="there is no model at"):
        Tokenizer.from_pretrained(tmp_path / "nothing")


def test_what_is_not_a_text_is_refused() -> None:
    wrong: Any = 5
    with pytest.raises(TypeError, match="encode takes a text, and not 5"):
        Tokenizer.named("gpt2").encode(wrong)
