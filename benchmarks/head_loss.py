"""The head's loss without a compiler, written in place, against the one pass that a compiler makes
its code of.

    python benchmarks/head_loss.py      # alone, 1,024 rows of GPT-2's vocabulary in bf16
    python benchmarks/head_loss.py --recipe gpt2-124m --batch-tokens 1024 --seq-len 256
    .venv/bin/python benchmarks/head_loss.py --recipe shakespeare

With a recipe: whole uncompiled steps. Both take turns; medians, and the median ratio of pairs with
its spread.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

import torch

from anew import recipe
from anew.model import loss
from anew.training.train_state import TrainState
from anew.training.trainer import train_step
from anew.utils import device as runtime
from anew.utils.signals import StopFlag

WAYS = {"one pass": loss.fused_chunk_loss, "in place": loss.in_place_chunk_loss}


def step_of(a: argparse.Namespace) -> Callable[[str], object]:
    """A whole step of the recipe over random tokens, its loss in the named way."""
    shape = {
        name: value
        for name in ("batch_tokens", "seq_len", "micro_batch")
        if (value := getattr(a, name))
    }
    config = recipe(a.recipe, compile="off", out=tempfile.mkdtemp(), **shape)
    state, stop = TrainState(config, runtime.set_up_device(config.run), ""), StopFlag()
    ids = torch.randint(0, config.model.vocab_size, (config.batch_sequences, config.data.seq_len))
    batches = [(part, part.roll(-1, 1)) for part in ids.split(config.micro_batches(1)[0])]

    def step(way: str) -> object:
        loss.chunk_loss = WAYS[way]
        return train_step(state.model, state, batches, 0.1, stop)

    return step


def alone() -> Callable[[str], object]:
    """The loss and its gradient alone, in memory as a run keeps it.

    The second way spoils the logits, which changes no time.
    """
    runtime.set_up_device(recipe("gpt2-124m", compile="off").run)
    logits, targets = torch.randn(1024, 50304).bfloat16(), torch.randint(0, 50257, (1024,))
    return lambda way: WAYS[way](logits, targets, 50257, True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe")
    for name in ("--batch-tokens", "--seq-len", "--micro-batch"):
        parser.add_argument(name, type=int)
    parser.add_argument("--rounds", type=int, default=10)
    a = parser.parse_args()
    run, seconds = step_of(a) if a.recipe else alone(), {way: [] for way in WAYS}
    for i in range(a.rounds + 1):
        for way in WAYS:
            begin = time.perf_counter()
            run(way)
            if i:  # the first is for warming up
                seconds[way].append(time.perf_counter() - begin)
    ratios = sorted(x / y for x, y in zip(*seconds.values(), strict=True))
    print(
        ", ".join(
            f"{way} {1e3 * statistics.median(times):.0f} ms" for way, times in seconds.items()
        )
    )
    print(
        f"in place takes {statistics.median(ratios):.2f} times less ({ratios[0]:.2f} to "
        f"{ratios[-1]:.2f})"
    )


if __name__ == "__main__":
    main()
