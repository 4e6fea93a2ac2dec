"""The model card: README.md of an exported model folder, with the figures of the run it comes from."""

import os
import re
from pathlib import Path
from typing import Any

from anew.checkpoint import huggingface as weights
from anew.config.schema import Config
from anew.model.flops import count_parameters
from anew.tokenizer.bpe import Tokenizer
from anew.training import run_log as metrics
from anew.utils.files import json_lines


def model_card(model: str) -> str:
    """README.md of an exported folder: what it is, how it was trained, how good it is, how to use it. Figures are the run's own."""
    path = weights.find(model).resolve()
    c = weights.read_config(path)
    tokenizer = Tokenizer.of_model(path, c.vocab_size)
    millions = count_parameters(c) / 1e6
    lines = [
        "---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [gpt2]", "---", "",
        f"# {path.parent.parent.name if path.parent.name == 'checkpoints' else Path(model).name}", "",
        f"A GPT-2 of {millions:,.1f}M parameters: {c.n_layer} layers x {c.n_embd}, {c.n_head} heads, {c.n_positions} positions, "
        f"{c.vocab_size:,} tokens ({tokenizer.name}). Exported by anew.", "",
    ]  # fmt: skip
    run, step = path.parent.parent, re.fullmatch(r"step-(\d+)", path.name)
    if step and (run / "config.json").is_file():
        lines += _training(run, int(step[1]))
    lines += [
        "## Use", "", "```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
        'tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER")', 'model = AutoModelForCausalLM.from_pretrained("THIS FOLDER")',
        'ids = tokenizer("The ", return_tensors="pt")', "print(tokenizer.decode(model.generate(**ids, max_new_tokens=50)[0]))", "```", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _training(run: Path, step: int) -> list[str]:
    """How the checkpoint of `step` was trained, and every whole evaluation of it, the last one where there are several."""
    config = Config.read(run / "config.json")
    lines = ["## Training", "", "| what | value |", "|---|---|"]
    facts: dict[str, Any] = {
        "recipe": config.recipe,
        "steps": f"{step:,} of {config.run.steps:,}",
        "tokens": f"{step * config.run.batch_tokens:,} ({config.run.batch_tokens:,} a step)",
        "text": Path(config.data.data).name
        if os.path.sep in config.data.data
        else config.data.data,
        "begun from": config.run.init or "random weights",
        "optimizer": f"{config.optim.optimizer}, learning rate {config.optim.lr:g} to {config.optim.min_lr:g}"
        + (f", Muon's {config.optim.muon_lr:g}" if config.optim.optimizer == "muon" else ""),
        "seed": config.run.seed,
    }
    rows = [row for row in metrics.read_metrics(run) if row["step"] <= step]
    validated = [row for row in rows if "val/loss" in row]
    if validated:
        last = validated[-1]
        facts["validation loss"] = (
            f"{last['val/loss']:.4f} nats a token at step {int(last['step']):,} ({last.get('val/precision', 'fp32')})"
        )
    lines += [f"| {name} | {value} |" for name, value in facts.items()] + [""]
    measured: dict[tuple[str, str, str], str] = {}
    path = run / "evaluations.jsonl"
    for row in json_lines(path) if path.is_file() else ():
        if row["step"] == step and not (row["limit"] or row["stride"] or row["file"]):
            for task, figures in row["tasks"].items():
                for figure, value in figures.items():
                    if isinstance(value, float):
                        shown = f"| {task} | {figure} | {value:.4f} | {figures.get('examples', '')} | {row['precision']} |"
                        measured[task, figure, row["precision"]] = shown
    if measured:
        lines += [
            "## Evaluation",
            "",
            "| task | figure | value | examples | precision |",
            "|---|---|---|---|---|",
            *measured.values(),
            "",
        ]
    return lines
