"""Generate text for several clients: two requests at once, while a limited number of others wait.

    engine = Engine([Served("gpt2", model, tokenizer)])
    job = Job(engine.find("gpt2"), [ids], n_tokens=64)
    for row, token in engine.write(engine.take_place(), job, stop=threading.Event()): ...

Requests that are answered at once take turns at the device, a token each. A client that leaves sets
`stop`, and its place in the queue is free again.
"""

import codecs
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from anew.errors import UserError, unknown_name
from anew.inference.generate import stream_with_logits
from anew.model.gpt import GPT
from anew.tokenizer.bpe import Tokenizer

AT_ONCE = 2  # requests, so that two models can be watched side by side
MAX_TEXTS = 16  # of one request; they are generated together
ALTERNATIVES = 10
POLL_SECONDS = 0.25  # how often a waiting request checks whether its client has left


class Busy(Exception):
    """All places of the queue are taken."""


class Turns:
    """A lock that its waiters get in the order in which they came.

    A `threading.Lock` would mostly go to the thread that has just released it.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.drawn = 0  # tickets so far
        self.current = 0  # the ticket whose turn it is

    def __enter__(self) -> None:
        with self.changed:
            ticket = self.drawn
            self.drawn += 1
            self.changed.wait_for(lambda: self.current == ticket)

    def __exit__(self, *_: object) -> None:
        with self.changed:
            self.current += 1
            self.changed.notify_all()


class Place:
    """A place in the queue. It is free again when its work ends, or when nothing refers to it.

    The second case is that of a client that leaves before its work has begun.
    """

    def __init__(self, places: threading.BoundedSemaphore) -> None:
        self.places: threading.BoundedSemaphore | None = None
        if not places.acquire(blocking=False):
            raise Busy
        self.places = places

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.free()

    def free(self) -> None:
        """Give the place back; later calls do nothing."""
        places, self.places = self.places, None
        if places is not None:
            places.release()

    def __del__(self) -> None:
        self.free()


@dataclass(frozen=True)
class Served:
    """A model under the name that clients use."""

    name: str
    model: GPT
    tokenizer: Tokenizer
    is_chat: bool = False  # whether it was trained on conversations


@dataclass(frozen=True)
class Job:
    """Prompts to continue. The options are those of `generate.stream_with_logits`.

    Raises UserError for a job that the model cannot do.
    """

    served: Served
    prompts: Sequence[Sequence[int]]
    n_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        config = self.served.model.config
        longest = max(map(len, self.prompts))
        if len(self.prompts) > MAX_TEXTS:
            raise UserError(
                f"{len(self.prompts)} texts at once are more than the {MAX_TEXTS} that one request "
                "may have."
            )
        if longest + self.n_tokens > config.n_positions:
            raise UserError(
                f"{longest} tokens of prompt and {self.n_tokens} new ones are more than the "
                f"{config.n_positions} that {self.served.name} reads at once."
            )
        if any(not 0 <= token < config.vocab_size for ids in self.prompts for token in ids):
            raise UserError(f"a token id is outside 0 to {config.vocab_size - 1}.")


@dataclass(frozen=True)
class Alternative:
    """A token that the model could have chosen."""

    id: int
    label: str
    log_p: float


@dataclass(frozen=True)
class Token:
    """A token of a text, its log-probability in nats, and the likeliest tokens in its place.

    `text` is what the token adds to the text; it is empty while a character is incomplete. At the
    end, an incomplete character becomes U+FFFD. Probabilities are the model's own, before
    temperature, top-k and top-p. The first token of a prompt has none.
    """

    id: int
    text: str
    is_end_of_text: bool = False
    log_p: float | None = None
    alternatives: list[Alternative] | None = None


class Engine:
    """The models, and a queue in which `waiting` requests may wait while others are answered."""

    def __init__(self, models: Sequence[Served], waiting: int = 8, int8: bool = False) -> None:
        self.models = {served.name: served for served in models}
        self.places = threading.BoundedSemaphore(AT_ONCE + waiting)
        self.writers = threading.Semaphore(AT_ONCE)
        self.device = Turns()
        self.int8 = int8

    def find(self, name: str | None) -> Served:
        """Return the model of this name, or the first model.

        The last part of a name is enough, such as demo for runs/demo. Raises UserError if there is
        no such model, or more than one.
        """
        if name is None:
            return next(iter(self.models.values()))
        found = [full for full in self.models if name in (full, Path(full).name)]
        if name in self.models:
            found = [name]
        if len(found) != 1:
            raise unknown_name("model", name, self.models)
        return self.models[found[0]]

    def take_place(self) -> Place:
        """Return a place in the queue; raise Busy if all are taken."""
        return Place(self.places)

    def write(
        self,
        place: Place,
        job: Job,
        stop: threading.Event,
        alternatives: int = ALTERNATIVES,
    ) -> Iterator[tuple[int, Token]]:
        """Yield (row, token) as they are drawn, until each row has all its tokens or end of text.

        Nothing more is drawn once `stop` is set. `place` is given back at the end.
        """
        may_write = False
        try:
            while not may_write:
                may_write = self.writers.acquire(timeout=POLL_SECONDS)
                if stop.is_set():
                    return
            yield from self._write(job, stop, alternatives)
        finally:
            if may_write:
                self.writers.release()
            place.free()

    def _write(
        self,
        job: Job,
        stop: threading.Event,
        alternatives: int,
    ) -> Iterator[tuple[int, Token]]:
        tokenizer = job.served.tokenizer
        # A token may end within a UTF-8 character.
        decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in job.prompts]
        unfinished = set(range(len(job.prompts)))
        steps = stream_with_logits(
            job.served.model,
            job.prompts,
            job.n_tokens,
            temperature=job.temperature,
            top_k=job.top_k,
            top_p=job.top_p,
            seed=job.seed,
            int8=self.int8 and len(job.prompts) == 1,
        )
        for n_left in reversed(range(job.n_tokens)):
            with self.device:
                ids, logits = next(steps)
                log_p = logits.float().cpu().log_softmax(-1)  # (B, 50257)
            top = log_p.topk(alternatives)  # (B, alternatives)
            for row in sorted(unfinished):
                is_end = ids[row] == tokenizer.end_of_text
                content = b"" if is_end else tokenizer.decode_bytes([ids[row]])
                is_last = is_end or n_left == 0
                yield (
                    row,
                    Token(
                        id=ids[row],
                        text=decoders[row].decode(content, final=is_last),
                        is_end_of_text=is_end,
                        log_p=log_p[row, ids[row]].item(),
                        alternatives=alternatives_of(tokenizer, top.indices[row], top.values[row]),
                    ),
                )
                if is_end:
                    unfinished.discard(row)
            if not unfinished or stop.is_set():
                return

    @torch.inference_mode()
    def score(self, served: Served, ids: Sequence[int], alternatives: int) -> list[Token]:
        """Return the tokens of a text with their log-probabilities."""
        model, tokenizer = served.model, served.tokenizer
        with self.device:
            logits = model(torch.tensor([ids], device=model.transformer.wte.weight.device))
            log_p = logits[0, :-1].float().cpu().log_softmax(-1)  # (T - 1, 50257)
        top = log_p.topk(alternatives)  # (T - 1, alternatives)
        tokens = [Token(ids[0], tokenizer.decode([ids[0]]))]
        for row, token in enumerate(ids[1:]):
            tokens.append(
                Token(
                    id=token,
                    text=tokenizer.decode([token]),
                    log_p=log_p[row, token].item(),
                    alternatives=alternatives_of(tokenizer, top.indices[row], top.values[row]),
                )
            )
        return tokens


def alternatives_of(tokenizer: Tokenizer, ids: Tensor, log_p: Tensor) -> list[Alternative]:
    """Return the alternatives of one token from two vectors of the same length."""
    return [
        Alternative(token, tokenizer.decode([token]), value)
        for token, value in zip(ids.tolist(), log_p.tolist(), strict=True)
    ]
