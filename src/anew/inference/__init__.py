"""Generation of text: choosing tokens, decoding with a cache, decoders for CPUs and GPUs."""
