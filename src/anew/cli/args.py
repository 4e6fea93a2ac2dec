"""Read a recipe and its settings from the command line, for every command that takes a recipe.

    typed = read_command_line(argv, "train", FLAGS)
    base = read_recipe(typed.recipe)
    show_help(argv, "train", FLAGS, base, ABOUT)       # ends the process if --help was typed
    config = base.override(**typed.settings)

The flags are described to tyro as a TypedDict without required keys, so the parsed result contains
exactly the flags that were typed. `Config.adapted` needs to know them, and the values of the others
come from the recipe, which is only known after parsing.
"""

import typing
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, NamedTuple, TypedDict

import tyro

from anew.config.recipes import RECIPES
from anew.config.recipes import read_recipe as read_recipe
from anew.config.schema import FIELDS, GROUPS, REMOVED, Config
from anew.errors import UserError

SWITCHES = {name for name, field in FIELDS.items() if isinstance(field.default, bool)}
HELP = {"-h", "--help", "--help-all"}
TITLES = {"model": "model", "data": "data", "optim": "optimizer", "run": "run"}
_typed_dict: Any = TypedDict  # mypy allows only literal keys; these are computed


class Flag(NamedTuple):
    """A flag of a command, beside the settings."""

    name: str
    type: Any  # with tyro's options
    default: Any


@dataclass(frozen=True)
class CommandLine:
    """What the user typed."""

    recipe: str  # empty if none was typed
    settings: dict[str, Any]  # only those that were typed
    options: SimpleNamespace  # the command's own flags, with their defaults


def flag(name: str, type: Any, default: Any, help: str, /, **options: Any) -> Flag:
    """Return a flag of a command. `options` are those of `tyro.conf.arg`."""
    return Flag(name, Annotated[type, tyro.conf.arg(help=help, **options)], default)


def read_run(folder: str) -> Config:
    """Return the settings of a run folder."""
    return Config.read(Path(folder) / "config.json")


def read_command_line(argv: Sequence[str], command: str, own: Sequence[Flag]) -> CommandLine:
    """Parse a recipe, settings and the command's own flags, in any order. Ignore help flags."""
    types = _types(own, _setting_names(basic_only=False))
    # Settings that were removed are parsed too, so that `Config.override` can say why.
    removed = {name: type(setting.off) for name, setting in REMOVED.items()}
    types["removed"] = _typed_dict("Removed", removed, total=False)
    parsed: dict[str, Any] = tyro.cli(
        _typed_dict("Flags", types, total=False),
        args=[word for word in argv if word not in HELP],
        prog=f"anew {command}",
        config=(tyro.conf.OmitArgPrefixes,),
    )
    recipes = parsed.pop("recipe", [])
    if len(recipes) > 1:
        raise UserError(
            f"'{recipes[1]}' is one word too many; "
            f"`anew {command}` takes one recipe, and it has {recipes[0]}."
        )
    settings: dict[str, Any] = {}
    for group in (*GROUPS, "removed"):
        settings.update(parsed.pop(group))
    defaults = {flag.name: flag.default for flag in own}
    return CommandLine("".join(recipes), settings, SimpleNamespace(**defaults | parsed))


def show_help(
    argv: Sequence[str], command: str, own: Sequence[Flag], base: Config, about: str
) -> None:
    """If help was asked for, print it with the values of `base` as defaults and end the process.

    `--help` lists the basic settings, `--help-all` lists all.
    """
    if not HELP & set(argv):
        return
    show_all = "--help-all" in argv
    names = _setting_names(basic_only=not show_all)
    defaults: dict[str, Any] = {flag.name: flag.default for flag in own}
    for group, group_names in names.items():
        settings = getattr(base, group)
        defaults[group] = {name: getattr(settings, name) for name in group_names}
    paragraphs = [about]
    if not show_all:
        paragraphs.append(f"To list all settings: anew {command} --help-all")
    defaults_of = "the run" if base.run.out else base.recipe
    paragraphs.append(
        f"Recipes: {', '.join(RECIPES)}. `anew --help` describes them; "
        f"the defaults below are those of {defaults_of}."
    )
    tyro.cli(
        _typed_dict("Flags", _types(own, names), total=False),
        args=["--help"],
        default={"recipe": [base.recipe], **defaults},
        prog=f"anew {command}",
        description="\n\n".join(paragraphs),
        config=(tyro.conf.OmitArgPrefixes,),
    )


def _setting_names(*, basic_only: bool) -> dict[str, list[str]]:
    """Return the names of the settings that have flags, by group."""
    names: dict[str, list[str]] = {group: [] for group in GROUPS}
    for group, kind in GROUPS.items():
        for field in fields(kind):
            is_listed = field.metadata["basic"] or not basic_only
            if field.metadata["flag"] and is_listed:
                names[group].append(field.name)
    return names


def _types(own: Sequence[Flag], setting_names: dict[str, list[str]]) -> dict[str, Any]:
    """Return the types of the recipe, the command's own flags and one dictionary for each group."""
    recipe = tyro.conf.arg(metavar="[RECIPE]", help="name of a recipe")
    types: dict[str, Any] = {"recipe": Annotated[tyro.conf.Positional[list[str]], recipe]}
    types |= {flag.name: flag.type for flag in own}
    for group, names in setting_names.items():
        hints = typing.get_type_hints(GROUPS[group])
        group_types: dict[str, Any] = {}
        for name in names:
            help = tyro.conf.arg(help=FIELDS[name].metadata["help"])
            group_types[name] = Annotated[hints[name], help]
        group_type = _typed_dict(group, group_types, total=False)
        types[group] = Annotated[group_type, tyro.conf.arg(name=TITLES[group])]
    return types


# The three functions below are the former names of the two above; plan.py and bench.py call them.
def recipe_and_flags(
    argv: Sequence[str], command: str, own: Sequence[Flag]
) -> tuple[str, dict[str, Any]]:
    """Return the recipe and the settings that were typed."""
    typed = read_command_line(argv, command, [flag for flag in own if flag.name != "from"])
    return typed.recipe, typed.settings


def parse(
    argv: Sequence[str], command: str, base: Config, own: Sequence[Flag], about: str
) -> SimpleNamespace:
    """Return the values of the command's own flags; show the help if it was asked for."""
    show_help(argv, command, own, base, about)
    return read_command_line(argv, command, own).options


def changed(
    base: Config, options: SimpleNamespace, given: dict[str, Any]
) -> tuple[Config, set[str]]:
    """Return `base` with the settings that were typed, and their names."""
    del options
    return base.override(**given), set(given)
