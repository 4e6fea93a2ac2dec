"""anew: GPT-2 from scratch, again, and proven.

import anew

model = anew.GPT.from_pretrained("runs/demo")
result = anew.train(anew.recipe("shakespeare", steps=200))
"""

import os

# cuBLAS reads this once, at its first call in the process; without it, a later deterministic run is refused (torch's Context.cpp).
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

from anew.config.recipes import RECIPES, recipe
from anew.config.schema import Config, GPTConfig
from anew.errors import UserError
from anew.inference.generate import generate, stream
from anew.model.gpt import GPT
from anew.tokenizer.bpe import Tokenizer
from anew.train import train

__all__ = ["GPT", "RECIPES", "Config", "GPTConfig", "Tokenizer", "UserError", "generate", "recipe", "stream", "train"]
__version__ = "0.1.0"
