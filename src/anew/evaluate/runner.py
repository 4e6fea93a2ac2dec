"""Run a task: score its examples in chunks, divide the chunks over ranks, and keep their results.

    report = run_task(model, TASKS["lambada"], examples)
    report.figures["perplexity"]

The results of a chunk depend on the chunk alone, and figures are computed from the results in the
order of the examples. So any number of ranks reports the same figures, and so does an evaluation
that was killed and continued.
"""

import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from anew.distributed.world import ALONE, World
from anew.errors import Preempted
from anew.evaluate.scorer import score
from anew.evaluate.tasks.task import Example, Result, Task
from anew.model.gpt import GPT
from anew.utils.device import pick_compile
from anew.utils.files import json_lines

# Part of the key of stored results. Raise it when the scorer or a task computes another result from
# the same example.
RESULTS_VERSION = 1
CHUNK_TOKENS = 16384  # 2 to 4 seconds of 124M on two cores, which is what a kill loses at most
WORTH_COMPILING = 200_000  # tokens: 40 seconds of 124M on two cores
BATCH_TOKENS = {"cpu": 2048, "mps": 8192, "cuda": 16384}
Progress = Callable[[int, int], None]  # called with the examples done and the examples in total


@dataclass(frozen=True)
class Report:
    """The figures of a task."""

    figures: dict[str, Any]
    examples: int  # the figures are about
    scored: int  # of these; the results of the others were stored
    seconds: float  # for those scored


@dataclass(frozen=True)
class _Share:
    """What one rank contributes."""

    results: dict[int, list[Result]]  # chunk number -> a result for each example
    scored: int
    stopped: bool


def run_task(
    model: GPT,
    task: Task,
    examples: Sequence[Example],
    world: World = ALONE,
    store: Path | None = None,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> Report:
    """Score `examples` and return the task's report, with the same figures on every rank.

    Chunks whose results are in the folder `store` are not scored again. Raises Preempted on every
    rank if `stop` is set on one of them.
    """
    chunks = list(_chunks(examples))
    results = _stored_results(store, chunks)
    mine = range(world.rank, len(chunks), world.size)
    to_score = [number for number in mine if number not in results]
    n_stored = sum(len(chunks[number]) for number in results)
    n_scored = 0
    start = time.perf_counter()
    for number in to_score:
        if stop is not None and stop.is_set():
            break
        results[number] = _score_chunk(model, task, chunks[number])
        if store is not None:
            _keep(store, world.rank, number, results[number])
        n_scored += len(chunks[number])
        if progress is not None:
            done = n_stored + n_scored * world.size  # an estimate: other ranks are about as fast
            progress(min(done, len(examples)), len(examples))
    seconds = time.perf_counter() - start
    stopped = stop is not None and stop.is_set()
    shares = world.gather(_Share(results, n_scored, stopped))
    if any(share.stopped for share in shares):
        raise Preempted("the evaluation was stopped")
    all_results: dict[int, list[Result]] = {}
    for share in shares:
        all_results |= share.results
    in_order = [result for number in range(len(chunks)) for result in all_results[number]]
    scored = sum(share.scored for share in shares)
    return Report(task.figures(in_order), len(in_order), scored, seconds)


def _chunks(examples: Sequence[Example]) -> Iterator[list[Example]]:
    """Yield consecutive examples that have about CHUNK_TOKENS tokens together."""
    chunk: list[Example] = []
    n_tokens = 0
    for example in examples:
        chunk.append(example)
        n_tokens += example.question.n_tokens
        if n_tokens >= CHUNK_TOKENS:
            yield chunk
            chunk = []
            n_tokens = 0
    if chunk:
        yield chunk


def _score_chunk(model: GPT, task: Task, chunk: list[Example]) -> list[Result]:
    """Return the result of each example."""
    device = model.transformer.wte.weight.device
    questions = [example.question for example in chunk]
    answers = score(model, questions, BATCH_TOKENS[device.type])
    return [
        task.result(example.row, answer) for example, answer in zip(chunk, answers, strict=True)
    ]


def _stored_results(store: Path | None, chunks: list[list[Example]]) -> dict[int, list[Result]]:
    """Return the results of chunks that earlier processes have scored, by chunk number.

    A process that was killed may have left half a line. What is not a complete chunk is ignored.
    """
    results: dict[int, list[Result]] = {}
    if store is None:
        return results
    for path in sorted(store.glob("*.jsonl")):
        for row in json_lines(path):
            with contextlib.suppress(KeyError, TypeError, IndexError):
                number = int(row["chunk"])
                if len(row["results"]) == len(chunks[number]):
                    results[number] = row["results"]
    return results


def _keep(store: Path, rank: int, number: int, results: list[Result]) -> None:
    """Append the results of a chunk to this process's file in `store`."""
    store.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"chunk": number, "results": results})
    with (store / f"{rank}-{os.getpid()}.jsonl").open("a", encoding="utf-8") as file:
        file.write("\n" + line)  # a new line, because a killed process may have left half a line


def compile_blocks(model: GPT, examples: Sequence[Example]) -> bool:
    """Compile the model's blocks for sequences of any length if that saves time; return whether.

    It does for a model in bf16 on a CPU with a compiler, in a long evaluation: 1.2 times as fast,
    after 6 seconds (docs/log.md, 5). In fp32, matrix products take nearly all of the time.
    """
    if model.transformer.h[0]._compiled_call_impl is not None:
        return True
    weight = model.transformer.wte.weight
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return False
    if sum(example.question.n_tokens for example in examples) < WORTH_COMPILING:
        return False
    can_compile, _ = pick_compile("auto", weight.device)
    if not can_compile:
        return False
    for block in model.transformer.h:
        block.compile(dynamic=True)
    return True


def evaluation_key(
    task: str, weights_sha256: str, precision: str, device: str, examples: Sequence[Example]
) -> str:
    """Return a name for the results of these examples, weights, precision and kind of device."""
    settings = [RESULTS_VERSION, task, weights_sha256, precision, device, CHUNK_TOKENS]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for example in examples:
        parts = [example.question.context, *example.question.endings]
        ids = [[int(i) for i in part] for part in parts]
        digest.update(json.dumps(ids).encode())
        digest.update(repr(example.row).encode())
    return f"{task.replace(':', '-')}-{digest.hexdigest()[:16]}"
