"""The whole product on real text, as its users run it."""

import io
import json
import tokenize
from pathlib import Path

import pytest
import torch

import anew
from anew.checkpoint import folder as checkpoint
from anew.cli import demo
from anew.cli.main import main
from anew.training import run_log as metrics
from tests.support import shared


def test_overfit_reaches_a_loss_below_0_04(tmp_path: Path) -> None:
    result = anew.train(anew.recipe("overfit", out=str(tmp_path / "run")))
    assert result.train_loss < 0.04
    assert result.val_loss is None


def test_shakespeare_learns_real_text(tmp_path: Path) -> None:
    data = shared("tinyshakespeare/input.txt")
    result = anew.train(
        anew.recipe(
            "shakespeare", data=str(data), steps=60, warmup_steps=10, out=str(tmp_path / "run")
        )
    )
    assert result.val_loss is not None
    assert result.val_loss < 2.5  # bytes by their frequency alone: 3.31
    rows = metrics.read_metrics(tmp_path / "run")
    assert {
        "step",
        "tokens",
        "seconds",
        "train/loss",
        "speed/tokens_per_second",
        "speed/mfu",
        "speed/tflops",
    } <= rows[10].keys()
    assert rows[-1]["val/precision"] == "fp32"


@pytest.mark.guarantee("gpt2")
def test_checkpoint_opens_in_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    anew.train(anew.recipe("demo", steps=3, warmup_steps=1, out=str(tmp_path / "run")))
    newest, _ = checkpoint.newest_valid(tmp_path / "run")
    assert newest is not None
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(newest).eval(),
        AutoTokenizer.from_pretrained(newest),
    )
    ids = tokenizer("import os\n", return_tensors="pt")["input_ids"]
    ours = anew.GPT.from_pretrained(str(tmp_path / "run"))
    with torch.no_grad():
        assert (model(ids).logits - ours(ids)).abs().max() < 2e-5
    theirs = model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=256)[
        0, ids.size(1) :
    ].tolist()
    [mine] = anew.generate(ours, ids, 20, stop=256, temperature=0.0)
    assert mine == theirs[: len(mine)]


def test_demo_trains_and_checks_its_samples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(
        [
            "train",
            "demo",
            "--steps",
            "20",
            "--val-tokens",
            "4096",
            "--out",
            str(tmp_path / "run"),
            "--json",
        ]
    )
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert result["val_loss"] < 5
    assert 0 <= result["python_share"] <= 1
    assert result["python_share_of_real_files"] > 0.95
    assert out.count("continued ---") == 3


@pytest.mark.parametrize(("line", "accepted"), [
    ("import os", True), ("    return self.x  # why", True), ("foo(a,", True),
    ('"""An opening docstring', True), ("x = 'unterminated", False), ("cost: 5$", False),
])  # fmt: skip
def test_lines_are_python_if_tokenize_accepts_them(line: str, accepted: bool) -> None:
    assert demo.is_python(line) is accepted
    if accepted and line == "import os":
        assert [t.string for t in tokenize.generate_tokens(io.StringIO(line).readline)][:2] == [
            "import",
            "os",
        ]
