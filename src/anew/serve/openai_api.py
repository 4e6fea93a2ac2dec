"""OpenAI's completions API: chunks of a stream, and their sum as one answer."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from anew.serve.engine import Engine, Place, Token
from anew.serve.schemas import Wanted

Chunk = dict[str, Any]


@dataclass
class Text:
    """One text on its way: what is shown, and the end of it that may turn out to begin a stop sequence."""

    shown: str = ""
    held: str = ""
    tokens: list[Token] = field(default_factory=list)  # behind `shown`, not yet sent
    finished: bool = False

    def add(self, token: Token, stops: tuple[str, ...]) -> bool:
        """Take one token; True if a stop sequence is complete, which is then cut off."""
        self.tokens.append(token)
        self.held += token.text
        places = [self.held.find(stop) for stop in stops if stop in self.held]
        if places:
            self.held = self.held[: min(places)]
            return True
        return False

    def ready(self, stops: tuple[str, ...], last: bool) -> str:
        """The part of the text that no stop sequence can begin in."""
        keep = (
            0
            if last
            else max(
                (n for stop in stops for n in range(1, len(stop)) if self.held.endswith(stop[:n])),
                default=0,
            )
        )
        ready, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        self.shown += ready
        return ready


def chunks(engine: Engine, place: Place, asked: Wanted, stop: threading.Event) -> Iterator[Chunk]:
    """The answer piece by piece, each with the choice it belongs to; at the end, if asked for, the counts."""
    tokenizer = asked.served.tokenizer
    texts = [Text() for _ in asked.prompts]
    counts = [0] * len(texts)
    nothing_new = asked.rules.n_tokens == 0
    for row, prompt in enumerate(asked.prompts if asked.echo or nothing_new else []):
        found = (
            _scored(engine, asked, prompt) if asked.echo and asked.logprobs is not None else None
        )
        texts[row].shown = tokenizer.decode(prompt) if asked.echo else ""
        yield _chunk(row, texts[row].shown, found, "length" if nothing_new else None)
    if nothing_new:
        place.free()
        if asked.usage or not asked.stream:
            yield {"choices": [], "usage": _usage(sum(map(len, asked.prompts)), 0)}
        return
    for row, token in engine.write(
        place, asked.served, asked.prompts, asked.rules, stop, alternatives=asked.logprobs or 0
    ):
        text = texts[row]
        if text.finished:
            continue
        counts[row] += 1
        ended = text.add(token, asked.stop) or token.id == tokenizer.end_of_text
        text.finished = ended or counts[row] == asked.rules.n_tokens
        reason = "stop" if ended else "length" if text.finished else None
        offset = len(text.shown)
        ready = text.ready(asked.stop, last=text.finished)
        if ready or reason:
            yield _chunk(
                row,
                ready,
                _logprobs(asked, text.tokens, offset) if asked.logprobs is not None else None,
                reason,
            )
            text.tokens = []
        if all(t.finished for t in texts):
            break
    for row, text in enumerate(texts):
        if not text.finished:
            yield _chunk(row, text.ready(asked.stop, last=True), None, "length")
    if asked.usage or not asked.stream:
        yield {"choices": [], "usage": _usage(sum(map(len, asked.prompts)), sum(counts))}


def joined(found: list[Chunk], asked: Wanted) -> Chunk:
    """One answer from all chunks."""
    choices = [_choice(row) for row in range(len(asked.prompts))]
    usage: dict[str, int] = {}
    for chunk in found:
        usage = chunk.get("usage", usage)
        for part in chunk["choices"]:
            choice = choices[part["index"]]
            choice["text"] += part["text"]
            choice["finish_reason"] = part["finish_reason"] or choice["finish_reason"]
            if part["logprobs"]:
                held = choice["logprobs"] or {name: [] for name in part["logprobs"]}
                choice["logprobs"] = {
                    name: held[name] + values for name, values in part["logprobs"].items()
                }
    return {"choices": choices, "usage": usage}


def _scored(engine: Engine, asked: Wanted, prompt: list[int]) -> dict[str, list[Any]]:
    """The log-probabilities of a prompt's own tokens, which evaluation harnesses ask for. Nothing came before the first."""
    tokenizer = asked.served.tokenizer
    log_p = engine.read(asked.served, prompt)
    labels = [tokenizer.decode([i]) for i in prompt]
    count = asked.logprobs or 0
    top = [
        {tokenizer.decode([i]): value for i, value in zip(ids, values, strict=True)}
        for values, ids in zip(*(part.tolist() for part in log_p.topk(count)), strict=True)
    ]
    return {
        "tokens": labels,
        "token_logprobs": [None, *(log_p[n, i].item() for n, i in enumerate(prompt[1:]))],
        "top_logprobs": [None, *top],
        "text_offset": [sum(map(len, labels[:n])) for n in range(len(labels))],
    }


def _logprobs(asked: Wanted, tokens: list[Token], offset: int) -> dict[str, list[Any]]:
    tokenizer = asked.served.tokenizer
    offsets = [offset + sum(len(t.text) for t in tokens[:n]) for n in range(len(tokens))]
    return {
        "tokens": [tokenizer.decode([t.id]) for t in tokens],
        "token_logprobs": [t.log_p for t in tokens],
        "top_logprobs": [
            {tokenizer.decode([i]): value for i, value in t.alternatives} for t in tokens
        ],
        "text_offset": offsets,
    }


def _choice(row: int) -> dict[str, Any]:
    return {"text": "", "index": row, "logprobs": None, "finish_reason": None}


def _chunk(row: int, text: str, logprobs: Any, reason: str | None) -> Chunk:
    return {
        "choices": [{"text": text, "index": row, "logprobs": logprobs, "finish_reason": reason}]
    }


def _usage(prompt: int, written: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}
