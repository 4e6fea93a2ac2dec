"""`anew report RUN [RUN...]`: a page about a run, complete or running, or about several runs."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from anew.cli.parse import parse
from anew.errors import UserError
from anew.report import baseline, html, png
from anew.report.run import Run


@dataclass(frozen=True)
class ReportArgs:
    """Write a page about a run. Example: anew report runs/gpt2-124m --price 2.5"""

    runs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN ...")]
    """run folders; the curves of several share their charts"""
    out: str = ""
    """the page to write; by default RUN/report.html, or ./report.html for several runs"""
    price: float | None = None
    """dollars an hour of one device, for the cost of the run"""
    baseline: str = ""
    """a model, e.g. gpt2: scored on the run's validation windows, for the verdict"""
    picture: bool = False
    """also write progress-step-N.png beside the page"""
    json: bool = False
    """the last line of standard output is one JSON object"""


def run_report(argv: list[str]) -> None:
    """Write a page about a run: verdict, curves and samples."""
    arguments = parse(ReportArgs, argv, "report")
    if not arguments.runs:
        raise UserError("say which run: anew report runs/NAME.")
    if len(arguments.runs) > html.MOST_RUNS:
        raise UserError(
            f"a page has colours for {html.MOST_RUNS} runs, not {len(arguments.runs)}; "
            "choose fewer."
        )
    folders = [Path(name) for name in arguments.runs]
    runs = [Run.read(folder) for folder in folders]
    if arguments.baseline:
        for run in runs:
            baseline.score(run, arguments.baseline)
    out = folders[0] / "report.html" if len(folders) == 1 else Path("report.html")
    if arguments.out:
        out = Path(arguments.out)
    print(html.write(folders, out, arguments.price))
    if arguments.picture:
        name = f"progress-step-{runs[0].last['step']}.png"
        print(png.progress(runs, out.parent / name))
    if arguments.json:
        facts = [
            {
                "run": str(run.folder),
                "status": run.status,
                "step": run.last["step"],
                "val_loss": run.final_loss,
            }
            for run in runs
        ]
        print(json.dumps({"page": str(out), "runs": facts}))
