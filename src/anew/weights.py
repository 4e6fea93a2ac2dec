"""Model folders in and out. A folder is a Hugging Face `GPT2LMHeadModel`: config.json, model.safetensors, tokenizer files.

    model = load_model("runs/demo")             # a run (its newest verified checkpoint), a checkpoint, or any GPT-2 folder
    save_model(folder, model, tokenizer)        # `transformers` opens it with no export step

Reading is strict: a missing, extra, misshapen or non-finite tensor is refused by name, since a model that loads with one wrong tensor
speaks well enough for nobody to notice. The padding rows of `wte` are storage and never written.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from anew import checkpoint
from anew.config import GPTConfig, UserError
from anew.model import GPT
from anew.tokenizer import Tokenizer

WTE = "transformer.wte.weight"
HUB_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
# What a GPT-2 must say in config.json if it says it at all; anything else computes another function.
ARITHMETIC = {"model_type": "gpt2", "activation_function": "gelu_new", "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}


def find(model: str) -> Path:
    """The folder that MODEL means: for a run, its newest checkpoint that verifies; a named checkpoint must verify."""
    path = Path(model).expanduser()
    if (path / "checkpoints").is_dir():
        newest, skipped = checkpoint.newest(path)
        if newest is None:
            raise UserError(" ".join(skipped) or f"run {path} has no checkpoint yet.")
        return newest
    if (path / "manifest.json").is_file():
        checkpoint.verify(path)
    elif model in HUB_NAMES and not path.exists():
        raise UserError(f"{model} cannot be downloaded by this version of anew yet; fetch its folder from the hub and pass the path.")
    if not (path / "config.json").is_file():
        raise UserError(f"{model} is not a model: there is no folder of that name with a config.json in it.")
    return path


def read_config(folder: Path) -> GPTConfig:
    """The shape in a folder's config.json. A folder that is not a GPT-2, or computes something else, is refused."""
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        for key, value in ARITHMETIC.items():
            if raw.get(key, value) != value:
                raise UserError(
                    f"{folder} is not a GPT-2 as OpenAI released it: its config.json has {key} {raw[key]!r} instead of {value!r}."
                )
        if raw.get("n_inner") not in (None, 4 * raw["n_embd"]):
            raise UserError(f"{folder} has n_inner {raw['n_inner']}, and GPT-2's is 4 x n_embd = {4 * raw['n_embd']}.")
        sizes = {key: int(raw[key]) for key in ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")}
        config = GPTConfig(layer_norm_epsilon=float(raw.get("layer_norm_epsilon", 1e-5)), **sizes)  # type: ignore[arg-type]
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder} is not a GPT-2 model: its config.json cannot be used ({error!r}).") from error
    if min(sizes.values()) < 1 or config.n_embd % config.n_head:
        raise UserError(f"{folder}/config.json describes no GPT-2: {sizes}.")
    return config


def load_model(model: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> GPT:
    """The model in a run, checkpoint or Hugging Face folder, in evaluation mode, computing in `dtype`."""
    folder = find(model)
    gpt = GPT(read_config(folder), compute_dtype=dtype)
    load_into(gpt, read_tensors(folder), folder)
    return gpt.to(device).eval()


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder under their full names; never through pickle's code execution."""
    try:
        if (folder / "model.safetensors").is_file():
            raw = load_file(folder / "model.safetensors")
        elif (folder / "pytorch_model.bin").is_file():
            raw = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
        else:
            raise UserError(f"{folder} holds no model.safetensors; there are no weights to load.")
    except UserError:
        raise
    except (OSError, SafetensorError, RuntimeError, ValueError, EOFError) as error:
        raise UserError(f"the weights in {folder} cannot be read ({error}); the file is damaged or no weights file.") from error
    except Exception as error:  # pickle's own errors share no base class
        if "pickle" not in type(error).__module__.lower() and "Unpickling" not in type(error).__name__:
            raise
        raise UserError(f"{folder}/pytorch_model.bin is no plain file of tensors ({error}).") from error
    if not isinstance(raw, dict) or not all(isinstance(t, Tensor) for t in raw.values()):
        raise UserError(f"{folder}/pytorch_model.bin is no plain file of tensors.")
    tensors = {}
    for name, tensor in raw.items():
        if name.endswith((".attn.bias", ".attn.masked_bias")):  # buffers of old transformers versions, not weights
            continue
        tensors[name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"] = tensor
    return tensors


def load_into(model: GPT, tensors: dict[str, Tensor], folder: Path) -> None:
    """Copy `tensors` into `model`, all of them and nothing else."""
    head = tensors.pop("lm_head.weight", None)
    if head is not None and (WTE not in tensors or not torch.equal(head, tensors[WTE])):
        raise UserError(f"{folder}: lm_head.weight differs from wte.weight, and in GPT-2 they are one tensor.")
    own = dict(model.named_parameters())
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or extra:
        raise UserError(
            f"{folder} is not the model its config.json describes: "
            + "; ".join(
                f"{word} {names[0]}" + (f" and {len(names) - 1} more" if names[1:] else "")
                for word, names in (("it lacks", missing), ("it has an unknown", extra))
                if names
            )
            + "."
        )
    with torch.no_grad():
        for name, parameter in own.items():
            target = parameter[: model.config.vocab_size] if name == WTE else parameter
            tensor = tensors[name]
            if tensor.shape != target.shape:
                raise UserError(f"{folder}: {name} has shape {tuple(tensor.shape)}, and its config.json needs {tuple(target.shape)}.")
            if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
                raise UserError(f"{folder}: {name} holds values that are not finite numbers.")
            target.copy_(tensor)


def hf_config(config: GPTConfig) -> dict[str, Any]:
    """config.json of a Hugging Face GPT-2 with this shape."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "vocab_size": config.vocab_size,
        "n_positions": config.n_positions,
        "n_ctx": config.n_positions,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": None,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "initializer_range": 0.02,
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), config.dropout),
        "bos_token_id": config.vocab_size - 1,
        "eos_token_id": config.vocab_size - 1,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }


def unpadded(name: str, tensor: Tensor, config: GPTConfig) -> Tensor:
    """`tensor` as it is stored: contiguous, on the CPU, and for `wte` (or its optimizer state) without the padding rows."""
    rows = config.vocab_size if name.endswith(WTE) else None
    return tensor.detach()[:rows].cpu().contiguous() if tensor.ndim else tensor.detach().cpu()


def save_model(folder: Path, model: GPT, tokenizer: Tokenizer) -> None:
    """Write `model` into `folder` as a Hugging Face GPT-2."""
    tensors = {name: unpadded(name, p, model.config) for name, p in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(hf_config(model.config), indent=2) + "\n", encoding="utf-8")
    tokenizer.save(folder, model.config.n_positions)
