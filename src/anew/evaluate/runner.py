"""Run tasks: examples in chunks, each chunk scored by one process and kept, so that an evaluation can be stopped, resumed and shared out.

    report = run(model, TASKS["lambada"], examples, name="lambada")
    report.figures["perplexity"]

A chunk's result depends on the chunk alone, and figures are summed in the order of the file. So 1, 2 or 3 processes, an evaluation in one
go and one that was killed five times report the same numbers.
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

RESULTS_VERSION = (
    1  # to be raised with every change of what the scorer or a task makes of an example
)
CHUNK_TOKENS = 16384  # 2 to 4 seconds of 124M on two cores: what a kill costs at most
WORTH_COMPILING = 200_000  # tokens: 40 seconds of 124M on two cores
BATCH_TOKENS = {"cpu": 2048, "mps": 8192, "cuda": 16384}
Progress = Callable[[int, int], None]  # examples done, examples in all


@dataclass(frozen=True)
class Report:
    """What a task found: its figures, on how many examples; how many of them were scored just now, in how many seconds."""

    figures: dict[str, Any]
    examples: int
    scored: int
    seconds: float


def run(
    model: GPT,
    task: Task,
    examples: Sequence[Example],
    world: World = ALONE,
    store: Path | None = None,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> Report:
    """Score `examples` and return the task's figures, the same in every process. Chunks in the folder `store` are not scored again.

    Interrupted, in all processes, if `stop` is set in one.
    """
    chunks = list(_chunks(examples))
    done = _stored(store, chunks)
    left = [i for i in range(len(chunks)) if i % world.size == world.rank and i not in done]
    kept = sum(len(chunks[i]) for i in done)
    batch_tokens = BATCH_TOKENS[model.transformer.wte.weight.device.type]
    began, scored = time.perf_counter(), 0
    for i in left:
        if stop is not None and stop.is_set():
            break
        answers = score(model, [example.question for example in chunks[i]], batch_tokens)
        done[i] = [
            task.result(example.row, answer)
            for example, answer in zip(chunks[i], answers, strict=True)
        ]
        _keep(store, world, i, done[i])
        scored += len(chunks[i])
        if progress:
            progress(min(len(examples), kept + scored * world.size), len(examples))
    seconds = time.perf_counter() - began
    everywhere: dict[int, list[Result]] = {}
    shares = world.gather((done, scored, stop is not None and stop.is_set()))
    if any(stopped for _, _, stopped in shares):
        raise Preempted("the evaluation was stopped")
    for part, _, _ in shares:
        everywhere |= part
    results = [result for i in range(len(chunks)) for result in everywhere[i]]
    return Report(
        task.figures(results), len(results), sum(share for _, share, _ in shares), seconds
    )


def compile_blocks(model: GPT, examples: Sequence[Example]) -> bool:
    """Compile the model's blocks for shapes of all lengths where that pays: 1.2 times as fast, after 6 seconds (docs/log.md, 5).

    That is, for a model in bf16 on a CPU with a compiler and a long evaluation; in fp32 the matrix products are all that counts.
    """
    if model.transformer.h[0]._compiled_call_impl is not None:
        return True
    weight = model.transformer.wte.weight
    tokens = sum(
        len(e.question.context) + sum(len(ending) for ending in e.question.endings)
        for e in examples
    )
    if (
        weight.device.type != "cpu"
        or weight.dtype != torch.bfloat16
        or tokens < WORTH_COMPILING
        or not pick_compile("auto", weight.device)[0]
    ):
        return False
    for block in model.transformer.h:
        block.compile(dynamic=True)
    return True


def _chunks(examples: Sequence[Example]) -> Iterator[list[Example]]:
    """Consecutive examples of about CHUNK_TOKENS tokens together."""
    chunk: list[Example] = []
    tokens = 0
    for example in examples:
        chunk.append(example)
        tokens += len(example.question.context) + sum(
            len(ending) for ending in example.question.endings
        )
        if tokens >= CHUNK_TOKENS:
            yield chunk
            chunk, tokens = [], 0
    if chunk:
        yield chunk


def _stored(store: Path | None, chunks: list[list[Example]]) -> dict[int, list[Result]]:
    """Chunks that earlier processes finished. The last line of a killed one may be cut; what is no whole chunk is not counted."""
    done: dict[int, list[Result]] = {}
    for path in sorted(store.glob("*.jsonl")) if store else ():
        for row in json_lines(path):
            with contextlib.suppress(KeyError, TypeError, IndexError):
                chunk, results = int(row["chunk"]), row["results"]
                if len(results) == len(chunks[chunk]):
                    done[chunk] = results
    return done


def _keep(store: Path | None, world: World, chunk: int, results: list[Result]) -> None:
    if store is None:
        return
    store.mkdir(parents=True, exist_ok=True)
    with (store / f"{world.rank}-{os.getpid()}.jsonl").open("a", encoding="utf-8") as file:
        file.write(
            "\n" + json.dumps({"chunk": chunk, "results": results})
        )  # behind what a killed one may have left


def key(task: str, weights: str, precision: str, device: str, examples: Sequence[Example]) -> str:
    """A name for what is evaluated: the same weights (their sha256), questions, precision and kind of device."""
    digest = hashlib.sha256(
        json.dumps([RESULTS_VERSION, task, weights, precision, device, CHUNK_TOKENS]).encode()
    )
    for example in examples:
        parts = [example.question.context, *example.question.endings]
        digest.update(
            json.dumps([[int(i) for i in part] for part in parts]).encode()
            + repr(example.row).encode()
        )
    return f"{task}-{digest.hexdigest()[:16]}"
