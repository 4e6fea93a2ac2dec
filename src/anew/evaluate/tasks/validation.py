"""The loss on the validation split of a data folder, as a task."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from anew.data.conversations import validation_windows
from anew.data.shards import DataFolder
from anew.errors import UserError
from anew.evaluate.loss import MASKED
from anew.evaluate.scorer import Question
from anew.evaluate.tasks.running_text import RunningText, Window
from anew.evaluate.tasks.task import Example
from anew.tokenizer.bpe import Tokenizer


class Validation(RunningText):
    """The loss on a validation split, in the fixed windows for which training reports it.

    GPT-2 124M: 3.2924 on FineWeb-Edu's shard 0 (build-nanogpt), 3.4250 on FineWeb (llm.c), 3.11 to
    3.12 on OpenWebText (nanoGPT). These are context, not verdicts: another text has another loss.
    """

    name = "val"

    def __init__(
        self,
        folder: DataFolder,
        seq_len: int,
        limit_tokens: int,
    ) -> None:
        self.folder = folder
        self.seq_len = seq_len
        self.limit_tokens = min(limit_tokens, folder.n_tokens("val"))
        if self.limit_tokens < 2:
            raise UserError(f"{folder.path} has no validation text.")

    def read_examples(
        self, path: Path, tokenizer: Tokenizer, n_positions: int, limit: int
    ) -> Iterator[Example]:
        """Yield the windows of the data folder; `path` is not used.

        Of a conversation, each answer is an example, whose context is the conversation before it.
        """
        seq_len = min(self.seq_len, n_positions)
        batches = validation_windows(self.folder, "val", seq_len, self.limit_tokens, batch=1)
        for [ids], [targets] in itertools.islice(batches, limit or None):
            for start, end in scored_parts(targets):
                context = ids[: start + 1].tolist()
                ending = targets[start:end].tolist()
                text = [token for token in ending if token != tokenizer.end_of_text]
                n_bytes = len(tokenizer.decode_bytes(text))
                window = Window(len(context), bytes=n_bytes)
                yield Example(window, Question(context, [ending]))


def scored_parts(targets: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield the beginning and the end of each run of targets that are not masked."""
    is_scored = np.concatenate([[False], targets != MASKED, [False]])
    [changes] = np.diff(is_scored.astype(np.int8)).nonzero()
    yield from zip(changes[::2].tolist(), changes[1::2].tolist(), strict=True)
