"""`anew bench train|generate|evaluate|prepare`: this package beside others, which take turns.

A comparison goes on without a side whose process ends. With --json, `left_out` has the reason of
each side that has no figures, and such a side has no `ratio_to_` key.
"""

import functools
import statistics
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import torch

from anew.bench import competitors
from anew.bench.compare import Comparison, alternate, ratio
from anew.bench.competitors import is_installed
from anew.bench.memory import fitting_micro_batches, step_bytes, step_memory
from anew.cli.ladder import Figures, step_title
from anew.cli.progress import progress_bar
from anew.config.config import Config
from anew.errors import UserError
from anew.evaluate.tasks.registry import TASKS
from anew.inference.cpu_decoder import GROUP
from anew.model.flops import flops_per_token
from anew.utils.device import pick_compile, pick_precision
from anew.utils.memory import available_memory

Times = dict[str, list[float]]  # seconds of each turn, by side
OWN_SIDE = "anew"
NOT_INSTALLED = "the package is not installed"


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
    if arguments.alone:
        precision, _ = pick_precision(config.run.precision, torch.device(device))
    else:
        precision = competitors.common_precision(config, device)
    config = config.override(precision=precision)
    print(f"{step_title(config, device)}, {precision}, {arguments.rounds} turns\n", flush=True)
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
    figures = _comparison_figures(found)
    return {**figures, "micro_batches": micro_batches, "precision": precision}


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
    needs = {name: step_memory(name, compiled, config.run.precision) for name in names}
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
    precision = competitors.common_precision(config, device)
    task = competitors.Generation(
        config, device, precision, arguments.rows, arguments.prompt_tokens, arguments.new_tokens
    )
    only_prompt = task.new_tokens == 1  # nearly all of the time is spent on the prompt
    one_text_on_cpu = arguments.rows == 1 and device == "cpu"
    sides: dict[str, Any] = {OWN_SIDE: competitors.anew_generation}
    missing: dict[str, str] = {}
    if one_text_on_cpu and config.model.n_embd % GROUP == 0 and not only_prompt:
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
        if not only_prompt:
            sides["llama.cpp q8_0"] = competitors.llama_cpp_q8_generation
    size = f"{task.rows} x ({task.prompt_tokens} + {task.new_tokens}) tokens"
    title = f"{config.recipe}, {size}, {precision}, on {device}, {arguments.rounds} turns"
    print(f"{title}\n", flush=True)
    found = _take_turns(sides, (task,), arguments.rounds, missing)
    if only_prompt:
        figures = _print_rates(found, task.rows * task.prompt_tokens, "prompt tokens")
    else:
        figures = _print_rates(found, task.rows * task.new_tokens, "tokens")
    return {**figures, "precision": precision}


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
