"""The model card: README.md of an exported model folder, with the figures of its run."""

import os
import re
from pathlib import Path

from anew.checkpoint.huggingface import find_model, read_config
from anew.config.schema import Config
from anew.model.flops import count_parameters
from anew.tokenizer.bpe import Tokenizer
from anew.training import run_log
from anew.utils.files import json_lines

USAGE = """\
## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER")
model = AutoModelForCausalLM.from_pretrained("THIS FOLDER")
ids = tokenizer("The ", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=50)[0]))
```
"""


def model_card(model: str) -> str:
    """Return README.md of an exported folder: what the model is, how it was trained, how to use it.

    Training and evaluation are described if `model` is a checkpoint in a run folder.
    """
    path = find_model(model).resolve()
    config = read_config(path)
    tokenizer = Tokenizer.of_model(path, config.vocab_size)
    is_in_run = path.parent.name == "checkpoints"
    name = path.parent.parent.name if is_in_run else Path(model).name
    millions = count_parameters(config) / 1e6
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [gpt2]",
        "---",
        "",
        f"# {name}",
        "",
        f"A GPT-2 of {millions:,.1f}M parameters: {config.n_layer} layers x {config.n_embd}, "
        f"{config.n_head} heads, {config.n_positions} positions, "
        f"{config.vocab_size:,} tokens ({tokenizer.name}). Exported by anew.",
        "",
    ]
    run = path.parent.parent
    step = re.fullmatch(r"step-(\d+)", path.name)
    if step and (run / "config.json").is_file():
        lines += _training(run, int(step[1]))
        lines += _evaluation(run, int(step[1]))
    return "\n".join([*lines, USAGE])


def _training(run: Path, step: int) -> list[str]:
    """Return the section about how the checkpoint of `step` was trained."""
    config = Config.read(run / "config.json")
    data, optim = config.data.data, config.optim
    batch_tokens = config.run.batch_tokens
    rates = f"learning rate {optim.lr:g} to {optim.min_lr:g}"
    if optim.optimizer == "muon":
        rates += f", Muon's {optim.muon_lr:g}"
    facts = {
        "recipe": config.recipe,
        "steps": f"{step:,} of {config.run.steps:,}",
        "tokens": f"{step * batch_tokens:,} ({batch_tokens:,} a step)",
        "text": Path(data).name if os.path.sep in data else data,
        "begun from": config.run.init or "random weights",
        "optimizer": f"{optim.optimizer}, {rates}",
        "seed": str(config.run.seed),
    }
    validated = [
        row for row in run_log.read_metrics(run) if "val/loss" in row and row["step"] <= step
    ]
    if validated:
        last = validated[-1]
        loss = f"{last['val/loss']:.4f} nats a token at step {int(last['step']):,}"
        facts["validation loss"] = f"{loss} ({last.get('val/precision', 'fp32')})"
    rows = [f"| {name} | {value} |" for name, value in facts.items()]
    return ["## Training", "", "| what | value |", "|---|---|", *rows, ""]


def _evaluation(run: Path, step: int) -> list[str]:
    """Return the section with the complete evaluations of `step`; of repeated ones, the last."""
    path = run / "evaluations.jsonl"
    rows: dict[tuple[str, str, str], str] = {}
    for evaluation in json_lines(path) if path.is_file() else ():
        is_part = evaluation["limit"] or evaluation["stride"] or evaluation["file"]
        if evaluation["step"] != step or is_part:
            continue
        precision = evaluation["precision"]
        for task, figures in evaluation["tasks"].items():
            examples = figures.get("examples", "")
            for figure, value in figures.items():
                if isinstance(value, float):
                    cells = [task, figure, f"{value:.4f}", str(examples), precision]
                    rows[task, figure, precision] = f"| {' | '.join(cells)} |"
    if not rows:
        return []
    head = ["| task | figure | value | examples | precision |", "|---|---|---|---|---|"]
    return ["## Evaluation", "", *head, *rows.values(), ""]
