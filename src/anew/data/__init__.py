"""Text in, batches of tokens out: shards (the file format), sources, preparation, batches."""
