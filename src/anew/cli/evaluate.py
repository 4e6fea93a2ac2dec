"""`anew evaluate MODEL`: score a model in tasks, beside the published figures of GPT-2."""

import dataclasses
import json
import logging
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from anew.checkpoint import huggingface
from anew.cli.parse import ModelArgument, parse
from anew.cli.progress import progress_bar
from anew.cli.sample import Device, Precision, open_model
from anew.config.config import Config
from anew.data.dataset import open_data
from anew.distributed.rendezvous import joined
from anew.distributed.world import World
from anew.errors import UserError
from anew.evaluate.published import Comparison, compare, size_of
from anew.evaluate.runner import Report, compile_blocks, evaluation_key, run_task
from anew.evaluate.tasks.core import Core
from anew.evaluate.tasks.registry import TASKS, TASKS_OF_ALL, unknown_task
from anew.evaluate.tasks.task import Example, Task
from anew.evaluate.tasks.validation import Validation
from anew.evaluate.tasks.wikitext import WikiText
from anew.model.gpt import GPT
from anew.tokenizer.bpe import Tokenizer
from anew.utils.device import pick_device, pick_precision
from anew.utils.files import cache_folder, parse_json

log = logging.getLogger("anew")

HARNESS = "harness:"  # the prefix of tasks of lm-evaluation-harness
STRIDE_TASKS = [name for name, task in TASKS.items() if isinstance(task, WikiText)]


@dataclass(frozen=True)
class EvaluateArgs:
    """Score a model in tasks, beside the published figures of GPT-2.

    Example: anew evaluate gpt2 --task hellaswag,lambada --precision bf16
    """

    model: ModelArgument
    """a run, a checkpoint, a Hugging Face folder, a .pt file or a hub name"""
    task: str = "all"
    """all, or some of val, hellaswag, hellaswag_harness, lambada, wikitext2, wikitext103, core,
    core:NAME and harness:NAME, separated by commas; all: without core, which takes hours on a
    CPU"""
    file: str = ""
    """read the task's data from this file (val: from this data folder; core: from a zip archive or
    a folder)"""
    limit: int = 0
    """score only the first N examples of each task, and of each of the 22 in core; 0: all"""
    stride: int = 0
    """wikitext2, wikitext103: tokens predicted per window, with the rest of the positions for
    context; 0: as many as fit"""
    against: str = ""
    """score this model too, on the same examples, e.g. gpt2"""
    precision: Precision = "fp32"
    """verdicts need fp32; bf16 is several times faster"""
    device: Device = "auto"
    """auto: the accelerator that torch finds, else cpu"""
    fresh: bool = False
    """score all examples again; do not use results of earlier evaluations"""
    json: bool = False
    """print one JSON object as the last line of standard output"""


@dataclass(frozen=True)
class Subject:
    """A model to evaluate."""

    name: str
    path: Path
    model: GPT
    tokenizer: Tokenizer
    sha256: str


@dataclass(frozen=True)
class Evaluation:
    """One evaluation: its settings, its models and what it has found."""

    args: EvaluateArgs
    world: World
    device: torch.device
    precision: str
    subject: Subject
    against: Subject | None
    outcome: dict[str, Any]  # what --json prints
    table_rows: list[list[str]]

    @property
    def size(self) -> str | None:
        """Return which of GPT-2's sizes the model has, such as "124M", or None."""
        return size_of(self.subject.model.config)


def run_evaluate(argv: list[str]) -> None:
    """Score a model in HellaSwag, LAMBADA and WikiText, beside GPT-2's published figures."""
    args = parse(EvaluateArgs, argv, "evaluate")
    names = _task_names(args)
    with joined() as world:
        evaluation = _open_models(args, world)
        for name in names:
            if name.startswith(HARNESS):
                _run_harness_task(evaluation, name)
            else:
                _run_task(evaluation, name)
        outcome = evaluation.outcome
        if not outcome["tasks"]:
            raise UserError("no task could be run: " + " ".join(outcome["not_run"].values()))
        if world.rank == 0:
            _print(evaluation)
            if args.json:
                print(json.dumps(outcome))
            _append_to_run(evaluation)
            _report_missing_tasks(list(outcome["not_run"]))


def _report_missing_tasks(names: list[str]) -> None:
    """End with exit code 1 if a task that was asked for has no figures.

    The validation text of a model without a run is not known, so `val` is not missed.
    """
    missing = [name for name in names if name != "val"]
    if missing:
        print(f"anew: no figures of {', '.join(missing)}; see above.", file=sys.stderr)
        sys.exit(1)


def _task_names(args: EvaluateArgs) -> list[str]:
    """Return the tasks asked for. Flags that none of them uses are refused."""
    names = [name for name in args.task.split(",") if name]
    if args.task == "all":
        names = ["val", *TASKS_OF_ALL]
    for name in names:
        if name != "val" and name not in TASKS and not name.startswith(HARNESS):
            raise unknown_task(name, ["all", "val", *TASKS, "harness:NAME"])
    if not names:
        raise UserError("--task names no task.")
    if args.limit < 0 or args.stride < 0:
        raise UserError("--limit and --stride must be 0 or above.")
    if args.file and len(names) > 1:
        raise UserError("--file is the data of one task; name that one with --task.")
    if args.stride and not set(names) & set(STRIDE_TASKS):
        raise UserError(f"--stride is for tasks of running text: {', '.join(STRIDE_TASKS)}.")
    has_harness_task = any(name.startswith(HARNESS) for name in names)
    if has_harness_task and (args.file or args.stride or args.against or args.fresh):
        raise UserError(
            "tasks of the harness take neither --file, --stride, --against nor --fresh."
        )
    return names


def _open_models(args: EvaluateArgs, world: World) -> Evaluation:
    """Load the models onto the device."""
    device = pick_device(args.device)
    precision, _ = pick_precision(args.precision, device)
    subject = _load(args, args.model)
    against = _load(args, args.against) if args.against else None
    if against is not None and against.tokenizer.name != subject.tokenizer.name:
        raise UserError(
            f"{args.against} has the tokenizer {against.tokenizer.name} and {args.model} has "
            f"{subject.tokenizer.name}; figures per token cannot be compared."
        )
    outcome = {
        "model": args.model,
        "precision": precision,
        "device": device.type,
        "limit": args.limit,
        "stride": args.stride,
        "file": args.file,
        "tasks": {},
        "against": {},
        "comparisons": [],
        "not_run": {},
        "partial": {},
    }
    return Evaluation(args, world, device, precision, subject, against, outcome, table_rows=[])


def _load(args: EvaluateArgs, name: str) -> Subject:
    path = huggingface.find_model(name).resolve()
    model, tokenizer = open_model(path, args.device, args.precision)
    return Subject(name, path, model, tokenizer, huggingface.model_sha256(path))


def _run_harness_task(evaluation: Evaluation, name: str) -> None:
    """Run a task of lm-evaluation-harness and record its figures."""
    from anew.evaluate.harness import run_harness  # needs an optional package

    figures = run_harness(
        evaluation.subject.model,
        evaluation.subject.tokenizer,
        name.removeprefix(HARNESS),
        evaluation.args.limit,
        evaluation.world,
    )
    evaluation.outcome["tasks"][name] = figures
    for figure, value in figures.items():
        evaluation.table_rows.append([name, figure, _format(value), "", "", ""])


def _run_task(evaluation: Evaluation, name: str) -> None:
    """Run a task and record its figures, or why it cannot be run if all tasks are asked for."""
    outcome = evaluation.outcome
    try:
        # Rank 0 opens the task first, so that the other ranks find what it downloads or prepares.
        task, examples = evaluation.world.run_on_all_ranks(
            lambda: _open_task(evaluation, name), lambda world: world.rank == 0
        )
    except UserError as error:
        if evaluation.args.task != "all":
            raise
        outcome["not_run"][name] = str(error)
        return
    if isinstance(task, Core) and task.missing(examples):
        outcome["partial"][name] = task.missing(examples)
    report = _score(evaluation, evaluation.subject, task, examples)
    outcome["tasks"][name] = {**report.figures, "examples": report.examples}
    against_figures = None
    if evaluation.against is not None:
        against_figures = _score(evaluation, evaluation.against, task, examples).figures
        outcome["against"][name] = against_figures
    is_whole = evaluation.precision == "fp32" and task.is_whole(examples)
    comparisons = compare(name, report.figures, evaluation.size, report.examples, is_whole)
    outcome["comparisons"] += [_as_json(comparison) for comparison in comparisons]
    evaluation.table_rows.extend(_table_rows(name, report.figures, against_figures, comparisons))


def _open_task(evaluation: Evaluation, name: str) -> tuple[Task, list[Example]]:
    """Return the task and its examples, which fit both models."""
    args = evaluation.args
    n_positions = evaluation.subject.model.config.n_positions
    if evaluation.against is not None:
        n_positions = min(n_positions, evaluation.against.model.config.n_positions)
    path = Path()
    if name == "val":
        task: Task = _open_validation(args.file, evaluation.subject)
    else:
        task = TASKS[name]
        path = task.fetch(args.file)
        if isinstance(task, WikiText):
            task = dataclasses.replace(task, stride=args.stride)
    examples = task.examples(path, evaluation.subject.tokenizer, n_positions, args.limit)
    return task, examples


def _open_validation(file: str, subject: Subject) -> Validation:
    """Return the validation split of the data folder `file`, or of the data of the model's run."""
    run_folder = _run_folder(subject.path)
    if not file and run_folder is None:
        raise UserError(
            f"{subject.name} is not a checkpoint of a run, so its validation text is not known; "
            "name a data folder with --task val --file DIR."
        )
    config = Config.read(run_folder / "config.json") if run_folder else Config()
    data = config.data
    tokenizer: str | Tokenizer = subject.tokenizer
    if not file and data.tokenizer.startswith("train:"):
        # Data for a learned tokenizer is prepared, and found again, under this setting.
        tokenizer = data.tokenizer
    if file:  # texts or conversations
        folder = open_data(file, tokenizer, model=subject.name, conversations=None)
    else:
        folder = open_data(data.data, tokenizer, model=subject.name, **data.reading)
    if folder.tokenizer != subject.tokenizer.name:
        raise UserError(
            f"{folder.path} has the tokenizer {folder.tokenizer}, and {subject.name} has "
            f"{subject.tokenizer.name}; give data that was prepared for that one."
        )
    trainer_file = subject.path / "trainer.json"
    if not file and trainer_file.is_file():
        trained_on = parse_json(trainer_file)["data_revision"]
        if trained_on != folder.identity:
            raise UserError(
                f"the text in {data.data} is no longer the one that {subject.name} was trained on."
            )
    # A run that validated nothing is scored like a run with the default number of tokens.
    return Validation(folder, data.seq_len, data.val_tokens or Config().data.val_tokens)


def _run_folder(checkpoint: Path) -> Path | None:
    """Return the run folder that a checkpoint is in, if it is in one."""
    folder = checkpoint.parent.parent
    if checkpoint.parent.name == "checkpoints" and (folder / "config.json").is_file():
        return folder
    return None


def _score(evaluation: Evaluation, subject: Subject, task: Task, examples: list[Example]) -> Report:
    """Score examples, except those whose results are in the cache."""
    if isinstance(task, Core):
        return _score_core(evaluation, subject, task, examples)
    world = evaluation.world
    arithmetic = evaluation.precision
    if compile_blocks(subject.model, examples):
        arithmetic += " compiled"
    key = evaluation_key(task.name, subject.sha256, arithmetic, evaluation.device.type, examples)
    store = cache_folder() / "evaluations" / key
    if evaluation.args.fresh and world.rank == 0:
        for path in store.glob("*.jsonl"):
            path.unlink()
    world.gather(None)  # wait, so that no rank reads a file that rank 0 removes
    with progress_bar() as update:

        def progress(done: int, total: int) -> None:
            update(done / total, f"{task.name}: {done:,} of {total:,}")

        report = run_task(subject.model, task, examples, world, store, progress)
    if world.rank == 0:
        stored = report.examples - report.scored
        line = f"{task.name}: {report.examples:,} examples"
        if report.scored:
            line += f", {report.scored / report.seconds:.1f} a second"
        if stored:
            line += f", {stored:,} of them kept from an earlier evaluation"
        log.info(line)
    return report


def _score_core(
    evaluation: Evaluation, subject: Subject, core: Core, examples: list[Example]
) -> Report:
    """Score CORE task by task, so that the results of each are kept by themselves."""
    reports = {
        task.name: _score(evaluation, subject, task, own) for task, own in core.split(examples)
    }
    measured = {
        name: (float(report.figures["acc"]), report.examples) for name, report in reports.items()
    }
    return Report(
        core.mean(measured),
        examples=sum(report.examples for report in reports.values()),
        scored=sum(report.scored for report in reports.values()),
        seconds=sum(report.seconds for report in reports.values()),
    )


def _table_rows(
    name: str,
    figures: dict[str, Any],
    against: dict[str, Any] | None,
    comparisons: list[Comparison],
) -> list[list[str]]:
    """Return a row for each figure that is a number. Only the first one has the task's name."""
    published = {comparison.published.figure: comparison for comparison in comparisons}
    rows: list[list[str]] = []
    for figure, value in figures.items():
        if not isinstance(value, float):
            continue
        row = ["" if rows else name, figure, _format(value)]
        if against is not None:
            row.append(_format(against[figure]))
        if figure in published:
            found = published[figure]
            difference = f"{found.ours - found.theirs:+.4g}"
            row += [_format(found.theirs), difference, found.verdict]
        else:
            row += ["", "", ""]
        rows.append(row)
    return rows


def _format(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 100 else f"{value:,.1f}"


def _as_json(comparison: Comparison) -> dict[str, Any]:
    return {
        "task": comparison.published.task,
        "figure": comparison.published.figure,
        "ours": comparison.ours,
        "published": comparison.theirs,
        "allowed": comparison.allowed,
        "verdict": comparison.verdict,
        "source": comparison.published.source,
        "note": comparison.published.note,
    }


def _print(evaluation: Evaluation) -> None:
    """Print the table of figures and the notes that belong to it."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=False)
    console.print(_table(evaluation))
    outcome = evaluation.outcome
    for name, figures in outcome["tasks"].items():
        if "loss_by_position" in figures:
            losses = figures["loss_by_position"].items()
            by_position = "  ".join(f"{edge}+: {loss:.2f}" for edge, loss in losses)
            console.print(f"{name}, loss by tokens seen: {by_position}")
    comparisons = outcome["comparisons"]
    notes: dict[str, list[str]] = {}  # what is said about figures, and the figures
    for comparison in comparisons:
        rule = "no verdict"
        if comparison["allowed"] is not None:
            rule = f"passes if at most {comparison['allowed']:.3g} worse"
        note = f"; {comparison['note']}" if comparison["note"] else ""
        said = f"{comparison['source']}; {rule}{note}"
        notes.setdefault(said, []).append(f"{comparison['task']} {comparison['figure']}")
    for said, figures in notes.items():
        console.print(f"{', '.join(figures)}: {said}.")
    if comparisons and not any(comparison["verdict"] for comparison in comparisons):
        console.print("Verdicts need --precision fp32 and the whole task as it was published.")
    if evaluation.size is None:
        console.print("No GPT-2 of this shape was published, so there is nothing to pass or fail.")
    for name, lacks in outcome["partial"].items():
        console.print(f"{name} is partial: {lacks}; a partial run has no verdict.")
    for name, reason in outcome["not_run"].items():
        console.print(f"{name} not run: {reason}")


def _table(evaluation: Evaluation) -> Any:
    """Return the figures as a table of rich."""
    from rich.table import Table

    args = evaluation.args
    title = f"{args.model}, {evaluation.precision} on {evaluation.device.type}"
    table = Table(box=None, pad_edge=False, title=title, title_justify="left")
    table.add_column("task", overflow="fold")
    table.add_column("figure", overflow="fold")
    published = f"GPT-2 {evaluation.size}" if evaluation.size else "published"
    against = [args.against] if args.against else []
    for heading in ("here", *against, published, "differs"):
        table.add_column(heading, justify="right", overflow="fold")
    table.add_column("", overflow="fold")
    for row in evaluation.table_rows:
        table.add_row(*row)
    return table


def _append_to_run(evaluation: Evaluation) -> None:
    """Record the evaluation of a run's checkpoint in the run, for its model card and report."""
    path = evaluation.subject.path
    run_folder = _run_folder(path)
    step = re.fullmatch(r"step-(\d+)", path.name)
    if run_folder is None or step is None:
        return
    line = json.dumps({"step": int(step[1]), **evaluation.outcome})
    with (run_folder / "evaluations.jsonl").open("a", encoding="utf-8") as file:
        file.write("\n" + line)  # a new line, because a killed process may have left half a line
