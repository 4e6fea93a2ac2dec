"""`anew plan RECIPE`: parameters, memory, hours, dollars and disk of a run before it is started."""

import dataclasses
import json
from pathlib import Path

from anew.bench import timing as bench
from anew.cli.args import changed, flag, parse, read_recipe, recipe_and_flags
from anew.errors import UserError
from anew.plan import from_run, lines, make
from anew.utils import device as runtime
from anew.utils.gpus import GPU, find, known

OWN = [
    flag("gpu", str, "", "the kind of GPU, e.g. h100, a100-40, 4090, t4, m2 max"),
    flag("count", int, 1, "how many of them"),
    flag("price", float | None, None, "dollars a GPU and hour"),
    flag("measure", bool, False, "time a few real steps on this machine instead of estimating"),
    flag("from_run", str, "", "extrapolate from this run folder's measured speed", name="from"),
    flag("json", bool, False, "the last line of standard output is one JSON object"),
]
ABOUT = "What a run will need. Example: anew plan gpt2-124m --gpu h100 --count 8 --price 2.5"


def run_plan(argv: list[str]) -> None:
    """Say what a run needs: memory, hours, dollars, disk."""
    name, given = recipe_and_flags(argv, "plan", [*OWN, flag("from", str, "", "")])
    base = read_recipe(name or "gpt2-124m")
    a = parse(argv, "plan", base, OWN, ABOUT)
    config, chosen = changed(base, a, given)
    config, _ = config.adapted(chosen)
    config.check()
    if a.from_run:
        for line in from_run(Path(a.from_run), config):
            print(line)
        return
    rate = None
    gpu = find(a.gpu) if a.gpu else None
    if a.measure:
        rt = runtime.start(config.run)
        micro = config.micro_batches(a.count)[0]
        found = bench.apart(bench.at(config, micro, config.data.seq_len), steps=3)
        if isinstance(found, str):
            raise UserError(f"a step of micro-batch {micro} could not be timed: {found}.")
        rate = found.tokens_per_second
        gpu = gpu or _this(rt)
        print(
            f"measured: {rate:,.0f} tokens/s with micro-batch {micro}, {found.memory_bytes / 1e9:.1f} GB, {found.tflops:.3g} TFLOP/s"
        )
    if gpu is None:
        raise UserError(
            "--gpu says for which GPU, e.g. --gpu h100; or --measure takes the one that is here."
        )
    plan = make(config, gpu, a.count, a.price, rate)
    for line in lines(plan):
        print(line)
    if a.json:
        facts = {
            "hours": plan.hours,
            "dollars": plan.dollars,
            "tokens_per_second": plan.tokens_per_second,
            "fits": plan.fits,
        }
        print(
            json.dumps(
                {
                    **facts,
                    "gpu": plan.gpu.name,
                    "count": plan.count,
                    "memory": dataclasses.asdict(plan.memory),
                }
            )
        )


def _this(rt: runtime.Runtime) -> GPU:
    """The device that is here."""
    import torch

    if rt.device.type == "cuda":
        name, memory = torch.cuda.get_device_name(rt.device), torch.cuda.mem_get_info(rt.device)[1]
        if found := known(name):
            return dataclasses.replace(found, memory_gb=memory / 1e9)
    else:
        name, memory = rt.device.type, bench.machine_memory()
    peak = runtime.peak_flops(rt)[0] / 1e12
    return GPU(name, (), memory / 1e9, 0, peak, None, peak, None, 0, 0, "timed here")
