"""README.md of an exported model."""

import json
from pathlib import Path

from anew.checkpoint.huggingface import to_hf_config
from anew.config.recipes import read_recipe
from anew.report.model_card import model_card


def test_figures_stand_beside_those_of_gpt2_with_the_verdict(tmp_path: Path) -> None:
    config = read_recipe("gpt2-124m")
    checkpoint = tmp_path / "checkpoints" / "step-00019073"
    checkpoint.mkdir(parents=True)
    (tmp_path / "config.json").write_text(config.to_json())
    (tmp_path / "metrics.jsonl").touch()
    (checkpoint / "config.json").write_text(json.dumps(to_hf_config(config.model)))
    figures = {"acc": 0.2871, "acc_norm": 0.3021, "examples": 10042}
    comparison = {
        "task": "hellaswag",
        "figure": "acc_norm",
        "published": 0.2955,
        "verdict": "PASS",
    }
    whole = {
        "step": 19073,
        "limit": 0,
        "stride": 0,
        "file": "",
        "precision": "fp32",
        "tasks": {"hellaswag": figures},
        "comparisons": [comparison],
    }
    part = {**whole, "limit": 100, "tasks": {"hellaswag": {"acc_norm": 0.9}}}
    lines = [json.dumps(evaluation) for evaluation in (whole, part)]
    (tmp_path / "evaluations.jsonl").write_text("\n".join(lines))
    card = model_card(str(checkpoint), "me/mine")
    assert "| hellaswag | acc_norm | 0.3021 | 10042 | fp32 | 0.2955 | PASS |" in card
    assert "| hellaswag | acc | 0.2871 | 10042 | fp32 |  |  |" in card
    assert "0.9000" not in card, "a part of the examples is not comparable"
    assert 'from_pretrained("me/mine")' in card
