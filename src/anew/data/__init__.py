"""Text sources, the shard format, preparation, and batches of tokens for training."""
