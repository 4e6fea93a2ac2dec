"""`anew train RECIPE`: settings from the shell to one frozen config, a progress bar, and the end of a run in words."""

import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from loguru import logger

from anew.cli.args import changed, flag, parse, read_recipe, read_run, recipe_and_flags
from anew.cli.demo import show_demo
from anew.config.recipes import RECIPES
from anew.config.schema import Config
from anew.errors import UserError
from anew.report import html as page
from anew.training.run_log import Row, describe_run
from anew.training.trainer import TrainResult, train

OWN = [
    flag("resume", str, "", "go on with this run folder (the recipe is then not needed)"),
    flag("memorise", bool, False, "shakespeare: train until the text is known by heart"),
    flag("dry_run", bool, False, "check the settings, say what they mean, and end"),
    flag("json", bool, False, "the last line of standard output is one JSON object"),
]
ABOUT = "Train a GPT-2. Example: anew train shakespeare --steps 200 --out runs/try"


def run_train(argv: list[str]) -> None:
    """Train a recipe, or go on with a run that stopped."""
    name, given = recipe_and_flags(argv, "train", OWN)
    resume = given.get("resume")
    if resume == "":
        raise UserError("--resume needs the run folder to go on with.")
    if given.get("memorise") and resume:
        raise UserError(
            "--memorise chooses a recipe, and --resume goes on with the one that the run has; leave one out."
        )
    if given.get("memorise"):
        name = f"{name or 'shakespeare'}-memorise"
        if name not in RECIPES:
            raise UserError("--memorise is a variant of the shakespeare recipe only.")
    if resume and name:
        raise UserError(
            f"--resume {resume} already says which run to go on with; leave out the recipe {name}."
        )
    base = read_run(resume) if resume else read_recipe(name or "demo")
    arguments = parse(argv, "train", base, OWN, ABOUT)
    config, chosen = changed(base, arguments, given)
    taken = {"n_layer", "n_head", "n_embd", "n_positions", "tokenizer"} & chosen
    if arguments.init and taken and not resume:
        raise UserError(
            f"--{min(taken).replace('_', '-')} contradicts --init, whose model has its own; leave it out."
        )
    config, said = (config.override(out=resume), []) if resume else config.adapted(chosen)
    for line in said:
        logger.info(line)
    if arguments.dry_run:
        for line in describe_run(config.check(), int(os.environ.get("WORLD_SIZE", "1"))):
            print(line)
        return
    with _progress(config.run.steps) as shown:

        def progress(row: Row) -> None:
            every = config.run.evaluate_every
            if (
                every
                and row["step"] % every == 1
                and row["step"] > 1
                and os.environ.get("RANK", "0") == "0"
            ):
                _page(config)  # with the validation before this step
            if shown:
                shown(row)

        try:
            result = train(config.check(), progress)
        except BaseException:
            if os.environ.get("RANK", "0") == "0" and (config.folder / "metrics.jsonl").is_file():
                _page(config)  # says that it was stopped, or failed
            raise
    if os.environ.get("RANK", "0") != "0":
        return
    _report(config, result)
    _page(config)
    extra = show_demo(result.folder) if config.recipe == "demo" else {}
    if arguments.json:
        print(json.dumps({**dataclasses.asdict(result), "folder": str(result.folder), **extra}))


def _report(config: Config, result: TrainResult) -> None:
    """The end of a run, in words."""
    print(
        f"\n{config.recipe}: {result.step:,} steps, {result.tokens:,} tokens in {result.seconds:.1f} s of training"
    )
    if config.data.one_batch:
        print(f"loss of the one batch: {result.train_loss:.4f} nats a token")
    if result.val_loss is not None:
        print(f"validation loss: {result.val_loss:.4f} nats a token on held-out text")
    if result.train_text_loss is not None:
        print(
            f"training-text loss: {result.train_text_loss:.4f} nats a token on the text it was trained on"
        )
        print(
            "The two differ because the model has learnt its training text by heart, which does not help it with text it has never seen."
        )
    print(
        f"run folder: {result.folder}    page: {result.folder / 'report.html'}    try: anew sample {result.folder}"
    )


def _page(config: Config) -> None:
    """RUN/report.html, as it stands. A run is not lost because its page cannot be written."""
    try:
        page.write([config.folder], config.folder / "report.html")
    except Exception as error:  # noqa: BLE001 (whatever it is, training matters more)
        logger.info(f"no report.html was written: {error}")


@contextmanager
def _progress(steps: int) -> Iterator[Any]:
    """A bar with loss, speed and time left on a terminal; elsewhere plain lines are enough."""
    if not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=steps)
        logger.remove()
        logger.add(
            lambda text: bar.console.print(text.rstrip("\n"), markup=False, highlight=False),
            format="{message}",
            level="INFO",
        )

        def update(row: Row) -> None:
            text = f"loss {row['train/loss']:.3f}  {row['speed/tokens_per_second']:,.0f} tok/s  MFU {100 * row['speed/mfu']:.0f}%"
            bar.update(task, completed=row["step"], description=text)

        yield update
