"""What only an NVIDIA GPU can show: precisions, compiled and recorded code, NCCL, waits for the device, memory against the plan.

Each test's docstring says what it proves, and how it would fail.

python -m pytest tests/gpu/test_cuda.py                              # skipped where there is no GPU
ANEW_TEST_DEVICE=cpu python -m pytest tests/gpu/test_cuda.py         # a rehearsal: those that are not CUDA's alone, on a CPU
"""

import dataclasses
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from torch.nn.attention import SDPBackend, sdpa_kernel

import anew
from anew import GPT, GPTConfig, plan
from anew.bench import timing as bench
from anew.distributed import fsdp as sharded
from anew.distributed.gradient_buckets import GradientBuckets, gradient_groups
from anew.distributed.preflight import gpu_identity
from anew.distributed.world import World, full_tensor
from anew.inference.decoders import Graphed, Packed, pack
from anew.inference.generate import _prefill
from anew.model.attention import attend
from anew.training.step import train_step
from anew.training.train_state import TrainState
from anew.training.trainer import train
from anew.utils import device as runtime
from anew.utils.gpus import GPUS
from anew.utils.signals import StopFlag
from tests.faults.common import losses, tiny
from tests.support import ROOT
from tests.support.ranks import free_port

DEVICE = os.environ.get("ANEW_TEST_DEVICE", "cuda")
pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(), reason="no NVIDIA GPU here"
)
only_cuda = pytest.mark.skipif(DEVICE != "cuda", reason="a rehearsal on another device")
SMALL = GPTConfig(n_layer=2, n_head=4, n_embd=256, n_positions=256)


def ids_for(rows: int, columns: int, vocab_size: int = 50257) -> torch.Tensor:
    return torch.randint(
        vocab_size, (rows, columns), generator=torch.Generator().manual_seed(3)
    ).to(DEVICE)


def train_losses(run: Path) -> list[float]:
    return [row[1] for row in losses(run)]


def gradients(model: GPT, compiled: bool = False) -> tuple[float, torch.Tensor]:
    ids = ids_for(4, 256)
    loss = (torch.compile(model, dynamic=False) if compiled else model)(ids, ids.roll(-1, 1))
    loss.backward()
    return loss.item(), torch.cat([p.grad.double().flatten() for p in model.parameters()])


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("dtype", "off"), [(torch.float32, 1e-4), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("attention", ["auto", "flash", "cudnn"])
def test_loss_and_gradients_are_those_of_fp64(
    compiled: bool, dtype: torch.dtype, off: float, attention: Any
) -> None:
    """The full_tensor model, its loss kernel and each attention kernel, forward and backward, against the same model in fp64."""
    exact_loss, exact = gradients(GPT(SMALL, torch.float64, seed=1).double().to(DEVICE))
    config = dataclasses.replace(SMALL, attention=attention)
    loss, found = gradients(GPT(config, dtype, seed=1).to(DEVICE), compiled)
    torch._dynamo.reset()
    assert loss == pytest.approx(exact_loss, rel=off / 10)
    assert ((found - exact).norm() / exact.norm()).item() < off


@only_cuda
@pytest.mark.parametrize("backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION])
def test_each_attention_kernel_runs_and_is_the_formula(backend: SDPBackend) -> None:
    """With this kernel alone allowed: where it cannot run, torch raises instead of taking another. On the model's strided tensors."""
    qkv = torch.randn(2, 384, 3, 4, 64, device=DEVICE, dtype=torch.bfloat16)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, T, head_dim)
    exact = attend(q.double(), k.double(), v.double(), causal=True, kernel="plain")
    with sdpa_kernel([backend]):
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert ((out.double() - exact).norm() / exact.norm()).item() < 0.01


@only_cuda
@pytest.mark.parametrize(("kind", "training", "kernel"), [
    ("flash", True, "flash"), ("cudnn", True, "cudnn"), ("flash", False, "flash"), ("cudnn", False, "flash"), ("auto", False, "flash"),
])  # fmt: skip
def test_the_attention_kernel_is_the_one_that_was_asked_for(
    kind: str, training: bool, kernel: str
) -> None:
    """By the names of the operations that ran. Since torch 2.11 the H200's default is cuDNN, whatever `flash` meant before."""
    q, k, v = (
        torch.randn(2, 4, 384, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=training)
        for _ in range(3)
    )
    with torch.set_grad_enabled(training), torch.profiler.profile() as profile:
        attend(q, k, v, causal=True, kernel=kind)
    ran = {event.key for event in profile.key_averages()}
    assert any(f"scaled_dot_product_{kernel}_attention" in name for name in ran), ran
    assert not any(
        f"scaled_dot_product_{other}_attention" in name
        for name in ran
        for other in {"flash", "cudnn"} - {kernel}
    ), ran


@pytest.mark.parametrize(
    "precision", ["fp32", pytest.param("tf32", marks=only_cuda), "bf16", "fp16"]
)
def test_a_run_learns_in_every_precision(precision: str, tmp_path: Path) -> None:
    """The loss falls by a third in sixty steps of a full_tensor run, with loss scaling in fp16."""
    config = tiny(tmp_path / "run", device=DEVICE, precision=precision, steps=60)
    result = train(config)
    assert result.train_loss < 0.7 * train_losses(config.folder)[0]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_stopped_run_goes_on_bit_for_bit(optimizer: str, tmp_path: Path) -> None:
    """Deterministic kernels, in a process that has used cuBLAS before: its workspace setting is read once, at the first call."""
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    settings = {
        "device": DEVICE,
        "precision": "bf16",
        "deterministic": True,
        "steps": 20,
        "optimizer": optimizer,
    }
    full_tensor, parts = tiny(tmp_path / "whole", **settings), tiny(tmp_path / "parts", **settings)
    train(full_tensor)

    def stop(row: Any) -> None:
        if row["step"] == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(parts, stop)
    train(parts)
    assert losses(parts.folder) == losses(full_tensor.folder)


@only_cuda
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_waits_for_the_device_once(optimizer: str, tmp_path: Path) -> None:
    """torch warns at each point where the host waits; a second one in a step would leave the GPU idle."""
    config = tiny(
        tmp_path / "run", device=DEVICE, precision="bf16", batch_tokens=1024, optimizer=optimizer
    )
    state = TrainState(config, runtime.start(config.run), "")
    batch = bench.text_batch(config, state.runtime.device)
    stop = StopFlag()
    for _ in range(2):
        train_step(state.model, state, batch, 1.0, stop)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train_step(state.model, state, batch, 1.0, stop)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in caught if "synchroniz" in str(w.message)]) == 1, [
        str(w.message)[:200] for w in caught
    ]


@only_cuda
def test_recorded_decoding_is_the_same_decoding() -> None:
    """CUDA graphs against the same steps without: rows of several lengths, past the edge of a recording, and a second text."""
    model = GPT(SMALL, torch.bfloat16, seed=2).to(DEVICE).eval()
    graphed = pack(model, 3)
    assert isinstance(graphed, Graphed)
    packed = Packed(model)
    for start in (3, 120):
        prompts = [list(range(7, 7 + start + n)) for n in (0, 4, 9)]
        (one, _), (other, _) = _prefill(model, prompts, 256), _prefill(model, prompts, 256)
        for step in range(12):
            ids = [5 + step, 900, 31]
            with torch.inference_mode():  # as generate does
                a, b = graphed.step(ids, one), packed.step(ids, other)
            torch.testing.assert_close(a, b, rtol=0.02, atol=0.02 * b.abs().max().item())
        assert one.lengths.tolist() == other.lengths.tolist()


@only_cuda
@torch.inference_mode()
def test_texts_of_different_numbers_of_rows_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows and one by turns: each goes on with its own keys and values, and no recording is made twice."""
    model = GPT(SMALL, torch.bfloat16, seed=2).to(DEVICE).eval()
    graphed, packed = Graphed(model), Packed(model)
    texts = [[[9] * 4, [10] * 9, [11] * 2], [[5, 6, 7]]]
    recorded, record = [], graphed._record
    monkeypatch.setattr(
        graphed,
        "_record",
        lambda *arguments: (recorded.append(arguments[:3]), record(*arguments))[1],
    )
    mine, theirs = ([_prefill(model, prompts, 256)[0] for prompts in texts] for _ in range(2))
    for step in range(6):
        for text, prompts in enumerate(texts):
            ids = [20 + step] * len(prompts)
            a, b = graphed.step(ids, mine[text]), packed.step(ids, theirs[text])
            torch.testing.assert_close(a, b, rtol=0.02, atol=0.02 * b.abs().max().item())
    assert recorded == [(128, 3, 0), (128, 1, 0)]


@only_cuda
@torch.inference_mode()
def test_the_likeliest_tokens_are_found_inside_the_recording() -> None:
    """Greedy and top-k choices are those of the logits, and as many recordings are kept as rules were used."""
    model = GPT(SMALL, torch.bfloat16, seed=2).to(DEVICE).eval()
    graphed = Graphed(model)
    cache, _ = _prefill(model, [[5, 6, 7], [8, 9]], 256)
    for top_k in (1, 50, 40, 1):
        logits, top = graphed.step_and_top([11, 12], cache, top_k)
        assert top is not None
        values, ids = top.logits, top.ids
        assert ids.shape == (2, top_k)
        torch.testing.assert_close(values, logits.topk(top_k).values)
        torch.testing.assert_close(logits.gather(1, ids), values)
    assert len(graphed.recordings) == 2
    assert graphed.step_and_top([11, 12], cache, 1000)[1] is None


@only_cuda
def test_memory_is_what_the_plan_says() -> None:
    """Most bytes of torch's allocator in three steps of 124M at 8 x 1024; CUDA's context is not the allocator's."""
    gpu = next(iter(GPUS))
    for recompute in (False, True):
        config = bench.at(
            anew.recipe("gpt2-124m", device=DEVICE, precision="bf16", recompute=recompute), 8, 1024
        )
        found = bench.apart(config, 3)
        assert not isinstance(found, str), found
        planned = plan.make(config, gpu).memory.total - plan.LIBRARY_BYTES
        assert found.memory_bytes == pytest.approx(planned, rel=0.25), f"recompute {recompute}"


@pytest.fixture
def group() -> Iterator[World]:
    """A process group of one rank: over NCCL on a GPU, over gloo in a rehearsal. FSDP skips its collectives for one."""
    backend = distributed.get_default_backend_for_device(DEVICE)
    store = distributed.TCPStore("127.0.0.1", free_port(), is_master=True)
    distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    yield World()
    distributed.destroy_process_group()


def plain_gradients(model: GPT, ids: torch.Tensor) -> list[torch.Tensor]:
    model(ids, ids.roll(-1, 1)).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_gradient_buckets_over_nccl(group: World) -> None:
    """NCCL takes the buckets from hooks of the backward pass, while it runs; what comes back for one rank are its own gradients."""
    ids = ids_for(2, 64)
    expected = plain_gradients(GPT(SMALL, seed=2).to(DEVICE), ids)
    model = GPT(SMALL, seed=2).to(DEVICE)
    buckets = GradientBuckets(gradient_groups(model), group)
    for _ in range(2):
        buckets.start_step()
        buckets.start_when_ready()
        model(ids, ids.roll(-1, 1)).backward()
        assert len(buckets.works) == SMALL.n_layer + 1, (
            "all are under way when the backward pass ends"
        )
        buckets.all_reduce()
    for p, gradient in zip(model.parameters(), expected, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_rank_that_is_asked_to_stop_before_its_first_micro_batch_ends_the_step(
    precision: str, group: World, tmp_path: Path
) -> None:
    """The real step, for a world that it takes for two ranks: the gradient norm must be where the loss is, and no scale is missing."""
    config = tiny(tmp_path / "run", device=DEVICE, precision=precision)
    state = TrainState(config, runtime.start(config.run), "", World(0, 2))
    before = [p.detach().clone() for p in state.parameters]
    stop = StopFlag()
    stop.set()
    outcome = train_step(
        state.model, state, bench.text_batch(config, state.runtime.device), 1.0, stop
    )
    assert outcome.stop
    assert not outcome.applied
    assert all(torch.equal(p, q) for p, q in zip(state.parameters, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fsdp_on_one_rank_is_the_same_model(dtype: torch.dtype, group: World) -> None:
    """FSDP's hooks, casts and accumulation on this device; the full_tensor model that evaluation uses is exact."""
    ids = ids_for(2, 64)
    plain = GPT(SMALL, dtype, seed=2).to(DEVICE)
    expected = plain_gradients(plain, ids)
    model = GPT(SMALL, dtype, seed=2).to(DEVICE)
    sharded.shard(model, dtype)
    for last in (False, True):
        sharded.reduce_gradients(model, last)
        (model(ids, ids.roll(-1, 1)) / 2).backward()
    for p, gradient in zip(model.parameters(), expected, strict=True):
        assert p.grad is not None
        found = full_tensor(p.grad)
        assert ((found - gradient).norm() / gradient.norm()).item() < (
            0.05 if dtype == torch.bfloat16 else 1e-4
        )
    with sharded.whole_model(model) as copy:
        for p, q in zip(plain.parameters(), copy.parameters(), strict=True):
            assert torch.equal(p, q)


@only_cuda
def test_each_gpu_has_an_identity() -> None:
    """By which ranks on one GPU are refused, whatever their machines are called."""
    identities = [gpu_identity(torch.device("cuda", i)) for i in range(torch.cuda.device_count())]
    assert len(set(identities)) == len(identities)
    assert all(len(identity) > 8 for identity in identities)


def test_a_launch_by_torchrun_with_one_rank_is_a_run_alone(tmp_path: Path) -> None:
    """One rank makes no process group; the command that users start must work all the same."""
    alone = tiny(tmp_path / "alone", device=DEVICE)
    train(alone)
    script = tmp_path / "run.py"
    script.write_text(
        "from pathlib import Path\nfrom anew import train\nfrom tests.faults.common import tiny\n"
        f"train(tiny(Path({str(tmp_path)!r}) / 'ranked', device={DEVICE!r}))\n"
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "1",
        str(script),
    ]
    subprocess.run(
        command, check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'src'}"}
    )
    assert train_losses(tmp_path / "ranked") == pytest.approx(train_losses(alone.folder), rel=1e-5)
