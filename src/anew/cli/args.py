"""Read a recipe and its settings from the command line, for every command that takes a recipe.

    TRAIN = Command("train", about="Train a GPT-2.", flags=[flag("resume", str, "", "run folder")])
    typed = TRAIN.read(argv)
    base = read_recipe(typed.recipe)
    TRAIN.show_help(argv, base)                 # ends the process if --help was typed
    config = base.override(**typed.settings)

The flags are described to tyro as a TypedDict without required keys, so the parsed result contains
exactly the flags that were typed. `Config.adapted` needs to know them, and the values of the others
come from the recipe, which is only known after parsing.
"""

import typing
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Annotated, Any, NamedTuple, TypedDict

import tyro

from anew.cli.parse import parse, refuse_other_names
from anew.config.config import Config
from anew.config.recipes import RECIPES
from anew.config.refused_names import NAMES_ELSEWHERE, REMOVED
from anew.config.schema import FIELDS, GROUP_OF, GROUPS
from anew.errors import UserError

SWITCHES = {name for name, field in FIELDS.items() if isinstance(field.default, bool)}
SETTINGS = [name for name, field in FIELDS.items() if field.metadata["flag"]]
BASIC_SETTINGS = [name for name in SETTINGS if FIELDS[name].metadata["basic"]]
HELP = {"-h", "--help", "--help-all"}
TITLES = {"model": "model", "data": "data", "optim": "optimizer", "run": "run"}


class Flag(NamedTuple):
    """A flag of a command, beside the settings."""

    name: str
    type: Any  # with tyro's options
    default: Any


def flag(name: str, type: Any, default: Any, help: str, /, **options: Any) -> Flag:
    """Return a flag of a command. `options` are those of `tyro.conf.arg`."""
    return Flag(name, Annotated[type, tyro.conf.arg(help=help, **options)], default)


def names_of_other_trainers() -> dict[str, str]:
    """Return our flag and its help for each name that other trainers give to a setting."""
    names = {}
    for name, ours in NAMES_ELSEWHERE.items():
        names[name] = f"{ours.replace('_', '-')}: {FIELDS[ours].metadata['help']}"
    return names


@dataclass(frozen=True)
class CommandLine:
    """What the user typed."""

    recipe: str  # empty if none was typed
    settings: dict[str, Any]  # only those that were typed
    options: SimpleNamespace  # the command's own flags, with their defaults


@dataclass(frozen=True)
class Command:
    """A command that takes a recipe, settings and flags of its own."""

    name: str
    about: str
    flags: list[Flag]

    def read(self, argv: Sequence[str]) -> CommandLine:
        """Parse a recipe and flags, in any order. Requests for help are ignored."""
        types = self._types(SETTINGS)
        # Settings that were removed are parsed too, so that `Config.override` can say why.
        removed = {name: type(setting.off) for name, setting in REMOVED.items()}
        types["removed"] = _optional_keys(removed)
        words = [word for word in argv if word not in HELP]
        refuse_other_names(words, names_of_other_trainers())
        parsed = self._run_tyro(types, argv=words)
        recipes = parsed.pop("recipe", [])
        if len(recipes) > 1:
            raise UserError(
                f"'{recipes[1]}' is one word too many; "
                f"`anew {self.name}` takes one recipe, and it has {recipes[0]}."
            )
        settings: dict[str, Any] = {}
        for group in (*GROUPS, "removed"):
            settings |= parsed.pop(group)
        options = {flag.name: flag.default for flag in self.flags}
        options |= parsed
        return CommandLine("".join(recipes), settings, SimpleNamespace(**options))

    def show_help(self, argv: Sequence[str], base: Config) -> None:
        """Print the help if it was asked for, with the values of `base`, and end the process.

        `--help` lists the basic settings, `--help-all` lists all.
        """
        if not HELP & set(argv):
            return
        names = SETTINGS
        paragraphs = [self.about]
        if "--help-all" not in argv:
            names = BASIC_SETTINGS
            paragraphs.append(f"To list all settings: anew {self.name} --help-all")
        defaults_of = "the run" if base.run.out else base.recipe
        paragraphs.append(
            f"Recipes: {', '.join(RECIPES)}. `anew --help` describes them; "
            f"the defaults below are those of {defaults_of}."
        )
        defaults: dict[str, Any] = {"recipe": [base.recipe]}
        for flag in self.flags:
            defaults[flag.name] = flag.default
        for group in GROUPS:
            defaults[group] = {}
        for name in names:
            group = GROUP_OF[name]
            defaults[group][name] = base.value(name)
        self._run_tyro(
            self._types(names),
            argv=["--help"],
            default=defaults,
            description="\n\n".join(paragraphs),
        )

    def _run_tyro(self, types: dict[str, Any], **options: Any) -> dict[str, Any]:
        config = (tyro.conf.OmitArgPrefixes,)
        parsed: dict[str, Any] = parse(
            _optional_keys(types), command=self.name, config=config, **options
        )
        return parsed

    def _types(self, settings: list[str]) -> dict[str, Any]:
        """Return the types of the recipe, the command's flags and a dictionary for each group."""
        recipe = tyro.conf.arg(metavar="[RECIPE]", help="name of a recipe")
        types: dict[str, Any] = {"recipe": Annotated[tyro.conf.Positional[list[str]], recipe]}
        for flag in self.flags:
            types[flag.name] = flag.type
        for group, kind in GROUPS.items():
            hints = typing.get_type_hints(kind)
            group_types: dict[str, Any] = {}
            for name in settings:
                if GROUP_OF[name] == group:
                    help = tyro.conf.arg(help=FIELDS[name].metadata["help"])
                    group_types[name] = Annotated[hints[name], help]
            title = tyro.conf.arg(name=TITLES[group])
            types[group] = Annotated[_optional_keys(group_types), title]
        return types


def _optional_keys(types: dict[str, Any]) -> Any:
    """Return a TypedDict type of which every key may be absent."""
    typed_dict: Any = TypedDict  # mypy wants literal keys
    return typed_dict("Flags", types, total=False)
