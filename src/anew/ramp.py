"""Batches that grow: how many sequences each step has, and how many came before it, as pure functions of the step.

    ramp = Ramp.of("0.25:0.1,0.5:0.3", steps=1000, sequences=512)
    ramp.sequences(0), ramp.sequences(100), ramp.sequences(300)     # 128, 256, 512
    ramp.before(101)                                                # 100 * 128 + 256

Early in training small batches are as good as large ones, so the same tokens make more steps (McCandlish et al. 2018, "An Empirical Model
of Large-Batch Training").
"""

import math
import re
from dataclasses import dataclass
from typing import Self

from anew.spelling import UserError

STAGE = re.compile(r"(\d*\.?\d+):(\d*\.?\d+)")


@dataclass(frozen=True)
class Ramp:
    """Sequences a step in stages: (first step, sequences), in order; the last is the whole batch."""

    stages: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, text: str, steps: int, sequences: int) -> Self:
        """Stages as SHARE:UNTIL,...: that share of the batch until that share of the steps. UserError for what is no ramp."""
        stages: list[tuple[int, int]] = []
        first, last = 0.0, 0.0
        for part in filter(None, text.split(",")):
            match = STAGE.fullmatch(part.strip())
            share, until = (float(match[1]), float(match[2])) if match else (0.0, 0.0)
            if not (last < share < 1 and first < until < 1):
                raise UserError(f"batch_ramp {text}: write growing stages as SHARE:UNTIL, both below 1, like 0.25:0.1,0.5:0.3.")
            if not math.isclose(share * sequences, round(share * sequences)) or round(share * sequences) < 1:
                raise UserError(f"batch_ramp {text}: {share:g} of the {sequences} sequences of a batch is no whole number of them.")
            if round(until * steps) <= round(first * steps):
                raise UserError(f"batch_ramp {text}: the stage up to {until:g} of {steps} steps has none.")
            stages.append((round(first * steps), round(share * sequences)))
            first, last = until, share
        if round(first * steps) >= steps:
            raise UserError(f"batch_ramp {text}: after {first:g} of {steps} steps none is left for the whole batch.")
        return cls((*stages, (round(first * steps), sequences)))

    def check(self, ranks: int) -> None:
        """Each stage must be shared out evenly."""
        for _, sequences in self.stages:
            if sequences % ranks:
                raise UserError(f"batch_ramp has a stage of {sequences} sequences, which {ranks} ranks cannot share evenly.")

    def sequences(self, step: int) -> int:
        """Sequences of this step's batch."""
        return next(n for first, n in reversed(self.stages) if first <= step)

    def before(self, step: int) -> int:
        """Sequences of all steps before this one."""
        ends = [first for first, _ in self.stages[1:]] + [max(step, self.stages[-1][0])]
        return sum(n * max(0, min(step, end) - first) for (first, n), end in zip(self.stages, ends, strict=True))
