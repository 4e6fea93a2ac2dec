"""`anew export MODEL --to hf|gguf|onnx --out PATH`: convert a model for another program."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from anew.checkpoint.export import export_model
from anew.report.model_card import model_card


@dataclass(frozen=True)
class ExportArgs:
    """Convert a model for another program.

    Example: anew export runs/mine --to gguf --out mine.gguf --dtype q8_0
    """

    model: tyro.conf.Positional[str]
    """a run, a checkpoint, a Hugging Face folder, a .pt file or a hub name"""
    to: Literal["hf", "gguf", "onnx"]
    """hf: a folder for transformers; gguf: a file for llama.cpp; onnx: a file for ONNX Runtime"""
    out: str
    """folder or file to write; it must not exist yet"""
    dtype: Literal["f32", "f16", "bf16", "q8_0"] = "f32"
    """gguf: how matrices are stored"""
    json: bool = False
    """the last line of standard output is one JSON object"""


def run_export(argv: list[str]) -> None:
    """Convert a model for transformers, llama.cpp or ONNX Runtime."""
    args = tyro.cli(ExportArgs, args=argv, prog="anew export")
    out = Path(args.out)
    readme = model_card(args.model) if args.to == "hf" else ""
    export_model(args.model, args.to, out, args.dtype, readme)
    files = out.rglob("*") if out.is_dir() else [out]
    size = sum(file.stat().st_size for file in files)
    print(f"{args.model} is now {out} ({args.to}, {size / 1e6:,.1f} MB)")
    if args.json:
        facts = {"model": args.model, "to": args.to, "out": args.out, "bytes": size}
        print(json.dumps(facts))
