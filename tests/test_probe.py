"""Memory: how many sequences fit is found before training, and too little is said in a sentence."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from anew import Config, probe, runtime
from anew.data.open import open_data
from anew.state import State
from anew.tokenizer import Tokenizer
from anew.train import train
from tests.faults.common import losses, tiny
from tests.ranks import run_ranks

resource = pytest.importorskip("resource", reason="Windows has no limits of this kind")
GB = 1 << 30


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A step of 32 sequences, of which each needs about 12 MB: wide rows of logits."""
    return tiny(tmp_path / "run", vocab_size=50257, tokenizer="gpt2", steps=3, warmup_steps=1, batch_tokens=512, micro_batch="auto")


def state_of(config: Config) -> State:
    with open_data(config.data.data, Tokenizer.named("gpt2")) as folder:
        return State(config, runtime.start(config.run), folder.identity)


def test_no_limit_means_the_largest_no_room_means_one_and_the_state_stays(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """With true measurements, which are not exact: the process holds more or less from before."""
    state = state_of(config)
    before = [p.detach().clone() for p in state.params]
    for room, found in ((64 * GB, 16), (1, 1)):
        monkeypatch.setattr(probe, "_room", lambda _, room=room: room)
        assert probe.find_micro_batch(state)[0] == found
    assert all(torch.equal(a, b) for a, b in zip(before, state.params, strict=True))
    assert all(p.grad is None for p in state.params)
    assert not state.optimizers[0].state


def test_each_sequence_more_needs_memory_that_is_there(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of 100 MB and 10 MB a sequence: the largest divisor of 32 under `room` is found, and tried."""
    state, tried = state_of(config), []
    monkeypatch.setattr(probe, "SHARE", {"cpu": 1.0})

    def peak(_: State, sequences: int) -> int:
        tried.append(sequences)
        return 100_000_000 + 10_000_000 * sequences

    monkeypatch.setattr(probe, "_peak", peak)
    for megabytes, found in ((1000, 16), (260, 16), (259, 8), (180, 8), (179, 4), (120, 2), (119, 1), (1, 1)):
        monkeypatch.setattr(probe, "_room", lambda _, room=megabytes: room * 1_000_000)
        tried.clear()
        assert probe.find_micro_batch(state)[0] == found, megabytes
        assert tried == ([1, 2, found] if found > 1 else [1, 2])


def test_what_was_found_and_does_not_fit_makes_room_for_the_next_smaller(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above four sequences memory runs out, which two trials could not tell."""
    state = state_of(config)
    monkeypatch.setattr(probe, "_peak", lambda _, n: None if n > 4 else 1_000_000 * n)
    monkeypatch.setattr(probe, "_room", lambda _: 64 * GB)
    assert probe.find_micro_batch(state) == (4, "micro-batch 4: needs about 0.0 of 68.7 GB")


def test_when_only_one_fits_it_is_one_and_when_none_does_all_ranks_say_so(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    state, real = state_of(config), probe._peak
    monkeypatch.setattr(probe, "_peak", lambda state, n: real(state, n) if n == 1 else None)
    assert probe.find_micro_batch(state)[0] == 1
    monkeypatch.undo()
    found = run_ranks(2, of_starved_rank, config)
    assert [kind for kind, _ in found] == ["UserError"] * 2
    assert all("not even one sequence fits" in text for _, text in found)


def test_a_resumed_run_keeps_the_micro_batch_that_it_found(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one would add in another order, and memory may not be free in the same way again."""
    monkeypatch.setattr(probe, "_room", lambda _: 64 * GB)

    def stop(row: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, stop)
    monkeypatch.setattr(probe, "_room", lambda _: 1)  # by this, one sequence would be all that fits
    train(config)
    log = (config.folder / "log.txt").read_text()
    assert "micro-batch 16, as this run found it before" in log
    for changed in ({"out": f"{config.folder}-new"}, {"recompute": True}):  # another run, or other memory: found anew
        train(config.override(**changed))
        assert "micro-batch 1: needs about" in (config.override(**changed).folder / "log.txt").read_text()


def of_starved_rank(config: Config) -> Any:
    """The second rank has no memory at all; the first must not wait for it."""
    import os

    real = probe._peak
    probe._peak = lambda state, n: None if os.environ["RANK"] == "1" else real(state, n)
    return train(config).step


def limited(config: Config, more: int) -> str:
    """Train with at most `more` bytes of address space beyond what the process has."""
    resource.setrlimit(resource.RLIMIT_AS, (probe._of_process("VmSize") + more, -1))
    with contextlib.suppress(OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, 512))
    train(config)
    return (config.folder / "config.json").read_text()


def test_a_step_that_does_not_fit_says_so_and_auto_makes_it_fit(config: Config) -> None:
    """Logits of sixteen sequences of 256 tokens need 3 GB, and 2 are to be had, of which thread stacks and libraries reserve some."""
    long = config.override(n_positions=256, seq_len=256, batch_tokens=4096, head="plain")
    [(kind, text)] = run_ranks(1, limited, long.override(micro_batch=16), 2 * GB)
    assert kind == "UserError", text
    assert "not enough memory for micro-batches of 16; use --micro-batch auto" in text
    [(kind, text)] = run_ranks(1, limited, long.override(out=f"{config.folder}-auto"), 2 * GB)
    assert kind == "ok", text
    assert 1 <= json.loads(text)["run"]["micro_batch"] < 16


def of_rank(config: Config, rooms: list[int]) -> Any:
    """The rank with least memory decides."""
    import os

    probe._room = lambda _: rooms[int(os.environ["RANK"])]
    return train(config).step


def test_the_smallest_rank_decides_and_the_batch_stays(config: Config) -> None:
    found = run_ranks(2, of_rank, config, [64 * GB, 1])
    assert found == [("ok", 3)] * 2
    assert "2 ranks x 1 sequences x 16 tokens x 16 accumulated" in (config.folder / "log.txt").read_text()
    alone = config.override(out=f"{config.folder}-alone", micro_batch=8)
    assert run_ranks(1, of_rank, alone, [GB]) == [("ok", 3)]
    for a, b in zip(losses(alone.folder), losses(config.folder), strict=True):
        assert a == pytest.approx(b, rel=1e-6)
