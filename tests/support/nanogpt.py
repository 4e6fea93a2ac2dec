"""A GPT-2 as nanoGPT and build-nanogpt define it, and the checkpoints that they write."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclasses.dataclass
class GPTConfig:
    """The config object that build-nanogpt pickles, from its `__main__`."""

    block_size: int = 16
    vocab_size: int = 50304
    n_layer: int = 2
    n_head: int = 2
    n_embd: int = 16


GPTConfig.__module__ = "__main__"
GPTConfig.__qualname__ = "GPTConfig"


class TheirGPT(nn.Module):
    """A GPT-2 of nn.Linear layers, whose weights are (out, in)."""

    def __init__(self, config: GPTConfig, bias: bool = True, gelu: str = "tanh") -> None:
        super().__init__()
        self.gelu = gelu
        self.n_head = config.n_head
        C = config.n_embd
        blocks = [
            nn.ModuleDict(
                {
                    "ln_1": nn.LayerNorm(C, bias=bias),
                    "ln_2": nn.LayerNorm(C, bias=bias),
                    "attn": nn.ModuleDict(
                        {
                            "c_attn": nn.Linear(C, 3 * C, bias=bias),
                            "c_proj": nn.Linear(C, C, bias=bias),
                        }
                    ),
                    "mlp": nn.ModuleDict(
                        {
                            "c_fc": nn.Linear(C, 4 * C, bias=bias),
                            "c_proj": nn.Linear(4 * C, C, bias=bias),
                        }
                    ),
                }
            )
            for _ in range(config.n_layer)
        ]
        wte = nn.Embedding(config.vocab_size, C)
        self.transformer = nn.ModuleDict(
            {
                "wte": wte,
                "wpe": nn.Embedding(config.block_size, C),
                "h": nn.ModuleList(blocks),
                "ln_f": nn.LayerNorm(C, bias=bias),
            }
        )
        self.lm_head = nn.Linear(C, config.vocab_size, bias=False)
        self.lm_head.weight = wte.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits (B, T, 50257)."""
        transformer: Any = self.transformer  # a ModuleDict does not know its modules' types
        B, T = ids.shape
        x = transformer["wte"](ids) + transformer["wpe"](torch.arange(T))
        for block in transformer["h"]:
            q, k, v = (
                part.view(B, T, self.n_head, -1).transpose(1, 2)
                for part in block["attn"]["c_attn"](block["ln_1"](x)).chunk(3, dim=-1)
            )
            heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + block["attn"]["c_proj"](heads.transpose(1, 2).reshape(B, T, -1))
            hidden = F.gelu(block["mlp"]["c_fc"](block["ln_2"](x)), approximate=self.gelu)
            x = x + block["mlp"]["c_proj"](hidden)
        return self.lm_head(transformer["ln_f"](x))[..., :50257]


def build_nanogpt_checkpoint() -> tuple[TheirGPT, dict[str, Any]]:
    """Return a model and what build-nanogpt saves of it."""
    torch.manual_seed(7)
    config = GPTConfig()
    model = TheirGPT(config).eval()
    weights = _weights(model)
    return model, {"model": weights, "config": config, "step": 19072, "val_loss": 3.07}


def nanogpt_checkpoint(bias: bool = True) -> tuple[TheirGPT, dict[str, Any]]:
    """Return a compiled model and what nanoGPT saves of it."""
    torch.manual_seed(7)
    config = GPTConfig()
    model = TheirGPT(config, bias=bias, gelu="none").eval()
    weights = {f"_orig_mod.{name}": tensor for name, tensor in _weights(model).items()}
    weights["_orig_mod.transformer.h.0.attn.bias"] = torch.ones(1, 1, 16, 16)
    optimizer = {
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2)}},
        "param_groups": [{"lr": 6e-4}],
    }
    return model, {
        "model": weights,
        "optimizer": optimizer,
        "model_args": {**dataclasses.asdict(config), "bias": bias, "dropout": 0.0},
        "iter_num": 5,
        "best_val_loss": torch.tensor(2.85),
        "config": {},
    }


def _weights(model: TheirGPT) -> dict[str, Tensor]:
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    return weights


def save_pickled(content: object, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Save as a script that defines GPTConfig in `__main__`, which does not exist when reading."""
    monkeypatch.setattr(sys.modules["__main__"], "GPTConfig", GPTConfig, raising=False)
    torch.save(content, path)
    monkeypatch.delattr(sys.modules["__main__"], "GPTConfig")
