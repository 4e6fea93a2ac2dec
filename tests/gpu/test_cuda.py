"""Tests that need an NVIDIA GPU: precisions, compiled code, CUDA graphs, NCCL, waits and memory.

python -m pytest tests/gpu/test_cuda.py                         # skipped without a GPU
ANEW_TEST_DEVICE=cpu python -m pytest tests/gpu/test_cuda.py    # a rehearsal on a CPU

The rehearsal runs the tests that are not about CUDA itself. Docstrings say what a test compares,
and what would make it fail.
"""

import dataclasses
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from torch.distributed.rendezvous import TCPStore  # type: ignore[attr-defined]  # torch imports it there
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close

import anew
from anew import GPT, GPTConfig, plan
from anew.bench import timing
from anew.distributed import fsdp
from anew.distributed.gradient_buckets import GradientBuckets, gradient_groups
from anew.distributed.preflight import gpu_identity
from anew.distributed.world import World, full_tensor
from anew.inference.decoders import CudaGraphDecoder, TorchDecoder, decoder_for
from anew.inference.generate import _prefill
from anew.model.attention import attend
from anew.training.step import train_step
from anew.training.train_state import TrainState
from anew.training.trainer import train
from anew.utils.device import set_up_device
from anew.utils.gpus import GPUS
from anew.utils.signals import StopFlag
from tests.faults.common import losses, tiny
from tests.support import ROOT
from tests.support.ranks import free_port

DEVICE = os.environ.get("ANEW_TEST_DEVICE", "cuda")
pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs an NVIDIA GPU"
)
only_cuda = pytest.mark.skipif(DEVICE != "cuda", reason="not part of the rehearsal")
SMALL = GPTConfig(n_layer=2, n_head=4, n_embd=256, n_positions=256)


def small_model(dtype: torch.dtype = torch.float32) -> GPT:
    """Return the same small model for each call, on the tested device."""
    return GPT(SMALL, dtype, seed=2).to(DEVICE)


def random_ids(rows: int, columns: int) -> Tensor:
    """Return the same token ids for each call."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(SMALL.vocab_size, (rows, columns), generator=generator)
    return ids.to(DEVICE)


def targets_of(ids: Tensor) -> Tensor:
    """Return the next id of each position; the first id follows the last one."""
    return ids.roll(-1, 1)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference relative to the norm of `expected`, computed in fp64."""
    exact = expected.double()
    difference = found.double() - exact
    return float(difference.norm() / exact.norm())


def gradients_of(model: GPT) -> list[Tensor]:
    """Return the gradient of each parameter."""
    gradients = []
    for parameter in model.parameters():
        assert parameter.grad is not None
        gradients.append(parameter.grad)
    return gradients


def assert_equal(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Check that the tensors are equal in every bit."""
    for tensor, expected_tensor in zip(found, expected, strict=True):
        assert torch.equal(tensor, expected_tensor)


def train_losses(run: Path) -> list[float]:
    """Return the training losses of a run."""
    return [loss for _, loss, _, _ in losses(run)]


# --- model and kernels ----------------------------------------------------------------------------


def loss_and_gradients(model: GPT, compiled: bool = False) -> tuple[float, Tensor]:
    """Return the loss on fixed ids, and all gradients as one vector in fp64."""
    ids = random_ids(4, 256)
    forward = torch.compile(model, dynamic=False) if compiled else model
    loss = forward(ids, targets_of(ids))
    loss.backward()
    gradients = [gradient.double().flatten() for gradient in gradients_of(model)]
    return loss.item(), torch.cat(gradients)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float32, 1e-4),
        (torch.bfloat16, 0.03),
    ],
)
@pytest.mark.parametrize("attention", ["auto", "flash", "cudnn"])
def test_loss_and_gradients_match_fp64(
    compiled: bool, dtype: torch.dtype, tolerance: float, attention: Any
) -> None:
    """The whole model with its loss kernel and each attention kernel, against itself in fp64."""
    exact_model = GPT(SMALL, torch.float64, seed=1).double().to(DEVICE)
    exact_loss, exact_gradients = loss_and_gradients(exact_model)
    config = dataclasses.replace(SMALL, attention=attention)
    model = GPT(config, dtype, seed=1).to(DEVICE)
    loss, gradients = loss_and_gradients(model, compiled)
    torch._dynamo.reset()
    assert loss == pytest.approx(exact_loss, rel=tolerance / 10)
    assert relative_error(gradients, exact_gradients) < tolerance


@only_cuda
@pytest.mark.parametrize("backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION])
def test_each_attention_kernel_matches_the_formula(backend: SDPBackend) -> None:
    """Only one kernel is allowed, so torch raises where it cannot run instead of using another.

    The tensors have the strides that they have in the model.
    """
    shape = (2, 384, 3, 4, 64)  # (B, T, 3, heads, head_dim)
    qkv = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, T, head_dim)
    exact = attend(q.double(), k.double(), v.double(), causal=True, kernel="plain")
    with sdpa_kernel([backend]):
        found = scaled_dot_product_attention(q, k, v, is_causal=True)
    assert relative_error(found, exact) < 0.01


@only_cuda
@pytest.mark.parametrize(
    ("kind", "training", "expected"),
    [
        ("flash", True, "flash"),
        ("cudnn", True, "cudnn"),
        ("flash", False, "flash"),
        ("cudnn", False, "flash"),
        ("auto", False, "flash"),
    ],
)
def test_attention_runs_the_requested_kernel(kind: str, training: bool, expected: str) -> None:
    """Compares the names of the operations that ran.

    Since torch 2.11 the default kernel on an H200 is cuDNN's, so `flash` has to be requested.
    """
    qkv = torch.randn(3, 2, 4, 384, 64, device=DEVICE, dtype=torch.bfloat16)
    qkv.requires_grad_(training)
    q, k, v = qkv.unbind()  # each (B, heads, T, head_dim)
    with torch.set_grad_enabled(training), torch.profiler.profile() as profile:
        attend(q, k, v, causal=True, kernel=kind)
    names = {event.key for event in profile.key_averages()}
    found = {
        kernel
        for kernel in ("flash", "cudnn")
        if any(f"scaled_dot_product_{kernel}_attention" in name for name in names)
    }
    assert found == {expected}, names


# --- runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "precision", ["fp32", pytest.param("tf32", marks=only_cuda), "bf16", "fp16"]
)
def test_run_learns_in_every_precision(precision: str, tmp_path: Path) -> None:
    """The loss of a whole run falls by a third in sixty steps; fp16 uses loss scaling."""
    config = tiny(tmp_path / "run", device=DEVICE, precision=precision, steps=60)
    result = train(config)
    first_loss = train_losses(config.folder)[0]
    assert result.train_loss < 0.7 * first_loss


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_deterministic_run_resumes_bit_for_bit(optimizer: str, tmp_path: Path) -> None:
    """The process has used cuBLAS before.

    cuBLAS reads the setting of its workspace only once, at its first call.
    """
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    settings = {
        "device": DEVICE,
        "precision": "bf16",
        "deterministic": True,
        "steps": 20,
        "optimizer": optimizer,
    }
    uninterrupted = tiny(tmp_path / "uninterrupted", **settings)
    train(uninterrupted)

    def interrupt(row: Any) -> None:
        if row["step"] == 12:
            raise KeyboardInterrupt

    resumed = tiny(tmp_path / "resumed", **settings)
    with pytest.raises(KeyboardInterrupt):
        train(resumed, interrupt)
    train(resumed)
    assert losses(resumed.folder) == losses(uninterrupted.folder)


@only_cuda
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_step_waits_for_the_device_once(optimizer: str, tmp_path: Path) -> None:
    """torch warns at each point where the host waits. A second wait would leave the GPU idle."""
    settings = {"precision": "bf16", "batch_tokens": 1024, "optimizer": optimizer}
    config = tiny(tmp_path / "run", device=DEVICE, **settings)
    state = TrainState(config, set_up_device(config.run), "")
    batch = timing.text_batch(config, state.runtime.device)
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
    messages = [str(warning.message) for warning in caught]
    waits = [message for message in messages if "synchroniz" in message]
    assert len(waits) == 1, messages


@only_cuda
def test_memory_of_a_step_matches_the_plan() -> None:
    """Compares the peak of torch's allocator in three steps of 124M at 8 x 1024.

    The memory of CUDA's context is not the allocator's, so it is subtracted from the plan.
    """
    gpu = next(iter(GPUS))
    for recompute in (False, True):
        settings = {"device": DEVICE, "precision": "bf16", "recompute": recompute}
        recipe = anew.recipe("gpt2-124m", **settings)
        config = timing.with_batch(recipe, micro_batch=8, seq_len=1024)
        measured = timing.measure_in_new_process(config, 3)
        assert not isinstance(measured, str), measured
        planned = plan.make_plan(config, gpu).memory.total
        planned -= plan.LIBRARY_BYTES
        assert measured.memory_bytes == pytest.approx(planned, rel=0.25), f"recompute {recompute}"


# --- decoding with CUDA graphs --------------------------------------------------------------------


def generation_model() -> GPT:
    return small_model(torch.bfloat16).eval()


def assert_close_logits(found: Tensor, expected: Tensor) -> None:
    """Allow 2% of the largest logit: kernels for other shapes round differently."""
    largest = expected.abs().max().item()
    assert_close(found, expected, rtol=0.02, atol=0.02 * largest)


@only_cuda
def test_decoding_with_cuda_graphs_matches_decoding_without() -> None:
    """Rows of several lengths, past the 128 slots of a recording, and a second text."""
    model = generation_model()
    graphed = decoder_for(model, 3)
    assert isinstance(graphed, CudaGraphDecoder)
    packed = TorchDecoder(model)
    for length in (3, 120):
        prompts = []
        for more in (0, 4, 9):
            end = 7 + length + more
            prompts.append(list(range(7, end)))
        graphed_cache, _ = _prefill(model, prompts, 256)
        packed_cache, _ = _prefill(model, prompts, 256)
        for step in range(12):
            ids = [5 + step, 900, 31]
            with torch.inference_mode():  # as in generate
                found = graphed.step(ids, graphed_cache)
                expected = packed.step(ids, packed_cache)
            assert_close_logits(found, expected)
        assert graphed_cache.lengths.tolist() == packed_cache.lengths.tolist()


@only_cuda
@torch.inference_mode()
def test_alternating_texts_keep_their_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of three rows and of one row take turns. Each number of rows is recorded once."""
    model = generation_model()
    graphed = CudaGraphDecoder(model)
    packed = TorchDecoder(model)
    three_rows = [[9] * 4, [10] * 9, [11] * 2]
    one_row = [[5, 6, 7]]
    texts = [three_rows, one_row]
    recorded = []
    record = graphed._record

    def counting_record(*arguments: Any) -> Any:
        recorded.append(arguments[:3])
        return record(*arguments)

    monkeypatch.setattr(graphed, "_record", counting_record)
    graphed_caches = [_prefill(model, prompts, 256)[0] for prompts in texts]
    packed_caches = [_prefill(model, prompts, 256)[0] for prompts in texts]
    for step in range(6):
        for i, prompts in enumerate(texts):
            ids = [20 + step] * len(prompts)
            found = graphed.step(ids, graphed_caches[i])
            expected = packed.step(ids, packed_caches[i])
            assert_close_logits(found, expected)
    assert recorded == [(128, 3, 0), (128, 1, 0)]


@only_cuda
@torch.inference_mode()
def test_recorded_top_k_matches_the_logits() -> None:
    """Greedy and top-k choices are those of the logits. Each size of top-k is recorded once."""
    model = generation_model()
    graphed = CudaGraphDecoder(model)
    prompts = [[5, 6, 7], [8, 9]]
    cache, _ = _prefill(model, prompts, 256)
    for top_k in (1, 50, 40, 1):
        logits, top = graphed.step_and_top([11, 12], cache, top_k)
        assert top is not None
        values, ids = top.logits, top.ids
        assert ids.shape == (2, top_k)
        assert_close(values, logits.topk(top_k).values)
        assert_close(logits.gather(1, ids), values)
    assert len(graphed.recordings) == 2
    _, top = graphed.step_and_top([11, 12], cache, 1000)
    assert top is None


# --- ranks ----------------------------------------------------------------------------------------


@pytest.fixture
def group() -> Iterator[World]:
    """A process group of one rank: over NCCL on a GPU, over gloo in a rehearsal.

    FSDP skips its collectives for one rank.
    """
    backend = distributed.get_default_backend_for_device(DEVICE)
    store = TCPStore("127.0.0.1", free_port(), is_master=True)
    distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    yield World()
    distributed.destroy_process_group()


def plain_gradients(model: GPT, ids: Tensor) -> list[Tensor]:
    """Return the model's gradients, computed without ranks."""
    loss = model(ids, targets_of(ids))
    loss.backward()
    return gradients_of(model)


def test_gradient_buckets_of_one_rank_return_its_gradients(group: World) -> None:
    """NCCL gets the buckets from hooks while the backward pass runs."""
    ids = random_ids(2, 64)
    expected = plain_gradients(small_model(), ids)
    model = small_model()
    buckets = GradientBuckets(gradient_groups(model), group)
    for _ in range(2):
        buckets.start_step()
        buckets.start_when_ready()
        loss = model(ids, targets_of(ids))
        loss.backward()
        started = len(buckets.started)
        assert started == SMALL.n_layer + 1, "all buckets start before the backward pass ends"
        buckets.all_reduce()
    assert_close(gradients_of(model), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_stop_before_the_first_micro_batch_ends_the_step(
    precision: str, group: World, tmp_path: Path
) -> None:
    """The step believes that it is one of two ranks.

    The gradient norm has to be on the loss's device, and no loss scale may be missing.
    """
    config = tiny(tmp_path / "run", device=DEVICE, precision=precision)
    world = World(rank=0, size=2)
    state = TrainState(config, set_up_device(config.run), "", world)
    before = [parameter.detach().clone() for parameter in state.parameters]
    batch = timing.text_batch(config, state.runtime.device)
    stop = StopFlag()
    stop.set()
    outcome = train_step(state.model, state, batch, 1.0, stop)
    assert outcome.stop
    assert not outcome.applied
    assert_equal(state.parameters, before)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float32, 1e-4),
        (torch.bfloat16, 0.05),
    ],
)
def test_fsdp_on_one_rank_matches_the_plain_model(
    dtype: torch.dtype, tolerance: float, group: World
) -> None:
    """FSDP's hooks, casts and accumulation; the whole model used for evaluation is exact."""
    ids = random_ids(2, 64)
    plain = small_model(dtype)
    expected = plain_gradients(plain, ids)
    model = small_model(dtype)
    fsdp.shard(model, dtype)
    for is_last in (False, True):
        fsdp.reduce_gradients(model, is_last)
        loss = model(ids, targets_of(ids)) / 2
        loss.backward()
    for gradient, expected_gradient in zip(gradients_of(model), expected, strict=True):
        assert relative_error(full_tensor(gradient), expected_gradient) < tolerance
    with fsdp.whole_model(model) as copy:
        assert_equal(list(copy.parameters()), list(plain.parameters()))


@only_cuda
def test_each_gpu_has_its_own_identity() -> None:
    """Two ranks on one GPU are refused by this identity, whatever the machines are called."""
    gpus = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    identities = [gpu_identity(gpu) for gpu in gpus]
    assert len(set(identities)) == len(identities)
    assert all(len(identity) > 8 for identity in identities)


def test_torchrun_with_one_rank_is_the_same_run(tmp_path: Path) -> None:
    """One rank makes no process group, and the documented command has to work all the same."""
    alone = tiny(tmp_path / "alone", device=DEVICE)
    train(alone)
    script = tmp_path / "run.py"
    script.write_text(
        "from pathlib import Path\n"
        "from anew import train\n"
        "from tests.faults.common import tiny\n"
        f"train(tiny(Path({str(tmp_path)!r}) / 'ranked', device={DEVICE!r}))\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node", "1", str(script)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}"}
    subprocess.run(command, check=True, cwd=ROOT, env=environment)
    expected = train_losses(alone.folder)
    assert train_losses(tmp_path / "ranked") == pytest.approx(expected, rel=1e-5)
