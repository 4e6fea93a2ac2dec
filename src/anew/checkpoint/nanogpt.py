"""Other projects' GPT-2 checkpoints as ours: OpenAI's TensorFlow release, and the .pt files of nanoGPT and build-nanogpt.

    tensors = foreign.read_tensors(Path("out/ckpt.pt"))         # Hugging Face's names, OpenAI's (in, out) layout

| what | how it is known | what is changed |
|---|---|---|
| openai/gpt-2 `models/124M/` | a folder with hparams.json | renamed; the leading 1 of a convolution's shape dropped |
| nanoGPT `ckpt.pt` | "model" and "model_args" | matrices transposed; missing biases are zeros; padding rows dropped |
| build-nanogpt `model_*.pt` | "model" and a pickled GPTConfig | the same |

A .pt file is opened with `weights_only=True`: it can hold tensors and plain values, and build-nanogpt's config is read as a bag of values.
"""

import json
import logging
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anew.checkpoint import tensorflow as tf_checkpoint
from anew.config.schema import GPTConfig
from anew.errors import UserError

log = logging.getLogger("anew")

MATRICES = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
GPT2_VOCAB, PADDED_VOCAB = 50257, 50304


class _Values:
    """What a pickled `GPTConfig` becomes: its attributes and no behaviour."""


CONFIG_CLASSES = [
    (_Values, f"{module}.GPTConfig") for module in ("__main__", "model", "train_gpt2")
]


def is_foreign(path: Path) -> bool:
    """Is `path` one of the above rather than a Hugging Face folder?"""
    return path.is_file() or (path / "hparams.json").is_file()


def read_config(path: Path) -> GPTConfig:
    """The model's shape."""
    return _tf_config(path) if path.is_dir() else _pt_config(path, _load_pt(path))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The model's tensors. What had to be changed in meaning is logged."""
    if path.is_dir():
        named = tf_checkpoint.read(path / "model.ckpt")
        return {
            _from_tf(name): torch.from_numpy(value.squeeze(0) if value.ndim == 3 else value)
            for name, value in named.items()
        }
    checkpoint = _load_pt(path)
    return _pt_tensors(path, checkpoint, _pt_config(path, checkpoint))


def _from_tf(name: str) -> str:
    """model/h0/attn/c_attn/w -> transformer.h.0.attn.c_attn.weight."""
    parts = name.removeprefix("model/").split("/")
    layer = re.fullmatch(r"h(\d+)", parts[0])
    parts[:1] = ["h", layer[1]] if layer else parts[:1]
    if len(parts) > 1:
        parts[-1] = {"w": "weight", "g": "weight", "b": "bias"}.get(parts[-1], parts[-1])
    else:
        parts.append("weight")  # wte and wpe
    return ".".join(["transformer", *parts])


def _tf_config(path: Path) -> GPTConfig:
    try:
        raw = json.loads((path / "hparams.json").read_text(encoding="utf-8"))
        sizes = {
            ours: int(raw[theirs])
            for ours, theirs in (("n_positions", "n_ctx"), ("vocab_size", "n_vocab"))
        }
        return GPTConfig(**sizes, **{key: int(raw[key]) for key in ("n_embd", "n_head", "n_layer")})  # type: ignore[arg-type]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}/hparams.json does not describe a GPT-2 ({error!r}).") from error


def _load_pt(path: Path) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals(CONFIG_CLASSES):  # type: ignore[arg-type]
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise UserError(
            f"{path} cannot be read as a checkpoint ({str(error).splitlines()[0]})."
        ) from error
    except Exception as error:  # pickle's own errors share no base class
        if "pickl" not in type(error).__name__.lower():
            raise
        raise UserError(
            f"{path} holds more than tensors and plain values, so it is not opened: {str(error).splitlines()[0]}"
        ) from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("model"), dict):
        raise UserError(
            f"{path} is no checkpoint of nanoGPT or build-nanogpt: it has no 'model' in it."
        )
    return checkpoint


def _pt_config(path: Path, checkpoint: dict[str, Any]) -> GPTConfig:
    raw = checkpoint.get("model_args") or getattr(checkpoint.get("config"), "__dict__", None)
    try:
        assert raw is not None
        vocab = int(raw["vocab_size"])
        vocab = GPT2_VOCAB if vocab == PADDED_VOCAB else vocab
        sizes = {key: int(raw[key]) for key in ("n_layer", "n_head", "n_embd")}
        return GPTConfig(**sizes, n_positions=int(raw["block_size"]), vocab_size=vocab)  # type: ignore[arg-type]
    except (AssertionError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} does not say which shape its model has (nanoGPT's 'model_args', build-nanogpt's 'config')."
        ) from error


def _pt_tensors(path: Path, checkpoint: dict[str, Any], config: GPTConfig) -> dict[str, Tensor]:
    tensors, padded = {}, False
    for name, tensor in checkpoint["model"].items():
        name = name.removeprefix("_orig_mod.").removeprefix("module.").removeprefix("_orig_mod.")
        if not isinstance(tensor, Tensor):
            raise UserError(f"{path}: {name} is not a tensor.")
        if name.endswith(
            (".attn.bias", ".attn.masked_bias")
        ):  # the causal mask, kept by versions without flash attention
            continue
        if name in ("transformer.wte.weight", "lm_head.weight") and (
            len(tensor),
            config.vocab_size,
        ) == (PADDED_VOCAB, GPT2_VOCAB):
            tensor = tensor[:GPT2_VOCAB]
            padded = True
        tensors[name] = (
            tensor.t().contiguous() if name.endswith(MATRICES) and tensor.ndim == 2 else tensor
        )
    args = checkpoint.get("model_args")
    if args is not None:
        log.info(
            f"{path.name}: nanoGPT trains with the exact GELU and GPT-2 has the tanh form; they are up to 4.7e-4 apart"
        )
        if args.get("bias") is False:
            log.info(
                f"{path.name}: trained without biases; they are zeros now, which computes the same"
            )
            _add_zero_biases(tensors, config)
    if padded:
        log.info(
            f"{path.name}: rows of the vocabulary behind {GPT2_VOCAB:,} are padding and left out"
        )
    return tensors


def _add_zero_biases(tensors: dict[str, Tensor], config: GPTConfig) -> None:
    C = config.n_embd
    widths = {
        "ln_1": C,
        "ln_2": C,
        "attn.c_attn": 3 * C,
        "attn.c_proj": C,
        "mlp.c_fc": 4 * C,
        "mlp.c_proj": C,
    }
    names = {
        f"transformer.h.{i}.{part}.bias": n
        for i in range(config.n_layer)
        for part, n in widths.items()
    }
    for name, n in (names | {"transformer.ln_f.bias": C}).items():
        tensors.setdefault(name, torch.zeros(n))
