"""Files, devices, memory, compilers and signals: helpers that know nothing of language models."""
