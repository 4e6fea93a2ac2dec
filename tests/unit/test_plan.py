"""Plans: figures that can be checked by hand, and the messages of invalid commands."""

import json
from pathlib import Path

import pytest

import anew
from anew import UserError, plan
from anew.checkpoint.huggingface import save_model
from anew.cli.main import main
from anew.config.schema import GPTConfig
from anew.model.flops import count_parameters
from anew.tokenizer.bpe import Tokenizer
from anew.utils.gpus import GPUS, find, known


def output_of(capsys: pytest.CaptureFixture[str], line: str) -> str:
    main(["plan", *line.split()])
    return capsys.readouterr().out


def test_cost_of_the_reference_run_is_the_one_computed_by_hand(
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = output_of(capsys, "gpt2-124m --gpu h100 --count 8 --price 2.5 --json")
    facts = json.loads(out.splitlines()[-1])
    parameters = 124_475_904
    compute = 524_288 * 798_087_168 / (8 * 0.38 * 989e12)  # tokens x FLOPs / (38% of the peak)
    exchange = 2 * 7 / 8 * 4 * parameters / 450e9  # bytes of the gradients / link
    hours = 19_073 * (compute + exchange) / 3600
    assert facts["hours"] == pytest.approx(hours, rel=1e-3)
    assert facts["dollars"] == pytest.approx(hours * 8 * 2.5, rel=1e-3)
    assert facts["memory"]["state"] + facts["memory"]["gradients"] == 16 * parameters
    assert facts["fits"]
    assert "*         64           1 " in out, "the recipe takes the largest micro-batch that fits"
    assert "half     of the GPUs, 4 x H100: 2 accumulated" in out
    assert "19,073 steps x 524,288 = 10B tokens" in out
    assert "llm.c, 468k tokens/s" in out
    assert max(map(len, out.splitlines()[:-1])) <= 80


def test_plan_with_init_counts_the_parameters_of_that_model(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = GPTConfig(n_layer=2, n_head=2, n_embd=64, n_positions=32, vocab_size=257)
    save_model(tmp_path, anew.GPT(config), Tokenizer.named("bytes"))
    out = output_of(capsys, f"finetune --init {tmp_path} --gpu t4")
    assert f"{count_parameters(config):,} parameters" in out
    assert "Steps this short" in out


@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        ("NVIDIA A100-SXM4-40GB", "A100-40"),
        ("NVIDIA A100-SXM4-80GB", "A100-80"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA H200 NVL", "H200 NVL"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA H20", "H20"),
        ("NVIDIA B200", "B200"),
        ("Tesla T4", "T4"),
        ("NVIDIA T400 4GB", None),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("rtx4070", "RTX 4070"),
        ("NVIDIA GeForce RTX 5090", "RTX 5090"),
        ("NVIDIA L40S", "L40S"),
        ("AMD Instinct MI300X", "MI300X"),
        ("Tesla V100-SXM2-16GB", "V100"),
        ("Tesla V100-SXM2-32GB", "V100"),
        ("Apple M1 Max", "M1 Max"),
        ("NVIDIA RTX A6000", None),
        ("Quadro", None),
    ],
)
def test_gpu_is_known_by_the_name_that_torch_reports(name: str, gpu: str | None) -> None:
    found = known(name)
    assert (found.name if found else None) == gpu


@pytest.mark.parametrize("gpu", [gpu.name for gpu in GPUS])
def test_every_device_can_be_planned_for(gpu: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert find(gpu).name == gpu, "its own name finds it"
    out = output_of(capsys, f"gpt2-124m --micro-batch 4 --gpu {gpu.replace(' ', '-')}")
    assert find(gpu).source in " ".join(out.split())
    assert max(map(len, out.splitlines())) <= 80


def test_fsdp_divides_the_state() -> None:
    big = anew.recipe("gpt2-1558m")
    sharded = big.override(parallel="fsdp")
    parameters = count_parameters(big.model)
    ddp_memory = plan.memory_per_gpu(big.override(parallel="ddp"), 1, 4, "bf16")
    fsdp_memory = plan.memory_per_gpu(sharded, 1, 4, "bf16")
    assert ddp_memory.state + ddp_memory.gradients == 16 * parameters
    assert fsdp_memory.state + fsdp_memory.gradients == (3 + 4) * parameters
    assert ddp_memory.total > 24e9, "it does not fit on a card of 24 GB"
    card = find("3090")
    assert plan.largest_micro_batch(big, card, 4, "bf16") == 0
    assert plan.largest_micro_batch(sharded, card, 4, "bf16") >= 2


def test_memory_grows_linearly_with_the_micro_batch() -> None:
    big = anew.recipe("gpt2-1558m")
    totals = [plan.memory_per_gpu(big, size, 1, "bf16").total for size in (1, 2, 4, 8)]
    assert totals == sorted(totals)
    assert totals[3] - totals[2] == pytest.approx(2 * (totals[2] - totals[1]), rel=0.1)


def test_plan_that_does_not_fit_says_what_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert "does not fit" not in output_of(capsys, "gpt2-350m --gpu t4")
    out = output_of(capsys, "gpt2-350m --gpu t4 --micro-batch 16")
    best = plan.largest_micro_batch(anew.recipe("gpt2-350m"), find("t4"), 1, "fp16")
    assert 1 < best < 16
    assert f"the setting does not fit: use --micro-batch {best}" in out
    out = output_of(capsys, "gpt2-1558m --gpu 3090 --count 4 --micro-batch 1")
    assert "--parallel fsdp" in out


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("gpt2-124m", "--gpu names the GPU to plan for"),
        ("gpt2-124m --gpu abacus", "no GPU 'abacus'"),
        ("gpt2-124m --gpu t4 --precision bf16", "T4 has no bf16; use --precision fp16"),
        ("gpt2-124m --gpu h100 --count 7", "not a multiple of 7 ranks"),
        ("gpt2-124m --gpu h100 --count 0", "--count must be at least 1"),
        ("gpt2-124m --from nowhere", "there is no run at nowhere"),
    ],
)
def test_invalid_plan_is_refused(line: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["plan", *line.split()])
    assert left.value.code == 2
    assert words in capsys.readouterr().err


def test_measured_speed_replaces_the_datasheet() -> None:
    recipe = anew.recipe("gpt2-124m")
    made = plan.make_plan(recipe, find("h200"), measured=600_000)
    assert made.tokens_per_second == pytest.approx(600_000)
    assert made.hours == pytest.approx(19_073 * 524_288 / 600_000 / 3600)
    with pytest.raises(UserError):
        plan.make_plan(recipe, find("h200"), count=0)
