"""Model folders in and out. A folder is a Hugging Face `GPT2LMHeadModel`: config.json, model.safetensors, tokenizer files.

    model = load_model("runs/demo")             # a run (its newest verified checkpoint), a checkpoint, or any GPT-2 folder
    model = load_model("gpt2-xl")               # OpenAI's, from the hub or its cache (hub.py)
    model = load_model("out/ckpt.pt")           # nanoGPT's, build-nanogpt's, OpenAI's TensorFlow release (foreign.py)
    save_model(folder, model, tokenizer)        # `transformers` opens it with no export step

Reading is strict: a missing, extra, misshapen or non-finite tensor is refused by name, since a model that loads with one wrong tensor
speaks well enough for nobody to notice. The padding rows of `wte` are storage and never written.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from anew.checkpoint import folder as checkpoint
from anew.checkpoint import hub
from anew.checkpoint import nanogpt as foreign
from anew.config.schema import GPTConfig
from anew.errors import UserError
from anew.model.flops import count_parameters
from anew.model.gpt import GPT, Linear
from anew.tokenizer.bpe import Tokenizer
from anew.utils.files import sha256_of

log = logging.getLogger("anew")

WTE = "transformer.wte.weight"
WEIGHTS, INDEX, PICKLED = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"
# What a GPT-2 must say in config.json if it says it at all; anything else computes another function.
ARITHMETIC = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "quantization_config": None,
}
# Heads leave no trace in the tensors' shapes, so for OpenAI's own shapes they are known here: (n_layer, n_embd) -> n_head.
HEADS = {(12, 768): 12, (24, 1024): 16, (36, 1280): 20, (48, 1600): 25}
SHAPE = "anew"  # the key of the safetensors header under which our own files say how many heads they have


def find(model: str) -> Path:
    """The folder or .pt file that MODEL means: for a run, its newest checkpoint that verifies; a named checkpoint must verify."""
    path = Path(model).expanduser()
    if (path / "checkpoints").is_dir():
        newest, skipped = checkpoint.newest(path)
        for line in skipped if newest else ():
            log.warning(f"an older checkpoint is taken: {line}")
        if newest is None:
            raise UserError(" ".join(skipped) or f"run {path} has no checkpoint yet.")
        return newest
    if (path / "manifest.json").is_file():
        checkpoint.verify(path)
    if (path / "config.json").is_file() or foreign.is_foreign(path):
        return path
    if not path.exists() and hub.is_name(model):
        return hub.download(model)
    raise UserError(
        f"{model} is not a model: there is no folder of that name with a config.json in it."
    )


def read_config(path: Path) -> GPTConfig:
    """The shape of the model at `path`. What is not a GPT-2, or computes something else, is refused."""
    config = foreign.read_config(path) if foreign.is_foreign(path) else _hf_config(path)
    sizes = {
        key: getattr(config, key)
        for key in ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")
    }
    if min(sizes.values()) < 1 or config.n_embd % config.n_head:
        raise UserError(f"the config of {path} describes no GPT-2: {sizes}.")
    heads = _written_heads(path) or HEADS.get((config.n_layer, config.n_embd), config.n_head)
    if heads != config.n_head:
        raise UserError(
            f"{path}: its config says n_head {config.n_head}, and these weights were made with {heads}."
        )
    return config


def _hf_config(path: Path) -> GPTConfig:
    """The shape in a Hugging Face folder's config.json."""
    try:
        raw = json.loads((path / "config.json").read_text(encoding="utf-8"))
        for key, value in ARITHMETIC.items():
            if raw.get(key, value) != value:
                raise UserError(
                    f"{path} is not a GPT-2 as OpenAI released it: its config.json has {key} {raw[key]!r} instead of {value!r}."
                )
        if raw.get("n_inner") not in (None, 4 * raw["n_embd"]):
            raise UserError(
                f"{path} has n_inner {raw['n_inner']}, and GPT-2's is 4 x n_embd = {4 * raw['n_embd']}."
            )
        sizes = {
            key: int(raw[key])
            for key in ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")
        }
        return GPTConfig(**sizes)  # type: ignore[arg-type]
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not a GPT-2 model: its config.json cannot be used ({error!r})."
        ) from error


def _written_heads(path: Path) -> int | None:
    """n_head as the header of our own weights files keeps it; None for other writers' files."""
    if not (path / WEIGHTS).is_file():
        return None
    with _reading(path, WEIGHTS), safe_open(path / WEIGHTS, "pt") as file:
        return int(json.loads((file.metadata() or {}).get(SHAPE, "{}")).get("n_head", 0)) or None


def sha256(path: Path) -> str:
    """What identifies the model at `path`: a hash over its shape and the hashes of its weights files."""
    files = (
        [path]
        if path.is_file()
        else sorted(p for p in path.iterdir() if p.name.startswith("model") or p.name == PICKLED)
    )
    hashes = [sha256_of(file) for file in files if file.is_file()]
    return hashlib.sha256(repr((read_config(path), hashes)).encode()).hexdigest()


def load_model(
    model: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> GPT:
    """The model in a run, a checkpoint, a Hugging Face folder, a foreign checkpoint or on the hub, for use and not for training.

    It computes in `dtype`; matrices are cast once, here. A Path is what `find` gave: it is not looked up and verified again.
    """
    path = find(model) if isinstance(model, str) else model
    config, tensors = read_config(path), read_tensors(path)
    described, held = count_parameters(config), sum(tensor.numel() for tensor in tensors.values())
    if (
        described > 2 * held + 1_000_000
    ):  # before memory is asked for: a config.json may say a billion layers
        raise UserError(
            f"{path} describes a model of {described:,} parameters in its config.json, and its weights are {held:,}."
        )
    gpt = GPT(config, compute_dtype=dtype, seed=None)
    load_into(gpt, tensors, path)
    if dtype != torch.float32:
        for module in gpt.modules():
            if isinstance(module, Linear):
                module.to(dtype)
        gpt.transformer.wte.to(dtype)
    return gpt.to(device).eval()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors at `path` under their full names; never through pickle's code execution."""
    if foreign.is_foreign(path):
        return foreign.read_tensors(path)
    if (path / WEIGHTS).is_file():
        raw = _load(path, WEIGHTS)
    elif (path / INDEX).is_file():
        raw = _load_sharded(path)
    elif (path / PICKLED).is_file():
        raw = _load(path, PICKLED)
    else:
        raise UserError(f"{path} holds no {WEIGHTS}; there are no weights to load.")
    tensors: dict[str, Tensor] = {}
    for name, tensor in raw.items():
        if name.endswith(
            (".attn.bias", ".attn.masked_bias")
        ):  # buffers of old transformers versions, not weights
            continue
        full = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
        if full in tensors:
            raise UserError(f"{path} holds {full} twice, with the prefix and without.")
        tensors[full] = tensor
    return tensors


def _load(path: Path, name: str) -> dict[str, Tensor]:
    with _reading(path, name):
        raw = (
            load_file(path / name)
            if name != PICKLED
            else torch.load(path / name, map_location="cpu", weights_only=True)
        )
    if not isinstance(raw, dict) or not all(isinstance(t, Tensor) for t in raw.values()):
        raise UserError(f"{path}/{name} is no plain file of tensors.")
    return raw


def _load_sharded(path: Path) -> dict[str, Tensor]:
    """Weights in several files, as transformers writes large models: the index must name every tensor's file and no other."""
    with _reading(path, INDEX):
        files = {
            str(key): Path(name).name
            for key, name in json.loads((path / INDEX).read_text(encoding="utf-8"))[
                "weight_map"
            ].items()
        }
    if lacking := sorted(name for name in set(files.values()) if not (path / name).is_file()):
        raise UserError(f"{path} lacks {lacking[0]}, one of the files its {INDEX} names.")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(files.values())):
        part = _load(path, name)
        if wrong := part.keys() ^ {key for key, file in files.items() if file == name}:
            raise UserError(f"{path}: {min(wrong)} is not where {INDEX} says it is.")
        tensors |= part
    return tensors


@contextmanager
def _reading(path: Path, name: str) -> Iterator[None]:
    """What goes wrong in reading a weights file, in words."""
    try:
        yield
    except (
        OSError,
        SafetensorError,
        RuntimeError,
        ValueError,
        EOFError,
        KeyError,
        TypeError,
        AttributeError,
    ) as error:
        raise UserError(
            f"the weights in {path} cannot be read ({name}: {error}); the file is damaged or no weights file."
        ) from error
    except Exception as error:  # pickle's own errors share no base class
        if (
            "pickle" not in type(error).__module__.lower()
            and "Unpickling" not in type(error).__name__
        ):
            raise
        raise UserError(f"{path}/{name} is no plain file of tensors ({error}).") from error


def load_into(model: GPT, tensors: dict[str, Tensor], path: Path) -> None:
    """Copy `tensors` into `model`, all of them and nothing else."""
    head = tensors.pop("lm_head.weight", None)
    if head is not None and (WTE not in tensors or not torch.equal(head, tensors[WTE])):
        raise UserError(
            f"{path}: lm_head.weight differs from wte.weight, and in GPT-2 they are one tensor."
        )
    own = dict(model.named_parameters())
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or extra:
        raise UserError(
            f"{path} is not the model its config.json describes: "
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
                raise UserError(
                    f"{path}: {name} has shape {tuple(tensor.shape)}, and its config.json needs {tuple(target.shape)}."
                )
            if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
                raise UserError(f"{path}: {name} holds values that are not finite numbers.")
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


def unpadded(name: str, tensor: Tensor, config: GPTConfig, copy: bool = False) -> Tensor:
    """`tensor` as it is stored: contiguous, on the CPU, and for `wte` (or its optimizer state) without the padding rows."""
    rows = config.vocab_size if name.endswith(WTE) else None
    return (
        (tensor.detach()[:rows] if tensor.ndim else tensor.detach())
        .to("cpu", copy=copy)
        .contiguous()
    )


def save_model(folder: Path, model: GPT, tokenizer: Tokenizer) -> None:
    """Write `model` into `folder` as a Hugging Face GPT-2."""
    write_model(
        folder,
        {name: unpadded(name, p, model.config) for name, p in model.named_parameters()},
        model.config,
        tokenizer,
    )


def write_model(
    folder: Path, tensors: Mapping[str, Tensor], config: GPTConfig, tokenizer: Tokenizer
) -> None:
    """Write `tensors` (all of a model's, without padding rows) into `folder` as a Hugging Face GPT-2."""
    write_tensors(
        folder / WEIGHTS, tensors, {"format": "pt", SHAPE: json.dumps({"n_head": config.n_head})}
    )
    _sort_metadata(folder / WEIGHTS)
    (folder / "config.json").write_text(
        json.dumps(hf_config(config), indent=2) + "\n", encoding="utf-8"
    )
    tokenizer.save(folder, config.n_positions)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """A safetensors file; OSError where the library has an error of its own for a full disk."""
    try:
        save_file(dict(tensors), path, metadata=metadata)
    except SafetensorError as error:
        if (number := re.search(r"os error (\d+)", str(error))) is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def _sort_metadata(path: Path) -> None:
    """Put a safetensors header's metadata in order: the library writes it in a random one, and equal models shall be equal files."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= length, "the header grew"
        file.seek(8)
        file.write(text.ljust(length))
