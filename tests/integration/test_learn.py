"""A learned vocabulary, from text to a model folder that other programs open."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import anew
from anew import Tokenizer, UserError
from anew.data.dataset import open_data
from anew.data.shards import DataFolder
from anew.tokenizer.files import contents
from anew.tokenizer.learn import learn
from anew.training.trainer import train
from tests.support.reviews import prepare_reviews, write_reviews

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
    return write_reviews(tmp_path_factory.mktemp("reviews"))


@pytest.fixture(scope="module")
def data(reviews: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with a vocabulary of 1,000 ids learned from the reviews."""
    out = tmp_path_factory.mktemp("own") / "data"
    prepare_reviews(reviews, out)
    return out


def test_preparing_again_learns_the_same_vocabulary(
    reviews: Path, data: Path, tmp_path: Path
) -> None:
    again = tmp_path / "data"
    prepare_reviews(reviews, again, workers=2)
    assert (again / "tokenizer.json").read_bytes() == (data / "tokenizer.json").read_bytes()
    shard, shard_again = (DataFolder.open(path).splits["train"][0] for path in (data, again))
    assert shard_again.sha256 == shard.sha256


def test_vocabulary_is_learned_without_the_held_out_documents(reviews: Path, data: Path) -> None:
    shards = DataFolder.open(data).splits["train"]
    ids = np.concatenate([shard.tokens for shard in shards]).tolist()
    text = Tokenizer.of_folder(data).decode_bytes(ids)
    training = {bytes(document) for document in text.split(b"<|endoftext|>")}
    with reviews.open(encoding="utf-8") as file:
        documents = [json.loads(line)["text"].encode() for line in file]
    assert len(training & set(documents)) > 300
    kept = [document for document in documents if document in training]
    assert learn(kept, 1000).name != learn(documents, 1000).name


def test_learned_vocabulary_from_data_to_model_to_finetuning_to_export(
    data: Path, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("ANEW_CACHE", str(tmp_path / "cache"))
    own = Tokenizer.of_folder(data)
    run = tmp_path / "run"
    result = train(
        anew.recipe("shakespeare", data=str(data), tokenizer=str(data), out=str(run), **SMALL)
    )
    assert result.val_loss is not None
    checkpoint = run / "checkpoints" / "step-00000004"
    ids = AutoTokenizer.from_pretrained(checkpoint)("the film was not good")["input_ids"]
    assert ids == own.encode("the film was not good")
    assert AutoModelForCausalLM.from_pretrained(checkpoint).config.vocab_size == 1000
    with pytest.raises(UserError, match="add --tokenizer"):
        train(anew.recipe("shakespeare", data=str(data), out=str(tmp_path / "x"), **SMALL))
    finetuned = tmp_path / "tuned"
    config = anew.recipe(
        "finetune",
        init=str(run),
        data=str(reviews),
        out=str(finetuned),
        seq_len=64,
        batch_tokens=512,
        steps=2,
        warmup_steps=1,
        compile="off",
    )
    train(config)
    # The vocabulary was copied, so the run continues without the model that it started from.
    shutil.rmtree(run)
    train(config)
    for command in (
        ["sample", str(finetuned), "--tokens", "5", "--prompt", "the"],
        ["evaluate", str(finetuned), "--task", "val"],
        ["export", str(finetuned), "--to", "gguf", "--out", str(tmp_path / "m.gguf")],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "anew", *command], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr


def test_train_n_learns_in_a_training_run_and_resumes(
    reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANEW_CACHE", str(tmp_path / "cache"))
    config = anew.recipe(
        "shakespeare", data=str(reviews), tokenizer="train:600", out=str(tmp_path / "run"), **SMALL
    )
    assert config.model.vocab_size == 600
    first = train(config)
    assert train(config).val_loss == first.val_loss

    # A run with another vocabulary of the same size cannot be resumed.
    folder = open_data(str(reviews), "train:600").path
    merges = [merge.split(" ") for merge in Tokenizer.of_folder(folder).vocabulary().merges]
    merges[-1] = ["z", "q"]
    other = Tokenizer.of_words((left, right) for left, right in merges)
    files = contents(other.vocabulary(), n_positions=1024)
    (folder / "tokenizer.json").write_bytes(files["tokenizer.json"])
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | {"tokenizer": other.name}))
    with pytest.raises(UserError, match="is not the one that"):
        train(config)


@pytest.mark.parametrize(
    ("tokenizer", "words"),
    [("train:", r"no tokenizer 'train:'"), ("train:257", "258 to 65,536 ids")],
)
def test_sizes_that_no_vocabulary_has_are_refused(tokenizer: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        anew.recipe("shakespeare", tokenizer=tokenizer)
