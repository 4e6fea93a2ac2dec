"""The named runs: `anew train RECIPE`.

config = recipe("shakespeare", steps=200)           # settings given here replace the recipe's own
"""

import dataclasses
from typing import Any

from anew.config.schema import Config, DataConfig, RunConfig
from anew.errors import UserError

_GPT2_STEPS = 19_073  # 10e9 / 524,288: one pass over FineWeb-Edu's sample-10BT
# Validation every 500 steps is 2% of a run on one H200. The micro-batch is what fits, whatever the GPU.
_GPT2_RUN = RunConfig(
    steps=_GPT2_STEPS, micro_batch="auto", save_every=1000, sample_every=1000, evaluate_every=500
)
_GPT2 = Config(data=DataConfig(data="fineweb-edu"), run=_GPT2_RUN)
# A GPT-2 that learns within a minute on two CPU cores. Found by measurement (docs/log.md): at 128 tokens the plain softmax is faster
# on a CPU than the fused kernel, two heads are faster than four and as good, and compiling takes longer than it gives back.
_SMALL: dict[str, Any] = {
    "tokenizer": "bytes", "vocab_size": 257, "n_layer": 4, "n_head": 2, "n_embd": 128, "n_positions": 128, "attention": "plain",
    "seq_len": 128, "batch_tokens": 2048, "steps": 1000, "compile": "off",
    "optimizer": "muon", "lr": 6e-3, "min_lr": 0.0, "muon_lr": 0.01, "schedule": "linear", "warmup_steps": 50,
    "evaluate_every": 500, "save_every": 500, "log_every": 50,
}  # fmt: skip
# What a minute can teach most (docs/log.md, 13, 15, 16): two narrow layers see nearly three times the text that four wider ones would.
_SHAKESPEARE: dict[str, Any] = {
    "data": "tinyshakespeare", "n_layer": 2, "n_head": 3, "n_embd": 96, "batch_tokens": 4096, "micro_batch": 32, "steps": 950,
    "warmup_steps": 20, "beta2": 0.99, "weight_decay": 0.2, "evaluate_every": 1000,
}  # fmt: skip
# To know a text by heart takes room and repetition: more width, longer windows (the first tokens of a window cannot be known), 25 epochs.
_BY_HEART: dict[str, Any] = {
    "tokenizer": "gpt2", "vocab_size": 50257, "n_layer": 6, "n_head": 4, "n_embd": 256, "n_positions": 256, "seq_len": 256,
    "batch_tokens": 2048, "steps": 3700, "recut": False, "compile": "auto", "evaluate_train": True,
}  # fmt: skip

# For experiments of minutes. Bytes, because which symbol follows which is then learned in twenty steps and the rest is the blocks' work,
# as in a GPT-2 of 10B tokens; with 4,096 symbols such a run mostly learns its embedding (docs/log.md, 12 and 13).
_FIVE_MILLION: dict[str, Any] = {
    "tokenizer": "bytes", "vocab_size": 257, "n_layer": 6, "n_head": 4, "n_embd": 256, "n_positions": 256, "seq_len": 256,
    "attention": "plain", "batch_tokens": 4096, "steps": 512, "warmup_steps": 19, "compile": "off", "val_tokens": 65_536,
}  # fmt: skip
# What makes a GPT-2 need fewer tokens and leaves its architecture alone (docs/log.md, 13). Rates are each size's own.
FAST: dict[str, Any] = {
    "optimizer": "muon",
    "schedule": "linear",
    "decay_share": 0.6,
    "min_lr": 0.0,
}


def _gpt2(n_layer: int, n_head: int, n_embd: int, lr: float) -> Config:
    """A published size. Rates above 124M are GPT-3's (Brown et al. 2020, table 2.1), ending at a tenth."""
    return _GPT2.override(n_layer=n_layer, n_head=n_head, n_embd=n_embd, lr=lr, min_lr=lr / 10)


def _fast(base: Config, lr: float) -> Config:
    """The same size, aiming at a third of the tokens.

    At 124M AdamW's rate and the size of Muon's updates (0.2 muon_lr = 3.6e-4 a weight) are those of the first public record with Muon
    (KellerJordan/modded-nanogpt, October 2024); above, lower with the width's root.
    """
    return base.override(
        **FAST, lr=lr, muon_lr=lr / 2, steps=6250, warmup_steps=250, muon_warmup=300
    )


RECIPES: dict[str, tuple[str, Config]] = {
    "demo": (
        "minutes on a laptop: learns Python from the standard library's own source",
        Config().override(**_SMALL | {"steps": 2000, "val_tokens": 131_072, "log_every": 100}),
    ),
    "shakespeare": (
        "tinyshakespeare in about a minute on two CPU cores",
        Config().override(**_SMALL | _SHAKESPEARE),
    ),
    "shakespeare-memorise": (
        "the same text by heart (shakespeare --memorise): training loss near 0, held-out loss high",
        Config().override(**_SMALL | _BY_HEART, data="tinyshakespeare"),
    ),
    "overfit": (
        "one batch again and again, to prove that the model can learn",
        Config().override(
            **_SMALL | {"steps": 200, "warmup_steps": 10, "one_batch": True, "evaluate_every": 0}
        ),
    ),
    "gpt2-5m": (
        "GPT-2's form at five million parameters, for experiments of minutes",
        Config().override(**_FIVE_MILLION),
    ),
    "gpt2-124m": ("GPT-2 small: 10B tokens of FineWeb-Edu", _gpt2(12, 12, 768, 6e-4)),
    "gpt2-350m": ("GPT-2 medium", _gpt2(24, 16, 1024, 3e-4)),
    "gpt2-355m": ("the same as gpt2-350m", _gpt2(24, 16, 1024, 3e-4)),
    "gpt2-774m": ("GPT-2 large", _gpt2(36, 20, 1280, 2.5e-4)),
    "gpt2-1558m": ("GPT-2 XL", _gpt2(48, 25, 1600, 2e-4)),
    "gpt2-124m-fast": (
        "GPT-2 small with a third of the tokens",
        _fast(_gpt2(12, 12, 768, 6e-4), 3.6e-3),
    ),
    "gpt2-350m-fast": (
        "GPT-2 medium with a third of the tokens",
        _fast(_gpt2(24, 16, 1024, 3e-4), 3.1e-3),
    ),
    "gpt2-774m-fast": (
        "GPT-2 large with a third of the tokens",
        _fast(_gpt2(36, 20, 1280, 2.5e-4), 2.8e-3),
    ),
    "gpt2-1558m-fast": (
        "GPT-2 XL with a third of the tokens",
        _fast(_gpt2(48, 25, 1600, 2e-4), 2.5e-3),
    ),
    "gpt2-124m-openwebtext": (
        "124M on 47.2B tokens of OpenWebText",
        _gpt2(12, 12, 768, 6e-4).override(data="openwebtext", steps=90_000),
    ),
    "finetune": (
        "go on from --init MODEL on your own --data",
        Config().override(
            lr=3e-5,
            min_lr=3e-6,
            steps=100,
            warmup_steps=10,
            batch_tokens=32_768,
            micro_batch=4,
            evaluate_every=20,
        ),
    ),
}


def recipe(name: str, **settings: Any) -> Config:
    """The named recipe with flat settings replaced, judged: `recipe("shakespeare", steps=200)`."""
    if name not in RECIPES:
        raise UserError(f"there is no recipe '{name}'; choose one of {', '.join(RECIPES)}.")
    base = dataclasses.replace(RECIPES[name][1], recipe=name)
    return base.override(**settings).adapted(set(settings))[0].check()
