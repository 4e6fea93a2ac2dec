import hashlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anew import Tokenizer, UserError
from tests.support import shared

GPT2, BYTES = Tokenizer.named("gpt2"), Tokenizer.named("bytes")


def test_the_packaged_merges_are_openais_own_files() -> None:
    files = GPT2.files()
    assert (
        hashlib.sha256(files["merges.txt"]).hexdigest()
        == "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
    )
    assert (
        hashlib.sha256(files["vocab.json"]).hexdigest()
        == "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
    )


def test_known_ids() -> None:
    assert GPT2.encode("Hello world") == [15496, 995]
    assert (GPT2.n_vocab, GPT2.end_of_text, BYTES.n_vocab, BYTES.end_of_text) == (
        50257,
        50256,
        257,
        256,
    )


def test_ids_equal_those_of_transformers_on_real_text(tmp_path) -> None:
    from transformers import AutoTokenizer

    GPT2.save(tmp_path)
    other = AutoTokenizer.from_pretrained(tmp_path)
    text = shared("web_text/fineweb_edu_sample.txt").read_text(encoding="utf-8")[:200_000]
    assert other(text)["input_ids"] == GPT2.encode(text)
    assert GPT2.decode(GPT2.encode(text)) == text


@pytest.mark.parametrize("tokenizer", [GPT2, BYTES], ids=["gpt2", "bytes"])
def test_auto_tokenizer_opens_what_is_saved(tokenizer: Tokenizer, tmp_path) -> None:
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path)
    other = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("def f(x):\n\treturn 'é' + \"日本\"  # ok", " a  b ", "\r\n\x00"):
        assert other(text)["input_ids"] == tokenizer.encode(text)
        assert other.decode(tokenizer.encode(text), clean_up_tokenization_spaces=False) == text
    assert other.eos_token_id == tokenizer.end_of_text
    assert (
        json.loads((tmp_path / "vocab.json").read_text())["<|endoftext|>"] == tokenizer.end_of_text
    )


@settings(max_examples=300, deadline=None)
@given(
    st.text(st.characters(codec=None))
    | st.lists(st.sampled_from(["<|endoftext|>", "\ud800", "\udc00", "a", " "])).map("".join)
)
def test_user_text_is_never_end_of_text_and_survives(text: str) -> None:
    for tokenizer in (GPT2, BYTES):
        ids = tokenizer.encode(text)
        assert tokenizer.end_of_text not in ids
        expected = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        assert tokenizer.decode(ids) == expected


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=60), max_size=4))
def test_documents_of_any_bytes_encode(documents: list[bytes]) -> None:
    assert [bytes(BYTES.encode_document(d).astype("uint8")) for d in documents] == documents
    for document in documents:
        ids = GPT2.encode_document(document)
        assert GPT2.decode(ids.tolist()) == document.decode(errors="replace")


def test_ids_that_do_not_exist_are_refused() -> None:
    for bad in (50257, 50303, -1):
        with pytest.raises(UserError, match="does not exist"):
            GPT2.decode([0, bad])
    assert GPT2.decode([50256]) == "<|endoftext|>"
    with pytest.raises(UserError, match="no tokenizer 'gpt4'"):
        Tokenizer.named("gpt4")
