"""A model for other people's programs: a Hugging Face folder, a GGUF file for llama.cpp, an ONNX graph.

    anew export runs/mine --to hf --out my-gpt2                 # AutoModelForCausalLM, AutoTokenizer
    anew export gpt2 --to gguf --out gpt2-q8.gguf --dtype q8_0  # llama.cpp, ollama, LM Studio
    anew export runs/mine --to onnx --out model.onnx            # onnxruntime: ids (batch, tokens) -> logits

Each is written beside its place and renamed when it is whole. gguf and onnx are extras: `pip install -e '.[export]'`.
"""

import json
import os
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from anew.checkpoint import huggingface as weights
from anew.errors import UserError
from anew.model.flops import count_parameters
from anew.model.gpt import GPT
from anew.tokenizer.bpe import Tokenizer
from anew.utils.files import atomic_file, atomic_folder, rename

FORMATS = ("hf", "gguf", "onnx")
GGUF_DTYPES = ("f32", "f16", "bf16", "q8_0")
# Our name of a layer's part -> llama.cpp's. Its matrices are (out, in).
GGUF_NAMES = {
    "ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}  # fmt: skip


def export(model: str, to: str, out: Path, dtype: str = "f32", readme: str = "") -> None:
    """Write MODEL at `out` in the format `to`. `dtype` is the matrices' in a GGUF file; the other formats keep fp32.

    `readme` is the README.md of a Hugging Face folder.
    """
    if to not in FORMATS:
        raise UserError(f"there is no format '{to}'; choose one of {', '.join(FORMATS)}.")
    if dtype not in GGUF_DTYPES or (to != "gguf" and dtype != "f32"):
        raise UserError(
            f"--dtype {dtype} cannot be exported to {to}; gguf takes {', '.join(GGUF_DTYPES)}, the others keep f32."
        )
    if out.exists():
        raise UserError(f"{out} exists already; choose another --out or remove it.")
    path = weights.find(model).resolve()
    gpt = weights.load_model(path)
    tokenizer = Tokenizer.of_model(path, gpt.config.vocab_size)
    if to == "onnx":
        write_onnx(out, gpt)
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    if to == "hf":
        with atomic_folder(out) as temporary:
            write_hf(temporary, gpt, tokenizer, readme)
    else:
        with atomic_file(out) as temporary:
            write_gguf(temporary, gpt, tokenizer, dtype, out.stem)


def write_hf(folder: Path, gpt: GPT, tokenizer: Tokenizer, readme: str) -> None:
    """A folder that `AutoModelForCausalLM` and `AutoTokenizer` open, with a model card."""
    weights.save_model(folder, gpt, tokenizer)
    end = tokenizer.end_of_text
    generation = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    (folder / "generation_config.json").write_text(
        json.dumps(generation, indent=2) + "\n", encoding="utf-8"
    )
    (folder / "README.md").write_text(readme, encoding="utf-8")


def write_gguf(path: Path, gpt: GPT, tokenizer: Tokenizer, dtype: str, name: str) -> None:
    """A GGUF file. Matrices are stored as `dtype`; norms, biases and positions stay fp32. The tied head is written out a second time.

    llama.cpp's loader of GPT-2 wants `output.weight` where `token_embd.weight` was written without a note that both are one.
    """
    _needs("gguf")
    import gguf

    config = gpt.config
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_name(name)
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_file_type({"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}[dtype])  # gguf.LlamaFileType
    words, merges = tokenizer.words()
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(words)
    writer.add_token_types(
        [control if i == tokenizer.end_of_text else normal for i in range(len(words))]
    )
    writer.add_token_merges(
        merges or [f"{words[-2]} {words[-2]}"]
    )  # bytes: llama.cpp wants a list, and this pair names no token
    writer.add_bos_token_id(tokenizer.end_of_text)
    writer.add_eos_token_id(tokenizer.end_of_text)
    writer.add_add_bos_token(False)
    kind = gguf.GGMLQuantizationType[dtype.upper()]
    for key, tensor in _gguf_tensors(gpt):
        values = tensor.float().numpy()
        whole = (
            kind == gguf.GGMLQuantizationType.F32
            or tensor.ndim == 1
            or key == "position_embd.weight"
        )
        if whole or values.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            writer.add_tensor(key, values)
        else:
            writer.add_tensor(key, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_tensors(gpt: GPT) -> Iterator[tuple[str, Tensor]]:
    """llama.cpp's name and layout of every tensor."""
    named = {
        name.removeprefix("transformer."): weights.unpadded(name, p, gpt.config).detach() for name, p in gpt.named_parameters()
    }  # fmt: skip
    yield "token_embd.weight", named["wte.weight"]
    yield "position_embd.weight", named["wpe.weight"]
    for i in range(gpt.config.n_layer):
        for ours, theirs in GGUF_NAMES.items():
            weight = named[f"h.{i}.{ours}.weight"]
            yield (
                f"blk.{i}.{theirs}.weight",
                weight.t().contiguous() if weight.ndim == 2 else weight,
            )
            yield f"blk.{i}.{theirs}.bias", named[f"h.{i}.{ours}.bias"]
    yield "output_norm.weight", named["ln_f.weight"]
    yield "output_norm.bias", named["ln_f.bias"]
    yield "output.weight", named["wte.weight"]


def write_onnx(path: Path, gpt: GPT) -> None:
    """A graph from ids (batch, tokens) int64 to logits (batch, tokens, vocabulary) fp32, for any batch and length up to the positions.

    From 375M parameters on its weights stand beside it in `path`.data.
    """
    _needs("onnx", "onnxscript")
    import logging
    import warnings

    ids = torch.zeros(2, min(8, gpt.config.n_positions), dtype=torch.long)
    dynamic = (
        {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens", max=gpt.config.n_positions)},
    )
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            gpt,
            (ids,),
            input_names=["ids"],
            output_names=["logits"],
            dynamic_shapes=dynamic,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    large = (
        4 * count_parameters(gpt.config) > 1_500_000_000
    )  # a protocol buffer ends at 2 GB; then the weights stand in a file beside it
    folder = path.with_name(f".{path.name}.{os.getpid()}")
    folder.mkdir(parents=True)
    try:
        program.save(folder / path.name, external_data=large)
        for written in sorted(
            folder.iterdir(), key=lambda p: p.name == path.name
        ):  # the graph, which names the other, last
            rename(written, path.with_name(written.name))
    finally:
        shutil.rmtree(folder)


def _needs(*packages: str) -> None:
    for package in packages:
        if not find_spec(package):
            raise UserError(f"this format needs the package {package}: pip install -e '.[export]'.")
