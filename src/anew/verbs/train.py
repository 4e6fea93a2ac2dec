"""`anew train RECIPE`: settings from the shell to one frozen config, a progress bar, and the end of a run in words."""

import dataclasses
import json
import os
import sys
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import tyro
from loguru import logger

from anew import config as settings
from anew.config import Config, UserError
from anew.demo import show_demo
from anew.metrics import Row, describe
from anew.recipes import RECIPES
from anew.train import Result, train

SWITCHES = {"help", "json", "memorise", "dry_run"} | {
    name for name, f in settings.FIELDS.items() if f.type is bool or isinstance(f.default, bool)
}


def run_train(argv: list[str]) -> None:
    """Train a recipe, or go on with a run that stopped."""
    name, given = _recipe_and_flags(argv)
    resume = given.get("resume")
    if resume == "":
        raise UserError("--resume needs the run folder to go on with.")
    if given.get("memorise") and resume:
        raise UserError("--memorise chooses a recipe, and --resume goes on with the one that the run has; leave one out.")
    if given.get("memorise"):
        name = f"{name or 'shakespeare'}-memorise"
        if name not in RECIPES:
            raise UserError("--memorise is a variant of the shakespeare recipe only.")
    if resume and name:
        raise UserError(f"--resume {resume} already says which run to go on with; leave out the recipe {name}.")
    base = Config.read(Path(resume) / "config.json") if resume else _recipe(name or "demo")
    arguments = _parse_train(argv, base)
    chosen = {key: value for key, value in vars(arguments).items() if key in given and key in settings.FIELDS}
    taken = {"n_layer", "n_head", "n_embd", "n_positions", "tokenizer"} & set(chosen)
    if arguments.init and taken and not resume:
        raise UserError(f"--{min(taken).replace('_', '-')} contradicts --init, whose model has its own; leave it out.")
    changed = base.override(**chosen)
    if resume:
        changed = changed.override(out=resume)
        said: list[str] = []
    else:
        changed, said = changed.adapted(set(chosen))
    for line in said:
        logger.info(line)
    if arguments.dry_run:
        for line in describe(changed.check(), int(os.environ.get("WORLD_SIZE", "1"))):
            print(line)
        return
    with _progress(changed.run.steps) as progress:
        result = train(changed.check(), progress)
    if os.environ.get("RANK", "0") != "0":
        return
    _report(changed, result)
    extra = show_demo(result.folder) if changed.recipe == "demo" else {}
    if arguments.json:
        print(json.dumps({**dataclasses.asdict(result), "folder": str(result.folder), **extra}))


def _recipe(name: str) -> Config:
    if name not in RECIPES:
        raise UserError(f"there is no recipe '{name}'; choose one of {', '.join(RECIPES)}.")
    return dataclasses.replace(RECIPES[name][1], recipe=name)


def _recipe_and_flags(argv: list[str]) -> tuple[str, dict[str, str]]:
    """The one bare word, wherever it stands, and the flags that were given: known before defaults can be."""
    recipe, given, tokens = "", {}, iter(argv)
    for token in tokens:
        if not token.startswith("-"):
            if recipe:
                raise UserError(f"'{token}' is one word too many; `anew train` takes one recipe, and it has {recipe}.")
            recipe = token
            continue
        name, _, value = token.lstrip("-").partition("=")
        name = name.replace("-", "_")
        if name in SWITCHES or name == "h":
            given[name] = "yes"
        elif name.removeprefix("no_") in SWITCHES:
            given[name.removeprefix("no_")] = ""
        else:
            given[name] = value if "=" in token else next(tokens, "")
    return recipe, given


def _parse_train(argv: list[str], base: Config) -> Any:
    """argv through tyro, into one flat dataclass made from the settings, with the recipe's values as defaults."""
    fields: list[Any] = [
        ("recipe", Annotated[str, tyro.conf.Positional, tyro.conf.arg(help=f"one of {', '.join(RECIPES)}")], base.recipe),
        ("resume", Annotated[str, tyro.conf.arg(help="go on with this run folder (the recipe is then not needed)")], ""),
        ("memorise", Annotated[bool, tyro.conf.arg(help="shakespeare: train until the text is known by heart")], False),
        ("dry_run", Annotated[bool, tyro.conf.arg(help="check the settings, say what they mean, and end")], False),
        ("json", Annotated[bool, tyro.conf.arg(help="the last line of standard output is one JSON object")], False),
    ]
    for group, kind in settings.GROUPS.items():
        hints = typing.get_type_hints(kind)
        for f in dataclasses.fields(kind):
            if f.metadata.get("flag", True):
                fields.append(
                    (f.name, Annotated[hints[f.name], tyro.conf.arg(help=f.metadata["help"])], getattr(getattr(base, group), f.name))
                )
    flat = dataclasses.make_dataclass("Train", [(name, kind, dataclasses.field(default=value)) for name, kind, value in fields])
    about = f"Train a GPT-2. Example: anew train shakespeare --steps 200 --out runs/try\n\nRecipes: {', '.join(RECIPES)}."
    about += " `anew --help` says what each is; the defaults below are those of "
    about += "the run." if base.run.out else f"{base.recipe}."
    return tyro.cli(flat, args=argv, prog="anew train", description=about)


def _report(config: Config, result: Result) -> None:
    """The end of a run, in words."""
    print(f"\n{config.recipe}: {result.step:,} steps, {result.tokens:,} tokens in {result.seconds:.1f} s of training")
    if config.data.one_batch:
        print(f"loss of the one batch: {result.train_loss:.4f} nats a token")
    if result.val_loss is not None:
        print(f"validation loss: {result.val_loss:.4f} nats a token on held-out text")
    if result.train_text_loss is not None:
        print(f"training-text loss: {result.train_text_loss:.4f} nats a token on the text it was trained on")
        print("The two differ because the model has learnt its training text by heart, which does not help it with text it has never seen.")
    print(f"run folder: {result.folder}    try: anew sample {result.folder}")


@contextmanager
def _progress(steps: int) -> Iterator[Any]:
    """A bar with loss, speed and time left on a terminal; elsewhere plain lines are enough."""
    if not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(bar_width=16), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn(compact=True))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=steps)
        logger.remove()
        logger.add(lambda text: bar.console.print(text.rstrip("\n"), markup=False, highlight=False), format="{message}", level="INFO")

        def update(row: Row) -> None:
            text = f"loss {row['train/loss']:.3f}  {row['speed/tokens_per_second']:,.0f} tok/s  MFU {100 * row['speed/mfu']:.0f}%"
            bar.update(task, completed=row["step"], description=text)

        yield update
