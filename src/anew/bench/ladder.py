"""The speed ladder: from plain fp32 code to the product's settings, as a list of overrides.

Each rung adds its settings to those of the rungs below it. `anew bench ladder` times one training
step on every rung (`timing.measure_ladder`); all rungs compute the same function, up to rounding.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Rung:
    """Settings that are added to those of the rungs below."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    matmul: str = ""  # torch.set_float32_matmul_precision; empty: what the precision implies
    devices: tuple[str, ...] = ("cuda", "mps", "cpu")
    lacking: str = ""  # why the rung is skipped on other devices


# The settings of a plain script: fp32, eager, and torch's default AdamW.
BOTTOM: dict[str, Any] = {
    "precision": "fp32",
    "compile": "off",
    "attention": "plain",
    "head": "plain",
    "pad_vocabulary": False,
    "fused": False,
}
RUNGS = (
    Rung("fp32", BOTTOM),
    Rung(
        "TF32 matrices",
        {"precision": "tf32"},
        devices=("cuda",),
        lacking="only NVIDIA GPUs have TF32",
    ),
    Rung(
        "matrices in bf16",
        matmul="medium",
        devices=("cpu",),
        lacking='torch\'s "medium" is for CPUs',
    ),
    Rung(
        "bf16",
        {"precision": "bf16"},
        devices=("cuda", "cpu"),
        lacking="training in bf16 is not reliable there",
    ),
    Rung(
        "compile",
        {"compile": "on"},
        devices=("cuda", "cpu"),
        lacking="torch.compile is not reliable there",
    ),
    Rung("flash attention", {"attention": "flash"}),
    Rung("padded vocabulary", {"pad_vocabulary": True}),
    Rung("fused AdamW", {"fused": True}),
    Rung("loss in chunks", {"head": "chunked"}),  # on CUDA in a Triton kernel of this package
    Rung(
        "cuDNN's attention",
        {"attention": "cudnn"},
        devices=("cuda",),
        lacking="cuDNN is NVIDIA's",
    ),
)
