"""What the README says is run, not believed."""

import re
import shlex
from pathlib import Path

import pytest

import anew
from anew.cli import VERBS, main
from anew.data import prepare, sources
from anew.recipes import RECIPES
from anew.train import train
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line.split("#")[0].strip() for line in README.splitlines() if line.startswith(".venv/bin/anew ")]
SHAPE = "--n-layer 1 --n-head 1 --n-embd 16"
SHORTER = "--seq-len 32 --batch-tokens 128 --steps 3 --compile off --evaluate-every 0"


@pytest.fixture
def user_folder(tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the README's commands name: my.txt, a model, a data folder, a cache that has Shakespeare."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ANEW_CACHE", str(tmp_path / "cache"))
    text = text_file.read_text()
    Path("my.txt").write_text(text)
    shakespeare = Path("cache/downloads/tinyshakespeare.txt")
    shakespeare.parent.mkdir(parents=True)
    shakespeare.write_text(text * 5)
    prepare.prepare(sources.find("my.txt"), prepare.Settings("gpt2"), Path("DIR"))
    small = {"n_layer": 1, "n_head": 1, "n_embd": 16, "steps": 2, "batch_tokens": 256, "data": "my.txt", "precision": "fp32"}
    train(anew.recipe("shakespeare", tokenizer="gpt2", out="path/to/gpt2", **small))
    return tmp_path


def test_every_command_of_the_readme_works(user_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(COMMANDS) >= 7
    for command in COMMANDS:
        argv = shlex.split(command)[1:]
        if argv[0] == "train":
            argv += shlex.split(SHORTER) + ([] if "--init" in argv else shlex.split(SHAPE))
        main(argv)  # leaves by SystemExit if anything is wrong
    out = capsys.readouterr().out
    assert "Once upon a time" in out
    assert "loss of the one batch" in out
    assert "learnt its training text by heart" in out


def test_the_python_of_the_readme_runs_as_written(user_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [code] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    assert len(capsys.readouterr().out.strip()) > 50


def test_files_verbs_and_recipes_named_in_the_readme_exist() -> None:
    for name in re.findall(r"\b(?:src/anew|tests|docs|benchmarks)/[\w/.]+", README):
        assert (ROOT / name.rstrip(".")).exists(), name
    for verb in VERBS:
        assert f"`anew {verb}" in README
    for recipe in set(RECIPES) - {"gpt2-355m", "shakespeare-memorise"}:
        assert f"`{recipe}`" in README
    for target in re.findall(r"`?make (\w+)`?", README):
        assert f"\n{target}:" in (ROOT / "Makefile").read_text(), target
