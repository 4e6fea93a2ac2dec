"""Running text: predict every token of a document, and report loss, perplexity and accuracy.

    examples = list(windows(ids, n_positions=1024))
    answers = score(model, [example.question for example in examples])

A document is cut into windows, because a model reads at most `n_positions` tokens at a time.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from anew.evaluate.scorer import Answer, Question
from anew.evaluate.tasks.task import Example, Result, Task, perplexity

# Lower bounds of the bins of `loss_by_position`: the number of tokens before the predicted one.
POSITION_EDGES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Window:
    """A piece of a document that is predicted at once."""

    seen: int  # tokens of context before it
    words: float = 0  # its share, by tokens, of the document's words; 0: not counted
    bytes: float = 0  # its share, by tokens, of the document's bytes


def windows(
    ids: Sequence[int],
    n_positions: int,
    words: int = 0,
    bytes: int = 0,
    stride: int = 0,
) -> Iterator[Example]:
    """Yield windows that predict each token of a document once, except the first.

    `words` and `bytes` are those of the document's text. A window predicts `stride` tokens (0: as
    many as fit) behind as much context as fits. A small stride gives every token a long context,
    but most tokens are read several times.
    """
    stride = min(stride or n_positions, n_positions)
    for start in range(1, len(ids), stride):
        ending = ids[start : start + stride]
        room = n_positions - (len(ending) - 1)  # the last token of the ending is not read
        context = ids[max(0, start - room) : start]
        share = len(ending) / (len(ids) - 1)
        window = Window(len(context), words * share, bytes * share)
        yield Example(window, Question(context, [ending]))


class RunningText(Task):
    """A task whose examples are windows. The row of an example is its Window."""

    def result(self, row: Window, answer: Answer) -> Result:
        """Return sums over the window, and sums by position."""
        [scores] = answer
        nats = -scores.log_probs.astype(np.float64)  # (tokens,)
        n_tokens = len(nats)
        n_before = np.arange(row.seen, row.seen + n_tokens)  # (tokens,)
        position_bins = np.searchsorted(POSITION_EDGES, n_before, side="right") - 1

        def by_position(values: np.ndarray | None) -> list[float]:
            return np.bincount(position_bins, values, len(POSITION_EDGES)).tolist()

        return {
            "nats": float(nats.sum()),
            "tokens": n_tokens,
            "hits": int(scores.is_top.sum()),
            "words": row.words,
            "bytes": row.bytes,
            "position_nats": by_position(nats),
            "position_tokens": by_position(None),
        }

    def figures(self, results: Sequence[Result]) -> dict[str, Any]:
        """Return loss (nats per token), perplexities, accuracy, bits per byte and loss by position.

        `loss_by_position` is a table; bins without tokens are left out.
        """

        def total(key: str) -> Any:
            return sum(result[key] for result in results)

        def table(key: str) -> np.ndarray:
            return np.sum([result[key] for result in results], axis=0)

        nats = total("nats")
        loss = nats / total("tokens")
        figures: dict[str, Any] = {
            "loss": loss,
            "token_perplexity": perplexity(loss),
            "acc": total("hits") / total("tokens"),
        }
        if total("words"):
            figures["word_perplexity"] = perplexity(nats / total("words"))
        if total("bytes"):
            figures["bits_per_byte"] = nats / math.log(2) / total("bytes")
        figures["loss_by_position"] = _loss_by_position(
            table("position_nats"),
            table("position_tokens"),
        )
        return figures


def _loss_by_position(nats: np.ndarray, tokens: np.ndarray) -> dict[str, float]:
    """Return {lower bound of a bin: mean loss} for bins with tokens."""
    filled = tokens.nonzero()[0]
    return {str(POSITION_EDGES[i]): float(nats[i] / tokens[i]) for i in filled}
