"""`anew bench WHAT`: how fast it is here, rung by rung, and beside other packages."""

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from anew.bench import compare as versus
from anew.bench import competitors as rivals
from anew.bench import timing as bench
from anew.bench.timing import Measured, Rung
from anew.cli import experiments
from anew.cli.args import changed, flag, parse, read_recipe, recipe_and_flags
from anew.config.schema import Config
from anew.errors import UserError
from anew.evaluate.tasks.table import TASKS
from anew.model.flops import flops_per_token
from anew.report import png as pictures
from anew.utils import device as runtime

OWN = [
    flag("rounds", int, 5, "timed steps a rung, or turns a side"),
    flag("alone", bool, False, "train: no other side"),
    flag("rows", int, 1, "generate: sequences at once"),
    flag("prompt_tokens", int, 32, "generate: tokens of the prompt"),
    flag("new_tokens", int, 224, "generate: tokens to write"),
    flag(
        "file",
        str,
        "",
        "evaluate: HellaSwag's JSON lines instead of the cache's; prepare: text, instead of Python's source",
    ),
    flag("examples", int, 100, "evaluate: examples a turn"),
    flag("documents", int, 60_000, "prepare: at most this many documents"),
    flag("seeds", int, 3, "recipe: seeds of each arm"),
    flag(
        "over",
        str,
        "",
        "sweep: one setting or two with their values: 'lr=1e-3,2e-3 weight_decay=0,0.1'",
    ),
    flag(
        "minutes",
        float,
        0.0,
        "recipe, sweep: stop after so many, to be gone on with by the same command; 0: never",
    ),
    flag("picture", str, "", "write a PNG here (not train, generate, evaluate, prepare)"),
    flag("json", bool, False, "the last line of standard output is one JSON object"),
]
ABOUT = "How fast is it here? Example: anew bench ladder gpt2-124m --micro-batch 4 --seq-len 256"
PUBLISHED = {
    "fp32": 1000,
    "TF32 matrices": 380,
    "bf16": 334,
    "loss in chunks": 100,
}  # ms at 16 x 1024, a reference project's README


def run_bench(argv: list[str]) -> None:
    """Time this machine: ladder, attention, train, generate, evaluate, prepare; or recipes: recipe, sweep."""
    what, rest = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("", argv)
    if what not in WHAT | EXPERIMENTS and not {"-h", "--help"} & set(argv):
        raise UserError(
            f"`anew bench` times {', '.join(WHAT | EXPERIMENTS)}; say which"
            + (f", not {what}." if what else ".")
        )
    name, given = recipe_and_flags(rest, f"bench {what}", OWN)
    base = read_recipe(name or ("gpt2-5m" if what in EXPERIMENTS else "gpt2-124m"))
    a = parse(rest, "bench", base, OWN, ABOUT)
    config, chosen = changed(base, a, given)
    device = runtime.pick_device(config.run.device).type
    if a.picture:
        pictures.check()
    if what in EXPERIMENTS:
        config, said = config.override(device=device).adapted(chosen)
        for line in said:
            print(line)
        facts = EXPERIMENTS[what](config.check(), device, a, chosen)
        if a.json:
            print(json.dumps({"device": device, "torch": torch.__version__, **facts}))
        return
    sizes = (16, 1024) if device == "cuda" else (4, 256)
    micro = (
        config.run.micro_batch
        if "micro_batch" in chosen and isinstance(config.run.micro_batch, int)
        else sizes[0]
    )
    seq_len = (
        config.data.seq_len if "seq_len" in chosen else min(sizes[1], config.model.n_positions)
    )
    config = bench.at(config.override(device=device), micro, seq_len)
    if a.rounds < 1:
        raise UserError(f"--rounds {a.rounds} must be at least 1.")
    facts = WHAT[what](config.check(), device, a)
    if a.json:
        print(
            json.dumps(
                {
                    "device": device,
                    "torch": torch.__version__,
                    "micro_batch": micro,
                    "seq_len": seq_len,
                    **facts,
                }
            )
        )


def ladder(config: Config, device: str, a: Any) -> dict[str, Any]:
    """One setting more at each rung."""
    print(
        f"{config.recipe}, {config.run.micro_batch} x {config.data.seq_len} tokens a step, on {device}\n"
    )
    print("rung                    ms  tokens/s TFLOP/s     MB  x before  x first  1st step")
    peak, source = runtime.peak_flops(runtime.start(config.override(precision="auto").run))
    done: list[tuple[Rung, Measured]] = []
    skipped: dict[str, str] = {}
    for rung, found in bench.ladder(config, a.rounds, device):
        if isinstance(found, str):
            skipped[rung.name] = found
            print(f"{rung.name:<18} skipped: {found}")
            continue
        done.append((rung, found))
        first, before = done[0][1], done[max(0, len(done) - 2)][1]
        print(
            f"{rung.name:<18} {1e3 * found.seconds:>7,.0f} {found.tokens_per_second:>9,.0f} {found.tflops:>7.3g} "
            f"{found.memory_bytes / 1e6:>6,.0f} {before.seconds / found.seconds:>9.2f} {first.seconds / found.seconds:>8.2f} "
            f"{found.first_seconds:>7.1f} s",
            flush=True,
        )
    if not done:
        raise UserError("no rung could be timed.")
    rows = [_row(rung, found, done[0][1], peak) for rung, found in done]
    print("\nlast loss and its difference from the first rung, on the same text:")
    for row in rows:
        print(f"  {row['rung']:<18} {row['loss']:.4f}  {row['loss_difference']:+.4f}")
    top = done[-1][1]
    print(f"\nbottom to top: {done[0][1].seconds / top.seconds:.1f} times as fast")
    print(f"MFU {100 * top.tflops * 1e12 / peak:.0f}% of {source}")
    if device == "cuda" and (config.run.micro_batch, config.data.seq_len) == (16, 1024):
        for rung, found in done:
            if rung.name in PUBLISHED:
                print(
                    f"  {rung.name:<18} {1e3 * found.seconds:>6,.0f} ms; a reference project on one A100: {PUBLISHED[rung.name]:,} ms"
                )
    print()
    for line in bars([(row["rung"], row["ms"]) for row in rows]):
        print(line)
    if a.picture:
        pictures.bars(
            [(row["rung"], row["ms"]) for row in rows],
            "ms a step",
            f"{config.recipe} on {device}",
            Path(a.picture),
        )
    return {
        "rungs": rows,
        "skipped": skipped,
        "speedup": done[0][1].seconds / top.seconds,
        "peak": source,
    }


def _row(rung: Rung, found: Measured, first: Measured, peak: float) -> dict[str, Any]:
    return {
        "rung": rung.name, "ms": 1e3 * found.seconds, "ms_spread": [1e3 * s for s in found.spread],
        "first_step_seconds": found.first_seconds,
        "tokens_per_second": found.tokens_per_second, "tflops": found.tflops, "mfu": found.tflops * 1e12 / peak,
        "memory_bytes": found.memory_bytes, "loss": found.losses[-1], "loss_difference": found.losses[-1] - first.losses[-1],
    }  # fmt: skip


def bars(rows: list[tuple[str, float]], width: int = 50) -> list[str]:
    """A bar for each value, for the terminal."""
    most = max(value for _, value in rows)
    return [
        f"{name:<18} {'#' * max(1, round(width * value / most))} {value:,.0f}"
        for name, value in rows
    ]


def attention(config: Config, device: str, a: Any) -> dict[str, Any]:
    """Plain softmax attention against the fused kernel, and what the whole step gains."""
    kinds = ("plain", "flash", "cudnn") if device == "cuda" else ("plain", "flash")
    rows = []
    print(
        f"attention forward and backward, {config.model.n_head} heads of {config.model.head_dim}, 4 sequences, on {device}\n"
    )
    print(
        "tokens  " + "".join(f"{kind + ' ms':>10}{'MB':>8}" for kind in kinds) + "   plain / flash"
    )
    lengths = (256, 512, 1024, 2048, 4096)
    columns = {
        kind: bench.attention_apart(config, kind, lengths, a.rounds, device) for kind in kinds
    }
    for i, T in enumerate(lengths):
        found = {kind: columns[kind][i] for kind in kinds}
        done = {kind: f for kind, f in found.items() if not isinstance(f, str)}
        cells = "".join(
            f"{1e3 * done[k].seconds:>10,.1f}{done[k].memory_bytes / 1e6:>8,.0f}"
            if k in done
            else f"{'--':>18}"
            for k in kinds
        )
        row: dict[str, Any] = {
            "tokens": T,
            **{f"{kind}_ms": 1e3 * f.seconds for kind, f in done.items()},
        }
        if {"plain", "flash"} <= set(done):
            row["ratio"] = done["plain"].seconds / done["flash"].seconds
        rows.append(row)
        why = next((f for f in found.values() if isinstance(f, str)), "")
        print(
            f"{T:>6}  {cells}" + (f"{row['ratio']:>16.1f}" if "ratio" in row else f"  {why}"),
            flush=True,
        )
    step = {
        kind: bench.apart(config.override(attention=kind), a.rounds) for kind in ("plain", "flash")
    }
    gain = 0.0
    if not isinstance(step["plain"], str) and not isinstance(step["flash"], str):
        gain = 1 - step["flash"].seconds / step["plain"].seconds
        print(
            f"\nthe whole step at {config.run.micro_batch} x {config.data.seq_len}: {100 * gain:.1f}% less time with the fused kernel"
        )
        print("(reference projects: 7.6% less for the step; up to 6 times for attention alone)")
    return {"attention": rows, "step_gain": gain}


def train(config: Config, device: str, a: Any) -> dict[str, Any]:
    """A training step beside transformers', and beside fp32 as scripts have it out of the box."""
    sides: dict[str, Any] = {"anew": rivals.our_step}
    if rivals.is_installed("transformers") and not a.alone:
        sides["transformers"] = rivals.their_step
    if rivals.is_installed("litgpt") and not a.alone:
        sides["litgpt"] = rivals.litgpt_step
    if not a.alone:
        sides["fp32, eager"] = rivals.plain_step
    config = config.override(precision="bf16" if device != "mps" else "fp32")
    times = versus.alternate(sides, (config, device), a.rounds)
    facts: dict[str, Any] = {"seconds": times}
    print(
        f"{config.recipe}, {config.run.micro_batch} x {config.data.seq_len} tokens a step, on {device}, {a.rounds} turns\n"
    )
    for name, t in times.items():
        rate = config.run.batch_tokens / statistics.median(t)
        tflops = rate * flops_per_token(config.model, config.data.seq_len) / 1e12
        print(
            f"{name:<13} {statistics.median(t):.3f} s a step  {rate:,.0f} tokens/s  {tflops:.3g} TFLOP/s"
        )
    _ratios(times, facts)
    return facts


def generate(config: Config, device: str, a: Any) -> dict[str, Any]:
    """Greedy decoding beside transformers' `generate`, both bf16."""
    sides: dict[str, Any] = {"anew": rivals.our_writing}
    if a.rows == 1 and device == "cpu" and config.model.n_embd % 32 == 0:
        sides["anew, int8"] = rivals.our_writing_int8
    if rivals.is_installed("transformers"):
        sides["transformers"] = rivals.their_writing
    if (
        a.rows == 1
        and device == "cpu"
        and config.model.vocab_size == 50257
        and rivals.is_installed("llama_cpp")
    ):
        sides |= {"llama.cpp": rivals.llama_writing, "llama.cpp q8_0": rivals.llama_writing_q8}
    times = versus.alternate(
        sides, (config, device, a.rows, a.prompt_tokens, a.new_tokens), a.rounds
    )
    dtype = "fp32" if rivals.writing_dtype(device) == torch.float32 else "bf16"
    print(
        f"{config.recipe}, {a.rows} x ({a.prompt_tokens} + {a.new_tokens}) tokens, {dtype}, on {device}, {a.rounds} turns\n"
    )
    return _rates(times, a.rows * a.new_tokens, "tokens")


def _rates(times: dict[str, list[float]], amount: float, unit: str) -> dict[str, Any]:
    """What each side does of `amount` a turn in a second, and the ratios."""
    for name, t in times.items():
        print(f"{name:<14} {amount / statistics.median(t):,.1f} {unit} a second")
    facts: dict[str, Any] = {"seconds": times}
    _ratios(times, facts)
    return facts


def _ratios(times: dict[str, list[float]], facts: dict[str, Any]) -> None:
    for name in [n for n in times if not n.startswith("anew")]:
        middle, low, high = versus.ratio(times["anew"], times[name])
        facts[f"ratio_to_{name.split(',')[0].replace(' ', '_')}"] = middle
        print(f"{name} takes {middle:.2f} times as long ({low:.2f} to {high:.2f})")
        if "anew, int8" in times:
            middle, low, high = versus.ratio(times["anew, int8"], times[name])
            facts[f"int8_ratio_to_{name.replace(' ', '_')}"] = middle
            print(f"    {middle:.2f} times as long as with int8 weights ({low:.2f} to {high:.2f})")


def evaluate(config: Config, device: str, a: Any) -> dict[str, Any]:  # noqa: ARG001
    """Scoring HellaSwag beside the usual loop."""
    if not rivals.is_installed("transformers"):
        raise UserError("the other side is transformers' model; install transformers.")
    file = Path(a.file) if a.file else TASKS["hellaswag"].fetch()
    sides: dict[str, Any] = {"anew": rivals.our_scoring, "one at a time": rivals.their_scoring}
    times = versus.alternate(sides, (file, device, a.examples), a.rounds)
    print(f"HellaSwag, 124M, {a.examples} examples a turn, on {device}, {a.rounds} turns\n")
    return _rates(times, a.examples, "examples")


def prepare(config: Config, device: str, a: Any) -> dict[str, Any]:  # noqa: ARG001
    """Text to shards beside the obvious script."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path, size = rivals.text_of(a.file, folder, a.documents)
        times = versus.alternate(
            {"anew": rivals.our_preparing, "script": rivals.script_preparing},
            (path, folder),
            a.rounds,
        )
    print(f"{size / 1e6:.0f} MB of text to tokens of GPT-2, {a.rounds} turns\n")
    return _rates(times, size / 1e6, "MB") | {"bytes": size}


WHAT = {
    "ladder": ladder,
    "attention": attention,
    "train": train,
    "generate": generate,
    "evaluate": evaluate,
    "prepare": prepare,
}
EXPERIMENTS = {"recipe": experiments.recipe, "sweep": experiments.sweep}
