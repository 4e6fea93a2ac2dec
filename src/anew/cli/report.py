"""`anew report RUN [RUN...]`: a page about a run, whole or running, or about several side by side."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from anew.errors import UserError
from anew.report import baseline
from anew.report import html as page
from anew.report import png as pictures
from anew.report.run import Run


@dataclass(frozen=True)
class ReportArgs:
    """Write a page about a run. Example: anew report runs/gpt2-124m --price 2.5"""

    runs: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(help="run folders; several are drawn over each other"),
    ]
    out: Annotated[str, tyro.conf.arg(help="the page to write; by default RUN/report.html")] = ""
    price: Annotated[
        float | None, tyro.conf.arg(help="dollars an hour of one device, for the cost of the run")
    ] = None
    baseline: Annotated[
        str,
        tyro.conf.arg(
            help="a model, e.g. gpt2: scored on the run's validation windows, for the verdict"
        ),
    ] = ""
    picture: Annotated[
        bool, tyro.conf.arg(help="also write progress-step-N.png beside the page")
    ] = False
    json: Annotated[
        bool, tyro.conf.arg(help="the last line of standard output is one JSON object")
    ] = False


def run_report(argv: list[str]) -> None:
    """Write a page about a run: what it reached, its curves, its samples."""
    a = tyro.cli(ReportArgs, args=argv, prog="anew report")
    if not a.runs:
        raise UserError("say which run: anew report runs/NAME.")
    if len(a.runs) > page.MOST_RUNS:
        raise UserError(
            f"{len(a.runs)} runs cannot be told apart on one page; choose at most {page.MOST_RUNS}."
        )
    folders = [Path(name) for name in a.runs]
    runs = [Run.read(folder) for folder in folders]
    if a.baseline:
        for run in runs:
            baseline.score(run, a.baseline)
    out = (
        Path(a.out)
        if a.out
        else folders[0] / "report.html"
        if len(folders) == 1
        else Path("report.html")
    )
    written = [page.write(folders, out, a.price)]
    if a.picture:
        written.append(
            pictures.progress(runs, out.parent / f"progress-step-{runs[0].last['step']}.png")
        )
    for path in written:
        print(path)
    if a.json:
        facts = [
            {
                "run": str(run.folder),
                "status": run.status,
                "step": run.last["step"],
                "val_loss": (run.final_loss or (None,))[0],
            }
            for run in runs
        ]
        print(json.dumps({"page": str(out), "runs": facts}))
