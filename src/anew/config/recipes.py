"""The named recipes of `anew train RECIPE`.

config = recipe("shakespeare", steps=200)     # settings given here replace those of the recipe
"""

import dataclasses
import shlex
from pathlib import Path
from typing import Any

from anew.config.config import Config
from anew.errors import UserError, unknown_name

# 19,073 steps of 524,288 tokens are 10B tokens, one pass over FineWeb-Edu's sample-10BT. Validation
# every 500 steps takes 2% of the time of such a run on one H200.
_GPT2 = Config().override(
    data="fineweb-edu",
    steps=19_073,
    micro_batch="auto",
    save_every=1000,
    sample_every=1000,
    evaluate_every=500,
)

# A GPT-2 that learns within a minute on two CPU cores. The values were measured (docs/log.md): on a
# CPU, at 128 tokens, plain softmax attention is faster than the fused kernel, two heads are faster
# than four and reach the same loss, and compiling takes longer than it saves.
_SMALL = Config().override(
    tokenizer="bytes",
    vocab_size=257,
    n_layer=4,
    n_head=2,
    n_embd=128,
    n_positions=128,
    attention="plain",
    seq_len=128,
    batch_tokens=2048,
    steps=1000,
    compile="off",
    optimizer="muon",
    lr=6e-3,
    min_lr=0.0,
    muon_lr=0.01,
    schedule="linear",
    warmup_steps=50,
    evaluate_every=500,
    save_every=500,
    log_every=50,
)

# The lowest validation loss that a minute reaches (docs/log.md, 13, 15 and 16): two narrow layers
# process nearly three times as much text as four wider ones.
_SHAKESPEARE = _SMALL.override(
    data="tinyshakespeare",
    n_layer=2,
    n_head=3,
    n_embd=96,
    batch_tokens=4096,
    micro_batch=32,
    steps=950,
    warmup_steps=20,
    beta2=0.99,
    weight_decay=0.2,
    evaluate_every=1000,
)

# Memorising a text takes more width, 25 epochs, and longer windows, because the first tokens of a
# window cannot be predicted from it.
_MEMORISE = _SMALL.override(
    data="tinyshakespeare",
    tokenizer="gpt2",
    vocab_size=50257,
    n_layer=6,
    n_head=4,
    n_embd=256,
    n_positions=256,
    seq_len=256,
    batch_tokens=2048,
    steps=3700,
    recut=False,
    compile="auto",
    evaluate_train=True,
)

# One batch, trained on again and again.
_OVERFIT = _SMALL.override(steps=200, warmup_steps=10, one_batch=True, evaluate_every=0)

# For experiments of minutes. Bytes, because a byte model learns the frequencies of byte pairs in
# twenty steps and spends the rest on its blocks, as a GPT-2 does on 10B tokens. With 4,096 symbols
# such a run mostly learns its embedding (docs/log.md, 12 and 13).
_FIVE_MILLION = Config().override(
    tokenizer="bytes",
    vocab_size=257,
    n_layer=6,
    n_head=4,
    n_embd=256,
    n_positions=256,
    seq_len=256,
    attention="plain",
    batch_tokens=4096,
    steps=512,
    warmup_steps=19,
    compile="off",
    val_tokens=65_536,
)

# One size of `anew bench scaling`. With batches of 1,024 tokens a run of ten tokens a parameter has
# enough steps to learn more than the frequencies of byte pairs.
_ONE_MILLION = _SMALL.override(
    n_head=4,
    batch_tokens=1024,
    steps=8388,
    warmup_steps=314,
    val_tokens=131_072,
)

_FINETUNE = Config().override(
    data="",
    lr=3e-5,
    min_lr=3e-6,
    steps=100,
    warmup_steps=10,
    batch_tokens=32_768,
    micro_batch=4,
    evaluate_every=20,
)

# As `finetune`, in batches of 32 conversations.
_CHAT = _FINETUNE.override(
    conversations=True,
    lr=1e-4,
    min_lr=1e-5,
    steps=300,
    warmup_steps=15,
    compile="off",
    evaluate_every=50,
)

# These settings let a GPT-2 reach the same loss with fewer tokens and leave its architecture
# unchanged (docs/log.md, 13). The learning rates differ by size.
FAST: dict[str, Any] = {
    "optimizer": "muon",
    "schedule": "linear",
    "decay_share": 0.6,
    "min_lr": 0.0,
}


def _gpt2(n_layer: int, n_head: int, n_embd: int, lr: float) -> Config:
    """Return a published size, with a learning rate that decays to a tenth.

    The rates above 124M are GPT-3's (Brown et al. 2020, table 2.1).
    """
    return _GPT2.override(n_layer=n_layer, n_head=n_head, n_embd=n_embd, lr=lr, min_lr=lr / 10)


def _fast(base: Config, lr: float) -> Config:
    """Return the same size with a schedule of a third of the tokens.

    At 124M, AdamW's learning rate and the size of Muon's updates (0.2 muon_lr = 3.6e-4 for each
    weight) are those of the first public record with Muon (KellerJordan/modded-nanogpt, October
    2024). Larger sizes scale them with the inverse square root of the width.
    """
    return base.override(
        **FAST, lr=lr, muon_lr=lr / 2, steps=6250, warmup_steps=250, muon_warmup=300
    )


_124M = _gpt2(12, 12, 768, 6e-4)
_350M = _gpt2(24, 16, 1024, 3e-4)
_774M = _gpt2(36, 20, 1280, 2.5e-4)
_1558M = _gpt2(48, 25, 1600, 2e-4)

# Name: (what it is, in at most 55 characters, settings).
RECIPES: dict[str, tuple[str, Config]] = {
    "demo": (
        "learn Python from its standard library, in minutes",
        _SMALL.override(
            steps=2000,
            val_tokens=131_072,
            log_every=100,
            sample_every=500,
            sample_prompt="def ",
            sample_tokens=120,
        ),
    ),
    "shakespeare": ("learn Shakespeare's plays, in a minute on 2 CPU cores", _SHAKESPEARE),
    "shakespeare-memorise": ("memorise the plays (same as shakespeare --memorise)", _MEMORISE),
    "overfit": ("train on one batch, to check that the model can learn", _OVERFIT),
    "gpt2-1m": ("GPT-2 with 1M parameters, for scaling experiments", _ONE_MILLION),
    "gpt2-5m": ("GPT-2 with 5M parameters, for experiments of minutes", _FIVE_MILLION),
    "gpt2-124m": ("GPT-2 small on 10B tokens of FineWeb-Edu", _124M),
    "gpt2-350m": ("GPT-2 medium on the same tokens", _350M),
    "gpt2-355m": ("the same as gpt2-350m", _350M),
    "gpt2-774m": ("GPT-2 large on the same tokens", _774M),
    "gpt2-1558m": ("GPT-2 XL on the same tokens", _1558M),
    "gpt2-124m-fast": ("GPT-2 small with a third of the tokens", _fast(_124M, 3.6e-3)),
    "gpt2-350m-fast": ("GPT-2 medium with a third of the tokens", _fast(_350M, 3.1e-3)),
    "gpt2-774m-fast": ("GPT-2 large with a third of the tokens", _fast(_774M, 2.8e-3)),
    "gpt2-1558m-fast": ("GPT-2 XL with a third of the tokens", _fast(_1558M, 2.5e-3)),
    "gpt2-124m-openwebtext": (
        "GPT-2 small on 47.2B tokens of OpenWebText",
        _124M.override(data="openwebtext", steps=90_000),
    ),
    "finetune": ("continue training --init MODEL on your own --data", _FINETUNE),
    "chat": ("teach --init MODEL to answer, on --data conversations", _CHAT),
}


def read_recipe(name: str) -> Config:
    """Return the settings of a recipe, not checked. Raises UserError if there is no such recipe."""
    if name not in RECIPES and (Path(name) / "config.json").exists():
        raise UserError(f"'{name}' is a run or a model; to continue a run: anew train --resume RUN")
    if name not in RECIPES and Path(name).exists():
        command = f"anew train shakespeare --data {shlex.quote(name)}"
        raise UserError(f"'{name}' is not a recipe but a text; to train on it: {command}")
    if name not in RECIPES:
        raise unknown_name("recipe", name, RECIPES)
    return dataclasses.replace(RECIPES[name][1], recipe=name)


def recipe(name: str, **settings: Any) -> Config:
    """Return a recipe with some settings replaced, checked: `recipe("shakespeare", steps=200)`."""
    config = read_recipe(name).override(**settings)
    adapted, _ = config.adapted(given=set(settings))
    return adapted.check(given=settings)
