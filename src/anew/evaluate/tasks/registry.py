"""All tasks that are scored on a file, by the name that `anew evaluate --task` has for them.

To add a task:
1. Write a file in this folder with a subclass of `Task` (`lambada.py` is the shortest example).
2. Add an instance of it to _ALL. The command line, `--evaluate-tasks` and reports then know it.
3. Add published figures to FIGURES in `published.py`, and rows worked by hand to `test_tasks.py`.

The task `val` (`validation.py`) is not in the table, because its text belongs to a run.
"""

from collections.abc import Iterable

from anew.errors import UserError, unknown_name
from anew.evaluate.tasks.core import CORE, CORE_TASKS
from anew.evaluate.tasks.hellaswag import HellaSwag, HellaSwagHarness
from anew.evaluate.tasks.lambada import Lambada
from anew.evaluate.tasks.task import Task
from anew.evaluate.tasks.wikitext import WIKITEXT2, WIKITEXT103

_ALL: tuple[Task, ...] = (
    HellaSwag(),
    HellaSwagHarness(),
    Lambada(),
    WIKITEXT2,
    WIKITEXT103,
    CORE,
    *CORE_TASKS,
)
TASKS = {task.name: task for task in _ALL}
# What `--task all` runs. CORE takes hours on a CPU, so it is run only if it is asked for.
TASKS_OF_ALL = [name for name in TASKS if name.partition(":")[0] != CORE.name]

# Tasks of earlier versions, and the task of lm-evaluation-harness on the same text, if it has one.
# OpenAI did not publish how it cleaned these texts, so figures could not be compared with its own.
REMOVED_TASKS = {"ptb": "paloma_ptb", "enwik8": "", "text8": "", "cbt_cn": "", "cbt_ne": ""}


def unknown_task(name: str, known: Iterable[str]) -> UserError:
    """Return the error for a task that does not exist, or that existed in earlier versions."""
    if name.startswith("core:"):
        return unknown_name("task", name, [task.name for task in CORE_TASKS])
    if name not in REMOVED_TASKS:
        listed = [other for other in known if not other.startswith("core:")]
        return unknown_name("task", name, [*listed, "core:NAME"])
    instead = REMOVED_TASKS[name] or "NAME"
    return UserError(
        f"the task {name} no longer exists in this version; tasks of lm-evaluation-harness are run "
        f"with --task harness:{instead}."
    )
