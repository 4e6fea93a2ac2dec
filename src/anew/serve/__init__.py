"""A page and an API on this machine: watch a model choose its tokens, and let other programs ask it."""
