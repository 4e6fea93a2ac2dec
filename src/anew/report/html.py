"""One self-contained HTML page about one run or several: verdict first, then how it came about.

    write([Path("runs/gpt2-124m")], Path("runs/gpt2-124m/report.html"), price=2.5)

Nothing is fetched when it is opened, and all text of a run (samples, paths, messages) is escaped: a page may be mailed.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from anew.evaluate.published import size_of
from anew.model.flops import count_parameters
from anew.report import reference_runs as reference
from anew.report.run import Run
from anew.report.svg import Line, Points, Whisker, line_chart, short, smoothed
from anew.utils.files import write_atomic

HERE = Path(__file__).parent
MOST_RUNS = 4  # colours that can be told apart


def write(folders: Sequence[Path], out: Path, price: float | None = None) -> Path:
    """The page about these runs at `out`, replaced as a whole. `price`: dollars an hour of one device."""
    text = page([Run.read(folder) for folder in folders], price)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, text)
    return out


def page(runs: Sequence[Run], price: float | None = None) -> str:
    """The page as text."""
    css, script = ((HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    title = " and ".join(run.name for run in runs)
    body = "\n".join(_body(runs, price))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{css}</style></head><body>\n{body}\n<script>{script}</script></body></html>\n"
    )


def _body(runs: Sequence[Run], price: float | None) -> Iterator[str]:
    first = runs[0]
    yield f"<h1>{escape(' and '.join(run.name for run in runs))}</h1>"
    yield f'<p class="soft">{escape(_subtitle(first)) if len(runs) == 1 else f"{len(runs)} runs side by side"}</p>'
    yield _verdict(runs)
    if len(runs) == 1:
        yield _facts(first, price)
    else:
        yield _table(
            ["run", "model", "steps", "tokens", "validation loss", "time"],
            [_summary(run) for run in runs],
        )
    yield "<h2>Loss</h2>"
    yield f"<p>{_loss_words(runs)}</p>"
    yield f'<div class="charts wide">{_loss_chart(runs)}</div>'
    if scored := _task_charts(runs):
        wide = " wide" if len(first.tasks) == 1 else ""
        yield f'<h2>Tasks</h2><p>Scored while training, each as its own publication does.</p><div class="charts{wide}">{scored}</div>'
    yield '<h2>How training went</h2><div class="charts">'
    yield from _process_charts(runs)
    yield "</div>"
    for run in runs:
        if run.samples:
            yield f"<h2>What it wrote{'' if len(runs) == 1 else ': ' + escape(run.name)}</h2>{_samples(run)}"
    if len(runs) == 1 and (context := _context(first)):
        yield context
    for run in runs:
        yield f"<h2>Events{'' if len(runs) == 1 else ': ' + escape(run.name)}</h2>{_events(run)}"
        yield _settings(run)
    yield "<footer>Made by <code>anew report</code> from the run folder. Opening it fetches nothing.</footer>"


def _subtitle(run: Run) -> str:
    size = size_of(run.config.model)
    m = run.config.model
    shape = f"GPT-2 {size}" if size else f"GPT-2 with {m.n_layer} layers of {m.n_embd}"
    kind = run.config.data.tokenizer.partition(":")[0]
    tokens = {
        "bytes": "bytes",
        "train": f"{m.vocab_size:,} tokens learnt from it",
        "gpt2": "GPT-2's tokens",
    }.get(kind, f"{kind}'s tokens")
    return (
        f"{shape}, {short(count_parameters(m))} parameters, on {run.config.data.data} as {tokens}"
    )


def _unit(*runs: Run) -> str:
    return " or ".join(sorted({run.config.data.unit for run in runs}))


def _verdict(runs: Sequence[Run]) -> str:
    """What can be said in one look, and no more than that."""
    rows = [(run, *row) for run in runs for row in _compared(run)]
    judged = [row[5] for row in rows if row[5]]
    if judged:
        good = judged.count("PASS")
        state = "pass" if good == len(judged) else "fail"
        words = f"{good} of {len(judged)} figures are not worse than what they are compared with, within the tolerance"
        head = f'<strong><b class="{state}">{state.upper()}</b> {words}</strong>'
    else:
        state, head = (
            "",
            "".join(
                f"<strong>{_name(run, runs)}{_without_verdict(run)}</strong><br>" for run in runs
            ),
        )
    cells = [
        [_name(run, runs) + escape(name), f"{ours:.4f}", escape(f"{other}{'; ' + note if note else ''}"), f"{theirs:.4f}",
         f'<span class="{verdict.lower()}"><b>{verdict or "context"}</b></span>']
        for run, name, ours, other, theirs, verdict, note in rows
    ]  # fmt: skip
    table = _table(["figure", "here", "compared with", "there", "verdict"], cells) if rows else ""
    why = "".join(
        f"<p><small>{_name(run, runs)}{_why_no_baseline(run)}</small></p>"
        for run in runs
        if not run.baseline
    )
    return f'<section class="verdict {state}">{head}{table}{why}</section>'


def _name(run: Run, runs: Sequence[Run]) -> str:
    return f"{escape(run.name)}: " if len(runs) > 1 else ""


def _compared(run: Run) -> list[tuple[str, float, str, float, str, str]]:
    """(figure, here, compared with, there, PASS or FAIL or nothing, note) of all that has something beside it."""
    rows = []
    final = run.final_loss
    if run.baseline and final:
        theirs = float(run.baseline["loss"])
        same = run.status == "complete" and final[1] == "fp32"
        verdict = ("PASS" if final[0] <= theirs else "FAIL") if same else ""
        rows.append(
            (
                "validation loss",
                final[0],
                f"{run.baseline['model']} on the same windows",
                theirs,
                verdict,
                "lower is better",
            )
        )
    for c in run.comparisons():
        name = f"{c.published.task} {c.published.figure}"
        rows.append(
            (
                name,
                c.ours,
                f"OpenAI's GPT-2: {c.published.source}",
                c.theirs,
                c.verdict,
                c.published.note,
            )
        )
    return rows


def _without_verdict(run: Run) -> str:
    final, chance = run.final_loss, math.log(run.config.model.vocab_size)
    if run.config.data.one_batch:
        return f"One batch, {run.last['step']:,} times: its loss is {run.train_loss}; a model that can learn gets it near 0"
    if final is None:
        where = f"Step {run.last['step']:,} of {run.config.run.steps:,}"
        return f"{where}: training loss {run.train_loss}, nothing held out was scored yet"
    unit = _unit(run)
    return (
        f"{final[0]:.3f} nats a {unit} on held-out text: as unsure as between {math.exp(final[0]):,.3g} {unit}s "
        f"(knowing nothing is {chance:.2f}, all {run.config.model.vocab_size:,})"
    )


def _why_no_baseline(run: Run) -> str:
    if size_of(run.config.model) is None:
        return "No figure of OpenAI's GPT-2 belongs beside this one: the model has another shape or other tokens."
    return (
        "A verdict on the loss needs OpenAI's weights, scored on this run's own validation windows: <code>anew report "
        f"{escape(str(run.folder))} --baseline gpt2</code>. Losses from other people's validation text are shown below as context."
    )


def _facts(run: Run, price: float | None) -> str:
    last, r = run.last, run.config.run
    ranks = int(run.state.get("environment", {}).get("ranks", 1))
    hours = last["seconds"] / 3600
    steady = [row for row in run.rows if "speed/tokens_per_second" in row]
    speeds = sorted(row["speed/tokens_per_second"] for row in steady)
    mfu = sorted(row["speed/mfu"] for row in steady)
    facts = [
        (
            "status",
            run.status
            if run.status != "running"
            else f"running, {100 * last['step'] / r.steps:.0f}% done",
        ),
        ("steps", f"{last['step']:,} of {r.steps:,}"),
        ("tokens", short(last["tokens"])),
        ("time of training", _time(last["seconds"])),
        ("tokens a second", f"{speeds[len(speeds) // 2]:,.0f}"),
        ("MFU", f"{100 * mfu[len(mfu) // 2]:.0f}%"),
    ]
    if run.final_loss:
        facts.insert(0, ("validation loss", f"{run.final_loss[0]:.4f}"))
    if last["step"] < r.steps:
        facts.append(
            ("time left, about", _time(last["seconds"] / last["step"] * (r.steps - last["step"])))
        )
    if price is not None:
        facts.append((f"cost at ${price:g} an hour", f"${hours * ranks * price:,.2f}"))
    cells = "".join(
        f"<div><dl><dt>{escape(name)}</dt><dd>{escape(value)}</dd></dl></div>"
        for name, value in facts
    )
    return f'<div class="facts">{cells}</div>'


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _summary(run: Run) -> list[str]:
    final = f"{run.final_loss[0]:.4f}" if run.final_loss else "not scored"
    return [escape(run.name), escape(_subtitle(run)), f"{run.last['step']:,} of {run.config.run.steps:,}", short(run.last["tokens"]), final,
            _time(run.last["seconds"])]  # fmt: skip


def _loss_words(runs: Sequence[Run]) -> str:
    run = runs[0]
    data = reference.data_of(run.config)
    words = (
        f"Mean cross-entropy in nats a {_unit(*runs)}: the thin line is the training batch of each step, the thick ones are means and "
        "held-out text."
    )
    if data and size_of(run.config.model) == "124M":
        words += (
            f" Grey lines are public runs on {data}, each on its own validation text; the dashed level is OpenAI's GPT-2 124M "
            + (
                "on this run's own windows."
                if run.baseline
                else f"there, measured by {reference.BASELINES[data][1]}."
            )
        )
    return words


def _loss_chart(runs: Sequence[Run]) -> str:
    lines: list[Line] = []
    whiskers: list[Whisker] = []
    for i, run in enumerate(runs, start=1):
        prefix = "" if len(runs) == 1 else f"{run.name}: "
        train, val = run.points("train/loss"), run.points("val/loss")
        lines.append(Line(f"{prefix}each batch", train, f"faint-{i}"))
        lines.append(Line(f"{prefix}training", smoothed(train), f"own-{i}"))
        if val:
            lines.append(Line(f"{prefix}validation", val, f"own-{i + 1 if len(runs) == 1 else i}"))
        projection = (
            reference.project(val)
            if reference.is_like_them(run.config) and run.status != "complete"
            else None
        )
        if projection:
            name = f"{prefix}expected at 10B tokens: {projection.value:.3f} ± {projection.plus_minus:.3f}"
            whiskers.append(
                Whisker(name, reference.HORIZON, projection.value, projection.plus_minus, val[-1])
            )
    data, size = reference.data_of(runs[0].config), size_of(runs[0].config.model)
    if data and size == "124M":
        reach = (
            max((x for line in lines for x, _ in line.points), default=math.inf)
            if not whiskers
            else math.inf
        )
        curves = [c for c in reference.CURVES if c.data == data]
        lines += [
            Line(c.name, [p for p in c.losses if 0 < p[0] <= reach], f"context-{n}")
            for n, c in enumerate(curves, start=1)
        ]
        if not runs[0].baseline:
            lines.append(
                Line(
                    f"OpenAI's GPT-2 124M, {reference.BASELINES[data][0]}",
                    [(0.0, reference.BASELINES[data][0])],
                    "level",
                )
            )
    if runs[0].baseline:
        theirs = float(runs[0].baseline["loss"])
        lines.append(
            Line(
                f"{runs[0].baseline['model']} on the same windows, {theirs:.4f}",
                [(0.0, theirs)],
                "level",
            )
        )
    return line_chart(
        "Loss", lines, f"nats a {_unit(*runs)}", whiskers=whiskers, settled=True, wide=True
    )


def _task_charts(runs: Sequence[Run]) -> str:
    charts: list[str] = []
    for task, figures in runs[0].tasks.items():
        figure = next((f for f in ("acc_norm", "acc") if f in figures), figures[0])
        key = f"eval/{task}/{figure}"
        lines = [
            Line(run.name if len(runs) > 1 else "this run", run.points(key), f"own-{i}")
            for i, run in enumerate(runs, 1)
        ]
        whiskers = []
        if task == "hellaswag" and figure == "acc_norm":
            size = size_of(runs[0].config.model)
            lines += [
                Line(f"{name}, {100 * value:g}%", [(0.0, value)], "level")
                for name, value in reference.hellaswag_levels(size)
            ]
            if size == "124M":
                curves = [c for c in reference.CURVES if c.hellaswag]
                lines += [
                    Line(c.name, [p for p in c.hellaswag if p[0] > 0], f"context-{n}")
                    for n, c in enumerate(curves, start=1)
                ]
            whiskers = _hellaswag_whisker(runs[0])
        charts.append(
            line_chart(
                f"{task} {figure}", lines, "share right" if "acc" in figure else figure,
                whiskers=whiskers, percent="acc" in figure, wide=len(runs[0].tasks) == 1,
            )
        )  # fmt: skip
    return "".join(charts)


def _hellaswag_whisker(run: Run) -> list[Whisker]:
    loss = (
        reference.project(run.points("val/loss"))
        if reference.is_like_them(run.config) and run.status != "complete"
        else None
    )
    found = (
        reference.project_hellaswag(
            run.points("eval/hellaswag/acc_norm"), run.points("val/loss"), loss
        )
        if loss
        else None
    )
    if not found:
        return []
    name = f"expected at 10B tokens: {100 * found.value:.1f}% ± {100 * found.plus_minus:.1f}"
    return [
        Whisker(
            name,
            reference.HORIZON,
            found.value,
            found.plus_minus,
            run.points("eval/hellaswag/acc_norm")[-1],
        )
    ]


def _process_charts(runs: Sequence[Run]) -> Iterator[str]:
    def of(key: str, scale: float = 1.0) -> list[Line]:
        found: list[Points] = [[(x, y * scale) for x, y in run.points(key)] for run in runs]
        return [
            Line(run.name if len(runs) > 1 else "this run", points, f"own-{i}")
            for i, (run, points) in enumerate(zip(runs, found, strict=True), 1)
        ]

    yield line_chart("Learning rate", of("train/lr"), "warm-up, then down")
    yield line_chart("Gradient norm", of("train/grad_norm"), "before clipping", settled=True)
    yield line_chart("Speed", of("speed/tokens_per_second"), "tokens a second")
    yield line_chart("MFU", of("speed/mfu"), "share of the device's peak", percent=True)


def _samples(run: Run) -> str:
    samples = run.samples
    chosen = (
        samples
        if len(samples) <= 6
        else [samples[round(i * (len(samples) - 1) / 5)] for i in range(6)]
    )
    articles = "".join(
        f'<article><h3>step {s["step"]:,}</h3><pre><span class="prompt">{escape(s["prompt"])}</span>{escape(s["text"])}</pre></article>'
        for s in chosen
    )
    return f'<div class="samples">{articles}</div>'


def _context(run: Run) -> str:
    """Figures of other people's runs, said to be what they are."""
    if size_of(run.config.model) != "124M":
        return ""
    rows = [[escape(c.name), escape(c.data), f"{c.losses[-1][1]:.4f}", short(c.losses[-1][0]), "" if c.is_gpt2 else "another architecture",
             escape(c.source)] for c in reference.CURVES]  # fmt: skip
    rows += [
        ["OpenAI's GPT-2 124M", escape(data), f"{loss:.4f}", "", "", escape(source)]
        for data, (loss, source) in reference.BASELINES.items()
    ]
    return (
        "<h2>Other people's runs</h2><p>Context, not a comparison: each loss is on its own validation text, and losses on different text "
        f"do not compare.</p>{_table(['run', 'text', 'validation loss', 'tokens', '', 'source'], rows)}"
    )


def _events(run: Run) -> str:
    starts = int(run.state.get("starts", 1))
    events = run.events
    words = f"<p>Started {starts} time{'s' * (starts > 1)}; {len(events) or 'no'} event{'s' * (len(events) != 1)} in its log.</p>"
    if not events:
        return words
    shown = (
        events
        if len(events) <= 40
        else [*events[:20], ("", f"... {len(events) - 40} more in log.txt ..."), *events[-20:]]
    )
    return words + _table(["when", "what"], [[escape(when), escape(what)] for when, what in shown])


def _settings(run: Run) -> str:
    groups: dict[str, Any] = {
        "model": run.config.model,
        "data": run.config.data,
        "optimizer": run.config.optim,
        "run": run.config.run,
    }
    items = [
        f"<div>{escape(name.replace('_', ' '))}: {escape(str(value))}</div>"
        for name, value in run.state.get("environment", {}).items()
    ]
    found = (
        [
            f'<details><summary>Where it ran</summary><div class="columns">{"".join(items)}</div></details>'
        ]
        if items
        else []
    )
    for name, group in groups.items():
        items = [
            f"<div>{escape(f.name)}: {escape(str(getattr(group, f.name)))}</div>"
            for f in dataclasses.fields(group)
        ]
        found.append(
            f'<details><summary>Settings: {name}</summary><div class="columns">{"".join(items)}</div></details>'
        )
    return "".join(found)


def _table(head: list[str], rows: list[list[str]]) -> str:
    """Cells are HTML already."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
