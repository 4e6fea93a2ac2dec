"""`anew export MODEL --to hf|gguf|onnx --out PATH`: a model for other people's programs."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from anew.checkpoint.export import export
from anew.report.model_card import model_card


@dataclass(frozen=True)
class ExportArgs:
    """Write a model for another program. Example: anew export runs/mine --to gguf --out mine.gguf --dtype q8_0"""

    model: Annotated[
        str,
        tyro.conf.Positional,
        tyro.conf.arg(help="a run, a checkpoint, a Hugging Face folder, a .pt file or a hub name"),
    ]
    to: Annotated[
        Literal["hf", "gguf", "onnx"],
        tyro.conf.arg(help="hf: a folder for transformers; gguf: llama.cpp; onnx: onnxruntime"),
    ]
    out: Annotated[str, tyro.conf.arg(help="the folder or file to write; it must not exist yet")]
    dtype: Annotated[
        Literal["f32", "f16", "bf16", "q8_0"], tyro.conf.arg(help="gguf: how matrices are stored")
    ] = "f32"
    json: Annotated[
        bool, tyro.conf.arg(help="the last line of standard output is one JSON object")
    ] = False


def run_export(argv: list[str]) -> None:
    """Write a model for other programs: transformers, llama.cpp, onnxruntime."""
    a = tyro.cli(ExportArgs, args=argv, prog="anew export")
    out = Path(a.out)
    export(a.model, a.to, out, a.dtype, readme=model_card(a.model) if a.to == "hf" else "")
    size = sum(p.stat().st_size for p in out.rglob("*")) if out.is_dir() else out.stat().st_size
    print(f"{a.model} is now {out} ({a.to}, {size / 1e6:,.1f} MB)")
    if a.json:
        print(json.dumps({"model": a.model, "to": a.to, "out": a.out, "bytes": size}))
