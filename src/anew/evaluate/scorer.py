"""Compute how likely a model finds given endings of given contexts. Every task uses this scorer.

    question = Question(context=[15496, 11], endings=[[995, 13], [616, 1545]])
    [endings] = score(model, [question])
    endings[0].log_probs                # natural log-probability of each token of the first ending
    endings[0].is_top                   # whether each token is the model's most likely one

A question is one row of the batch: its context, followed by all of its endings. Each ending has the
positions behind the context, and attends to the context and to itself but not to other endings.
For a context c0 c1 c2 with the endings a0 a1 a2 and b0 b1, the row is:

    token       c0  c1  c2  a0  a1  b0
    position     0   1   2   3   4   3
    branch       0   0   0   1   1   2

The last token of an ending is predicted but never read, so a2 and b1 are not in the row. The hidden
state of c2 predicts both a0 and b0. The model thus reads a shared context once, scores HellaSwag's
four endings in one forward pass, and computes logits only where they predict a token of an ending.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from anew.model.gpt import GPT

HEAD_ROWS = 512  # hidden states projected to the vocabulary at a time, which limits memory
CONTEXT_BRANCH = 0
PADDING_BRANCH = -1
Ids = Sequence[int]


@dataclass(frozen=True)
class Question:
    """Token ids of a context, at least one, and of the endings that may follow it."""

    context: Ids
    endings: Sequence[Ids]
    # The most tokens of the context and one ending together. None: one more than the model's
    # positions, because the last token of an ending is not read.
    max_tokens: int | None = None

    @property
    def n_tokens(self) -> int:
        """Return the number of tokens in the context and in all endings."""
        return len(self.context) + sum(len(ending) for ending in self.endings)


@dataclass(frozen=True)
class EndingScore:
    """What the model predicts for each token of one ending. Log-probabilities are natural."""

    log_probs: np.ndarray  # (tokens,) float32: of the token itself
    is_top: np.ndarray  # (tokens,) bool: whether the token is the most likely one

    @property
    def total(self) -> float:
        """Return the log-probability of the whole ending in nats."""
        return float(self.log_probs.sum(dtype=np.float64))

    def part(self, start: int, end: int) -> Self:
        """Return a view of the scores of tokens `start` to `end` - 1."""
        return type(self)(
            self.log_probs[start:end],
            self.is_top[start:end],
        )


Answer = list[EndingScore]  # one score for each ending of a question


@torch.inference_mode()
def score(model: GPT, questions: Sequence[Question], batch_tokens: int = 8192) -> list[Answer]:
    """Return the answer to each question, in the order given.

    The model computes in its `compute_dtype`; softmax and sums are fp32. Rows of similar length
    share a batch of about `batch_tokens` tokens; its composition changes results by rounding only.

    Where context and ending together exceed the question's `max_tokens`, the beginning of the
    context is cut off; endings of the same length still share it. An ending that alone exceeds the
    model's positions is scored in pieces.
    """
    answers: list[Answer] = []
    rows: list[_Row] = []
    for question in questions:
        answer = [_empty_score(len(ending)) for ending in question.endings]
        answers.append(answer)
        rows.extend(_rows_of(question, answer, model.config.n_positions))
    rows.sort(key=lambda row: row.length)
    was_training = model.training
    model.eval()
    try:
        for batch in _batches(rows, batch_tokens):
            _score_rows(model, batch)
    finally:
        model.train(was_training)
    return answers


def _empty_score(n_tokens: int) -> EndingScore:
    """Return the score of an ending, to be filled in."""
    return EndingScore(
        log_probs=np.empty(n_tokens, dtype=np.float32),
        is_top=np.empty(n_tokens, dtype=bool),
    )


@dataclass(frozen=True)
class _Piece:
    """An ending, or a part of one that is longer than the model's positions."""

    tokens: Ids
    score: EndingScore  # views of the ending's arrays, to be filled in


@dataclass(frozen=True)
class _Row:
    """One row of a batch: a context and the pieces that follow it, each within the positions."""

    context: Ids
    pieces: Sequence[_Piece]

    @property
    def length(self) -> int:
        """Return the number of tokens that the model reads: all but the last of each piece."""
        return len(self.context) + sum(len(piece.tokens) - 1 for piece in self.pieces)

    @property
    def has_branches(self) -> bool:
        """Return whether tokens of several pieces are read, which must not see each other."""
        return sum(len(piece.tokens) > 1 for piece in self.pieces) > 1


def _rows_of(question: Question, answer: Answer, n_positions: int) -> Iterator[_Row]:
    """Yield one row for a question whose longest ending fits behind the whole context.

    Otherwise yield one row for all endings of the same length, since the same part of the context
    fits before them, and one for each later piece of an ending that exceeds the positions.
    """
    context = question.context
    assert len(context) > 0, "a context needs at least one token"
    assert all(len(ending) > 0 for ending in question.endings), "an ending needs at least one token"
    max_tokens = n_positions + 1  # the last token of an ending is not read
    if question.max_tokens is not None:
        max_tokens = min(max_tokens, question.max_tokens)
    longest = max(len(ending) for ending in question.endings)
    if len(context) + longest <= max_tokens:
        yield _Row(context, [_Piece(*pair) for pair in zip(question.endings, answer, strict=True)])
        return
    pieces_by_length: dict[int, list[_Piece]] = {}
    for ending, ending_score in zip(question.endings, answer, strict=True):
        for start in range(0, len(ending), n_positions):
            tokens = ending[start : start + n_positions]
            piece = _Piece(tokens, ending_score.part(start, start + len(tokens)))
            if start == 0:
                pieces_by_length.setdefault(len(tokens), []).append(piece)
            else:
                before = [*context, *ending[:start]]
                yield _Row(_last(before, max_tokens - len(tokens)), [piece])
    for length, pieces in pieces_by_length.items():
        yield _Row(_last(context, max_tokens - length), pieces)


def _last(ids: Ids, count: int) -> Ids:
    """Return the last `count` token ids, or the last one if `count` is 0."""
    return ids[-max(1, count) :]


def _batches(rows: Iterable[_Row], batch_tokens: int) -> Iterator[list[_Row]]:
    """Yield consecutive rows whose batch, padded to its longest row, has at most `batch_tokens`.

    `rows` are sorted by length. A longer row is a batch of its own.
    """
    batch: list[_Row] = []
    for row in rows:
        if batch and row.length * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


@dataclass(frozen=True)
class _Layout:
    """The input of one forward pass, and which of its hidden states predict which tokens."""

    ids: Tensor  # (B, T)
    positions: Tensor  # (B, T)
    branches: Tensor  # (B, T): context, padding, or 1 and up for the pieces of the row
    targets: Tensor  # (M,): the tokens of all pieces, row by row
    places: Tensor  # (M,): for each target, the place in the flattened (B * T,) that predicts it


def _layout(rows: Sequence[_Row], device: torch.device) -> _Layout:
    """Arrange rows as tensors on `device`."""
    width = max(row.length for row in rows)
    ids = np.zeros((len(rows), width), dtype=np.int64)
    positions = np.zeros_like(ids)
    branches = np.full_like(ids, PADDING_BRANCH)
    targets: list[int] = []
    places: list[int] = []
    for b, row in enumerate(rows):
        row_start = b * width
        n_context = len(row.context)
        ids[b, :n_context] = row.context
        positions[b, :n_context] = np.arange(n_context)
        branches[b, :n_context] = CONTEXT_BRANCH
        end = n_context
        for branch, piece in enumerate(row.pieces, start=1):
            start = end
            end = start + len(piece.tokens) - 1
            ids[b, start:end] = piece.tokens[:-1]
            positions[b, start:end] = np.arange(n_context, n_context + end - start)
            branches[b, start:end] = branch
            targets.extend(piece.tokens)
            places.append(row_start + n_context - 1)  # the last token of the context
            places.extend(range(row_start + start, row_start + end))
    arrays = (ids, positions, branches, targets, places)
    return _Layout(*(torch.as_tensor(array, device=device) for array in arrays))


def _score_rows(model: GPT, rows: Sequence[_Row]) -> None:
    """Fill in the score of each piece of each row."""
    layout = _layout(rows, model.transformer.wte.weight.device)
    mask = None
    if any(row.has_branches for row in rows):
        mask = _attention_mask(layout.branches)
    hidden = model.hidden(layout.ids, position=layout.positions, mask=mask)  # (B, T, C)
    used, sources = layout.places.unique(
        return_inverse=True
    )  # (N,) and (M,): used[sources] == places
    scores = _score_tokens(model, hidden.flatten(0, 1)[used], sources, layout.targets)
    start = 0
    for row in rows:
        for piece in row.pieces:
            found = scores.part(start, start + len(piece.tokens))
            piece.score.log_probs[:] = found.log_probs
            piece.score.is_top[:] = found.is_top
            start += len(piece.tokens)


def _attention_mask(branches: Tensor) -> Tensor:
    """Return which tokens each token attends to, (B, 1, T, T), for (B, T) branches.

    These are the token itself and earlier ones that belong to the context or to its own branch.
    """
    key_branch = branches.unsqueeze(1)  # (B, 1, T)
    query_branch = branches.unsqueeze(2)  # (B, T, 1)
    is_context = key_branch == CONTEXT_BRANCH  # (B, 1, T)
    is_own = key_branch == query_branch  # (B, T, T)
    return (is_context | is_own).tril().unsqueeze(1)


def _score_tokens(model: GPT, hidden: Tensor, sources: Tensor, targets: Tensor) -> EndingScore:
    """Return the scores of M `targets`; target m is predicted by row `sources[m]` of (N, C) hidden.

    The (N, vocabulary) logits are computed HEAD_ROWS rows at a time.
    """
    log_probs = torch.empty_like(targets, dtype=torch.float32)
    is_top = torch.empty_like(targets, dtype=torch.bool)
    for start in range(0, len(hidden), HEAD_ROWS):
        end = start + HEAD_ROWS
        logits = model.head(hidden[start:end]).float()  # (HEAD_ROWS, vocabulary)
        is_here = (sources >= start) & (sources < end)
        here = is_here.nonzero().squeeze(1)  # (m,): numbers of the targets these rows predict
        rows = sources[here] - start  # (m,)
        wanted = targets[here]  # (m,)
        top = logits.amax(dim=1)  # (HEAD_ROWS,)
        top_of_wanted = top[rows]  # (m,)
        wanted_logits = logits[rows, wanted]  # (m,)
        # Several tokens may have the highest logit. The one with the lowest id counts as the most
        # likely one, as in argmax, which is slow and therefore computed for few rows.
        hits = wanted_logits == top_of_wanted  # (m,)
        candidates = hits.nonzero().squeeze(1)
        candidate_logits = logits[rows[candidates]]
        hits[candidates] = candidate_logits.argmax(dim=1) == wanted[candidates]
        # In place, because torch.logsumexp takes twice the time on a CPU.
        logits -= top.unsqueeze(1)
        log_sum = logits.exp_().sum(dim=1).log()  # (HEAD_ROWS,)
        log_probs[here] = wanted_logits - top_of_wanted - log_sum[rows]
        is_top[here] = hits
    return EndingScore(log_probs.cpu().numpy(), is_top.cpu().numpy())
