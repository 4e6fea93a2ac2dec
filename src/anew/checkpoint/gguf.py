"""Write a model as a GGUF file, the format of llama.cpp.

    write_gguf(Path("gpt2.gguf"), gpt, Tokenizer.named("gpt2"), dtype="q8_0", name="gpt2")

Matrices are stored as `dtype`; positions, biases and the parameters of LayerNorm stay fp32. The
embedding is stored a second time as `output.weight`, because llama.cpp requires it for GPT-2.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from anew.checkpoint.huggingface import WTE, without_padding
from anew.model.gpt import GPT
from anew.tokenizer import chat
from anew.tokenizer.bpe import Tokenizer

if TYPE_CHECKING:
    from gguf import GGUFWriter

# Types of matrices -> their number in the header of a file (gguf.LlamaFileType).
DTYPES = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7}
# Our name of a module -> llama.cpp's, where {} is the number of the layer.
MODULES = {
    "wte": "token_embd",
    "wpe": "position_embd",
    "h.{}.ln_1": "blk.{}.attn_norm",
    "h.{}.attn.c_attn": "blk.{}.attn_qkv",
    "h.{}.attn.c_proj": "blk.{}.attn_output",
    "h.{}.ln_2": "blk.{}.ffn_norm",
    "h.{}.mlp.c_fc": "blk.{}.ffn_up",
    "h.{}.mlp.c_proj": "blk.{}.ffn_down",
    "ln_f": "output_norm",
}


def write_gguf(
    path: Path, gpt: GPT, tokenizer: Tokenizer, dtype: str, name: str, is_chat: bool = False
) -> None:
    """Write the file `path`. `dtype` is a key of DTYPES; `name` is the name that programs show.

    The file of a model for conversations says in which form it expects them.
    """
    import gguf

    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_name(name)
    writer.add_context_length(gpt.config.n_positions)
    writer.add_embedding_length(gpt.config.n_embd)
    writer.add_feed_forward_length(4 * gpt.config.n_embd)
    writer.add_block_count(gpt.config.n_layer)
    writer.add_head_count(gpt.config.n_head)
    writer.add_layer_norm_eps(gpt.config.layer_norm_epsilon)
    writer.add_file_type(DTYPES[dtype])
    _add_tokenizer(writer, tokenizer)
    if is_chat:
        writer.add_chat_template(chat.TEMPLATE)
    for tensor_name, tensor in _tensors(gpt):
        _add_tensor(writer, tensor_name, tensor, dtype)
    with contextlib.closing(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def _add_tokenizer(writer: "GGUFWriter", tokenizer: Tokenizer) -> None:
    import gguf

    vocabulary = tokenizer.vocabulary()
    words = list(vocabulary.ids)
    types = [gguf.TokenType.NORMAL] * tokenizer.n_vocab
    types[tokenizer.end_of_text] = gguf.TokenType.CONTROL
    # llama.cpp requires merges. If there are none, it gets one whose result is not a token.
    unused_merge = f"{words[-2]} {words[-2]}"
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(words)
    writer.add_token_types(types)
    writer.add_token_merges(vocabulary.merges or [unused_merge])
    writer.add_bos_token_id(tokenizer.end_of_text)
    writer.add_eos_token_id(tokenizer.end_of_text)
    writer.add_add_bos_token(False)


def _tensors(gpt: GPT) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor with llama.cpp's name and layout, in which matrices are (out, in)."""
    modules = {
        ours.format(layer): theirs.format(layer)
        for layer in range(gpt.config.n_layer)
        for ours, theirs in MODULES.items()
    }
    for name, parameter in gpt.named_parameters():
        module, _, kind = name.removeprefix("transformer.").rpartition(".")
        tensor = without_padding(name, parameter, gpt.config)
        if tensor.ndim == 2 and module.startswith("h."):
            tensor = tensor.t().contiguous()
        yield f"{modules[module]}.{kind}", tensor
    yield "output.weight", without_padding(WTE, gpt.transformer.wte.weight, gpt.config)


def _add_tensor(writer: "GGUFWriter", name: str, tensor: Tensor, dtype: str) -> None:
    """Add a tensor as `dtype`, or as fp32 if it is not a matrix or its rows do not fill blocks."""
    import gguf

    values = tensor.float().numpy()
    stored_type = gguf.GGMLQuantizationType[dtype.upper()]
    block_size, _ = gguf.GGML_QUANT_SIZES[stored_type]
    is_matrix = tensor.ndim == 2 and name != "position_embd.weight"
    if dtype == "f32" or not is_matrix or tensor.size(-1) % block_size != 0:
        writer.add_tensor(name, values)
    else:
        quantized = gguf.quants.quantize(values, stored_type)
        writer.add_tensor(name, quantized, raw_dtype=stored_type)
