"""Shells complete commands, recipes and flags with the scripts of `anew completion`."""

import dataclasses
import shutil
import subprocess
from pathlib import Path

import pytest

from anew.cli.main import COMMANDS, main
from anew.cli.sample import SampleArgs
from anew.config.recipes import RECIPES
from anew.config.schema import FIELDS

# How a shell is asked for the completions of a line, one a line.
ASK = {
    "bash": (
        "source {script}; COMP_WORDS=({line}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); "
        "function=$(complete -p anew | sed 's/.*-F //; s/ .*//'); $function; "
        "printf '%s\\n' \"${{COMPREPLY[@]}}\""
    ),
    "fish": "source {script}; complete --do-complete '{plain}'",
}


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scripts")


def complete(shell: str, line: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> set[str]:
    """Return what a shell offers for a line, whose last word may be empty."""
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    script = folder / shell
    if not script.exists():
        main(["completion", shell])
        script.write_text(capsys.readouterr().out)
    words = line if not line.endswith(" ") else f"{line}''"
    command = ASK[shell].format(script=script, line=words, plain=line)
    done = subprocess.run(
        [shell, "--norc" if shell == "bash" else "--no-config", "-c", command],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return {word.split("\t")[0] for word in done.stdout.splitlines()}


@pytest.mark.parametrize("shell", ["bash", "fish"])
def test_shell_completes_commands_recipes_and_flags(
    shell: str, scripts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def offered(line: str) -> set[str]:
        return complete(shell, line, scripts, capsys)

    assert offered("anew ") == set(COMMANDS)
    assert offered("anew tr") == {"train"}
    assert offered("anew train gpt2-1") == {name for name in RECIPES if name.startswith("gpt2-1")}
    settings = {name.replace("_", "-") for name, field in FIELDS.items() if field.metadata["flag"]}
    assert {f"--{name}" for name in settings} <= offered("anew train gpt2-124m --")
    flags = {field.name.replace("_", "-") for field in dataclasses.fields(SampleArgs)} - {"model"}
    assert {f"--{name}" for name in flags} <= offered("anew sample runs/mine --")
    assert "--steps" not in offered("anew sample runs/mine --")
    assert all(word.strip("-") for word in offered("anew sample runs/mine --"))
    assert offered("anew export m --dt") == {"--dtype"}


def test_zsh_reads_the_script(scripts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not shutil.which("zsh"):
        pytest.skip("zsh is not installed")
    main(["completion", "zsh"])
    script = scripts / "zsh"
    script.write_text(capsys.readouterr().out)
    command = f"source {script}; print -r -- $_comps[anew]"
    done = subprocess.run(["zsh", "-f", "-c", command], capture_output=True, text=True, check=True)
    assert "_anew" in done.stdout
