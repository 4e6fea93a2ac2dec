"""Attention, residual stream and removed parts are equal to those of transformers."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from anew import GPT, GPTConfig, UserError, generate
from anew.checkpoint.huggingface import load_model, save_model
from anew.inference.interpret import Part, logit_lens, trace_of, without
from anew.tokenizer.bpe import Tokenizer

CONFIG = GPTConfig(n_layer=3, n_head=4, n_embd=64, n_positions=64, vocab_size=257)
IDS = list(b"The quick brown fox jumps over the lazy dog.")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model with weights so large that its heads differ."""
    model = GPT(CONFIG, seed=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    path = tmp_path_factory.mktemp("model")
    save_model(path, model, Tokenizer.named("bytes"))
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> GPT:
    return load_model(folder).eval()


@pytest.fixture
def theirs(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


@torch.no_grad()
def test_attention_and_hidden_states_equal_transformers(model: GPT, theirs: Any) -> None:
    trace = trace_of(model, IDS)
    found = theirs(torch.tensor([IDS]), output_attentions=True, output_hidden_states=True)
    assert trace.attention.shape == (3, 4, len(IDS), len(IDS))
    torch.testing.assert_close(trace.attention, torch.cat(found.attentions), rtol=0, atol=1e-5)
    *before_last, normed = found.hidden_states  # transformers applies ln_f to the last one
    expected = torch.cat(before_last)
    torch.testing.assert_close(trace.residual[:-1], expected, rtol=1e-5, atol=1e-5)
    last = model.transformer.ln_f(trace.residual[-1])
    torch.testing.assert_close(last, normed[0], rtol=1e-5, atol=1e-5)
    added = trace.attention_added + trace.mlp_added
    torch.testing.assert_close(trace.residual.diff(dim=0), added, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_lens_of_the_last_block_is_the_model(model: GPT, theirs: Any) -> None:
    lens = logit_lens(model, trace_of(model, IDS).residual)  # (4, T, 257)
    assert torch.equal(lens[-1], model(torch.tensor([IDS]))[0].log_softmax(-1))
    hidden = theirs(torch.tensor([IDS]), output_hidden_states=True).hidden_states[1]
    expected = theirs.lm_head(theirs.transformer.ln_f(hidden))[0].log_softmax(-1)
    torch.testing.assert_close(lens[1], expected[:, :257], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "parts",
    [
        [Part(1, "head", 2)],
        [Part(0, "head", 0), Part(0, "head", 3), Part(2, "head", 1)],
        [Part(1, "attention")],
        [Part(2, "mlp"), Part(0, "head", 1)],
    ],
)
@torch.no_grad()
def test_removed_parts_equal_the_same_surgery_in_transformers(
    parts: list[Part], model: GPT, theirs: Any
) -> None:
    def zero_head(part: Part) -> Any:
        def hook(_: Any, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            heads = inputs[0].clone()  # (1, T, C): the heads side by side
            heads.view(*heads.shape[:2], CONFIG.n_head, -1)[:, :, part.head] = 0
            return (heads,)

        return hook

    for part in parts:
        block = theirs.transformer.h[part.block]
        if part.kind == "head":
            block.attn.c_proj.register_forward_pre_hook(zero_head(part))
        else:
            layer = block.mlp.c_proj if part.kind == "mlp" else block.attn.c_proj
            layer.register_forward_hook(lambda _, inputs, output: torch.zeros_like(output))
    before = model(torch.tensor([IDS]))
    smaller = without(model, parts)
    found = smaller(torch.tensor([IDS]))
    expected = theirs(torch.tensor([IDS])).logits[..., :257]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - before).abs().max() > 0.1, "the parts matter"
    assert torch.equal(model(torch.tensor([IDS])), before), "the model itself is unchanged"
    n_new = sum(
        p.data_ptr() not in {q.data_ptr() for q in model.parameters()} for p in smaller.parameters()
    )
    assert n_new <= 2 * len(parts), "all other weights are shared"
    assert generate(smaller, [IDS], 20, temperature=0) != generate(model, [IDS], 20, temperature=0)


def test_trace_of_a_model_in_training_drops_nothing(folder: Path) -> None:
    model = GPT(dataclasses.replace(CONFIG, dropout=0.5), seed=3).train()
    trace = trace_of(model, IDS)
    assert model.training, "the mode is left as it was"
    with torch.no_grad():
        logits = model.eval()(torch.tensor([IDS]))[0]
    assert torch.equal(logit_lens(model, trace.residual[-1]), logits.log_softmax(-1))


def test_part_that_the_model_does_not_have_is_refused(model: GPT) -> None:
    with pytest.raises(UserError, match=r"no head 4 in a block 0; .* heads 0 to 3"):
        without(model, [Part(0, "head", 4)])
    with pytest.raises(UserError, match="blocks 0 to 2"):
        without(model, [Part(3, "mlp")])
    ids = torch.tensor([IDS])
    with torch.no_grad():  # the head of an MLP has no meaning
        assert torch.equal(
            without(model, [Part(1, "mlp", head=99)])(ids), without(model, [Part(1, "mlp")])(ids)
        )
