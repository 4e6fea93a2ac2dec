"""The choice of device, precision and compiler, on machines that are simulated."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend

import anew
from anew import UserError
from anew.bench.competitors import common_precision
from anew.config.schema import RunConfig
from anew.data import prepare, sources
from anew.data.holdout import Settings
from anew.data.shards import DataFolder, consume
from anew.distributed.preflight import refuse_shared_gpus
from anew.distributed.world import World
from anew.model.attention import kernels_for
from anew.training.micro_batch import is_out_of_memory
from anew.utils import device

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("capability", "precision"), [((9, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "fp16")]
)
def test_auto_precision_follows_the_compute_capability(
    capability: tuple[int, int], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert device.pick_precision("auto", torch.device("cuda", 0))[0] == precision


def test_precision_that_a_gpu_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    mps = torch.device("mps")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    assert device.pick_precision("auto", cuda)[0] == "fp16"
    with pytest.raises(UserError, match=r"this GPU has 7\.0; use --precision fp16"):
        device.pick_precision("bf16", cuda)
    with pytest.raises(UserError, match="tf32 needs"):
        device.pick_precision("tf32", cuda)
    assert device.pick_precision("auto", mps)[0] == "fp32"
    with pytest.raises(UserError, match="not reliable on MPS"):
        device.pick_precision("bf16", mps)


@pytest.mark.parametrize(("has_bf16", "precision"), [(True, "bf16"), (False, "fp32")])
def test_auto_precision_of_a_cpu_follows_its_instructions(
    has_bf16: bool, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert device.pick_precision("auto", CPU)[0] == precision


def test_without_a_compiler_steps_are_eager_and_a_wish_to_compile_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert device.pick_compile("auto", CPU) == (False, "eager: there is no C++ compiler")
    with pytest.raises(UserError, match="use --compile off"):
        device.pick_compile("on", CPU)
    assert device.pick_compile("off", CPU)[0] is False
    assert device.pick_compile("auto", torch.device("mps"))[0] is False


def simulate_accelerator(monkeypatch: pytest.MonkeyPatch, accelerator: str, count: int = 1) -> None:
    """Make torch report `count` devices of this type."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerator != "cpu")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(accelerator))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)


def test_auto_device_is_the_accelerator_that_torch_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    for accelerator in ("cuda", "mps", "xpu", "cpu"):
        simulate_accelerator(monkeypatch, accelerator)
        assert device.pick_device("auto").type == accelerator
        assert device.pick_device("cpu").type == "cpu"
    with pytest.raises(UserError, match="has no cuda; use --device cpu"):
        device.pick_device("cuda")


def test_each_rank_has_a_gpu_of_its_own_or_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # In the last case, a launcher shows each process only its own GPU.
    for visible, local_rank, index in ((4, "3", 3), (1, "0", 0), (1, "3", 0)):
        simulate_accelerator(monkeypatch, "cuda", visible)
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        assert device.pick_device("auto") == torch.device("cuda", index)
    simulate_accelerator(monkeypatch, "cuda", 2)
    refusal = r"rank 3 of this machine has no GPU: 2 are visible; .*--nproc-per-node 2"
    with pytest.raises(UserError, match=refusal):
        device.pick_device("cuda")


def test_unusable_gpu_is_not_silently_replaced_by_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    simulate_accelerator(monkeypatch, "cpu")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(Path, "exists", lambda self: self == Path("/dev/nvidia0"))
    for version, words in (("13.0", "driver"), (None, "build without CUDA")):
        monkeypatch.setattr(torch.version, "cuda", version)
        with pytest.raises(UserError, match=rf"{words}.* or use --device cpu"):
            device.pick_device("auto")
    assert device.pick_device("cpu").type == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert device.pick_device("auto").type == "cpu", "hidden on purpose"


def test_sums_of_half_precision_products_are_kept_in_fp32() -> None:
    device.set_up_device(RunConfig(device="cpu", precision="fp32", compile="off"))
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    assert not torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction


CUBLAS_ERROR = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        MemoryError(),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError(CUBLAS_ERROR),
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    ],
)
def test_every_out_of_memory_error_is_recognised(error: BaseException) -> None:
    assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert not is_out_of_memory(ValueError("out of memory is a subject of this text"))


def test_attention_without_gradients_never_uses_cudnn() -> None:
    """`auto` leaves the choice of the kernel to PyTorch, except where there are no gradients."""
    flash = SDPBackend.FLASH_ATTENTION
    cudnn = SDPBackend.CUDNN_ATTENTION
    assert kernels_for("flash", True)[0] == flash
    assert kernels_for("cudnn", True)[0] == cudnn
    assert kernels_for("auto", True) == []
    assert cudnn not in kernels_for("flash", True)
    for kind in ("auto", "flash", "cudnn"):
        assert kernels_for(kind, False)[0] == flash
        assert cudnn not in kernels_for(kind, False)


def test_peak_is_measured_if_no_datasheet_is_known() -> None:
    runtime = device.set_up_device(RunConfig(device="cpu", precision="fp32", compile="off"))
    flops, source = device.peak_flops(runtime)
    assert 1e9 < flops < 1e14
    assert "timed here" in source


def test_two_ranks_on_one_gpu_are_refused_by_its_uuid(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Containers often share a host name; a GPU's UUID is its own."""
    monkeypatch.setattr("anew.distributed.preflight.gpu_identity", lambda _: "GPU-1")
    cuda = torch.device("cuda", 0)
    refuse_shared_gpus(World(0, 2, lambda mine: [mine, "GPU-2"]), cuda)
    with pytest.raises(UserError, match="ranks 0 and 2 have the same GPU"):
        refuse_shared_gpus(World(0, 3, lambda mine: [mine, "GPU-2", "GPU-1"]), cuda)


def test_ranks_wait_without_timeout_only_while_the_first_prepares() -> None:
    def impatient(value: Any) -> list[Any]:
        raise AssertionError("this would time out")

    seen: list[Any] = []

    def patient(value: Any) -> list[Any]:
        seen.append(value)
        return [value]

    world = World(0, 2, impatient, 0, patient)
    assert world.run_on_all_ranks(lambda: 7, first=lambda w: w.rank == 0) == 7
    assert seen == ["", ""]
    with pytest.raises(AssertionError):
        world.run_on_all_ranks(lambda: 7)


def test_shard_is_unmapped_before_it_is_removed(tmp_path: Path) -> None:
    """Windows refuses to remove a file that is mapped into memory."""
    text = tmp_path / "text.txt"
    text.write_text("A sentence of some length that is read again and again.\n" * 400)
    prepare.prepare_data(sources.find(str(text)), Settings("bytes"), tmp_path / "data")
    folder = DataFolder.open(tmp_path / "data")
    shard = folder.splits["train"][0]
    assert len(shard.tokens) > 1000
    consume(folder.splits["train"], 1)
    assert "tokens" not in shard.__dict__
    assert not shard.path.exists()


def test_packages_are_compared_in_bf16_or_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    config = anew.recipe("gpt2-124m")
    assert common_precision(config, "mps") == "fp32"
    for capability, expected in (((9, 0), "bf16"), ((7, 5), "fp32")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert common_precision(config, "cuda") == expected
    for has_bf16, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr("anew.utils.device.cpu_has_bf16", lambda found=has_bf16: found)
        assert common_precision(config, "cpu") == expected
    for precision in ("bf16", "fp32"):
        assert common_precision(config.override(precision=precision), "cpu") == precision
    with pytest.raises(UserError, match="not in fp16; use --precision bf16 or fp32"):
        common_precision(config.override(precision="fp16"), "cpu")
