"""The plan of the house, held: imports go one way, heavy packages stay where they are used, nothing can execute what it loads."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

SOURCE = ROOT / "src" / "anew"
FILES = sorted(p for p in SOURCE.rglob("*.py"))
CLI = {
    path.relative_to(SOURCE).with_suffix("").as_posix().replace("/", ".")
    for path in SOURCE.glob("cli/*.py")
}
OWNERS = {
    "tyro": CLI, "rich": CLI, "loguru": CLI, "tensorboard": {"training.run_log"}, "tiktoken": {"tokenizer.bpe"},
    "huggingface_hub": {"checkpoint.hub", "data.hub_datasets"}, "tokenizers": {"tokenizer.learn"}, "pyarrow": {"data.readers"},
    "filelock": {"data.prepare", "training.setup", "bench.sweep"}, "gguf": {"checkpoint.gguf"}, "onnx": {"checkpoint.onnx"},
    "lm_eval": {"evaluate.harness"}, "triton": {"model.kernels.cross_entropy"}, "llama_cpp": {"bench.competitors"},
    "transformers": {"bench.competitors"}, "matplotlib": {"report.png"}, "datasets": set(), "openai": set(),
    "fastapi": {"serve.app"}, "starlette": {"serve.app"}, "uvicorn": {"cli.serve"},
}  # fmt: skip


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts)


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_heavy_packages_stay_where_they_are_used() -> None:
    for path in FILES:
        for package in {i.split(".")[0] for i in imports_of(path)} & set(OWNERS):
            assert name_of(path) in OWNERS[package], f"{path.name} imports {package}"


@pytest.mark.parametrize(
    "pattern",
    [
        r"import pickle",
        r"yaml\.load",
        r"weights_only=False",
        r"extractall",
        r"\beval\(\w",
        r"\bexec\(",
    ],
)
def test_nothing_executes_what_it_loads(pattern: str) -> None:
    for path in FILES:
        lines = [
            line
            for line in path.read_text(encoding="utf-8").splitlines()
            if re.search(pattern, line)
        ]
        assert not [line for line in lines if "model.eval()" not in line], f"{path.name}: {lines}"


def test_the_command_line_starts_without_what_only_one_command_needs() -> None:
    script = """
import sys
for name in "fastapi uvicorn starlette matplotlib transformers llama_cpp litgpt triton lm_eval gguf onnx boto3 tensorboard".split():
    sys.modules[name] = None
import anew.cli.main, importlib
for command in anew.cli.main.VERBS:
    importlib.import_module(f"anew.cli.{command}")
anew.cli.main.main(["--help"])
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_file_opens_with_what_it_is() -> None:
    for path in FILES:
        doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        assert doc, path
        assert len(doc) > 20, path
