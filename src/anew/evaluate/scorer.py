"""The one scorer: how likely a model finds given endings of given contexts. Every task asks it and does only arithmetic itself.

    question = Question(context=[15496, 11], endings=[[995, 13], [616, 1545]])
    [answer] = score(model, [question])
    answer[0].log_p                     # natural log-likelihood of each token of the first ending
    answer[0].hit                       # was it the model's likeliest token?

A question is one row of the batch, a tree rather than a line: its context once, then its endings side by side, each at the positions
behind the context and blind to the others. So a shared context costs one pass, HellaSwag's four endings are scored in one forward, and
the vocabulary projection runs on the tokens that are asked about and no others.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from anew.model.gpt import GPT

HEAD_ROWS = 512  # logits alive at once are this many rows of the vocabulary in fp32
Ids = Sequence[int]


@dataclass(frozen=True)
class Question:
    """Token ids of a context, at least one, and of the endings that may follow it."""

    context: Ids
    endings: Sequence[Ids]


@dataclass(frozen=True)
class Scored:
    """Of each token of one ending: its log-likelihood in nats, the log-likelihood of the likeliest token, and whether they are one."""

    log_p: np.ndarray  # (tokens,) float32
    best: np.ndarray  # (tokens,) float32
    hit: np.ndarray  # (tokens,) bool

    @property
    def total(self) -> float:
        """Log-likelihood of the whole ending in nats."""
        return float(self.log_p.sum(dtype=np.float64))


@torch.inference_mode()
def score(
    model: GPT, questions: Sequence[Question], batch_tokens: int = 8192
) -> list[list[Scored]]:
    """A `Scored` for each ending of each question, in the order given. The model computes in its `compute_dtype`, reductions are fp32.

    A context too long for the model's positions loses its beginning, for each ending on its own, and an ending that is longer than they are
    is scored in pieces. Rows of like length are batched together, about `batch_tokens` at a time; that changes no more than rounding.
    """
    rows = [
        row
        for number, question in enumerate(questions)
        for row in _rows(number, question, model.config.n_positions)
    ]
    found: dict[tuple[int, int, int], Scored] = {}
    was_training = model.training
    model.eval()
    try:
        for batch in _batches(sorted(rows, key=lambda row: row.length), batch_tokens):
            log_p, best, hit = _score_rows(model, batch)
            start = 0
            for row in batch:
                for (ending, piece), tokens in zip(row.numbers, row.endings, strict=True):
                    part = slice(start, start := start + len(tokens))
                    found[row.question, ending, piece] = Scored(log_p[part], best[part], hit[part])
    finally:
        model.train(was_training)
    answers: list[list[Scored]] = [[] for _ in questions]
    for (number, _, piece), scored in sorted(found.items(), key=lambda item: item[0]):
        if piece:
            scored = _joined(answers[number].pop(), scored)
        answers[number].append(scored)
    return answers


def _joined(a: Scored, b: Scored) -> Scored:
    return Scored(
        *(np.concatenate(pair) for pair in ((a.log_p, b.log_p), (a.best, b.best), (a.hit, b.hit)))
    )


@dataclass(frozen=True)
class _Row:
    """One row of a batch: a context that fits, and some of its question's endings."""

    question: int
    context: Ids
    endings: Sequence[Ids]
    numbers: Sequence[
        tuple[int, int]
    ]  # which of the question's endings these are, and which piece of a long one

    @property
    def length(self) -> int:
        return len(self.context) + sum(
            len(ending) - 1 for ending in self.endings
        )  # the last token of an ending is never read


def _rows(number: int, question: Question, positions: int) -> Iterator[_Row]:
    assert len(question.context) > 0, "a context needs at least one token"
    assert all(len(ending) > 0 for ending in question.endings), "an ending needs at least one token"
    if len(question.context) + max(len(ending) for ending in question.endings) - 1 <= positions:
        yield _Row(
            number,
            question.context,
            question.endings,
            [(i, 0) for i in range(len(question.endings))],
        )
        return
    for i, ending in enumerate(question.endings):
        for piece, start in enumerate(range(0, len(ending), positions)):
            tokens = ending[start : start + positions]
            before = [*question.context, *ending[:start]]
            yield _Row(number, before[-(positions + 1 - len(tokens)) :], [tokens], [(i, piece)])


def _batches(rows: Iterable[_Row], batch_tokens: int) -> Iterator[list[_Row]]:
    """Consecutive rows (sorted by length) while the batch, padded to its longest row, stays within `batch_tokens`."""
    batch: list[_Row] = []
    for row in rows:
        if batch and row.length * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _score_rows(model: GPT, rows: list[_Row]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """log_p, best and hit of every token of every ending, row after row."""
    device = model.transformer.wte.weight.device
    width = max(row.length for row in rows)
    ids = np.zeros((len(rows), width), dtype=np.int64)
    position = np.zeros((len(rows), width), dtype=np.int64)
    branch = np.full(
        (len(rows), width), -1, dtype=np.int64
    )  # 0: context, 1..: endings, -1: padding
    readouts: list[int] = []  # places whose logits are needed
    where: list[int] = []  # for each target, which of them predicts it
    targets: list[int] = []
    for b, row in enumerate(rows):
        end = n = len(row.context)
        ids[b, :n], position[b, :n], branch[b, :n] = row.context, np.arange(n), 0
        shared = len(readouts)
        readouts.append(b * width + n - 1)
        for i, ending in enumerate(row.endings, 1):
            start, end = end, end + len(ending) - 1
            ids[b, start:end], position[b, start:end], branch[b, start:end] = (
                ending[:-1],
                np.arange(n, n + end - start),
                i,
            )
            where += [shared, *range(len(readouts), len(readouts) + end - start)]
            readouts += range(b * width + start, b * width + end)
            targets += ending
    mask = None
    if any(len(row.endings) > 1 for row in rows):
        mask = _visible(torch.from_numpy(branch).to(device))
    hidden = model.hidden(
        torch.from_numpy(ids).to(device), position=torch.from_numpy(position).to(device), mask=mask
    )
    places = hidden.flatten(0, 1)[torch.tensor(readouts, device=device)]
    return _read_out(
        model, places, torch.tensor(where, device=device), torch.tensor(targets, device=device)
    )


def _visible(branch: Tensor) -> Tensor:
    """(B, T) branch of each token -> (B, 1, T, T): earlier tokens of the context and of the own branch."""
    same = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])
    return same.tril()[:, None]


def _read_out(
    model: GPT, places: Tensor, where: Tensor, targets: Tensor
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """places (N, C), and for each of M targets the place that predicts it -> log_p, best, hit, each (M,)."""
    parts = []
    for start in range(0, len(places), HEAD_ROWS):
        mine = ((where >= start) & (where < start + HEAD_ROWS)).nonzero().squeeze(1)
        rows, wanted = where[mine] - start, targets[mine]
        logits = model.head(places[start : start + HEAD_ROWS]).float()  # (rows, vocabulary)
        top, asked = logits.amax(dim=1), logits[rows, wanted]
        hit = asked == top[rows]
        hit[hit.clone()] = (
            logits[rows[hit]].argmax(dim=1) == wanted[hit]
        )  # among equal logits the first is the likeliest
        log_sum = (
            logits.sub_(top[:, None]).exp_().sum(dim=1).log()
        )  # in place: torch.logsumexp takes twice the time on a CPU
        parts.append((mine, asked - top[rows] - log_sum[rows], -log_sum[rows], hit))
    order, *columns = (torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True))
    back = np.argsort(order, kind="stable")
    return columns[0][back], columns[1][back], columns[2][back]
