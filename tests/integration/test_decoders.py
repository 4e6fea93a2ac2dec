"""What weights in 8 bits cost, on a model that has been trained."""

import itertools
from pathlib import Path

import pytest
import torch

from anew import GPT
from anew.inference.cpu_decoder import CpuDecoder, load_library
from anew.inference.decoders import decoder_for
from anew.model.kv_cache import Cache
from anew.training.trainer import train
from tests.faults.common import tiny

WINDOW = 16


@pytest.mark.skipif(load_library() is None, reason="needs Linux and a C++ compiler")
def test_int8_changes_the_loss_by_less_than_a_hundredth(tmp_path: Path) -> None:
    config = tiny(tmp_path / "run", n_embd=64, steps=200, warmup_steps=10)
    train(config)
    model = GPT.from_pretrained(str(config.folder))
    model.compute_dtype = torch.bfloat16
    text = Path(config.data.data).read_bytes()[:1600]
    losses = {}
    for int8 in (False, True):
        decoder = decoder_for(model, 1, int8)
        assert isinstance(decoder, CpuDecoder)
        total = 0.0
        for start in range(0, 1600, WINDOW):
            window = text[start : start + WINDOW]
            cache = Cache.empty(model, 1, WINDOW)
            for token, target in itertools.pairwise(window):
                total -= decoder.step([token], cache)[0].log_softmax(0)[target].item()
        losses[int8] = total / 1500
    assert losses[False] < 2.0
    assert losses[True] == pytest.approx(losses[False], abs=0.01)
