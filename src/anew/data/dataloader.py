"""Batches of training sequences, and the fixed windows of validation.

    batches = DataLoader(shards, seq_len=1024, seed=1337)
    batches.rows(first=step * 512, count=512)       # (512, 1025) int64: inputs and the last target

The training sequences of a run are numbered 0, 1, 2, ... Step s of batches of B sequences reads the
numbers s * B to (s + 1) * B - 1. `DataLoader.locate` turns a number into a place in the data:

1. Each shard is divided into windows of `seq_len` input tokens. The targets of a window are its
   tokens shifted by one. An epoch reads every window of every shard once, so the sequence number
   divided by the windows of all shards gives the epoch, and the remainder the position in it.
2. An epoch reads one whole shard after another. The first epoch reads the shards in the order in
   which they were prepared; a later epoch reads them in an order computed from (seed, epoch).
3. Within a shard, the order of windows is computed from (seed, epoch, shard); see shuffle.py.
4. In the second and later epochs all windows start some tokens later (setting `recut`), so that
   each token is read in a context that differs from that of the first epoch.

The tokens of a step are therefore a function of the seed and the step: they are the same on any
number of ranks and at any micro-batch size, and a run that resumes needs no more than the number of
its step.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from anew.data.shards import Shard
from anew.data.shuffle import shuffled
from anew.errors import UserError

Pair = tuple[np.ndarray, np.ndarray]  # inputs and targets
WaitForShards = Callable[[int], tuple[list[Shard], bool]]

# The multiples of the golden ratio modulo 1 are spread evenly over [0, 1), however many are taken.
# An epoch shifts its windows by this fraction of a window.
GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
NOT_SCORED = -100  # the target that cross_entropy ignores


class Window(NamedTuple):
    """The place of one training sequence: seq_len inputs and one more target."""

    shard: Shard
    start: int  # its first token


class DataLoader:
    """Numbered training sequences over `shards`."""

    def __init__(
        self,
        shards: Sequence[Shard],
        seq_len: int,
        seed: int,
        wait_for_shards: WaitForShards | None = None,
        recut: bool = True,
    ) -> None:
        """Number the windows of `shards`.

        `wait_for_shards` is given while the data is still being prepared. `wait_for_shards(n)`
        waits until there are more than n shards, or all of them, and returns the shards and
        whether they are complete. Raises UserError if no shard is long enough for a window.
        """
        self.seq_len = seq_len
        self.seed = seed
        self.wait_for_shards = wait_for_shards
        self.recut = recut
        self._set_shards(shards)

    def _set_shards(self, shards: Sequence[Shard]) -> None:
        self.shards = list(shards)
        self.windows = [shard.n_windows(self.seq_len) for shard in self.shards]
        self.epoch_sequences = sum(self.windows)
        targets = sum(shard.n_tokens - 1 for shard in self.shards)
        self.dropped_tokens = targets - self.epoch_sequences * self.seq_len
        if self.epoch_sequences == 0:
            longest = max((shard.n_tokens for shard in self.shards), default=0)
            raise UserError(
                "the training data is too short: one sequence needs seq_len + 1 = "
                f"{self.seq_len + 1:,} tokens, and the longest shard has {longest:,}; "
                "lower --seq-len or give more text."
            )

    def locate(self, sequence: int) -> Window:
        """Return the window of sequence number `sequence` over the shards that are known now."""
        epoch, position = divmod(sequence, self.epoch_sequences)
        for number in shard_order(len(self.shards), self.seed, epoch):
            if position < self.windows[number]:
                break
            position -= self.windows[number]
        shard = self.shards[number]
        index = shuffled(position, self.windows[number], key=(self.seed, epoch, number))
        start = index * self.seq_len
        if self.recut:
            fraction = epoch * GOLDEN_RATIO % 1
            start += int(fraction * self.seq_len)
        last_start = shard.n_tokens - 1 - self.seq_len
        return Window(shard, min(start, last_start))

    def rows(self, first: int, count: int) -> np.ndarray:
        """Return sequences first .. first + count - 1 as (count, seq_len + 1) int64."""
        self._wait_for(first + count - 1)
        rows = np.empty((count, self.seq_len + 1), dtype=np.int64)
        for row in range(count):
            shard, start = self.locate(first + row)
            end = start + self.seq_len + 1
            rows[row] = shard.tokens[start:end]
        return rows

    def _wait_for(self, sequence: int) -> None:
        """Wait for further shards while `sequence` may lie in one that is not yet prepared.

        Until the data is complete its length is unknown, so every sequence is one of the first
        epoch.
        """
        while self.wait_for_shards is not None and sequence >= self.epoch_sequences:
            shards, is_complete = self.wait_for_shards(len(self.shards))
            self._set_shards(shards)
            if is_complete:
                self.wait_for_shards = None


@lru_cache(maxsize=4)
def shard_order(n_shards: int, seed: int, epoch: int) -> Sequence[int]:
    """Return the numbers of the shards in the order in which `epoch` reads them."""
    if epoch == 0:
        return range(n_shards)
    return [shuffled(number, n_shards, key=(seed, epoch)) for number in range(n_shards)]


def evaluation_windows(
    shards: Sequence[Shard], seq_len: int, limit_tokens: int, batch: int
) -> Iterator[Pair]:
    """Yield fixed windows over the first `limit_tokens` of `shards`, as (inputs, targets).

    Both have the shape (rows, seq_len), with rows <= `batch`, and dtype int64. Each token except
    the first of a shard is a target exactly once. The windows depend on no rank, device or
    micro-batch.
    """
    rows: list[Pair] = []
    for inputs, targets in _single_windows(shards, seq_len, limit_tokens):
        is_short = len(inputs) < seq_len  # a shard shorter than a window is a batch of its own
        if is_short and rows:
            yield _stack(rows)
            rows = []
        rows.append((inputs, targets))
        if is_short or len(rows) == batch:
            yield _stack(rows)
            rows = []
    if rows:
        yield _stack(rows)


def _single_windows(shards: Sequence[Shard], seq_len: int, limit_tokens: int) -> Iterator[Pair]:
    """Yield the windows of `evaluation_windows` one by one.

    A window has `seq_len` tokens unless its shard is shorter. The last window of a shard overlaps
    the one before it; the targets that both contain are masked in the last one.
    """
    left = limit_tokens
    for shard in shards:
        tokens = shard.tokens[:left].astype(np.int64)
        left -= len(tokens)
        n_targets = len(tokens) - 1
        for start in range(0, n_targets, seq_len):
            end = min(start + seq_len, n_targets)
            first = max(0, end - seq_len)
            targets = tokens[first + 1 : end + 1].copy()
            targets[: start - first] = NOT_SCORED
            yield tokens[first:end], targets


def _stack(rows: list[Pair]) -> Pair:
    inputs, targets = zip(*rows, strict=True)
    return np.stack(inputs), np.stack(targets)
