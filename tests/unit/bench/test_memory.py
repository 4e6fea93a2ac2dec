"""The estimate of a step's memory, compared with peaks that processes reached (docs/log.md).

Each peak is `ru_maxrss` after three to eight steps, on 2 cores of an Intel Xeon with AMX (bf16) or
of an AMD EPYC with AVX2 (fp32).
"""

from typing import Any

import pytest

import anew
from anew.bench.memory import fitting_micro_batches, step_bytes, step_memory
from anew.bench.timing import with_batch
from anew.config.config import Config

NARROW = {"n_layer": 2, "n_head": 4, "n_embd": 256}


def step_config(name: str, sequences: int, **settings: Any) -> Config:
    return with_batch(anew.recipe(name, **settings), sequences, 256)


@pytest.mark.parametrize(
    ("side", "config", "micro_batch", "peak_mb"),
    [
        ("fp32, eager", step_config("gpt2-124m", 4), 4, 4259),
        ("fp32, eager", step_config("gpt2-124m", 4), 1, 3861),
        ("fp32, eager", step_config("gpt2-124m", 8, **NARROW), 8, 3536),
        ("fp32, eager", step_config("gpt2-124m", 16, **NARROW), 16, 5090),
        ("fp32, eager", step_config("gpt2-5m", 4), 4, 680),
        ("fp32, eager", step_config("gpt2-5m", 32), 32, 2053),
        ("anew", step_config("gpt2-124m", 4), 4, 3323),
        ("anew", step_config("gpt2-124m", 8, **NARROW), 8, 1131),
        ("anew", step_config("gpt2-5m", 4), 4, 594),
        ("anew", step_config("gpt2-5m", 32), 32, 1284),
        ("transformers", step_config("gpt2-124m", 4), 4, 3459),
        ("transformers", step_config("gpt2-124m", 4), 1, 3762),
        ("transformers", step_config("gpt2-124m", 8, **NARROW), 8, 1527),
        ("transformers", step_config("gpt2-124m", 8, compile="off", **NARROW), 8, 2091),
        ("transformers", step_config("gpt2-5m", 4), 4, 737),
        ("transformers", step_config("gpt2-5m", 32), 32, 1667),
        ("anew", step_config("gpt2-124m", 4, precision="fp32"), 4, 3282),
        ("anew", step_config("gpt2-124m", 8, precision="fp32", **NARROW), 8, 1491),
        ("anew", step_config("gpt2-124m", 8, precision="fp32", compile="off", **NARROW), 8, 1810),
        ("anew", step_config("gpt2-5m", 32, precision="fp32"), 32, 2012),
        ("transformers", step_config("gpt2-124m", 4, precision="fp32"), 4, 3499),
        ("transformers", step_config("gpt2-124m", 8, precision="fp32", **NARROW), 8, 1730),
        (
            "transformers",
            step_config("gpt2-124m", 8, precision="fp32", compile="off", **NARROW),
            8,
            2165,
        ),
        ("transformers", step_config("gpt2-5m", 32, precision="fp32"), 32, 2271),
    ],
)
def test_estimate_is_near_the_measured_peak(
    side: str, config: Config, micro_batch: int, peak_mb: int
) -> None:
    compiled = config.run.compile != "off"  # as in gpt2-5m
    precision = "fp32" if config.run.precision == "fp32" else "bf16"
    estimated = step_bytes(step_memory(side, compiled, precision), config, micro_batch)
    assert 0.85 < estimated / (peak_mb * 1e6) < 1.25


def test_sides_share_the_memory_in_order() -> None:
    """Three sides of 124M at 4 x 256 reached 11 GB together; 80% of the memory is given out."""
    config = step_config("gpt2-124m", 4)
    names = ("anew", "transformers", "fp32, eager")
    sides = {name: step_memory(name, True, "bf16") for name in names}
    whole = {"anew": 4, "transformers": 4, "fp32, eager": 4}
    assert fitting_micro_batches(config, sides, 24e9) == whole
    assert fitting_micro_batches(config, sides, 12.8e9) == {**whole, "fp32, eager": 1}
    assert fitting_micro_batches(config, sides, 9e9) == {**whole, "fp32, eager": 0}
    assert set(fitting_micro_batches(config, sides, 1e9).values()) == {0}
