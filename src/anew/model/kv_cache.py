"""Cache of the keys and values of tokens that were already read, for generation.

    cache = Cache.empty(model, batch=1, capacity=64)
    model(prompt, cache=cache)         # (1, 10) ids: fills 10 slots
    model(next_token, cache=cache)     # (1, 1) ids: computes one row instead of eleven

A cache has one slot for each token of each row. It is in one of three states:

- empty: the new tokens see each other, as without a cache;
- equal lengths: every row holds the same number of tokens, so new keys are one slice;
- ragged: rows hold different numbers of tokens, so new keys are scattered, and a mask hides the
  slots that a row does not use.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

if TYPE_CHECKING:
    from anew.model.gpt import GPT


@dataclass
class Cache:
    """Keys and values of every layer, and the number of tokens that each row holds.

    `forward` writes the new tokens behind those that are there and then calls `advance`.
    """

    keys: Tensor  # (layers, B, heads, capacity, head_dim)
    values: Tensor  # (layers, B, heads, capacity, head_dim)
    lengths: Tensor  # (B,), tokens in each row
    used: int = 0  # the largest of `lengths`, known without waiting for the device
    ragged: bool = False  # true if `lengths` differ

    @classmethod
    def empty(cls, model: "GPT", batch: int, capacity: int) -> Self:
        """Return a cache for `batch` rows of at most `capacity` tokens, at most n_positions."""
        config = model.config
        assert capacity <= config.n_positions, (
            f"a cache of {capacity} tokens, but the model has {config.n_positions} positions"
        )
        device = model.transformer.wte.weight.device
        shape = (config.n_layer, batch, config.n_head, capacity, config.head_dim)
        keys = torch.zeros(shape, dtype=model.compute_dtype, device=device)
        lengths = torch.zeros(batch, dtype=torch.long, device=device)
        return cls(keys, torch.zeros_like(keys), lengths)

    def truncate(self, lengths: list[int]) -> None:
        """Keep the first `lengths[b]` tokens of row b. This removes the padding of a prompt."""
        self.lengths = torch.tensor(lengths, device=self.lengths.device)
        self.used = max(lengths)
        self.ragged = len(set(lengths)) > 1

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, heads, T, head_dim) of new tokens behind the tokens of each row.

        Returns all keys and values of the layer up to the last new one, each
        (B, heads, used + T, head_dim). The lengths stay as they are until `advance`, because every
        layer stores its keys of the same tokens.
        """
        T = k.size(2)
        end = self.used + T
        keys = self.keys[layer]  # (B, heads, capacity, head_dim)
        values = self.values[layer]
        if self.ragged:
            rows = torch.arange(k.size(0), device=k.device)
            rows = rows[:, None]  # (B, 1)
            slots = self.positions(T)  # (B, T)
            keys[rows, :, slots] = k.transpose(1, 2)
            values[rows, :, slots] = v.transpose(1, 2)
        else:
            keys[:, :, self.used : end] = k
            values[:, :, self.used : end] = v
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, T: int) -> None:
        """Count T new tokens in every row, after all layers have stored them."""
        self.lengths = self.lengths + T
        self.used += T

    def positions(self, T: int) -> Tensor:
        """Return the positions of T new tokens in their rows: (B, T)."""
        offsets = torch.arange(T, device=self.lengths.device)
        return self.lengths[:, None] + offsets

    def mask(self, T: int) -> Tensor | None:
        """Return which slots each of T new tokens may see: (B, 1, T, used + T).

        None means that no mask is needed. Behind an empty cache, attention is causal; a single
        token behind rows of equal lengths sees every slot. Several tokens behind a filled cache do
        need a mask: with fewer queries than keys, the triangle of torch's `is_causal` starts at the
        first key, not at the first new one.
        """
        if self.used == 0:
            return None
        if T == 1 and not self.ragged:
            return None
        slots = torch.arange(self.used + T, device=self.lengths.device)
        last_slots = self.positions(T)[:, :, None]  # (B, T, 1)
        visible = slots <= last_slots  # (B, T, used + T)
        return visible[:, None]
