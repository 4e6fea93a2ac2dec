"""A checkpoint of build-nanogpt is exported and trained further."""

from pathlib import Path

import pytest
import torch

from anew.cli.main import main
from tests.support.nanogpt import build_nanogpt_checkpoint, save_pickled


def test_exported_checkpoint_computes_the_same_in_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    theirs, content = build_nanogpt_checkpoint()
    path = tmp_path / "model_19072.pt"
    save_pickled(content, path, monkeypatch)
    main(["export", str(path), "--to", "hf", "--out", str(tmp_path / "hf")])
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    ids = torch.randint(50257, (2, 16))
    with torch.no_grad():
        assert (exported(ids).logits - theirs(ids)).abs().max() <= 2e-5


def test_checkpoint_can_be_trained_further(
    tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, content = build_nanogpt_checkpoint()
    path = tmp_path / "model_19072.pt"
    save_pickled(content, path, monkeypatch)
    files = ["--init", str(path), "--data", str(text_file), "--out", str(tmp_path / "run")]
    sizes = ["--steps", "2", "--seq-len", "16", "--batch-tokens", "64", "--micro-batch", "4"]
    others = ["--evaluate-every", "0", "--precision", "fp32"]
    main(["train", "finetune", *files, *sizes, *others])
    assert (tmp_path / "run" / "checkpoints" / "step-00000002" / "model.safetensors").is_file()
