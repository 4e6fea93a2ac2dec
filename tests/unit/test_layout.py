"""Rules for the source files: where packages are imported, and what no file may contain."""

import ast
import builtins
import re
from pathlib import Path

import pytest

from tests.support import ROOT

SOURCE = ROOT / "src" / "anew"
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
FILES = sorted(SOURCE.rglob("*.py"))


def module_name(path: Path) -> str:
    """Return a file's module name below `anew`."""
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts)


CLI = {module_name(path) for path in SOURCE.glob("cli/*.py")}
# The modules that may import a package, because it is slow to import or not always installed.
IMPORTERS: dict[str, set[str]] = {
    "datasets": set(),
    "fastapi": {"serve.app"},
    "filelock": {"data.prepare", "training.setup", "bench.sweep", "cli.experiments"},
    "gguf": {"checkpoint.gguf"},
    "huggingface_hub": {"checkpoint.hub", "data.hub_datasets", "utils.hub_errors"},
    "gigatoken": {"tokenizer.bpe"},
    "jinja2": {"report.templates"},
    "llama_cpp": {"bench.competitors"},
    "lm_eval": {"evaluate.harness"},
    "loguru": CLI,
    "matplotlib": {"report.png"},
    "onnx": {"checkpoint.onnx"},
    "openai": set(),
    "pyarrow": {"data.readers"},
    "rich": CLI,
    "starlette": {"serve.app"},
    "tensorboard": {"training.run_log"},
    "tiktoken": {"tokenizer.bpe"},
    "tokenizers": {"tokenizer.learn"},
    "transformers": {"bench.competitors", "verify.model"},
    "triton": {"model.kernels.cross_entropy"},
    "tyro": CLI,
    "uvicorn": {"cli.serve", "serve.connections"},
}


def imported_packages(path: Path) -> set[str]:
    """Return the top-level packages that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return {name.split(".")[0] for name in names}


def test_heavy_packages_are_imported_only_where_they_are_used() -> None:
    for path in FILES:
        for package in imported_packages(path) & set(IMPORTERS):
            module = module_name(path)
            assert module in IMPORTERS[package], f"{module} imports {package}"


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
def test_no_file_executes_data(pattern: str) -> None:
    for path in FILES:
        for line in path.read_text(encoding="utf-8").splitlines():
            is_allowed = "model.eval()" in line
            assert is_allowed or not re.search(pattern, line), f"{path.name}: {line}"


def test_every_file_has_a_docstring() -> None:
    for path in FILES:
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        assert docstring, path
        assert len(docstring) > 20, path


def test_examples_in_docstrings_call_functions_that_exist() -> None:
    """A function that is renamed keeps no old name in the example of its module."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
    defined = set(dir(builtins)) | {"Path", "hf_hub_download", "model", "work"}
    for tree in trees.values():
        defined |= {node.name for node in tree.body if isinstance(node, DEFINITIONS)}
    for path, tree in trees.items():
        example = re.findall(r"^    .*", ast.get_docstring(tree, clean=False) or "", re.MULTILINE)
        code = re.sub(r"#.*|\"[^\"]*\"", "", "\n".join(example), flags=re.MULTILINE)
        local = set(re.findall(r"(\w+) = |as (\w+)|for (\w+) in", code))
        names = defined | {name for group in local for name in group}
        for call in re.findall(r"(?<![\w.])([A-Za-z_]\w*)\(", code):
            assert call in names, f"{path.relative_to(SOURCE)}: {call}"
