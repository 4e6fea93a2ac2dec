"""Conversations as training sequences: each is one of its own, and only answers are targets.

    conversations = Conversations(shards, tokenizer, seq_len=1024, seed=1337)
    for ids, targets in conversations.micro_batches(first=0, count=32, size=4):  # each (B, T)

No conversation is read in the context of another. What the user says is no target, so the number of
targets differs from row to row.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from anew.data.dataloader import NOT_SCORED, Pair, evaluation_windows
from anew.data.shards import DataFolder, Shard
from anew.data.shuffle import shuffled
from anew.tokenizer.bpe import Tokenizer
from anew.tokenizer.chat import answer_mask

ROUNDED = 16  # rows are padded to a multiple of this, which kernels are fast with


class Conversations:
    """Numbered training sequences: every epoch has each conversation once, in an order of its own.

    The order is computed from (seed, epoch), so the tokens of a step depend on nothing else.
    Conversations that are longer than `seq_len` tokens are cut at their end. Those without a target
    that is left are left out.
    """

    def __init__(
        self, shards: Sequence[Shard], tokenizer: Tokenizer, seq_len: int, seed: int
    ) -> None:
        """Find the conversations in `shards`."""
        self.shards = list(shards)
        self.end_of_text = tokenizer.end_of_text
        self.seq_len = seq_len
        self.seed = seed
        self.wait_for_shards = None  # all conversations are known, as `DataLoader` may learn later
        self.masks = []  # for each shard, which tokens are answers
        places = []  # shard, first token, number of inputs, number of targets
        self.n_cut = 0
        self.n_left_out = 0
        for number, bounds in enumerate(conversation_bounds(self.shards, self.end_of_text)):
            tokens = self.shards[number].tokens
            mask = answer_mask(tokens, tokenizer)
            self.masks.append(mask)
            for start, end in bounds:
                length = end - start - 1  # the last token is a target only
                if length > seq_len:
                    self.n_cut += 1
                    length = seq_len
                targets = mask[start + 1 :][:length]
                n_targets = int(targets.sum())
                if n_targets == 0:
                    self.n_left_out += 1
                    continue
                place = (number, start, length, n_targets)
                places.append(place)
        self.places = np.array(places, dtype=np.int64).reshape(-1, 4)
        self.epoch_sequences = len(places)

    def locate(self, sequence: int) -> int:
        """Return the index in `places` of a sequence."""
        epoch, position = divmod(sequence, self.epoch_sequences)
        return shuffled(position, self.epoch_sequences, key=(self.seed, epoch))

    def row(self, sequence: int) -> Pair:
        """Return the inputs and the targets (n,) of a sequence, int64; -100 is no target."""
        return self.row_at(self.locate(sequence))

    def row_at(self, index: int) -> Pair:
        """Return the inputs and the targets of the conversation at an index in `places`."""
        number, start, n_inputs, _ = self.places[index].tolist()
        end = start + n_inputs
        tokens = self.shards[number].tokens
        inputs = tokens[start:end].astype(np.int64)
        targets = tokens[start + 1 : end + 1].astype(np.int64)
        is_answer = self.masks[number][start + 1 : end + 1]
        targets[~is_answer] = NOT_SCORED
        return inputs, targets

    def sizes(self, first: int, count: int) -> tuple[int, int]:
        """Return the numbers of inputs and of targets of sequences first .. first + count - 1."""
        numbers = range(first, first + count)
        indices = [self.locate(number) for number in numbers]
        sizes = self.places[indices, 2:]
        inputs, targets = sizes.sum(axis=0).tolist()
        return inputs, targets

    def micro_batches(
        self, first: int, count: int, size: int, equal_groups: bool = False
    ) -> list[Pair]:
        """Return sequences first .. first + count - 1 in padded groups (B, T).

        Sequences of similar length are in one group, which saves padding; the gradient of a step is
        the same in any order. A group has at most `size` x `seq_len` positions, so there are more
        short sequences in one than long ones. With `equal_groups` each has `size` sequences.
        """
        numbers = range(first, first + count)
        rows = [self.row(number) for number in numbers]
        rows.sort(key=n_inputs_of)
        most_positions = size * self.seq_len
        groups: list[list[Pair]] = []
        for row in rows:
            most_rows = size
            if not equal_groups:
                width = padded_length(n_inputs_of(row), self.seq_len)
                most_rows = most_positions // width
            is_full = bool(groups) and len(groups[-1]) >= most_rows
            if is_full or not groups:
                groups.append([])
            groups[-1].append(row)
        return [padded(group, self.end_of_text, self.seq_len) for group in groups]


def conversation_bounds(
    shards: Sequence[Shard], end_of_text: int
) -> Iterator[list[tuple[int, int]]]:
    """Yield, for each shard, the first token of each conversation and the one after its last.

    Between two conversations there are two end-of-text tokens, that of the end and that of the
    beginning. A conversation that is cut by the end of a shard is left out.
    """
    follows_end = True  # whether the token before the shard ends a conversation
    for number, shard in enumerate(shards):
        is_end = shard.tokens == end_of_text
        is_last = number + 1 == len(shards)
        precedes_start = is_last or shards[number + 1].tokens[0] == end_of_text
        is_border = is_end[:-1] & is_end[1:]
        borders = (np.flatnonzero(is_border) + 1).tolist()
        starts = list(borders)
        ends = list(borders)
        if is_end[0] and follows_end:
            starts.insert(0, 0)
        else:  # the first conversation began in the shard before
            ends = ends[1:]
        if is_end[-1] and precedes_start:
            ends.append(len(is_end))
        yield list(zip(starts, ends, strict=False))
        follows_end = bool(is_end[-1])


def validation_windows(
    folder: DataFolder, split: str, seq_len: int, limit_tokens: int, batch: int
) -> Iterator[Pair]:
    """Yield the inputs and targets of a split, in an order that is always the same.

    Of texts these are the windows of `evaluation_windows`. Of conversations they are `batch` whole
    ones at a time, until `limit_tokens` inputs are read.
    """
    shards = folder.splits[split]
    if not folder.conversations:
        yield from evaluation_windows(shards, seq_len, limit_tokens, batch)
        return
    tokenizer = Tokenizer.find(folder.tokenizer, folder.path)
    conversations = Conversations(shards, tokenizer, seq_len, seed=0)
    n_inputs = conversations.places[:, 2]
    ends = n_inputs.cumsum()  # inputs up to each conversation
    n_within = int((ends <= limit_tokens).sum())
    count = min(max(1, n_within), len(ends))
    for first in range(0, count, batch):
        last = min(first + batch, count)
        rows = [conversations.row_at(index) for index in range(first, last)]
        yield padded(rows, tokenizer.end_of_text, seq_len)


def n_inputs_of(row: Pair) -> int:
    """Return the number of inputs of a row."""
    inputs, _ = row
    return len(inputs)


def padded_length(n_inputs: int, seq_len: int) -> int:
    """Return the length to which a row of `n_inputs` is padded."""
    return min(-(-n_inputs // ROUNDED) * ROUNDED, seq_len)


def padded(rows: Sequence[Pair], end_of_text: int, seq_len: int) -> Pair:
    """Return rows of different lengths as two arrays (rows, T), with targets of -100 at the end."""
    longest = max(map(n_inputs_of, rows))
    shape = (len(rows), padded_length(longest, seq_len))
    ids = np.full(shape, end_of_text, dtype=np.int64)
    targets = np.full(shape, NOT_SCORED, dtype=np.int64)
    for i, (row_inputs, row_targets) in enumerate(rows):
        length = len(row_inputs)
        ids[i, :length] = row_inputs
        targets[i, :length] = row_targets
    return ids, targets
