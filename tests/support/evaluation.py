"""Small models and data that the tests of evaluation share."""

from pathlib import Path

import torch

from anew import GPT, GPTConfig, Tokenizer
from anew.evaluate.runner import Report, run_task
from anew.evaluate.tasks.task import Task

TOKENIZER = Tokenizer.named("gpt2")
# The scorer's model: bytes as tokens, and so few positions that most questions exceed them.
SCORER_CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=32, n_positions=24, vocab_size=257)


def scale_matrices(model: GPT, factor: int) -> GPT:
    """Scale random weights up, so that predictions differ clearly from token to token."""
    for parameter in model.transformer.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(factor)
    return model.eval()


def scorer_model() -> GPT:
    """Return a model of SCORER_CONFIG."""
    model = scale_matrices(GPT(SCORER_CONFIG, seed=5), 8)
    torch.nn.init.zeros_(model.transformer.wte.weight[SCORER_CONFIG.vocab_size :])
    return model


def task_model() -> GPT:
    """Return a model of 128 positions with GPT-2's vocabulary."""
    config = GPTConfig(n_layer=2, n_head=2, n_embd=32, n_positions=128)
    return scale_matrices(GPT(config, seed=2), 6)


def run_on_file(model: GPT, task: Task, path: Path, limit: int) -> Report:
    """Run a task on the first examples of a file."""
    examples = task.examples(path, TOKENIZER, model.config.n_positions)
    return run_task(model, task, examples[:limit])
