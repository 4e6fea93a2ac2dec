"""`anew verify MODEL`: check that a model is what it claims to be, in less than a minute.

anew verify gpt2
anew verify runs/demo --json
"""

import errno
import json
import logging
import sys
import tempfile
import textwrap
from dataclasses import dataclass

from anew.cli.parse import ModelArgument, parse
from anew.errors import UserError
from anew.report import verifications
from anew.verify.checks import Subject, all_checks, conclusion, find_subject
from anew.verify.result import FAIL, Check

log = logging.getLogger("anew")

COLUMNS = 80
INDENT = 22  # of what a check found


@dataclass(frozen=True)
class VerifyArgs:
    """Check that a model is what it claims to be. Example: anew verify gpt2

    OpenAI's weights are compared with published logits. A run is restored, and its last steps are
    taken again in a temporary copy. Nothing is changed, but a run keeps the result for its page.
    """

    model: ModelArgument
    """a run, a checkpoint, a Hugging Face folder, a .pt file or a hub name"""
    json: bool = False
    """the last line of standard output is one JSON object"""


def run_verify(argv: list[str]) -> None:
    """Check a model, print each result, and end with exit code 1 if a check failed."""
    args = parse(VerifyArgs, argv, "verify")
    subject = find_subject(args.model)
    checks = print_checks(subject)
    sentence = conclusion(subject, checks)
    print("\n".join(textwrap.wrap(sentence, COLUMNS, break_on_hyphens=False)))
    record(subject, checks)
    has_failed = any(check.status == FAIL for check in checks)
    if args.json:
        facts = {
            "model": args.model,
            "path": str(subject.path),
            "passed": not has_failed,
            "conclusion": sentence,
            "checks": [check._asdict() for check in checks],
        }
        print(json.dumps(facts))
    if has_failed:
        sys.exit(1)


def print_checks(subject: Subject) -> list[Check]:
    """Make all checks, and print each when it is done."""
    checks = []
    try:
        for check in all_checks(subject):
            checks.append(check)
            print(formatted(check), flush=True)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise UserError(
            f"the disk of {tempfile.gettempdir()} is full; free some space there, or name another "
            "folder in the environment variable TMPDIR."
        ) from error
    return checks


def formatted(check: Check) -> str:
    """Return the lines of a check, at most 80 columns wide."""
    return textwrap.fill(
        check.detail,
        COLUMNS,
        initial_indent=f"{check.status:<7}  {check.name:<12} ",
        subsequent_indent=" " * INDENT,
        break_on_hyphens=False,
    )


def record(subject: Subject, checks: list[Check]) -> None:
    """Keep the result in the run folder, for the run's page."""
    if subject.run is None:
        return
    try:
        verifications.append(subject.run, subject.step, [check._asdict() for check in checks])
    except OSError as error:
        log.warning(f"the result could not be kept in {subject.run} ({error.strerror})")
