"""Choose the next token from logits, by temperature, top-k and top-p.

    ids = sample(logits, temperature=0.8, top_k=50, top_p=1.0, generator=generator)

Temperature and top-k are those of openai/gpt-2 `src/sample.py`; top-p is from Holtzman et al. 2020,
"The Curious Case of Neural Text Degeneration".
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Likeliest(NamedTuple):
    """The k likeliest tokens of each row, in descending order."""

    logits: Tensor  # (B, k)
    ids: Tensor  # (B, k)


def sample(
    logits: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    generator: torch.Generator,
    likeliest: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Choose a token for each row: logits (B, vocabulary) -> ids (B,) on the CPU.

    Temperature 0 takes the likeliest token; top_k 0 and top_p 1 keep all tokens. A decoder that has
    found the likeliest tokens already passes them: one at temperature 0, else `top_k`.

    The likeliest tokens are found on the device of the logits, so that no more than those are
    copied. The draw itself is made on the CPU in fp32, so that a seed gives the same choices on
    every device.
    """
    if temperature == 0:
        best = logits.argmax(dim=-1) if likeliest is None else likeliest[1][:, 0]
        return best.cpu()  # (B,)
    candidates: Tensor | None = None
    if 0 < top_k < logits.size(-1):
        logits, candidates = logits.topk(top_k) if likeliest is None else likeliest  # (B, top_k)
    probabilities = (logits.float().cpu() / temperature).softmax(dim=-1)
    if top_p < 1:
        probabilities = keep_top_p(probabilities, top_p)
    choice = torch.multinomial(probabilities, 1, generator=generator)  # (B, 1)
    if candidates is not None:
        choice = candidates.cpu().gather(1, choice)
    return choice.squeeze(1)


def keep_top_p(probabilities: Tensor, top_p: float) -> Tensor:
    """Set all but the likeliest tokens that together reach `top_p` to zero: (B, n) -> (B, n)."""
    ordered, index = probabilities.sort(dim=-1, descending=True)
    total_before = ordered.cumsum(dim=-1) - ordered
    # The token that crosses top_p stays, so at least one token does.
    kept = ordered.masked_fill(total_before >= top_p, 0.0)
    return probabilities.scatter(1, index, kept)
