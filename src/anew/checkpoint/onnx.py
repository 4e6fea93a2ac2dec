"""Write a model as an ONNX graph, for onnxruntime and other programs.

    write_onnx(Path("model.onnx"), gpt)             # ids -> logits
    write_decoder_onnx(Path("model.onnx"), gpt)     # with a key-value cache, for transformers.js

The first graph maps `ids`, int64 (batch, tokens), to `logits`, fp32 (batch, tokens, vocabulary),
for any batch size and any number of tokens up to `n_positions`. The second one has the inputs and
outputs that transformers.js and optimum expect: `input_ids`, `attention_mask`, `position_ids` and
`past_key_values.LAYER.key` and `.value`; `logits` and `present.LAYER.key` and `.value`.
"""

import copy
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anew.model.flops import count_parameters
from anew.model.gpt import GPT
from anew.utils.files import rename

# A file is a protocol buffer, which is limited to 2 GB. Larger weights are stored in a second file.
MAX_BYTES_IN_GRAPH = 1_500_000_000


def write_onnx(path: Path, gpt: GPT) -> None:
    """Write the graph to `path`; from 375M parameters on, write the weights to `path`.data."""
    example = torch.zeros(2, min(8, gpt.config.n_positions), dtype=torch.long)
    batch = torch.export.Dim("batch")
    tokens = torch.export.Dim("tokens", max=gpt.config.n_positions)
    _write(
        path,
        gpt,
        gpt,
        (example,),
        input_names=["ids"],
        output_names=["logits"],
        dynamic_shapes=({0: batch, 1: tokens},),
    )


def write_decoder_onnx(path: Path, gpt: GPT, dtype: torch.dtype = torch.float32) -> None:
    """Write the graph of one step with a key-value cache to `path`, as `write_onnx` does.

    It stores the weights and computes in `dtype`; its inputs and outputs are fp32 in either case.
    """
    config = gpt.config
    if dtype != torch.float32:
        gpt = copy.deepcopy(gpt).to(dtype)
        gpt.compute_dtype = dtype
    inputs = ["input_ids", "attention_mask", "position_ids"]
    outputs = ["logits"]
    for layer in range(config.n_layer):
        for kind in ("key", "value"):
            inputs.append(f"past_key_values.{layer}.{kind}")
            outputs.append(f"present.{layer}.{kind}")
    # The graph is recorded with an example: 3 new tokens behind 5 others, in 2 texts.
    B, T, used = 2, 3, 5
    ids = torch.zeros(B, T, dtype=torch.long)
    mask = torch.ones(B, used + T, dtype=torch.long)
    positions = torch.arange(used, used + T).expand(B, T)
    keys_or_values = torch.zeros(B, config.n_head, used, config.head_dim)
    past = [keys_or_values] * (2 * config.n_layer)
    batch = torch.export.Dim("batch")
    tokens = torch.export.Dim("tokens")
    past_length = torch.export.Dim("past_length")
    total_length = torch.export.Dim("total_length")
    shapes_of_past = [{0: batch, 2: past_length} for _ in past]
    _write(
        path,
        gpt,
        DecoderStep(gpt),
        (ids, mask, positions, past),
        input_names=inputs,
        output_names=outputs,
        dynamic_shapes=(
            {0: batch, 1: tokens},
            {0: batch, 1: total_length},
            {0: batch, 1: tokens},
            shapes_of_past,
        ),
    )


class DecoderStep(nn.Module):
    """The network with its cache as inputs and outputs, since a graph keeps nothing."""

    def __init__(self, gpt: GPT) -> None:
        super().__init__()
        self.gpt = gpt

    def forward(
        self, ids: Tensor, attention_mask: Tensor, positions: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        """Return the logits (B, T, 50257) of new ids (B, T), and the keys and values so far.

        `past` has the keys and values of each layer, each (B, heads, used, head_dim).
        `attention_mask` (B, used + T) is 0 for tokens that are padding.
        """
        transformer = self.gpt.transformer
        T = ids.size(1)
        used = past[0].size(2)
        key_places = torch.arange(used + T, device=ids.device)
        query_places = used + torch.arange(T, device=ids.device)
        visible = key_places <= query_places[:, None]  # (T, used + T)
        visible = visible & (attention_mask[:, None, None, :] > 0)  # (B, 1, T, used + T)
        x = transformer.wte(ids) + transformer.wpe(positions)  # (B, T, C)
        cache = GraphCache([keys_or_values.to(x.dtype) for keys_or_values in past])
        for block in transformer.h:
            x = block(x, cache, visible)
        logits = self.gpt.head(transformer.ln_f(x))
        return logits.float(), *(keys_or_values.float() for keys_or_values in cache.present)


class GraphCache:
    """A key-value cache in the form that `Attention` uses, without memory of its own."""

    def __init__(self, past: list[Tensor]) -> None:
        self.past = past
        self.present: list[Tensor] = []

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return all keys and values of a layer: those of the past with the new ones behind."""
        keys = torch.cat([self.past[2 * layer], k], dim=2)
        values = torch.cat([self.past[2 * layer + 1], v], dim=2)
        self.present += [keys, values]
        return keys, values


def _write(path: Path, gpt: GPT, module: nn.Module, example: tuple[Any, ...], **names: Any) -> None:
    """Write the graph of `module`, which computes with the weights of `gpt`."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(module, example, dynamo=True, verbose=False, **names)
    assert program is not None
    is_large = 4 * count_parameters(gpt.config) > MAX_BYTES_IN_GRAPH
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        graph = Path(folder) / path.name
        weights = Path(folder) / f"{path.name}.data"
        program.save(graph, external_data=is_large)
        # The graph is renamed last, because it names the file of the weights.
        if weights.exists():
            rename(weights, path.with_name(weights.name))
        rename(graph, path)
