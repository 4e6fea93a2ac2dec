"""Settings from the shell: a recipe's name and flat flags, in any order, to one frozen config. For every verb that takes a recipe."""

import dataclasses
import typing
from pathlib import Path
from typing import Annotated, Any

import tyro

from anew.config import schema as settings
from anew.config.recipes import RECIPES
from anew.config.schema import Config
from anew.errors import UserError

SWITCHES = {"help"} | {
    name for name, f in settings.FIELDS.items() if f.type is bool or isinstance(f.default, bool)
}
Flag = tuple[
    str, Any, Any
]  # name, annotated type, default: as dataclasses.make_dataclass takes them


def flag(name: str, kind: Any, default: Any, help: str, /, **conf: Any) -> Flag:
    """A flag of the verb itself, beside the settings."""
    return name, Annotated[kind, tyro.conf.arg(help=help, **conf)], default


def read_recipe(name: str) -> Config:
    """The recipe of this name, nothing judged yet."""
    if name not in RECIPES:
        raise UserError(f"there is no recipe '{name}'; choose one of {', '.join(RECIPES)}.")
    return dataclasses.replace(RECIPES[name][1], recipe=name)


def read_run(folder: str) -> Config:
    """The config of a run folder."""
    return Config.read(Path(folder) / "config.json")


def recipe_and_flags(argv: list[str], verb: str, own: list[Flag]) -> tuple[str, dict[str, str]]:
    """The one bare word, wherever it stands, and the flags that were given: known before defaults can be."""
    switches = SWITCHES | {name for name, _, default in own if isinstance(default, bool)}
    recipe, given, tokens = "", {}, iter(argv)
    for token in tokens:
        if not token.startswith("-"):
            if recipe:
                raise UserError(
                    f"'{token}' is one word too many; `anew {verb}` takes one recipe, and it has {recipe}."
                )
            recipe = token
            continue
        name, _, value = token.lstrip("-").partition("=")
        name = name.replace("-", "_")
        if sentence := settings.removed_setting(name):
            raise UserError(sentence)
        if name in switches or name == "h":
            given[name] = "yes"
        elif name.removeprefix("no_") in switches:
            given[name.removeprefix("no_")] = ""
        else:
            given[name] = value if "=" in token else next(tokens, "")
    return recipe, given


def parse(argv: list[str], verb: str, base: Config, own: list[Flag], about: str) -> Any:
    """argv through tyro, into one flat dataclass made from the verb's own flags and the settings, with the recipe's values as defaults."""
    fields: list[Flag] = [
        flag("recipe", tyro.conf.Positional[str], base.recipe, f"one of {', '.join(RECIPES)}"),
        *own,
    ]
    for group, kind in settings.GROUPS.items():
        hints = typing.get_type_hints(kind)
        for f in dataclasses.fields(kind):
            if f.metadata.get("flag", True):
                fields.append(
                    flag(
                        f.name,
                        hints[f.name],
                        getattr(getattr(base, group), f.name),
                        f.metadata["help"],
                    )
                )
    made = [(name, kind, dataclasses.field(default=value)) for name, kind, value in fields]
    about += f"\n\nRecipes: {', '.join(RECIPES)}. `anew --help` says what each is; the defaults below are those of "
    about += "the run." if base.run.out else f"{base.recipe}."
    return tyro.cli(
        dataclasses.make_dataclass(verb.capitalize(), made),
        args=argv,
        prog=f"anew {verb}",
        description=about,
    )


def changed(base: Config, arguments: Any, given: dict[str, str]) -> tuple[Config, set[str]]:
    """`base` with the settings that were given, and their names."""
    chosen = {
        key: value
        for key, value in vars(arguments).items()
        if key in given and key in settings.FIELDS
    }
    return base.override(**chosen), set(chosen)
