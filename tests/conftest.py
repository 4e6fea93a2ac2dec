"""What the tests share: tiny text, tiny recipes, and a cache of their own.

Nothing here needs the network.
"""

import dataclasses
import os
from pathlib import Path

import pytest
import torch

from anew.config.config import Config

if not torch.cuda.is_available():
    os.environ.setdefault(
        "TRITON_INTERPRET", "1"
    )  # read once, when Triton is imported: its kernels then run on a CPU


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Prepared data of the tests goes to a folder of theirs."""
    os.environ["ANEW_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    os.environ["HF_HUB_OFFLINE"] = "1"  # tests of downloads have a hub of their own
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 20 kB of English with some structure, made without randomness."""
    nouns, verbs = (
        ["cat", "dog", "king", "queen", "ship", "tower", "river"],
        ["sees", "finds", "builds", "crosses", "leaves"],
    )
    lines = [
        f"The {nouns[i % 7]} {verbs[i * i % 5]} the {nouns[i * 3 % 7]} on day {i}.\n"
        for i in range(550)
    ]
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def tiny(text_file: Path, tmp_path: Path) -> Config:
    """A run of seconds: 2 layers of 32, windows of 16 bytes, fp32, eager."""
    return (
        dataclasses.replace(Config(), recipe="tiny")
        .override(
            n_layer=2,
            n_head=2,
            n_embd=32,
            n_positions=16,
            seq_len=16,
            vocab_size=257,
            tokenizer="bytes",
            data=str(text_file),
            steps=12,
            warmup_steps=2,
            batch_tokens=128,
            micro_batch=8,
            lr=3e-3,
            min_lr=3e-4,
            precision="fp32",
            device="cpu",
            compile="off",
            evaluate_every=0,
            save_every=100,
            out=str(tmp_path / "run"),
        )
        .check()
    )
