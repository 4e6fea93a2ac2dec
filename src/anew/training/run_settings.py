"""The settings of a run: from its recipe and flags, --init, and an earlier start in its folder.

    config = resolve_config(config)     # raises UserError if the folder holds another run

A run keeps its settings over all its starts, except for settings that do not change its losses.
`--steps` may change as long as the steps that were taken keep their learning rates.
"""

import logging
import shlex
from pathlib import Path

from anew.checkpoint import huggingface
from anew.checkpoint.folder import list_checkpoints, step_of
from anew.config.config import Config
from anew.config.recipes import RECIPES, read_recipe
from anew.config.schema import FIELDS, GPTConfig
from anew.config.values import vocabulary_size
from anew.errors import UserError
from anew.model.flops import flops_per_token
from anew.optim.schedule import learning_rate_factor
from anew.tokenizer.bpe import Tokenizer
from anew.utils import device
from anew.utils.words import counted

log = logging.getLogger("anew")

# With --compile auto, a run of fewer operations than this is not compiled: about a minute of eager
# work on two CPU cores; for a GPU, an estimate for one A100. Compiling takes 15 to 60 seconds.
SHORT_RUN_OPERATIONS = {"cpu": 2e13, "cuda": 5e15, "xpu": 5e15}
# What a run can have written when it was killed before it wrote config.json.
FILES_OF_A_RUN = {
    "checkpoints",
    "log.txt",
    "metrics.jsonl",
    "run_state.json",
    "samples.jsonl",
    "tensorboard",
    "tokenizer.json",
}
MOST_DIFFERENCES = 4  # that an error lists
ADJUSTED_WITH_STEPS = ("warmup_steps:", "muon_warmup:")  # by `Config.adapted`
# The settings of a model that --init takes over.
SHAPE = ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size", "layer_norm_epsilon")


def resolve_config(config: Config) -> Config:
    """Return the config that the run will have.

    The model's shape and the tokenizer come from --init or from the tokenizer's folder. A setting
    that differs from an existing run in the same folder is refused by name.
    """
    existing = None
    if (config.folder / "config.json").exists():
        existing = Config.of_run(config.folder)
    else:
        refuse_other_files(config.folder)
    if config.run.init:
        if existing is not None and existing.run.init == config.run.init:
            typed = config.run.batch_tokens
            config = with_shape(config, existing.model, existing.data.tokenizer)
            if typed == existing.run.batch_tokens:  # also in a run of an earlier version
                config = config.override(batch_tokens=typed)
        else:
            config, tokenizer = read_init(config)
            tokenizer.keep(config.folder)
    elif vocabulary_size(config.data.tokenizer) is None:
        tokenizer = Tokenizer.of_folder(Path(config.data.tokenizer))
        tokenizer.keep(config.folder)
        config = config.override(tokenizer=tokenizer.name, vocab_size=tokenizer.n_vocab)
    config.check()
    if existing is None:
        return eager_if_short(config)
    if config.run.compile == "auto":
        # The result of `eager_if_short`, so that a resumed run computes as it began.
        config = config.override(compile=existing.run.compile)
    if config.data.recut and not existing.data.recut:
        # The setting is newer than such runs, and on by default. They keep their order.
        config = config.override(recut=False)
        log.info("this run keeps the same windows in every epoch, as it began (--no-recut)")
    if config.recipe == existing.recipe:
        refuse_fewer_steps(config.folder, config.run.steps)
    differences = existing.override(steps=config.run.steps).differences(config)
    if all(line.startswith(ADJUSTED_WITH_STEPS) for line in differences):
        refuse_another_schedule(existing, config)
    if differences:
        recipe = f"of the recipe {existing.recipe} " if config.recipe != existing.recipe else ""
        raise UserError(
            f"{config.folder} is another run {recipe}({listed(differences)}); "
            "use the same settings to go on with it, or another --out."
        )
    return config


def listed(differences: list[str]) -> str:
    """Return the first differences between two runs, and the number of the others."""
    others = len(differences) - MOST_DIFFERENCES
    first = "; ".join(differences[:MOST_DIFFERENCES])
    return f"{first}; and {others} more" if others > 0 else first


def eager_if_short(config: Config) -> Config:
    """Return `config` with --compile off if it says auto and compiling cannot pay.

    The decision depends on the settings and the type of device alone, and it is stored with them.
    """
    device_type = device.pick_device(config.run.device).type
    operations = config.total_tokens * flops_per_token(config.model, config.data.seq_len)
    is_short = operations < SHORT_RUN_OPERATIONS.get(device_type, 0.0)
    if config.run.compile != "auto" or not is_short:
        return config
    log.info("the run is too short for torch.compile to save time; --compile on compiles it")
    return config.override(compile="off")


def steps_taken(run: Path) -> int:
    """Return the step of the newest checkpoint of a run; 0 if there is none."""
    checkpoints = list_checkpoints(run)
    return step_of(checkpoints[-1]) if checkpoints else 0


def refuse_fewer_steps(run: Path, steps: int) -> None:
    """Raise UserError if a run has taken more than `steps` steps already."""
    taken = steps_taken(run)
    if steps < taken:
        raise UserError(
            f"{run} has taken {counted(taken, 'step')} already, and --steps counts from its "
            "beginning."
        )


def refuse_another_schedule(existing: Config, config: Config) -> None:
    """Raise UserError if another number of steps changes the rates of steps that were taken."""
    for step in range(steps_taken(config.folder)):
        before = learning_rate_factor(step, existing.run.steps, existing.optim)
        if before != learning_rate_factor(step, config.run.steps, config.optim):
            raise UserError(
                f"{config.folder} was planned for {existing.run.steps:,} steps, and its learning "
                "rate has followed that plan. For another number of steps, start a run from its "
                "weights, with a new warm-up: "
                f"anew train {config.recipe} --init {shlex.quote(str(config.folder))} "
                f"{chosen_flags(config)} --out NEW --steps {config.run.steps}"
            )


def chosen_flags(config: Config) -> str:
    """Return the flags that turn the recipe of `config` into it, for a run that begins with --init.

    The model and its tokenizer are left out, because --init determines them, and so are the length
    and the folder of the run.
    """
    recipe = read_recipe(config.recipe) if config.recipe in RECIPES else Config()
    left_out = {*SHAPE, "tokenizer", "init", "out", "steps", "compile", "warmup_steps"}
    flags = [f"--data {shlex.quote(config.data.data)}"]
    for name, field in FIELDS.items():
        value = config.value(name)
        if not field.metadata["flag"] or name in left_out or name == "data":
            continue
        if value == recipe.value(name):
            continue
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            word = f"{value:.12g}" if isinstance(value, float) else str(value)
            flags.append(f"--{flag} {shlex.quote(word)}")
    return " ".join(flags)


def refuse_other_files(folder: Path) -> None:
    """Raise UserError if a folder without a run holds files that no run writes."""
    if folder.is_file():
        raise UserError(f"{folder} is a file; choose another --out.")
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    others = sorted(name for name in names - FILES_OF_A_RUN if not name.startswith("."))
    if others:
        raise UserError(
            f"{folder} is not a run, and it holds other files, such as {others[0]}; "
            "choose another --out."
        )


def read_init(config: Config) -> tuple[Config, Tokenizer]:
    """Return `config` with the shape of the model that --init names, and that model's tokenizer."""
    model = huggingface.find_model(config.run.init)
    shape = huggingface.read_config(model)
    tokenizer = Tokenizer.of_model(model, shape.vocab_size)
    return with_shape(config, shape, tokenizer.name), tokenizer


def with_shape(config: Config, shape: GPTConfig, tokenizer: str) -> Config:
    """Return `config` for a model of this shape and tokenizer, which bounds `seq_len`.

    The recipe's own batch is made smaller with it, so that a step has as many sequences.
    """
    usual = config.data.seq_len
    seq_len = min(usual, shape.n_positions)
    batch_tokens = config.run.batch_tokens
    if seq_len < usual:
        line = f"seq_len lowered from {usual} to the {seq_len} positions of {config.run.init}"
        recipe = read_recipe(config.recipe) if config.recipe in RECIPES else Config()
        if batch_tokens == recipe.run.batch_tokens and batch_tokens % usual == 0:
            batch_tokens = batch_tokens // usual * seq_len
            line += f", and batch_tokens to {batch_tokens:,}"
        log.info(line)
    settings = {name: getattr(shape, name) for name in SHAPE}
    return config.override(
        **settings, tokenizer=tokenizer, seq_len=seq_len, batch_tokens=batch_tokens
    )
