"""The decoders against PyTorch: the same numbers for all shapes, lengths of rows and histories."""

from typing import Any

import pytest
import torch

from anew import GPT, GPTConfig, generate
from anew.inference.cpu_decoder import GROUP, CpuBatchDecoder, CpuDecoder, load_library, quantize
from anew.inference.decoders import CudaGraphDecoder, TorchDecoder, decoder_for
from anew.inference.generate import _prefill
from anew.model.gpt import Block
from anew.model.kv_cache import Cache

pytestmark = pytest.mark.skipif(
    load_library() is None, reason="the kernel needs Linux and a C++ compiler"
)
WIDE = {"n_embd": 768, "n_head": 12, "n_layer": 2}
TWO_HEADS_OF_18 = {"n_embd": 36, "n_head": 2}


def model_of(**shape: Any) -> GPT:
    default = {"n_layer": 3, "n_head": 4, "n_embd": 96, "n_positions": 64, "vocab_size": 1000}
    config = GPTConfig(**{**default, **shape})
    model = GPT(config, torch.bfloat16, seed=3).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        # Biases and norms differ from their initial values, and weights are large enough to matter.
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * (0.3 if p.ndim == 1 else 0.08))
        model.transformer.wte.weight[config.vocab_size :] = 0
    return model


def prompts_of(lengths: list[int]) -> list[list[int]]:
    return [[(7 * row + 3 * i) % 1000 for i in range(n)] for row, n in enumerate(lengths)]


def reference(model: GPT, int8: bool) -> GPT:
    """Return a model in fp64 with the weights that the decoder stores."""
    exact = GPT(model.config, torch.float64, seed=None).double().eval()
    with torch.no_grad():
        for (name, p), target in zip(model.named_parameters(), exact.parameters(), strict=True):
            if p.ndim == 1 or "wpe" in name:
                target.copy_(p)
                continue
            matrix = p if "wte" in name else p.t()
            if int8:
                values, scales = quantize(matrix.float())
                groups = values.view(len(values), -1, GROUP) * scales[..., None]
                matrix = groups.reshape(matrix.shape)
            else:
                matrix = matrix.bfloat16()
            target.copy_(matrix if "wte" in name else matrix.t())
    return exact


@pytest.mark.parametrize(
    ("rows", "int8", "shape"),
    [
        (1, False, {}),
        (1, True, {}),
        (1, False, WIDE),
        (1, True, WIDE),
        (1, False, TWO_HEADS_OF_18),
        (1, True, {"n_embd": 32, "n_head": 1}),
        (2, False, {}),
        (16, False, {"n_embd": 160, "n_head": 5}),
    ],
)
def test_logits_are_those_of_the_stored_weights_in_fp64(
    rows: int, int8: bool, shape: dict[str, Any]
) -> None:
    if rows > 1 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("needs a CPU with products in bf16")
    model = model_of(**shape)
    decoder = decoder_for(model, rows, int8)
    assert isinstance(decoder, CpuDecoder if rows == 1 else CpuBatchDecoder)
    exact = reference(model, int8)
    head = exact.transformer.wte.weight.detach().clone()[:1000]
    with torch.no_grad():
        exact.transformer.wte.weight.copy_(
            model.transformer.wte.weight
        )  # ids are looked up in fp32
    prompts = prompts_of([2 + 5 * row % 11 for row in range(rows)])
    cache, _ = _prefill(model, prompts, 64)
    exact_cache = Cache.empty(exact, rows, 64)
    # Keys and values are kept in bf16, oneDNN rounds to it, and int8 multiplies bytes.
    tolerance = 0.05 if rows > 1 or int8 else 0.02
    with torch.no_grad():
        exact_cache.keys.copy_(cache.keys)
        exact_cache.values.copy_(cache.values)
        exact_cache.truncate([len(prompt) for prompt in prompts])
        for step in range(5):
            ids = [(11 * row + 17 * step) % 1000 for row in range(rows)]
            logits = decoder.step(ids, cache)
            hidden = exact.hidden(torch.tensor(ids)[:, None], exact_cache)[:, -1]
            expected = hidden @ head.t()
            assert (logits - expected).abs().max() < tolerance * expected.abs().max()
            assert cache.lengths.tolist() == exact_cache.lengths.tolist()


@pytest.mark.parametrize("lengths", [[5, 5, 5], [2, 9, 17]])
def test_step_over_fixed_slots_equals_the_usual_step(lengths: list[int]) -> None:
    """A GPU records attention over more slots than are filled; here those hold large values."""
    model = model_of()
    usual = TorchDecoder(model)
    cache, _ = _prefill(model, prompts_of(lengths), 64)
    other = Cache(cache.keys.clone(), cache.values.clone(), cache.lengths, cache.used, cache.ragged)
    for row, n in enumerate(lengths):
        other.keys[:, row, :, n:] = 1e4
        other.values[:, row, :, n:] = 1e4
    graphed = CudaGraphDecoder(model)
    for step in range(3):
        ids = [11, 400 + step, 7]
        fixed = graphed.fixed_shape_step(torch.tensor(ids)[:, None], cache.lengths, 32, other)
        expected = usual.step(ids, cache)
        tolerance = 0.02 * fixed.abs().max().item()
        torch.testing.assert_close(fixed, expected, rtol=0.02, atol=tolerance)


def greedy_without_cache(model: GPT, prompt: list[int], n: int) -> list[int]:
    ids = list(prompt)
    for _ in range(n):
        with torch.inference_mode():
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def test_decoder_generates_what_torch_generates_and_crops_where_it_crops(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = model_of()
    prompts = [[1, 2, 3], [4]]
    fast = generate(model, prompts, 90, temperature=0.0)
    assert "cropped" in caplog.text
    assert [len(row) for row in fast] == [90, 90]
    for row, prompt in zip(fast, prompts, strict=True):
        slow = greedy_without_cache(model, prompt, 20)
        equal = sum(a == b for a, b in zip(row, slow, strict=False))
        assert equal >= 15, "they may differ where two tokens are almost equally likely"


def test_model_with_changed_weights_gets_a_new_decoder() -> None:
    model = model_of()
    first = decoder_for(model, 1)
    assert decoder_for(model, 1) is first
    assert decoder_for(model, 1, int8=True) is not first
    second = decoder_for(model, 1)
    with torch.no_grad():
        block = model.transformer.h[0]
        assert isinstance(block, Block)
        block.mlp.c_fc.weight.mul_(2.0)
    third = decoder_for(model, 1)
    assert third is not second


def test_decoder_depends_on_dtype_mode_and_compiler(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_fp32 = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=32))
    assert decoder_for(in_fp32, 1) is None, "fp32 needs no copy"
    assert decoder_for(model_of().train(), 1) is None, "a model in training has no second copy"
    assert isinstance(decoder_for(model_of(**TWO_HEADS_OF_18), 1, int8=True), CpuDecoder)
    assert "int8 weights are for one text" in caplog.text
    monkeypatch.setattr("anew.inference.decoders.load_library", lambda: None)
    assert isinstance(decoder_for(model_of(), 1), TorchDecoder), "without a compiler"
