"""Answers in the form of OpenAI's APIs: as chunks of a stream, or joined into one.

    for chunk in chunks(engine, place, job, request, stop): ...
    answer = joined(list_of_chunks, n_choices)

`as_chat_chunk` and `as_chat_answer` turn those of the completions API into those of the chat API.
"""

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from anew.serve.engine import Engine, Job, Place, Token
from anew.serve.schemas import ChatRequest, CompletionRequest
from anew.tokenizer.bpe import Tokenizer
from anew.tokenizer.chat import ASSISTANT

Chunk = dict[str, Any]
Logprobs = dict[str, list[Any]]


@dataclass
class Text:
    """A text while it is generated. Its end is held back while a stop text may begin there."""

    n_sent: int = 0  # characters
    held: str = ""
    tokens: list[Token] = field(default_factory=list)  # not sent yet
    n_tokens: int = 0
    finish_reason: str | None = None

    def add(self, token: Token, stops: Sequence[str], n_tokens: int) -> None:
        """Append a token, of at most `n_tokens`. A stop text is cut off and finishes the text."""
        self.tokens.append(token)
        self.n_tokens += 1
        self.held += token.text
        starts = [self.held.index(stop) for stop in stops if stop in self.held]
        if starts:
            self.held = self.held[: min(starts)]
        if starts or token.is_end_of_text:
            self.finish_reason = "stop"
        elif self.n_tokens == n_tokens:
            self.finish_reason = "length"

    def take(self, stops: Sequence[str]) -> str:
        """Remove and return the part that may be sent: no stop text can begin in it."""
        n_kept = 0 if self.finish_reason else self._possible_stop(stops)
        end = len(self.held) - n_kept
        ready, self.held = self.held[:end], self.held[end:]
        self.n_sent += len(ready)
        return ready

    def _possible_stop(self, stops: Sequence[str]) -> int:
        """Return how many characters at the end may be the beginning of a stop text."""
        longest = 0
        for stop in stops:
            for n in range(1, len(stop)):
                if self.held.endswith(stop[:n]):
                    longest = max(longest, n)
        return longest


def chunks(
    engine: Engine,
    place: Place,
    job: Job,
    request: CompletionRequest | ChatRequest,
    stop: threading.Event,
) -> Iterator[Chunk]:
    """Yield the answer in pieces, each with the index of its choice; then the counts, if wanted.

    `place` is given back at the end.
    """
    with place:
        tokenizer = job.served.tokenizer
        texts = [Text() for _ in job.prompts]
        finish_reason = "length" if job.n_tokens == 0 else None
        echo = False
        n_alternatives = None
        if isinstance(request, CompletionRequest):
            echo = request.echo
            n_alternatives = request.logprobs
        if echo or job.n_tokens == 0:
            for row, prompt in enumerate(job.prompts):
                echoed = tokenizer.decode(prompt) if echo else ""
                texts[row].n_sent = len(echoed)
                logprobs = None
                if echo and n_alternatives is not None:
                    scored = engine.score(job.served, prompt, n_alternatives)
                    logprobs = _logprobs(tokenizer, scored, offset=0)
                yield _chunk(row, echoed, logprobs, finish_reason)
        if job.n_tokens > 0:
            yield from _generated(engine, place, job, request.stops, n_alternatives, stop, texts)
        if request.stream_options.include_usage or not request.stream:
            n_prompt = sum(map(len, job.prompts))
            n_generated = sum(text.n_tokens for text in texts)
            usage = {
                "prompt_tokens": n_prompt,
                "completion_tokens": n_generated,
                "total_tokens": n_prompt + n_generated,
            }
            yield {"choices": [], "usage": usage}


def _generated(
    engine: Engine,
    place: Place,
    job: Job,
    stops: Sequence[str],
    n_alternatives: int | None,
    stop: threading.Event,
    texts: list[Text],
) -> Iterator[Chunk]:
    """Yield the generated part of the answer."""
    for row, token in engine.write(place, job, stop, alternatives=n_alternatives or 0):
        text = texts[row]
        if text.finish_reason:
            continue
        offset = text.n_sent
        text.add(token, stops, job.n_tokens)
        ready = text.take(stops)
        if ready or text.finish_reason:
            logprobs = None
            if n_alternatives is not None:
                logprobs = _logprobs(job.served.tokenizer, text.tokens, offset)
            yield _chunk(row, ready, logprobs, text.finish_reason)
            text.tokens = []
        if all(text.finish_reason for text in texts):
            return


def joined(parts: Iterable[Chunk], n_choices: int) -> Chunk:
    """Return one answer that contains all chunks."""
    choices = [_choice(row, "", None, None) for row in range(n_choices)]
    answer: Chunk = {"choices": choices}
    for chunk in parts:
        if "usage" in chunk:
            answer["usage"] = chunk["usage"]
        for part in chunk["choices"]:
            choice = choices[part["index"]]
            choice["text"] += part["text"]
            choice["finish_reason"] = part["finish_reason"]
            if choice["logprobs"] is None:
                choice["logprobs"] = part["logprobs"]
            elif part["logprobs"]:
                for name, values in part["logprobs"].items():
                    choice["logprobs"][name] += values
    return answer


def as_chat_chunk(chunk: Chunk) -> Chunk:
    """Return a chunk of the completions API as one of the chat API."""
    return _as_chat(chunk, "delta")


def as_chat_answer(answer: Chunk) -> Chunk:
    """Return an answer of the completions API as one of the chat API."""
    return _as_chat(answer, "message")


def _as_chat(part: Chunk, name: str) -> Chunk:
    """Return `part` with each text as a message of the assistant, called `name`."""
    choices = [
        {
            "index": choice["index"],
            name: {"role": ASSISTANT, "content": choice["text"]},
            "logprobs": None,
            "finish_reason": choice["finish_reason"],
        }
        for choice in part["choices"]
    ]
    return {**part, "choices": choices}


def _logprobs(tokenizer: Tokenizer, tokens: Sequence[Token], offset: int) -> Logprobs:
    """Return the log-probabilities of tokens whose text begins at `offset`, in OpenAI's form."""
    top_logprobs = []
    text_offsets = []
    for token in tokens:
        top = None
        if token.alternatives is not None:
            top = {choice.label: choice.log_p for choice in token.alternatives}
        top_logprobs.append(top)
        text_offsets.append(offset)
        offset += len(token.text)
    return {
        "tokens": [tokenizer.decode([token.id]) for token in tokens],
        "token_logprobs": [token.log_p for token in tokens],
        "top_logprobs": top_logprobs,
        "text_offset": text_offsets,
    }


def _chunk(row: int, text: str, logprobs: Logprobs | None, reason: str | None) -> Chunk:
    return {"choices": [_choice(row, text, logprobs, reason)]}


def _choice(row: int, text: str, logprobs: Logprobs | None, reason: str | None) -> dict[str, Any]:
    return {"text": text, "index": row, "logprobs": logprobs, "finish_reason": reason}
