"""The command line: one function a verb.

    anew train shakespeare --out runs/bard
    anew sample runs/bard --prompt "ROMEO:" --tokens 200
    anew prepare my-texts/ --out data/mine

Exit codes: 0 complete; 2 the input is wrong (one sentence, no traceback); 75 stopped by a signal after a save; 1 anything else.
"""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from loguru import logger

from anew.cli.bench import run_bench
from anew.cli.evaluate import run_evaluate
from anew.cli.export import run_export
from anew.cli.plan import run_plan
from anew.cli.prepare import run_prepare
from anew.cli.report import run_report
from anew.cli.sample import run_sample
from anew.cli.serve import run_serve
from anew.cli.train import run_train
from anew.config.recipes import RECIPES
from anew.errors import LostRank, Preempted, UserError

VERBS = {
    "train": run_train,
    "sample": run_sample,
    "evaluate": run_evaluate,
    "export": run_export,
    "prepare": run_prepare,
    "plan": run_plan,
    "bench": run_bench,
    "report": run_report,
    "serve": run_serve,
}


def main(argv: list[str] | None = None) -> None:
    """Run one verb and leave with its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    verb, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    for stream_, errors in (
        (sys.stdin, "replace"),
        (sys.stdout, "replace"),
        (sys.stderr, "backslashreplace"),
    ):
        if hasattr(
            stream_, "reconfigure"
        ):  # a model may write any character, and Windows pipes are not UTF-8 by themselves
            stream_.reconfigure(encoding="utf-8", errors=errors)
    try:
        with console():
            if verb in VERBS:
                VERBS[verb](rest)
            elif verb in ("-h", "--help"):
                print(_overview())
            else:
                raise UserError(f"there is no verb '{verb}'; choose one of {', '.join(VERBS)}.")
    except UserError as error:
        if _speaks(error):
            print(f"anew: {error}", file=sys.stderr)
        sys.exit(2)
    except Preempted as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"anew: {error}", file=sys.stderr)
        sys.exit(75)
    except LostRank as error:
        print(f"anew: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except (
        PermissionError,
        FileExistsError,
        FileNotFoundError,
        NotADirectoryError,
        IsADirectoryError,
    ) as error:
        print(
            f"anew: {error.filename or 'a file'} cannot be used: {error.strerror}.", file=sys.stderr
        )
        sys.exit(2)
    except BrokenPipeError:  # `anew sample ... | head` is no fault
        sys.stderr.close()
        sys.exit(0)


def _speaks(error: UserError) -> bool:
    """Of several ranks one says what is wrong with all of them, and each what is wrong with it alone."""
    return os.environ.get("RANK", "0") == "0" or not error.on_every_rank


def _overview() -> str:
    lines = [
        "anew: GPT-2 from scratch, again, and proven.",
        "",
        "usage: anew VERB ...    (anew VERB --help tells more)",
        "",
    ]
    lines += [
        f"  {name:<9} {(function.__doc__ or '').splitlines()[0]}"
        for name, function in VERBS.items()
    ]
    lines += ["", "recipes of `anew train`:"] + [
        f"  {name:<22} {text}" for name, (text, _) in RECIPES.items()
    ]
    return "\n".join(lines)


@contextmanager
def console() -> Iterator[None]:
    """Lines of the package's log go to standard error through loguru; results go to standard output."""

    class Forward(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            logger.log(record.levelname, record.getMessage())

    logger.remove()
    logger.add(lambda text: print(text, end="", file=sys.stderr), format="{message}", level="INFO")
    forward, log = Forward(), logging.getLogger("anew")
    log.addHandler(forward)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(forward)
