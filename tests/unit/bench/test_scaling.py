"""The ladder of sizes: which runs it consists of, and which requests are refused."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from anew.bench import scaling as scaling_runs
from anew.bench.scaling import (
    DEFAULT_SIZES,
    TUNED_WIDTH,
    TUNING,
    ArmResult,
    Experiment,
    Ladder,
    Size,
    SizeResult,
    parse_sizes,
)
from anew.bench.sweep import Trial, TrialResult
from anew.bench.time_to_loss import TUNING_SEED
from anew.cli.scaling import scaling
from anew.config.config import Config
from anew.config.recipes import read_recipe
from anew.config.schema import GPTConfig
from anew.errors import UserError
from anew.model.flops import flops_per_token
from anew.model.gpt import GPT
from anew.report import png
from anew.utils.signals import StopFlag

SEEDS = (1, 2)


@pytest.fixture
def config() -> Config:
    return read_recipe("gpt2-1m").override(device="cpu")


@pytest.fixture
def ladder() -> Ladder:
    return Ladder(parse_sizes(DEFAULT_SIZES), tokens_per_parameter=10.0, seeds=SEEDS)


def arguments(**given: Any) -> Any:
    usual = {"sizes": "1x32,2x32,3x32", "tokens_per_parameter": 1.0, "seeds": 1}
    return SimpleNamespace(
        **{**usual, "over": "", "minutes": 0.0, "jobs": 1, "picture": "", **given}
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("2x64", "three sizes or more"),
        ("2x64,2x64,2x64", "three sizes or more"),
        ("2x64,3x96,small", "'small' is no size"),
        ("2x64,3x96,4x100", "must be a multiple of 32"),
        ("2x64,3x96,8x544", "must be a multiple of 64"),
    ],
)
def test_sizes_that_cannot_be_trained_are_refused(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse_sizes(text)


@pytest.mark.parametrize(
    ("given", "flags", "words"),
    [
        ({"over": "optimiser=adamw,muon"}, (), "no setting 'optimiser'; did you mean optimizer"),
        ({"over": "optimizer"}, (), "is not a setting with values"),
        ({"over": "optimizer=adamw"}, (), "two to 4 different values"),
        ({"over": "lr=1e-3,2e-3 seed=1,2"}, (), "one setting with its values"),
        ({"over": "n_layer=2,3"}, (), "n_layer differs from run to run anyway"),
        ({"over": "seq_len=64,128"}, (), "losses with another seq_len cannot be compared"),
        ({"over": "optimizer=adamw,moun"}, (), "optimizer is 'moun'"),
        ({}, ("steps",), "--steps is a setting in which the runs differ"),
        ({"seeds": 0}, (), "--seeds 0 must be at least 1"),
        ({"tokens_per_parameter": 0.0}, (), "must be above 0"),
        ({"tokens_per_parameter": math.nan}, (), "must be above 0"),
    ],
)
def test_requests_without_a_comparison_are_refused(
    config: Config, given: dict[str, Any], flags: tuple[str, ...], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        scaling(config, "cpu", arguments(**given), flags)


def test_runs_have_their_tokens_and_end_with_their_schedule(config: Config, ladder: Ladder) -> None:
    for size in ladder.sizes:
        run = ladder.config_at(config, size, seed=1, tuned={})
        parameters = sum(parameter.numel() for parameter in GPT(run.model).parameters())
        assert run.total_tokens == pytest.approx(10 * parameters, rel=0.01)
        assert run.model.head_dim == 32
        assert run.optim.warmup_steps == pytest.approx(0.0375 * run.run.steps, abs=1)
        assert run.data == config.data
    assert Size(12, 768).n_head == 12, "GPT-2 124M"


def test_learning_rates_fall_with_the_square_root_of_the_width(
    config: Config, ladder: Ladder
) -> None:
    narrow = ladder.config_at(config, Size(2, 64), seed=1, tuned={})
    wide = ladder.config_at(config, Size(2, 256), seed=1, tuned={})
    assert narrow.optim.lr == pytest.approx(2 * wide.optim.lr)
    assert narrow.optim.muon_lr == pytest.approx(2 * wide.optim.muon_lr)
    own_width = ladder.config_at(config, Size(2, config.model.n_embd), seed=1, tuned={})
    assert own_width.optim.lr == pytest.approx(config.optim.lr)
    tuned = TUNING["muon"][0]
    as_tuned = ladder.config_at(config, Size(2, TUNED_WIDTH), 1, tuned)
    assert as_tuned.optim.lr == pytest.approx(tuned["lr"])
    assert as_tuned.optim.muon_lr == pytest.approx(tuned["muon_lr"])


def test_arms_differ_in_the_change_and_what_is_tuned(config: Config, ladder: Ladder) -> None:
    """Each arm reads the same tokens for a seed, and tuning uses a seed that no run uses."""
    arms = {name: config.override(optimizer=name) for name in ("adamw", "muon")}
    experiment = Experiment(ladder, arms)
    runs = {arm: experiment.trials(arm, TUNING[arm][0]) for arm in arms}
    tuned = {"optimizer", *TUNING["adamw"][0], *TUNING["muon"][0]}
    for adamw, muon in zip(runs["adamw"], runs["muon"], strict=True):
        names = {line.split(":")[0] for line in adamw.config.differences(muon.config)}
        assert names == {*tuned} - {"min_lr"} - same_rates(adamw.config, muon.config)
    assert [trial.config.run.seed for trial in runs["muon"]] == [1, 2] * 6
    for arm in arms:
        trials = [trial for _, trial in experiment.tuning_trials(arm)]
        assert {trial.config.run.seed for trial in trials} == {TUNING_SEED}
        assert len({trial.name for trial in trials}) == len(TUNING[arm])
    assert TUNING_SEED not in SEEDS


def same_rates(one: Config, other: Config) -> set[str]:
    names = ("lr", "wte_lr", "muon_lr")
    return {name for name in names if one.value(name) == other.value(name)}


def run_with(
    experiment: Experiment,
    loss_of: Callable[[Trial], float],
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> list[ArmResult]:
    """Run the experiment with losses that are given instead of trained."""

    def results(trials: list[Trial], *_: Any) -> dict[str, TrialResult]:
        return {
            trial.name: TrialResult(
                out, trial.config, trial.config.total_tokens, 1.0, loss_of(trial)
            )
            for trial in trials
        }

    monkeypatch.setattr(scaling_runs, "run_trials", results)
    return experiment.run(out, StopFlag(), print)


def test_sizes_collect_their_own_seeds_and_the_best_tuning(
    config: Config, ladder: Ladder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    best_rate = ladder.config_at(config, ladder.sizes[0], 0, TUNING["muon"][1]).optim.muon_lr

    def loss_of(trial: Trial) -> float:
        run = trial.config
        if run.run.seed == TUNING_SEED:
            return abs(run.optim.muon_lr - best_rate)
        return run.model.n_layer * run.model.n_embd + run.run.seed / 10

    [arm] = run_with(Experiment(ladder, {"a": config}), loss_of, tmp_path, monkeypatch)
    assert arm.tuned == TUNING["muon"][1]
    for size in arm.sizes:
        product = size.size.n_layer * size.size.n_embd
        assert size.losses == (product + 0.1, product + 0.2)
        shape = GPTConfig(size.size.n_layer, 1, size.size.n_embd, vocab_size=257)
        assert size.flops == size.tokens * flops_per_token(shape, 128)


def test_a_run_that_diverged_is_named(
    config: Config, ladder: Ladder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loss_of(trial: Trial) -> float:
        return math.inf if trial.name == "a-3x96-seed-2" else 1.0

    with pytest.raises(UserError, match=r"a-3x96-seed-2 diverged"):
        run_with(Experiment(ladder, {"a": config}), loss_of, tmp_path, monkeypatch)


def exact_arm(name: str, constant: float, last_loss: float = 0.0) -> ArmResult:
    """Return an arm whose losses follow constant x FLOPs^-0.08, but for the last one if given."""
    sizes = []
    for layers, flops in zip((2, 3, 12, 24), (1e12, 1e13, 1e16, 1e18), strict=True):
        loss = constant * flops**-0.08 * (1 + 0.01 * (-1) ** layers)
        size = Size(layers, 32 * layers)
        parameters = 12 * layers * size.n_embd**2
        sizes.append(SizeResult(size, parameters, 10 * parameters, flops, (loss, loss)))
    if last_loss:
        sizes[-1] = dataclasses.replace(sizes[-1], losses=(last_loss, last_loss))
    return ArmResult(name, {"lr": 1e-3, "wte_lr": 0.006, "warmup_share": 0.1}, sizes)


def facts_of(
    config: Config, tmp_path: Path, arms: list[ArmResult], monkeypatch: pytest.MonkeyPatch
) -> Any:
    monkeypatch.setattr(Experiment, "run", lambda *_: arms)
    out = tmp_path / "out"
    out.mkdir()
    over = arguments(over="optimizer=adamw,muon")
    return scaling(config.override(out=str(out)), "cpu", over)


def test_law_multiplier_and_prediction_are_printed_in_80_columns(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    ratio = 2.5
    arms = [
        exact_arm("optimizer=adamw", 20.0),
        exact_arm("optimizer=muon", 20.0 * ratio**-0.08, last_loss=1.5),
    ]
    facts = facts_of(config, tmp_path, [arms[0], exact_arm("m", 20.0 * ratio**-0.08)], monkeypatch)
    [found] = facts["multipliers"]
    assert [at["value"] for at in found["at"]] == pytest.approx([ratio] * 3, rel=0.02)
    assert all(at["low"] < ratio < at["high"] for at in found["at"])
    (tmp_path / "out").rename(tmp_path / "first")
    facts = facts_of(config, tmp_path, arms, monkeypatch)
    assert [arm["left_out"]["within"] for arm in facts["arms"]] == [True, False]
    shown = capsys.readouterr().out.rpartition("runs in")[2].partition("\n")[2]
    assert "measured 1.5000: OUTSIDE" in shown
    assert all(len(line) <= 80 for line in shown.splitlines()), shown


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        (exact_arm("m", 200.0), "no measured loss in common"),
        (exact_arm("m", 20.0, last_loss=1.5), "may be flat within its error"),
    ],
)
def test_no_multiplier_is_extrapolated(
    config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    second: ArmResult,
    reason: str,
) -> None:
    facts = facts_of(config, tmp_path, [exact_arm("a", 20.0), second], monkeypatch)
    assert facts["multipliers"] == [{"of": "m", "to": "a", "at": []}]
    assert reason in capsys.readouterr().out


def test_picture_has_both_arms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(png, "_save", lambda figure, _: figures.append(figure))
    line = [(1e12, 2.0), (1e13, 1.5)]
    arms = [("adamw", line, line), ("muon", line, line)]
    png.loss_over_compute(arms, "gpt2-1m on stdlib", "byte", tmp_path / "picture.png")
    [axes] = figures[0].axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["adamw", "muon"]
    assert len(axes.collections) == 2
