"""Models compute the same here and in transformers."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from anew import GPT, GPTConfig, Tokenizer
from anew.checkpoint.huggingface import save_model
from tests.support import shared


@pytest.mark.guarantee("gpt2")
def test_logits_and_loss_of_the_124m_configuration_equal_transformers(tmp_path: Path) -> None:
    model = GPT(GPTConfig(), seed=6).eval()
    save_model(tmp_path, model, Tokenizer.named("gpt2"))
    other = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = torch.randint(50257, (1, 256), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = model(ids)
        theirs = other(ids).logits
        assert ours.shape == theirs.shape == (1, 256, 50257)
        assert (ours - theirs).abs().max() <= 2e-5
        loss = other(input_ids=ids, labels=ids).loss
        assert model(ids[:, :-1], ids[:, 1:]).item() == pytest.approx(loss.item(), rel=1e-6)


def test_comparison_of_logits_would_notice_the_exact_gelu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = GPTConfig(n_layer=2, n_head=2, n_embd=32, n_positions=24, vocab_size=257)
    model = GPT(config, seed=4).eval()
    for parameter in model.transformer.h.parameters():
        parameter.data.mul_(6)  # Activations become as large as in a trained model.
    save_model(tmp_path, model, Tokenizer.named("bytes"))
    other = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = torch.arange(24)[None]
    with torch.no_grad():
        with_tanh_gelu = (model(ids) - other(ids).logits).abs().max().item()
        monkeypatch.setattr("anew.model.gpt.gelu", torch.nn.functional.gelu)
        with_exact_gelu = (model(ids) - other(ids).logits).abs().max().item()
    assert with_exact_gelu > 20 * with_tanh_gelu


def test_published_model_is_read_from_safetensors_and_from_pickle(tmp_path: Path) -> None:
    source = shared("tiny_gpt2")
    ids = torch.randint(50257, (2, 64), generator=torch.Generator().manual_seed(0))
    model = GPT.from_pretrained(str(source))
    other = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        assert (model(ids) - other(ids).logits).abs().max() <= 1e-6
    for name in ("config.json", "pytorch_model.bin"):
        shutil.copy(source / name, tmp_path / name)
    from_pickle = GPT.from_pretrained(str(tmp_path))
    for ours, theirs in zip(model.parameters(), from_pickle.parameters(), strict=True):
        assert torch.equal(ours, theirs)
