"""`anew export MODEL --to hf|gguf|onnx|web --out PATH`: convert a model for another program.

anew export runs/mine --to hub --repo me/my-gpt2            # shows what would be uploaded
anew export runs/mine --to hub --repo me/my-gpt2 --push     # uploads it
"""

import json
import shlex
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from anew.checkpoint import hub
from anew.checkpoint.export import export_model
from anew.cli.parse import ModelArgument, parse
from anew.errors import UserError
from anew.report.model_card import model_card


@dataclass(frozen=True)
class ExportArgs:
    """Convert a model for another program.

    Example: anew export runs/mine --to gguf --out mine.gguf --dtype q8_0
    """

    model: ModelArgument
    """a run, a checkpoint, a Hugging Face folder, a .pt file or a hub name"""
    to: Literal["hf", "gguf", "onnx", "web", "hub"]
    """hf: a folder for transformers; gguf: a file for llama.cpp; onnx: a file for ONNX Runtime;
    web: a folder with a page that runs the model in a browser; hub: a repository on the Hugging
    Face hub"""
    out: str = ""
    """folder or file to write, which must not exist yet; hub: keep the uploaded folder here"""
    dtype: Literal["f32", "f16", "bf16", "q8_0", "int8"] = "f32"
    """how matrices are stored; gguf: f32, f16, bf16 or q8_0; web: f32, f16 or int8"""
    repo: str = ""
    """hub: the repository, as OWNER/NAME"""
    push: bool = False
    """hub: upload; without it, only show what would be uploaded"""
    private: bool = False
    """hub: create a repository that only its owner can read"""
    json: bool = False
    """the last line of standard output is one JSON object"""


def run_export(argv: list[str]) -> None:
    """Convert a model for transformers, llama.cpp, ONNX Runtime or a browser."""
    args = parse(ExportArgs, argv, "export")
    if args.to == "hub":
        with tempfile.TemporaryDirectory() as temporary:
            facts = _export_to_hub(args, Path(args.out or f"{temporary}/model"))
    else:
        facts = _export_to_file(args)
    if args.json:
        print(json.dumps({"model": args.model, "to": args.to, **facts}))


def _export_to_file(args: ExportArgs) -> dict[str, Any]:
    """Write the model to --out; return facts for --json."""
    if not args.out:
        raise UserError("name the folder or file to write with --out.")
    if args.repo or args.push or args.private:
        raise UserError("--repo, --push and --private belong to --to hub.")
    out = Path(args.out)
    readme = model_card(args.model) if args.to == "hf" else ""
    export_model(args.model, args.to, out, args.dtype, readme)
    files = list(out.rglob("*")) if out.is_dir() else [out]
    size = sum(file.stat().st_size for file in files)
    print(f"{args.model} is now {out} ({args.to}, {size / 1e6:,.1f} MB)")
    if args.to == "web":
        command = f"python -m http.server --bind 127.0.0.1 --directory {shlex.quote(str(out))}"
        print(f"to see it: {command}, then open http://127.0.0.1:8000")
        print("to share it: put the folder on any server of files, such as GitHub Pages")
    return {"out": args.out, "bytes": size}


def _export_to_hub(args: ExportArgs, folder: Path) -> dict[str, Any]:
    """Write a Hugging Face folder and upload it if --push was given; return facts for --json."""
    if not args.repo:
        raise UserError("name the repository with --repo OWNER/NAME.")
    hub.check_repository(args.repo)
    export_model(args.model, "hf", folder, args.dtype, model_card(args.model, args.repo))
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    print(f"files of {args.repo} on the hub:")
    for name, size in files.items():
        print(f"  {name:<24} {size:>15,} bytes")
    address = ""
    if args.push:
        address = hub.upload(folder, args.repo, args.private)
        print(f"{args.model} is now {address}")
    else:
        print("nothing was uploaded; add --push to upload these files")
    return {"repo": args.repo, "files": files, "pushed": args.push, "address": address}
