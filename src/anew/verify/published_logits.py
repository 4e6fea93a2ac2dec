"""Compare a model's logits with those that were published for OpenAI's weights.

    check_published(model, tokenizer, read_reference(GPT2_124M))

`gpt2_124m/logits.json` has ten texts with their token ids and, for the position after the last
token, some of the logits; PROVENANCE.md beside it names the sources. Each text has a tolerance of
its own, which is stated there with its reason.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from anew.errors import UserError
from anew.model.gpt import GPT
from anew.tokenizer.bpe import Tokenizer
from anew.utils.files import read_json
from anew.verify.result import Check, failed, passed

GPT2_124M = Path(__file__).parent / "gpt2_124m" / "logits.json"
REFERENCES = {"124M": GPT2_124M}  # by the size that `size_of` returns
FORMAT = 1  # of such a file
NAME = "logits"


@dataclass(frozen=True)
class Reading:
    """Published logits of the token that follows a text."""

    text: str
    token_ids: list[int]
    tolerance: float  # largest difference of a logit that passes
    top: list[tuple[int, float]]  # (id, logit) of the likeliest tokens, the likeliest first
    sample: list[tuple[int, float]]  # (id, logit) of tokens from the whole vocabulary
    log_sum_exp: float | None = None  # of all logits
    mean_logit: float | None = None


def read_reference(path: Path) -> list[Reading]:
    """Return the published readings in a file. Raises UserError if it cannot be used."""
    try:
        content, _ = read_json(path, FORMAT)
        return [_reading(entry) for entry in content["readings"]]
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a file of published logits ({error!r}).") from error


def _reading(entry: dict[str, Any]) -> Reading:
    return Reading(
        text=entry["text"],
        token_ids=entry["token_ids"],
        tolerance=float(entry["tolerance"]),
        top=[(int(token), float(logit)) for token, logit in entry["top"]],
        sample=[(int(token), float(logit)) for token, logit in entry.get("sample", [])],
        log_sum_exp=entry.get("log_sum_exp"),
        mean_logit=entry.get("mean_logit"),
    )


def check_published(model: GPT, tokenizer: Tokenizer, readings: list[Reading]) -> Check:
    """Compare the logits that `model` computes in fp32 with the published ones."""
    largest = 0.0
    compared = 0
    for reading in readings:
        if tokenizer.encode(reading.text) != reading.token_ids:
            return failed(NAME, f"'{reading.text}' has other token ids than the published ones.")
        with torch.no_grad():
            logits = model(torch.tensor([reading.token_ids]))[0, -1].double()  # (vocab,)
        differences = _differences(logits, reading)
        worst, where = max(differences)
        if not worst <= reading.tolerance:  # also if it is not a number
            return failed(
                NAME,
                f"after '{reading.text}', {where} is {worst:.4g} from the published figure; "
                f"{reading.tolerance:g} is allowed.",
            )
        likeliest = int(logits.argmax())
        if likeliest != reading.top[0][0]:
            ours = tokenizer.decode([likeliest])
            theirs = tokenizer.decode([reading.top[0][0]])
            return failed(
                NAME,
                f"after '{reading.text}', the likeliest token is '{ours}', and '{theirs}' is "
                "published.",
            )
        largest = max(largest, worst / reading.tolerance)
        compared += len(differences)
    return passed(
        NAME,
        f"{compared} published figures of {len(readings)} texts; the largest difference is "
        f"{100 * largest:.0f}% of what is allowed",
    )


def _differences(logits: torch.Tensor, reading: Reading) -> list[tuple[float, str]]:
    """Return the absolute difference of each published figure, and the name of the figure."""
    found = [
        (abs(float(logits[token]) - logit), f"the logit of token {token}")
        for token, logit in (*reading.top, *reading.sample)
    ]
    if reading.log_sum_exp is not None:
        difference = abs(float(logits.logsumexp(0)) - reading.log_sum_exp)
        found.append((difference, "log-sum-exp"))
    if reading.mean_logit is not None:
        found.append((abs(float(logits.mean()) - reading.mean_logit), "the mean logit"))
    return found
