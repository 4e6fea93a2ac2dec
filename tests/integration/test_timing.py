"""`anew bench` with small models. No assertion is about time."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

import anew
from anew.bench import timing
from anew.bench.ladder import RUNGS
from anew.cli.main import main

SMALL = "--n-layer 1 --n-head 2 --n-embd 32 --seq-len 32 --micro-batch 2 --rounds 2 --device cpu"


def facts_of(output: str) -> dict[str, Any]:
    """Return the JSON object of the last line; the other lines fit in 80 columns."""
    *lines, last = output.splitlines()
    assert [line for line in lines if len(line) > 80] == []
    facts: dict[str, Any] = json.loads(last)
    return facts


def test_ladder_reports_and_draws_every_rung(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager = tuple(
        dataclasses.replace(rung, settings={**rung.settings, "compile": "off"}) for rung in RUNGS
    )
    monkeypatch.setattr(timing, "RUNGS", eager)
    monkeypatch.setattr(timing, "cpu_has_bf16", lambda: True)  # at this size any CPU is fast enough
    # Starting eight processes takes half a minute; another test starts one.
    monkeypatch.setattr(timing, "measure_in_new_process", timing.measure)
    picture = tmp_path / "ladder.png"
    main(["bench", "ladder", "gpt2-124m", *SMALL.split(), "--picture", str(picture), "--json"])
    facts = facts_of(capsys.readouterr().out)
    names = [row["rung"] for row in facts["rungs"]]
    assert names == [rung.name for rung in RUNGS if "cpu" in rung.devices]
    assert facts["skipped"] == {
        "TF32 matrices": "only NVIDIA GPUs have TF32",
        "cuDNN's attention": "cuDNN is NVIDIA's",
    }
    for row in facts["rungs"]:
        assert row["ms"] > 0
        assert row["tokens_per_second"] == pytest.approx(64 / row["ms"] * 1e3)
        assert abs(row["loss_difference"]) < 0.05, "a rung changes the speed, not the computation"
        assert row["memory_bytes"] > 1e7
    speedup = facts["rungs"][0]["ms"] / facts["rungs"][-1]["ms"]
    assert facts["speedup"] == pytest.approx(speedup)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_attention_is_timed_and_impossible_settings_give_a_sentence() -> None:
    config = anew.recipe("gpt2-124m", n_layer=1, n_head=2, n_embd=32, device="cpu", compile="off")
    for kind in ("plain", "flash"):
        found = timing.measure_attention(config, kind, (64, 128), 2, "cpu")
        assert [one.tokens for one in found if not isinstance(one, str)] == [4 * 64, 4 * 128]
    sentence = timing.measure_in_new_process(config.override(precision="tf32"), 1)
    assert sentence == (
        "tf32 needs an NVIDIA GPU of compute capability 8.0 or newer; use --precision fp32."
    )


@pytest.mark.guarantee("speed")
@pytest.mark.parametrize(
    ("what", "more"), [("train", ["--compile", "off"]), ("generate", ["--new-tokens", "4"])]
)
def test_comparison_with_transformers(
    what: str, more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    main(["bench", what, "gpt2-124m", *SMALL.split(), *more, "--json"])
    out = capsys.readouterr().out
    facts = facts_of(out)
    assert facts["ratio_to_transformers"] > 0
    assert [len(turns) for turns in facts["seconds"].values()] == [2] * len(facts["seconds"])
    assert "transformers takes" in out


def test_prompts_are_compared_without_the_int8_weights_that_do_not_read_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    sizes = ["--prompt-tokens", "20", "--new-tokens", "1", "--precision", "fp32"]
    main(["bench", "generate", "gpt2-124m", *SMALL.split(), *sizes, "--json"])
    out = capsys.readouterr().out
    facts = facts_of(out)
    assert "anew, int8" not in facts["seconds"]
    assert facts["precision"] == "fp32"
    assert "prompt tokens a second" in out


@pytest.mark.guarantee("speed")
def test_comparison_of_scoring(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "hellaswag_val.jsonl"
    question = {
        "endings": ["stirs", "flies off", "is a car", "sings"],
        "label": 0,
        "ctx_a": "A",
        "ctx_b": "b",
        "activity_label": "Cooking",
        "source_id": "1",
        "split": "val",
    }
    with file.open("w") as out:
        for i in range(12):
            row = {"ind": i, "ctx": f"A cook stands in kitchen {i}. She", **question}
            out.write(json.dumps(row) + "\n")
    argv = f"bench evaluate --file {file} --examples 3 --rounds 1 --device cpu --json"
    main(argv.split())
    facts = facts_of(capsys.readouterr().out)
    assert set(facts["seconds"]) == {"anew", "one at a time"}
    assert facts["ratio_to_one_at_a_time"] > 0


def test_comparison_of_preparing(capsys: pytest.CaptureFixture[str]) -> None:
    main(["bench", "prepare", "--documents", "20", "--rounds", "1", "--device", "cpu", "--json"])
    facts = facts_of(capsys.readouterr().out)
    assert set(facts["seconds"]) == {"anew", "script"}
    assert facts["ratio_to_script"] > 0
