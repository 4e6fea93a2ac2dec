"""anew: a from-scratch PyTorch reproduction of GPT-2.

    import anew

    model = anew.GPT.from_pretrained("runs/demo")
    result = anew.train(anew.recipe("shakespeare", steps=200))

The public names below are loaded when they are first used, so `import anew` itself loads neither
torch nor any other part of the package.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anew.checkpoint.huggingface import load_model as load
    from anew.config.config import Config
    from anew.config.recipes import RECIPES, recipe
    from anew.config.schema import GPTConfig
    from anew.errors import UserError
    from anew.inference.generate import generate, stream
    from anew.model.gpt import GPT
    from anew.report.training import train
    from anew.tokenizer.bpe import Tokenizer

# cuBLAS reads this variable once, at its first call in the process. Without it, a later run with
# deterministic=True would be refused by PyTorch.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

__version__ = "0.1.0"
__all__ = [
    "GPT",
    "RECIPES",
    "Config",
    "GPTConfig",
    "Tokenizer",
    "UserError",
    "generate",
    "load",
    "recipe",
    "stream",
    "train",
]

# Public name: (module, name in that module).
_PUBLIC = {
    "GPT": ("anew.model.gpt", "GPT"),
    "RECIPES": ("anew.config.recipes", "RECIPES"),
    "Config": ("anew.config.config", "Config"),
    "GPTConfig": ("anew.config.schema", "GPTConfig"),
    "Tokenizer": ("anew.tokenizer.bpe", "Tokenizer"),
    "UserError": ("anew.errors", "UserError"),
    "generate": ("anew.inference.generate", "generate"),
    "load": ("anew.checkpoint.huggingface", "load_model"),
    "recipe": ("anew.config.recipes", "recipe"),
    "stream": ("anew.inference.generate", "stream"),
    "train": ("anew.report.training", "train"),
}


def __getattr__(name: str) -> Any:
    """Load a public name (PEP 562)."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'anew' has no attribute '{name}'")
    module, attribute = _PUBLIC[name]
    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
