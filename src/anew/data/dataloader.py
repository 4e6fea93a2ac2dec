"""Batches of training sequences, and the fixed windows of validation.

    batches = Batches(shards, seq_len=1024, seed=1337)
    batches.rows(first=step * 512, count=512)       # (512, 1025) int64: inputs and the last target

Training sequences are numbered, and `Batches.locate` finds the tokens of one number:

1. A shard is cut into windows of `seq_len` inputs; their targets are the same tokens one to the
   right. An epoch reads every window of every shard once, so the sequence number gives epoch and
   position.
2. An epoch reads one shard after the other: the first epoch in the order of the source, which is
   the order of preparation, and a later epoch in an order that depends on (seed, epoch).
3. Within a shard the order of windows depends on (seed, epoch, shard); see shuffle.py.
4. From the second epoch on, all windows start some tokens later (`recut`), so that a token that is
   read again has another context.

The tokens of a step are therefore a function of the seed and the step: they are the same on any
number of ranks and at any micro-batch size, and a run that resumes needs no more than the number of
its step.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from anew.data.read_ahead import prefetch
from anew.data.shards import Shard
from anew.data.shuffle import permute, shuffled
from anew.errors import UserError

__all__ = ["Batches", "Window", "evaluation_windows", "permute", "prefetch"]

Pair = tuple[np.ndarray, np.ndarray]  # inputs and targets
More = Callable[[int], tuple[list[Shard], bool]]

GOLDEN = (
    math.sqrt(5) - 1
) / 2  # any number of its multiples, modulo 1, is spread evenly over 0 to 1
NOT_SCORED = -100  # the target that cross_entropy ignores


class Window(NamedTuple):
    """The place of one training sequence: seq_len inputs and one more target."""

    shard: Shard
    start: int  # its first token


class Batches:
    """Numbered training sequences over `shards`."""

    def __init__(
        self,
        shards: Sequence[Shard],
        seq_len: int,
        seed: int,
        more: More | None = None,
        recut: bool = True,
    ) -> None:
        """Number the windows of `shards`.

        While the data is still being prepared, `more(n)` waits until there are more than n shards,
        and returns all shards and whether they are complete. Raises UserError if no shard has a
        window.
        """
        self.seq_len = seq_len
        self.seed = seed
        self.more = more
        self.recut = recut
        self._set_shards(shards)

    def _set_shards(self, shards: Sequence[Shard]) -> None:
        self.shards = list(shards)
        self.windows = [shard.n_windows(self.seq_len) for shard in self.shards]
        self.epoch_sequences = sum(self.windows)
        targets = sum(shard.n_tokens - 1 for shard in self.shards)
        self.dropped = targets - self.epoch_sequences * self.seq_len
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
            fraction = epoch * GOLDEN % 1
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
        while self.more is not None and sequence >= self.epoch_sequences:
            shards, is_complete = self.more(len(self.shards))
            self._set_shards(shards)
            if is_complete:
                self.more = None


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

    Both are (rows, seq_len) int64 with at most `batch` rows. Each token but the first of a shard is
    a target exactly once. Nothing here depends on ranks, devices or micro-batches.
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
    """Yield the windows of `evaluation_windows` one by one, of `seq_len` tokens where possible.

    The last window of a shard begins earlier to be full; targets that were scored before are
    masked.
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
