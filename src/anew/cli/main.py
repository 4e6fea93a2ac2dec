"""The command line. The code of each command is in the file of its name.

    anew train shakespeare --out runs/bard
    anew sample runs/bard --prompt "ROMEO:" --tokens 200
    anew prepare my-texts/ --out data/mine

Exit codes: 0 complete; 2 invalid input (one sentence, no traceback); 75 stopped by a signal after a
save; 1 anything else.
"""

import contextlib
import faulthandler
import json
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from loguru import logger

import anew
from anew.config.recipes import RECIPES
from anew.errors import ComputedWrongly, LostRank, Preempted, UserError, unknown_name
from anew.utils.disk_errors import is_disk_full, is_transient
from anew.utils.ranks import is_rank_0

# The function of a command is anew.cli.NAME.run_NAME. Only the chosen command is imported.
COMMANDS = {
    "train": "Train a model from a recipe, or resume a run.",
    "sample": "Generate text with a model.",
    "chat": "Talk to a model that was trained on conversations.",
    "evaluate": "Score a model on HellaSwag, LAMBADA, WikiText and other tasks.",
    "export": "Convert a model for transformers, llama.cpp or ONNX; upload it.",
    "prepare": "Turn text into token files for training.",
    "plan": "Estimate memory, hours, cost and disk of a run before it starts.",
    "bench": "Measure speed on this machine, and compare recipes and settings.",
    "report": "Write an HTML page about runs: results, curves and samples.",
    "verify": "Check that a model is what it claims to be, and that a run resumes.",
    "doctor": "Check what this machine can do: device, compiler, ranks, training.",
    "serve": "Serve models: a web page, and OpenAI's APIs.",
    "completion": "Print a script that completes commands and flags in a shell.",
}
UNUSABLE_FILE = (
    PermissionError,
    FileExistsError,
    FileNotFoundError,
    NotADirectoryError,
    IsADirectoryError,
)


def main(argv: list[str] | None = None) -> None:
    """Run one command and end the process with its exit code."""
    _use_utf8()
    _show_stack_of_crashes()
    try:
        with console():
            _run(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        # Rank 0 prints an error that all ranks raise.
        _end(2, str(error), quiet=error.on_every_rank and not is_rank_0())
    except Preempted as error:
        _end(75, str(error), quiet=not is_rank_0())
    except LostRank as error:
        _end(1, str(error))
    except ComputedWrongly as error:  # raised by all ranks
        _end(1, str(error), quiet=not is_rank_0())
    except KeyboardInterrupt:
        sys.exit(130)
    except UNUSABLE_FILE as error:
        _end(2, f"{error.filename or 'a file'} cannot be used: {error.strerror}.")
    except BrokenPipeError:
        # The reader of the output, as in `anew sample ... | head`, has all it wanted.
        sys.stderr.close()
        sys.exit(0)
    except OSError as error:
        if error.filename is None or not is_transient(error):
            raise
        _end(
            1,
            f"{error.filename}: {error.strerror}. Such an error of a disk or a network may pass; "
            "run the same command again.",
        )


def _use_utf8() -> None:
    """Read and write UTF-8: a model may write any character, and pipes on Windows have no UTF-8."""
    for stream, errors in (
        (sys.stdin, "replace"),
        (sys.stdout, "replace"),
        (sys.stderr, "backslashreplace"),
    ):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors=errors)


def _show_stack_of_crashes() -> None:
    """Print the Python stack when the process receives a fatal signal, such as SIGSEGV."""
    # Standard error may be missing, or may not be a file.
    with contextlib.suppress(OSError, AttributeError, RuntimeError):
        if not faulthandler.is_enabled():
            faulthandler.enable()


def _run(argv: list[str]) -> None:
    command = argv[0] if argv else "--help"
    if command in ("-h", "--help", "help"):
        print(_overview())
    elif command in ("-V", "--version", "version"):
        print(f"anew {anew.__version__}")
    elif command in COMMANDS:
        module = import_module(f"anew.cli.{command}")
        run_command = getattr(module, f"run_{command}")
        run_command(argv[1:])
    else:
        raise unknown_name("command", command, COMMANDS)


def _end(exit_code: int, sentence: str, *, quiet: bool = False) -> None:
    if not quiet:
        print(f"anew: {sentence}", file=sys.stderr)
    _tell_torchrun(sentence)
    sys.exit(exit_code)


def _tell_torchrun(sentence: str) -> None:
    """Leave the sentence where torchrun looks for it.

    When a rank has ended with an error, torchrun prints a report of about 30 lines, whose last part
    is the message in this file.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        facts = {"message": sentence, "timestamp": int(time.time())}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps(facts), encoding="utf-8")


def _overview() -> str:
    """Return the commands and recipes, in lines of at most 80 columns."""
    lines = ["anew: train, evaluate and serve GPT-2 models.", ""]
    lines.append("usage: anew COMMAND ...    (anew COMMAND --help lists its flags)")
    lines.append("")
    lines += [f"  {name:<10} {summary}" for name, summary in COMMANDS.items()]
    lines += ["", "recipes of `anew train`:"]
    lines += [f"  {name:<22} {summary}" for name, (summary, _) in RECIPES.items()]
    return "\n".join(lines)


@contextlib.contextmanager
def console() -> Iterator[None]:
    """Print the package's log on standard error. Results of commands go to standard output."""

    class Forward(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            logger.log(record.levelname, record.getMessage())

    logger.remove()
    logger.add(lambda text: print(text, end="", file=sys.stderr), format="{message}", level="INFO")
    forward = Forward()
    log = logging.getLogger("anew")
    log.addHandler(forward)
    log.setLevel(logging.INFO)
    threading.excepthook = _report_error_of_thread
    try:
        with warnings.catch_warnings():
            # They are for the authors of packages; users cannot act on them.
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        log.removeHandler(forward)
        threading.excepthook = threading.__excepthook__


def _report_error_of_thread(error: threading.ExceptHookArgs) -> None:
    """Show the error of a background thread, except for a full disk and errors that may pass.

    The command itself reports these in a sentence; TensorBoard's thread meets them as well.
    """
    value = error.exc_value
    is_reported = isinstance(value, OSError) and (is_disk_full(value) or is_transient(value))
    if not is_reported:
        threading.__excepthook__(error)
