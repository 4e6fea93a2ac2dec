"""`anew evaluate MODEL`: every task, beside what was published for GPT-2 of the same size."""

import json
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from anew.checkpoint import huggingface as weights
from anew.config.schema import Config
from anew.data.dataset import open_data
from anew.distributed import rendezvous as parallel
from anew.distributed.world import World
from anew.errors import UserError
from anew.evaluate import runner
from anew.evaluate.published import Comparison, compare, size_of
from anew.evaluate.tasks.corpora import Corpus
from anew.evaluate.tasks.table import REMOVED_TASKS, TASKS, Validation, with_stride
from anew.evaluate.tasks.task import Example, Task
from anew.model.gpt import GPT
from anew.tokenizer.bpe import Tokenizer
from anew.utils import device as runtime
from anew.utils.files import cache_folder

log = logging.getLogger("anew")


@dataclass(frozen=True)
class EvaluateArgs:
    """Measure a model, beside GPT-2's published figures. Example: anew evaluate gpt2 --task hellaswag,lambada --precision bf16"""

    model: Annotated[
        str,
        tyro.conf.Positional,
        tyro.conf.arg(help="a run, a checkpoint, a Hugging Face folder, a .pt file or a hub name"),
    ]
    task: Annotated[
        str,
        tyro.conf.arg(
            help=f"all, or some of val, {', '.join(TASKS)}, harness:NAME; separated by commas"
        ),
    ] = "all"
    file: Annotated[
        str, tyro.conf.arg(help="read the task's data from this file (val: from this data folder)")
    ] = ""
    limit: Annotated[int, tyro.conf.arg(help="only the first N examples of each task; 0: all")] = 0
    stride: Annotated[
        int,
        tyro.conf.arg(
            help="running text: predict N tokens a window behind full context; 0: whole windows"
        ),
    ] = 0
    against: Annotated[
        str, tyro.conf.arg(help="score this model too, on the same examples, e.g. gpt2")
    ] = ""
    precision: Annotated[
        Literal["auto", "fp32", "tf32", "bf16", "fp16"],
        tyro.conf.arg(help="fp32 for verdicts; bf16 is several times faster"),
    ] = "fp32"
    device: Annotated[
        Literal["auto", "cpu", "cuda", "mps", "xpu"],
        tyro.conf.arg(help="auto: the accelerator that torch finds, else cpu"),
    ] = "auto"
    fresh: Annotated[
        bool, tyro.conf.arg(help="score everything again, also what an earlier evaluation has kept")
    ] = False
    json: Annotated[
        bool, tyro.conf.arg(help="the last line of standard output is one JSON object")
    ] = False


@dataclass(frozen=True)
class Subject:
    """A model to evaluate and what identifies it."""

    name: str
    path: Path
    model: GPT
    tokenizer: Tokenizer
    sha256: str


def run_evaluate(argv: list[str]) -> None:
    """Measure a model on HellaSwag, LAMBADA, WikiText and more, beside GPT-2's published figures."""
    a = tyro.cli(EvaluateArgs, args=argv, prog="anew evaluate")
    names = _names(a)
    with parallel.joined() as world:
        device = runtime.pick_device(a.device)
        precision, _ = runtime.pick_precision(a.precision, device)
        torch.set_float32_matmul_precision(runtime.MATMUL[precision])
        subject = _subject(a.model, device, precision)
        against = _subject(a.against, device, precision) if a.against else None
        if against and against.tokenizer.name != subject.tokenizer.name:
            raise UserError(f"{a.against} has the tokenizer {against.tokenizer.name} and {a.model} has {subject.tokenizer.name}; figures a "
                            "token cannot be compared.")  # fmt: skip
        outcome: dict[str, Any] = {
            "model": a.model, "precision": precision, "device": device.type, "limit": a.limit, "stride": a.stride, "file": a.file,
            "tasks": {}, "against": {}, "comparisons": [], "not_run": {},
        }  # fmt: skip
        lines: list[list[str]] = []
        for name in names:
            if name.startswith("harness:"):
                from anew.evaluate.harness import run_harness  # lm-eval is an extra

                found = run_harness(
                    subject.model, subject.tokenizer, name.removeprefix("harness:"), a.limit, world
                )
                outcome["tasks"][name] = found
                lines += [
                    [name, figure, _show(value), "", "", ""] for figure, value in found.items()
                ]
                continue
            opened, problem = _open_everywhere(name, a, subject, against, world)
            if opened is None:
                if a.task != "all":
                    raise UserError(problem)
                outcome["not_run"][name] = problem
                continue
            task, examples = opened
            report = _report(task, examples, subject, precision, device, world, a.fresh)
            outcome["tasks"][name] = {**report.figures, "examples": report.examples}
            theirs = (
                _report(task, examples, against, precision, device, world, a.fresh)
                if against
                else None
            )
            if theirs:
                outcome["against"][name] = theirs.figures
            whole = precision == "fp32" and task.is_whole(examples)
            compared = compare(
                name, report.figures, size_of(subject.model.config), report.examples, whole
            )
            outcome["comparisons"] += [_as_json(c) for c in compared]
            lines += _lines(name, report, theirs, compared)
        if not outcome["tasks"]:
            raise UserError("no task could be run: " + " ".join(outcome["not_run"].values()))
        if world.rank == 0:
            _print(outcome, lines, size_of(subject.model.config), a.against)
            if a.json:
                print(json.dumps(outcome))
            _remember(subject, outcome)


def _names(a: EvaluateArgs) -> list[str]:
    """The tasks asked for; settings that none of them would heed are refused."""
    names = ["val", *TASKS] if a.task == "all" else [name for name in a.task.split(",") if name]
    for name in names:
        if name in REMOVED_TASKS:
            raise UserError(REMOVED_TASKS[name])
        if name not in {"val", *TASKS} and not name.startswith("harness:"):
            raise UserError(
                f"there is no task '{name}'; choose all, val, {', '.join(TASKS)} or harness:NAME."
            )
    if not names:
        raise UserError("--task names no task.")
    if a.limit < 0 or a.stride < 0:
        raise UserError("--limit and --stride must be 0 or above.")
    if a.file and len(names) > 1:
        raise UserError("--file is the data of one task; name that one with --task.")
    if a.stride and not any(isinstance(TASKS.get(name), Corpus) for name in names):
        raise UserError(
            f"--stride is for tasks of running text: {', '.join(n for n, t in TASKS.items() if isinstance(t, Corpus))}."
        )
    if any(name.startswith("harness:") for name in names) and (
        a.file or a.stride or a.against or a.fresh
    ):
        raise UserError(
            "tasks of the harness take neither --file, --stride, --against nor --fresh."
        )
    return names


def _subject(name: str, device: torch.device, precision: str) -> Subject:
    path = weights.find(name).resolve()
    model = weights.load_model(path, device, runtime.DTYPES[precision])
    return Subject(
        name, path, model, Tokenizer.of_model(path, model.config.vocab_size), weights.sha256(path)
    )


def _open_everywhere(
    name: str, a: EvaluateArgs, subject: Subject, against: Subject | None, world: World
) -> tuple[tuple[Task, list[Example]] | None, str]:
    """The task and its examples in every process, or in none, and why. Rank 0 goes first: what it fetches or prepares, the others find."""
    opened: tuple[Task, list[Example]] | None = None
    problem = ""
    for turn in (True, False):
        if turn == (world.rank == 0):
            try:
                opened = _open(name, a, subject, against)
            except UserError as error:
                problem = str(error)
        if problems := [p for p in world.gather(problem) if p]:
            return None, problems[0]
    return opened, ""


def _open(
    name: str, a: EvaluateArgs, subject: Subject, against: Subject | None
) -> tuple[Task, list[Example]]:
    """The task and its examples, which fit both models."""
    positions = min(s.model.config.n_positions for s in (subject, against or subject))
    if name == "val":
        task: Task = _validation(a.file, subject)
        path = Path()
    else:
        task = with_stride(TASKS[name], a.stride)
        path = task.fetch(a.file)
    return task, task.examples(path, subject.tokenizer, positions)[: a.limit or None]


def _validation(file: str, subject: Subject) -> Validation:
    """The validation split of the data folder `file`, else of what the model's run was trained on."""
    run = _run_of(subject.path)
    if not file and run is None:
        raise UserError(
            f"{subject.name} is not a run, so nobody knows its validation text; name a data folder with --task val --file DIR."
        )
    config = Config.read(run / "config.json") if run else Config()
    learnt = not file and config.data.tokenizer.startswith(
        "train:"
    )  # then the prepared text is found under that name
    folder = open_data(
        file or config.data.data, config.data.tokenizer if learnt else subject.tokenizer
    )
    if folder.tokenizer != subject.tokenizer.name:
        raise UserError(
            f"{folder.path} has the tokenizer {folder.tokenizer}, and {subject.name} has {subject.tokenizer.name}."
        )
    if not file and (subject.path / "trainer.json").is_file():
        trained_on = json.loads((subject.path / "trainer.json").read_text(encoding="utf-8"))[
            "data_revision"
        ]
        if trained_on != folder.identity:
            raise UserError(
                f"the text in {config.data.data} is no longer the one that {subject.name} was trained on."
            )
    return Validation(folder, config.data.seq_len, config.data.val_tokens)


def _run_of(path: Path) -> Path | None:
    """The run folder that a checkpoint stands in."""
    run = path.parent.parent
    return run if path.parent.name == "checkpoints" and (run / "config.json").is_file() else None


def _report(
    task: Task,
    examples: list[Example],
    subject: Subject,
    precision: str,
    device: torch.device,
    world: World,
    fresh: bool,
) -> runner.Report:
    kind = precision + " compiled" * runner.compile_blocks(subject.model, examples)
    store = (
        cache_folder()
        / "evaluations"
        / runner.key(task.name, subject.sha256, kind, device.type, examples)
    )
    if fresh and world.rank == 0:
        for path in store.glob("*.jsonl"):
            path.unlink()
    world.gather(None)  # nobody reads what rank 0 may be removing
    with _progress(f"{task.name} {subject.name}"[:30], world) as progress:
        report = runner.run(subject.model, task, examples, world, store, progress)
    if world.rank == 0:
        kept = report.examples - report.scored
        rate = f", {report.scored / report.seconds:.1f} a second" if report.scored else ""
        log.info(
            f"{task.name}: {report.examples:,} examples{rate}"
            + (f", {kept:,} of them kept from before" if kept else "")
        )
    return report


@contextmanager
def _progress(title: str, world: World) -> Iterator[runner.Progress | None]:
    """A bar on a terminal, a line every tenth elsewhere, nothing on other ranks."""
    if world.rank != 0:
        yield None
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(title)
            yield lambda done, total: bar.update(task, completed=done, total=total)
    else:
        tenth = 0

        def say(done: int, total: int) -> None:
            nonlocal tenth
            if 10 * done // total > tenth:
                tenth = 10 * done // total
                log.info(f"{title}: {done:,} of {total:,}")

        yield say


def _lines(
    name: str, report: runner.Report, theirs: runner.Report | None, compared: list[Comparison]
) -> list[list[str]]:
    published = {c.published.figure: c for c in compared}
    lines: list[list[str]] = []
    for figure, value in report.figures.items():
        if not isinstance(value, float):
            continue
        beside = theirs.figures[figure] if theirs else None
        c = published.get(figure)
        lines.append(
            [
                name if not lines else "",
                figure,
                _show(value),
                *([_show(beside)] if beside is not None else []),
                *([_show(c.theirs), f"{c.ours - c.theirs:+.4g}", c.verdict] if c else ["", "", ""]),
            ]
        )
    return lines


def _show(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 100 else f"{value:,.1f}"


def _as_json(c: Comparison) -> dict[str, Any]:
    return {
        "task": c.published.task,
        "figure": c.published.figure,
        "ours": c.ours,
        "published": c.theirs,
        "allowed": c.allowed,
        "verdict": c.verdict,
        "source": c.published.source,
        "note": c.published.note,
    }


def _print(outcome: dict[str, Any], lines: list[list[str]], size: str | None, against: str) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=False)
    table = Table(
        box=None,
        pad_edge=False,
        title=f"{outcome['model']}, {outcome['precision']} on {outcome['device']}",
        title_justify="left",
    )
    for heading in (
        "task",
        "figure",
        "here",
        *([against] if against else []),
        f"GPT-2 {size}" if size else "published",
        "differs",
        "",
    ):
        table.add_column(
            heading,
            justify="left" if heading in ("task", "figure", "") else "right",
            overflow="fold",
        )
    for line in lines:
        table.add_row(*line)
    console.print(table)
    for name, figures in outcome["tasks"].items():
        if "loss_by_position" in figures:
            by_position = "  ".join(
                f"{edge}+: {loss:.2f}" for edge, loss in figures["loss_by_position"].items()
            )
            console.print(f"{name}, loss by tokens seen: {by_position}")
    for comparison in outcome["comparisons"]:
        worse = comparison["allowed"]
        rule = f"passes if at most {worse:.3g} worse" if worse is not None else "no verdict"
        note = f"; {comparison['note']}" if comparison["note"] else ""
        console.print(
            f"{comparison['task']} {comparison['figure']}: {comparison['source']}; {rule}{note}."
        )
    if outcome["comparisons"] and not any(c["verdict"] for c in outcome["comparisons"]):
        console.print("Verdicts need --precision fp32 and the whole task as it was published.")
    if size is None:
        console.print("No GPT-2 of this shape was published, so there is nothing to pass or fail.")
    for name, reason in outcome["not_run"].items():
        console.print(f"{name} not run: {reason}")


def _remember(subject: Subject, outcome: dict[str, Any]) -> None:
    """A run keeps the evaluations of its checkpoints, for its model card and its report."""
    run, step = _run_of(subject.path), re.fullmatch(r"step-(\d+)", subject.path.name)
    if run is None or step is None:
        return
    with (run / "evaluations.jsonl").open("a", encoding="utf-8") as file:
        file.write(
            "\n" + json.dumps({"step": int(step[1]), **outcome})
        )  # behind what a killed writer may have left
