"""Read conversations from files, and cut prepared ones into training sequences.

| file | a conversation |
|---|---|
| `.jsonl`, `.parquet`, also compressed | a row with "messages": a list of {"role", "content"} |
| the same, and `.csv`, `.tsv` | a row with "prompt" and "response" |
| any other text | turns that begin with a line "user:" or "assistant:"; "---" in a line ends one |

Roles are system (first only), user and assistant. A row without an answer, or with anything but
text in it, is left out and counted.

    conversations = Conversations(shards, tokenizer, seq_len=1024, seed=1337)
    for ids, targets in conversations.micro_batches(first=0, count=32, size=4):  # each (4, T)

Each conversation is a training sequence of its own, so that none is read in the context of another.
Only what the assistant has written is a target, so the number of targets differs from row to row.
"""

import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from anew.data import readers
from anew.data.dataloader import NOT_SCORED, Pair, evaluation_windows
from anew.data.shards import DataFolder, Shard
from anew.data.shuffle import shuffled
from anew.tokenizer.bpe import Tokenizer
from anew.tokenizer.chat import ASSISTANT, ROLES, SYSTEM, USER, Message, answer_mask, to_json
from anew.utils.words import counted

log = logging.getLogger("anew")

ROUNDED = 16  # rows are padded to a multiple of this, which kernels are fast with
TURN_LINE = re.compile(rf"^({'|'.join(ROLES)}):[ \t]*", re.IGNORECASE | re.MULTILINE)
END_LINE = re.compile(r"^---[ \t]*$", re.MULTILINE)
PAIRS = (("prompt", "response"), ("question", "answer"), ("instruction", "output"))
FORM = (
    'a row needs "messages": [{"role": "user", "content": "..."}, ...], or "prompt" and "response"'
)


# --- Reading --------------------------------------------------------------------------------------


def conversations_in(
    path: Path, column: str = "messages", skip: int = 0, encoding: str = "", warn: bool = True
) -> Iterator[bytes]:
    """Yield each conversation of a file as one line of JSON, without the first `skip`.

    `column` holds the messages of a row. With `warn`, what was left out is logged.
    """
    problems: Counter[str] = Counter()
    number = 0
    for candidate in _candidates(path, column, encoding, warn):
        try:
            line = to_json(parse(candidate))
        except ValueError as error:
            problems[str(error)] += 1
            continue
        if number >= skip:
            yield line
        number += 1
    if problems and warn:
        reasons = "; ".join(f"{n:,}: {reason}" for reason, n in problems.most_common())
        left_out = counted(problems.total(), "conversation")
        log.warning(f"{path}: left out {left_out} ({reasons})")


def _candidates(path: Path, column: str, encoding: str, warn: bool) -> Iterator[Any]:
    """Yield what may be conversations: lists of messages, or None for a row without any."""
    if not readers.is_table(path):
        text = readers.text_of(path, encoding, warn)
        for part in END_LINE.split(text):
            if part.strip():
                yield _messages_of_text(part)
        return
    for row in readers.rows_of(path, encoding):
        yield _messages_of_row(row, column)


def _messages_of_row(row: Any, column: str) -> Any:
    if not isinstance(row, dict):
        return None
    if column in row:
        return row[column]
    for question, answer in PAIRS:
        if question in row and answer in row:
            asked = row[question]
            if isinstance(asked, str) and isinstance(row.get("input"), str):
                asked = f"{asked}\n\n{row['input']}".strip()
            return [{"role": USER, "content": asked}, {"role": ASSISTANT, "content": row[answer]}]
    return None


def _messages_of_text(text: str) -> Any:
    """Return the turns of a text whose turns begin with a line such as "user: Hello"."""
    before, *parts = TURN_LINE.split(text)
    if before.strip():  # nobody says this
        return None
    roles, contents = parts[::2], parts[1::2]
    pairs = zip(roles, contents, strict=True)
    return [{"role": role.lower(), "content": content} for role, content in pairs]


def parse(messages: Any) -> list[Message]:
    """Return the messages of a conversation. Raises ValueError with the reason if it is none."""
    if not isinstance(messages, list) or not messages:
        raise ValueError("no messages")
    parsed: list[Message] = []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError("a message without a role")
        role = message["role"]
        content = message.get("content")
        if role not in ROLES or (role == SYSTEM and parsed):
            raise ValueError(f"the role {role[:20]!r} where it cannot be")
        if not isinstance(content, str):
            raise ValueError("a message that is not text")
        if not content.strip():
            raise ValueError("an empty message")
        parsed.append(Message(role, content))
    if ASSISTANT not in [message.role for message in parsed]:
        raise ValueError("no answer of the assistant")
    return parsed


# --- Training -------------------------------------------------------------------------------------


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
            mask = answer_mask(self.shards[number].tokens, tokenizer)
            for start, end in bounds:
                n_inputs = min(end - start - 1, seq_len)
                self.n_cut += n_inputs < end - start - 1
                n_targets = int(mask[start + 1 : start + 1 + n_inputs].sum())
                if n_targets:
                    places.append((number, start, n_inputs, n_targets))
                else:
                    self.n_left_out += 1
            self.masks.append(mask)
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
        tokens = self.shards[number].tokens[start : start + n_inputs + 1].astype(np.int64)
        is_answer = self.masks[number][start + 1 : start + n_inputs + 1]
        return tokens[:-1], np.where(is_answer, tokens[1:], NOT_SCORED)

    def sizes(self, first: int, count: int) -> tuple[int, int]:
        """Return the numbers of inputs and of targets of sequences first .. first + count - 1."""
        indices = [self.locate(sequence) for sequence in range(first, first + count)]
        inputs, targets = self.places[indices, 2:].sum(axis=0).tolist()
        return inputs, targets

    def micro_batches(
        self, first: int, count: int, size: int, equal_groups: bool = False
    ) -> list[Pair]:
        """Return sequences first .. first + count - 1 in padded groups (B, T).

        Sequences of similar length are in one group, which saves padding; the gradient of a step is
        the same in any order. A group has at most `size` x `seq_len` positions, so there are more
        short sequences in one than long ones. With `equal_groups` each has `size` sequences.
        """
        rows = [self.row(sequence) for sequence in range(first, first + count)]
        rows.sort(key=lambda row: len(row[0]))
        groups: list[list[Pair]] = []
        for row in rows:
            most_rows = size
            if not equal_groups:
                most_rows = size * self.seq_len // padded_length(len(row[0]), self.seq_len)
            if not groups or len(groups[-1]) >= most_rows:
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
        borders = (np.flatnonzero(is_end[:-1] & is_end[1:]) + 1).tolist()
        starts = [0, *borders] if is_end[0] and follows_end else borders
        ends = borders if starts[:1] == [0] else borders[1:]
        if is_end[-1] and precedes_start:
            ends = [*ends, len(is_end)]
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
    ends = conversations.places[:, 2].cumsum()  # inputs up to each conversation
    count = max(1, int(np.searchsorted(ends, limit_tokens, side="right")))
    count = min(count, len(ends))
    for first in range(0, count, batch):
        rows = [conversations.row_at(i) for i in range(first, min(first + batch, count))]
        yield padded(rows, tokenizer.end_of_text, seq_len)


def padded_length(n_inputs: int, seq_len: int) -> int:
    """Return the length to which a row of `n_inputs` is padded."""
    return min(-(-n_inputs // ROUNDED) * ROUNDED, seq_len)


def padded(rows: Sequence[Pair], end_of_text: int, seq_len: int) -> Pair:
    """Return rows of different lengths as two arrays (rows, T), with targets of -100 at the end."""
    T = padded_length(max(len(inputs) for inputs, _ in rows), seq_len)
    ids = np.full((len(rows), T), end_of_text, dtype=np.int64)
    targets = np.full((len(rows), T), NOT_SCORED, dtype=np.int64)
    for i, (row_inputs, row_targets) in enumerate(rows):
        ids[i, : len(row_inputs)] = row_inputs
        targets[i, : len(row_targets)] = row_targets
    return ids, targets
