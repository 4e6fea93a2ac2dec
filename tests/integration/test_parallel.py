"""One run on any number of ranks: the same tokens, the same losses, one voice."""

import contextlib
import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from anew import Config
from anew.checkpoint import folder as checkpoint
from anew.training import run_log as metrics
from anew.training import trainer
from anew.training.step import train_step
from anew.training.trainer import train
from tests.faults.common import tiny
from tests.support.ranks import free_port, run_ranks


def trained(config: Config) -> dict[str, Any]:
    """One rank's part in a run, with a hash of all the sequence ids that it was given and of its
    final weights.
    """
    ids = hashlib.sha256()
    rows: list[list[list[int]]] = []

    def watched(loss_of: Any, state: Any, micro_batches: Any, *rest: Any, **more: Any) -> Any:
        rows.append([row for inputs, _ in micro_batches for row in inputs.tolist()])
        outcome = train_step(loss_of, state, micro_batches, *rest, **more)
        ids.update(repr(outcome).encode())
        return outcome

    with patch.object(trainer, "train_step", watched):
        result = train(config)
    return {**dataclasses.asdict(result), "rows": rows, "outcomes": ids.hexdigest()}


def ok(found: list[tuple[str, Any]]) -> list[dict[str, Any]]:
    assert [status for status, _ in found] == ["ok"] * len(found), found
    return [value for _, value in found]


@pytest.fixture(scope="module")
def alone(
    text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Config, list[dict[str, Any]]]:
    config = tiny(
        tmp_path_factory.mktemp("alone") / "run",
        data=str(text_file),
        steps=50,
        warmup_steps=5,
        micro_batch=2,
        evaluate_every=20,
        save_every=20,
    )
    return config, ok(run_ranks(1, trained, config))


@pytest.mark.guarantee("resume")
@pytest.mark.parametrize(("ranks", "parallel"), [(2, "ddp"), (4, "ddp"), (2, "fsdp"), (4, "fsdp")])
def test_any_number_of_ranks_gives_the_same_run(
    alone: tuple[Config, list[dict[str, Any]]], ranks: int, parallel: str, tmp_path: Path
) -> None:
    config, [single] = alone
    shared = config.override(out=str(tmp_path / "run"), parallel=parallel)
    found = ok(run_ranks(ranks, trained, shared))
    assert len({f["outcomes"] for f in found}) == 1, (
        "ranks know the same of every step, bit for bit"
    )
    for step in range(config.run.steps):
        assert [row for f in found for row in f["rows"][step]] == single["rows"][step]
    for a, b in zip(
        metrics.read_metrics(config.folder), metrics.read_metrics(shared.folder), strict=True
    ):
        for key in ("train/loss", "train/grad_norm", "val/loss"):
            if key in a:
                assert b[key] == pytest.approx(a[key], rel=1e-6)
    one, many = (checkpoint.newest_valid(c.folder)[0] for c in (config, shared))
    assert one is not None
    assert many is not None
    assert {p.name for p in one.iterdir()} == {p.name for p in many.iterdir()}
    assert (
        len((shared.folder / "log.txt").read_text().splitlines())
        == len((config.folder / "log.txt").read_text().splitlines()) + 1
    )


FAST = {"optimizer": "muon", "newton_schulz": "fp32", "muon_warmup": 5, "steps": 10}


@pytest.fixture(scope="module")
def fast_alone(
    alone: tuple[Config, list[dict[str, Any]]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Config, dict[str, Any]]:
    config = alone[0].override(
        **FAST, micro_batch=1, save_every=4, out=str(tmp_path_factory.mktemp("fast") / "run")
    )
    return config, ok(run_ranks(1, trained, config))[0]


@pytest.mark.parametrize(("ranks", "parallel"), [(2, "ddp"), (4, "ddp"), (2, "fsdp")])
def test_muon_gives_the_same_run_on_any_number_of_ranks(
    fast_alone: tuple[Config, dict[str, Any]], ranks: int, parallel: str, tmp_path: Path
) -> None:
    config, single = fast_alone
    shared = config.override(out=str(tmp_path / "run"), parallel=parallel)
    first = ok(
        run_ranks(ranks, trained_until, shared, 6)
    )  # stopped, and gone on with by another number of ranks
    second = ok(run_ranks(4 if ranks == 2 else 2, trained, shared.override(parallel="ddp")))
    for step in range(config.run.steps):
        parts, i = (first, step) if step < 6 else (second, step - 6)
        assert [row for part in parts for row in part["rows"][i]] == single["rows"][step]
    assert len({part["outcomes"] for part in second}) == 1
    for a, b in zip(
        metrics.read_metrics(config.folder), metrics.read_metrics(shared.folder), strict=True
    ):
        for key in ("tokens", "train/loss", "train/grad_norm", "val/loss"):
            if key in a:
                assert b[key] == pytest.approx(a[key], rel=1e-6), (a["step"], key)


@pytest.mark.guarantee("resume")
def test_number_of_ranks_and_fsdp_may_change_at_every_resume(
    alone: tuple[Config, list[dict[str, Any]]], tmp_path: Path
) -> None:
    config, [single] = alone
    changing = config.override(out=str(tmp_path / "run"), keep=0, evaluate_every=0)
    rows: dict[int, list[list[int]]] = {}
    for ranks, parallel, until in (
        (2, "ddp", 10),
        (1, "ddp", 20),
        (4, "fsdp", 30),
        (2, "fsdp", 40),
        (3, "ddp", 0),
    ):
        shared = changing.override(parallel=parallel, batch_tokens=256, save_every=10)
        if ranks == 3:  # 16 sequences cannot be shared by three: said, and nothing is lost
            found = run_ranks(3, trained, shared)
            assert {status for status, _ in found} == {"UserError"}
            assert "not a multiple of 3 ranks x 16 tokens" in found[0][1]
            continue
        parts = ok(run_ranks(ranks, trained_until, shared, until))
        first = parts[0]["first"]
        for i in range(len(parts[0]["rows"])):
            rows[first + i] = [row for part in parts for row in part["rows"][i]]
    for step in range(40):
        assert rows[step] == single["rows"][step]
    whole = metrics.read_metrics(config.folder)
    for row in metrics.read_metrics(changing.folder)[:40]:
        [same] = [w for w in whole if w["step"] == row["step"]]
        assert row["train/loss"] == pytest.approx(same["train/loss"], rel=1e-6)


def trained_until(config: Config, step: int) -> dict[str, Any]:
    """As `trained`, but asked to stop (every rank for itself, as a scheduler would) once `step` is
    saved.
    """
    import signal

    from anew.errors import Preempted

    rows: list[list[list[int]]] = []
    first: list[int] = []

    def watched(loss_of: Any, state: Any, micro_batches: Any, *rest: Any, **more: Any) -> Any:
        if state.step == step and state.world.rank == state.world.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)  # one rank knows, and all stop at the same step
        outcome = train_step(loss_of, state, micro_batches, *rest, **more)
        if not outcome.stop:
            first.append(state.step)
            rows.append([row for inputs, _ in micro_batches for row in inputs.tolist()])
        return outcome

    with patch.object(trainer, "train_step", watched), contextlib.suppress(Preempted):
        train(config)
    return {"rows": rows, "first": first[0]}


@pytest.mark.parametrize(
    "variant",
    [
        {"optimizer": "muon"},
        {"precision": "fp16"},
        {"dropout": 0.1},
        {"precision": "bf16", "parallel": "fsdp"},
        {"optimizer": "muon", "parallel": "fsdp"},
    ],
)
def test_ranks_have_equal_weights_in_every_kind_of_run(
    alone: tuple[Config, list[dict[str, Any]]], variant: dict[str, Any], tmp_path: Path
) -> None:
    config = alone[0].override(
        out=str(tmp_path / "run"), steps=8, warmup_steps=2, evaluate_every=0, **variant
    )
    found = ok(run_ranks(2, trained, config))
    assert found[0]["outcomes"] == found[1]["outcomes"]


@pytest.mark.guarantee("resume")
def test_three_ranks_resume_bit_for_bit(
    alone: tuple[Config, list[dict[str, Any]]], tmp_path: Path
) -> None:
    """Where DistributedDataParallel would add in another order than before."""
    whole = alone[0].override(
        out=str(tmp_path / "whole"), batch_tokens=192, steps=16, save_every=100, evaluate_every=0
    )
    ok(run_ranks(3, trained, whole))
    parts = whole.override(out=str(tmp_path / "parts"))
    for until in (3, 9):
        ok(run_ranks(3, trained_until, parts, until))
    ok(run_ranks(3, trained, parts))
    both = [checkpoint.newest_valid(c.folder)[0] for c in (whole, parts)]
    assert both[0] is not None
    assert both[1] is not None
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (both[0] / name).read_bytes() == (both[1] / name).read_bytes()


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"WORLD_SIZE": "2"}, "RANK is missing"),
        (
            {"WORLD_SIZE": "two", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
            "start the processes with torchrun",
        ),
        (
            {"WORLD_SIZE": "2", "RANK": "5", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
            "RANK is 5",
        ),
        (
            {
                "WORLD_SIZE": "2",
                "RANK": "0",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": "1",
                "LOCAL_RANK": "0",
            },
            "were all ranks started?",
        ),
    ],
)
def test_impossible_launch_is_refused(
    environment: dict[str, str], words: str, text_file: Path, tmp_path: Path
) -> None:
    port = {"MASTER_PORT": str(free_port())} if environment.get("MASTER_PORT") == "1" else {}
    command = [
        sys.executable,
        "-m",
        "anew",
        "train",
        "demo",
        "--data",
        str(text_file),
        "--out",
        str(tmp_path / "r"),
        "--timeout-seconds",
        "3",
    ]
    done = subprocess.run(
        command,
        env={**os.environ, **environment, **port},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def disagreeing(config: Config) -> None:
    train(config.override(weight_decay=0.1 * (1 + int(os.environ["RANK"]))))


def test_differing_ranks_are_named(
    alone: tuple[Config, list[dict[str, Any]]], tmp_path: Path
) -> None:
    found = run_ranks(
        2, disagreeing, alone[0].override(out=str(tmp_path / "run"), steps=7, warmup_steps=1)
    )
    assert {status for status, _ in found} == {"UserError"}
    assert "the ranks differ in settings" in found[0][1]


TINY = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 32,
    "n_positions": 8,
    "seq_len": 8,
    "steps": 2,
    "warmup_steps": 1,
    "precision": "fp32",
    "compile": "off",
    "val_tokens": 256,
    "evaluate_every": 0,
}


@pytest.mark.parametrize(("recipe", "ranks", "accumulated", "planned"), [
    # 4 GPUs x 16 x 1024, accumulation 8; as many steps as build-nanogpt takes.
    ("gpt2-124m", 4, 8, "19,073 = 10B tokens"),
    ("gpt2-124m-openwebtext", 8, 4, "90,000 = 47.2B tokens"),
])  # fmt: skip
def test_plans_of_the_reference_projects(
    recipe: str, ranks: int, accumulated: int, planned: str, text_file: Path, tmp_path: Path
) -> None:
    """Their plan in full, and the same command with two ranks, accumulating as often, at a size
    for a test. One rank speaks for all.
    """
    plan = subprocess.run(
        [sys.executable, "-m", "anew", "train", recipe, "--dry-run"],
        env={**os.environ, "WORLD_SIZE": str(ranks)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    assert f"batch: {ranks} ranks x 16 sequences x 1,024 tokens x {accumulated} accumulated" in plan
    assert f"steps: {planned}" in plan
    assert "= 524,288 tokens a step" in plan
    assert "124,475,904 parameters" in plan  # with the rows that pad the vocabulary
    tokens = str(2 * 16 * 8 * accumulated)
    command = [
        *(
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            "-m",
            "anew",
            "train",
            recipe,
            "--json",
        ),
        *("--data", str(text_file), "--out", str(tmp_path / "run"), "--batch-tokens", tokens),
        *(
            word
            for name, value in TINY.items()
            for word in (f"--{name.replace('_', '-')}", str(value))
        ),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"{recipe}: 2 steps") == 1
    assert json.loads(done.stdout.splitlines()[-1])["step"] == 2
    assert f"batch: 2 ranks x 16 sequences x 8 tokens x {accumulated} accumulated" in done.stderr
    assert done.stderr.count("device cpu") == 1
    assert checkpoint.newest_valid(tmp_path / "run")[0] is not None


def torchrun_shakespeare(text_file: Path, out: Path, *arguments: str) -> Any:
    """Run `anew train shakespeare` on two ranks that torchrun starts."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "anew", "train", "shakespeare", "--data", str(text_file), "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, env=environment, timeout=300
    )


def test_recipe_for_one_process_trains_on_two_ranks(text_file: Path, tmp_path: Path) -> None:
    done = torchrun_shakespeare(text_file, tmp_path / "run", "--steps", "2", "--compile", "off")
    assert done.returncode == 0, done.stderr
    assert "2 ranks x 16 sequences x 128 tokens x 1 accumulated" in done.stderr
    assert "FutureWarning" not in done.stderr


def test_error_on_ranks_of_torchrun_is_the_last_sentence_on_the_screen(
    text_file: Path, tmp_path: Path
) -> None:
    done = torchrun_shakespeare(text_file, tmp_path / "run", "--micro-batch", "3")
    assert done.returncode != 0
    sentences = [line for line in done.stderr.splitlines() if line.strip(" =-")]
    assert "choose a --micro-batch that divides 16" in sentences[-1]
