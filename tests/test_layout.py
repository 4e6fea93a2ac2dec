"""The plan of the house, held: imports go one way, heavy packages stay where they are used, nothing can execute what it loads."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

SOURCE = ROOT / "src" / "anew"
FILES = sorted(p for p in SOURCE.rglob("*.py"))
VERB_NAMES = ("train", "sample", "prepare", "evaluate", "export", "plan", "bench", "report", "serve")
LEVELS = [
    {"errors"},
    {"utils.files", "spelling", "attention", "toolchain", "kernels.cross_entropy"},
    {"config"},
    {"devices", "head"},
    {
        "model",
        "tokenizer",
        "runtime",
        "recipes",
        "parallel",
        "preempt",
        "spikes",
        "tf_checkpoint",
        "data.shards",
        "data.readers",
        "data.hub_data",
    },
    {
        "muon",
        "optim",
        "gradient_buckets",
        "checkpoint",
        "foreign",
        "hub",
        "weights",
        "generate",
        "fast_decode",
        "metrics",
        "data.sources",
        "data.documents",
        "data.prepare",
        "data.open",
        "data.others",
        "data.splits",
        "vocabulary",
        "data.batches",
    },
    {"evaluate.score", "evaluate.task", "evaluate.loss", "evaluate.published", "state", "sharded"},
    {
        "evaluate.choices",
        "evaluate.corpora",
        "evaluate.tasks",
        "evaluate.runner",
        "evaluate.harness",
        "evaluate.during",
        "export",
        "saver",
        "profiling",
    },
    {"probe"},
    {"begin"},
    {"train"},
    {"report.charts", "report.reference"},
    {"report.run"},
    {"report.page", "report.baseline", "demo", "serve.engine"},
    {"serve.wanted"},
    {"serve.completions"},
    {"serve.app"},
    {"bench", "pictures", "versus", "trials"},
    {"plan", "rivals", "time_to_loss"},
    {"verbs.settings", "verbs.experiments"},
    {f"verbs.{name}" for name in VERB_NAMES},
    {"cli"},
    {"__main__"},
]
WITHIN_A_LEVEL = {
    ("optim", "muon"),
    *(("weights", other) for other in ("checkpoint", "foreign", "hub")),
    ("generate", "fast_decode"),
    ("parallel", "preempt"),
    ("evaluate.task", "evaluate.score"),
    ("state", "sharded"),
    *(("evaluate.tasks", f"evaluate.{other}") for other in ("choices", "corpora")),
    ("evaluate.harness", "evaluate.corpora"),
    *(("evaluate.during", f"evaluate.{other}") for other in ("runner", "tasks")),
    ("evaluate.during", "saver"),
    *(("data.prepare", other) for other in ("data.sources", "data.documents", "data.splits", "vocabulary")),
    ("data.documents", "data.sources"),
    ("data.splits", "data.documents"),
    *(("data.open", f"data.{other}") for other in ("sources", "prepare", "others", "splits")),
}
UPWARD = {("model", "weights")}  # GPT.from_pretrained, a public name, inside its function
VERBS = {"cli", "verbs.settings", *(f"verbs.{name}" for name in VERB_NAMES)}
OWNERS = {
    "tyro": VERBS, "rich": VERBS, "loguru": VERBS, "tensorboard": {"metrics"}, "tiktoken": {"tokenizer"},
    "huggingface_hub": {"hub", "data.hub_data"},
    "tokenizers": {"vocabulary"}, "pyarrow": {"data.readers"}, "filelock": {"data.prepare", "begin", "trials"},
    "gguf": {"export"}, "onnx": {"export"}, "lm_eval": {"evaluate.harness"},
    "triton": {"kernels.cross_entropy"}, "llama_cpp": {"rivals"}, "transformers": {"rivals"}, "matplotlib": {"pictures"}, "datasets": set(),
    "fastapi": {"serve.app"}, "starlette": {"serve.app"}, "uvicorn": {"verbs.serve"}, "openai": set(),
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


def test_imports_go_one_way() -> None:
    level = {module: i for i, modules in enumerate(LEVELS) for module in modules}
    known = {name_of(p) for p in FILES if p.name != "__init__.py" and "gpt2_bpe" not in p.parts}
    assert known == set(level), "a module has no place in the plan"
    for path in FILES:
        me = name_of(path)
        for imported in {i.removeprefix("anew.") for i in imports_of(path) if i.startswith("anew.")} & known - {me} if me in level else ():
            allowed = level[imported] < level[me] or (me, imported) in WITHIN_A_LEVEL | UPWARD
            assert allowed, f"{me} imports {imported}, which stands on its level or above"


def test_heavy_packages_stay_where_they_are_used() -> None:
    for path in FILES:
        for package in {i.split(".")[0] for i in imports_of(path)} & set(OWNERS):
            assert name_of(path) in OWNERS[package], f"{path.name} imports {package}"


@pytest.mark.parametrize("pattern", [r"import pickle", r"yaml\.load", r"weights_only=False", r"extractall", r"\beval\(\w", r"\bexec\("])
def test_nothing_executes_what_it_loads(pattern: str) -> None:
    for path in FILES:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if re.search(pattern, line)]
        assert not [line for line in lines if "model.eval()" not in line], f"{path.name}: {lines}"


def test_the_command_line_starts_without_what_only_one_command_needs() -> None:
    script = """
import sys
for name in "fastapi uvicorn starlette matplotlib transformers llama_cpp litgpt triton lm_eval gguf onnx boto3 tensorboard".split():
    sys.modules[name] = None
import anew.cli.main
anew.cli.main.main(["--help"])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_file_opens_with_what_it_is() -> None:
    for path in FILES:
        doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        assert doc, path
        assert len(doc) > 20, path
