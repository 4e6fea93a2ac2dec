"""The commands and claims of README.md and of the docs are run."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import anew
from anew.cli.main import COMMANDS as CLI_COMMANDS
from anew.cli.main import main
from anew.config.recipes import RECIPES
from anew.data import prepare, sources
from anew.data.holdout import Settings
from anew.training.trainer import train
from tests.support import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
QUICKSTART = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
MULTI_GPU = (ROOT / "docs" / "multi-gpu.md").read_text(encoding="utf-8")
QUICKSTART_COMMANDS = [
    line.split("#")[0].strip()
    for line in QUICKSTART.splitlines()
    if line.startswith(".venv/bin/anew ")
]
PAST = ("log", "reliability")  # pages that say what was run at their time
SHAPE = "--n-layer 1 --n-head 1 --n-embd 16"
SHORTER = "--seq-len 32 --batch-tokens 128 --steps 3 --compile off --evaluate-every 0"


@pytest.fixture
def user_folder(tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the README's commands name: my.txt, a model, a data folder, a cache that
    has Shakespeare.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ANEW_CACHE", str(tmp_path / "cache"))
    text = text_file.read_text()
    Path("my.txt").write_text(text)
    shakespeare = Path("cache/downloads/tinyshakespeare.txt")
    shakespeare.parent.mkdir(parents=True)
    shakespeare.write_text(text * 5)
    prepare.prepare_data(sources.find("my.txt"), Settings("gpt2"), Path("DIR"))
    small = {
        "n_layer": 1,
        "n_head": 1,
        "n_embd": 16,
        "steps": 2,
        "batch_tokens": 256,
        "data": "my.txt",
        "precision": "fp32",
    }
    train(anew.recipe("shakespeare", tokenizer="gpt2", out="path/to/gpt2", **small))
    return tmp_path


def test_every_command_of_the_readme_works(
    user_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(QUICKSTART_COMMANDS) >= 7
    for command in QUICKSTART_COMMANDS:
        argv = shlex.split(command)[1:]
        if argv[0] == "train":
            argv += shlex.split(SHORTER) + ([] if "--init" in argv else shlex.split(SHAPE))
        main(argv)  # leaves by SystemExit if anything is wrong
    out = capsys.readouterr().out
    assert "Once upon a time" in out
    assert "loss of the one batch" in out
    assert "learnt its training text by heart" in out


def test_the_python_of_the_readme_runs_as_written(
    user_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    [code] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    assert len(capsys.readouterr().out.strip()) > 50


def test_the_commands_of_many_processes_mean_what_they_say(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torchrun starts is checked here without it;

    `tests/integration/test_parallel.py` and `tests/integration/test_launch.py` run such commands.
    """
    text = MULTI_GPU + (ROOT / "launch" / "README.md").read_text(encoding="utf-8")
    lines = [
        shlex.split(line, comments=True)
        for line in text.splitlines()
        if line.startswith((".venv/bin/torchrun ", "sbatch "))
    ]
    assert len(lines) == 5
    for words in lines:
        start = words.index("train") if "train" in words else words.index("launch/slurm.sbatch")
        ranks = words[words.index("--nproc-per-node") + 1] if "--nproc-per-node" in words else "16"
        monkeypatch.setenv("WORLD_SIZE", ranks)
        main(["train", *words[start + 1 :], "--dry-run"])
        assert f"batch: {ranks} ranks x " in capsys.readouterr().out
    for words in (
        shlex.split(line)
        for line in text.splitlines()
        if line.startswith(".venv/bin/python launch/")
    ):
        known = subprocess.run(
            [sys.executable, ROOT / words[1], "--help"], capture_output=True, text=True, check=True
        ).stdout
        for flag in words[2 : words.index("--")]:
            assert not flag.startswith("--") or flag in known


def test_files_verbs_and_recipes_named_in_the_readme_exist() -> None:
    for name in re.findall(r"\b(?:src/anew|tests|docs|benchmarks|launch)/[\w/.]+", README):
        assert (ROOT / name.rstrip(".")).exists(), name
    for verb in CLI_COMMANDS:
        assert f"`anew {verb}" in README
    for recipe in set(RECIPES) - {"gpt2-355m", "shakespeare-memorise"}:
        assert f"`{recipe}`" in QUICKSTART
    for target in re.findall(r"`?make (\w+)`?", README):
        assert f"\n{target}:" in (ROOT / "Makefile").read_text(), target


def test_every_link_of_the_readme_and_the_docs_leads_somewhere() -> None:
    for page in [
        ROOT / "README.md",
        ROOT / "launch" / "README.md",
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "docs" / "example").glob("*.md"),
    ]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            place = (
                ROOT if target.startswith("notebooks/") else page.parent
            )  # the generator puts the notebooks beside the pages
            assert (place / target).exists(), f"{page.name}: {target}"


class Parsed(Exception):
    """A command line was understood."""


def test_commands_of_the_docs_are_understood(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each `anew` line and each inline command of a page goes through the command line's own
    reading; what it would do is not done.
    """
    import tyro

    read = tyro.cli

    def only_read(*arguments: Any, **named: Any) -> Any:
        flags = read(*arguments, **named)
        if isinstance(flags, dict):
            assert set(flags.get("recipe", [])) <= set(RECIPES)
        raise Parsed

    monkeypatch.setattr(tyro, "cli", only_read)
    monkeypatch.chdir(tmp_path)
    folders = (ROOT / "docs", ROOT / "docs" / "example")
    pages = "".join(
        page.read_text(encoding="utf-8")
        for folder in folders
        for page in folder.glob("*.md")
        if page.stem not in PAST
    )
    pages = pages.replace("\\\n", " ") + README
    commands = re.findall(r"^(?:torchrun .* -m )?anew (.*)$", pages, re.MULTILINE)
    commands += [" ".join(words.split()) for words in re.findall(r"(?<!`)`anew ([^`]+)`", pages)]
    assert len(commands) > 30
    refused = []
    for command in commands:
        words = shlex.split(command, comments=True)
        if len(words) == 1 or any(
            re.search(r"^[A-Z]+$|[|\[]|^\.\.\.$|^--help$", word) for word in words
        ):
            assert words[0] in CLI_COMMANDS, command
            continue  # a name of a verb, or a form with MODEL in it
        try:
            with pytest.raises(Parsed):
                main(words)
        except SystemExit:
            refused.append(command)
    assert refused == []
