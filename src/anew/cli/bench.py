"""`anew bench WHAT`: the speed of this machine, rung by rung and beside other packages.

anew bench ladder gpt2-124m --micro-batch 4 --seq-len 256
anew bench train gpt2-124m --json       # the last line has the key ratio_to_transformers

A comparison goes on without a side whose process ends. With --json, `left_out` has the reason of
each side that has no figures, and such a side has no `ratio_to_` key.
"""

import functools
import json
import statistics
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import torch

from anew.bench import competitors
from anew.bench.compare import Comparison, alternate, ratio
from anew.bench.competitors import is_installed
from anew.bench.ladder import Rung
from anew.bench.memory import fitting_micro_batches, step_bytes, step_memory
from anew.bench.scaling import DEFAULT_SIZES, DEFAULT_TOKENS_PER_PARAMETER
from anew.bench.timing import (
    Measured,
    available_memory,
    measure_attention,
    measure_in_new_process,
    measure_ladder,
    with_batch,
)
from anew.cli import experiments, scaling
from anew.cli.args import Command, flag
from anew.cli.progress import progress_bar
from anew.config.config import Config
from anew.config.recipes import read_recipe
from anew.errors import UserError, unknown_name
from anew.evaluate.tasks.registry import TASKS
from anew.model.flops import flops_per_token
from anew.report import png
from anew.utils.device import peak_flops, pick_compile, pick_device, set_up_device

FLAGS = [
    flag("rounds", int, 5, "timed steps a rung, or turns a side"),
    flag("alone", bool, False, "train: no other side"),
    flag("rows", int, 1, "generate: sequences at once"),
    flag("prompt_tokens", int, 32, "generate: tokens of the prompt"),
    flag("new_tokens", int, 224, "generate: tokens to write"),
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
        "recipe, sweep, scaling: runs at a time, each with a GPU or a share of the cores; "
        "0: one for each core for scaling on a CPU, otherwise 1",
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
# ms a step of 16 x 1024 tokens on one A100, from a reference project's README.
PUBLISHED = {"fp32": 1000, "TF32 matrices": 380, "bf16": 334, "loss in chunks": 100}
ATTENTION_LENGTHS = (256, 512, 1024, 2048, 4096)

Figures = dict[str, Any]  # what --json prints
Times = dict[str, list[float]]  # seconds of each turn, by side
OWN_SIDE = "anew"
NOT_INSTALLED = "the package is not installed"
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
    arguments.jobs = arguments.jobs or _default_jobs(what, device)
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


def _default_jobs(what: str, device: str) -> int:
    """Return how many runs of an experiment take place at a time.

    The small models of `scaling` are faster with a core for each than with all cores in turn.
    """
    if what == "scaling" and device == "cpu":
        return min(torch.get_num_threads(), MOST_DEFAULT_JOBS)
    return 1


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


def _step_title(config: Config, device: str) -> str:
    tokens = f"{config.run.micro_batch} x {config.data.seq_len} tokens a step"
    return f"{config.recipe}, {tokens}, on {device}"


def _short(number: float) -> str:
    """Return a number with three digits, in at most seven characters."""
    if number >= 1000:
        return f"{number:.0f}"
    return f"{number:.3g}" if number >= 0.001 else f"{number:.1e}"


def time_ladder(config: Config, device: str, arguments: Any) -> Figures:
    """Time a training step on every rung of the ladder."""
    print(f"{_step_title(config, device)}\n")
    print("rung                    ms  tokens/s TFLOP/s     MB  x before  x first  1st step")
    peak, peak_source = peak_flops(set_up_device(config.override(precision="auto").run))
    done: list[tuple[Rung, Measured]] = []
    skipped: dict[str, str] = {}
    for rung, found in measure_ladder(config, arguments.rounds, device):
        if isinstance(found, str):
            skipped[rung.name] = found
            print(f"{rung.name:<18} skipped: {found}")
            continue
        done.append((rung, found))
        before = done[max(0, len(done) - 2)][1]
        print(
            f"{rung.name:<18} {1e3 * found.seconds:>7,.0f} {found.tokens_per_second:>9,.0f} "
            f"{_short(found.tflops):>7} {found.memory_bytes / 1e6:>6,.0f} "
            f"{before.seconds / found.seconds:>9.2f} {done[0][1].seconds / found.seconds:>8.2f} "
            f"{found.first_seconds:>7.1f} s",
            flush=True,
        )
    if not done:
        raise UserError("no rung could be timed.")
    bottom = done[0][1]
    rows = [_ladder_row(rung, found, bottom, peak) for rung, found in done]
    speedup = rows[0]["ms"] / rows[-1]["ms"]
    _print_losses(rows)
    print(f"\nbottom to top: {speedup:.1f} times as fast")
    print(f"MFU {100 * rows[-1]['mfu']:.0f}% of {peak_source}")
    if device == "cuda" and (config.run.micro_batch, config.data.seq_len) == (16, 1024):
        _print_published(rows)
    if arguments.picture:
        bars = [(row["rung"], row["ms"]) for row in rows]
        title = f"{config.recipe} on {device}"
        png.bars(bars, "ms a step", title, Path(arguments.picture))
    return {"rungs": rows, "skipped": skipped, "speedup": speedup, "peak": peak_source}


def _ladder_row(rung: Rung, found: Measured, bottom: Measured, peak: float) -> Figures:
    """Return the figures of one rung for --json."""
    return {
        "rung": rung.name,
        "ms": 1e3 * found.seconds,
        "ms_spread": [1e3 * seconds for seconds in found.spread],
        "first_step_seconds": found.first_seconds,
        "tokens_per_second": found.tokens_per_second,
        "tflops": found.tflops,
        "mfu": found.tflops * 1e12 / peak,
        "memory_bytes": found.memory_bytes,
        "loss": found.losses[-1],
        "loss_difference": found.losses[-1] - bottom.losses[-1],
    }


def _print_losses(rows: list[Figures]) -> None:
    print("\nlast loss and its difference from the first rung, on the same text:")
    for row in rows:
        print(f"  {row['rung']:<18} {row['loss']:.4f}  {row['loss_difference']:+.4f}")


def _print_published(rows: list[Figures]) -> None:
    for row in rows:
        if row["rung"] in PUBLISHED:
            print(
                f"  {row['rung']:<18} {row['ms']:>6,.0f} ms; "
                f"a reference project on one A100: {PUBLISHED[row['rung']]:,} ms"
            )


def time_attention(config: Config, device: str, arguments: Any) -> Figures:
    """Time plain and fused attention alone, and the whole step with each."""
    kinds = ("plain", "flash", "cudnn") if device == "cuda" else ("plain", "flash")
    heads = f"{config.model.n_head} heads of {config.model.head_dim}"
    print(f"attention forward and backward, {heads}, 4 sequences, on {device}\n")
    head = "".join(f"{kind + ' ms':>10}{'MB':>8}" for kind in kinds)
    print(f"tokens  {head}   plain / flash")
    columns = {
        kind: measure_attention(config, kind, ATTENTION_LENGTHS, arguments.rounds, device)
        for kind in kinds
    }
    rows = []
    for i, length in enumerate(ATTENTION_LENGTHS):
        row, line = _attention_row(length, {kind: columns[kind][i] for kind in kinds})
        rows.append(row)
        print(line, flush=True)
    plain = measure_in_new_process(config.override(attention="plain"), arguments.rounds)
    flash = measure_in_new_process(config.override(attention="flash"), arguments.rounds)
    gain = 0.0
    if isinstance(plain, Measured) and isinstance(flash, Measured):
        gain = 1 - flash.seconds / plain.seconds
        size = f"{config.run.micro_batch} x {config.data.seq_len}"
        print(f"\nthe whole step at {size}: {100 * gain:.1f}% less time with the fused kernel")
        print("(reference projects: 7.6% less for the step; up to 6 times for attention alone)")
    return {"attention": rows, "step_gain": gain}


def _attention_row(length: int, measured: dict[str, Measured | str]) -> tuple[Figures, str]:
    """Return the figures of one length for --json, and its line of the table."""
    row: Figures = {"tokens": length}
    line = f"{length:>6}  "
    problems = []
    for kind, found in measured.items():
        if isinstance(found, str):
            line += f"{'--':>18}"
            problems.append(found)
        else:
            row[f"{kind}_ms"] = 1e3 * found.seconds
            line += f"{1e3 * found.seconds:>10,.1f}{found.memory_bytes / 1e6:>8,.0f}"
    if "plain_ms" in row and "flash_ms" in row:
        row["ratio"] = row["plain_ms"] / row["flash_ms"]
        return row, f"{line}{row['ratio']:>16.1f}"
    return row, f"{line}  {problems[0]}"


def compare_training(config: Config, device: str, arguments: Any) -> Figures:
    """Compare a training step with other packages, and with eager fp32."""
    sides: dict[str, Any] = {OWN_SIDE: competitors.anew_training}
    missing: dict[str, str] = {}
    if not arguments.alone:
        if is_installed("transformers"):
            sides["transformers"] = competitors.transformers_training
        else:
            missing["transformers"] = NOT_INSTALLED
        sides["fp32, eager"] = competitors.eager_fp32_training
    config = config.override(precision="bf16" if device != "mps" else "fp32")
    print(f"{_step_title(config, device)}, {arguments.rounds} turns\n", flush=True)
    micro_batches = _micro_batches(config, list(sides), device, missing)
    turns = {
        name: functools.partial(sides[name], config.override(micro_batch=size))
        for name, size in micro_batches.items()
    }
    found = _take_turns(turns, (device,), arguments.rounds, missing)
    for name, seconds in found.seconds.items():
        median = statistics.median(seconds)
        rate = config.run.batch_tokens / median
        tflops = rate * flops_per_token(config.model, config.data.seq_len) / 1e12
        print(f"{name:<13} {median:.3f} s a step  {rate:,.0f} tokens/s  {tflops:.3g} TFLOP/s")
    return {**_comparison_figures(found), "micro_batches": micro_batches}


def _micro_batches(
    config: Config, names: list[str], device: str, missing: dict[str, str]
) -> dict[str, int]:
    """Return the micro-batch of each side whose step fits into memory beside the others.

    On a CPU, a side for which too little memory is left accumulates smaller micro-batches of the
    same tokens; it is added to `missing` if not even one sequence fits. Elsewhere, nothing is
    estimated.
    """
    whole, _ = config.micro_batches(1)
    available = available_memory()
    if device != "cpu" or not available:
        return dict.fromkeys(names, whole)
    compiled, _ = pick_compile(config.run.compile, torch.device(device))
    needs = {name: step_memory(name, compiled) for name in names}
    sizes = fitting_micro_batches(config, needs, available)
    gigabytes = f"{available / 1e9:.1f} GB of memory are available to all sides"
    for name, size in sizes.items():
        if size == 0:
            needed = step_bytes(needs[name], config, 1) / 1e9
            missing[name] = f"one sequence needs about {needed:.1f} GB; {gigabytes}"
        elif size < whole:
            text = f"{name} accumulates micro-batches of {size}: {gigabytes}"
            print(textwrap.fill(text, 80, subsequent_indent="    "), flush=True)
    if OWN_SIDE in missing:
        raise UserError(f"a step does not fit: {missing[OWN_SIDE]}; choose a shorter --seq-len.")
    return {name: size for name, size in sizes.items() if size > 0}


def compare_generation(config: Config, device: str, arguments: Any) -> Figures:
    """Compare greedy decoding with transformers and llama.cpp."""
    task = competitors.Generation(
        config, device, arguments.rows, arguments.prompt_tokens, arguments.new_tokens
    )
    one_text_on_cpu = arguments.rows == 1 and device == "cpu"
    sides: dict[str, Any] = {OWN_SIDE: competitors.anew_generation}
    missing: dict[str, str] = {}
    if one_text_on_cpu and config.model.n_embd % 32 == 0:
        sides["anew, int8"] = competitors.anew_int8_generation
    if is_installed("transformers"):
        sides["transformers"] = competitors.transformers_generation
    else:
        missing["transformers"] = NOT_INSTALLED
    if not one_text_on_cpu or config.model.vocab_size != 50257:
        missing["llama.cpp"] = "compared on a CPU only, with one text and GPT-2's vocabulary"
    elif not is_installed("llama_cpp"):
        missing["llama.cpp"] = NOT_INSTALLED
    else:
        sides["llama.cpp"] = competitors.llama_cpp_generation
        sides["llama.cpp q8_0"] = competitors.llama_cpp_q8_generation
    dtype = "fp32" if competitors.writing_dtype(device) == torch.float32 else "bf16"
    size = f"{task.rows} x ({task.prompt_tokens} + {task.new_tokens}) tokens"
    title = f"{config.recipe}, {size}, {dtype}, on {device}, {arguments.rounds} turns"
    print(f"{title}\n", flush=True)
    found = _take_turns(sides, (task,), arguments.rounds, missing)
    return _print_rates(found, task.rows * task.new_tokens, "tokens")


def compare_scoring(config: Config, device: str, arguments: Any) -> Figures:  # noqa: ARG001
    """Compare the scoring of HellaSwag with build-nanogpt's loop."""
    if not is_installed("transformers"):
        raise UserError("the other side is transformers' model; install transformers.")
    file = Path(arguments.file) if arguments.file else TASKS["hellaswag"].fetch()
    if not file.is_file():
        raise UserError(f"{file} does not exist; give --file an existing file.")
    sides: dict[str, Any] = {
        OWN_SIDE: competitors.anew_scoring,
        "one at a time": competitors.transformers_scoring,
    }
    size = f"{arguments.examples} examples a turn"
    print(f"HellaSwag, 124M, {size}, on {device}, {arguments.rounds} turns\n", flush=True)
    found = _take_turns(sides, (file, device, arguments.examples), arguments.rounds)
    return _print_rates(found, arguments.examples, "examples")


def compare_preparing(
    config: Config,  # noqa: ARG001 (all measurements have one signature)
    device: str,  # noqa: ARG001
    arguments: Any,
) -> Figures:
    """Compare the conversion of text to shards with a common script."""
    sides: dict[str, Any] = {
        OWN_SIDE: competitors.anew_preparing,
        "script": competitors.script_preparing,
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path, size = competitors.write_text(arguments.file, folder, arguments.documents)
        title = f"{size / 1e6:.0f} MB of text to tokens of GPT-2, {arguments.rounds} turns"
        print(f"{title}\n", flush=True)
        found = _take_turns(sides, (path, folder), arguments.rounds)
    return {**_print_rates(found, size / 1e6, "MB"), "bytes": size}


def _take_turns(
    sides: dict[str, Any],
    arguments: tuple[Any, ...],
    rounds: int,
    missing: dict[str, str] | None = None,
) -> Comparison:
    """Let the sides take turns and show how far they are; `missing` says why others take none."""
    with progress_bar() as update:
        found = alternate(sides, arguments, rounds, update)
    return Comparison(found.seconds, {**(missing or {}), **found.left_out})


def _print_rates(found: Comparison, amount: float, unit: str) -> Figures:
    """Print what each side processes in a second, of `amount` a turn; return the figures."""
    for name, seconds in found.seconds.items():
        print(f"{name:<14} {amount / statistics.median(seconds):,.1f} {unit} a second")
    return _comparison_figures(found)


def _comparison_figures(found: Comparison) -> Figures:
    """Print why sides are left out, and the ratios of the others; return the figures."""
    for name, reason in found.left_out.items():
        print(textwrap.fill(f"{name} is left out: {reason}", 80, subsequent_indent="    "))
    ratios = _print_ratios(found.seconds)
    return {"seconds": found.seconds, **ratios, "left_out": found.left_out}


def _print_ratios(times: Times) -> dict[str, float]:
    """Print how many times as long each other side takes; return the medians for --json."""
    medians = {}
    for name, seconds in times.items():
        if name.startswith(OWN_SIDE):
            continue
        key = name.split(",")[0].replace(" ", "_")
        if OWN_SIDE in times:
            found = ratio(times[OWN_SIDE], seconds)
            medians[f"ratio_to_{key}"] = found.median
            spread = f"({found.low:.2f} to {found.high:.2f})"
            print(f"{name} takes {found.median:.2f} times as long {spread}")
        if "anew, int8" in times:
            found = ratio(times["anew, int8"], seconds)
            medians[f"int8_ratio_to_{key}"] = found.median
            spread = f"({found.low:.2f} to {found.high:.2f})"
            print(f"    {found.median:.2f} times as long as with int8 weights {spread}")
    return medians


MEASUREMENTS = {
    "ladder": time_ladder,
    "attention": time_attention,
    "train": compare_training,
    "generate": compare_generation,
    "evaluate": compare_scoring,
    "prepare": compare_preparing,
}
EXPERIMENTS = {
    "recipe": experiments.recipe,
    "sweep": experiments.sweep,
    "scaling": scaling.scaling,
}
MOST_DEFAULT_JOBS = 8  # each takes about 1 GB of memory
DEFAULT_SEEDS = {"recipe": 3, "scaling": 2}
DEFAULT_RECIPES = {"recipe": "gpt2-5m", "sweep": "gpt2-5m", "scaling": "gpt2-1m"}
