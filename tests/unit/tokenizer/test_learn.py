"""A vocabulary of one's own, from text to a model folder that others open."""

import json
import lzma
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

import anew
from anew import Tokenizer, UserError
from anew.data import prepare, sources
from anew.data.dataset import open_data
from anew.tokenizer.learn import learn
from anew.training.trainer import train
from tests.support import shared

SMALL = {
    "n_layer": 1,
    "n_head": 2,
    "n_embd": 32,
    "n_positions": 64,
    "seq_len": 64,
    "batch_tokens": 512,
    "steps": 4,
    "warmup_steps": 1,
}


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 real film reviews, about half a megabyte."""
    path = tmp_path_factory.mktemp("reviews") / "reviews.jsonl"
    with lzma.open(shared("corpus/imdb_reviews.jsonl.xz"), "rt", encoding="utf-8") as file:
        path.write_text("".join(islice(file, 400)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder(reviews: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("own") / "data"
    prepare.prepare(
        sources.find(str(reviews)), prepare.Settings("train:1000", val_tokens=5000), out, workers=1
    )
    return out


def test_learnt_ids_are_those_of_the_library_that_others_read_them_with(
    reviews: Path, folder: Path
) -> None:
    from tokenizers import Tokenizer as Other

    own = Tokenizer.of_folder(folder)
    assert (own.n_vocab, own.end_of_text) == (1000, 999)
    text = reviews.read_text(encoding="utf-8")
    other = Other.from_file(str(folder / "tokenizer.json"))
    for sample in (
        text[:200_000],
        "Zwölf Boxkämpfer\n\n  jagen\tEva 日本 !!!!!!!!!!!!!!!        end",
        "a" * 1000,
        " " * 77,
    ):
        assert own.encode(sample) == other.encode(sample).ids
        assert own.decode(own.encode(sample)) == sample
    assert len(own.encode(text)) < 0.6 * len(text.encode())


def test_a_file_of_merges_reads_back_as_the_same_tokenizer(folder: Path, tmp_path: Path) -> None:
    own = Tokenizer.of_folder(folder)
    own.save(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").unlink()  # as OpenAI's oldest folders are
    assert Tokenizer.of_folder(tmp_path).name == own.name
    for name in ("gpt2", "bytes"):
        builtin = Tokenizer.named(name)
        builtin.save(tmp_path)
        assert Tokenizer.of_folder(tmp_path) is builtin


@pytest.mark.parametrize("harm", ["order", "merge", "normalizer", "special", "no json", "missing"])
def test_a_tokenizer_of_another_kind_is_refused(folder: Path, harm: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    raw = json.loads((folder / "tokenizer.json").read_text())
    vocab = raw["model"]["vocab"]
    if harm == "order":
        vocab["!"], vocab['"'] = vocab['"'], vocab["!"]
    elif harm == "merge":
        raw["model"]["merges"][5] = "zzzz y"
    elif harm == "normalizer":
        raw["normalizer"] = {"type": "Lowercase"}
    elif harm == "special":
        raw["added_tokens"].append({"id": 1000, "content": "<pad>"})
    path.write_text("no json" if harm == "no json" else json.dumps(raw))
    if harm == "missing":
        path.unlink()
    with pytest.raises(UserError, match="tokenizer in"):
        Tokenizer.of_folder(tmp_path)


def test_a_text_too_small_says_what_it_has_words_for() -> None:
    with pytest.raises(
        UserError, match=r"vocabulary of (\d+), not of 5,000; use train:\1"
    ) as error:
        learn([b"the king and the ship and the king"] * 3, 5000)
    n = int(str(error.value).rpartition(":")[2].rstrip("."))
    assert learn([b"the king and the ship and the king"] * 3, n).n_vocab == n


def test_preparing_again_learns_the_same_and_leaves_the_held_out_text_out(
    reviews: Path, folder: Path, tmp_path: Path
) -> None:
    again = prepare.prepare(
        sources.find(str(reviews)),
        prepare.Settings("train:1000", val_tokens=5000),
        tmp_path / "data",
        workers=2,
    )
    assert (tmp_path / "data" / "tokenizer.json").read_bytes() == (
        folder / "tokenizer.json"
    ).read_bytes()
    assert again.splits["train"][0].sha256 == anew_folder(folder).splits["train"][0].sha256
    own, rows = (
        Tokenizer.of_folder(folder),
        [json.loads(line)["text"].encode() for line in reviews.open(encoding="utf-8")],
    )
    training = {
        bytes(t) for t in own.decode_bytes(tokens_of(folder, "train")).split(b"<|endoftext|>")
    }
    assert len(training & set(rows)) > 300
    assert learn([row for row in rows if row in training], 1000).name != learn(rows, 1000).name


def anew_folder(path: Path):
    from anew.data.shards import DataFolder

    return DataFolder.open(path)


def tokens_of(path: Path, split: str) -> list[int]:
    return np.concatenate([s.tokens for s in anew_folder(path).splits[split]]).tolist()


def test_from_data_to_model_to_finetuning_to_export(
    folder: Path, reviews: Path, tmp_path: Path, monkeypatch
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("ANEW_CACHE", str(tmp_path / "cache"))
    own = Tokenizer.of_folder(folder)
    run = tmp_path / "run"
    result = train(
        anew.recipe("shakespeare", data=str(folder), tokenizer=str(folder), out=str(run), **SMALL)
    )
    assert result.val_loss is not None
    checkpoint = run / "checkpoints" / "step-00000004"
    ids = AutoTokenizer.from_pretrained(checkpoint)("the film was not good")["input_ids"]
    assert ids == own.encode("the film was not good")
    assert AutoModelForCausalLM.from_pretrained(checkpoint).config.vocab_size == 1000
    with pytest.raises(UserError, match="add --tokenizer"):
        train(anew.recipe("shakespeare", data=str(folder), out=str(tmp_path / "x"), **SMALL))
    tuned = tmp_path / "tuned"
    config = anew.recipe(
        "finetune",
        init=str(run),
        data=str(reviews),
        out=str(tuned),
        seq_len=64,
        batch_tokens=512,
        steps=2,
        warmup_steps=1,
        compile="off",
    )
    train(config)
    shutil.rmtree(
        run
    )  # the vocabulary has gone along, so the run goes on without the model it began with
    train(config)
    for command in (
        ["sample", str(tuned), "--tokens", "5", "--prompt", "the"],
        ["evaluate", str(tuned)],
        ["export", str(tuned), "--to", "gguf", "--out", str(tmp_path / "m.gguf")],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "anew", *command], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr


def test_train_n_needs_no_preparation_and_resumes(
    reviews: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("ANEW_CACHE", str(tmp_path / "cache"))
    config = anew.recipe(
        "shakespeare", data=str(reviews), tokenizer="train:600", out=str(tmp_path / "run"), **SMALL
    )
    assert config.model.vocab_size == 600
    first = train(config)
    assert train(config).val_loss == first.val_loss
    folder = open_data(str(reviews), "train:600")
    with pytest.raises(UserError, match=r"no tokenizer 'train:'"):
        anew.recipe("shakespeare", tokenizer="train:")
    with pytest.raises(UserError, match="258 to 65,536 ids"):
        anew.recipe("shakespeare", tokenizer="train:257")
    # another vocabulary of the same size is another run
    merges = Tokenizer.of_folder(folder.path).words()[1]
    other = Tokenizer.of_words(
        (pair.split(" ")[0], pair.split(" ")[1]) for pair in [*merges[:-1], "z q"]
    )
    (folder.path / "tokenizer.json").write_bytes(other.files()["tokenizer.json"])
    index = json.loads((folder.path / "index.json").read_text())
    (folder.path / "index.json").write_text(json.dumps(index | {"tokenizer": other.name}))
    with pytest.raises(UserError, match="no longer the one"):
        train(config)
