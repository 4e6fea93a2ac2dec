"""LAMBADA: predict the last word of a passage, which needs all of it. Paperno et al. 2016."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anew.errors import UserError
from anew.evaluate.scorer import Answer, Question
from anew.evaluate.tasks.task import Remote, Result, Task, perplexity, read_json_lines, split_pair
from anew.tokenizer.bpe import Tokenizer


class Lambada(Task):
    """The last word of OpenAI's 5,153 test passages. A row is a passage.

    GPT-2 124M: perplexity 40.06 and acc 0.3256 for the whole word, as in lm-evaluation-harness's
    `lambada_openai`. The GPT-2 paper's 35.13 and 0.4599 are about the last token alone, which may
    be the end of a word; these figures are called last_token_*.
    """

    name = "lambada"
    count = 5153
    remote = Remote(
        "https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl",
        "4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226",
    )

    def rows(self, path: Path) -> list[Any]:
        passages = [row["text"] for row in read_json_lines(path, ["text"])]
        if not all(" " in passage.strip() for passage in passages):
            raise UserError(f"{path} is not LAMBADA: a passage has no last word.")
        return passages

    def question(self, row: Any, tokenizer: Tokenizer) -> Question:
        context, _, word = row.rpartition(" ")
        return split_pair(tokenizer, context, " " + word)

    def result(self, row: Any, answer: Answer) -> Result:
        [word] = answer
        return {
            "nats": -word.total,
            "acc": int(word.is_top.all()),
            "last_token_nats": -float(word.log_probs[-1]),
            "last_token_acc": int(word.is_top[-1]),
        }

    def figures(self, results: Sequence[Result]) -> dict[str, Any]:
        means = super().figures(results)
        return {
            "perplexity": perplexity(means["nats"]),
            "acc": means["acc"],
            "last_token_perplexity": perplexity(means["last_token_nats"]),
            "last_token_acc": means["last_token_acc"],
        }
