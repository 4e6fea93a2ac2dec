"""`--micro-batch auto` finds what fits before training, and running out of memory is reported in a
sentence.
"""

import contextlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from anew import Config
from anew.data.dataset import open_data
from anew.tokenizer.bpe import Tokenizer
from anew.training import micro_batch as probe
from anew.training.train_state import TrainState
from anew.training.trainer import train
from anew.utils import device as runtime
from tests.faults.common import losses, tiny
from tests.support.ranks import run_ranks

MEGABYTE = 1_000_000
GIB = 1 << 30


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A run with 32 sequences a step."""
    return tiny(tmp_path / "run", steps=3, warmup_steps=1, batch_tokens=512, micro_batch="auto")


def state_of(config: Config) -> TrainState:
    with open_data(config.data.data, Tokenizer.named("bytes")) as folder:
        return TrainState(config, runtime.set_up_device(config.run), folder.identity)


def peak_of_100_and_10_megabytes(state: TrainState, sequences: int) -> int:
    return 100 * MEGABYTE + 10 * MEGABYTE * sequences


def test_cpu_uses_the_largest_candidate_without_measuring(config: Config) -> None:
    assert probe.find_micro_batch(state_of(config))[0] == 16
    long = config.override(n_positions=4096, seq_len=4096, batch_tokens=8 * 4096)
    assert probe.find_micro_batch(state_of(long))[0] == 2  # 8192 tokens


def test_largest_candidate_below_the_limit_is_found(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = state_of(config)
    monkeypatch.setattr(probe, "measured_peak", peak_of_100_and_10_megabytes)
    for megabytes, found in (
        (1000, 16),
        (260, 16),
        (259, 8),
        (180, 8),
        (179, 4),
        (120, 2),
        (119, 1),
    ):
        monkeypatch.setattr(probe, "usable_bytes", lambda _, limit=megabytes: limit * MEGABYTE)
        assert probe.find_micro_batch(state)[0] == found, megabytes


def test_candidates_that_run_out_of_memory_are_passed_over(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        probe, "measured_peak", lambda _, sequences: None if sequences > 4 else MEGABYTE
    )
    monkeypatch.setattr(probe, "usable_bytes", lambda _: 64 * GIB)
    assert probe.find_micro_batch(state_of(config)) == (4, "micro-batch 4: uses 0.0 of 68.7 GB")


def test_passes_of_a_trial_leave_weights_and_optimizer_unchanged(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The measured passes themselves, with the GPU's counters replaced."""
    state = state_of(config)
    before = [p.detach().clone() for p in state.parameters]
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 123)
    assert probe.measured_peak(state, 2) == 123
    assert all(torch.equal(a, b) for a, b in zip(before, state.parameters, strict=True))
    assert all(p.grad is None for p in state.parameters)
    assert not state.optimizers[0].state


def train_starved(config: Config) -> Any:
    """Rank 1 has no memory at all; rank 0 must not wait for it."""
    probe.usable_bytes = lambda device: GIB
    probe.measured_peak = lambda state, sequences: None if os.environ["RANK"] == "1" else MEGABYTE
    return train(config).step


def test_every_rank_reports_that_no_sequence_fits_on_one_of_them(config: Config) -> None:
    found = run_ranks(2, train_starved, config)
    assert [kind for kind, _ in found] == ["UserError"] * 2
    assert all("not even one sequence fits" in text for _, text in found)


def test_a_resumed_run_keeps_the_micro_batch_that_it_found(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one would add in another order, and memory may not be free in the same way again."""
    monkeypatch.setattr(probe, "measured_peak", peak_of_100_and_10_megabytes)
    monkeypatch.setattr(probe, "usable_bytes", lambda _: 64 * GIB)

    def stop(row: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, stop)
    monkeypatch.setattr(
        probe, "usable_bytes", lambda _: 110 * MEGABYTE
    )  # by this, one sequence would be all that fits
    train(config)
    log = (config.folder / "log.txt").read_text()
    assert "micro-batch 16, as this run found it before" in log
    for changed in (
        {"out": f"{config.folder}-new"},
        {"recompute": True},
    ):  # another run, or other memory: found anew
        train(config.override(**changed))
        assert "micro-batch 1: uses" in (config.override(**changed).folder / "log.txt").read_text()


def train_with_limit(config: Config, more: int) -> int:
    """Train with at most `more` bytes of address space beyond what the process has."""
    import resource

    status = Path("/proc/self/status").read_text().splitlines()
    [size] = [int(line.split()[1]) * 1024 for line in status if line.startswith("VmSize:")]
    resource.setrlimit(resource.RLIMIT_AS, (size + more, -1))
    with contextlib.suppress(OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, 512))
    return train(config).step


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(),
    reason="only Linux limits the address space of a process",
)
def test_step_that_does_not_fit_is_reported_in_a_sentence(config: Config) -> None:
    """Logits of sixteen sequences of 256 tokens need 3 GB, of which 2 are to be had."""
    long = config.override(
        vocab_size=50257,
        tokenizer="gpt2",
        n_positions=256,
        seq_len=256,
        batch_tokens=4096,
        head="plain",
    )
    [(kind, text)] = run_ranks(1, train_with_limit, long.override(micro_batch=16), 2 * GIB)
    assert kind == "UserError", text
    assert "not enough memory for a micro-batch; use a smaller --micro-batch" in text
    assert run_ranks(1, train_with_limit, long.override(micro_batch=1), 2 * GIB) == [("ok", 3)]


def train_with_limits(config: Config, limits: list[int]) -> int:
    """Train where rank i may use `limits[i]` bytes."""
    probe.measured_peak = peak_of_100_and_10_megabytes
    probe.usable_bytes = lambda device: limits[int(os.environ["RANK"])]
    return train(config).step


def test_the_smallest_rank_decides_and_the_batch_stays(config: Config) -> None:
    found = run_ranks(2, train_with_limits, config, [64 * GIB, 110 * MEGABYTE])
    assert found == [("ok", 3)] * 2
    assert (
        "2 ranks x 1 sequences x 16 tokens x 16 accumulated"
        in (config.folder / "log.txt").read_text()
    )
    alone = config.override(out=f"{config.folder}-alone", micro_batch=8)
    assert run_ranks(1, train_with_limits, alone, [GIB]) == [("ok", 3)]
    for a, b in zip(losses(alone.folder), losses(config.folder), strict=True):
        assert a == pytest.approx(b, rel=1e-6)
