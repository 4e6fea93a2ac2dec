"""Training windows, validation windows and reading ahead."""

import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anew import UserError
from anew.data.dataloader import DataLoader, evaluation_windows
from anew.data.read_ahead import prefetch
from anew.data.shards import Shard, SplitWriter
from anew.data.shuffle import permute
from tests.support.data_folders import make_shards, shard_of

# --- the permutation ------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**63 - 1), st.integers(0, 5))
def test_permute_is_a_bijection(n: int, seed: int, epoch: int) -> None:
    image = permute(np.arange(n), n, (seed, epoch))
    assert np.array_equal(np.sort(image), np.arange(n))
    second_half = permute(np.arange(n // 2, n), n, (seed, epoch))
    assert np.array_equal(second_half, image[n // 2 :])


def test_permute_shuffles_and_depends_on_the_key() -> None:
    a = permute(np.arange(10_000), 10_000, (1, 0))
    b = permute(np.arange(10_000), 10_000, (1, 1))
    for image in (a, b):
        assert abs(np.corrcoef(np.arange(10_000), image)[0, 1]) < 0.05
        assert np.mean(np.abs(np.diff(image)) == 1) < 0.01
    assert np.mean(a == b) < 0.01


def test_permute_is_the_one_that_stored_runs_were_trained_with() -> None:
    """The order of the version that stored tests/fixtures/stored_runs, for domains around 4**2."""
    assert permute(np.arange(8), 8, (1337, 0)).tolist() == [7, 2, 4, 5, 3, 6, 0, 1]
    image = permute(np.arange(17), 17, (1337, 2, 1)).tolist()
    assert image == [0, 15, 14, 1, 13, 2, 6, 7, 9, 3, 16, 4, 8, 11, 10, 5, 12]


# --- training windows -----------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(2, 90), min_size=1, max_size=4),
    st.integers(1, 9),
    st.integers(0, 99),
    st.booleans(),
)
def test_epoch_reads_every_window_once(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    seq_len: int,
    seed: int,
    recut: bool,
) -> None:
    shards = make_shards(tmp_path_factory.mktemp("shards"), lengths)
    windows = sum((length - 1) // seq_len for length in lengths)
    if windows == 0:
        with pytest.raises(UserError, match="too short"):
            DataLoader(shards, seq_len, seed)
        return
    batches = DataLoader(shards, seq_len, seed, recut=recut)
    shifts = [0, int(0.618 * seq_len), int(0.236 * seq_len)] if recut else [0, 0, 0]
    for epoch, shift in enumerate(shifts):
        expected = []
        for shard in shards:
            last_start = shard.n_tokens - 1 - seq_len
            for window in range((shard.n_tokens - 1) // seq_len):
                start = min(window * seq_len + shift, last_start)
                expected.append(shard.tokens[start : start + seq_len + 1].tolist())
        rows = batches.rows(epoch * windows, windows).tolist()
        assert sorted(rows) == sorted(expected)
    first_tokens = batches.rows(0, windows)[:, 0]
    shard_numbers = np.searchsorted(np.cumsum(lengths), first_tokens, side="right")
    assert (np.diff(shard_numbers) >= 0).all(), "the first epoch reads shards in source order"


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=40),
    st.integers(20, 90),
    st.integers(2, 12),
    st.sampled_from([1, 2, 3]),
)
def test_epoch_reads_no_token_twice_on_any_number_of_ranks(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    shard_tokens: int,
    seq_len: int,
    ranks: int,
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    writer = SplitWriter(folder, "train", shard_tokens)
    stream = np.arange(sum(lengths), dtype=np.uint16)
    for document in np.split(stream, np.cumsum(lengths)[:-1]):
        writer.write(document)
    shards = [shard_of(folder, entry) for entry in writer.close()]
    if all(shard.n_tokens <= seq_len for shard in shards):
        return
    batches = DataLoader(shards, seq_len, 7)
    share = -(-batches.epoch_sequences // ranks)
    inputs: list[int] = []
    for first in range(0, batches.epoch_sequences, share):
        count = min(share, batches.epoch_sequences - first)
        inputs += batches.rows(first, count)[:, :-1].flatten().tolist()
    assert len(set(inputs)) == len(inputs), "no token is an input twice in an epoch"
    start = 0
    for shard in shards:
        dropped = set(range(start, start + shard.n_tokens)) - set(inputs)
        assert len(dropped) < seq_len + 1, "a shard drops fewer than seq_len + 1 tokens"
        start += shard.n_tokens


def test_recut_gives_a_token_another_place_in_its_window_in_every_epoch(tmp_path: Path) -> None:
    batches = DataLoader(make_shards(tmp_path, [1025, 2048]), 64, seed=3)
    places: dict[int, list[int]] = {}  # of each token: its place in the window, in ten epochs
    for epoch in range(10):
        for row in batches.rows(epoch * batches.epoch_sequences, batches.epoch_sequences):
            for place, token in enumerate(row[:-1].tolist()):
                places.setdefault(token, []).append(place)
    inside = [places[token] for token in places if 64 <= token < 960]
    assert {len(found) for found in inside} == {10}, "each token is an input once an epoch"
    assert all(len(set(found)) == 10 for found in inside), "never twice at the same place"
    gaps = [max(np.diff([0, *sorted(found), 63])) for found in inside]
    assert max(gaps) <= 12, "its places are spread evenly"


def test_rows_do_not_depend_on_how_they_are_divided(tmp_path: Path) -> None:
    batches = DataLoader(make_shards(tmp_path, [700, 301, 55]), 8, seed=3)
    whole = batches.rows(0, 400)
    for parts in (1, 2, 5, 8):
        count = 400 // parts
        pieces = [batches.rows(first, count) for first in range(0, 400, count)]
        assert np.array_equal(np.concatenate(pieces), whole)
    assert not np.array_equal(whole, DataLoader(batches.shards, 8, seed=4).rows(0, 400))


def test_batches_wait_for_shards_and_read_them_as_if_all_had_been_there(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, [500, 300, 17, 640])
    known: list[int] = []

    def more(n_known: int) -> tuple[list[Shard], bool]:
        known.append(n_known)
        return shards[: n_known + 1], n_known + 1 == len(shards)

    complete = DataLoader(shards, 16, seed=3)
    growing = DataLoader(shards[:1], 16, seed=3, wait_for_shards=more)
    for first in range(0, complete.epoch_sequences - 8, 8):
        assert np.array_equal(growing.rows(first, 8), complete.rows(first, 8))
    assert known == [1, 2, 3]
    assert growing.wait_for_shards is None


# --- validation windows ---------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(2, 70), min_size=1, max_size=3),
    st.integers(1, 12),
    st.integers(1, 5),
    st.integers(2, 200),
)
def test_every_validation_token_is_scored_once(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    seq_len: int,
    batch: int,
    limit: int,
) -> None:
    shards = make_shards(tmp_path_factory.mktemp("val"), lengths)
    scored: list[int] = []
    for inputs, targets in evaluation_windows(shards, seq_len, limit, batch):
        assert inputs.shape == targets.shape
        assert len(inputs) <= batch
        is_scored = targets != -100
        assert (targets[is_scored] == inputs[is_scored] + 1).all()
        scored += targets[is_scored].tolist()
    expected: list[int] = []
    start = 0
    left = limit
    for length in lengths:
        expected += range(start + 1, start + min(length, left))
        start += length
        left = max(0, left - length)
    assert scored == expected


# --- reading ahead --------------------------------------------------------------------------------


def prefetch_threads() -> list[str]:
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith("prefetch")]


@pytest.mark.parametrize("threads", [1, 4])
def test_prefetch_keeps_the_order(threads: int) -> None:
    squares = list(prefetch(lambda step: step * step, range(20), threads=threads))
    assert squares == [step * step for step in range(20)]


def test_prefetch_raises_an_error_in_its_place_and_loads_nothing_after_it() -> None:
    loaded = []

    def load(step: int) -> int:
        loaded.append(step)
        if step == 3:
            raise UserError("shard is damaged")
        return step

    received = []
    with pytest.raises(UserError, match="damaged"):
        for value in prefetch(load, range(10)):
            received.append(value)
    assert received == [0, 1, 2]
    assert loaded == [0, 1, 2, 3]


def test_prefetch_ends_its_threads_when_the_caller_stops() -> None:
    endless = prefetch(lambda step: step, range(10**9))
    for value in endless:
        if value == 5:
            break
    assert prefetch_threads()
    endless.close()
    assert not prefetch_threads()
