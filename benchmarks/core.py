"""The time of CORE for GPT-2 124M, against the loop with which nanochat measures it.

    python benchmarks/core.py --file eval_bundle.zip
    python benchmarks/core.py --file eval_bundle.zip --precision fp32 --examples 8 --rounds 5

Both sides score the same questions, a few of each task in turn, in processes that take turns. The
loop reads the padded choices of one question at a time with a model of transformers, and computes
the logits of all positions. The time for all examples is estimated from the seconds an example.
"""

import argparse
import itertools
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

from anew import GPT, Tokenizer
from anew.bench.compare import WARM_UP_TURNS, Turn, alternate, ratio
from anew.bench.competitors import transformers_model
from anew.config.schema import GPTConfig, RunConfig
from anew.evaluate import runner
from anew.evaluate.tasks.core import CORE_TASKS, CoreTask
from anew.evaluate.tasks.task import Example
from anew.utils.device import Runtime, set_up_device

N_POSITIONS = 1024
Part = tuple[CoreTask, list[Example]]


def tasks_in(file: str) -> list[CoreTask]:
    """Return the tasks whose data is there."""
    return [task for task in CORE_TASKS if task.find(Path(file))]


def parts(file: str, count: int) -> Iterator[Part]:
    """Yield `count` examples of each task in turn, other ones each time.

    The first task is yielded at each turn of warm-up.
    """
    tokenizer = Tokenizer.named("gpt2")
    tasks = tasks_in(file)
    read = {
        task.name: task.examples(Path(file), tokenizer, N_POSITIONS, limit=8 * count + 11)
        for task in tasks
    }
    for _ in range(WARM_UP_TURNS):
        yield tasks[0], read[tasks[0].name][:count]
    for turn in itertools.count():
        for task in tasks:
            examples = itertools.cycle(read[task.name])
            yield task, list(itertools.islice(examples, turn * count, (turn + 1) * count))


def anew_scoring(file: str, count: int, precision: str) -> Turn:
    """Return the scorer of `anew evaluate` on the next part, compiled as for a whole task."""
    runtime = _runtime(precision)
    found = parts(file, count)
    model = GPT(GPTConfig(), runtime.dtype, seed=1).to(runtime.device).eval()
    _, examples = next(parts(file, count))
    runner.compile_blocks(model, examples * 5_000)  # as many tokens as in a whole task

    def score() -> None:
        task, examples = next(found)
        runner.run_task(model, task, examples)

    return score


def loop_scoring(file: str, count: int, precision: str) -> Turn:
    """Return nanochat's procedure on transformers' model, for the same questions."""
    runtime = _runtime(precision)
    found = parts(file, count)
    model = transformers_model(GPTConfig()).eval()
    model.to(runtime.device, runtime.dtype)

    @torch.no_grad()
    def score() -> None:
        _, examples = next(found)
        for example in examples:
            rows = _rows(example)
            width = max(len(row) for row in rows)
            ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
            ids = ids.to(runtime.device)
            logits = model(ids).logits
            F.cross_entropy(logits.flatten(0, 1), ids.roll(-1, 1).flatten(), reduction="none")
            logits.argmax(dim=-1).sum().item()

    return score


def _rows(example: Example) -> list[list[int]]:
    """Return the prompts of a question with each of its endings, at most N_POSITIONS tokens."""
    question = example.question
    return [([*question.context, *ending])[-N_POSITIONS:] for ending in question.endings]


def _runtime(precision: str) -> Runtime:
    return set_up_device(RunConfig(compile="off", precision=precision))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--file", required=True, help="CORE's data: a zip archive or a folder")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--examples", type=int, default=4, help="examples of a task at a turn")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each task")
    args = parser.parse_args()
    tasks = tasks_in(args.file)
    sides = {"anew": anew_scoring, "loop": loop_scoring}
    arguments = (args.file, args.examples, args.precision)
    times = alternate(sides, arguments, rounds=args.rounds * len(tasks)).seconds
    hours = dict.fromkeys(sides, 0.0)
    for i, task in enumerate(tasks):
        of_task = {side: seconds[i :: len(tasks)] for side, seconds in times.items()}
        for side, seconds in of_task.items():
            hours[side] += statistics.median(seconds) / args.examples * task.count / 3600
        found = ratio(of_task["anew"], of_task["loop"])
        each = statistics.median(of_task["anew"]) / args.examples
        print(
            f"{task.label:34} {1 / each:7.1f} a second, "
            f"{found.median:5.2f} times the loop ({found.low:.2f} to {found.high:.2f})"
        )
    print(
        f"all examples of {len(tasks)} tasks: {hours['anew']:.2f} hours instead of "
        f"{hours['loop']:.2f}, {hours['loop'] / hours['anew']:.2f} times as fast"
    )


if __name__ == "__main__":
    main()
