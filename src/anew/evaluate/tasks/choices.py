"""Tasks that choose: HellaSwag in both scorings, LAMBADA's last word."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from anew.errors import UserError
from anew.evaluate.scorer import Question, Scored
from anew.evaluate.tasks.task import (
    Remote,
    Result,
    Task,
    json_lines,
    perplexity,
    split_pair,
    text_of,
)
from anew.tokenizer.bpe import Tokenizer


class HellaSwag(Task):
    """HellaSwag's raw text, an ending's tokens behind a space: build-nanogpt's scoring.

    GPT-2 124M: acc_norm 0.2955 (loss a token), acc 0.2859 (loss of the whole ending). Zellers et al. 2019; 10,042 validation examples.
    """

    name = "hellaswag"
    count = 10042
    remote = Remote(
        "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl",
        "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588",
    )

    def rows(self, path: Path) -> list[Any]:
        return [
            {"context": r["ctx"], "endings": r["endings"], "label": r["label"]}
            for r in _hellaswag_json(path)
        ]

    def question(self, row: Any, tokenizer: Tokenizer) -> Question:
        return Question(
            tokenizer.encode(row["context"]) or [tokenizer.end_of_text],
            [tokenizer.encode(" " + ending) for ending in row["endings"]],
        )

    def result(self, row: Any, answer: Sequence[Scored]) -> Result:
        totals = np.array([ending.total for ending in answer])
        means = totals / [len(ending.log_p) for ending in answer]
        return {
            "acc": int(totals.argmax() == row["label"]),
            "acc_norm": int(means.argmax() == row["label"]),
        }


class HellaSwagHarness(HellaSwag):
    """HellaSwag as lm-evaluation-harness asks it: cleaned text under its activity, endings by likelihood a character.

    GPT-2 124M: acc_norm 0.3114, acc 0.2892 (lm-evaluation-harness, zero-shot). Reads the original JSON lines, or cleaned text of six
    lines an example (context, label, four endings; such files leave out the harness's one capital letter, which can move a prediction).
    """

    name = "hellaswag_harness"

    def rows(self, path: Path) -> list[Any]:
        if not text_of(path)[:1].startswith("{"):
            lines = text_of(path).rstrip("\n").split("\n")
            groups = [lines[i : i + 6] for i in range(0, len(lines), 6)]
            if any(len(g) != 6 or g[1] not in {"0", "1", "2", "3"} for g in groups):
                raise UserError(
                    f"{path} is not HellaSwag: it holds neither JSON lines nor six lines an example."
                )
            return [{"context": g[0], "endings": g[2:], "label": int(g[1])} for g in groups]
        return [
            {
                "context": _clean(f"{r['activity_label']}: {r['ctx_a']} {r['ctx_b'].capitalize()}"),
                "endings": [_clean(ending) for ending in r["endings"]],
                "label": int(r["label"]),
            }
            for r in _hellaswag_json(path)
        ]

    def question(self, row: Any, tokenizer: Tokenizer) -> Question:
        pairs = [split_pair(tokenizer, row["context"], " " + ending) for ending in row["endings"]]
        return Question(pairs[0].context, [pair.endings[0] for pair in pairs])

    def result(self, row: Any, answer: Sequence[Scored]) -> Result:
        totals = np.array([ending.total for ending in answer])
        by_character = totals / [len(ending) for ending in row["endings"]]
        return {
            "acc": int(totals.argmax() == row["label"]),
            "acc_norm": int(by_character.argmax() == row["label"]),
        }


class Lambada(Task):
    """LAMBADA: the last word of a passage that needs all of it. OpenAI's 5,153 test passages.

    GPT-2 124M: perplexity 40.06, acc 0.3256 for the whole word (lm-evaluation-harness `lambada_openai`). The GPT-2 paper's 35.13 and
    0.4599 are of the last token alone, which may be the end of a word: reported as last_token_*.
    """

    name = "lambada"
    count = 5153
    remote = Remote(
        "https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl",
        "4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226",
    )

    def rows(self, path: Path) -> list[Any]:
        texts = [r["text"] for r in json_lines(path, ["text"])]
        if not all(" " in text.strip() for text in texts):
            raise UserError(f"{path} is not LAMBADA: a passage has no last word.")
        return texts

    def question(self, row: Any, tokenizer: Tokenizer) -> Question:
        context, _, word = row.rpartition(" ")
        return split_pair(tokenizer, context, " " + word)

    def result(self, row: Any, answer: Sequence[Scored]) -> Result:
        [word] = answer
        return {
            "nats": -word.total, "acc": int(word.hit.all()), "last_token_nats": -float(word.log_p[-1]), "last_token_acc": int(word.hit[-1])
        }  # fmt: skip

    def figures(self, results: Sequence[Result]) -> dict[str, float]:
        means = super().figures(results)
        return {
            "perplexity": perplexity(means["nats"]),
            "acc": means["acc"],
            "last_token_perplexity": perplexity(means["last_token_nats"]),
            "last_token_acc": means["last_token_acc"],
        }


def _hellaswag_json(path: Path) -> list[dict[str, Any]]:
    rows = json_lines(path, ["activity_label", "ctx_a", "ctx_b", "ctx", "endings", "label"])
    if not all(len(r["endings"]) == 4 and str(r["label"]) in {"0", "1", "2", "3"} for r in rows):
        raise UserError(
            f"{path} is not HellaSwag's labelled part: an example lacks four endings and a label of 0 to 3."
        )
    return [{**r, "label": int(r["label"])} for r in rows]


def _clean(text: str) -> str:
    """HellaSwag's WikiHow half carries marks in brackets: a title becomes a new sentence, the others go (lm-evaluation-harness)."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")
