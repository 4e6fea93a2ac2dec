import pytest
import torch

from anew import UserError, runtime, toolchain
from anew.config import RunConfig

CPU = torch.device("cpu")


def test_precision_table(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    for capability, expected in (((9, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "fp16"), ((7, 0), "fp16")):
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


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert runtime.pick_device("auto").type == "mps"
    with pytest.raises(UserError, match="has no cuda"):
        runtime.pick_device("cuda")


def test_peak_is_measured_where_no_datasheet_is_known() -> None:
    rt = runtime.start(RunConfig(device="cpu", precision="fp32", compile="off"))
    flops, source = runtime.peak_flops(rt)
    assert 1e9 < flops < 1e14
    assert "timed here" in source
