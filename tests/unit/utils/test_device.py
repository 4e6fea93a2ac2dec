import os
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend

from anew import UserError
from anew.bench import competitors as rivals
from anew.config.schema import RunConfig
from anew.data import prepare, sources
from anew.data.shards import DataFolder, consume
from anew.distributed.preflight import refuse_shared_gpus
from anew.distributed.world import World
from anew.model.attention import kernels_for
from anew.training.micro_batch import is_out_of_memory
from anew.training.trainer import train
from anew.utils import compiler as toolchain
from anew.utils import device as runtime
from anew.utils.files import rename
from anew.utils.signals import signal_this_process, stop_on_signals
from tests.faults.common import tiny
from tests.support.ranks import run_ranks

CPU = torch.device("cpu")


def test_apples_compiler_that_only_asks_to_be_installed_is_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    paths = sysconfig.get_paths()
    monkeypatch.setattr(toolchain.sysconfig, "get_paths", lambda: paths)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(toolchain.shutil, "which", lambda name: f"/usr/bin/{name}")
    for code, reason in ((0, ""), (2, "xcode-select --install")):
        answer = subprocess.CompletedProcess([], code)
        monkeypatch.setattr(toolchain.subprocess, "run", lambda *_, answer=answer, **__: answer)
        found = toolchain.missing_for_compile(CPU)
        assert (reason in found) if reason else found == ""


def test_precision_table(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    for capability, expected in (
        ((9, 0), "bf16"),
        ((8, 0), "bf16"),
        ((7, 5), "fp16"),
        ((7, 0), "fp16"),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert runtime.pick_precision("auto", cuda)[0] == expected
    with pytest.raises(UserError, match=r"this GPU has 7\.0; use --precision fp16"):
        runtime.pick_precision("bf16", cuda)
    with pytest.raises(UserError, match="tf32 needs"):
        runtime.pick_precision("tf32", cuda)
    assert runtime.pick_precision("auto", torch.device("mps"))[0] == "fp32"
    with pytest.raises(UserError, match="not reliable on MPS"):
        runtime.pick_precision("bf16", torch.device("mps"))
    for has, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=has: has)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        assert runtime.pick_precision("auto", CPU)[0] == expected


def test_no_compiler_means_eager_with_one_plain_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain.shutil, "which", lambda name: None)
    assert runtime.pick_compile("auto", CPU) == (False, "eager: there is no C++ compiler")
    with pytest.raises(UserError, match="use --compile off"):
        runtime.pick_compile("on", CPU)
    assert runtime.pick_compile("off", CPU)[0] is False
    assert runtime.pick_compile("auto", torch.device("mps"))[0] is False


def pretend(monkeypatch: pytest.MonkeyPatch, accelerator: str, count: int = 1) -> None:
    """Make torch say that it has `count` devices of this type."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: accelerator != "cpu")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(accelerator))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)


def test_the_device_is_the_accelerator_that_torch_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    for accelerator in ("cuda", "mps", "xpu", "cpu"):
        pretend(monkeypatch, accelerator)
        assert runtime.pick_device("auto").type == accelerator
        assert runtime.pick_device("cpu").type == "cpu"
    with pytest.raises(UserError, match="has no cuda; use --device cpu"):
        runtime.pick_device("cuda")


def test_each_rank_has_a_gpu_or_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    for visible, local_rank, index in (
        (4, "3", 3),
        (1, "0", 0),
        (1, "3", 0),
    ):  # a launcher may show each process a single GPU
        pretend(monkeypatch, "cuda", visible)
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        assert runtime.pick_device("auto") == torch.device("cuda", index)
    pretend(monkeypatch, "cuda", 2)
    with pytest.raises(
        UserError, match=r"rank 3 of this machine has no GPU: 2 are visible; .*--nproc-per-node 2"
    ):
        runtime.pick_device("cuda")


def test_a_gpu_that_torch_cannot_use_is_never_replaced_by_the_cpu_unasked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend(monkeypatch, "cpu")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(Path, "exists", lambda self: self == Path("/dev/nvidia0"))
    for version, words in (("13.0", "driver"), (None, "build without CUDA")):
        monkeypatch.setattr(torch.version, "cuda", version)
        with pytest.raises(UserError, match=rf"{words}.* or use --device cpu"):
            runtime.pick_device("auto")
    assert runtime.pick_device("cpu").type == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert runtime.pick_device("auto").type == "cpu", "hidden on purpose"


def test_importing_anew_does_not_initialise_cuda() -> None:
    """A process that has initialised CUDA cannot be forked, and has memory on GPU 0 whichever GPU it is to use."""
    script = """
import os
import torch
def refuse(*arguments):
    raise AssertionError("CUDA was asked for at import")
torch.cuda.is_available = lambda: True
torch.cuda._lazy_init = refuse
torch._C._cuda_getDeviceCount = lambda: 1
import anew, anew.training.trainer, anew.bench.timing, anew.plan, anew.cli.main
assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
"""
    environment = {
        name: value for name, value in os.environ.items() if name != "CUBLAS_WORKSPACE_CONFIG"
    }
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr


def seen_by_process_group(run: Path) -> str:
    """NCCL_ALGO as it is when the process group is made."""
    from torch import distributed

    real, seen = distributed.init_process_group, []

    def watched(*arguments: Any, **named: Any) -> None:
        seen.append(os.environ.get("NCCL_ALGO", ""))
        real(*arguments, **named)

    distributed.init_process_group = watched
    train(tiny(run, steps=3, deterministic=True))
    return seen[0]


def test_a_deterministic_run_switches_nvls_off_before_nccl_starts(tmp_path: Path) -> None:
    assert run_ranks(2, seen_by_process_group, tmp_path / "run") == [("ok", "^NVLS")] * 2


def test_sums_of_half_precision_products_are_kept_in_fp32() -> None:
    runtime.start(RunConfig(device="cpu", precision="fp32", compile="off"))
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    assert not torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction


def test_a_signal_to_this_process_reaches_its_handler_on_windows_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """There, os.kill ends the process without a word."""
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("os.kill ends a Windows process"))
    with stop_on_signals() as stop:
        signal_this_process(signal.SIGTERM)
        assert stop.is_set()


def test_a_rename_waits_on_windows_until_nobody_has_the_file_open(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source, target = tmp_path / "new", tmp_path / "old"
    source.write_text("new")
    target.write_text("old")
    real, refusals = os.replace, [PermissionError(13, "in use")] * 3

    def busy(a: Path, b: Path) -> None:
        if refusals:
            raise refusals.pop()
        real(a, b)

    monkeypatch.setattr(os, "replace", busy)
    with pytest.raises(PermissionError):
        rename(source, target)  # elsewhere it is a fault, and said at once
    monkeypatch.setattr(sys, "platform", "win32")
    rename(source, target)
    assert target.read_text() == "new"
    assert not refusals


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError(),
    RuntimeError("CUDA error: out of memory"), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
])  # fmt: skip
def test_every_way_of_saying_that_memory_is_short_is_known(error: BaseException) -> None:
    assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert not is_out_of_memory(ValueError("out of memory is a subject of this text"))


def test_evaluation_never_asks_cudnn_for_a_plan() -> None:
    """`flash` is FlashAttention, `cudnn` is cuDNN, `auto` leaves the choice to torch; without gradients cuDNN is not among them."""
    flash, cudnn, cudnn_backend = (
        SDPBackend.FLASH_ATTENTION,
        kernels_for("cudnn", True),
        SDPBackend.CUDNN_ATTENTION,
    )
    assert kernels_for("flash", True)[0] == flash
    assert cudnn[0] == cudnn_backend
    assert kernels_for("auto", True) == []
    assert cudnn_backend not in kernels_for("flash", True)
    for kind in ("auto", "flash", "cudnn"):
        assert kernels_for(kind, False)[0] == flash
        assert cudnn_backend not in kernels_for(kind, False)


def test_peak_is_measured_where_no_datasheet_is_known() -> None:
    rt = runtime.start(RunConfig(device="cpu", precision="fp32", compile="off"))
    flops, source = runtime.peak_flops(rt)
    assert 1e9 < flops < 1e14
    assert "timed here" in source


def test_two_ranks_on_one_gpu_are_refused_and_hosts_of_one_name_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Containers often share a host name; a GPU's UUID is its own."""
    monkeypatch.setattr("anew.distributed.preflight.gpu_identity", lambda _: "GPU-1")
    device = torch.device("cuda", 0)
    refuse_shared_gpus(World(0, 2, lambda mine: [mine, "GPU-2"]), device)
    with pytest.raises(UserError, match="ranks 0 and 2 have the same GPU"):
        refuse_shared_gpus(World(0, 3, lambda mine: [mine, "GPU-2", "GPU-1"]), device)


def test_ranks_wait_patiently_only_where_another_prepares_something_for_them() -> None:
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


def test_a_used_shard_is_not_mapped_when_it_is_removed(tmp_path: Path) -> None:
    """Windows refuses to remove a file that is mapped into memory."""
    prepare.prepare(
        sources.find(str(text_of(tmp_path))), prepare.Settings("bytes"), tmp_path / "data"
    )
    folder = DataFolder.open(tmp_path / "data")
    shard = folder.splits["train"][0]
    assert len(shard.tokens) > 1000
    consume(folder.splits["train"], 1)
    assert "tokens" not in shard.__dict__
    assert not shard.path.exists()


def text_of(folder: Path) -> Path:
    path = folder / "text.txt"
    path.write_text("A sentence of some length that is read again and again.\n" * 400)
    return path


def test_writing_is_compared_in_fp32_where_bf16_is_wrong() -> None:
    assert rivals.writing_dtype("mps") == torch.float32
    assert rivals.writing_dtype("cuda") == rivals.writing_dtype("cpu") == torch.bfloat16
