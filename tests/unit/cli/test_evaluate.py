"""The help of `anew evaluate`."""

import pytest

from anew.cli.evaluate import STRIDE_TASKS
from anew.cli.main import main
from anew.evaluate.tasks.registry import TASKS


def test_help_names_every_task(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    words = capsys.readouterr().out.replace(",", " ").replace(":", " ").split()
    assert {task.partition(":")[0] for task in TASKS} <= set(words)
    assert {"val", "harness"} <= set(words)
    for task in STRIDE_TASKS:
        assert words.count(task) == 2, task  # --task and --stride
