"""One self-contained HTML page about one run or several: the verdict first, then the curves.

    write([Path("runs/gpt2-124m")], Path("runs/gpt2-124m/report.html"), price=2.5)

The page loads nothing from the network, and all text of a run (samples, paths, messages) is
escaped, so a page can be sent to other people. Each `_..._section` returns one part of the page.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from anew.evaluate.published import size_of
from anew.model.flops import count_parameters
from anew.report import reference_runs as reference
from anew.report.run import Run
from anew.report.svg import Line, Whisker, line_chart, short, smoothed
from anew.utils.files import write_atomic

HERE = Path(__file__).parent
MOST_RUNS = 4  # page.css has distinguishable colours for so many
MOST_SAMPLES = 6
MOST_EVENTS = 40

Row = list[str]  # cells of a table, as HTML


def write(folders: Sequence[Path], out: Path, price: float | None = None) -> Path:
    """Write the page about these run folders to `out`. `price` is dollars an hour of one device."""
    text = page([Run.read(folder) for folder in folders], price)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, text, shared=True)
    return out


def page(runs: Sequence[Run], price: float | None = None) -> str:
    """Return the page as text."""
    css = (HERE / "page.css").read_text(encoding="utf-8")
    script = (HERE / "page.js").read_text(encoding="utf-8")
    title = escape(" and ".join(run.name for run in runs))
    body = "\n".join(_body(runs, title, price))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{css}</style></head><body>\n{body}\n"
        f"<script>{script}</script></body></html>\n"
    )


def _body(runs: Sequence[Run], title: str, price: float | None) -> Iterator[str]:
    first = runs[0]
    is_single = len(runs) == 1
    subtitle = escape(_description(first)) if is_single else f"{len(runs)} runs side by side"
    yield f'<h1>{title}</h1>\n<p class="soft">{subtitle}</p>'
    yield _verdict_section(runs)
    yield _facts_section(first, price) if is_single else _summary_table(runs)
    yield f"<h2>Loss</h2>\n<p>{_loss_text(runs)}</p>"
    yield f'<div class="charts wide">{_loss_chart(runs)}</div>'
    yield _tasks_section(runs)
    yield _training_section(runs)
    for run in runs:
        if run.samples:
            yield f"<h2>{_prefix(run, runs)}Samples</h2>{_samples_section(run)}"
    if is_single and size_of(first.config.model) == "124M":
        yield _public_runs_section()
    for run in runs:
        yield f"<h2>{_prefix(run, runs)}Events</h2>{_events_section(run)}"
        yield _settings_section(run)
    yield (
        "<footer>Written by <code>anew report</code> from the run folder. "
        "This page loads nothing from the network.</footer>"
    )


def _prefix(run: Run, runs: Sequence[Run]) -> str:
    """Return the name of a run for a text about it, as HTML; empty if there is only one run."""
    return f"{escape(run.name)}: " if len(runs) > 1 else ""


def _unit(runs: Sequence[Run]) -> str:
    """Return what a loss is a mean over: byte, token, or both."""
    return " or ".join(sorted({run.config.data.unit for run in runs}))


def _description(run: Run) -> str:
    """Return model, data and tokenizer of a run in one phrase."""
    model, data = run.config.model, run.config.data
    size = size_of(model)
    shape = (
        f"GPT-2 {size}" if size else f"GPT-2 with {model.n_layer} layers of width {model.n_embd}"
    )
    tokenizer = data.tokenizer.partition(":")[0]
    tokens = f"{tokenizer}'s tokens"
    if tokenizer == "bytes":
        tokens = "bytes"
    elif tokenizer == "train":
        tokens = f"{model.vocab_size:,} tokens learnt from it"
    elif tokenizer == "gpt2":
        tokens = "GPT-2's tokens"
    parameters = short(count_parameters(model))
    return f"{shape}, {parameters} parameters, trained on {data.data} as {tokens}"


# Verdict


@dataclass(frozen=True)
class Figure:
    """A figure of a run beside its reference. `verdict` is PASS, FAIL or empty."""

    name: str
    ours: float
    reference: str
    theirs: float
    verdict: str


def _figures(run: Run) -> Iterator[Figure]:
    """Yield all figures of a run that have a reference."""
    if run.baseline and run.final_loss is not None:
        theirs = float(run.baseline["loss"])
        verdict = ""
        if run.status == "complete" and run.final_loss_is_fp32:
            verdict = "PASS" if run.final_loss <= theirs else "FAIL"
        source = f"{run.baseline['model']} on the same windows; lower is better"
        yield Figure("validation loss", run.final_loss, source, theirs, verdict)
    for comparison in run.comparisons():
        published = comparison.published
        note = f"; {published.note}" if published.note else ""
        source = f"OpenAI's GPT-2: {published.source}{note}"
        name = f"{published.task} {published.figure}"
        yield Figure(name, comparison.ours, source, comparison.theirs, comparison.verdict)


def _verdict_section(runs: Sequence[Run]) -> str:
    """Return the verdict, the table of figures behind it, and why a verdict is missing."""
    rows = []
    verdicts = []
    for run in runs:
        for figure in _figures(run):
            verdict = figure.verdict or "context"
            rows.append(
                [
                    _prefix(run, runs) + escape(figure.name),
                    f"{figure.ours:.4f}",
                    escape(figure.reference),
                    f"{figure.theirs:.4f}",
                    f'<span class="{figure.verdict.lower()}"><b>{verdict}</b></span>',
                ]
            )
            if figure.verdict:
                verdicts.append(figure.verdict)
    state = ""
    head = "".join(f"<strong>{_prefix(run, runs)}{_state_text(run)}</strong><br>" for run in runs)
    if verdicts:
        passed = verdicts.count("PASS")
        state = "pass" if passed == len(verdicts) else "fail"
        head = (
            f'<strong><b class="{state}">{state.upper()}</b> {passed} of {len(verdicts)} figures '
            "are as good as their reference or better, within the tolerance</strong>"
        )
    titles = ["figure", "this run", "reference", "its value", "verdict"]
    table = _table(titles, rows) if rows else ""
    reasons = "".join(
        f"<p><small>{_prefix(run, runs)}{_no_baseline_text(run)}</small></p>"
        for run in runs
        if not run.baseline
    )
    return f'<section class="verdict {state}">{head}{table}{reasons}</section>'


def _state_text(run: Run) -> str:
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


def _no_baseline_text(run: Run) -> str:
    if size_of(run.config.model) is None:
        return (
            "There are no figures of OpenAI's GPT-2 to compare with: "
            "this model has another shape or other tokens."
        )
    return (
        "A verdict on the loss needs OpenAI's weights, scored on this run's own validation "
        f"windows: <code>anew report {escape(str(run.folder))} --baseline gpt2</code>. "
        "Losses on other validation texts are shown below as context."
    )


# Facts


def _facts_section(run: Run, price: float | None) -> str:
    """Return the boxes with status, steps, tokens, time, speed and cost."""
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
    boxes = "".join(
        f"<div><dl><dt>{escape(name)}</dt><dd>{escape(value)}</dd></dl></div>"
        for name, value in facts.items()
    )
    return f'<div class="facts">{boxes}</div>'


def _median(run: Run, key: str) -> float:
    values = sorted(value for _, value in run.points(key))
    return values[len(values) // 2]


def _time(seconds: float) -> str:
    """Return a time in seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _summary_table(runs: Sequence[Run]) -> str:
    """Return one line for each of several runs."""
    rows = []
    for run in runs:
        loss = "not scored" if run.final_loss is None else f"{run.final_loss:.4f}"
        rows.append(
            [
                escape(run.name),
                escape(_description(run)),
                f"{run.last['step']:,} of {run.config.run.steps:,}",
                short(run.last["tokens"]),
                loss,
                _time(run.last["seconds"]),
            ]
        )
    return _table(["run", "model", "steps", "tokens", "validation loss", "time"], rows)


# Charts


def _loss_text(runs: Sequence[Run]) -> str:
    """Return the explanation of the chart of losses."""
    text = (
        f"Mean cross-entropy in nats per {_unit(runs)}. The thin line is the loss of each training "
        "batch; the thick lines are its moving mean and the loss on held-out text."
    )
    data = reference.data_of(runs[0].config)
    if data and size_of(runs[0].config.model) == "124M":
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
        prefix = f"{run.name}: " if len(runs) > 1 else ""
        batches = run.points("train/loss")
        validation = run.points("val/loss")
        lines.append(Line(f"{prefix}each batch", batches, f"faint-{i}"))
        lines.append(Line(f"{prefix}training", smoothed(batches), f"own-{i}"))
        kind = "own-2" if len(runs) == 1 else f"own-{i}"
        lines.append(Line(f"{prefix}validation", validation, kind))
        projection = _projection(run)
        if projection:
            end = f"{projection.value:.3f} ± {projection.plus_minus:.3f}"
            name = f"{prefix}expected at 10B tokens: {end}"
            whiskers.append(_whisker(name, projection, validation[-1]))
    is_projected = bool(whiskers)
    own_end = max((x for line in lines for x, _ in line.points), default=math.inf)
    lines += _reference_lines(runs[0], math.inf if is_projected else own_end)
    unit = f"nats per {_unit(runs)}"
    return line_chart("Loss", lines, unit, whiskers=whiskers, skip_start=True, wide=True)


def _reference_lines(run: Run, end: float) -> list[Line]:
    """Return public curves on the same text up to `end`, and the level of GPT-2 or the baseline."""
    lines = []
    data = reference.data_of(run.config)
    if data and size_of(run.config.model) == "124M":
        curves = [curve for curve in reference.CURVES if curve.data == data]
        for i, curve in enumerate(curves, start=1):
            points = [point for point in curve.losses if 0 < point[0] <= end]
            lines.append(Line(curve.name, points, f"context-{i}"))
        loss, _ = reference.BASELINES[data]
        if not run.baseline:
            lines.append(_level(f"OpenAI's GPT-2 124M, {loss}", loss))
    if run.baseline:
        loss = float(run.baseline["loss"])
        lines.append(_level(f"{run.baseline['model']} on the same windows, {loss:.4f}", loss))
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


def _tasks_section(runs: Sequence[Run]) -> str:
    """Return a chart for each task of the first run; empty if it has none."""
    tasks = runs[0].tasks
    if not tasks:
        return ""
    charts = "".join(_task_chart(runs, task, tasks[task], len(tasks) == 1) for task in tasks)
    wide = " wide" if len(tasks) == 1 else ""
    return (
        "<h2>Tasks</h2><p>Scored during training, each with the protocol of its publication.</p>"
        f'<div class="charts{wide}">{charts}</div>'
    )


def _task_chart(runs: Sequence[Run], task: str, figures: Sequence[str], wide: bool) -> str:
    """Return the chart of one task's main figure."""
    preferred = [figure for figure in ("acc_norm", "acc") if figure in figures]
    figure = preferred[0] if preferred else figures[0]
    lines = _lines_of(runs, f"eval/{task}/{figure}")
    whiskers = []
    if task == "hellaswag" and figure == "acc_norm":
        size = size_of(runs[0].config.model)
        for name, value in reference.hellaswag_levels(size):
            lines.append(_level(f"{name}, {100 * value:g}%", value))
        if size == "124M":
            curves = [curve for curve in reference.CURVES if curve.hellaswag]
            for i, curve in enumerate(curves, start=1):
                points = [point for point in curve.hellaswag if point[0] > 0]
                lines.append(Line(curve.name, points, f"context-{i}"))
        whiskers = _hellaswag_whisker(runs[0])
    is_share = "acc" in figure
    unit = "share of correct answers" if is_share else figure
    return line_chart(
        f"{task} {figure}", lines, unit, whiskers=whiskers, percent=is_share, wide=wide
    )


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


def _training_section(runs: Sequence[Run]) -> str:
    """Return the charts of learning rate, gradient norm and speed."""
    rates = _lines_of(runs, "train/lr")
    norms = _lines_of(runs, "train/grad_norm")
    speeds = _lines_of(runs, "speed/tokens_per_second")
    mfu = _lines_of(runs, "speed/mfu")
    charts = [
        line_chart("Learning rate", rates, "warm-up and decay"),
        line_chart("Gradient norm", norms, "before clipping", skip_start=True),
        line_chart("Speed", speeds, "tokens per second"),
        line_chart("MFU", mfu, "share of the device's peak", percent=True),
    ]
    return f'<h2>Training</h2><div class="charts">{"".join(charts)}</div>'


# Samples, public runs, events and settings


def _samples_section(run: Run) -> str:
    """Return at most six samples, spread over the run."""
    samples = run.samples
    if len(samples) > MOST_SAMPLES:
        last = len(samples) - 1
        places = [round(i * last / (MOST_SAMPLES - 1)) for i in range(MOST_SAMPLES)]
        samples = [samples[place] for place in places]
    articles = "".join(
        f"<article><h3>step {sample['step']:,}</h3>"
        f'<pre><span class="prompt">{escape(sample["prompt"])}</span>'
        f"{escape(sample['text'])}</pre></article>"
        for sample in samples
    )
    return f'<div class="samples">{articles}</div>'


def _public_runs_section() -> str:
    """Return the table of public runs and of OpenAI's GPT-2, with sources."""
    rows = []
    for curve in reference.CURVES:
        tokens, loss = curve.losses[-1]
        note = "" if curve.is_gpt2 else "another architecture"
        cells = [curve.name, curve.data, f"{loss:.4f}", short(tokens), note, curve.source]
        rows.append([escape(cell) for cell in cells])
    for data, (loss, source) in reference.BASELINES.items():
        cells = ["OpenAI's GPT-2 124M", data, f"{loss:.4f}", "", "", source]
        rows.append([escape(cell) for cell in cells])
    titles = ["run", "text", "validation loss", "tokens", "", "source"]
    return (
        "<h2>Public runs</h2><p>These losses are context and not a comparison: each is on the "
        "run's own validation text, and losses on different texts do not compare.</p>"
        f"{_table(titles, rows)}"
    )


def _events_section(run: Run) -> str:
    """Return warnings, errors, stops and resumes; of many, the first and the last ones."""
    starts = int(run.state.get("starts", 1))
    events = run.events
    plural = "" if len(events) == 1 else "s"
    text = (
        f"<p>Started {starts} time{'s' * (starts > 1)}; "
        f"{len(events) or 'no'} event{plural} in its log.</p>"
    )
    if not events:
        return text
    if len(events) > MOST_EVENTS:
        half = MOST_EVENTS // 2
        left_out = f"... {len(events) - MOST_EVENTS} more in log.txt ..."
        events = [*events[:half], ("", left_out), *events[-half:]]
    rows = [[escape(time), escape(message)] for time, message in events]
    return text + _table(["time", "message"], rows)


def _settings_section(run: Run) -> str:
    """Return the environment and all settings, folded."""
    environment = run.state.get("environment", {})
    groups = {name.replace("_", " "): value for name, value in environment.items()}
    found = [_folded("Environment", groups)] if groups else []
    config = run.config
    for name, group in (
        ("model", config.model),
        ("data", config.data),
        ("optimizer", config.optim),
        ("run", config.run),
    ):
        found.append(_folded(f"Settings: {name}", dataclasses.asdict(group)))
    return "".join(found)


def _folded(title: str, values: dict[str, object]) -> str:
    items = "".join(
        f"<div>{escape(name)}: {escape(str(value))}</div>" for name, value in values.items()
    )
    summary = f"<summary>{escape(title)}</summary>"
    return f'<details>{summary}<div class="columns">{items}</div></details>'


def _table(titles: Row, rows: Sequence[Row]) -> str:
    """Return a table. The cells are HTML already."""
    head = "".join(f"<th>{cell}</th>" for cell in titles)
    body = ""
    for row in rows:
        cells = "".join(f"<td>{cell}</td>" for cell in row)
        body += f"<tr>{cells}</tr>"
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
