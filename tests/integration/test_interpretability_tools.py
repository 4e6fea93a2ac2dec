"""TransformerLens and nnsight open our folders and show the same activations.

Skipped where they are not installed: `pip install transformer_lens nnsight`.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from anew import GPT, GPTConfig, Tokenizer
from anew.checkpoint.huggingface import save_model
from anew.inference.interpret import Part, trace_of, without

TEXT = "The quick brown fox jumps over the lazy dog."


@pytest.fixture(scope="module")
def model() -> GPT:
    """A model with weights so large that its heads differ."""
    config = GPTConfig(n_layer=3, n_head=4, n_embd=64, n_positions=64)
    model = GPT(config, seed=3).eval()
    with torch.no_grad():
        for parameter in model.transformer.h.parameters():
            parameter.mul_(4)
    return model


@pytest.fixture(scope="module")
def folder(model: GPT, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_model(path, model, Tokenizer.named("gpt2"))
    return path


def assert_equal(found: Any, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.detach(), expected, rtol=1e-5, atol=1e-5)


def test_transformer_lens_shows_the_same_activations(model: GPT, folder: Path) -> None:
    lens = pytest.importorskip(
        "transformer_lens.model_bridge", reason="needs pip install transformer_lens"
    )
    ids = Tokenizer.named("gpt2").encode(TEXT)
    trace = trace_of(model, ids)
    theirs = lens.TransformerBridge.boot_transformers(str(folder), device="cpu")
    logits, cache = theirs.run_with_cache(torch.tensor([ids]))
    assert_equal(logits[0], model(torch.tensor([ids])).detach()[0])
    for block in range(3):
        assert_equal(cache[f"blocks.{block}.attn.hook_pattern"][0], trace.attention[block])
        assert_equal(cache[f"blocks.{block}.hook_resid_post"][0], trace.residual[block + 1])
        assert_equal(cache[f"blocks.{block}.hook_mlp_out"][0], trace.mlp_added[block])


def test_nnsight_shows_and_changes_the_same_activations(model: GPT, folder: Path) -> None:
    nnsight = pytest.importorskip("nnsight", reason="needs pip install nnsight")

    ids = Tokenizer.named("gpt2").encode(TEXT)
    trace = trace_of(model, ids)
    theirs = nnsight.TransformersModel(
        str(folder), task="text-generation", device_map="cpu", dispatch=True
    )
    with theirs.trace(TEXT):
        added = theirs.transformer.h[1].mlp.output.save()
        logits = theirs.lm_head.output.save()
    assert_equal(added[0], trace.mlp_added[1])
    assert_equal(logits[0], model(torch.tensor([ids])).detach()[0])
    with theirs.trace(TEXT):
        theirs.transformer.h[1].mlp.output[:] = 0
        changed = theirs.lm_head.output.save()
    smaller = without(model, [Part(1, "mlp")])
    assert_equal(changed[0], smaller(torch.tensor([ids])).detach()[0])
