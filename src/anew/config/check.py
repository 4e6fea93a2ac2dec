"""The rules that a config must satisfy before it can be run, in one list.

    for problem in problems(config): ...    # sentences; none if the config can be run

Settings are checked only when all are known, so the order of flags never matters. A later rule may
rely on an earlier one: `Config.check` raises the first problem and does not look for others.
"""

import dataclasses
import math
import typing
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from anew.config.values import vocabulary_size

if TYPE_CHECKING:
    from anew.config.config import Config

# Counts and intervals for which 0 has a meaning of its own: none, never or all.
NEVER_NEGATIVE = (
    "keep",
    "keep_every",
    "evaluate_every",
    "evaluate_limit",
    "sample_every",
    "sample_tokens",
    "profile",
    "check_every",
)


def problems(config: "Config") -> Iterator[str]:
    """Yield a sentence for each rule that the config breaks, the most basic rules first."""
    yield from type_problems(config)
    yield from _model_problems(config)
    yield from _data_problems(config)
    yield from _optimizer_problems(config)
    yield from _run_problems(config)


def _model_problems(config: "Config") -> Iterator[str]:
    model = config.model
    tokenizer = config.data.tokenizer
    tokenizer_ids = vocabulary_size(tokenizer)
    if tokenizer_ids is not None and model.vocab_size != tokenizer_ids:
        yield (
            f"vocab_size {model.vocab_size:,} differs from the {tokenizer_ids:,} ids "
            f"of the tokenizer {tokenizer}."
        )
    if min(model.n_layer, model.n_head, model.n_embd, model.n_positions) < 1:
        yield "n_layer, n_head, n_embd and n_positions must all be at least 1."
    if model.n_embd % model.n_head != 0:
        yield (
            f"n_embd {model.n_embd} cannot be cut into {model.n_head} heads: "
            f"{model.n_embd} / {model.n_head} is not whole."
        )
    if not 0 <= model.dropout < 1:
        yield f"dropout {model.dropout} is not in [0, 1)."
    if model.wpe_std < 0:
        yield f"wpe_std {model.wpe_std} is negative."


def _data_problems(config: "Config") -> Iterator[str]:
    data = config.data
    positions = config.model.n_positions
    if data.seq_len < 1:
        yield f"seq_len {data.seq_len} must be at least 1."
    if data.seq_len > positions:
        yield (
            f"seq_len {data.seq_len} is longer than the model's {positions} positions; "
            "lower --seq-len or raise --n-positions."
        )
    if data.conversations and data.one_batch:
        yield "one_batch is for texts; leave it out with conversations."
    if data.conversations and data.disk_budget != "0":
        yield "all conversations are prepared before training; leave out --disk-budget."
    if data.val_tokens < 0:
        yield f"val_tokens {data.val_tokens} is negative; 0 means no validation."


def _optimizer_problems(config: "Config") -> Iterator[str]:
    optim = config.optim
    steps = config.run.steps
    if optim.lr <= 0 or optim.muon_lr <= 0:
        yield (
            f"learning rates must be above 0, not lr {optim.lr:g} and muon_lr {optim.muon_lr:g}."
        )
    if optim.wte_lr < 0 or optim.muon_warmup < 0:
        yield "wte_lr and muon_warmup cannot be negative."
    if not 0 < optim.decay_share <= 1:
        yield f"decay_share {optim.decay_share:g} must be above 0 and at most 1."
    if not 0 <= optim.min_lr <= optim.lr:
        yield f"min_lr {optim.min_lr:g} is not between 0 and lr {optim.lr:g}."
    if not 0 <= optim.beta1 < 1 or not 0 <= optim.beta2 < 1:
        yield f"beta1 {optim.beta1} and beta2 {optim.beta2} must lie in [0, 1)."
    if optim.eps <= 0 or optim.clip <= 0 or optim.weight_decay < 0:
        yield "eps and clip must be above 0, and weight_decay not negative."
    if steps < 1:
        yield f"steps {steps} must be at least 1."
    if not 0 <= optim.warmup_steps < steps:
        yield (
            f"a warm-up of {optim.warmup_steps} steps does not fit in a run of {steps} steps; "
            "lower --warmup-steps."
        )


def _run_problems(config: "Config") -> Iterator[str]:
    run = config.run
    if run.micro_batch != "auto" and run.micro_batch < 1:
        yield f"micro_batch {run.micro_batch} must be at least 1."
    if run.batch_tokens < config.data.seq_len:
        yield (
            f"batch_tokens {run.batch_tokens:,} is less than one sequence "
            f"of {config.data.seq_len} tokens."
        )
    if min(run.save_every, run.log_every, run.bad_steps) < 1:
        yield "save_every, log_every and bad_steps must be at least 1 step."
    if run.save_minutes < 0:
        yield f"save_minutes {run.save_minutes:g} is negative."
    if run.timeout_seconds <= 0 or run.spike_z <= 0:
        yield "timeout_seconds and spike_z must be above 0."
    for name in NEVER_NEGATIVE:
        value = getattr(run, name)
        if value < 0:
            yield f"{name} {value} cannot be negative."
    if run.on_corruption == "rollback" and run.check_every == 0:
        yield "on_corruption rollback has no effect without check_every; add --check-every 100."
    if not 0 <= run.seed < 2**63:
        yield f"seed {run.seed} must be between 0 and 2^63 - 1."
    if config.data.conversations and run.compile != "off":
        yield (
            "conversations have many lengths, for each of which code would be compiled; use "
            "--compile off."
        )
    if run.parallel == "fsdp" and run.precision == "fp16":
        yield "fsdp has no loss scaling here; use --precision bf16, or --parallel ddp."
    if config.recipe in ("finetune", "chat") and not run.init:
        yield f"the {config.recipe} recipe needs a model to start from: add --init MODEL."
    if not config.data.data and config.data.conversations:
        yield "no conversations are named: add --data with a file or a folder of them."
    elif not config.data.data:
        yield (
            "no text to train on is named: add --data with a file, a folder, or a source such as "
            "tinyshakespeare."
        )


def type_problems(config: "Config") -> Iterator[str]:
    """Yield a sentence for each setting whose value has the wrong type."""
    for group in (config.model, config.data, config.optim, config.run):
        types = typing.get_type_hints(type(group))
        for field in dataclasses.fields(group):
            value = getattr(group, field.name)
            needed = _needed_type(types[field.name], field.default, value)
            if needed:
                yield f"{field.name} is {value!r}; it must be {needed}."


def _needed_type(kind: Any, default: Any, value: Any) -> str:
    """Return what a value must be, or an empty string if it is that already."""
    choices = _choices(kind)
    if value in choices:
        return ""
    if isinstance(default, str):
        if choices:
            return f"one of {', '.join(choices)}"
        return "" if isinstance(value, str) else "text"
    if isinstance(default, bool):
        return "" if isinstance(value, bool) else "true or false"
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(default, float):
        return "" if is_number and math.isfinite(value) else "a finite number"
    if is_number and isinstance(value, int):
        return ""
    return " or ".join(["a whole number", *choices])


def _choices(kind: Any) -> list[str]:
    """Return the words of a Literal type, or of the Literal in a union such as int | Literal."""
    if typing.get_origin(kind) is Literal:
        return list(typing.get_args(kind))
    words = []
    for part in typing.get_args(kind):
        words += _choices(part)
    return words
