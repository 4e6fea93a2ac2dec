"""Every task by the name that `--task` calls it, and the loss on a run's own held-out text as one more."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anew.data.dataloader import evaluation_windows
from anew.data.shards import DataFolder
from anew.errors import UserError
from anew.evaluate.scorer import Question, Scored
from anew.evaluate.tasks.choices import HellaSwag, HellaSwagHarness, Lambada
from anew.evaluate.tasks.corpora import CORPORA, Corpus, Window, window_figures, window_result
from anew.evaluate.tasks.task import Example, Result, Task
from anew.tokenizer.bpe import Tokenizer

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        HellaSwag(),
        HellaSwagHarness(),
        Lambada(),
        *CORPORA,
    )
}

# Tasks that earlier versions had, and the sentence that refuses each. Their published figures depend on a
# clean-up of the text that OpenAI did not publish, so these tasks had no verdict.
REMOVED_TASKS = {
    "ptb": "the task ptb no longer exists in this version; use --task harness:paloma_ptb of lm-evaluation-harness.",
    **{
        name: f"the task {name} no longer exists in this version, and lm-evaluation-harness has no task of this "
        "name; tasks that it has are run with --task harness:NAME."
        for name in ("enwik8", "text8", "cbt_cn", "cbt_ne")
    },
}


def with_stride(task: Task, stride: int) -> Task:
    """`task` predicting `stride` tokens a window, where it is one of running text."""
    return dataclasses.replace(task, stride=stride) if isinstance(task, Corpus) else task


class Validation(Task):
    """Loss on the validation split of a data folder, in the fixed windows that training reports it on.

    GPT-2 124M: 3.2924 on FineWeb-Edu's shard 0 (build-nanogpt), 3.4250 on FineWeb (llm.c), 3.11 to 3.12 on OpenWebText (nanoGPT). These are
    context, not verdicts: another text has another loss.
    """

    name = "val"

    def __init__(self, folder: DataFolder, seq_len: int, limit_tokens: int) -> None:
        self.shards, self.seq_len = folder.splits["val"], seq_len
        self.limit = min(limit_tokens, sum(shard.n_tokens for shard in self.shards))
        if self.limit < 2:
            raise UserError(f"{folder.path} has no validation text.")

    def examples(self, path: Path, tokenizer: Tokenizer, positions: int) -> list[Example]:
        """The windows that training reports its loss on, whatever the file."""
        found = []
        for ids, targets in evaluation_windows(
            self.shards, min(self.seq_len, positions), self.limit, 1
        ):
            known = int((targets[0] == -100).sum()) + 1  # tokens that are context only
            ending = targets[0, known - 1 :].tolist()
            size = len(tokenizer.decode_bytes([i for i in ending if i != tokenizer.end_of_text]))
            found.append(
                Example(Window(known, bytes=size), Question(ids[0, :known].tolist(), [ending]))
            )
        return found

    def result(self, row: Any, answer: Sequence[Scored]) -> Result:
        return window_result(row, answer)

    def figures(self, results: Sequence[Result]) -> dict[str, Any]:
        return window_figures(results)
