"""`anew bench WHAT`: the speed of this machine, rung by rung and beside other packages; and
experiments of many runs.

    anew bench ladder gpt2-124m --micro-batch 4 --seq-len 256
    anew bench train gpt2-124m --json       # the last line has the key ratio_to_transformers
"""

import json
from pathlib import Path

import torch

from anew.bench.scaling import DEFAULT_SIZES, DEFAULT_TOKENS_PER_PARAMETER
from anew.bench.timing import with_batch
from anew.cli import comparisons, experiments, ladder, scaling
from anew.cli.args import Command, flag
from anew.cli.comparisons import OWN_SIDE
from anew.cli.ladder import Figures
from anew.config.config import Config
from anew.config.recipes import read_recipe
from anew.errors import UserError, unknown_name
from anew.report import png
from anew.utils.device import pick_device
from anew.utils.memory import available_memory

FLAGS = [
    flag("rounds", int, 5, "timed steps a rung, or turns a side"),
    flag("alone", bool, False, "train: no other side"),
    flag("rows", int, 1, "generate: sequences at once"),
    flag("prompt_tokens", int, 32, "generate: tokens of the prompt"),
    flag("new_tokens", int, 224, "generate: tokens to write; 1: time the prompt"),
    flag(
        "file",
        str,
        "",
        "evaluate: HellaSwag's JSON lines instead of the cached file; "
        "prepare: text instead of Python's source",
    ),
    flag("examples", int, 100, "evaluate: examples a turn"),
    flag("documents", int, 60_000, "prepare: at most this many documents"),
    flag("seeds", int, 0, "recipe, scaling: seeds of each arm; 0: 3 for recipe, 2 for scaling"),
    flag(
        "over",
        str,
        "",
        "sweep: one setting or two with their values: 'lr=1e-3,2e-3 weight_decay=0,0.1'; "
        "scaling: one setting with the values to compare: optimizer=adamw,muon",
    ),
    flag("sizes", str, DEFAULT_SIZES, "scaling: models to train, as layers x width"),
    flag(
        "tokens_per_parameter",
        float,
        DEFAULT_TOKENS_PER_PARAMETER,
        "scaling: tokens of a run for each parameter of its model",
    ),
    flag(
        "jobs",
        int,
        0,
        "recipe, sweep, scaling: runs at a time; they share the GPUs or the cores equally; "
        "0: one for each core, up to 8, for scaling's usual sizes on a CPU, otherwise 1",
    ),
    flag(
        "minutes",
        float,
        0.0,
        "recipe, sweep, scaling: stop after this time; the same command continues; 0: no limit",
    ),
    flag("picture", str, "", "ladder, recipe, sweep, scaling: write a PNG here"),
    flag("json", bool, False, "the last line of standard output is one JSON object"),
]
ABOUT = "Time this machine. Example: anew bench ladder gpt2-124m --micro-batch 4 --seq-len 256"
WITH_PICTURE = ("ladder", "recipe", "sweep", "scaling")


def run_bench(argv: list[str]) -> None:
    """Time ladder, attention, train, generate, evaluate or prepare; or run an experiment."""
    what = ""
    rest = argv
    if argv and not argv[0].startswith("-"):
        what, *rest = argv
    known = MEASUREMENTS | EXPERIMENTS
    if what not in known and not {"-h", "--help"} & set(argv):
        if what:
            raise unknown_name("measurement", what, known)
        raise UserError(f"say what to measure: anew bench {'|'.join(known)}.")
    command = Command(f"bench {what or 'WHAT'}", ABOUT, FLAGS)
    typed = command.read(rest)
    base = read_recipe(typed.recipe or DEFAULT_RECIPES.get(what, "gpt2-124m"))
    command.show_help(rest, base)
    arguments = typed.options
    arguments.seeds = arguments.seeds or DEFAULT_SEEDS.get(what, 0)
    chosen = set(typed.settings)
    config = base.override(**typed.settings)
    device = pick_device(config.run.device).type
    if arguments.picture:
        _check_picture(what, Path(arguments.picture))
    config = config.override(device=device)
    arguments.jobs = arguments.jobs or _default_jobs(what, device, arguments.sizes)
    facts: Figures = {"device": device, "torch": torch.__version__}
    if what in EXPERIMENTS:
        config, messages = config.adapted(chosen)
        for message in messages:
            print(message)
        facts |= EXPERIMENTS[what](config.check(), device, arguments, chosen)
    else:
        config = _timed_step(config, chosen, device)
        if arguments.rounds < 1:
            raise UserError(f"--rounds {arguments.rounds} must be at least 1.")
        facts |= {"micro_batch": config.run.micro_batch, "seq_len": config.data.seq_len}
        facts |= MEASUREMENTS[what](config.check(), device, arguments)
    if arguments.json:
        print(json.dumps(facts))
    if OWN_SIDE in facts.get("left_out", {}):
        raise UserError(f"the side of {OWN_SIDE} has no result: {facts['left_out'][OWN_SIDE]}.")


def _default_jobs(what: str, device: str, sizes: str) -> int:
    """Return how many runs of an experiment take place at a time.

    The models of the default sizes are so small that one run on all cores is slower than a run for
    each core at the same time.
    """
    if what != "scaling" or device != "cpu" or sizes != DEFAULT_SIZES:
        return 1
    fitting = available_memory() // BYTES_OF_JOB
    return int(max(1, min(torch.get_num_threads(), MOST_DEFAULT_JOBS, fitting)))


def _check_picture(what: str, path: Path) -> None:
    """Refuse a picture that could not be drawn, before minutes of measuring."""
    if what not in WITH_PICTURE:
        raise UserError(f"bench {what} draws no picture; leave out --picture.")
    png.check(path)


def _timed_step(config: Config, chosen: set[str], device: str) -> Config:
    """Return `config` with a step of one micro-batch, of a size that suits the device."""
    micro_batch, seq_len = (16, 1024) if device == "cuda" else (4, 256)
    seq_len = min(seq_len, config.model.n_positions)
    if "micro_batch" in chosen and isinstance(config.run.micro_batch, int):
        micro_batch = config.run.micro_batch
    if "seq_len" in chosen:
        seq_len = config.data.seq_len
    return with_batch(config, micro_batch, seq_len)


MEASUREMENTS = {
    "ladder": ladder.time_ladder,
    "attention": ladder.time_attention,
    "train": comparisons.compare_training,
    "generate": comparisons.compare_generation,
    "evaluate": comparisons.compare_scoring,
    "prepare": comparisons.compare_preparing,
}
EXPERIMENTS = {
    "recipe": experiments.recipe,
    "sweep": experiments.sweep,
    "scaling": scaling.scaling,
}
MOST_DEFAULT_JOBS = 8
BYTES_OF_JOB = 1_500_000_000  # of a small model: most of them are those of the libraries
DEFAULT_SEEDS = {"recipe": 3, "scaling": 2}
DEFAULT_RECIPES = {"recipe": "gpt2-5m", "sweep": "gpt2-5m", "scaling": "gpt2-1m"}
