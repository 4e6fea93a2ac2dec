"""From a prompt to text: prefill the cache, then one token at a time, drawn by the rules the user sets.

    for tokens in stream(model, [ids], n_tokens=64, seed=1): ...        # one id a row a step
    rows = generate(model, [ids], n_tokens=64, top_k=50)                # the new ids of each row

Sources of the rules: temperature and top-k as in openai/gpt-2 `src/sample.py`; top-p from Holtzman et al. 2020.
"""

import logging
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from anew.errors import UserError
from anew.inference.decoders import Graphed, pack
from anew.model.gpt import GPT
from anew.model.kv_cache import Cache

log = logging.getLogger("anew")
WORTH_PACKING = 16  # tokens: packing the weights of 124M costs as much as five of torch's


def sample(
    logits: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    generator: torch.Generator,
    top: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """(B, vocabulary) logits -> (B,) ids on the CPU. Temperature 0 takes the likeliest token; top_k 0 and top_p 1 keep all.

    The likeliest token and the `top_k` likeliest are found on the logits' device, so that no more than those are copied. The draw
    itself is made on the CPU in fp32, so that a seed means the same choice rule on every device. `top` gives logits and ids of the
    likeliest tokens where a decoder has found them already: one at temperature 0, else `top_k`.
    """
    if temperature == 0:
        return logits.argmax(dim=-1).cpu() if top is None else top[1][:, 0].cpu()
    among: Tensor | None = None
    if 0 < top_k < logits.size(-1):
        logits, among = logits.topk(top_k) if top is None else top  # each (B, top_k)
    probabilities = (logits.float().cpu() / temperature).softmax(dim=-1)
    if top_p < 1:
        ordered, index = probabilities.sort(dim=-1, descending=True)
        outside = ordered.cumsum(dim=-1) - ordered >= top_p  # the token that crosses top_p stays
        probabilities = probabilities.scatter(1, index, ordered.masked_fill(outside, 0.0))
    choice = torch.multinomial(probabilities, 1, generator=generator)
    return choice.squeeze(1) if among is None else among.cpu().gather(1, choice).squeeze(1)


def stream(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    n_tokens: int,
    *rules: float,
    **named: float | bool,
) -> Iterator[list[int]]:
    """Yield one new id for each prompt, `n_tokens` times. `rules` are those of `steps`."""
    return (ids for ids, _ in steps(model, prompts, n_tokens, *rules, **named))  # type: ignore[arg-type]


@torch.inference_mode()
def steps(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    n_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    use_cache: bool = True,
    int8: bool = False,
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield one new id for each prompt and the logits (B, 50257) it was drawn by, `n_tokens` times. Rows may have different lengths.

    `int8` is `fast_decode`'s, for CPUs.

    A row longer than the model's positions is cropped to their last half and read again, which is said once; nothing ever slides.
    The model's mode, weights and torch's global random numbers are left as they were.
    """
    positions = model.config.n_positions
    check_rules(temperature, top_k, top_p, prompts, n_tokens)
    rows = [list(p) for p in prompts]
    if max(map(len, rows)) > positions:
        log.warning(
            f"the prompt has more than the model's {positions} positions; only its last {positions} tokens are read"
        )
        rows = [row[-positions:] for row in rows]
    generator = torch.Generator().manual_seed(seed)
    cache: Cache | None = None
    decoder = (
        pack(model, len(rows), int8) if use_cache and (int8 or n_tokens >= WORTH_PACKING) else None
    )
    graphed = decoder if isinstance(decoder, Graphed) else None
    cropped = False
    was_training = model.training
    model.eval()
    try:
        for written in range(n_tokens):
            if max(map(len, rows)) > positions:
                if not cropped:
                    log.warning(
                        f"past the model's {positions} positions: the text is cropped to its last {positions // 2} tokens and read again"
                    )
                rows, cache, cropped = [row[-max(1, positions // 2) :] for row in rows], None, True
            top = None
            if cache is None:
                cache, last = _prefill(
                    model, rows, min(positions, max(map(len, rows)) + n_tokens - written)
                )
                logits = model.head(last)
            elif graphed is not None:
                logits, top = graphed.step_and_top(
                    [row[-1] for row in rows], cache, 1 if temperature == 0 else top_k
                )
            elif decoder is not None:
                logits = decoder.step([row[-1] for row in rows], cache)
            else:
                logits = model.head(
                    model.hidden(
                        torch.tensor([[row[-1]] for row in rows], device=cache.lengths.device),
                        cache,
                    )[:, -1]
                )
            ids = sample(logits, temperature, top_k, top_p, generator, top).tolist()
            for row, i in zip(rows, ids, strict=True):
                row.append(i)
            yield ids, logits
            cache = cache if use_cache else None
    finally:
        model.train(was_training)


def _prefill(model: GPT, rows: list[list[int]], capacity: int) -> tuple[Cache, Tensor]:
    """Read all rows at once, padded on the right; the cache then forgets the padding. Returns the last hidden state of each row."""
    device = model.transformer.wte.weight.device
    lengths = [len(row) for row in rows]
    ids = torch.tensor([row + [0] * (max(lengths) - len(row)) for row in rows], device=device)
    cache = Cache.empty(model, len(rows), capacity)
    hidden = model.hidden(ids, cache)
    cache.truncate(lengths)
    return cache, hidden[
        torch.arange(len(rows), device=device), torch.tensor(lengths, device=device) - 1
    ]


def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]] | Tensor,
    n_tokens: int,
    stop: int | None = None,
    **rules: float | int | bool,
) -> list[list[int]]:
    """The new ids of each prompt (rows of ids, or a (B, T) tensor), up to and without the id `stop`. `rules` are those of `stream`."""
    prompts = prompts.tolist() if isinstance(prompts, Tensor) else prompts
    rows: list[list[int]] = [[] for _ in prompts]
    open_rows = set(range(len(rows)))
    for ids in stream(model, prompts, n_tokens, **rules):
        for i in sorted(open_rows):
            if ids[i] == stop:
                open_rows.discard(i)
            else:
                rows[i].append(ids[i])
        if not open_rows:
            break
    return rows


def check_rules(
    temperature: float, top_k: int, top_p: float, prompts: Sequence[Sequence[int]], n_tokens: int
) -> None:
    """Refuse sampling settings that mean nothing."""
    if not temperature >= 0 or temperature == float("inf"):
        raise UserError(f"temperature {temperature} must be 0 (the likeliest token) or above.")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p {top_p} must lie above 0 and at most 1.")
    if top_k < 0:
        raise UserError(f"top_k {top_k} must be 0 (all tokens) or above.")
    if n_tokens < 0:
        raise UserError(f"{n_tokens} tokens cannot be sampled; ask for 0 or more.")
    if not prompts or not all(prompts):
        raise UserError("each prompt needs at least one token.")
