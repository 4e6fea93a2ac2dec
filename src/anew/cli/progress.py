"""Show how far long work has come: a bar on a terminal, plain lines elsewhere.

    with progress_bar() as update:
        for i, document in enumerate(documents):
            update(i / len(documents), f"{i:,} documents")

In a distributed run, only rank 0 shows anything.
"""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from anew.utils.ranks import is_rank_0

Update = Callable[[float, str], None]
log = logging.getLogger("anew")

NARROW = 70  # terminals with fewer columns show no bar, so that the text fits


@contextmanager
def progress_bar(seconds_between_lines: float | None = 10.0) -> Iterator[Update]:
    """Give `update(share, text)`, to be called with the share of the work that is done, 0 to 1.

    On a terminal it moves a bar with the text and the time left. Elsewhere it logs the text and the
    time left, at most once in `seconds_between_lines`; None: never. Only rank 0 shows anything.
    """
    if not is_rank_0():
        yield _plain_lines(None)
    elif sys.stderr.isatty():
        with _terminal_bar() as update:
            yield update
    else:
        yield _plain_lines(seconds_between_lines)


@contextmanager
def _terminal_bar() -> Iterator[Update]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
    from rich.text import Text

    class TextOrClock(ProgressColumn):
        """The text of the last update; before the first one, the seconds since the start."""

        def render(self, task: Task) -> Text:
            text = task.description or f"waiting for the first result, {task.elapsed or 0:.0f} s"
            return Text(text, no_wrap=True, overflow="ellipsis")

    console = Console(stderr=True)
    columns = [TimeRemainingColumn(compact=True), TextOrClock()]
    if console.width >= NARROW:
        columns.insert(0, BarColumn(bar_width=16))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda share, text: bar.update(task, completed=share, description=text)


def _plain_lines(seconds_between_lines: float | None) -> Update:
    start = time.monotonic()
    last_line = start

    def update(share: float, text: str) -> None:
        nonlocal last_line
        now = time.monotonic()
        if seconds_between_lines is None or now - last_line < seconds_between_lines:
            return
        last_line = now
        seconds_left = (now - start) * (1 / share - 1) if share > 0 else 0.0
        log.info(f"{text}, {seconds_left / 60:,.0f} min left")

    return update
