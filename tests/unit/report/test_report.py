"""The page about a run: what it says is what the run holds, verdicts only where one measurement stands beside the same one."""

import csv
import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from anew import GPT, UserError
from anew.checkpoint import huggingface as weights
from anew.cli.main import main
from anew.config.recipes import RECIPES
from anew.config.schema import Config
from anew.report import baseline
from anew.report import html as page
from anew.report import reference_runs as reference
from anew.report.run import Run
from anew.report.svg import Line, line_chart, short, smoothed, thinned, ticks
from anew.tokenizer.bpe import Tokenizer
from anew.training.trainer import train
from tests.faults.common import tiny
from tests.support import shared

VOID = {"meta", "link", "br", "input", "img", "hr"}


class Balanced(HTMLParser):
    """Every tag closed in its turn, and what a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [
            f"{tag} {name}={value}"
            for name, value in attrs
            if name in ("src", "href", "data", "action", "srcset")
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data


def read(html: str) -> Balanced:
    parser = Balanced()
    parser.feed(html)
    assert parser.open == []
    assert parser.fetched == [], "a page fetches nothing"
    assert not re.search(r"url\((?!#)|@import", html)
    return parser


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "one <b>bold</b> run"
    train(
        tiny(
            folder,
            steps=60,
            evaluate_every=20,
            sample_every=20,
            sample_prompt="<script>alert(1)</script>",
            sample_tokens=20,
        )
    )
    return folder


def test_the_page_says_what_the_run_holds(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["report", str(run), "--price", "3", "--picture", "--json"])
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    html = Path(facts["page"]).read_text(encoding="utf-8")
    assert Path(facts["page"]) == run / "report.html"
    assert "<script>alert" not in html
    found = read(html)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    val = [row["val/loss"] for row in rows if "val/loss" in row]
    assert f"{val[-1]:.4f}" in found.text
    assert facts["runs"][0] == {
        "run": str(run),
        "status": "complete",
        "step": 60,
        "val_loss": val[-1],
    }
    for words in ("60 of 60", "Learning rate", "Gradient norm", "What it wrote", "step 40", "Started 1 time", "n_layer: 2", "is 5.55",
                  "cost at $3 an hour", "<script>alert(1)</script>"):  # fmt: skip
        assert words in found.text, words
    assert (run / "progress-step-60.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_goes_on_or_broke_off_has_a_page_too(run: Path, tmp_path: Path) -> None:
    part = tmp_path / "part"
    part.mkdir()
    (part / "config.json").write_text((run / "config.json").read_text())
    with pytest.raises(UserError, match="no steps to report yet"):
        Run.read(part)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (part / "metrics.jsonl").write_text("\n".join(lines[:25]) + '\n{"step": 26, "tok')
    text = read(page.page([Run.read(part)])).text
    assert "stopped" in text
    assert "24 of 60" in text
    assert "time left" in text
    with pytest.raises(UserError, match="is not a run folder"):
        Run.read(tmp_path)


def test_a_run_that_was_never_finite_has_a_page(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """NaN is written as null."""
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "config.json").write_text((run / "config.json").read_text())
    row = {
        "step": 1,
        "tokens": 256,
        "seconds": 1.0,
        "train/loss": None,
        "train/grad_norm": None,
        "train/lr": 1e-3,
    }
    row |= {"speed/tokens_per_second": 9.0, "speed/mfu": 0.1}
    (bad / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (bad / "log.txt").write_bytes(b"2026-01-01 00:00:00,000 WARNING half a character \xe2\x82")
    main(["report", str(bad), "--picture"])
    assert "training loss not finite" in read((bad / "report.html").read_text()).text
    gpt2 = like_gpt2(tmp_path / "gpt2", 0.1)
    for row in gpt2.rows:
        row.update({"train/loss": None, "val/loss": None})
    read(page.page([gpt2]))


def test_runs_are_drawn_over_each_other(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tiny(tmp_path / "other", steps=30, lr=1e-3)
    train(other)
    main(["report", str(run), str(other.folder), "--out", str(tmp_path / "both.html")])
    html = (tmp_path / "both.html").read_text()
    assert read(html).text.count("other") > 5
    assert html.count('<polyline class="own-2"') >= 4


def test_a_verdict_is_against_the_same_windows(run: Path, tmp_path: Path) -> None:
    """A model that has learnt nothing is beaten, one that has learnt longer is not."""
    config = Config.read(run / "config.json")
    untrained = tmp_path / "untrained"
    untrained.mkdir()
    weights.save_model(untrained, GPT(config.model, seed=9), Tokenizer.named("bytes"))
    loss = baseline.score(Run.read(run), str(untrained))
    assert loss == pytest.approx(5.55, abs=0.1)
    html = page.page([Run.read(run)])
    assert "PASS 1 of 1 figures" in read(html).text
    assert f"on the same windows, {loss:.4f}</text>" in html, (
        "its level is drawn through the curves"
    )
    both = read(page.page([Run.read(run)] * 2)).text
    assert "PASS 2 of 2 figures" in both, "each run of several has its verdict"
    longer = tiny(tmp_path / "longer", steps=400, data=config.data.data)
    train(longer)
    assert baseline.score(Run.read(run), str(longer.folder)) < Run.read(run).final_loss[0]
    assert "FAIL 0 of 1 figures" in read(page.page([Run.read(run)])).text
    (run / "baseline.json").unlink()
    with pytest.raises(UserError, match="other tokens"):
        gpt2 = tmp_path / "gpt2"
        gpt2.mkdir()
        weights.save_model(
            gpt2,
            GPT(Config().override(n_layer=1, n_embd=32, n_head=1).model),
            Tokenizer.named("gpt2"),
        )
        baseline.score(Run.read(run), str(gpt2))


def like_gpt2(folder: Path, share: float, status: str = "running", shift: float = 0.0) -> Run:
    """A run of gpt2-124m as far as this share, with the curve of a reference run."""
    folder.mkdir(parents=True)
    config = RECIPES["gpt2-124m"][1]
    (folder / "config.json").write_text(config.to_json())
    curve, end = reference.CURVES[0], share * reference.HORIZON
    rows: list[dict[str, Any]] = []
    for (x, loss), (_, accuracy) in zip(curve.losses, curve.hellaswag, strict=True):
        if 0 < x <= end:
            step = int(x) // reference.TOKENS_A_STEP
            clock = {"step": step, "tokens": x, "seconds": step * 0.3}
            speed = {"speed/tokens_per_second": 1.7e6, "speed/mfu": 0.5}
            rows.append({**clock, "train/loss": loss + shift, "train/lr": 6e-4, "train/grad_norm": 0.3, **speed, "val/loss": loss + shift,
                         "val/precision": "fp32", "eval/hellaswag/acc_norm": accuracy, "eval/hellaswag/acc": accuracy - 0.01,
                         "eval/hellaswag/precision": "fp32", "eval/hellaswag/examples": 10042})  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run_state.json").write_text(json.dumps({"status": status, "starts": 2}))
    return Run.read(folder)


def test_gpt2s_published_figures_get_a_verdict_and_other_peoples_losses_do_not(
    tmp_path: Path,
) -> None:
    done = read(page.page([like_gpt2(tmp_path / "done", 1.01, "complete")])).text
    assert "PASS 2 of 2 figures" in done, "HellaSwag's two, of all examples and in fp32"
    assert "Other people's runs" in done
    assert "3.2924" in done
    assert "needs OpenAI's weights" in done
    running = read(page.page([like_gpt2(tmp_path / "running", 0.4)])).text
    assert "expected at 10B tokens: 3.0" in running
    assert not re.search("PASS|FAIL", running), "no verdict on a part of a run"
    assert re.search(r"expected at 10B tokens: (29|30)\.\d% ± ", running)
    assert '<polygon class="band"' in page.page([Run.read(tmp_path / "running")])
    early = read(page.page([like_gpt2(tmp_path / "early", 0.03)])).text
    assert "expected at" not in early


def test_a_folder_of_tokens_says_what_it_was_made_from(tmp_path: Path) -> None:
    (tmp_path / "edu").mkdir()
    (tmp_path / "edu" / "index.json").write_text(
        json.dumps({"source": "HuggingFaceFW/fineweb-edu:sample-10BT"})
    )
    assert reference.data_of(RECIPES["gpt2-124m"][1]) == "FineWeb-Edu"
    assert (
        reference.data_of(RECIPES["gpt2-124m"][1].override(data=str(tmp_path / "edu")))
        == "FineWeb-Edu"
    )
    assert reference.data_of(RECIPES["gpt2-124m"][1].override(data=str(tmp_path / "nothing"))) == ""


def test_levels_of_hellaswag_are_those_of_the_size() -> None:
    assert [name for name, _ in reference.hellaswag_levels("124M")] == ["GPT-2 124M", "GPT-3 124M"]
    assert reference.hellaswag_levels("1558M") == [("GPT-2 1558M", 0.4893)]
    assert reference.hellaswag_levels("774M") == []


def test_a_projection_holds_on_runs_it_has_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reference run from its first part, with the others as references: within what the projection says of itself."""
    everything = reference.CURVES
    for own in [c for c in everything if c.is_gpt2]:
        monkeypatch.setattr(reference, "CURVES", tuple(c for c in everything if c is not own))
        truth = reference.at(own.losses, reference.HORIZON)
        for share in (0.2, 0.4, 0.7):  # earlier, a rate of 1.2e-3 is 0.07 ahead of 6e-4
            found = reference.project([p for p in own.losses if p[0] <= share * reference.HORIZON])
            assert found is not None
            assert abs(found.value - truth) <= max(1.5 * found.plus_minus, 0.025), (own.name, share)
        if own.hellaswag:
            part = [
                [p for p in points if p[0] <= 0.4 * reference.HORIZON]
                for points in (own.hellaswag, own.losses)
            ]
            accuracy = reference.project_hellaswag(part[0], part[1], reference.project(part[1]))
            assert accuracy is not None
            assert abs(accuracy.value - own.hellaswag[-1][1]) <= accuracy.plus_minus
    assert reference.project([(1e8, 4.0)]) is None
    assert not reference.is_like_them(Config().override(steps=100))


def test_reference_curves_are_the_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    files = sorted(shared("reference_runs").glob("*.csv"))
    logs = [{int(row["step"]): row for row in csv.DictReader(file.open())} for file in files]
    assert len(logs) == len(reference.CURVES)
    for curve in reference.CURVES:
        steps = [int(s) for s in curve.step_text.split()]
        assert 15 < len(steps) < 60
        [log] = [
            log
            for log in logs
            if abs(float(log[max(log)]["val_loss"]) - curve.losses[-1][1]) < 1e-4
        ]
        for step, (_, loss) in zip(steps, curve.losses, strict=True):
            assert loss == pytest.approx(float(log[step]["val_loss"]), abs=6e-5)
        for step, (_, accuracy) in zip(steps, curve.hellaswag, strict=False):
            assert accuracy == pytest.approx(float(log[step]["hellaswag_acc_norm"]), abs=6e-5)


def test_charts_of_all_kinds_of_numbers() -> None:
    generator = random.Random(1)
    for points in (
        [(1.0, 2.0)], [(0.0, 0.0), (1.0, 0.0)], [(float(i), generator.random() - 0.5) for i in range(5000)],
        [(1.0, float("nan")), (2.0, 3.0)], [(1e12, 1e-9), (2e12, 3e-9)], [(0.0, 5.0), (0.0, 5.0)],
    ):  # fmt: skip
        svg = line_chart("A & <b>", [Line("x<y", points)], "u")
        read(svg)
        numbers = [
            float(n)
            for n in re.findall(r'points="([^"]*)"', svg.split("<polyline")[-1] + 'points=""')[0]
            .replace(",", " ")
            .split()
        ]
        assert all(-1 <= n <= 721 for n in numbers)
    assert line_chart("empty", [Line("x", [])], "u") == ""
    assert thinned([(float(i), 1.0) for i in range(1000)], 10)[-1] == (999.0, 1.0)
    assert smoothed([(float(i), float(i % 2)) for i in range(1000)])[500][1] == pytest.approx(
        0.5, abs=0.05
    )
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert [short(x) for x in (1.5e9, 12_000, 0.25, 3e8)] == ["1.5B", "12k", "0.25", "300M"]
