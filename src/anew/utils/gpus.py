"""Figures of GPUs from their datasheets, for estimates (`anew plan`) and as the peak of MFU.

    gpu = find("h100")           # GPU(name="H100", memory_gb=80, ...)

Peaks are dense (no sparsity) tensor-core rates with fp32 accumulation.
"""

import re
from dataclasses import dataclass

from anew.errors import unknown_name


@dataclass(frozen=True)
class GPU:
    """One kind of device. Rates are in TFLOP/s, memory in GB (10^9 bytes), bandwidths in GB/s."""

    name: str
    matches: tuple[str, ...]  # words that the name has which PyTorch reports or a user types
    memory_gb: float
    memory_gb_s: float
    fp32: float
    tf32: float | None
    bf16: float | None
    fp16: float | None
    link_gb_s: float  # one way, between neighbours in one machine: NVLink or PCIe
    mfu: float  # what a good plain trainer reaches with GPT-2, in causal FLOPs
    source: str
    mfu_source: str = "assumed"  # "assumed" means that `mfu` is a guess

    def peak(self, precision: str) -> float | None:
        """Return the TFLOP/s in a precision, or None if the device lacks it."""
        rates = {
            "fp32": self.fp32,
            "tf32": self.tf32,
            "bf16": self.bf16,
            "fp16": self.fp16,
        }
        return rates[precision]

    @property
    def precision(self) -> str:
        """The precision that training uses by default."""
        if self.bf16:
            return "bf16"
        if self.fp16:
            return "fp16"
        return "fp32"


_LLMC_A100 = "llm.c, 218k tokens/s a GPU on 8 x A100"
_LLMC_H100 = "llm.c, 468k tokens/s a GPU on 8 x H100"
_H200 = "a plain compile + SDPA trainer, 489.7k tokens/s on one H200"
_GH200 = "a plain compile + SDPA trainer, 416.9k tokens/s on one GH200"
_H100_NVL = "a plain compile + SDPA trainer, 339.6k tokens/s on one H100 NVL"
_H20 = "a plain compile + SDPA trainer, 139k tokens/s on one H20"
_ADA = "110k to 163k tokens/s on one RTX 4090 in public speed runs"
_APPLE = "Apple newsroom, GPU teraflops at announcement"

# The first match counts, so a longer name stands before a shorter one that it contains.
# Columns: name, matches, memory, its bandwidth, fp32, tf32, bf16, fp16, link, MFU; the second line
# has the sources of the figures and of the MFU.
# fmt: off
GPUS = (
    GPU("A100-40",   ("a100", "40"),      40,  1555,   19.5,    156,    312,    312,  300,  0.55,
        "NVIDIA A100 datasheet", _LLMC_A100),
    GPU("A100-80",   ("a100",),           80,  2039,   19.5,    156,    312,    312,  300,  0.55,
        "NVIDIA A100 datasheet", _LLMC_A100),
    GPU("H100 PCIe", ("h100", "pcie"),    80,  2000,     51,    378,    756,    756,   64,  0.38,
        "NVIDIA H100 datasheet", _LLMC_H100),
    GPU("H100 NVL",  ("h100", "nvl"),     94,  3900,     60,    417,    835,    835,  300, 0.325,
        "NVIDIA H100 datasheet", _H100_NVL),
    GPU("H100",      ("h100",),           80,  3350,     67,    495,    989,    989,  450,  0.38,
        "NVIDIA H100 datasheet", _LLMC_H100),
    GPU("GH200",     ("gh200",),          96,  4000,     67,    495,    989,    989,  450, 0.335,
        "NVIDIA GH200 datasheet", _GH200),
    GPU("H20",       ("h20",),            96,  4000,     44,     74,    148,    148,  450,  0.75,
        "NVIDIA H20 datasheet", _H20),
    GPU("H200 NVL",  ("h200", "nvl"),    141,  4800,     60,    417,    835,    835,  450,  0.39,
        "NVIDIA H200 datasheet", _H200),
    GPU("H200",      ("h200",),          141,  4800,     67,    495,    989,    989,  450,  0.39,
        "NVIDIA H200 datasheet", _H200),
    GPU("B200",      ("b200",),          180,  8000,     75,   1125,   2250,   2250,  900,  0.35,
        "NVIDIA DGX B200 datasheet"),
    GPU("MI300X",    ("mi300x",),        192,  5300,  163.4,  653.7,   1307,   1307,   64,  0.25,
        "AMD MI300X datasheet"),
    GPU("L40S",      ("l40s",),           48,   864,   91.6,    183,    362,    362,   32,   0.4,
        "NVIDIA L40S datasheet"),
    GPU("A10G",      ("a10g",),           24,   600,   31.2,     35,     70,     70,   32,  0.45,
        "AWS G5 and NVIDIA A10 datasheets"),
    GPU("RTX 5090",  ("5090",),           32,  1792,  104.8,  104.8,  209.5,  209.5,   64,  0.45,
        "NVIDIA RTX Blackwell whitepaper"),
    GPU("RTX 4090",  ("4090",),           24,  1008,   82.6,   82.6,    165,    165,   32,  0.55,
        "NVIDIA Ada whitepaper", _ADA),
    GPU("RTX 4070",  ("4070",),           12,   504,   29.1,   29.1,   58.3,   58.3,   32,   0.5,
        "NVIDIA RTX 4070 specifications"),
    GPU("RTX 3090",  ("3090",),           24,   936,   35.6,   35.6,     71,     71,   32,  0.45,
        "NVIDIA GA102 whitepaper"),
    GPU("T4",        ("t4",),             16,   320,    8.1,   None,   None,     65,   16,   0.3,
        "NVIDIA T4 datasheet"),
    GPU("V100",      ("v100",),           32,   900,   15.7,   None,   None,    125,  150,  0.35,
        "NVIDIA V100 datasheet"),
    GPU("M1 Max",    ("m1", "max"),       64,   400,   10.4,   None,   None,   None,    0,   0.3,
        _APPLE),
    GPU("M1 Pro",    ("m1", "pro"),       32,   200,    5.2,   None,   None,   None,    0,   0.3,
        _APPLE),
    GPU("M1",        ("m1",),             16,    68,    2.6,   None,   None,   None,    0,   0.3,
        _APPLE),
    GPU("M2 Ultra",  ("m2", "ultra"),    192,   800,   27.2,   None,   None,   None,    0,   0.3,
        _APPLE),
    GPU("M2 Max",    ("m2", "max"),       96,   400,   13.6,   None,   None,   None,    0,   0.3,
        _APPLE),
    GPU("M2",        ("m2",),             24,   100,    3.6,   None,   None,   None,    0,   0.3,
        _APPLE),
)
# fmt: on


def known(name: str) -> GPU | None:
    """Return the device of this name, as PyTorch reports it or a user types it, or None."""
    for gpu in GPUS:
        if all(_has_word(name.lower(), word) for word in gpu.matches):
            return gpu
    return None


def find(name: str) -> GPU:
    """Return the device of this name. Raises UserError if it is not known."""
    gpu = known(name)
    if gpu is None:
        names = [gpu.name for gpu in GPUS]
        advice = f"choose one of {', '.join(names)}, or --measure on the device itself."
        raise unknown_name("GPU", name, names, advice)
    return gpu


def _has_word(name: str, word: str) -> bool:
    """Say whether `word` is in `name`, and not within a longer word or number.

    A T400 is not a T4, and a GH200 is not an H200.
    """
    before = "[0-9]" if word[0].isdigit() else "[a-z]"
    return re.search(f"(?<!{before}){word}(?![0-9])", name) is not None
