"""anew: GPT-2 from scratch, again, and proven.

import anew

model = anew.GPT.from_pretrained("runs/demo")
result = anew.train(anew.recipe("shakespeare", steps=200))
"""

from anew.config import Config, GPTConfig, UserError
from anew.generate import generate, stream
from anew.model import GPT
from anew.recipes import RECIPES, recipe
from anew.tokenizer import Tokenizer
from anew.train import train

__all__ = ["GPT", "RECIPES", "Config", "GPTConfig", "Tokenizer", "UserError", "generate", "recipe", "stream", "train"]
__version__ = "0.1.0"
