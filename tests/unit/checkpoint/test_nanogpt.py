"""Checkpoints of nanoGPT and build-nanogpt compute the same here."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from anew import GPT, UserError
from tests.support.nanogpt import build_nanogpt_checkpoint, nanogpt_checkpoint, save_pickled


def test_build_nanogpt_computes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, content = build_nanogpt_checkpoint()
    save_pickled(content, tmp_path / "ckpt.pt", monkeypatch)
    ours = GPT.from_pretrained(str(tmp_path / "ckpt.pt"))
    ids = torch.randint(50257, (2, 16))
    with torch.no_grad():
        assert (ours(ids) - theirs(ids)).abs().max() <= 2e-5


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt_computes_the_same_but_for_its_gelu(bias: bool, tmp_path: Path) -> None:
    theirs, content = nanogpt_checkpoint(bias)
    torch.save(content, tmp_path / "ckpt.pt")
    ours = GPT.from_pretrained(str(tmp_path / "ckpt.pt"))
    ids = torch.randint(50257, (2, 16))
    with torch.no_grad():
        assert 2e-5 < (ours(ids) - theirs(ids)).abs().max() < 2e-3
        theirs.gelu = "tanh"
        assert (ours(ids) - theirs(ids)).abs().max() <= 2e-5


FC = "_orig_mod.transformer.h.1.mlp.c_fc.weight"


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda c: c.pop("model"), "no 'model' in it"),
        (lambda c: c.update(model={"a": 1}), "is not a tensor"),
        (lambda c: c.pop("model_args"), "does not describe the shape"),
        (lambda c: c["model_args"].update(n_embd="wide"), "does not describe the shape"),
        (lambda c: c["model_args"].update(n_head=0), "does not describe a GPT-2"),
        (lambda c: c["model_args"].update(n_head=5), "does not describe a GPT-2"),
        (
            lambda c: c["model_args"].update(n_layer=12, n_embd=768, n_head=24),
            "n_head 24, and its weights were trained with 12",
        ),
        (lambda c: c["model_args"].update(n_layer=3), "lacks"),
        (lambda c: c["model_args"].update(vocab_size=65), "has shape"),
        (lambda c: c["model"].pop(FC), "lacks transformer.h.1.mlp.c_fc.weight"),
        (lambda c: c["model"].update(extra=torch.ones(1)), "unknown extra"),
        (lambda c: c["model"].update({FC: c["model"][FC].t()}), "has shape"),
        (lambda c: c["model"][FC].fill_(torch.inf), "not finite"),
    ],
)
def test_wrong_checkpoints_are_refused(
    harm: Callable[[dict[str, Any]], object], words: str, tmp_path: Path
) -> None:
    _, content = nanogpt_checkpoint()
    harm(content)
    torch.save(content, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match=words):
        GPT.from_pretrained(str(tmp_path / "ckpt.pt"))


class Malicious:
    """Unpickling this would run a command."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch executed",)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Malicious(), "model_args": {}}, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="more than tensors and plain values"):
        GPT.from_pretrained("ckpt.pt")
    assert not (tmp_path / "executed").exists()


def test_file_that_is_not_a_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("not a checkpoint at all")
    with pytest.raises(UserError, match=r"torch\.save did not write it"):
        GPT.from_pretrained(str(tmp_path / "text.pt"))
