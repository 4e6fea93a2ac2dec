"""What only an NVIDIA GPU can show: precisions, compiled and recorded code, NCCL, waits for the device, memory against the plan.

python -m pytest tests/test_cuda.py                              # skipped where there is no GPU
ANEW_TEST_DEVICE=cpu python -m pytest tests/test_cuda.py         # a rehearsal: those that are not CUDA's alone, on a CPU
"""

import dataclasses
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import anew
from anew import GPT, GPTConfig, bench, plan, runtime
from anew.attention import attend
from anew.devices import GPUS
from anew.fast_decode import Graphed, Packed, pack
from anew.generate import _prefill
from anew.preempt import Stop
from anew.state import State
from anew.train import train, train_step
from tests.conftest import ROOT
from tests.faults.common import losses, tiny

DEVICE = os.environ.get("ANEW_TEST_DEVICE", "cuda")
pytestmark = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no NVIDIA GPU here")
only_cuda = pytest.mark.skipif(DEVICE != "cuda", reason="a rehearsal on another device")
SMALL = GPTConfig(n_layer=2, n_head=4, n_embd=256, n_positions=256)


def ids_for(rows: int, columns: int, vocab_size: int = 50257) -> torch.Tensor:
    return torch.randint(vocab_size, (rows, columns), generator=torch.Generator().manual_seed(3)).to(DEVICE)


def train_losses(run: Path) -> list[float]:
    return [row[1] for row in losses(run)]


def gradients(model: GPT, compiled: bool = False) -> tuple[float, torch.Tensor]:
    ids = ids_for(4, 256)
    loss = (torch.compile(model, dynamic=False) if compiled else model)(ids, ids.roll(-1, 1))
    loss.backward()
    return loss.item(), torch.cat([p.grad.double().flatten() for p in model.parameters()])


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("dtype", "off"), [(torch.float32, 1e-4), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("attention", ["flash", "cudnn"])
def test_loss_and_gradients_are_those_of_fp64(compiled: bool, dtype: torch.dtype, off: float, attention: Any) -> None:
    exact_loss, exact = gradients(GPT(SMALL, torch.float64, seed=1).double().to(DEVICE))
    config = dataclasses.replace(SMALL, attention=attention)
    loss, found = gradients(GPT(config, dtype, seed=1).to(DEVICE), compiled)
    torch._dynamo.reset()
    assert loss == pytest.approx(exact_loss, rel=off / 10)
    assert ((found - exact).norm() / exact.norm()).item() < off


@only_cuda
def test_attention_by_cudnn_is_the_formula() -> None:
    q, k, v = (torch.randn(2, 4, 384, 64, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
    exact = attend(q.double(), k.double(), v.double(), None, 0.0, True, "plain")
    for kind in ("flash", "cudnn"):
        out = attend(q, k, v, None, 0.0, True, kind)
        assert ((out.double() - exact).norm() / exact.norm()).item() < 0.01


@pytest.mark.parametrize("precision", ["fp32", pytest.param("tf32", marks=only_cuda), "bf16", "fp16"])
def test_a_run_learns_in_every_precision(precision: str, tmp_path: Path) -> None:
    config = tiny(tmp_path / "run", device=DEVICE, precision=precision, steps=60)
    result = train(config)
    assert result.train_loss < 0.7 * train_losses(config.folder)[0]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_stopped_run_goes_on_bit_for_bit(optimizer: str, tmp_path: Path) -> None:
    settings = {"device": DEVICE, "precision": "bf16", "deterministic": True, "steps": 20, "optimizer": optimizer}
    whole, parts = tiny(tmp_path / "whole", **settings), tiny(tmp_path / "parts", **settings)
    train(whole)

    def stop(row: Any) -> None:
        if row["step"] == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(parts, stop)
    train(parts)
    assert losses(parts.folder) == losses(whole.folder)


@only_cuda
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_waits_for_the_device_once(optimizer: str, tmp_path: Path) -> None:
    config = tiny(tmp_path / "run", device=DEVICE, precision="bf16", batch_tokens=1024, optimizer=optimizer)
    state = State(config, runtime.start(config.run), "")
    batch = bench.text_batch(config, state.rt.device)
    stop = Stop()
    for _ in range(2):
        train_step(state.model, state, batch, 1.0, stop)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train_step(state.model, state, batch, 1.0, stop)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in caught if "synchroniz" in str(w.message)]) == 1, [str(w.message)[:200] for w in caught]


@only_cuda
def test_recorded_decoding_is_the_same_decoding() -> None:
    """Rows of several lengths, past the edge of a recording, and a second text after the first."""
    model = GPT(SMALL, torch.bfloat16, seed=2).to(DEVICE).eval()
    graphed = pack(model, 3)
    assert isinstance(graphed, Graphed)
    packed = Packed(model)
    for start in (3, 120):
        prompts = [list(range(7, 7 + start + n)) for n in (0, 4, 9)]
        (one, _), (other, _) = _prefill(model, prompts, 256), _prefill(model, prompts, 256)
        for step in range(12):
            ids = [5 + step, 900, 31]
            a, b = graphed.step(ids, one), packed.step(ids, other)
            torch.testing.assert_close(a, b, rtol=0.02, atol=0.02 * b.abs().max().item())
        assert one.lengths.tolist() == other.lengths.tolist()


@only_cuda
def test_memory_is_what_the_plan_says() -> None:
    gpu = next(iter(GPUS))
    for recompute in (False, True):
        config = bench.at(anew.recipe("gpt2-124m", device=DEVICE, precision="bf16", recompute=recompute), 8, 1024)
        found = bench.apart(config, 3)
        assert not isinstance(found, str), found
        assert found.memory_bytes == pytest.approx(plan.make(config, gpu).memory.total, rel=0.25)


@only_cuda
def test_one_rank_over_nccl(tmp_path: Path) -> None:
    alone = tiny(tmp_path / "alone", device=DEVICE)
    train(alone)
    script = tmp_path / "run.py"
    script.write_text(
        "from pathlib import Path\nfrom anew import train\nfrom tests.faults.common import tiny\n"
        f"train(tiny(Path({str(tmp_path)!r}) / 'ranked', device={DEVICE!r}))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", str(script)]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'src'}"})
    assert train_losses(tmp_path / "ranked") == pytest.approx(train_losses(alone.folder), rel=1e-5)
