"""The model card: README.md of an exported model folder, with the figures of its run."""

import os
import re
from pathlib import Path

from anew.checkpoint.huggingface import find_model, read_config
from anew.config.config import Config
from anew.model.flops import count_parameters
from anew.report.templates import render
from anew.tokenizer.bpe import Tokenizer
from anew.tokenizer.chat import is_chat_model
from anew.training import run_log
from anew.utils.files import json_lines

Cells = tuple[object, ...]  # of one row of a table


def model_card(model: str, repository: str = "") -> str:
    """Return README.md of an exported folder: what the model is, how it was trained, how to use it.

    Training and evaluation are described if `model` is a checkpoint in a run folder. `repository`
    is the name by which transformers will find the model, if it is on the hub.
    """
    path = find_model(model).resolve()
    config = read_config(path)
    run = path.parent.parent
    is_in_run = path.parent.name == "checkpoints"
    training: dict[str, object] = {}
    evaluation: list[Cells] = []
    step = re.fullmatch(r"step-(\d+)", path.name)
    if step and (run / "config.json").is_file():
        training = _training(run, int(step[1]))
        evaluation = _evaluation(run, int(step[1]))
    return render(
        "model_card.md",
        name=run.name if is_in_run else Path(model).name,
        parameters=f"{count_parameters(config) / 1e6:,.1f}M",
        config=config,
        tokenizer=Tokenizer.of_model(path, config.vocab_size).name,
        training=training,
        evaluation=evaluation,
        address=repository or "THIS FOLDER",
        is_chat=is_chat_model(path),
    )


def _training(run: Path, step: int) -> dict[str, object]:
    """Return facts about how the checkpoint of `step` was trained."""
    config = Config.read(run / "config.json")
    data, optim = config.data.data, config.optim
    batch_tokens = config.run.batch_tokens
    most = "at most " if config.data.conversations else ""  # they are shorter than `seq_len`
    rates = f"learning rate {optim.lr:g} to {optim.min_lr:g}"
    if optim.optimizer == "muon":
        rates += f", Muon's {optim.muon_lr:g}"
    facts = {
        "recipe": config.recipe,
        "steps": f"{step:,} of {config.run.steps:,}",
        "tokens": f"{most}{step * batch_tokens:,} ({most}{batch_tokens:,} a step)",
        "text": Path(data).name if os.path.sep in data else data,
        "begun from": config.run.init or "random weights",
        "optimizer": f"{optim.optimizer}, {rates}",
        "seed": config.run.seed,
    }
    validated = [
        row for row in run_log.read_metrics(run) if "val/loss" in row and row["step"] <= step
    ]
    if validated:
        last = validated[-1]
        unit = "token of the answers" if config.data.conversations else "token"
        loss = f"{last['val/loss']:.4f} nats a {unit} at step {int(last['step']):,}"
        facts["validation loss"] = f"{loss} ({last.get('val/precision', 'fp32')})"
    return facts


def _evaluation(run: Path, step: int) -> list[Cells]:
    """Return the figures of complete evaluations of `step`; of repeated ones, the last.

    Each has its task, name, value, number of examples, precision and, where GPT-2's figure is
    known, that figure and the verdict.
    """
    path = run / "evaluations.jsonl"
    rows: dict[tuple[str, str, str], Cells] = {}
    for evaluation in json_lines(path) if path.is_file() else ():
        is_part = evaluation["limit"] or evaluation["stride"] or evaluation["file"]
        if evaluation["step"] != step or is_part:
            continue
        precision = evaluation["precision"]
        published = {(one["task"], one["figure"]): one for one in evaluation["comparisons"]}
        for task, figures in evaluation["tasks"].items():
            examples = figures.get("examples", "")
            for figure, value in figures.items():
                if isinstance(value, float):
                    theirs: Cells = ("", "")
                    if (task, figure) in published:
                        found = published[task, figure]
                        theirs = (f"{found['published']:.4f}", found["verdict"])
                    cells = (task, figure, f"{value:.4f}", examples, precision, *theirs)
                    rows[task, figure, precision] = cells
    return list(rows.values())
