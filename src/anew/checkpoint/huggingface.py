"""Find, read and write models. A model folder is a Hugging Face `GPT2LMHeadModel`.

    model = load_model("runs/demo")         # a run: its newest valid checkpoint
    model = load_model("path/to/gpt2")      # a checkpoint, or any GPT-2 in Hugging Face's format
    model = load_model("gpt2-xl")           # OpenAI's, from the hub or its cache (hub.py)
    model = load_model("out/ckpt.pt")       # nanoGPT's and build-nanogpt's (nanogpt.py)
    model = load_model("models/124M")       # OpenAI's TensorFlow release (tensorflow.py)
    save_model(folder, model, tokenizer)    # config.json, model.safetensors and the tokenizer files

Reading is strict: a tensor that is missing, unknown, of the wrong shape or not finite is refused by
name, because the text of a model with one wrong tensor looks almost normal. The padding rows of
`wte` exist only in memory; they are never written.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from anew.checkpoint import hub, nanogpt, tensorflow
from anew.checkpoint.folder import MANIFEST, newest_valid, verify
from anew.config.schema import GPTConfig
from anew.errors import UserError
from anew.model.flops import count_parameters
from anew.model.gpt import GPT, Linear
from anew.tokenizer import chat
from anew.tokenizer.bpe import Tokenizer
from anew.utils.files import parse_json, sha256_of, similar_path

log = logging.getLogger("anew")

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"  # lists the files of weights that are stored in several
PICKLED = "pytorch_model.bin"
WTE = "transformer.wte.weight"
SIZES = ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")
# Values that config.json must have for these keys, if it has the keys. With any other value the
# model computes another function.
ARITHMETIC = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "quantization_config": None,
}
# No tensor's shape depends on the number of heads, so a wrong n_head would not be noticed.
# Therefore our files have it in the header of the weights, as JSON under HEADER_KEY. For OpenAI's
# shapes it is known: (n_layer, n_embd) -> n_head.
HEADER_KEY = "anew"
OPENAI_HEADS = {(12, 768): 12, (24, 1024): 16, (36, 1280): 20, (48, 1600): 25}


# --- Find -----------------------------------------------------------------------------------------


def find_model(model: str) -> Path:
    """Return the folder or the .pt file of a model. A model on the hub is downloaded.

    For a run, this is the newest valid checkpoint. A checkpoint folder is verified.
    """
    path = Path(model).expanduser()
    if (path / "checkpoints").is_dir():
        return _newest_checkpoint(path)
    if (path / MANIFEST).is_file():
        verify(path)
    if path.is_file() or (path / CONFIG).is_file() or tensorflow.is_release(path):
        return path
    if path.exists():
        raise UserError(f"{model} is not a model: it is a folder without a {CONFIG}.")
    # A name such as runs/demo also has the form of a name on the hub.
    is_local = path.parent != Path() and path.parent.is_dir()
    if hub.is_hub_name(model) and not is_local:
        return hub.download(model)
    raise UserError(f"there is no model at {model}{similar_path(path)}")


def _newest_checkpoint(run: Path) -> Path:
    checkpoint, skipped = newest_valid(run)
    if checkpoint is None:
        raise UserError(" ".join(skipped) or f"run {run} has no checkpoint yet.")
    for message in skipped:
        log.warning(f"using {checkpoint.name}, because a newer checkpoint is damaged: {message}")
    return checkpoint


# --- Read -----------------------------------------------------------------------------------------


def load_model(
    model: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> GPT:
    """Return a model for inference, which computes in `dtype`; its matrices are cast once, here.

    A string or the path of a run is looked up by `find_model`. The path of a model, which
    `find_model` has returned, is not verified again.
    """
    is_model = isinstance(model, Path) and model.exists() and not (model / "checkpoints").is_dir()
    path = Path(model) if is_model else find_model(str(model))
    config = read_config(path)
    tensors = read_tensors(path)
    n_described = count_parameters(config)
    n_stored = sum(tensor.numel() for tensor in tensors.values())
    # Checked before memory is allocated, because a config.json may describe a billion layers.
    if n_described > 2 * n_stored + 1_000_000:
        raise UserError(
            f"the {CONFIG} of {path} describes a model of {n_described:,} parameters, and its "
            f"weights have {n_stored:,}."
        )
    gpt = GPT(config, compute_dtype=dtype, seed=None)
    load_state_dict(gpt, tensors, path)
    if dtype != torch.float32:
        gpt.transformer.wte.to(dtype)
        for module in gpt.modules():
            if isinstance(module, Linear):
                module.to(dtype)
    return gpt.to(device).eval()


def load_tokenizer(model: str | Path) -> Tokenizer:
    """Return the tokenizer of the model that `find_model` finds."""
    path = find_model(str(model))
    return Tokenizer.of_model(path, read_config(path).vocab_size)


def read_config(path: Path) -> GPTConfig:
    """Return the sizes of the model at `path`; refuse what is not a GPT-2 as OpenAI released it."""
    if path.is_file():
        config = nanogpt.read_config(path)
    elif tensorflow.is_release(path):
        config = tensorflow.read_config(path)
    else:
        config = _read_config_json(path)
    sizes = {name: getattr(config, name) for name in SIZES}
    if min(sizes.values()) < 1 or config.n_embd % config.n_head != 0:
        raise UserError(f"the config of {path} does not describe a GPT-2: {sizes}.")
    openai_heads = OPENAI_HEADS.get((config.n_layer, config.n_embd))
    trained_heads = _n_head_in_header(path) or openai_heads or config.n_head
    if config.n_head != trained_heads:
        raise UserError(
            f"the config of {path} has n_head {config.n_head}, and its weights were trained with "
            f"{trained_heads}."
        )
    return config


def _read_config_json(path: Path) -> GPTConfig:
    try:
        raw = parse_json(path / CONFIG)
        for key, value in ARITHMETIC.items():
            if raw.get(key, value) != value:
                raise UserError(
                    f"{path} is not a GPT-2 as OpenAI released it: its {CONFIG} has {key} "
                    f"{raw[key]!r} instead of {value!r}."
                )
        n_inner = 4 * raw["n_embd"]
        if raw.get("n_inner") not in (None, n_inner):
            raise UserError(
                f"{path} has n_inner {raw['n_inner']}, and GPT-2 has 4 x n_embd = {n_inner}."
            )
        sizes = {name: int(raw[name]) for name in SIZES}
        return GPTConfig(**sizes)  # type: ignore[arg-type]
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not a GPT-2 model: its {CONFIG} cannot be used ({error!r})."
        ) from error


def _n_head_in_header(path: Path) -> int | None:
    """Return n_head from the header of the weights; None if another program wrote them."""
    if not (path / WEIGHTS).is_file():
        return None
    with _reading_errors(path, WEIGHTS), safe_open(path / WEIGHTS, "pt") as file:
        metadata = file.metadata() or {}
        shape = json.loads(metadata.get(HEADER_KEY, "{}"))
        return int(shape.get("n_head", 0)) or None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return all tensors of the model at `path` under their full names; never run pickled code."""
    if path.is_file():
        return nanogpt.read_tensors(path)
    if tensorflow.is_release(path):
        return tensorflow.read_tensors(path)
    tensors: dict[str, Tensor] = {}
    for stored_name, tensor in _read_weights(path).items():
        if stored_name.endswith(nanogpt.CAUSAL_MASKS):
            continue
        is_full = stored_name.startswith(("transformer.", "lm_head."))
        name = stored_name if is_full else f"transformer.{stored_name}"
        if name in tensors:
            raise UserError(f"{path} has {name} twice, with and without its prefix.")
        tensors[name] = tensor
    return tensors


def _read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors in the first format that the folder has, under their stored names."""
    if (path / WEIGHTS).is_file():
        return _read_weights_file(path, WEIGHTS)
    if (path / INDEX).is_file():
        return _read_sharded_weights(path)
    if (path / PICKLED).is_file():
        return _read_weights_file(path, PICKLED)
    raise UserError(f"{path} has no weights: it has no {WEIGHTS}.")


def _read_weights_file(path: Path, name: str) -> dict[str, Tensor]:
    with _reading_errors(path, name):
        if name == PICKLED:
            tensors = torch.load(path / name, map_location="cpu", weights_only=True)
        else:
            tensors = load_file(path / name)
    is_dict = isinstance(tensors, dict)
    if not is_dict or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise UserError(f"{path}/{name} is not a plain file of tensors.")
    return tensors


def _read_sharded_weights(path: Path) -> dict[str, Tensor]:
    """Return weights in several files; the index must name the right file of every tensor."""
    with _reading_errors(path, INDEX):
        weight_map = parse_json(path / INDEX)["weight_map"]
        # Only the last part of each path, so that an index cannot name files outside the folder.
        file_of = {str(name): Path(file).name for name, file in weight_map.items()}
    files = sorted(set(file_of.values()))
    for file in files:
        if not (path / file).is_file():
            raise UserError(f"{path} lacks {file}, one of the files that its {INDEX} names.")
    tensors: dict[str, Tensor] = {}
    for file in files:
        part = _read_weights_file(path, file)
        expected = {name for name in file_of if file_of[name] == file}
        misplaced = part.keys() ^ expected
        if misplaced:
            raise UserError(f"{path}: {min(misplaced)} is not in the file that {INDEX} names.")
        tensors |= part
    return tensors


@contextlib.contextmanager
def _reading_errors(path: Path, name: str) -> Iterator[None]:
    """Turn the errors of reading a file of weights into a UserError."""
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
            f"the weights in {path} cannot be read ({name}: {error}); the file is damaged or not "
            "a file of weights."
        ) from error
    except Exception as error:
        # The errors of pickle and of torch's own unpickler have no common base class.
        kind = type(error)
        if "pickle" not in kind.__module__.lower() and "Unpickling" not in kind.__name__:
            raise
        raise UserError(f"{path}/{name} is not a plain file of tensors ({error}).") from error


def load_state_dict(model: GPT, tensors: dict[str, Tensor], path: Path) -> None:
    """Copy `tensors`, read from `path`, into `model`; both must have the same names and shapes."""
    head = tensors.pop("lm_head.weight", None)
    if head is not None and (WTE not in tensors or not torch.equal(head, tensors[WTE])):
        raise UserError(
            f"{path}: lm_head.weight differs from wte.weight, and in GPT-2 they are one tensor."
        )
    parameters = dict(model.named_parameters())
    _check_names(path, expected=parameters.keys(), stored=tensors.keys())
    with torch.no_grad():
        for name, parameter in parameters.items():
            target = parameter[: model.config.vocab_size] if name == WTE else parameter
            tensor = tensors[name]
            if tensor.shape != target.shape:
                raise UserError(
                    f"{path}: {name} has shape {tuple(tensor.shape)}, and its {CONFIG} needs "
                    f"{tuple(target.shape)}."
                )
            if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
                raise UserError(f"{path}: {name} has values that are not finite numbers.")
            target.copy_(tensor)


def _check_names(path: Path, expected: Set[str], stored: Set[str]) -> None:
    differences = []
    for words, names in (
        ("it lacks", sorted(expected - stored)),
        ("it has an unknown", sorted(stored - expected)),
    ):
        if names:
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            differences.append(f"{words} {names[0]}{others}")
    if differences:
        raise UserError(
            f"{path} is not the model that its {CONFIG} describes: {'; '.join(differences)}."
        )


def model_sha256(path: Path) -> str:
    """Return a hash that identifies the model at `path`: of its sizes and its files of weights."""
    files = [path]
    if path.is_dir():
        files = sorted(
            file
            for file in path.iterdir()
            if file.is_file() and (file.name.startswith("model") or file.name == PICKLED)
        )
    hashes = [sha256_of(file) for file in files]
    return hashlib.sha256(repr((read_config(path), hashes)).encode()).hexdigest()


# --- Write ----------------------------------------------------------------------------------------


def save_model(folder: Path, model: GPT, tokenizer: Tokenizer, is_chat: bool = False) -> None:
    """Write `model` and its tokenizer into `folder` in Hugging Face's format.

    The files of a model for conversations say in which form it expects them.
    """
    tensors = {
        name: without_padding(name, parameter, model.config)
        for name, parameter in model.named_parameters()
    }
    write_model(folder, tensors, model.config, tokenizer, is_chat)


def save_for_sharing(
    folder: Path, model: GPT, tokenizer: Tokenizer, readme: str, is_chat: bool = False
) -> None:
    """Write `model` as `save_model` does, with a README.md and the settings of `generate`."""
    save_model(folder, model, tokenizer, is_chat)
    end = tokenizer.end_of_text
    _write_json(
        folder / "generation_config.json",
        {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end},
    )
    (folder / "README.md").write_text(readme, encoding="utf-8")


def write_model(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: GPTConfig,
    tokenizer: Tokenizer,
    is_chat: bool = False,
) -> None:
    """Write `tensors` into `folder` in Hugging Face's format.

    They are all tensors of a model, without padding rows, as `without_padding` returns them.
    """
    header = {"format": "pt", HEADER_KEY: json.dumps({"n_head": config.n_head})}
    write_tensors(folder / WEIGHTS, tensors, header)
    _sort_metadata(folder / WEIGHTS)
    _write_json(folder / CONFIG, to_hf_config(config))
    tokenizer.save(folder, config.n_positions, chat.TEMPLATE if is_chat else "")


def without_padding(name: str, tensor: Tensor, config: GPTConfig, copy: bool = False) -> Tensor:
    """Return `tensor` as it is stored: contiguous, on the CPU, and `wte` without its padding rows.

    Names that end with the name of `wte` are those of its optimizer state. With `copy`, the result
    never shares memory with `tensor`.
    """
    tensor = tensor.detach()
    if name.endswith(WTE) and tensor.ndim > 0:
        tensor = tensor[: config.vocab_size]
    return tensor.to("cpu", copy=copy).contiguous()


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file. Raises OSError for errors of the system, such as a full disk."""
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(dict(tensors), path, metadata=metadata)
        path.chmod(mode)  # safetensors replaces the file by one that only its owner may read
    except SafetensorError as error:
        match = re.search(r"os error (\d+)", str(error))
        if match is None:
            raise
        number = int(match[1])
        raise OSError(number, os.strerror(number), str(path)) from error


def _sort_metadata(path: Path) -> None:
    """Sort the metadata in the header of a safetensors file.

    The library writes it in random order, and equal models must give equal files. The header is
    padded with spaces, so the position of the tensors does not change.
    """
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= length, "the header grew"
        file.seek(8)
        file.write(text.ljust(length))


def to_hf_config(config: GPTConfig) -> dict[str, Any]:
    """Return the content of Hugging Face's config.json for a model of these sizes."""
    end_of_text = config.vocab_size - 1
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
        "attn_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
