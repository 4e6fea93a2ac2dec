"""`anew completion SHELL`: print a script that completes commands, recipes and flags.

    anew completion bash > ~/.local/share/bash-completion/completions/anew
    anew completion zsh > ~/.anew-completion.zsh       # then `source` it in ~/.zshrc
    anew completion fish > ~/.config/fish/completions/anew.fish

The flags are read from the help of each command. This takes seconds, so keep the script in a file.
"""

import contextlib
import io
import re
from dataclasses import dataclass
from importlib import import_module
from typing import Literal

import tyro

from anew.cli.bench import EXPERIMENTS, MEASUREMENTS
from anew.cli.main import COMMANDS
from anew.cli.parse import parse
from anew.config.recipes import RECIPES

# The words that may follow a command, beside flags and file names.
ARGUMENTS = {
    "train": [*RECIPES],
    "plan": [*RECIPES],
    "bench": [*MEASUREMENTS, *EXPERIMENTS, *RECIPES],
    "completion": ["bash", "zsh", "fish"],
}
# What lists all flags, where `--help` does not.
HELP = {
    "train": ["--help-all"],
    "plan": ["--help-all"],
    "bench": ["ladder", "--help-all"],
}
BASH = """\
_anew() {{
    local words=""
    if [ "$COMP_CWORD" -eq 1 ]; then
        words="{commands}"
    else
        case "${{COMP_WORDS[1]}}" in
{cases}
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _anew anew
"""
# zsh runs bash's completions.
ZSH = "autoload -Uz compinit bashcompinit && compinit && bashcompinit\n"


@dataclass(frozen=True)
class CompletionArgs:
    """Print a script for a shell's completion. Example: anew completion bash"""

    shell: tyro.conf.Positional[Literal["bash", "zsh", "fish"]]
    """the shell that reads the script"""


def run_completion(argv: list[str]) -> None:
    """Print the completion script of a shell."""
    args = parse(CompletionArgs, argv, "completion")
    words = {command: ARGUMENTS.get(command, []) + flags_of(command) for command in COMMANDS}
    if args.shell == "fish":
        print(_fish(words), end="")
        return
    if args.shell == "zsh":
        print(ZSH, end="")
    cases = [f'{command}) words="{" ".join(words[command])}" ;;' for command in words]
    indented = "\n".join(" " * 12 + case for case in cases)
    print(BASH.format(commands=" ".join(words), cases=indented), end="")


def flags_of(command: str) -> list[str]:
    """Return the flags that the help of a command lists, in its order."""
    run_command = getattr(import_module(f"anew.cli.{command}"), f"run_{command}")
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        run_command(HELP.get(command, ["--help"]))
    # A flag's line begins with its names; help that mentions another flag does not.
    lines = re.findall(r"^[│\s]*((?:-h, |--[a-z][a-z0-9-]*,? ?)+)", text.getvalue(), re.MULTILINE)
    return [*dict.fromkeys(re.findall(r"--[a-z][a-z0-9-]*", " ".join(lines)))]


def _fish(words: dict[str, list[str]]) -> str:
    """Return the script for fish. Its conditions are functions that come with fish."""
    script = f"complete -c anew -n __fish_use_subcommand -f -a '{' '.join(words)}'\n"
    for command, choices in words.items():
        condition = f"__fish_seen_subcommand_from {command}"
        script += f"complete -c anew -n '{condition}' -a '{' '.join(choices)}'\n"
    return script
