"""The runner: division over ranks, and continuing after a kill."""

from pathlib import Path
from typing import Any

import pytest

from anew import GPT
from anew.distributed.world import World
from anew.evaluate import runner
from anew.evaluate.scorer import Question
from anew.evaluate.tasks.registry import TASKS
from anew.evaluate.tasks.task import Example
from tests.support import shared
from tests.support.evaluation import TOKENIZER, task_model

LAMBADA = TASKS["lambada"]


@pytest.fixture(scope="module")
def model() -> GPT:
    return task_model()


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> list[Example]:
    """60 examples of LAMBADA, in chunks so small that there are several."""
    monkeypatch.setattr(runner, "CHUNK_TOKENS", 600)
    return LAMBADA.examples(shared("lambada/lambada_test.jsonl"), TOKENIZER, 128)[:60]


@pytest.mark.parametrize("size", [2, 3])
def test_figures_are_the_same_on_any_number_of_ranks(
    model: GPT, examples: list[Example], size: int
) -> None:
    alone = runner.run_task(model, LAMBADA, examples)
    shares: list[Any] = []  # of the ranks that have gathered; the last rank sees all of them

    def gather(share: object) -> list[Any]:
        shares.append(share)
        return shares

    for rank in range(size - 1):
        with pytest.raises(KeyError):
            runner.run_task(model, LAMBADA, examples, World(rank, size, gather))
    report = runner.run_task(model, LAMBADA, examples, World(size - 1, size, gather))
    assert report.figures == alone.figures
    n_chunks = len(list(runner._chunks(examples)))
    assert sum(len(share.results) for share in shares) == n_chunks
    assert sum(share.scored for share in shares) == 60


def test_killed_evaluation_continues_with_the_same_figures(
    model: GPT, examples: list[Example], tmp_path: Path
) -> None:
    alone = runner.run_task(model, LAMBADA, examples)

    class KillError(Exception):
        pass

    def kill(done: int, total: int) -> None:
        if done > 20:
            raise KillError

    store = tmp_path / "store"
    with pytest.raises(KillError):
        runner.run_task(model, LAMBADA, examples, store=store, progress=kill)
    [stored] = store.iterdir()
    with stored.open("a") as file:  # what killed processes may leave
        file.write('\n5\n{"chunk": 1}\n{"chunk": 999, "results": []}')
        file.write('\n{"chunk": 6, "results": [1]}\n{"chunk": 5, "resu')
    again = runner.run_task(model, LAMBADA, examples, store=store)
    assert again.figures == alone.figures
    assert 0 < again.scored < 60
    assert runner.run_task(model, LAMBADA, examples, store=store).scored == 0


def test_key_depends_on_weights_precision_and_examples() -> None:
    row = Example("a", Question([1], [[2]]))
    one = runner.evaluation_key("lambada", "abc", "fp32", "cpu", [row])
    others = [
        ("abd", "fp32", [row]),
        ("abc", "bf16", [row]),
        ("abc", "fp32", [row, row]),
        ("abc", "fp32", [Example("b", row.question)]),
    ]
    keys = {
        runner.evaluation_key("lambada", weights, precision, "cpu", examples)
        for weights, precision, examples in others
    }
    assert one not in keys
