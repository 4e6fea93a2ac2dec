"""How good is a model: its loss on held-out text, and what it says, without disturbing its training."""
