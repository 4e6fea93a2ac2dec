"""The promises of training: bit for bit after a stop, the same at any micro-batch, and never
disturbed by looking.
"""

import contextlib
import gc
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import anew
from anew import Config, UserError
from anew.checkpoint import folder as checkpoint
from anew.cli.main import main
from anew.errors import Preempted
from anew.training import run_log as metrics
from anew.training.step import LossFunction, StepResult, dropout_seed, train_step
from anew.training.train_state import TrainState
from anew.training.trainer import DelayedRows, train
from anew.utils import device as runtime
from anew.utils.signals import StopFlag
from tests.faults.common import tiny
from tests.support import shared

GOLDEN = [
    5.539498,
    5.361929,
    5.247861,
    5.134156,
    5.015452,
    4.90322,
    4.771688,
    4.706358,
    4.611162,
    4.591778,
]


def rows_of(config: Config) -> list[metrics.Row]:
    keys = ("step", "tokens", "train/loss", "train/lr", "train/grad_norm")
    return [{k: r[k] for k in keys} for r in metrics.read_metrics(config.folder)]


def weights_hash(config: Config) -> str:
    newest, _ = checkpoint.newest_valid(config.folder)
    assert newest is not None
    both = (newest / "model.safetensors").read_bytes() + (
        newest / "optimizer.safetensors"
    ).read_bytes()
    return hashlib.sha256(both).hexdigest()


class StopAt:
    """A progress callback that asks the run to stop, as a signal would, after given steps."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps

    def __call__(self, row: metrics.Row) -> None:
        if row["step"] in self.steps:
            os.kill(os.getpid(), signal.SIGTERM)


FAST: dict[str, Any] = {
    "optimizer": "muon",
    "muon_warmup": 6,
    "decay_share": 0.5,
    "wte_lr": 2e-3,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "muon": {"optimizer": "muon"},
    "fast": FAST,
    "dropout": {"dropout": 0.2, "micro_batch": 4},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
    "short epochs": {"batch_tokens": 4096},  # 5 steps an epoch: stops fall on both sides of its end
}


@pytest.mark.guarantee("resume")
@pytest.mark.parametrize("variant", VARIANTS)
def test_run_stopped_three_times_equals_an_uninterrupted_run_bit_for_bit(
    tiny: Config, variant: str
) -> None:
    whole = tiny.override(**VARIANTS[variant], out=tiny.run.out + "-whole")
    train(whole)
    parts = whole.override(out=tiny.run.out + "-parts")
    for stop in (1, 5, 10):
        with pytest.raises(Preempted, match=f"stopped at step {stop} of 12"):
            train(parts, StopAt(stop))
    train(parts)
    assert rows_of(parts) == rows_of(whole)
    assert weights_hash(parts) == weights_hash(whole)


@pytest.mark.guarantee("resume")
def test_compiled_run_resumes_bit_for_bit(tiny: Config) -> None:
    if not runtime.pick_compile("auto", torch.device("cpu"))[0]:
        pytest.skip("needs a C++ compiler")
    compiled = tiny.override(compile="on", dropout=0.1, n_layer=1)
    whole, parts = (
        compiled.override(out=tiny.run.out + "-whole"),
        compiled.override(out=tiny.run.out + "-parts"),
    )
    train(whole)
    with pytest.raises(Preempted):
        train(parts, StopAt(7))
    train(parts)
    assert rows_of(parts) == rows_of(whole)
    assert weights_hash(parts) == weights_hash(whole)


def test_compiled_and_recomputed_blocks_give_the_same_run(tiny: Config) -> None:
    if not runtime.pick_compile("auto", torch.device("cpu"))[0]:
        pytest.skip("needs a C++ compiler")
    short = tiny.override(steps=4, warmup_steps=1)
    train(short.override(out=tiny.run.out + "-eager"))
    for name, settings in {"blocks": {}, "recomputed": {"recompute": True}}.items():
        config = short.override(compile="blocks", out=f"{tiny.run.out}-{name}", **settings)
        train(config)
        for a, b in zip(
            rows_of(config), rows_of(short.override(out=tiny.run.out + "-eager")), strict=True
        ):
            assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-6)


@pytest.mark.guarantee("resume")
def test_resume_across_shard_and_epoch_ends_is_bit_exact(tiny: Config, tmp_path: Path) -> None:
    from anew import Tokenizer
    from anew.data import shards

    tokenizer = Tokenizer.named("bytes")
    text = tokenizer.encode(Path(tiny.data.data).read_text())
    folder = tmp_path / "data"
    folder.mkdir()
    writer = shards.SplitWriter(folder, "train", shard_tokens=301)  # 18 sequences a shard, 8 a step
    writer.write(torch.tensor(text[:1500]).numpy())
    shards.write_index(folder, "bytes", "test", "1", writer.close())
    whole = tiny.override(data=str(tmp_path / "data"), steps=30, out=tiny.run.out + "-whole")
    train(whole)
    parts = whole.override(out=tiny.run.out + "-parts")
    for stop in (
        2,
        3,
        11,
        23,
    ):  # inside a shard, just past its end, at and past the end of an epoch
        with pytest.raises(Preempted):
            train(parts, StopAt(stop))
    train(parts)
    assert rows_of(parts) == rows_of(whole)
    assert weights_hash(parts) == weights_hash(whole)


@pytest.mark.guarantee("gpt2")
def test_ten_steps_equal_transformers_with_torch_adamw(tiny: Config, tmp_path: Path) -> None:
    """The same model, tokens, rates and optimizer by other people's code: every loss and the
    golden ones agree.
    """
    from transformers import AutoModelForCausalLM

    from anew import Tokenizer
    from anew.checkpoint import huggingface as weights
    from anew.data.dataloader import DataLoader
    from anew.data.dataset import open_data
    from anew.optim.schedule import learning_rate_factor

    train(tiny)
    weights.save_model(tmp_path, anew.GPT(tiny.model, seed=tiny.run.seed), Tokenizer.named("bytes"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).train()
    matrices, vectors = (
        [p for p in model.parameters() if p.ndim > 1],
        [p for p in model.parameters() if p.ndim == 1],
    )
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8, foreach=False)
    batches = DataLoader(open_data(tiny.data.data, "bytes").splits["train"], 16, tiny.run.seed)
    for step, row in enumerate(metrics.read_metrics(tiny.folder)[:10]):
        ids = torch.from_numpy(batches.rows(step * 8, 8))
        logits = model(ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in adamw.param_groups:
            group["lr"] = tiny.optim.lr * learning_rate_factor(step, 12, tiny.optim)
        adamw.step()
        adamw.zero_grad()
        assert row["train/loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert row["train/grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        assert row["train/loss"] == pytest.approx(GOLDEN[step], rel=2e-5)


@pytest.mark.guarantee("resume")
@pytest.mark.parametrize("micro", [1, 2, 4])
def test_micro_batch_changes_neither_tokens_nor_loss(tiny: Config, micro: int) -> None:
    config = tiny.override(steps=50)
    one = config.override(out=tiny.run.out + "-one")
    other = config.override(micro_batch=micro, out=tiny.run.out + "-other")
    train(one), train(other)
    for a, b in zip(rows_of(one), rows_of(other), strict=True):
        assert b["train/loss"] == pytest.approx(a["train/loss"], rel=1e-6)
        assert a["tokens"] == b["tokens"]


@pytest.mark.guarantee("resume")
def test_every_micro_batch_size_reads_the_same_token_ids(tiny: Config) -> None:
    from anew.data.dataloader import DataLoader
    from anew.distributed.world import ALONE
    from anew.training.batches import batches_of_steps
    from anew.training.setup import start_run
    from anew.utils.signals import StopFlag

    seen = []
    for micro in range(1, 9):
        with contextlib.ExitStack() as stack:
            run = start_run(tiny.override(micro_batch=micro), ALONE, StopFlag(), stack)
            steps = [batch.micro_batches for batch in batches_of_steps(run, range(3, 6))]
        seen.append(
            [
                (
                    torch.cat([ids for ids, _ in micro_batches]).tolist(),
                    torch.cat([targets for _, targets in micro_batches]).tolist(),
                )
                for micro_batches in steps
            ]
        )
    assert all(s == seen[0] for s in seen)
    assert isinstance(run.batches, DataLoader)
    assert seen[0][0][0] == [row[:-1] for row in run.batches.rows(24, 8).tolist()]


@pytest.mark.guarantee("evidence")
def test_evaluation_and_sampling_do_not_affect_training(tiny: Config) -> None:
    quiet = tiny.override(dropout=0.3, out=tiny.run.out + "-quiet")
    busy = quiet.override(
        evaluate_every=2, sample_every=3, sample_tokens=40, save_every=1, out=tiny.run.out + "-busy"
    )
    a, b = train(quiet), train(busy)
    assert rows_of(quiet) == [r for r in rows_of(busy) if "train/loss" in r]
    assert weights_hash(quiet) == weights_hash(busy)
    assert a.val_loss == b.val_loss
    lines = [json.loads(line) for line in (busy.folder / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "text" in line] == [3, 6, 9, 12]
    assert [line["step"] for line in lines if "val/loss" in line] == [2, 4, 6, 8, 10, 12]
    assert "sample at step 3" in (busy.folder / "log.txt").read_text()
    assert len([r for r in metrics.read_metrics(busy.folder) if "val/loss" in r]) == 6


def test_validation_loss_equals_a_loop_over_transformers(tiny: Config) -> None:
    from transformers import AutoModelForCausalLM

    result = train(tiny)
    newest, _ = checkpoint.newest_valid(tiny.folder)
    assert newest is not None
    model = AutoModelForCausalLM.from_pretrained(newest, dtype=torch.float64).eval()
    text = Path(tiny.data.data).read_bytes()
    ids = torch.tensor([256, *text[len(text) * 9 // 10 :]])
    total, count = 0.0, 0
    for start in range(0, len(ids) - 1, 16):
        end = min(start + 16, len(ids) - 1)
        window = ids[max(0, end - 16) : end + 1]
        with torch.no_grad():
            logits = model(window[None, :-1]).logits[0, start - end :]
        total += torch.nn.functional.cross_entropy(
            logits, window[start - end :], reduction="sum"
        ).item()
        count += end - start
    assert result.val_loss == pytest.approx(total / count, rel=1e-6)
    assert count == len(ids) - 1


def test_step_that_is_not_finite_is_skipped_and_logged(
    tiny: Config, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules["anew.training.trainer"]  # `anew.train` is the function
    original = module.train_step
    calls: list[int] = []

    def poisoned(loss_of: LossFunction, *rest: Any, **more: Any) -> StepResult:
        calls.append(len(calls))
        bad = len(calls) == 4
        return original((lambda i, t: loss_of(i, t) * math.nan) if bad else loss_of, *rest, **more)

    monkeypatch.setattr(module, "train_step", poisoned)
    result = train(tiny)
    rows = metrics.read_metrics(tiny.folder)
    assert rows[3]["train/loss"] is None
    assert all(math.isfinite(r["train/loss"]) for i, r in enumerate(rows) if i != 3)
    assert "the step was skipped" in caplog.text
    assert result.val_loss is not None
    assert math.isfinite(result.val_loss)


def test_delayed_rows_are_all_written_in_order(
    tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU a row is written while the next step is computed: before anything that is saved,
    evaluated or ends the run.
    """
    module = sys.modules["anew.training.trainer"]
    made = DelayedRows.__init__

    def late(self: DelayedRows, *arguments: Any) -> None:
        made(self, *arguments)
        self.is_delayed = True

    settings = {"save_every": 4, "evaluate_every": 3, "keep": 0}
    usual = tiny.override(**settings, out=tiny.run.out + "-usual")
    train(usual)
    monkeypatch.setattr(DelayedRows, "__init__", late)
    delayed = tiny.override(**settings)
    behind: list[int] = []
    write = DelayedRows.write

    def counted(self: DelayedRows) -> None:
        behind.append(len(self.waiting))
        write(self)

    monkeypatch.setattr(DelayedRows, "write", counted)
    for stop in (2, 7):
        with pytest.raises(Preempted):
            train(delayed, StopAt(stop))
    train(delayed)
    assert 1 in behind
    assert max(behind) == 1
    assert rows_of(delayed) == rows_of(usual)
    order = [
        json.loads(line) for line in (delayed.folder / "metrics.jsonl").read_text().splitlines()
    ]
    for i, row in enumerate(order):
        if "val/loss" in row:
            assert order[i - 1]["step"] == row["step"], "a validation follows the row of its step"

    step = module.train_step

    def failing(loss_of: LossFunction, state: TrainState, *rest: Any, **more: Any) -> StepResult:
        if state.step == 5:
            raise RuntimeError("the device is gone")
        return step(loss_of, state, *rest, **more)

    monkeypatch.setattr(module, "train_step", failing)
    with pytest.raises(RuntimeError, match="the device is gone"):
        train(tiny.override(out=tiny.run.out + "-failed"))
    assert metrics.read_metrics(tiny.override(out=tiny.run.out + "-failed").folder)[-1]["step"] == 5


def test_ten_skipped_steps_in_a_row_end_the_run(
    tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules["anew.training.trainer"]
    original = module.train_step
    monkeypatch.setattr(
        module,
        "train_step",
        lambda loss_of, *rest, **more: original(
            lambda i, t: loss_of(i, t) * math.inf, *rest, **more
        ),
    )
    with pytest.raises(RuntimeError, match="10 steps in a row"):
        train(tiny)


def test_interrupted_accumulation_leaves_the_state_unchanged(tiny: Config) -> None:
    state = TrainState(tiny, runtime.set_up_device(tiny.run), "")
    stop, ids = StopFlag(), torch.arange(8)[None]
    before = [p.clone() for p in state.parameters]

    def loss_of(i: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        stop.set()  # arrives while the first of two micro-batches is computed
        return state.model(i, t)

    assert train_step(loss_of, state, [(ids, ids)] * 2, 1.0, stop).stop
    assert all(torch.equal(a, b) for a, b in zip(before, state.parameters, strict=True))
    assert all(p.grad is None for p in state.parameters)


SIGNAL_IN_THE_FIRST_STEP = """
import os, signal, sys
from pathlib import Path

from anew.config.config import Config
from anew.training import trainer

def signalled(*arguments, **named):
    os.kill(os.getpid(), signal.SIGTERM)
    return original(*arguments, **named)

original = trainer.train_step
trainer.train_step = signalled
trainer.train(Config.read(Path(sys.argv[1])))
"""


@pytest.mark.skipif(os.name == "nt", reason="SIGTERM of Windows cannot be sent to oneself")
def test_signal_before_the_first_step_ends_the_process_as_usual(
    tiny: Config, tmp_path: Path
) -> None:
    """Nothing can be lost then; the same command begins again."""
    config = tmp_path / "config.json"
    config.write_text(tiny.to_json())
    command = [sys.executable, "-c", SIGNAL_IN_THE_FIRST_STEP, str(config)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGTERM
    assert checkpoint.list_checkpoints(tiny.folder) == []
    assert train(tiny).step == 12


def test_other_settings_in_a_run_folder_are_refused_by_name(tiny: Config) -> None:
    train(tiny)
    with pytest.raises(UserError, match="seed: 1337 -> 5"):
        train(tiny.override(seed=5))
    again = train(tiny.override(micro_batch=4, save_every=3))
    assert again.step == 12
    assert math.isfinite(again.train_loss)


def test_changed_training_text_is_refused(tiny: Config, tmp_path: Path) -> None:
    text = tmp_path / "mine.txt"
    text.write_text("one text, " * 300)
    config = tiny.override(data=str(text))
    with pytest.raises(Preempted):
        train(config, StopAt(4))
    text.write_text("another text, " * 300)
    with pytest.raises(UserError, match="is not the one that"):
        train(config)


@pytest.mark.guarantee("durable")
def test_resume_falls_back_past_damaged_checkpoints_bit_for_bit(tiny: Config) -> None:
    config = tiny.override(save_every=4)
    train(config)
    rows, final = rows_of(config), weights_hash(config)
    for step in (12, 8):
        path = checkpoint.checkpoint_folder(config.folder, step) / (
            "model.safetensors" if step == 12 else "optimizer.safetensors"
        )
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 16
        path.write_bytes(raw)
    train(config)
    assert "resumed from step-00000004" in (config.folder / "log.txt").read_text()
    assert rows_of(config) == rows
    assert weights_hash(config) == final
    for folder in checkpoint.list_checkpoints(config.folder):
        (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match="no valid checkpoint"):
        train(config)


def test_init_takes_shape_and_weights_of_the_model(tiny: Config) -> None:
    train(tiny)
    tuned = tiny.override(
        init=tiny.run.out,
        n_layer=9,
        n_embd=900,
        lr=1e-9,
        min_lr=0.0,
        steps=3,
        warmup_steps=1,
        out=tiny.run.out + "-tuned",
    )
    train(tuned)
    a, b = (anew.GPT.from_pretrained(c.run.out) for c in (tiny, tuned))
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)
    assert Config.read(tuned.folder / "config.json").model.n_layer == 2


def test_padding_rows_are_not_saved_and_stay_zero(tiny: Config) -> None:
    from safetensors.torch import load_file

    train(tiny.override(optimizer="muon"))
    newest, _ = checkpoint.newest_valid(tiny.folder)
    assert newest is not None
    assert load_file(newest / "model.safetensors")["transformer.wte.weight"].shape == (257, 32)
    assert load_file(newest / "optimizer.safetensors")["exp_avg.transformer.wte.weight"].shape == (
        257,
        32,
    )
    assert (anew.GPT.from_pretrained(tiny.run.out).transformer.wte.weight[257:] == 0).all()


def test_dropout_seeds_differ_between_passes() -> None:
    seeds = {
        dropout_seed(seed, step, micro, rank)
        for seed in (0, 1, 2**62)
        for step in range(30)
        for micro in range(6)
        for rank in range(4)
    }
    assert len(seeds) == 3 * 30 * 6 * 4
    assert all(0 <= s < 2**63 for s in seeds)


def test_tensorboard_has_scalars_settings_and_texts(tiny: Config) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tiny.override(sample_every=6))
    events = EventAccumulator(str(tiny.folder / "tensorboard"))
    events.Reload()
    assert len(events.Scalars("train/loss")) == 12
    assert events.Scalars("train/loss")[-1].value == pytest.approx(
        metrics.last_train_loss(tiny.folder), rel=1e-6
    )
    tags = events.Tags()["tensors"]
    assert any("sample" in tag for tag in tags)
    assert any("settings" in tag for tag in tags)
    assert len(list((tiny.folder / "tensorboard").iterdir())) == 1


def test_tensorboard_of_a_resumed_run_keeps_earlier_steps(tiny: Config) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(Preempted):
        train(tiny, StopAt(5))
    train(tiny)
    events = EventAccumulator(str(tiny.folder / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss")] == list(range(1, 13))


def test_training_from_python_needs_no_command_line_packages(tiny: Config, tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "for name in ('tyro', 'rich', 'loguru', 'tensorboard', 'transformers'): sys.modules[name] "
        "= None\n"
        "import anew\n"
        "from pathlib import Path\n"
        f"anew.train(anew.Config.read(Path({str(tmp_path / 'config.json')!r})))\n"
    )
    (tmp_path / "config.json").write_text(tiny.override(steps=3).to_json())
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "TensorBoard is not installed" in (tiny.folder / "log.txt").read_text()


def test_real_shakespeare_trains_with_gpt2_tokens(tiny: Config) -> None:
    path = shared("tinyshakespeare/input.txt")
    config = tiny.override(data=str(path), tokenizer="gpt2", vocab_size=50257, steps=6, n_embd=16)
    result = train(config)
    assert result.val_loss is not None
    assert 9 < result.val_loss < 10.9  # a little under ln 50257 = 10.82


def test_profile_records_the_requested_steps(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny(tmp_path / "run", steps=8, profile=3)
    train(config)
    events = json.loads((config.folder / "trace.json").read_text())["traceEvents"]
    steps = {e["name"] for e in events if e.get("name", "").startswith("ProfilerStep#")}
    assert steps == {"ProfilerStep#2", "ProfilerStep#3", "ProfilerStep#4"}
    assert any(e.get("name") == "aten::mm" for e in events)
    assert "profile of 3 steps" in caplog.text
    train(tiny(tmp_path / "short", steps=2, warmup_steps=1, profile=3))
    assert "no profile was written" in caplog.text


def test_garbage_collector_is_off_during_steps(tmp_path: Path) -> None:
    seen = []
    train(tiny(tmp_path / "run", steps=2, warmup_steps=1), lambda row: seen.append(gc.isenabled()))
    assert seen == [False, False]
    assert gc.isenabled()


def test_run_in_its_constant_phase_may_become_longer(tiny: Config) -> None:
    constant = tiny.override(schedule="linear", min_lr=0.0, decay_share=0.2, warmup_steps=2)
    whole = train(constant.override(steps=40, save_every=20, out=str(tiny.folder / "whole")))
    run = constant.override(steps=20, save_every=10, keep=0, out=str(tiny.folder / "extended"))
    train(run)
    shutil.rmtree(run.folder / "checkpoints" / "step-00000020")  # it was decaying then
    longer = train(run.override(steps=40))
    assert longer.train_loss == whole.train_loss


def test_run_whose_rate_has_followed_its_plan_cannot_become_longer(tiny: Config) -> None:
    train(tiny)
    with pytest.raises(UserError, match=r"was planned for 12 steps.*--init .* --out NEW"):
        train(tiny.override(steps=24))
    with pytest.raises(UserError, match="has taken 12 steps already"):
        train(tiny.override(steps=6))


def test_finetuning_takes_the_length_of_a_sequence_from_its_model(
    tiny: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny)
    arguments = ["--init", str(tiny.folder), "--data", tiny.data.data, "--batch-tokens", "64"]
    arguments += ["--steps", "2", "--out", str(tmp_path / "tuned"), "--compile", "off"]
    main(["train", "finetune", *arguments])
    assert "2 steps, 128 tokens" in capsys.readouterr().out


def test_training_from_python_writes_the_page_of_the_run(tiny: Config) -> None:
    anew.train(tiny)
    assert f"<title>{tiny.folder.name}</title>" in (tiny.folder / "report.html").read_text()


def test_something_else_than_a_config_is_refused() -> None:
    with pytest.raises(UserError, match=r"anew\.recipe"):
        anew.train("shakespeare")  # type: ignore[arg-type]
