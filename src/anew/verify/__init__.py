"""Checks that a model is what it claims to be: OpenAI's GPT-2, or the result of its own run."""
