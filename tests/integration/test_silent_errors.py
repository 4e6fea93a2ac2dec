"""`--check-every` notices flipped bits before anything is saved; without it they are saved."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from anew import Config, UserError
from anew.checkpoint.folder import list_checkpoints, newest_valid
from anew.errors import ComputedWrongly, Preempted
from anew.training import silent_errors, trainer
from anew.training.silent_errors import GradientCheck
from anew.training.step import train_step
from anew.training.trainer import train
from tests.faults.common import tiny
from tests.support.ranks import run_ranks

WEIGHT = "transformer.h.1.mlp.c_fc.weight"
STEPS, SAVE_EVERY, CHECK_EVERY = 24, 8, 4


def checked(out: Path, **settings: Any) -> Config:
    fixed = {"steps": STEPS, "save_every": SAVE_EVERY, "evaluate_every": 0}
    return tiny(out, **{**fixed, "check_every": CHECK_EVERY, **settings})


def weights_of(config: Config) -> bytes:
    folder, _ = newest_valid(config.folder)
    assert folder is not None
    return (folder / "model.safetensors").read_bytes()


def flip(tensor: Tensor, bit: int = 20) -> None:
    """Flip one bit of the fraction of the first number, which changes it by an eighth or less."""
    with torch.no_grad():
        tensor.view(-1)[:1].view(torch.int32).bitwise_xor_(1 << bit)


def trained_with_a_flip(
    config: Config, place: str, step: int, rank: int = 0, times: int = 1
) -> Any:
    """Train, and flip one bit on one rank: in a weight or a moment after `step` steps, or in a
    gradient of that step, in the pass before it ("gradient") or in its own ("gradient of step").
    "loss" makes the loss of the pass before that step slightly wrong.

    A run that comes to this step again has another flip there, up to `times` in all.
    """
    flips: list[int] = []

    def is_due(state: Any) -> bool:
        if state.world.rank != rank or len(flips) == times:
            return False
        flips.append(state.step)
        return True

    def weight_of(state: Any) -> Tensor:
        return dict(state.model.named_parameters())[WEIGHT]

    def step_with_flip(loss_of: Any, state: Any, *rest: Any, **more: Any) -> Any:
        def take_step() -> Any:
            return train_step(loss_of, state, *rest, **more)

        if place == "gradient of step" and state.step == step and is_due(state):
            return with_flipped_gradient(state, take_step)
        result = take_step()
        if place in ("weight", "moment") and state.step + 1 == step and is_due(state):
            weight = weight_of(state)
            if place == "weight":
                flip(weight)
            else:
                flip(state._optimizer_of(weight).state[weight]["exp_avg"])
        return result

    def with_flipped_gradient(state: Any, compute: Callable[[], Any]) -> Any:
        handle = weight_of(state).register_hook(_flipped)
        result = compute()
        handle.remove()
        return result

    original = GradientCheck._run_pass

    def pass_with_flip(check: Any, loss_of: Any, *rest: Any) -> None:
        def slightly_wrong_loss(*batch: Any) -> Any:
            return loss_of(*batch) * (1 + 2**-20)

        state = check.state
        if place == "gradient" and state.step == step and is_due(state):
            with_flipped_gradient(state, lambda: original(check, loss_of, *rest))
        elif place == "loss" and state.step == step and is_due(state):
            original(check, slightly_wrong_loss, *rest)
        else:
            original(check, loss_of, *rest)

    with (
        patch.object(trainer, "train_step", step_with_flip),
        patch.object(GradientCheck, "_run_pass", pass_with_flip),
    ):
        return train(config).step


def _flipped(gradient: Tensor) -> Tensor:
    changed = gradient.clone()
    flip(changed)
    return changed


def test_checks_do_not_change_a_run(tmp_path: Path) -> None:
    with_checks = checked(tmp_path / "checked", dropout=0.1)
    without = checked(tmp_path / "plain", dropout=0.1, check_every=0)
    assert train(with_checks).train_loss == train(without).train_loss
    assert weights_of(with_checks) == weights_of(without)


@pytest.mark.parametrize("place", ["gradient", "gradient of step"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_flipped_gradient_is_noticed_and_the_run_continues(
    micro_batches: int, place: str, tmp_path: Path
) -> None:
    settings = {"batch_tokens": 16 * 4 * micro_batches, "micro_batch": 4}
    config = checked(tmp_path / "run", **settings)
    with pytest.raises(ComputedWrongly) as caught:
        trained_with_a_flip(config, place, step=12)
    assert "step 13: rank 0 has computed one micro-batch twice" in str(caught.value)
    assert f"the gradient of {WEIGHT}." in str(caught.value)
    assert [path.name for path in list_checkpoints(config.folder)] == ["step-00000008"]
    assert train(config).step == STEPS
    undisturbed = checked(tmp_path / "other", **settings)
    train(undisturbed)
    assert weights_of(config) == weights_of(undisturbed)


@pytest.mark.parametrize("place", ["weight", "moment"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_flipped_bit_on_one_rank_is_noticed_before_a_save(
    place: str, ranks: int, tmp_path: Path
) -> None:
    config = checked(tmp_path / "run", batch_tokens=16 * 4 * 6)
    found = run_ranks(ranks, trained_with_a_flip, config, place, 14, ranks - 1)
    assert [kind for kind, _ in found] == ["ComputedWrongly"] * ranks, found
    name = WEIGHT if place == "weight" else f"exp_avg.{WEIGHT}"
    who = "ranks 0 and 1 differ" if ranks == 2 else "rank 2 differs from the others"
    for _, text in found:
        assert text.startswith(f"step 16: {who} in ")
        assert name in text
    assert [path.name for path in list_checkpoints(config.folder)] == ["step-00000008"]


@pytest.mark.parametrize("place", ["gradient", "gradient of step"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_flipped_gradient_on_one_rank_is_named_on_all(
    micro_batches: int, place: str, tmp_path: Path
) -> None:
    config = checked(tmp_path / "run", batch_tokens=16 * 8 * micro_batches, micro_batch=4)
    found = run_ranks(2, trained_with_a_flip, config, place, 12, 1)
    assert [kind for kind, _ in found] == ["ComputedWrongly"] * 2, found
    assert all("step 13: rank 1 has computed" in text for _, text in found)


def test_wrong_pass_of_a_sharded_model_is_noticed(tmp_path: Path) -> None:
    """FSDP adds the error of rank 1 to gradients on both ranks, so no rank is named."""
    config = checked(tmp_path / "run", parallel="fsdp")
    found = run_ranks(2, trained_with_a_flip, config, "loss", 12, 1)
    assert [kind for kind, _ in found] == ["ComputedWrongly"] * 2, found
    assert all("step 13: some rank has computed one micro-batch twice" in text for _, text in found)
    assert [path.name for path in list_checkpoints(config.folder)] == ["step-00000008"]


@pytest.mark.parametrize(("place", "ranks"), [("gradient", 1), ("gradient", 2), ("weight", 2)])
def test_rollback_continues_with_the_weights_of_an_undisturbed_run(
    place: str, ranks: int, tmp_path: Path
) -> None:
    config = checked(tmp_path / "run", on_corruption="rollback")
    step = 12 if place == "gradient" else 14
    found = run_ranks(ranks, trained_with_a_flip, config, place, step, ranks - 1)
    assert found == [("ok", STEPS)] * ranks
    log = (config.folder / "log.txt").read_text()
    assert "ERROR stopped: step " in log
    assert "resumed from step-00000008" in log
    undisturbed = checked(tmp_path / "other")
    run_ranks(ranks, trained_with_a_flip, undisturbed, "nothing", 0)
    assert weights_of(config) == weights_of(undisturbed)


def test_rollback_ends_if_the_same_step_is_wrong_again(tmp_path: Path) -> None:
    config = checked(tmp_path / "run", on_corruption="rollback")
    with pytest.raises(ComputedWrongly) as caught:
        trained_with_a_flip(config, "gradient", step=12, times=2)
    assert caught.value.step == 13
    assert (config.folder / "log.txt").read_text().count("resumed from step-00000008") == 1


def test_request_to_stop_is_not_lost_by_a_rollback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal arrives just before the difference is found, so no step has seen it."""
    config = checked(tmp_path / "run", on_corruption="rollback")
    original = GradientCheck.refuse_differences

    def stop_and_check(check: Any) -> None:
        if check.step == 13:
            os.kill(os.getpid(), signal.SIGTERM)
        original(check)

    monkeypatch.setattr(GradientCheck, "refuse_differences", stop_and_check)
    with pytest.raises(Preempted, match="stopped at step 8 of 24"):
        trained_with_a_flip(config, "gradient", step=12)
    monkeypatch.undo()
    assert train(config).step == STEPS


@pytest.mark.parametrize(("parallel", "micro_batch"), [("ddp", 4), ("ddp", 8), ("fsdp", 4)])
def test_checks_do_not_change_a_run_of_two_ranks(
    parallel: str, micro_batch: int, tmp_path: Path
) -> None:
    """With 8 sequences in a micro-batch, each rank has one micro-batch a step."""
    settings = {"parallel": parallel, "micro_batch": micro_batch}
    runs = [checked(tmp_path / str(every), check_every=every, **settings) for every in (0, 4)]
    for config in runs:
        assert [kind for kind, _ in run_ranks(2, trained_with_a_flip, config, "nothing", 0)] == [
            "ok"
        ] * 2
    assert weights_of(runs[0]) == weights_of(runs[1])


@pytest.mark.parametrize("place", ["weight", "moment"])
def test_without_checks_a_flipped_bit_is_saved(place: str, tmp_path: Path) -> None:
    config = checked(tmp_path / "run", check_every=0)
    found = run_ranks(2, trained_with_a_flip, config, place, 14, 0)
    assert [kind for kind, _ in found] == ["ok"] * 2, found
    undisturbed = checked(tmp_path / "other", check_every=0)
    run_ranks(2, trained_with_a_flip, undisturbed, "nothing", 0)
    assert weights_of(config) != weights_of(undisturbed)


def test_every_single_flipped_bit_changes_the_sum() -> None:
    tensor = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    before = silent_errors.bit_sums([("x", tensor)])
    for bit in range(31):
        changed = tensor.clone()
        flip(changed, bit)
        assert silent_errors.bit_sums([("x", changed)]) != before, bit
    assert silent_errors.bit_sums([("x", tensor.clone())]) == before


@pytest.mark.parametrize(("device", "deterministic"), [("cuda", True), ("cpu", False)])
def test_gpu_needs_deterministic_kernels(device: str, deterministic: bool) -> None:
    def state(device: str, deterministic: bool) -> Any:
        run = SimpleNamespace(deterministic=deterministic)
        return SimpleNamespace(
            runtime=SimpleNamespace(device=torch.device(device)), config=SimpleNamespace(run=run)
        )

    check: Callable[[Any], None] = silent_errors.refuse_inexact_devices
    check(state(device, deterministic))
    with pytest.raises(UserError, match="on cuda they are equal only with --deterministic"):
        check(state("cuda", False))
