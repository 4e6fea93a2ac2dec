"""`anew plan RECIPE`: parameters, memory, hours, dollars and disk of a run before it starts."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from anew.bench.timing import Measured, measure_in_new_process, with_batch
from anew.cli.args import Command, flag
from anew.config.config import Config
from anew.config.recipes import read_recipe
from anew.errors import UserError
from anew.plan import Plan, format_plan, from_run, make_plan
from anew.training.run_settings import read_init
from anew.utils.device import Runtime, peak_flops, set_up_device
from anew.utils.gpus import GPU, find, known
from anew.utils.memory import machine_memory

FLAGS = [
    flag("gpu", str, "", "the kind of GPU, e.g. h100, a100-40, 4090, t4, m2 max"),
    flag("count", int, 1, "how many of them"),
    flag("price", float | None, None, "dollars a GPU and hour"),
    flag("measure", bool, False, "time a few real steps on this machine instead of estimating"),
    flag("from_run", str, "", "extrapolate from this run folder's measured speed", name="from"),
    flag("json", bool, False, "the last line of standard output is one JSON object"),
]
ABOUT = "What a run needs. Example: anew plan gpt2-124m --gpu h100 --count 8 --price 2.5"
COMMAND = Command("plan", ABOUT, FLAGS)


def run_plan(argv: list[str]) -> None:
    """Say what a run needs: memory, hours, dollars, disk."""
    typed = COMMAND.read(argv)
    base = read_recipe(typed.recipe or "gpt2-124m")
    COMMAND.show_help(argv, base)
    arguments = typed.options
    config, _ = base.override(**typed.settings).adapted(set(typed.settings))
    if config.run.init:
        config, _ = read_init(config)
    # A plan is the same for any text, so the recipe finetune needs no --data here.
    config.override(data=config.data.data or "any").check()
    if arguments.price is not None and arguments.price < 0:
        raise UserError(f"--price {arguments.price:g} cannot be negative.")
    if arguments.from_run:
        for line in from_run(Path(arguments.from_run), config):
            print(line)
        return
    speed = None
    gpu = find(arguments.gpu) if arguments.gpu else None
    if arguments.measure:
        runtime = set_up_device(config.run)
        speed = _measured_speed(config, arguments.count)
        gpu = gpu or _this_device(runtime)
    if gpu is None:
        raise UserError(
            "--gpu names the GPU to plan for, e.g. --gpu h100; --measure takes this machine's."
        )
    plan = make_plan(config, gpu, arguments.count, arguments.price, speed)
    for line in format_plan(plan):
        print(line)
    if arguments.json:
        print(json.dumps(_facts(plan)))


def _measured_speed(config: Config, count: int) -> float:
    """Time a step of one micro-batch on this machine; return and print the tokens a second."""
    micro_batch, _ = config.micro_batches(count)
    found: Measured | str = measure_in_new_process(
        with_batch(config, micro_batch, config.data.seq_len), steps=3
    )
    if isinstance(found, str):
        raise UserError(f"a step of micro-batch {micro_batch} could not be timed: {found}.")
    gigabytes = found.memory_bytes / 1e9
    print(
        f"measured: {found.tokens_per_second:,.0f} tokens/s with micro-batch {micro_batch}, "
        f"{gigabytes:.1f} GB, {found.tflops:.3g} TFLOP/s"
    )
    return found.tokens_per_second


def _this_device(runtime: Runtime) -> GPU:
    """Return this machine's device: with its datasheet if that is known, else with a timed peak."""
    import torch

    if runtime.device.type == "cuda":
        name = torch.cuda.get_device_name(runtime.device)
        _, memory = torch.cuda.mem_get_info(runtime.device)
        datasheet = known(name)
        if datasheet:
            return dataclasses.replace(datasheet, memory_gb=memory / 1e9)
    else:
        name = runtime.device.type
        memory = machine_memory()
    peak = peak_flops(runtime)[0] / 1e12
    return GPU(
        name,
        matches=(),
        memory_gb=memory / 1e9,
        memory_gb_s=0,
        fp32=peak,
        tf32=None,
        bf16=peak,
        fp16=None,
        link_gb_s=0,
        mfu=0,
        source="timed here",
    )


def _facts(plan: Plan) -> dict[str, Any]:
    """Return the plan for --json."""
    return {
        "hours": plan.hours,
        "dollars": plan.dollars,
        "tokens_per_second": plan.tokens_per_second,
        "fits": plan.fits,
        "gpu": plan.gpu.name,
        "count": plan.count,
        "memory": dataclasses.asdict(plan.memory),
    }
