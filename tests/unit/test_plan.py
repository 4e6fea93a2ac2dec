"""Plans: figures that can be checked by hand, and refusals in words."""

import json
from pathlib import Path
from typing import Any

import pytest

import anew
from anew import UserError, plan
from anew.checkpoint import folder as checkpoint
from anew.cli.main import main
from anew.model.flops import count_parameters
from anew.training.trainer import train
from anew.utils import gpus as devices
from tests.faults.common import tiny


def text_of(capsys: pytest.CaptureFixture[str], line: str) -> str:
    main(["plan", *line.split()])
    return capsys.readouterr().out


def test_the_reference_run_costs_what_can_be_worked_out_by_hand(
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = text_of(capsys, "gpt2-124m --gpu h100 --count 8 --price 2.5 --json")
    facts = json.loads(out.splitlines()[-1])
    # 19,073 steps x (524,288 tokens x 798 MFLOP / (8 x 38% of 989 TFLOP/s) + 2 x 7/8 x 4 x 124.5M bytes / 450 GB/s)
    by_hand = (
        19_073
        * (524_288 * 798_087_168 / (8 * 0.38 * 989e12) + 1.75 * 4 * 124_475_904 / 450e9)
        / 3600
    )
    assert facts["hours"] == pytest.approx(by_hand, rel=1e-3)
    assert facts["dollars"] == pytest.approx(by_hand * 8 * 2.5, rel=1e-3)
    assert facts["memory"]["state"] + facts["memory"]["gradients"] == 16 * 124_475_904
    assert facts["fits"]
    assert "*         64           1 " in out, "the recipe takes the largest micro-batch that fits"
    assert "half     4 x H100: 2 accumulated" in out
    assert "19,073 steps x 524,288 = 10B tokens" in out
    assert "llm.c, 468k tokens/s" in out
    assert max(map(len, out.splitlines()[:-1])) <= 80


@pytest.mark.parametrize(("name", "gpu"), [
    ("NVIDIA A100-SXM4-40GB", "A100-40"), ("NVIDIA A100-SXM4-80GB", "A100-80"), ("NVIDIA H100 80GB HBM3", "H100"),
    ("NVIDIA H100 PCIe", "H100 PCIe"), ("NVIDIA H100 NVL", "H100 NVL"), ("NVIDIA H200", "H200"), ("NVIDIA H200 NVL", "H200 NVL"),
    ("NVIDIA GH200 480GB", "GH200"), ("NVIDIA H20", "H20"), ("NVIDIA B200", "B200"), ("Tesla T4", "T4"), ("NVIDIA T400 4GB", None),
    ("NVIDIA GeForce RTX 4090", "RTX 4090"), ("rtx4070", "RTX 4070"), ("NVIDIA GeForce RTX 5090", "RTX 5090"), ("NVIDIA L40S", "L40S"),
    ("AMD Instinct MI300X", "MI300X"), ("Tesla V100-SXM2-32GB", "V100"), ("Apple M1 Max", "M1 Max"), ("NVIDIA RTX A6000", None),
])  # fmt: skip
def test_a_gpu_is_known_by_the_name_that_torch_reports(name: str, gpu: str | None) -> None:
    found = devices.known(name)
    assert (found.name if found else None) == gpu


@pytest.mark.parametrize("gpu", [g.name for g in devices.GPUS])
def test_every_device_can_be_planned_for(gpu: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert devices.find(gpu).name == gpu, "its own name finds it"
    out = text_of(capsys, f"gpt2-124m --micro-batch 4 --gpu {gpu.replace(' ', '-')}")
    assert devices.find(gpu).source in " ".join(out.split())
    assert max(map(len, out.splitlines())) <= 80


def test_names_as_torch_gives_them() -> None:
    for name, found in (
        ("NVIDIA A100-SXM4-40GB", "A100-40"), ("NVIDIA A100-SXM4-80GB", "A100-80"), ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"), ("NVIDIA H200", "H200"), ("Tesla T4", "T4"), ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("Tesla V100-SXM2-16GB", "V100"), ("NVIDIA L40S", "L40S"), ("NVIDIA A10G", "A10G"), ("NVIDIA B200", "B200"),
    ):  # fmt: skip
        gpu = devices.known(name)
        assert gpu is not None, name
        assert gpu.name == found
    assert devices.known("Quadro") is None


def test_memory_grows_with_the_micro_batch_and_fsdp_cuts_the_state() -> None:
    big = anew.recipe("gpt2-1558m")
    N = count_parameters(big.model)
    whole, cut = (plan.memory_of(big.override(parallel=p), 1, 4, "bf16") for p in ("ddp", "fsdp"))
    assert (whole.state + whole.gradients, cut.state + cut.gradients) == (16 * N, (3 + 4) * N)
    assert whole.total > 24e9, "not on a card of 24 GB"
    card = devices.find("3090")
    assert plan.largest_micro_batch(big, card, 4, "bf16") == 0
    assert plan.largest_micro_batch(big.override(parallel="fsdp"), card, 4, "bf16") >= 2
    totals = [plan.memory_of(big, n, 1, "bf16").total for n in (1, 2, 4, 8)]
    assert totals == sorted(totals)
    assert totals[3] - totals[2] == pytest.approx(2 * (totals[2] - totals[1]), rel=0.1)


@pytest.mark.parametrize("settings", [{}, {"optimizer": "muon"}])
def test_a_checkpoint_is_as_large_as_planned(settings: dict[str, Any], tmp_path: Path) -> None:
    larger = {
        "n_layer": 4,
        "n_embd": 64,
        "steps": 4,
        "warmup_steps": 1,
    }  # so that the tensors' names weigh little
    config = tiny(tmp_path / "run", **larger, **settings)
    train(config)
    folder, _ = checkpoint.newest(config.folder)
    on_disk = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert on_disk == pytest.approx(plan.checkpoint_bytes(config), rel=0.05)


def test_what_does_not_fit_is_said_with_what_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert "does not fit" not in text_of(capsys, "gpt2-350m --gpu t4")
    said = text_of(capsys, "gpt2-350m --gpu t4 --micro-batch 16")
    best = plan.largest_micro_batch(anew.recipe("gpt2-350m"), devices.find("t4"), 1, "fp16")
    assert 1 < best < 16
    assert f"the setting does not fit: use --micro-batch {best}" in said
    assert "--parallel fsdp" in text_of(capsys, "gpt2-1558m --gpu 3090 --count 4 --micro-batch 1")


def test_a_plan_from_a_real_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny(tmp_path / "run", steps=20)
    train(config)
    out = text_of(capsys, f"gpt2-124m --from {config.folder}")
    assert "tiny, " in out
    assert "gpt2-124m: 798.1 MFLOP a token" in out
    assert "10B tokens in" in out


@pytest.mark.parametrize(("line", "words"), [
    ("gpt2-124m", "--gpu says for which GPU"),
    ("gpt2-124m --gpu abacus", "no figure for a 'abacus'"),
    ("gpt2-124m --gpu t4 --precision bf16", "T4 has no bf16; use --precision fp16"),
    ("gpt2-124m --gpu h100 --count 7", "not a multiple of 7 ranks"),
    ("gpt2-124m --gpu h100 --count 0", "--count must be at least 1"),
    ("gpt2-124m --from nowhere", "is not the config.json of a run"),
])  # fmt: skip
def test_refusals(line: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["plan", *line.split()])
    assert left.value.code == 2
    assert words in capsys.readouterr().err


def test_a_rate_that_was_measured_replaces_the_datasheet() -> None:
    made = plan.make(anew.recipe("gpt2-124m"), devices.find("h200"), measured=600_000)
    assert made.tokens_per_second == pytest.approx(600_000)
    assert made.hours == pytest.approx(19_073 * 524_288 / 600_000 / 3600)
    with pytest.raises(UserError):
        plan.make(anew.recipe("gpt2-124m"), devices.find("h200"), count=0)
