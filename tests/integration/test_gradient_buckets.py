"""The exchange of gradients between ranks: its sums, its order, and when it starts."""

import functools
import json
import os
import signal
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from anew import GPT, GPTConfig
from anew.checkpoint import folder as checkpoint
from anew.distributed.gradient_buckets import GradientBuckets, gradient_groups
from anew.distributed.rendezvous import joined
from anew.errors import Preempted
from anew.evaluate.tasks.registry import TASKS
from anew.evaluate.tasks.task import Remote
from anew.training import step as step_module
from anew.training import trainer
from anew.training.step import clip_gradients, train_step
from anew.training.trainer import train
from anew.utils.files import sha256_of
from anew.utils.signals import signal_this_process
from tests.faults.common import final, losses, tiny
from tests.support.models import gradient_of
from tests.support.ranks import run_ranks

SHAPE = GPTConfig(n_layer=4, n_head=2, n_embd=32, n_positions=16, vocab_size=257)
MICRO_BATCHES = 2


def ok(found: list[tuple[str, Any]]) -> list[Any]:
    assert [status for status, _ in found] == ["ok"] * len(found), found
    return [value for _, value in found]


def compute_gradients(model: GPT, buckets: GradientBuckets | None, rank: int) -> None:
    for micro_batch in range(MICRO_BATCHES):
        generator = torch.Generator().manual_seed(100 * rank + micro_batch)
        ids = torch.randint(257, (2, 16), generator=generator)
        if buckets is not None and micro_batch == MICRO_BATCHES - 1:
            buckets.start_when_ready()
        model(ids, ids.roll(-1, 1)).backward()


def mean_gradients_of_a_rank() -> tuple[list[list[float]], list[list[float]]]:
    """What the buckets make of the gradients, and the mean of what each rank computes without
    buckets.
    """
    with joined("cpu", 30) as world:
        model = GPT(SHAPE, seed=2)
        buckets = GradientBuckets(gradient_groups(model), world)
        for _ in range(2):  # the second step reuses the buffers of the first
            buckets.start_step()
            compute_gradients(model, buckets, world.rank)
            buckets.all_reduce()
        found = [gradient_of(p).flatten().tolist() for p in model.parameters()]
        alone = GPT(SHAPE, seed=2)
        compute_gradients(alone, None, world.rank)
        every = world.gather([gradient_of(p) for p in alone.parameters()])
        means = [torch.stack(parts).double().mean(0) for parts in zip(*every, strict=True)]
        return found, [mean.flatten().tolist() for mean in means]


def test_gradients_are_the_mean_over_ranks() -> None:
    found = ok(run_ranks(3, mean_gradients_of_a_rank))
    for gradients, expected in found:
        for gradient, mean in zip(gradients, expected, strict=True):
            torch.testing.assert_close(
                torch.tensor(gradient), torch.tensor(mean), rtol=1e-5, atol=1e-7
            )
        assert gradients == found[0][0], "all ranks have the same bits"


def started_during_backward(kind: str) -> list[tuple[int, int]]:
    """(bucket, blocks whose gradients were complete) at each start of a bucket."""
    with joined("cpu", 60) as world:
        model = GPT(SHAPE, seed=2)
        if kind == "blocks":
            for block in model.transformer.h:
                block.compile(dynamic=False, backend="aot_eager")
        buckets = GradientBuckets(gradient_groups(model), world)
        started: list[tuple[int, int]] = []
        start_next = buckets._start_next

        def watched() -> None:
            complete = sum(count == 0 for count in buckets.missing)
            started.append((len(buckets.started), complete))
            start_next()

        buckets._start_next = watched  # type: ignore[method-assign]  # for this object only
        buckets.start_step()
        compute_gradients(model, buckets, world.rank)
        before_the_end = len(started)
        buckets.all_reduce()
        assert before_the_end == len(buckets.groups), "the backward pass starts every bucket"
        return started


@pytest.mark.parametrize("kind", ["eager", "blocks"])
def test_bucket_starts_when_its_block_is_complete(kind: str) -> None:
    """With the model compiled as one graph, all gradients would become complete together, at the
    end.
    """
    found = ok(run_ranks(2, started_during_backward, kind))
    expected = [(bucket, bucket + 1) for bucket in range(SHAPE.n_layer + 1)]
    assert found == [expected, expected]


def gradients_when_clipped(step: int, run: Path, precision: str) -> list[tuple[bool, str]]:
    """Stop rank 1 before its first micro-batch of `step`;

    (has every parameter a gradient?, its device) when gradients are clipped.
    """
    seen: list[tuple[bool, str]] = []

    def stopped(
        loss_of: Any,
        state: Any,
        micro_batches: Any,
        rate: float,
        stop: Any,
        *rest: Any,
        **more: Any,
    ) -> Any:
        if state.step == step and state.world.rank == 1:
            stop.set()
        return train_step(loss_of, state, micro_batches, rate, stop, *rest, **more)

    def watched(state: Any) -> Any:
        if state.step == step:
            seen.append(
                (
                    all(p.grad is not None for p in state.parameters),
                    str(gradient_of(state.parameters[0]).device),
                )
            )
        return clip_gradients(state)

    words = f"stopped at step {step} of 12" if step else "stopped"
    with (
        patch.object(trainer, "train_step", stopped),
        patch.object(step_module, "clip_gradients", watched),
        pytest.raises(Preempted, match=words),
    ):
        train(tiny(run, precision=precision, steps=12))
    return seen


def test_rank_without_a_micro_batch_has_zero_gradients(tmp_path: Path) -> None:
    """Without any gradient, the norm would be a zero on the CPU, which CUDA refuses to combine
    with the loss on the GPU.
    """
    found = ok(run_ranks(2, gradients_when_clipped, 5, tmp_path / "run", "fp32"))
    assert found == [[(True, "cpu")], [(True, "cpu")]]


def stopped_at(config: Any, step: int) -> str:
    """Train, with a SIGTERM to rank 0 before the first micro-batch of `step`.

    Compiled code is traced, not made into C++.
    """
    compile_function = functools.partial(torch.compile, backend="aot_eager")
    compile_module = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")

    def watched(loss_of: Any, state: Any, *rest: Any, **more: Any) -> Any:
        if state.step == step and state.world.rank == 0:
            signal_this_process(signal.SIGTERM)
        return train_step(loss_of, state, *rest, **more)

    with (
        patch.object(torch, "compile", compile_function),
        patch.object(torch.nn.Module, "compile", compile_module),
        patch.object(trainer, "train_step", watched),
    ):
        try:
            train(config)
        except Preempted:
            return "preempted"
        return "complete"


@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "fp32"},
        {"precision": "fp16"},
        {"precision": "fp16", "optimizer": "muon"},
        {"precision": "bf16", "parallel": "fsdp"},
    ],
)
def test_stop_before_the_first_micro_batch_leaves_the_state_unchanged(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """Weights, moments and the loss scale are those of a run that was never stopped, and stopping
    ends in a save.
    """
    whole, parts = (
        tiny(tmp_path / "whole", steps=9, **settings),
        tiny(tmp_path / "parts", steps=9, **settings),
    )
    assert ok(run_ranks(2, stopped_at, whole, -1)) == ["complete"] * 2
    assert ok(run_ranks(2, stopped_at, parts, 4)) == ["preempted"] * 2
    folder, _ = checkpoint.newest_valid(parts.folder)
    assert folder is not None
    assert folder.name == "step-00000004"
    scaler = json.loads((folder / "trainer.json").read_text())["scaler"]
    assert not scaler or scaler["_growth_tracker"] == 4, (
        "a step that was broken off does not count towards a larger scale"
    )
    assert ok(run_ranks(2, stopped_at, parts, -1)) == ["complete"] * 2
    assert losses(parts.folder) == losses(whole.folder)
    assert final(parts.folder) == final(whole.folder)


def test_compiled_blocks_with_overlap_resume_bit_for_bit_on_three_ranks(tmp_path: Path) -> None:
    settings = {
        "compile": "on",
        "batch_tokens": 192,
        "micro_batch": 2,
        "steps": 8,
        "n_layer": 2,
        "timeout_seconds": 200.0,
    }
    whole, parts = (tiny(tmp_path / name, **settings) for name in ("whole", "parts"))
    ok(run_ranks(3, stopped_at, whole, -1, seconds=200))
    assert ok(run_ranks(3, stopped_at, parts, 3, seconds=200)) == ["preempted"] * 3
    ok(run_ranks(3, stopped_at, parts, -1, seconds=200))
    assert losses(parts.folder) == losses(whole.folder)
    assert final(parts.folder) == final(whole.folder)


@pytest.mark.guarantee("evidence")
@pytest.mark.parametrize("settings", [
    {"sample_every": 2, "sample_tokens": 12},
    {"evaluate_every": 2, "val_tokens": 40},  # fewer windows than ranks
    {"evaluate_every": 2, "sample_every": 3, "sample_tokens": 12, "compile": "on"},
])  # fmt: skip
def test_evaluation_of_a_sharded_model_does_not_affect_training(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """With FSDP, a forward pass on one rank alone would make it exchange something else than the
    others in its next step.
    """
    watched = tiny(tmp_path / "watched", steps=6, parallel="fsdp", **settings)
    plain = tiny(tmp_path / "plain", steps=6, parallel="fsdp", compile=watched.run.compile)
    assert ok(run_ranks(2, stopped_at, watched, -1, seconds=150)) == ["complete"] * 2
    assert ok(run_ranks(2, stopped_at, plain, -1, seconds=150)) == ["complete"] * 2
    assert losses(watched.folder) == losses(plain.folder)
    assert final(watched.folder) == final(plain.folder)


def reductions_of_a_step() -> tuple[int, int]:
    """Reduce-scatters during the first of two micro-batches, and during the second."""
    from torch.distributed.tensor.debug import CommDebugMode

    from anew.distributed import fsdp as sharded

    with joined("cpu", 60) as world:
        model = GPT(SHAPE, seed=2)
        sharded.shard(model, torch.float32)
        counts = []
        for last in (False, True):
            sharded.reduce_gradients(model, last)
            ids = torch.randint(257, (2, 16), generator=torch.Generator().manual_seed(world.rank))
            with CommDebugMode() as communication:
                model(ids, ids.roll(-1, 1)).backward()
            seen = communication.get_comm_counts()
            counts.append(
                sum(
                    count for operation, count in seen.items() if "reduce_scatter" in str(operation)
                )
            )
        return counts[0], counts[1]


def test_sharded_gradients_are_reduced_once_a_step() -> None:
    """One reduce-scatter for each block and one for the rest, after the last micro-batch and not
    before.
    """
    assert ok(run_ranks(2, reductions_of_a_step)) == [(0, SHAPE.n_layer + 1)] * 2


def scored_by_one_rank(run: Path) -> float:
    """A run that scores a task of a single chunk, which only rank 0 gets."""
    file = run.parent / "cache" / "downloads" / "lambada_test.jsonl"
    os.environ["ANEW_CACHE"] = str(run.parent / "cache")
    object.__setattr__(
        TASKS["lambada"], "remote", Remote("https://localhost/lambada_test.jsonl", sha256_of(file))
    )
    config = tiny(
        run,
        steps=5,
        parallel="fsdp",
        n_positions=64,
        evaluate_every=2,
        evaluate_tasks="lambada",
        evaluate_limit=2,
    )
    return train(config).train_loss


def test_task_with_one_chunk_does_not_affect_sharded_training(tmp_path: Path) -> None:
    file = tmp_path / "cache" / "downloads" / "lambada_test.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text(
        '{"text": "The cat sees the dog on day one"}\n{"text": "The king builds the tower"}\n'
    )
    first, second = ok(run_ranks(2, scored_by_one_rank, tmp_path / "run"))
    assert first == second
