"""A request's body, judged: what was asked for, or one sentence about what is wrong with it. Whatever is sent, nothing else comes out."""

import json
import math
import secrets
from dataclasses import dataclass
from typing import Any

from anew.errors import UserError
from anew.serve.engine import Engine, Rules, Served

MOST_BYTES = 256 * 1024
COMPLETION = {
    "model", "prompt", "max_tokens", "temperature", "top_p", "top_k", "n", "stream", "stream_options", "logprobs", "echo", "stop", "seed",
    "user", "best_of", "presence_penalty", "frequency_penalty", "logit_bias", "suffix",
}  # fmt: skip
NEUTRAL = {
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "logit_bias": {},
    "suffix": "",
}  # of OpenAI's API: accepted where they change nothing


@dataclass(frozen=True)
class Wanted:
    """A request that can be fulfilled."""

    served: Served
    prompts: list[list[int]]  # one for each text to write: `n` of each prompt
    rules: Rules
    stream: bool = False
    usage: bool = False  # in a stream, counts at its end
    logprobs: int | None = None
    echo: bool = False
    stop: tuple[str, ...] = ()


def read(body: bytes) -> dict[str, Any]:
    """The JSON object in `body`."""
    if len(body) > MOST_BYTES:
        raise UserError(f"the request has more than {MOST_BYTES:,} bytes.")
    try:
        found = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise UserError("the request is not JSON in UTF-8.") from error
    if not isinstance(found, dict):
        raise UserError("the request is not a JSON object.")
    return found


def _no_constant(name: str) -> float:
    raise ValueError(name)  # NaN and Infinity are not JSON


def completion(engine: Engine, body: dict[str, Any]) -> Wanted:
    """A request of OpenAI's completions API. Settings that it has and this has not are refused unless they change nothing."""
    if strange := sorted(set(body) - COMPLETION):
        raise UserError(f"'{strange[0][:40]}' is not a setting of completions here.")
    for name, neutral in NEUTRAL.items():
        if body.get(name) not in (None, neutral):
            raise UserError(f"{name} is not supported.")
    served = engine.find(_model(engine, body))
    prompts = _prompts(served, body.get("prompt", ""))
    n = _whole(body, "n", 1, 1, 16)
    if _whole(body, "best_of", n, 1, 16) != n:
        raise UserError("best_of is not supported.")
    rules = _rules(body, 16, "max_tokens")
    asked = body.get("logprobs")
    logprobs = None if asked is None or asked is False else _whole(body, "logprobs", 0, 0, 10)
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise UserError("stream_options is not an object.")
    stops = body.get("stop") or []
    stops = [stops] if isinstance(stops, str) else stops
    if (
        not isinstance(stops, list)
        or len(stops) > 4
        or not all(isinstance(s, str) and 0 < len(s) <= 200 for s in stops)
    ):
        raise UserError("stop is not a text, or a list of up to 4 texts of up to 200 characters.")
    wanted = Wanted(served, [p for p in prompts for _ in range(n)], rules, _yes(body, "stream"), _yes(options, "include_usage"), logprobs,
                    _yes(body, "echo"), tuple(stops))  # fmt: skip
    engine.check(served, wanted.prompts, rules)
    return wanted


def playground(engine: Engine, body: dict[str, Any]) -> Wanted:
    """A request of the page: a text, or the ids of a text whose end was changed."""
    served = engine.find(_model(engine, body))
    wanted = Wanted(
        served, _prompts(served, body.get("prompt", "")), _rules(body, 64, "n_tokens"), stream=True
    )
    engine.check(served, wanted.prompts, wanted.rules)
    if len(wanted.prompts) != 1:
        raise UserError("the page continues one text at a time.")
    return wanted


def _rules(body: dict[str, Any], n_tokens: int, name: str) -> Rules:
    return Rules(
        _whole(body, name, n_tokens, 0, 1_000_000), _number(body, "temperature", 1.0, 0, 100), _whole(body, "top_k", 0, 0, 10**9),
        _number(body, "top_p", 1.0, 0, 1), _whole(body, "seed", secrets.randbits(32), -(2**63), 2**63 - 1) & (2**63 - 1),
    )  # fmt: skip


def _prompts(served: Served, prompt: Any) -> list[list[int]]:
    """A text, ids, or a list of either; an empty one begins a new document."""
    several = [prompt] if isinstance(prompt, str) or _is_ids(prompt) else prompt
    if (
        not isinstance(several, list)
        or not several
        or not all(isinstance(p, str) or _is_ids(p) for p in several)
    ):
        raise UserError("prompt is not a text, a list of token ids, or a list of these.")
    begin = [served.tokenizer.end_of_text]
    return [
        (served.tokenizer.encode(p) if isinstance(p, str) else list(p)) or begin for p in several
    ]


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(i) is int for i in value)


def _model(engine: Engine, body: dict[str, Any]) -> str:
    value = body.get("model", next(iter(engine.models)))
    if not isinstance(value, str) or (len(value) > 200 and value not in engine.models):
        raise UserError("model is not a name.")
    return value


def _yes(body: dict[str, Any], name: str) -> bool:
    value = body.get(name)
    if value not in (None, True, False):
        raise UserError(f"{name} is neither true nor false.")
    return bool(value)


def _whole(body: dict[str, Any], name: str, default: int, low: int, high: int) -> int:
    value = default if body.get(name) is None else body[name]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not int or not low <= value <= high:
        raise UserError(f"{name} is not a whole number from {low} to {high}.")
    return value


def _number(body: dict[str, Any], name: str, default: float, low: float, high: float) -> float:
    value = default if body.get(name) is None else body[name]
    if type(value) not in (int, float) or not low <= value <= high or math.isnan(value):
        raise UserError(f"{name} is not a number from {low:g} to {high:g}.")
    return float(value)
