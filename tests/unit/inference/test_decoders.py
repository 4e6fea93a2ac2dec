"""The decoders against PyTorch: the same numbers for all shapes, lengths of rows and histories."""

import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from anew import GPT, GPTConfig, generate
from anew.inference import cpu_decoder, decoders
from anew.inference.cpu_decoder import GROUP, CpuBatchDecoder, CpuDecoder, load_library, quantize
from anew.inference.decoders import CudaGraphDecoder, TorchDecoder, decoder_for
from anew.inference.generate import _prefill
from anew.model.gpt import Block, Linear
from anew.model.kv_cache import Cache

pytestmark = pytest.mark.skipif(
    load_library() is None, reason="the kernel needs Linux and a C++ compiler"
)
BF16 = torch.bfloat16
FP32 = torch.float32
WIDE: dict[str, Any] = {"n_embd": 768, "n_head": 12, "n_layer": 2}
TWO_HEADS_OF_18: dict[str, Any] = {"n_embd": 36, "n_head": 2}


def model_of(dtype: torch.dtype = torch.bfloat16, **shape: Any) -> GPT:
    default = {"n_layer": 3, "n_head": 4, "n_embd": 96, "n_positions": 64, "vocab_size": 1000}
    config = GPTConfig(**{**default, **shape})
    model = GPT(config, dtype, seed=3).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        # Biases and norms differ from their initial values, and weights are large enough to matter.
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * (0.3 if p.ndim == 1 else 0.08))
        model.transformer.wte.weight[config.vocab_size :] = 0
    return model


def prompts_of(lengths: list[int]) -> list[list[int]]:
    return [[(7 * row + 3 * i) % 1000 for i in range(n)] for row, n in enumerate(lengths)]


def reference(model: GPT, dtype: torch.dtype, int8: bool) -> GPT:
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
                matrix = matrix.to(dtype)
            target.copy_(matrix if "wte" in name else matrix.t())
    return exact


@pytest.mark.parametrize(
    ("rows", "int8", "dtype", "shape"),
    [
        (1, False, BF16, {}),
        (1, True, BF16, {}),
        (1, False, FP32, {}),
        (1, True, FP32, {}),
        (1, False, BF16, WIDE),
        (1, True, BF16, WIDE),
        (1, False, FP32, WIDE),
        (1, True, FP32, WIDE),
        (1, False, BF16, TWO_HEADS_OF_18),
        (1, False, FP32, TWO_HEADS_OF_18),
        (1, True, BF16, {"n_embd": 32, "n_head": 1}),
        (2, False, BF16, {}),
        (3, False, FP32, {}),
        (16, False, FP32, {"n_embd": 160, "n_head": 5}),
        (16, False, BF16, {"n_embd": 160, "n_head": 5}),
    ],
)
def test_logits_are_those_of_the_stored_weights_in_fp64(
    rows: int, int8: bool, dtype: torch.dtype, shape: dict[str, Any]
) -> None:
    if rows > 1 and dtype == BF16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("needs a CPU with products in bf16")
    model = model_of(dtype, **shape)
    decoder = decoder_for(model, rows, int8)
    assert isinstance(decoder, CpuDecoder if rows == 1 else CpuBatchDecoder)
    exact = reference(model, dtype, int8)
    head = exact.transformer.wte.weight.detach().clone()[:1000]
    with torch.no_grad():
        exact.transformer.wte.weight.copy_(
            model.transformer.wte.weight
        )  # ids are looked up in fp32
    prompts = prompts_of([2 + 5 * row % 11 for row in range(rows)])
    cache, _ = _prefill(model, prompts, 64)
    exact_cache = Cache.empty(exact, rows, 64)
    # Keys and values may be kept in bf16, oneDNN rounds to it, and int8 multiplies bytes.
    tolerance = 0.05 if rows > 1 or int8 else 0.02
    if dtype == FP32 and not int8:
        tolerance = 1e-5
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


@pytest.fixture(
    params=[(), ("-mno-avx512vnni",), ("-mno-avx2", "-mno-fma")],
    ids=["this CPU", "no VNNI", "no AVX2"],
)
def without_instructions(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Compile decode.cpp as for older CPUs, which multiply bytes in another way."""
    if platform.machine() != "x86_64":
        pytest.skip("the instructions are those of x86")
    monkeypatch.setattr(cpu_decoder, "FLAGS", (*cpu_decoder.FLAGS, *request.param))
    monkeypatch.setattr(cpu_decoder, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(decoders, "load_library", load_library.__wrapped__)


@pytest.mark.usefixtures("without_instructions")
def test_products_of_bytes_are_exact_and_keep_nan() -> None:
    """AVX2 adds two products of bytes in 16 bits: 2 x 127 x 127 of at most 32,767."""
    model = model_of(FP32)
    C, vocab_size = model.config.n_embd, model.config.vocab_size
    generator = torch.Generator().manual_seed(1)
    order = torch.rand(vocab_size, C, generator=generator).argsort()
    signs = torch.where(order % 2 == 0, 1.0, -1.0)  # (1000, C); the mean of a row is 0
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.fill_(1.0 if name.endswith("ln_f.weight") else 0.0)
        model.transformer.wte.weight[:vocab_size] = signs
    cache, _ = _prefill(model, [[3]], 8)
    decoder = decoder_for(model, 1, int8=True)
    assert isinstance(decoder, CpuDecoder)
    logits = decoder.step([7], cache)
    torch.testing.assert_close(logits[0], signs @ signs[7], rtol=0, atol=0.01)

    with torch.no_grad():
        model.transformer.wte.weight[9, 0] = torch.nan
    decoder = decoder_for(model, 1, int8=True)
    assert decoder is not None
    assert decoder.step([7], cache).isnan().nonzero().tolist() == [[0, 9]]
    assert decoder.step([9], cache).isnan().all()


@pytest.mark.parametrize("int8", [False, True])
def test_decoder_follows_a_change_of_the_dtype(int8: bool) -> None:
    model = model_of(FP32)
    for dtype in (FP32, BF16, FP32):
        model.compute_dtype = dtype
        fresh = model_of(FP32)
        fresh.compute_dtype = dtype
        settings: dict[str, Any] = {"n_tokens": 20, "temperature": 0.0, "int8": int8}
        assert generate(model, [[1, 2, 3]], **settings) == generate(fresh, [[1, 2, 3]], **settings)


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


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_decoder_generates_what_torch_generates_and_crops_where_it_crops(
    dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    model = model_of(dtype)
    prompts = [[1, 2, 3], [4]]
    fast = generate(model, prompts, 90, temperature=0.0)
    assert "cropped" in caplog.text
    assert [len(row) for row in fast] == [90, 90]
    for row, prompt in zip(fast, prompts, strict=True):
        slow = greedy_without_cache(model, prompt, 20)
        equal = sum(a == b for a, b in zip(row, slow, strict=False))
        assert equal >= 15, "they may differ where two tokens are almost equally likely"


@pytest.mark.parametrize("threads", [1, 3, 7])
def test_threads_share_the_columns_of_a_matrix(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2,304 outputs are more than one thread takes at a time; 32 are fewer than seven threads."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for shape in (WIDE, {"n_embd": 32, "n_head": 1}):
        model = model_of(FP32, **shape)
        cache, _ = _prefill(model, [[1, 2, 3]], 64)
        decoder = decoder_for(model, 1)
        assert isinstance(decoder, CpuDecoder)
        found = decoder.step([4], cache)
        with torch.no_grad():
            expected = model(torch.tensor([[1, 2, 3, 4]]))[:, -1]
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_two_threads_write_with_one_model() -> None:
    model = model_of(FP32)
    tasks = [([[1, 2, 3]], 60), ([[4]], 20)] * 4

    def write(task: tuple[list[list[int]], int]) -> list[list[int]]:
        prompts, n = task
        return generate(model, prompts, n, temperature=0.0)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(write, tasks)) == [write(task) for task in tasks]


def test_hooks_and_other_modules_are_not_left_out() -> None:
    model = model_of(FP32)
    assert decoder_for(model, 1) is not None
    block = model.transformer.h[0]
    assert isinstance(block, Block)
    handle = block.mlp.register_forward_hook(lambda *_: None)
    assert decoder_for(model, 1) is None
    handle.remove()
    assert decoder_for(model, 1) is not None

    class Other(Linear):
        """A layer that computes something else."""

    block.mlp.c_fc = Other(96, 384)
    assert decoder_for(model, 1) is None


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
    in_fp32 = model_of(FP32)
    assert isinstance(decoder_for(in_fp32, 1), CpuDecoder)
    assert isinstance(decoder_for(in_fp32, 1, int8=True), CpuDecoder)
    assert isinstance(decoder_for(in_fp32, 2), CpuBatchDecoder)
    monkeypatch.setattr(decoders, "available_memory", lambda: 1_000_000)
    assert decoder_for(model_of(FP32), 2) is None, "a copy does not fit"
    assert decoder_for(model_of().train(), 1) is None, "a model in training has no second copy"
    assert isinstance(decoder_for(model_of(**TWO_HEADS_OF_18), 1, int8=True), CpuDecoder)
    assert "int8 weights are for one text" in caplog.text
    in_fp16 = model_of(torch.float16)
    caplog.clear()
    assert isinstance(decoder_for(in_fp16, 1, int8=True), TorchDecoder)
    assert "int8 weights are for one text" in caplog.text
    monkeypatch.setattr(decoders, "load_library", lambda: None)
    assert isinstance(decoder_for(model_of(), 1), TorchDecoder), "without a compiler"
    assert decoder_for(model_of(FP32), 1) is None, "without a compiler"
