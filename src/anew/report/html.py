"""One self-contained HTML page about one run or several: the verdict first, then the curves.

    write([Path("runs/gpt2-124m")], Path("runs/gpt2-124m/report.html"), price=2.5)

The texts and charts are made here; page.html is the template that they are put into. The page loads
nothing from the network, and all text of a run (samples, paths, messages) is escaped, so a page can
be sent to other people.
"""

import dataclasses
import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median_high
from typing import Any

from anew.evaluate.published import published_value, size_of
from anew.model.flops import count_parameters
from anew.report import reference_runs as reference
from anew.report.run import Run
from anew.report.svg import Line, Points, Whisker, line_chart, short, smoothed
from anew.report.templates import render
from anew.utils.files import write_atomic

MOST_RUNS = 4  # page.css has distinguishable colours for so many
MOST_SAMPLES = 6
MOST_EVENTS = 40
MOST_STEPS = 6  # in the table of CORE's tasks
CENTERED = "centered_acc"
MAIN_FIGURES = ("acc_norm", "acc", CENTERED)  # the first that a task has is drawn


def write(folders: Sequence[Path], out: Path, price: float | None = None) -> Path:
    """Write the page about these run folders to `out`. `price` is dollars an hour of one device."""
    text = page([Run.read(folder) for folder in folders], price)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, text, shared=True)
    return out


def page(runs: Sequence[Run], price: float | None = None) -> str:
    """Return the page as text."""
    first = runs[0]
    is_single = len(runs) == 1
    figures = [figure for run in runs for figure in _figures(run, _prefix(run, runs))]
    return render(
        "page.html",
        title=" and ".join(run.name for run in runs),
        subtitle=_description(first) if is_single else f"{len(runs)} runs side by side",
        verdict=_verdict(figures),
        figures=figures,
        runs=[_about(run, _prefix(run, runs)) for run in runs],
        facts=_facts(first, price) if is_single else {},
        summary=[] if is_single else [_summary(run) for run in runs],
        loss_text=_loss_text(runs),
        loss_chart=_loss_chart(runs),
        task_charts=_task_charts(runs),
        training_charts=_training_charts(runs),
        public_runs=_public_runs() if is_single and size_of(first.config.model) == "124M" else [],
    )


def _about(run: Run, prefix: str) -> dict[str, Any]:
    """Return what page.html says about a run, besides its charts and figures."""
    command = f"anew report {shlex.quote(str(run.folder))} --baseline gpt2"
    environment = run.state.get("environment", {})
    return {
        "prefix": prefix,
        "state": _state(run),
        "has_baseline": run.baseline is not None,
        "baseline_command": command if size_of(run.config.model) else "",
        "core_table": _core_table(run),
        "samples": _spread(run.samples, MOST_SAMPLES),
        "verification": run.verification,
        "event_count": _event_count(run),
        "events": _events(run),
        "environment": {name.replace("_", " "): value for name, value in environment.items()},
        "settings": dataclasses.asdict(run.config),
    }


def _prefix(run: Run, runs: Sequence[Run]) -> str:
    """Return the name of a run for a text about it; empty if there is only one run."""
    return f"{run.name}: " if len(runs) > 1 else ""


def _unit(runs: Sequence[Run]) -> str:
    """Return what a loss is a mean over: byte, token, or both."""
    return " or ".join(sorted({run.config.data.unit for run in runs}))


def _description(run: Run) -> str:
    """Return model, data and tokenizer of a run in one phrase."""
    model, data = run.config.model, run.config.data
    shape = size_of(model) or f"with {model.n_layer} layers of width {model.n_embd}"
    tokenizer = data.tokenizer.partition(":")[0]
    special = {
        "bytes": "bytes",
        "train": f"{model.vocab_size:,} tokens learnt from it",
        "gpt2": "GPT-2's tokens",
    }
    tokens = special.get(tokenizer, f"{tokenizer}'s tokens")
    parameters = short(count_parameters(model))
    return f"GPT-2 {shape}, {parameters} parameters, trained on {data.data} as {tokens}"


# Verdict


@dataclass(frozen=True)
class Figure:
    """A figure of a run beside its reference. `verdict` is PASS, FAIL or empty."""

    name: str
    ours: float
    reference: str
    theirs: float
    verdict: str


def _figures(run: Run, prefix: str) -> Iterator[Figure]:
    """Yield all figures of a run that have a reference."""
    if run.baseline and run.final_loss is not None:
        theirs = float(run.baseline["loss"])
        verdict = ""
        if run.status == "complete" and run.final_loss_is_fp32:
            verdict = "PASS" if run.final_loss <= theirs else "FAIL"
        source = f"{run.baseline['model']} on the same windows; lower is better"
        yield Figure(f"{prefix}validation loss", run.final_loss, source, theirs, verdict)
    for comparison in run.comparisons():
        published = comparison.published
        note = f"; {published.note}" if published.note else ""
        source = f"OpenAI's GPT-2: {published.source}{note}"
        name = f"{prefix}{published.task} {published.figure}"
        yield Figure(name, comparison.ours, source, comparison.theirs, comparison.verdict)


def _verdict(figures: Sequence[Figure]) -> dict[str, Any]:
    """Return the verdict on all figures together; empty if none of them has one."""
    verdicts = [figure.verdict for figure in figures if figure.verdict]
    if not verdicts:
        return {}
    passed = verdicts.count("PASS")
    overall = "PASS" if passed == len(verdicts) else "FAIL"
    return {"overall": overall, "passed": passed, "count": len(verdicts)}


def _state(run: Run) -> str:
    """Return how far a run without a verdict has come."""
    step = f"{run.last['step']:,}"
    if run.config.data.one_batch:
        return (
            f"The loss on the one training batch is {run.train_loss} after {step} steps; "
            "a model that can learn brings it close to 0."
        )
    if run.final_loss is None:
        return (
            f"Step {step} of {run.config.run.steps:,}: training loss {run.train_loss}. "
            "No held-out text has been scored yet."
        )
    vocab_size = run.config.model.vocab_size
    return (
        f"The loss on held-out text is {run.final_loss:.3f} nats per {_unit([run])}, "
        f"a perplexity of {math.exp(run.final_loss):,.3g}. "
        f"A uniform guess has a loss of {math.log(vocab_size):.2f}, a perplexity of {vocab_size:,}."
    )


# Facts


def _facts(run: Run, price: float | None) -> dict[str, str]:
    """Return status, steps, tokens, time, speed and cost."""
    last, steps = run.last, run.config.run.steps
    step, seconds = last["step"], last["seconds"]
    status = run.status
    if status == "running":
        status = f"running, {100 * step / steps:.0f}% done"
    facts = {
        "status": status,
        "steps": f"{step:,} of {steps:,}",
        "tokens": short(last["tokens"]),
        "training time": _time(seconds),
        "tokens per second": f"{_median(run, 'speed/tokens_per_second'):,.0f}",
        "MFU": f"{100 * _median(run, 'speed/mfu'):.0f}%",
    }
    if run.final_loss is not None:
        facts = {"validation loss": f"{run.final_loss:.4f}", **facts}
    if step < steps:
        facts["estimated time left"] = _time(seconds / step * (steps - step))
    if price is not None:
        ranks = int(run.state.get("environment", {}).get("ranks", 1))
        facts[f"cost at ${price:g} an hour"] = f"${seconds / 3600 * ranks * price:,.2f}"
    return facts


def _median(run: Run, key: str) -> float:
    return median_high(value for _, value in run.points(key))


def _time(seconds: float) -> str:
    """Return a time in seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _summary(run: Run) -> list[str]:
    """Return the line about one of several runs: name, model, steps, tokens, loss and time."""
    return [
        run.name,
        _description(run),
        f"{run.last['step']:,} of {run.config.run.steps:,}",
        short(run.last["tokens"]),
        "not scored" if run.final_loss is None else f"{run.final_loss:.4f}",
        _time(run.last["seconds"]),
    ]


# Charts


def _public_text(run: Run) -> str:
    """Return the text of public runs that a run of GPT-2 124M is shown with; empty for none."""
    return reference.data_of(run.config) if size_of(run.config.model) == "124M" else ""


def _loss_text(runs: Sequence[Run]) -> str:
    """Return the explanation of the chart of losses."""
    text = (
        f"Mean cross-entropy in nats per {_unit(runs)}. The thin line is the loss of each training "
        "batch; the thick lines are its moving mean and the loss on held-out text."
    )
    data = _public_text(runs[0])
    if data:
        _, source = reference.BASELINES[data]
        where = "on this run's own windows" if runs[0].baseline else f"as measured by {source}"
        text += (
            f" Grey lines are public runs on {data}, each on its own validation text. "
            f"The dashed line is the loss of OpenAI's GPT-2 124M, {where}."
        )
    return text


def _loss_chart(runs: Sequence[Run]) -> str:
    lines: list[Line] = []
    whiskers: list[Whisker] = []
    for i, run in enumerate(runs, start=1):
        prefix = _prefix(run, runs)
        batches = run.points("train/loss")
        validation = run.points("val/loss")
        kind = "own-2" if len(runs) == 1 else f"own-{i}"
        lines += [
            Line(f"{prefix}each batch", batches, f"faint-{i}"),
            Line(f"{prefix}training", smoothed(batches), f"own-{i}"),
            Line(f"{prefix}validation", validation, kind),
        ]
        general = run.points("general/loss")
        if general:
            kind = "own-3" if len(runs) == 1 else f"own-{i}"
            name = Path(run.config.data.general_data).name
            lines.append(Line(f"{prefix}validation of {name}", general, kind))
        projection = _projection(run)
        if projection:
            end = f"{projection.value:.3f} ± {projection.plus_minus:.3f}"
            name = f"{prefix}expected at 10B tokens: {end}"
            whiskers.append(_whisker(name, projection, validation[-1]))
    own_end = max((x for line in lines for x, _ in line.points), default=math.inf)
    lines += reference_lines(runs[0], math.inf if whiskers else own_end)
    unit = f"nats per {_unit(runs)}"
    return line_chart("Loss", lines, unit, whiskers=whiskers, skip_start=True, wide=True)


def reference_lines(run: Run, end: float) -> list[Line]:
    """Return public curves on the same text up to `end`, and the level of GPT-2 or the baseline."""
    lines = []
    data = _public_text(run)
    if data:
        curves = {curve.name: curve.losses for curve in reference.CURVES if curve.data == data}
        lines = _context_lines(curves, end)
    if run.baseline:
        loss = float(run.baseline["loss"])
        lines.append(_level(f"{run.baseline['model']} on the same windows, {loss:.4f}", loss))
    elif data:
        loss, _ = reference.BASELINES[data]
        lines.append(_level(f"OpenAI's GPT-2 124M, {loss}", loss))
    return lines


def _context_lines(curves: dict[str, Points], end: float = math.inf) -> list[Line]:
    """Return grey lines for the curves of public runs up to `end`."""
    lines = []
    for i, (name, points) in enumerate(curves.items(), start=1):
        shown = [point for point in points if 0 < point[0] <= end]
        lines.append(Line(name, shown, f"context-{i}"))
    return lines


def _level(name: str, value: float) -> Line:
    return Line(name, [(0.0, value)], "level")


def _projection(run: Run) -> reference.Projection | None:
    """Return the projected loss at 10B tokens of an incomplete run like the reference runs."""
    if run.status == "complete" or not reference.is_like_them(run.config):
        return None
    return reference.project(run.points("val/loss"))


def _whisker(name: str, found: reference.Projection, start: tuple[float, float]) -> Whisker:
    return Whisker(name, reference.HORIZON, found.value, found.plus_minus, start)


def _task_charts(runs: Sequence[Run]) -> list[str]:
    """Return a chart for each task of the first run, of the task's main figure."""
    charts = []
    tasks = runs[0].tasks
    for task, figures in tasks.items():
        figure = next((name for name in MAIN_FIGURES if name in figures), figures[0])
        lines = _lines_of(runs, f"eval/{task}/{figure}")
        whiskers = []
        if (task, figure) == ("hellaswag", "acc_norm"):
            lines += _hellaswag_lines(runs[0])
            whiskers = _hellaswag_whisker(runs[0])
        is_share = "acc" in figure and figure != CENTERED
        unit = figure
        if is_share:
            unit = "share of correct answers"
        elif figure == CENTERED:
            unit = "0: guesses, 1: no errors"
        chart = line_chart(
            f"{task} {figure}",
            lines,
            unit,
            whiskers=whiskers,
            percent=is_share,
            wide=len(tasks) == 1,
        )
        charts.append(chart)
    return charts


def _core_table(run: Run) -> list[list[str]]:
    """Return titles and rows of CORE's tasks: centered accuracies by step, and those of GPT-2.

    The table is empty if CORE was not scored.
    """
    measured = [row for row in run.rows if f"eval/core/{CENTERED}" in row]
    if not measured:
        return []
    shown = _spread(measured, MOST_STEPS)
    size = size_of(run.config.model)
    table = [["task", *(f"step {row['step']:,}" for row in shown)]]
    if size:
        table[0].append(f"GPT-2 {size}")
    for task in run.tasks["core"]:
        if task in (CENTERED, "standard_error"):
            continue
        cells = [f"{row[f'eval/core/{task}']:.3f}" for row in shown]
        if size:
            value = published_value("core", task, size)
            cells.append("" if value is None else f"{value:.3f}")
        table.append([task, *cells])
    return table


def _spread(values: Sequence[Any], most: int) -> Sequence[Any]:
    """Return at most `most` values, spread from the first to the last."""
    if len(values) <= most:
        return values
    last = len(values) - 1
    return [values[round(i * last / (most - 1))] for i in range(most)]


def _hellaswag_lines(run: Run) -> list[Line]:
    """Return published levels for a run of this size, and the curves of public runs."""
    size = size_of(run.config.model)
    levels = reference.hellaswag_levels(size)
    lines = [_level(f"{name}, {100 * value:g}%", value) for name, value in levels]
    if size == "124M":
        curves = {curve.name: curve.hellaswag for curve in reference.CURVES if curve.hellaswag}
        lines += _context_lines(curves)
    return lines


def _hellaswag_whisker(run: Run) -> list[Whisker]:
    accuracies = run.points("eval/hellaswag/acc_norm")
    loss = _projection(run)
    if loss is None:
        return []
    found = reference.project_hellaswag(accuracies, run.points("val/loss"), loss)
    if found is None:
        return []
    end = f"{100 * found.value:.1f}% ± {100 * found.plus_minus:.1f}"
    return [_whisker(f"expected at 10B tokens: {end}", found, accuracies[-1])]


def _lines_of(runs: Sequence[Run], key: str) -> list[Line]:
    """Return one line for each run."""
    lines = []
    for i, run in enumerate(runs, start=1):
        name = run.name if len(runs) > 1 else "this run"
        lines.append(Line(name, run.points(key), f"own-{i}"))
    return lines


def _training_charts(runs: Sequence[Run]) -> list[str]:
    """Return the charts of learning rate, gradient norm and speed."""
    norms = _lines_of(runs, "train/grad_norm")
    mfu = _lines_of(runs, "speed/mfu")
    return [
        line_chart("Learning rate", _lines_of(runs, "train/lr"), "warm-up and decay"),
        line_chart("Gradient norm", norms, "before clipping", skip_start=True),
        line_chart("Speed", _lines_of(runs, "speed/tokens_per_second"), "tokens per second"),
        line_chart("MFU", mfu, "share of the device's peak", percent=True),
    ]


# Samples, public runs and events


def _public_runs() -> list[list[str]]:
    """Return name, text, loss, tokens, note and source of public runs and OpenAI's GPT-2."""
    rows = []
    for curve in reference.CURVES:
        tokens, loss = curve.losses[-1]
        note = "" if curve.is_gpt2 else "another architecture"
        rows.append([curve.name, curve.data, f"{loss:.4f}", short(tokens), note, curve.source])
    for data, (loss, source) in reference.BASELINES.items():
        rows.append(["OpenAI's GPT-2 124M", data, f"{loss:.4f}", "", "", source])
    return rows


def _event_count(run: Run) -> str:
    """Return how often a run was started and how many events its log has."""
    starts = int(run.state.get("starts", 1))
    count = len(run.events)
    plural = "" if count == 1 else "s"
    return f"Started {starts} time{'s' * (starts > 1)}; {count or 'no'} event{plural} in its log."


def _events(run: Run) -> list[tuple[str, str]]:
    """Return times and messages of events; of many, the first and the last ones."""
    events = run.events
    if len(events) <= MOST_EVENTS:
        return events
    half = MOST_EVENTS // 2
    left_out = f"... {len(events) - MOST_EVENTS} more in log.txt ..."
    return [*events[:half], ("", left_out), *events[-half:]]
