"""`anew train RECIPE`: read the settings, train with a progress bar, and print the result.

anew train shakespeare --steps 200 --out runs/try
anew train --resume runs/try
"""

import dataclasses
import json
import os
import shlex
from pathlib import Path
from typing import Annotated

from loguru import logger
from tyro.conf import DisallowNone

from anew.cli.args import Command, CommandLine, flag
from anew.cli.demo import show_demo
from anew.cli.progress import Update, progress_bar
from anew.config.config import Config
from anew.config.recipes import RECIPES, read_recipe
from anew.data.dataset import describe as describe_data
from anew.errors import UserError
from anew.report.training import train
from anew.training.run_description import describe_run
from anew.training.run_log import Row
from anew.training.run_settings import read_init, refuse_fewer_steps
from anew.training.trainer import TrainResult
from anew.utils.ranks import is_rank_0

TRAIN = Command(
    "train",
    about="Train a GPT-2. Example: anew train shakespeare --steps 200 --out runs/try",
    flags=[
        flag(
            "resume",
            Annotated[str | None, DisallowNone],
            None,
            "run folder to resume; no recipe is needed then",
        ),
        flag("memorise", bool, False, "shakespeare: train until the text is memorised"),
        flag("dry_run", bool, False, "check the settings, print what they mean, and end"),
        flag("json", bool, False, "the last line of standard output is one JSON object"),
    ],
)
SET_BY_INIT = ("n_embd", "n_head", "n_layer", "n_positions", "tokenizer")


def run_train(argv: list[str]) -> None:
    """Train a model from a recipe, or resume a run."""
    typed = TRAIN.read(argv)
    base = _base_config(typed)
    TRAIN.show_help(argv, base)
    config = _final_config(base, typed)
    world_size = os.environ.get("WORLD_SIZE", "1")
    ranks = int(world_size) if world_size.isdigit() else 1  # `train` refuses other words
    if not config.run.init:  # else the model decides the length of a sequence
        config.check(given=typed.settings, ranks=ranks)
    if typed.options.dry_run:
        _describe(config, ranks)
        return
    result = _train(config)
    if not is_rank_0():
        return
    _print_result(config, result)
    facts = {**dataclasses.asdict(result), "folder": str(result.folder)}
    if config.recipe == "demo":
        facts |= show_demo(result.folder)
    if typed.options.json:
        print(json.dumps(facts))


def _describe(config: Config, ranks: int) -> None:
    """Print what a run will do, without writing anything."""
    if config.run.init:
        config, _ = read_init(config)
        config.check(ranks=ranks)
    for line in describe_run(config, ranks):
        print(line)
    data = config.data
    text = describe_data(data.data, data.tokenizer, config.run.init, data.reading)
    print(f"data:  {text}")


def _base_config(typed: CommandLine) -> Config:
    """Return the settings of the run to resume, or of the recipe."""
    resume = typed.options.resume
    recipe = typed.recipe
    if resume == "":
        raise UserError("--resume needs the run folder to resume.")
    if resume and typed.options.memorise:
        raise UserError("--memorise selects a recipe, and --resume has one already; leave one out.")
    if resume and recipe:
        raise UserError(
            f"--resume {resume} already says which run to continue; leave out the recipe {recipe}."
        )
    if resume:
        return Config.of_run(Path(resume))
    if typed.options.memorise:
        recipe = f"{recipe or 'shakespeare'}-memorise"
        if recipe not in RECIPES:
            raise UserError("--memorise is a variant of the shakespeare recipe only.")
    return read_recipe(recipe or "demo")


def _final_config(base: Config, typed: CommandLine) -> Config:
    """Return `base` with the settings that were typed and those that follow from them."""
    given = set(typed.settings)
    config = base.override(**typed.settings)
    if typed.options.resume:
        refuse_fewer_steps(Path(typed.options.resume), config.run.steps)
        return config.override(out=typed.options.resume)
    for name in SET_BY_INIT:
        if config.run.init and name in given:
            option = name.replace("_", "-")
            raise UserError(
                f"--{option} contradicts --init, whose model has its own value; leave it out."
            )
    config, adjustments = config.adapted(given)
    for line in adjustments:
        logger.info(line)
    return config


def _train(config: Config) -> TrainResult:
    """Train with a progress bar."""
    # Without a terminal no lines are needed: the trainer logs its own.
    with progress_bar(seconds_between_lines=None) as update:
        return train(config, lambda row: _show_step(update, row, config.run.steps))


def _show_step(update: Update, row: Row, steps: int) -> None:
    text = (
        f"{row['step']:,}/{steps:,}  loss {row['train/loss']:.3f}  "
        f"{row['speed/tokens_per_second']:,.0f} tok/s  MFU {100 * row['speed/mfu']:.0f}%"
    )
    update(row["step"] / steps, text)


def _print_result(config: Config, result: TrainResult) -> None:
    print(
        f"\n{config.recipe}: {result.step:,} steps, {result.tokens:,} tokens "
        f"in {result.seconds:.1f} s of training"
    )
    if config.data.one_batch:
        print(f"loss of the one batch: {result.train_loss:.4f} nats a token")
    if result.val_loss is not None:
        unit = (
            "a token of held-out answers"
            if config.data.conversations
            else "a token on held-out text"
        )
        print(f"validation loss: {result.val_loss:.4f} nats {unit}")
    if result.train_text_loss is not None:
        print(
            f"training-text loss: {result.train_text_loss:.4f} nats a token "
            "on the text it was trained on"
        )
        print(
            "The two differ because the model has learnt its training text by heart, "
            "which does not help it with text it has never seen."
        )
    folder = result.folder
    command = "chat" if config.data.conversations else "sample"
    command = f"anew {command} {shlex.quote(str(folder))}"
    print(f"run folder: {folder}    page: {folder / 'report.html'}    try: {command}")
