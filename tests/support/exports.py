"""Models for tests of exports, and the check that a GGUF file has the values of a model."""

from pathlib import Path

import numpy as np
import pytest
import torch

from anew import GPT, GPTConfig, Tokenizer
from anew.checkpoint.huggingface import save_model
from anew.cli.main import main

TEXT = "The king crosses the river, and 12 ships leave.\n  def it(self):"
GGUF_DTYPES = ["f32", "f16", "bf16", "q8_0"]


def lively_model(vocab_size: int, n_embd: int = 64) -> GPT:
    """Return a model whose logits differ clearly, as those of a trained model do."""
    config = GPTConfig(n_layer=2, n_head=2, n_embd=n_embd, n_positions=64, vocab_size=vocab_size)
    gpt = GPT(config, seed=3).eval()
    for parameter in gpt.transformer.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(5)
    return gpt


def saved_model(folder: Path, tokenizer: Tokenizer) -> GPT:
    """Return a model that is also saved in `folder`."""
    gpt = lively_model(tokenizer.n_vocab)
    save_model(folder, gpt, tokenizer)
    return gpt


def check_gguf_reads_back(
    gpt: GPT, tokenizer: Tokenizer, folder: Path, path: Path, dtype: str
) -> None:
    """Export the model in `folder` to `path` and compare what the gguf package reads with `gpt`."""
    import gguf

    main(["export", str(folder), "--to", "gguf", "--out", str(path), "--dtype", dtype])
    reader = gguf.GGUFReader(path)
    tensors = {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        for tensor in reader.tensors
    }
    own = dict(gpt.transformer.named_parameters())
    embedding = own["wte.weight"][: tokenizer.n_vocab]
    expected_tensors: dict[str, torch.Tensor] = {
        "token_embd.weight": embedding,
        "output.weight": embedding,
        "position_embd.weight": own["wpe.weight"],
        "blk.1.attn_qkv.weight": own["h.1.attn.c_attn.weight"].t(),
        "blk.0.ffn_down.weight": own["h.0.mlp.c_proj.weight"].t(),
        "blk.1.ffn_up.bias": own["h.1.mlp.c_fc.bias"],
        "output_norm.weight": own["ln_f.weight"],
    }
    spacing = {"f32": 0, "f16": 2**-10, "bf16": 2**-7, "q8_0": 2**-6}[dtype]
    for name, tensor in expected_tensors.items():
        expected = tensor.detach().numpy()
        error = np.abs(tensors[name].reshape(expected.shape) - expected).max()
        assert error <= spacing * np.abs(expected).max(), name
    assert len(tensors) == 5 + 12 * gpt.config.n_layer
    assert np.array_equal(tensors["position_embd.weight"], own["wpe.weight"].detach().numpy())

    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "gpt2"
    assert fields["gpt2.block_count"] == 2
    assert fields["gpt2.attention.head_count"] == 2
    assert fields["gpt2.context_length"] == 64
    assert fields["gpt2.attention.layer_norm_epsilon"] == pytest.approx(1e-5)
    assert fields["tokenizer.ggml.tokens"][-1] == "<|endoftext|>"
    assert len(fields["tokenizer.ggml.tokens"]) == tokenizer.n_vocab
