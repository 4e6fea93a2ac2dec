"""Models that write for several visitors: one text at a time on the device, the others wait, and whoever leaves frees the place.

engine = Engine([Served("gpt2", model, tokenizer)])
for row, token in engine.write(engine.take_place(), served, [ids], Rules(n_tokens=64), stop=threading.Event()): ...
"""

import codecs
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anew.errors import UserError
from anew.inference.generate import check_options, stream_with_logits
from anew.model.gpt import GPT
from anew.tokenizer.bpe import Tokenizer

MOST_ROWS = 16  # texts of one request that are written at once
ALTERNATIVES = 10
LOOK_SECONDS = 0.25  # between looks whether a visitor who waits is still there


class Busy(Exception):
    """As many wait as may wait."""


class Place:
    """A place in the queue. It is given back when its work ends, and also when nobody holds it any more: a visitor may leave before."""

    def __init__(self, places: threading.BoundedSemaphore) -> None:
        self.places: threading.BoundedSemaphore | None = None
        if not places.acquire(blocking=False):
            raise Busy
        self.places = places

    def free(self) -> None:
        """Give it back, once."""
        places, self.places = self.places, None
        if places is not None:
            places.release()

    def __del__(self) -> None:
        self.free()


@dataclass(frozen=True)
class Served:
    """A model under the name that visitors know it by."""

    name: str
    model: GPT
    tokenizer: Tokenizer


@dataclass(frozen=True)
class Rules:
    """How a text is continued; see `generate.steps`."""

    n_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Token:
    """One token of a text: what it adds to it, how likely the model found it, and its likeliest alternatives as (id, log p).

    `text` is empty while a character is still incomplete. Probabilities are the model's own, before temperature, top-k and top-p.
    """

    id: int
    text: str
    log_p: float
    alternatives: list[tuple[int, float]]


class Engine:
    """The models, and the queue in front of them."""

    def __init__(self, models: Sequence[Served], waiting: int = 8, int8: bool = False) -> None:
        self.models = {served.name: served for served in models}
        self.places = threading.BoundedSemaphore(1 + waiting)
        self.device = threading.Lock()
        self.int8 = int8

    def find(self, name: str) -> Served:
        """The model of this name; UserError if there is none."""
        if name not in self.models:
            raise UserError(
                f"there is no model '{name}' here; choose one of {', '.join(self.models)}."
            )
        return self.models[name]

    def check(self, served: Served, prompts: Sequence[Sequence[int]], rules: Rules) -> None:
        """Refuse what cannot be written: UserError says why."""
        check_options(rules.temperature, rules.top_k, rules.top_p, prompts, rules.n_tokens)
        positions, longest = served.model.config.n_positions, max(map(len, prompts))
        if len(prompts) > MOST_ROWS:
            raise UserError(
                f"{len(prompts)} texts at once are more than the {MOST_ROWS} that one request may have."
            )
        if longest + rules.n_tokens > positions:
            raise UserError(
                f"{longest} tokens of prompt and {rules.n_tokens} new ones are more than the {positions} that {served.name} reads at once."
            )
        if any(not 0 <= i < served.model.config.vocab_size for prompt in prompts for i in prompt):
            raise UserError(f"a token id is outside 0 to {served.model.config.vocab_size - 1}.")

    def take_place(self) -> Place:
        """A place in the queue; Busy if all are taken."""
        return Place(self.places)

    def write(
        self,
        place: Place,
        served: Served,
        prompts: Sequence[Sequence[int]],
        rules: Rules,
        stop: threading.Event,
        alternatives: int = ALTERNATIVES,
    ) -> Iterator[tuple[int, Token]]:
        """(row, token) as they are drawn, until each row has its tokens or end of text, or `stop` is set."""
        mine = False
        try:
            while not (mine := self.device.acquire(timeout=LOOK_SECONDS)):
                if stop.is_set():  # left while waiting
                    return
            yield from self._write(served, prompts, rules, stop, alternatives)
        finally:
            if mine:
                self.device.release()
            place.free()

    def _write(
        self,
        served: Served,
        prompts: Sequence[Sequence[int]],
        rules: Rules,
        stop: threading.Event,
        alternatives: int,
    ) -> Iterator[tuple[int, Token]]:
        decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in prompts]
        left = set(range(len(prompts)))
        int8 = self.int8 and len(prompts) == 1
        drawn = stream_with_logits(
            served.model,
            prompts,
            rules.n_tokens,
            rules.temperature,
            rules.top_k,
            rules.top_p,
            rules.seed,
            int8=int8,
        )
        for ids, logits in drawn:
            log_p = logits.float().cpu().log_softmax(-1)
            top = log_p.topk(min(alternatives, log_p.size(-1))) if alternatives else None
            for row in sorted(left):
                i = ids[row]
                ended = i == served.tokenizer.end_of_text
                text = "" if ended else decoders[row].decode(served.tokenizer.decode_bytes([i]))
                others = (
                    list(zip(top.indices[row].tolist(), top.values[row].tolist(), strict=True))
                    if top
                    else []
                )
                yield row, Token(i, text, log_p[row, i].item(), others)
                if ended:
                    left.discard(row)
            if not left or stop.is_set():
                return

    @torch.inference_mode()
    def read(self, served: Served, ids: Sequence[int]) -> Tensor:
        """Log-probabilities (T - 1, 50257) of what follows each token of a text but its last."""
        with self.device:
            model = served.model
            logits = model(torch.tensor([ids], device=model.transformer.wte.weight.device))[0, :-1]
            return logits.float().cpu().log_softmax(-1)
