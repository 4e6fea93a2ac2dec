"""Which tokens a step sees: a pure function of (seed, step), and nothing else.

The windows of T inputs (stride T, one target further) of a shard are read in a permuted order; shards come in source order in the first
epoch and in a seeded order after. From the second epoch on the windows of a shard are cut elsewhere (`recut`), so a token that comes
again has another context. Sequence number s is therefore the same tokens on any number of ranks and at any micro-batch size, and the whole
resume state of the data is the step.

    batches = Batches(shards, seq_len=1024, seed=1337)
    batches.rows(first=step * 512, count=512)           # (512, 1025) int64: inputs and, one to the right, targets
"""

import math
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from anew.data.shards import Shard
from anew.errors import UserError

Pairs = tuple[np.ndarray, np.ndarray]
More = Callable[[int], tuple[list[Shard], bool]]
T = TypeVar("T")

GOLDEN = (math.sqrt(5) - 1) / 2  # its multiples, modulo 1, are spread evenly however many there are


def permute(index: np.ndarray, n: int, key: tuple[int, ...]) -> np.ndarray:
    """A bijection of range(n) that `key` chooses, evaluated only at `index`: nothing of size n is stored.

    A four-round Feistel network on the next power of four; results outside range(n) go through it again (cycle walking).
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    round_keys = np.random.SeedSequence(key).generate_state(4, np.uint64)
    x = index.astype(np.uint64)
    todo = np.ones(len(x), dtype=bool)
    while todo.any():
        left, right = x[todo] >> half, x[todo] & mask
        for round_key in round_keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        x[todo] = (left << half) | right
        todo = x >= n
    return x.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014): every bit of x moves every bit of the result."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


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
        """`more(known)` waits for shards behind the `known` ones: all there are then, and whether that is all there will be."""
        self.seq_len, self.seed, self.more, self.recut = seq_len, seed, more, recut
        self._take(shards)

    def _take(self, shards: Sequence[Shard]) -> None:
        seq_len = self.seq_len
        self.shards = list(shards)
        self.windows = np.array(
            [max(0, (shard.n_tokens - 1) // seq_len) for shard in self.shards], dtype=np.int64
        )
        self.epoch_sequences = int(self.windows.sum())
        self.dropped = sum(
            shard.n_tokens - 1 - n * seq_len
            for shard, n in zip(self.shards, self.windows.tolist(), strict=True)
        )
        if self.epoch_sequences == 0:
            longest = max((shard.n_tokens for shard in self.shards), default=0)
            raise UserError(
                f"the training data is too short: one sequence needs seq_len + 1 = {seq_len + 1:,} tokens, and the longest shard has "
                f"{longest:,}; lower --seq-len or give more text."
            )

    def locate(self, sequences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shard and first token of each sequence number. While preparation goes on it is the first epoch, as far as it goes."""
        while self.more is not None and int(sequences.max(initial=0)) >= self.epoch_sequences:
            shards, complete = self.more(len(self.shards))
            self._take(shards)
            self.more = None if complete else self.more
        shard, start = np.empty_like(sequences), np.empty_like(sequences)
        for epoch in np.unique(sequences // self.epoch_sequences):
            order = np.arange(len(self.shards))
            if epoch > 0:
                order = permute(order, len(order), (self.seed, int(epoch)))
            ends = np.cumsum(self.windows[order])
            here = sequences // self.epoch_sequences == epoch
            position = sequences[here] % self.epoch_sequences
            turn = np.searchsorted(ends, position, side="right")
            shard[here] = order[turn]
            window = position - (ends - self.windows[order])[turn]
            shift = int(epoch * GOLDEN % 1 * self.seq_len) if self.recut else 0
            for s in np.unique(shard[here]):
                of_shard = shard[here] == s
                shuffled = permute(
                    window[of_shard], int(self.windows[s]), (self.seed, int(epoch), int(s))
                )
                last = (
                    self.shards[s].n_tokens - 1 - self.seq_len
                )  # where the shard's last window reaches back to
                start[here & (shard == s)] = np.minimum(shuffled * self.seq_len + shift, last)
        return shard, start

    def rows(self, first: int, count: int) -> np.ndarray:
        """Sequences first .. first + count - 1 as (count, T + 1) int64."""
        shard, start = self.locate(np.arange(first, first + count, dtype=np.int64))
        rows = np.empty((count, self.seq_len + 1), dtype=np.int64)
        for i, (s, token) in enumerate(zip(shard, start, strict=True)):
            rows[i] = self.shards[s].tokens[token : token + self.seq_len + 1]
        return rows


def prefetch(load: Callable[[int], T], steps: Sequence[int], depth: int = 2) -> Iterator[T]:
    """`load(step)` for each of `steps`, in order, read up to `depth` ahead by a thread. Its errors are raised here."""
    results: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(item: tuple[T | None, BaseException | None]) -> bool:
        while not stop.is_set():
            try:
                results.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for step in steps:
                if not put((load(step), None)):
                    return
        except BaseException as error:  # noqa: BLE001 (the reader re-raises it)
            put((None, error))

    thread = threading.Thread(target=work, daemon=True, name="prefetch")
    thread.start()
    try:
        for _ in steps:
            value, error = results.get()
            if error is not None:
                raise error
            yield value  # type: ignore[misc]
    finally:
        stop.set()
        thread.join()


def evaluation_windows(
    shards: Sequence[Shard], seq_len: int, limit_tokens: int, batch: int
) -> Iterator[Pairs]:
    """Fixed contiguous windows over the first `limit_tokens` of `shards`, as (inputs, targets) of at most `batch` rows.

    Each token but the first of a shard is a target exactly once: the last window of a shard reaches back for its context and masks
    (-100) what was scored before. Nothing here depends on ranks, devices or micro-batches.
    """
    inputs: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    left = limit_tokens
    for shard in shards:
        tokens = shard.tokens[: min(shard.n_tokens, left)].astype(np.int64)
        left -= len(tokens)
        for start in range(0, len(tokens) - 1, seq_len):
            end = min(start + seq_len, len(tokens) - 1)
            back = max(0, end - seq_len)
            target = tokens[back + 1 : end + 1].copy()
            target[: start - back] = -100
            if (
                len(target) < seq_len and inputs
            ):  # a shard shorter than a window cannot share a batch
                yield np.stack(inputs), np.stack(targets)
                inputs, targets = [], []
            inputs.append(tokens[back:end])
            targets.append(target)
            if len(inputs) == batch or len(target) < seq_len:
                yield np.stack(inputs), np.stack(targets)
                inputs, targets = [], []
    if inputs:
        yield np.stack(inputs), np.stack(targets)
