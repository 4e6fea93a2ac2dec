"""The page about a trained run: it says what the run folder holds."""

import json
from pathlib import Path

import pytest

from anew import GPT, UserError
from anew.checkpoint.huggingface import save_model
from anew.cli.main import main
from anew.config.config import Config
from anew.report import baseline, html
from anew.report.run import Run
from anew.tokenizer.bpe import Tokenizer
from anew.training.trainer import train
from tests.faults.common import tiny
from tests.support.pages import text_of


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "one <b>bold</b> run"
    config = tiny(
        folder,
        steps=60,
        evaluate_every=20,
        sample_every=20,
        sample_prompt="<script>alert(1)</script>",
        sample_tokens=20,
    )
    train(config)
    return folder


def test_page_says_what_the_run_holds(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["report", str(run), "--price", "3", "--picture", "--json"])
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert Path(facts["page"]) == run / "report.html"
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page
    text = text_of(page)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last_loss = [row["val/loss"] for row in rows if "val/loss" in row][-1]
    assert f"{last_loss:.4f}" in text
    expected = {"run": str(run), "status": "complete", "step": 60, "val_loss": last_loss}
    assert facts["runs"][0] == expected
    for words in (
        "60 of 60",
        "Learning rate",
        "Gradient norm",
        "Samples",
        "step 40",
        "Started 1 time",
        "n_layer: 2",
        "a loss of 5.55",
        "cost at $3 an hour",
        "<script>alert(1)</script>",
    ):
        assert words in text, words
    assert (run / "progress-step-60.png").read_bytes().startswith(b"\x89PNG")


def test_curves_of_several_runs_share_their_charts(run: Path, tmp_path: Path) -> None:
    other = tiny(tmp_path / "other", steps=30, lr=1e-3)
    train(other)
    out = tmp_path / "both.html"
    main(["report", str(run), str(other.folder), "--out", str(out)])
    page = out.read_text()
    assert text_of(page).count("other") > 5
    assert page.count('<polyline class="own-2"') >= 4


def saved_model(folder: Path, model: GPT, tokenizer: str) -> Path:
    folder.mkdir()
    save_model(folder, model, Tokenizer.named(tokenizer))
    return folder


def test_verdict_compares_losses_on_the_same_windows(run: Path, tmp_path: Path) -> None:
    """The run is better than an untrained model, and worse than one that was trained longer."""
    config = Config.read(run / "config.json")
    untrained = saved_model(tmp_path / "untrained", GPT(config.model, seed=9), "bytes")
    loss = baseline.score(Run.read(run), str(untrained))
    assert loss == pytest.approx(5.55, abs=0.1)
    page = html.page([Run.read(run)])
    assert "PASS 1 of 1 figures" in text_of(page)
    assert f"on the same windows, {loss:.4f}</text>" in page, "its level is drawn in the chart"
    both = text_of(html.page([Run.read(run)] * 2))
    assert "PASS 2 of 2 figures" in both, "each of several runs has its verdict"
    longer = tiny(tmp_path / "longer", steps=400, data=config.data.data)
    train(longer)
    own_loss = Run.read(run).final_loss
    assert own_loss is not None
    assert baseline.score(Run.read(run), str(longer.folder)) < own_loss
    assert "FAIL 0 of 1 figures" in text_of(html.page([Run.read(run)]))
    (run / "baseline.json").unlink()


def test_model_with_other_tokens_is_refused_as_a_baseline(run: Path, tmp_path: Path) -> None:
    shape = Config().override(n_layer=1, n_embd=32, n_head=1).model
    gpt2 = saved_model(tmp_path / "gpt2", GPT(shape), "gpt2")
    with pytest.raises(UserError, match="other tokens"):
        baseline.score(Run.read(run), str(gpt2))
