"""Verdicts, projections and charts of a page, for runs that are written by hand."""

import csv
import dataclasses
import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from anew import UserError
from anew.cli.main import main
from anew.config.config import Config
from anew.config.recipes import RECIPES
from anew.report import html, png, verifications
from anew.report import reference_runs as reference
from anew.report.run import Run
from anew.report.svg import Line, Points, line_chart, short, smoothed, thinned, ticks
from tests.support import ROOT, shared
from tests.support.pages import like_gpt2, text_of

GPT2 = RECIPES["gpt2-124m"][1]
STORED_RUN = ROOT / "tests" / "fixtures" / "stored_runs" / "adamw_dropout"  # 24 steps


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a run folder that has only the settings of the stored run."""
    path = tmp_path / "run"
    path.mkdir()
    (path / "config.json").write_bytes((STORED_RUN / "config.json").read_bytes())
    return path


def test_interrupted_run_has_a_page(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no steps to report yet"):
        Run.read(folder)
    lines = (STORED_RUN / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    first_rows = [line for line, row in zip(lines, rows, strict=True) if row["step"] <= 10]
    half_a_line = '{"step": 11, "tok'
    (folder / "metrics.jsonl").write_text("\n".join([*first_rows, half_a_line]))
    text = text_of(html.page([Run.read(folder)]))
    assert "stopped" in text
    assert "10 of 24" in text
    assert "time left" in text
    with pytest.raises(UserError, match="is not a run folder"):
        Run.read(tmp_path)


def test_text_of_a_run_appears_literally(tmp_path: Path) -> None:
    """Neither HTML nor the syntax of templates in a sample, a log or a path has an effect."""
    text = "{{ 7*7 }} {% if x %} {# y #} <script>alert('&amp;')</script>"
    folder = tmp_path / "{{ 7*7 }} <b>"
    shutil.copytree(STORED_RUN, folder)
    sample = {"step": 8, "prompt": "{{ 7*7 }}", "text": text}
    (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    (folder / "log.txt").write_text(f"2026-01-01 00:00:00,000 WARNING log {text}\n")
    run = Run.read(folder)
    config = run.config.override(data=f"data {text}")
    page = html.page([dataclasses.replace(run, config=config)])
    assert "<script>alert" not in page
    found = text_of(page)
    assert f"{{{{ 7*7 }}}}{text}" in found, "the sample after its prompt"
    assert f"log {text}" in found
    assert f"data: data {text}" in found, "the settings"
    assert found.count(folder.name) == 2, "the title and the heading"
    assert "49" not in found


def test_run_without_finite_losses_has_a_page(folder: Path, tmp_path: Path) -> None:
    """A loss that is NaN is written as null."""
    row: dict[str, Any] = {
        "step": 1,
        "tokens": 256,
        "seconds": 1.0,
        "train/loss": None,
        "train/grad_norm": None,
        "train/lr": 1e-3,
        "speed/tokens_per_second": 9.0,
        "speed/mfu": 0.1,
    }
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    half_a_character = b"2026-01-01 00:00:00,000 WARNING half a character \xe2\x82"
    (folder / "log.txt").write_bytes(half_a_character)
    main(["report", str(folder), "--picture"])
    assert "training loss not finite" in text_of((folder / "report.html").read_text())
    gpt2 = like_gpt2(tmp_path / "gpt2", 0.1)
    for row in gpt2.rows:
        row.update({"train/loss": None, "val/loss": None})
    text_of(html.page([gpt2]))


@pytest.mark.guarantee("evidence")
def test_published_figures_of_gpt2_get_a_verdict_and_public_losses_do_not(tmp_path: Path) -> None:
    done = text_of(html.page([like_gpt2(tmp_path / "done", 1.01, "complete")]))
    assert "PASS 2 of 2 figures" in done, "HellaSwag's two, of all examples and in fp32"
    assert "Public runs" in done
    assert "3.2924" in done
    assert "needs OpenAI's weights" in done


def test_incomplete_run_gets_a_projection_and_no_verdict(tmp_path: Path) -> None:
    page = html.page([like_gpt2(tmp_path / "running", 0.4)])
    running = text_of(page)
    assert "expected at 10B tokens: 3.0" in running
    assert not re.search("PASS|FAIL", running)
    assert re.search(r"expected at 10B tokens: (29|30)\.\d% ± ", running)
    assert '<polygon class="band"' in page
    early = text_of(html.page([like_gpt2(tmp_path / "early", 0.03)]))
    assert "expected at" not in early


def test_picture_of_a_run_has_the_public_runs_of_its_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(png, "_save", lambda figure, _: figures.append(figure))
    png.progress([like_gpt2(tmp_path / "running", 0.4)], tmp_path / "progress.png")
    labels = {line.get_label() for line in figures[0].axes[0].lines}
    assert {curve.name for curve in reference.CURVES if curve.data == "FineWeb-Edu"} <= labels
    assert any("OpenAI's GPT-2 124M" in label for label in labels)


def test_data_folder_is_known_by_its_source(tmp_path: Path) -> None:
    (tmp_path / "edu").mkdir()
    index = {"source": "HuggingFaceFW/fineweb-edu:sample-10BT"}
    (tmp_path / "edu" / "index.json").write_text(json.dumps(index))
    assert reference.data_of(GPT2) == "FineWeb-Edu"
    assert reference.data_of(GPT2.override(data=str(tmp_path / "edu"))) == "FineWeb-Edu"
    assert reference.data_of(GPT2.override(data=str(tmp_path / "nothing"))) == ""


def test_hellaswag_levels_are_those_of_the_size() -> None:
    assert [name for name, _ in reference.hellaswag_levels("124M")] == ["GPT-2 124M", "GPT-3 124M"]
    assert reference.hellaswag_levels("1558M") == [("GPT-2 1558M", 0.4893)]
    assert reference.hellaswag_levels("774M") == []


def test_projection_holds_on_runs_it_has_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reference run is projected from its first part, with the other runs as references."""
    everything = reference.CURVES

    def first_part(points: Points, share: float) -> Points:
        return [point for point in points if point[0] <= share * reference.HORIZON]

    for own in everything:
        if not own.is_gpt2:
            continue
        others = tuple(curve for curve in everything if curve is not own)
        monkeypatch.setattr(reference, "CURVES", others)
        truth = reference.at(own.losses, reference.HORIZON)
        # Before a fifth of the run, a rate of 1.2e-3 is 0.07 ahead of 6e-4.
        for share in (0.2, 0.4, 0.7):
            found = reference.project(first_part(own.losses, share))
            assert found is not None
            allowed = max(1.5 * found.plus_minus, 0.025)
            assert abs(found.value - truth) <= allowed, (own.name, share)
        if own.hellaswag:
            losses = first_part(own.losses, 0.4)
            accuracies = first_part(own.hellaswag, 0.4)
            loss = reference.project(losses)
            assert loss is not None
            accuracy = reference.project_hellaswag(accuracies, losses, loss)
            assert accuracy is not None
            assert abs(accuracy.value - own.hellaswag[-1][1]) <= accuracy.plus_minus
    assert reference.project([(1e8, 4.0)]) is None
    assert not reference.is_like_them(Config().override(steps=100))


def test_reference_curves_are_those_of_the_logs() -> None:
    logs = []
    for path in sorted(shared("reference_runs").glob("*.csv")):
        with path.open() as file:
            logs.append({int(row["step"]): row for row in csv.DictReader(file)})
    assert len(logs) == len(reference.CURVES)
    for curve in reference.CURVES:
        steps = [int(step) for step in curve.step_text.split()]
        assert 15 < len(steps) < 60
        last_loss = curve.losses[-1][1]
        [log] = [log for log in logs if abs(float(log[max(log)]["val_loss"]) - last_loss) < 1e-4]
        for step, (_, loss) in zip(steps, curve.losses, strict=True):
            assert loss == pytest.approx(float(log[step]["val_loss"]), abs=6e-5)
        for step, (_, accuracy) in zip(steps, curve.hellaswag, strict=False):
            assert accuracy == pytest.approx(float(log[step]["hellaswag_acc_norm"]), abs=6e-5)


NOISE = random.Random(1)


@pytest.mark.parametrize(
    "points",
    [
        [(1.0, 2.0)],
        [(0.0, 0.0), (1.0, 0.0)],
        [(float(i), NOISE.random() - 0.5) for i in range(5000)],
        [(1.0, float("nan")), (2.0, 3.0)],
        [(1e12, 1e-9), (2e12, 3e-9)],
        [(0.0, 5.0), (0.0, 5.0)],
    ],
    ids=["one point", "zeros", "noise", "nan", "large and small", "same place"],
)
def test_chart_stays_within_its_area(points: Points) -> None:
    svg = line_chart("A & <b>", [Line("x<y", points)], "u")
    text_of(svg)
    curve = svg.split("<polyline")[-1] + 'points=""'
    [path, *_] = re.findall(r'points="([^"]*)"', curve)
    numbers = [float(number) for number in path.replace(",", " ").split()]
    assert all(-1 <= number <= 721 for number in numbers)


def test_numbers_and_points_of_charts() -> None:
    assert line_chart("empty", [Line("x", [])], "u") == ""
    assert thinned([(float(i), 1.0) for i in range(1000)], 10)[-1] == (999.0, 1.0)
    constant = [(float(i), 0.00677339) for i in range(7333)]
    assert {y for _, y in thinned(constant)} == {0.00677339}, "rounding gives it no range"
    moving_mean = smoothed([(float(i), float(i % 2)) for i in range(1000)])
    assert moving_mean[500][1] == pytest.approx(0.5, abs=0.05)
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert [short(x) for x in (1.5e9, 12_000, 0.25, 3e8)] == ["1.5B", "12k", "0.25", "300M"]


def test_verifications_are_kept_in_order_and_newer_formats_are_refused(folder: Path) -> None:
    assert verifications.read(folder) == []
    check = {"name": "manifest", "status": "PASS", "detail": "8 files"}
    verifications.append(folder, 10, [check])
    path = folder / "verifications.jsonl"
    path.write_text(path.read_text() + '\n{"format": 1, "st')
    verifications.append(folder, 20, [check])
    rows = verifications.read(folder)
    assert [row["step"] for row in rows] == [10, 20]
    assert rows[0]["checks"] == [check]
    path.write_text('{"format": 2}')
    with pytest.raises(UserError, match="reads formats up to 1; update anew"):
        verifications.read(folder)
