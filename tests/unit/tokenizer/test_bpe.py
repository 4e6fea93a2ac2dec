"""Text becomes ids and is recovered; tests/integration/test_bpe.py compares with transformers."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anew import GPT, GPTConfig, Tokenizer, UserError
from anew.checkpoint.huggingface import save_model

GPT2 = Tokenizer.named("gpt2")
BYTES = Tokenizer.named("bytes")


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
