"""What happens inside a model while it reads a text, for the page: numbers that it can draw.

    inside = look_inside(served, ids, token=7, block=1, head=0)
    inside["matrix"][7]                          # what token 7 attends to in head 0 of block 1

Weights are sent as whole numbers of ten-thousandths, which takes a third of the characters.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from anew.errors import UserError
from anew.inference.interpret import Trace, logit_lens, trace_of
from anew.serve.engine import ALTERNATIVES, Served, alternatives_of

MOST_TOKENS = 256  # of a text, since a matrix has the square of this number of weights


def look_inside(
    served: Served, ids: Sequence[int], token: int, block: int, head: int
) -> dict[str, Any]:
    """Return what the page shows of a text when `token`, a block and a head are chosen.

    `matrix` has the attention of that head, from each token to those before it. `rows` has what
    `token` attends to in every block and head. `layers` has, before the first block and after each,
    the norm of what the block added for `token` and the likeliest next tokens. Raises UserError if
    there is no such token, block or head, or if the text is too long.
    """
    _check(served, ids, token, block, head)
    trace = trace_of(served.model, ids)
    matrix = in_ten_thousandths(trace.attention[block, head])
    rows = trace.attention[:, :, token, : token + 1]
    return {
        "tokens": [served.tokenizer.decode([token]) for token in ids],
        "matrix": [row[: i + 1] for i, row in enumerate(matrix)],
        "rows": in_ten_thousandths(rows),
        "layers": _layers(served, trace, token),
    }


def _check(served: Served, ids: Sequence[int], token: int, block: int, head: int) -> None:
    """Raise UserError for what cannot be shown."""
    config = served.model.config
    longest = min(MOST_TOKENS, config.n_positions)
    if not 0 < len(ids) <= longest:
        raise UserError(f"{len(ids)} tokens cannot be shown; the page shows 1 to {longest}.")
    if not 0 <= min(ids) <= max(ids) < config.vocab_size:
        raise UserError(f"a token id is outside 0 to {config.vocab_size - 1}.")
    if not 0 <= token < len(ids):
        raise UserError(f"there is no token {token}; the text has {len(ids)}, from 0.")
    if not (0 <= block < config.n_layer and 0 <= head < config.n_head):
        raise UserError(f"there is no head {head} in a block {block} of {served.name}.")


def _layers(served: Served, trace: Trace, token: int) -> list[dict[str, Any]]:
    """Return what is shown of `token` before the first block and after each."""
    lens = logit_lens(served.model, trace.residual[:, token]).cpu()  # (layers + 1, 50257)
    if not lens.isfinite().all():
        raise UserError(f"{served.name} computes infinite numbers; its weights are damaged.")
    likeliest = lens.topk(min(ALTERNATIVES, lens.size(-1)))
    # Nothing is added before the first block.
    attention_norms = [0.0, *_norms(trace.attention_added[:, token])]
    mlp_norms = [0.0, *_norms(trace.mlp_added[:, token])]
    layers = []
    for layer, top_ids in enumerate(likeliest.indices):
        choices = alternatives_of(served.tokenizer, top_ids, likeliest.values[layer])
        layers.append(
            {
                "attention_norm": attention_norms[layer],
                "mlp_norm": mlp_norms[layer],
                "likeliest": [asdict(choice) for choice in choices],
            }
        )
    return layers


def _norms(vectors: Tensor) -> list[float]:
    """Return the length of each row."""
    return vectors.float().norm(dim=-1).tolist()


def in_ten_thousandths(weights: Tensor) -> Any:
    """Return weights between 0 and 1 as nested lists of whole numbers up to 10,000."""
    return (10_000 * weights).round().to(torch.int32).tolist()
