"""Read the .pt checkpoints of nanoGPT and build-nanogpt.

    config = read_config(Path("out/ckpt.pt"))
    tensors = read_tensors(Path("out/ckpt.pt"))     # our names, matrices (in, out)

Both store "model", a dictionary of tensors. nanoGPT describes its shape in "model_args", and
build-nanogpt in "config", a pickled object. Reading transposes the matrices, adds zeros for biases
that the model was trained without, and drops the padding rows of the vocabulary.

Files are opened with `weights_only=True`, so they can contain tensors and plain values but no code;
build-nanogpt's pickled object is read as its attributes only.
"""

import logging
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anew.config.schema import GPTConfig
from anew.errors import UserError

log = logging.getLogger("anew")

# Weights that nn.Linear stores as (out, in), and GPT-2 as (in, out).
MATRICES = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
# Causal masks that older versions of nanoGPT and transformers stored beside the weights.
CAUSAL_MASKS = (".attn.bias", ".attn.masked_bias")
VOCABULARY_TENSORS = ("transformer.wte.weight", "lm_head.weight")
GPT2_VOCAB = 50257
PADDED_VOCAB = 50304


class _Attributes:
    """Stands for a pickled GPTConfig: the attributes of the object, without its class."""


# The modules in which build-nanogpt and scripts derived from it define GPTConfig.
CONFIG_CLASSES = [
    (_Attributes, "__main__.GPTConfig"),
    (_Attributes, "model.GPTConfig"),
    (_Attributes, "train_gpt2.GPTConfig"),
]


def read_config(path: Path) -> GPTConfig:
    """Return the sizes of the model in the file `path`."""
    return _config_of(_load(path), path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of the model in the file `path`, and log what reading changed."""
    checkpoint = _load(path)
    config = _config_of(checkpoint, path)
    tensors = {}
    has_padding = False
    for stored_name, tensor in checkpoint["model"].items():
        name = _without_wrappers(stored_name)
        if not isinstance(tensor, Tensor):
            raise UserError(f"{path}: {name} is not a tensor.")
        if name.endswith(CAUSAL_MASKS):
            continue
        if name.endswith(MATRICES) and tensor.ndim == 2:
            tensor = tensor.t().contiguous()
        if name in VOCABULARY_TENSORS and config.vocab_size == GPT2_VOCAB:
            is_padded = tensor.shape[:1] == (PADDED_VOCAB,)
            has_padding = has_padding or is_padded
            tensor = tensor[:GPT2_VOCAB] if is_padded else tensor
        tensors[name] = tensor
    model_args = checkpoint.get("model_args")
    if model_args is not None:
        log.info(
            f"{path.name}: nanoGPT trains with the exact GELU, and GPT-2 uses its tanh "
            "approximation; they differ by up to 4.7e-4"
        )
        if model_args.get("bias") is False:
            log.info(f"{path.name}: trained without biases; adding zeros, which computes the same")
            _add_zero_biases(tensors)
    if has_padding:
        log.info(f"{path.name}: dropping the padding rows of the vocabulary above {GPT2_VOCAB:,}")
    return tensors


def _load(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint; its tensors are mapped from the file, not read yet."""
    if not zipfile.is_zipfile(path):
        raise UserError(
            f"{path} is not a model: torch.save did not write it, or it is damaged. Name a run, a "
            "folder with a model, or a checkpoint of nanoGPT or build-nanogpt."
        )
    try:
        with torch.serialization.safe_globals(CONFIG_CLASSES):  # type: ignore[arg-type]
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise UserError(
            f"{path} cannot be read as a checkpoint ({str(error).splitlines()[0]})."
        ) from error
    except Exception as error:
        # The errors of pickle and of torch's own unpickler have no common base class.
        if "pickl" not in type(error).__name__.lower():
            raise
        raise UserError(
            f"{path} contains more than tensors and plain values and is not loaded: "
            f"{str(error).splitlines()[0]}"
        ) from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("model"), dict):
        raise UserError(
            f"{path} is not a checkpoint of nanoGPT or build-nanogpt: it has no 'model' in it."
        )
    return checkpoint


def _config_of(checkpoint: dict[str, Any], path: Path) -> GPTConfig:
    """Return the sizes that nanoGPT's "model_args" or build-nanogpt's "config" describe."""
    raw = checkpoint.get("model_args") or getattr(checkpoint.get("config"), "__dict__", None)
    try:
        vocab_size = int(raw["vocab_size"])  # type: ignore[index]
        return GPTConfig(
            n_layer=int(raw["n_layer"]),  # type: ignore[index]
            n_head=int(raw["n_head"]),  # type: ignore[index]
            n_embd=int(raw["n_embd"]),  # type: ignore[index]
            n_positions=int(raw["block_size"]),  # type: ignore[index]
            vocab_size=GPT2_VOCAB if vocab_size == PADDED_VOCAB else vocab_size,
        )
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} does not describe the shape of its model, which nanoGPT stores as "
            "'model_args' and build-nanogpt as 'config'."
        ) from error


def _without_wrappers(name: str) -> str:
    """Remove the prefixes that torch.compile and DistributedDataParallel add, in either order."""
    return name.removeprefix("_orig_mod.").removeprefix("module.").removeprefix("_orig_mod.")


def _add_zero_biases(tensors: dict[str, Tensor]) -> None:
    """Add a bias of zeros for every matrix and every LayerNorm that has none."""
    for name, weight in list(tensors.items()):
        if name.startswith(("transformer.h.", "transformer.ln_f.")):
            bias = name.replace(".weight", ".bias")
            tensors.setdefault(bias, torch.zeros(weight.shape[-1:]))
