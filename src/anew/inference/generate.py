"""Generate tokens from prompts: read the prompts once, then decode one token of each row at a time.

    rows = generate(model, [ids], n_tokens=64, top_k=50)                # the new ids of each row
    for ids in stream(model, [ids], n_tokens=64, seed=1): ...           # one new id of each row

The weights of the model, its mode and torch's global random numbers are left as they were.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import TypedDict, Unpack

import torch
from torch import Tensor

from anew.errors import UserError
from anew.inference.decoders import CudaGraphDecoder, Decoder, decoder_for, torch_step
from anew.inference.sampling import Likeliest, sample
from anew.model.gpt import GPT
from anew.model.kv_cache import Cache

log = logging.getLogger("anew")

# Copying the weights of 124M for a decoder takes as long as decoding about five tokens with torch.
PACK_FROM_TOKENS = 16


class Options(TypedDict, total=False):
    """The options of `stream_with_logits`, which documents them and has their defaults."""

    temperature: float
    top_k: int
    top_p: float
    seed: int
    use_cache: bool
    int8: bool


def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]] | Tensor,
    n_tokens: int,
    stop: int | None = None,
    **options: Unpack[Options],
) -> list[list[int]]:
    """Return the new ids of each prompt (rows of ids, or a (B, T) tensor), up to the id `stop`.

    `stop` itself is left out. The options, with their defaults:

    - temperature 1.0: 0 takes the likeliest token
    - top_k 0: draw from this many likeliest tokens; 0: from all
    - top_p 1.0: draw from the likeliest tokens with this total probability
    - seed 0: the same seed draws the same tokens
    - use_cache True: False reads the whole text again for each token
    - int8 False: on a CPU and for one prompt, use weights in 8 bits, which changes the result
    """
    prompts = prompts.tolist() if isinstance(prompts, Tensor) else prompts
    rows: list[list[int]] = [[] for _ in prompts]
    for row, token in until_end_of_text(stream(model, prompts, n_tokens, **options), stop):
        rows[row].append(token)
    return rows


def stream(
    model: GPT, prompts: Sequence[Sequence[int]], n_tokens: int, **options: Unpack[Options]
) -> Iterator[list[int]]:
    """Yield one new id of each prompt, `n_tokens` times.

    The options are those of `stream_with_logits`.
    """
    for ids, _ in stream_with_logits(model, prompts, n_tokens, **options):
        yield ids


def until_end_of_text(
    steps: Iterable[Sequence[int]], end_of_text: int | None
) -> Iterator[tuple[int, int]]:
    """Yield (row, id) for the tokens of each row before its first `end_of_text`.

    `steps` has one id of each row at a time, as `stream` yields them. It is not read any further
    once every row has ended. With None no row ends.
    """
    ended: set[int] = set()
    for ids in steps:
        for row, token in enumerate(ids):
            if token == end_of_text:
                ended.add(row)
            if row not in ended:
                yield row, token
        if len(ended) == len(ids):
            return


@torch.inference_mode()
def stream_with_logits(
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
    """Yield one new id of each prompt and the logits (B, 50257) of the step, `n_tokens` times.

    Prompts may have different lengths. The logits are valid until the next step. Temperature 0
    takes the likeliest token; top_k 0 and top_p 1 keep all tokens. `int8` asks for weights in 8
    bits, for one prompt on a CPU (see `decoders.decoder_for`). Without `use_cache` the whole text
    is read for each token.

    A text longer than the model's positions is cropped to its last half and read again, which is
    logged before the first token. Raises UserError for options without a meaning.
    """
    if not hasattr(model, "config"):
        raise UserError('the model is one that is loaded, such as anew.load("runs/demo").')
    check_options(temperature, top_k, top_p, n_tokens)
    check_prompts(prompts, model.config.vocab_size)
    positions = model.config.n_positions
    if max(map(len, prompts)) > positions:
        log.warning(
            f"the prompt has more than the model's {positions} positions; "
            f"only its last {positions} tokens are read"
        )
    rows = [list(prompt[-positions:]) for prompt in prompts]
    # The last new token is not read.
    if max(map(len, rows)) + n_tokens - 1 > positions:
        log.warning(
            f"beyond the model's {positions} positions, the text is cropped to its last "
            f"{max(1, positions // 2)} tokens and read again"
        )
    generator = torch.Generator().manual_seed(seed)
    n_likeliest = 1 if temperature == 0 else top_k
    may_pack = use_cache and (int8 or n_tokens >= PACK_FROM_TOKENS)
    decoder = decoder_for(model, len(rows), int8) if may_pack else None
    cache: Cache | None = None
    was_training = model.training
    model.eval()
    try:
        for tokens_left in range(n_tokens, 0, -1):
            longest = max(map(len, rows))
            if longest > positions:
                longest = max(1, positions // 2)
                rows = [row[-longest:] for row in rows]
                cache = None
            if cache is None:
                cache, hidden = _prefill(model, rows, min(positions, longest + tokens_left))
                logits, likeliest = model.head(hidden), None  # (B, 50257)
            else:
                last_ids = [row[-1] for row in rows]
                logits, likeliest = _step(model, decoder, last_ids, cache, n_likeliest)
            ids = sample(logits, temperature, top_k, top_p, generator, likeliest).tolist()
            for row, token in zip(rows, ids, strict=True):
                row.append(token)
            yield ids, logits
            if not use_cache:
                cache = None
    finally:
        model.train(was_training)


def check_options(temperature: float, top_k: int, top_p: float, n_tokens: int) -> None:
    """Raise UserError for sampling options without a meaning."""
    for name, value in (("temperature", temperature), ("top_p", top_p)):
        if not isinstance(value, int | float):
            raise UserError(f"{name} is {value!r}; it must be a number.")
    for name, value in (("top_k", top_k), ("n_tokens", n_tokens)):
        if not isinstance(value, int):
            raise UserError(f"{name} is {value!r}; it must be a whole number.")
    if not temperature >= 0 or temperature == float("inf"):
        raise UserError(f"temperature {temperature} must be 0 (the likeliest token) or above.")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p {top_p} must lie above 0 and at most 1.")
    if top_k < 0:
        raise UserError(f"top_k {top_k} must be 0 (all tokens) or above.")
    if n_tokens < 0:
        raise UserError(f"{n_tokens} tokens cannot be sampled; ask for 0 or more.")


def check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Raise UserError for prompts that are not rows of token ids of the model."""
    is_sequence = isinstance(prompts, Sequence) and not isinstance(prompts, str)
    is_rows = is_sequence and all(isinstance(row, list | tuple) for row in prompts)
    if not is_rows or not all(isinstance(token, int) for row in prompts for token in row):
        raise UserError(
            "prompts are rows of token ids, such as [tokenizer.encode(text)], and not text or one "
            "flat list."
        )
    if not prompts or not all(prompts):
        raise UserError("each prompt needs at least one token.")
    for row in prompts:
        if not 0 <= min(row) <= max(row) < vocab_size:
            raise UserError(f"a token id is outside 0 to {vocab_size - 1}.")


def _prefill(model: GPT, rows: list[list[int]], capacity: int) -> tuple[Cache, Tensor]:
    """Read all rows at once; return a filled cache and the last hidden state of each row, (B, C).

    Shorter rows are padded on the right; afterwards the padding is removed from the cache.
    """
    device = model.transformer.wte.weight.device
    lengths = [len(row) for row in rows]
    padded = [row + [0] * (max(lengths) - len(row)) for row in rows]
    cache = Cache.empty(model, len(rows), capacity)
    hidden = model.hidden(torch.tensor(padded, device=device), cache)  # (B, T, C)
    cache.truncate(lengths)
    every_row = torch.arange(len(rows), device=device)
    return cache, hidden[every_row, cache.lengths - 1]


def _step(
    model: GPT, decoder: Decoder | None, ids: list[int], cache: Cache, n_likeliest: int
) -> tuple[Tensor, Likeliest | None]:
    """Read one more id of each row; return logits (B, 50257), and the likeliest tokens if known."""
    if decoder is None:
        return torch_step(model, ids, cache), None
    if isinstance(decoder, CudaGraphDecoder):
        return decoder.step_and_top(ids, cache, n_likeliest)
    return decoder.step(ids, cache), None
