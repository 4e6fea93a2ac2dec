"""The compiled decoder against torch: the same numbers, whatever the shape, the lengths of the rows, and what was read before."""

from pathlib import Path
from typing import Any

import pytest
import torch

from anew import GPT, GPTConfig, generate
from anew.inference.cpu_decoder import GROUP, CpuBatchDecoder, Kernel, load_library, quantize
from anew.inference.decoders import Graphed, Packed, pack
from anew.inference.generate import _prefill
from anew.model.kv_cache import Cache

pytestmark = pytest.mark.skipif(
    load_library() is None, reason="the kernel needs Linux and a C++ compiler"
)


def model_of(**shape: Any) -> GPT:
    config = GPTConfig(
        **{"n_layer": 3, "n_head": 4, "n_embd": 96, "n_positions": 64, "vocab_size": 1000, **shape}
    )
    model = GPT(config, torch.bfloat16, seed=3).eval()
    generator = torch.Generator().manual_seed(5)
    with (
        torch.no_grad()
    ):  # biases and norms away from where they start, weights large enough to matter
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * (0.3 if p.ndim == 1 else 0.08))
        model.transformer.wte.weight[config.vocab_size :] = 0
    return model


def reference(model: GPT, int8: bool) -> GPT:
    """An fp32 model, computed by torch in fp64, with the weights that the decoder stores."""
    exact = GPT(model.config, torch.float64, seed=None).double().eval()
    with torch.no_grad():
        for (name, p), target in zip(model.named_parameters(), exact.parameters(), strict=True):
            if p.ndim == 1 or "wpe" in name:
                target.copy_(p)
                continue
            matrix = p if "wte" in name else p.t()
            if int8:
                values, scales = quantize(matrix.float())
                matrix = (values.view(len(values), -1, GROUP) * scales[..., None]).reshape(
                    matrix.shape
                )
            else:
                matrix = matrix.bfloat16()
            target.copy_(matrix if "wte" in name else matrix.t())
    return exact


WIDE = {"n_embd": 768, "n_head": 12, "n_layer": 2}


@pytest.mark.parametrize(("rows", "int8", "shape"), [
    (1, False, {}), (1, True, {}), (1, False, WIDE), (1, True, WIDE), (1, False, {"n_embd": 36, "n_head": 2}),
    (1, True, {"n_embd": 32, "n_head": 1}), (2, False, {}), (16, False, {"n_embd": 160, "n_head": 5}),
])  # fmt: skip
def test_logits_are_those_of_the_stored_weights_in_fp64(
    rows: int, int8: bool, shape: dict[str, Any]
) -> None:
    model = model_of(**shape)
    decoder = pack(model, rows, int8)
    assert isinstance(decoder, Kernel if rows == 1 else CpuBatchDecoder)
    exact = reference(model, int8)
    lookup = exact.transformer.wte.weight.detach().clone()
    with torch.no_grad():
        exact.transformer.wte.weight.copy_(
            model.transformer.wte.weight
        )  # ids are looked up in fp32
    prompts = [[(7 * b + 3 * i) % 1000 for i in range(2 + 5 * b % 11)] for b in range(rows)]
    cache, _ = _prefill(model, prompts, 64)
    truth = Cache.empty(exact, rows, 64)
    with torch.no_grad():
        truth.keys.copy_(cache.keys)
        truth.values.copy_(cache.values)
        truth.truncate([len(p) for p in prompts])
        for step in range(5):
            ids = [(11 * b + 17 * step) % 1000 for b in range(rows)]
            logits = decoder.step(ids, cache)
            hidden = exact.hidden(torch.tensor(ids)[:, None], truth)[:, -1]
            expected = hidden @ lookup[:1000].t()
            worst = (
                0.05 if rows > 1 or int8 else 0.02
            )  # keys and values are kept in bf16, oneDNN rounds to it, and int8 multiplies bytes
            assert (logits - expected).abs().max() < worst * expected.abs().max()
            assert cache.lengths.tolist() == truth.lengths.tolist()


@pytest.mark.parametrize("lengths", [[5, 5, 5], [2, 9, 17]])
def test_a_step_of_fixed_shapes_is_the_same_step(lengths: list[int]) -> None:
    """What is recorded on a GPU: attention over more slots than are full, each row seeing its own. Slots behind hold rubbish."""
    model = model_of()
    prompts = [[(7 * b + 3 * i) % 1000 for i in range(n)] for b, n in enumerate(lengths)]
    usual, (cache, _) = Packed(model), _prefill(model, prompts, 64)
    other = Cache(cache.keys.clone(), cache.values.clone(), cache.lengths, cache.used, cache.ragged)
    for row, n in enumerate(lengths):
        other.keys[:, row, :, n:] = other.values[:, row, :, n:] = 1e4
    graphed = Graphed(model)
    for step in range(3):
        ids = [11, 400 + step, 7]
        fixed = graphed.fixed_shape_step(torch.tensor(ids)[:, None], cache.lengths, 32, other)
        torch.testing.assert_close(
            fixed, usual.step(ids, cache), rtol=0.02, atol=0.02 * fixed.abs().max().item()
        )


def test_it_writes_what_torch_writes_and_stops_where_torch_stops(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Up to the last position and past it, where the text is cropped and read again."""
    model = model_of()
    fast = generate(model, [[1, 2, 3], [4]], 90, temperature=0.0)
    assert "cropped" in caplog.text
    slow = [
        [i for step in [*_by_hand(model, prompt, 20)] for i in step] for prompt in ([1, 2, 3], [4])
    ]
    same = [
        sum(a == b for a, b in zip(f, s, strict=False)) for f, s in zip(fast, slow, strict=True)
    ]
    assert min(same) >= 15, "but for near ties they agree"
    assert [len(row) for row in fast] == [90, 90]


def _by_hand(model: GPT, prompt: list[int], n: int) -> list[list[int]]:
    ids, found = list(prompt), []
    for _ in range(n):
        with torch.inference_mode():
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        found.append([ids[-1]])
    return found


def test_a_model_that_was_trained_on_is_packed_anew() -> None:
    model = model_of()
    first = pack(model, 1)
    assert pack(model, 1) is first
    assert pack(model, 1, int8=True) is not first
    second = pack(model, 1)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.mul_(2.0)
    third = pack(model, 1)
    assert third is not second


def test_what_is_packed_where(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pack(GPT(GPTConfig(n_layer=1, n_head=1, n_embd=32)), 1) is None, "fp32 stays as it is"
    assert pack(model_of().train(), 1) is None, "no second copy of a model in training"
    assert isinstance(pack(model_of(n_embd=36, n_head=2), 1, int8=True), Kernel)
    assert "int8 weights are for one text" in caplog.text
    monkeypatch.setattr("anew.inference.decoders.load_library", lambda: None)
    assert isinstance(pack(model_of(), 1), Packed), "without a compiler"


def test_int8_changes_the_loss_by_little(tmp_path: Path) -> None:
    """On a model that has learnt something: what 8 bits cost in nats a token."""
    from anew.training.trainer import train
    from tests.faults.common import tiny

    config = tiny(tmp_path / "run", n_embd=64, steps=200, warmup_steps=10)
    train(config)
    model = GPT.from_pretrained(str(config.folder))
    model.compute_dtype = torch.bfloat16
    text = Path(config.data.data).read_bytes()[:1600]
    losses = {}
    for int8 in (False, True):
        decoder = pack(model, 1, int8)
        assert isinstance(decoder, Kernel)
        total = 0.0
        for start in range(0, 1600, 16):
            cache = Cache.empty(model, 1, 16)
            for a, b in zip(text[start : start + 15], text[start + 1 : start + 16], strict=True):
                total -= decoder.step([a], cache)[0].log_softmax(0)[b].item()
        losses[int8] = total / 1500
    assert losses[False] < 2.0
    assert losses[True] == pytest.approx(losses[False], abs=0.01)
