"""Logits with a cache against logits of the whole text at once."""

import pytest
import torch

from anew.model.gpt import GPT
from anew.model.kv_cache import Cache
from tests.support.models import SMALL, ids_for


@pytest.mark.parametrize("lengths", [[9, 9], [4, 9, 1]])
def test_logits_with_cache_equal_logits_without(lengths: list[int]) -> None:
    """The cache is empty, then holds rows of equal or of different lengths."""
    model = GPT(SMALL, seed=5).eval()
    rows = [ids_for(SMALL, 1, n + 8, seed=n + i)[0] for i, n in enumerate(lengths)]
    cache = Cache.empty(model, len(rows), 24)
    padded = torch.zeros(len(rows), max(lengths), dtype=torch.long)
    for i, n in enumerate(lengths):
        padded[i, :n] = rows[i][:n]
    with torch.no_grad():
        prompt_logits = model(padded, cache=cache)
        cache.truncate(lengths)
        parts = []
        for start, end in ((0, 1), (1, 6), (6, 8)):  # one token, then several at a time
            step = [row[n + start : n + end] for row, n in zip(rows, lengths, strict=True)]
            parts.append(model(torch.stack(step), cache=cache))
        logits = torch.cat(parts, dim=1)
        for i, n in enumerate(lengths):
            expected = model(rows[i][None])[0]
            torch.testing.assert_close(prompt_logits[i, :n], expected[:n], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(logits[i], expected[n : n + 8], rtol=1e-4, atol=1e-5)
