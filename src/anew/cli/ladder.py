"""`anew bench ladder` and `anew bench attention`: the speed of a step, rung by rung, and of its
attention.
"""

from pathlib import Path
from typing import Any

from anew.bench.ladder import Rung
from anew.bench.timing import Measured, measure_attention, measure_in_new_process, measure_ladder
from anew.config.config import Config
from anew.errors import UserError
from anew.report import png
from anew.utils.device import peak_flops, set_up_device

# ms a step of 16 x 1024 tokens on one A100, from a reference project's README.
PUBLISHED = {"fp32": 1000, "TF32 matrices": 380, "bf16": 334, "loss in chunks": 100}
ATTENTION_LENGTHS = (256, 512, 1024, 2048, 4096)

Figures = dict[str, Any]  # what --json prints


def step_title(config: Config, device: str) -> str:
    """Return the title of measurements of a training step."""
    tokens = f"{config.run.micro_batch} x {config.data.seq_len} tokens a step"
    return f"{config.recipe}, {tokens}, on {device}"


def _short(number: float) -> str:
    """Return a number with three digits, in at most seven characters."""
    if number >= 1000:
        return f"{number:.0f}"
    return f"{number:.3g}" if number >= 0.001 else f"{number:.1e}"


def time_ladder(config: Config, device: str, arguments: Any) -> Figures:
    """Time a training step on every rung of the ladder."""
    print(f"{step_title(config, device)}\n")
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
