"""The Dockerfile, the devcontainer and the SkyPilot task name files and commands that exist."""

import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from anew.cli.main import main
from tests.support import ROOT

DOCKERFILE = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
INSTRUCTIONS = [
    line.partition(" ") for line in DOCKERFILE.replace("\\\n", " ").splitlines() if line.strip()
]
SKY = ROOT / "launch" / "sky.yaml"


@pytest.fixture
def task() -> Any:
    return yaml.safe_load(SKY.read_text())


def check_shell(script: str) -> None:
    """Check that a script is bash, and that each file of tools/ in it exists."""
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    for name in re.findall(r"\btools/\w+\.py\b", script):
        assert (ROOT / name).is_file(), name


def test_dockerfile_copies_files_that_exist_and_are_not_ignored() -> None:
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignore[0] == "*"
    copied = set()
    for name, _, arguments in INSTRUCTIONS:
        if name == "COPY":
            copied |= set(shlex.split(arguments)[:-1])
    assert copied == {line.removeprefix("!") for line in ignore if line.startswith("!")}
    for path in copied:
        assert (ROOT / path).exists(), path


def test_commands_of_the_dockerfile_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert INSTRUCTIONS[0] == ("ARG", " ", "BASE=debian:bookworm-slim")
    for name, _, arguments in INSTRUCTIONS:
        if name == "RUN":
            check_shell(arguments)
    commands = {name: text for name, _, text in INSTRUCTIONS if name in ("ENTRYPOINT", "CMD")}
    [programme] = json.loads(commands["ENTRYPOINT"])
    folder, _, rest = programme.partition("/.venv/bin/")
    assert ("WORKDIR", " ", folder) in INSTRUCTIONS
    assert rest == "anew"
    main(json.loads(commands["CMD"]))
    assert "usage: anew" in capsys.readouterr().out


def test_devcontainer_runs_a_target_of_the_makefile() -> None:
    facts = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    make, target = facts["postCreateCommand"].split()
    assert make == "make"
    assert f"\n{target}:" in (ROOT / "Makefile").read_text()


def test_commands_of_the_skypilot_task_are_understood(
    task: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_shell(task["setup"])
    check_shell(task["run"])
    [words] = re.findall(r"-m anew (.*)", task["run"])
    command = words.replace("$ARGUMENTS", task["envs"]["ARGUMENTS"])
    monkeypatch.setenv("WORLD_SIZE", "8")
    main([*shlex.split(command), "--dry-run"])
    assert "batch: 8 ranks x " in capsys.readouterr().out


def test_skypilot_accepts_the_task(
    task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sky = pytest.importorskip("sky", reason="opt-in: pip install skypilot")
    monkeypatch.chdir(ROOT)
    accepted = sky.Task.from_yaml_config(task, env_overrides=[("BUCKET", "mine")])
    assert {resource.use_spot for resource in accepted.resources} == {True}
    assert accepted.storage_mounts["/bucket"].name == "mine"
