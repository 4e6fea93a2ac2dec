"""Files, devices, compilers and signals: helpers that know nothing of language models."""
