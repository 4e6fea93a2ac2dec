"""Write a model as an ONNX graph, for onnxruntime and other programs.

    write_onnx(Path("model.onnx"), gpt)

The graph maps `ids`, int64 (batch, tokens), to `logits`, fp32 (batch, tokens, vocabulary), for any
batch size and any number of tokens up to `n_positions`.
"""

import logging
import tempfile
import warnings
from pathlib import Path

import torch

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
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            gpt,
            (example,),
            input_names=["ids"],
            output_names=["logits"],
            dynamic_shapes=({0: batch, 1: tokens},),
            dynamo=True,
            verbose=False,
        )
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
