"""The bench measures the product's own step, and each rung is the same computation. No assertion here is about time."""

import json
from pathlib import Path

import pytest
import torch

import anew
from anew.bench import compare as versus
from anew.bench import competitors as rivals
from anew.bench import timing as bench
from anew.cli.main import main
from anew.errors import UserError
from anew.training.step import train_step
from anew.training.train_state import TrainState
from anew.utils import device as runtime
from anew.utils.signals import StopFlag
from tests.faults.common import tiny

SMALL = [
    "--n-layer",
    "1",
    "--n-head",
    "2",
    "--n-embd",
    "32",
    "--seq-len",
    "32",
    "--micro-batch",
    "2",
    "--rounds",
    "2",
]


def test_the_ladder_prints_draws_and_counts(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = tuple(
        bench.Rung(r.name, {**r.settings, "compile": "off"}, r.matmul, r.devices, r.lacking)
        for r in bench.RUNGS
    )
    monkeypatch.setattr(bench, "RUNGS", quick)
    monkeypatch.setattr(
        bench, "apart", bench.measure
    )  # starting eight processes takes half a minute; another test does it
    picture = tmp_path / "ladder.png"
    main(
        [
            "bench",
            "ladder",
            "gpt2-124m",
            *SMALL,
            "--device",
            "cpu",
            "--picture",
            str(picture),
            "--json",
        ]
    )
    out = capsys.readouterr().out
    facts = json.loads(out.splitlines()[-1])
    names = [row["rung"] for row in facts["rungs"]]
    assert names == [r.name for r in bench.RUNGS if "cpu" in r.devices]
    assert facts["skipped"] == {
        "TF32 matrices": "only NVIDIA GPUs have TF32",
        "cuDNN's attention": "cuDNN is NVIDIA's",
    }
    for row in facts["rungs"]:
        assert row["ms"] > 0
        assert row["tokens_per_second"] == pytest.approx(64 / row["ms"] * 1e3)
        assert abs(row["loss_difference"]) < 0.05, "a rung changes the speed, not the computation"
        assert row["memory_bytes"] > 1e7
    assert facts["speedup"] == pytest.approx(facts["rungs"][0]["ms"] / facts["rungs"][-1]["ms"])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert [line for line in out.splitlines()[:-1] if len(line) > 80] == []


def test_bottom_and_top_are_the_same_computation_in_fp32(tmp_path: Path) -> None:
    """Plain attention, all logits at once, unpadded rows and torch's default AdamW, against the product's own: the same losses."""
    found = []
    for settings in ({}, {**bench.BOTTOM}):
        config = tiny(
            tmp_path / "run",
            vocab_size=50257,
            tokenizer="gpt2",
            steps=6,
            warmup_steps=1,
            **{"precision": "fp32", **settings},
        )
        losses = bench.measure(bench.at(config, 4, 16), steps=5).losses
        found.append(losses)
    assert found[0] == pytest.approx(found[1], rel=2e-6)
    assert found[0][0] - found[0][-1] > 0.01, "it learns"


def test_an_unfused_optimizer_keeps_weights_at_a_bad_step_too(tmp_path: Path) -> None:
    config = tiny(tmp_path / "run", fused=False)
    state = TrainState(config, runtime.start(config.run), "")
    before = [p.detach().clone() for p in state.parameters]
    batch = bench.text_batch(config, torch.device("cpu"))
    outcome = train_step(
        lambda x, y: state.model(x, y) * float("nan"), state, batch, 1.0, StopFlag()
    )
    assert not outcome.applied
    assert all(torch.equal(a, b) for a, b in zip(before, state.parameters, strict=True))
    assert train_step(state.model, state, batch, 1.0, StopFlag()).applied


def test_attention_and_what_a_rung_cannot_do(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = anew.recipe("gpt2-124m", n_layer=1, n_head=2, n_embd=32, device="cpu", compile="off")
    for kind in ("plain", "flash"):
        found = bench.attention_apart(config, kind, (64, 128), 2, "cpu")
        assert [f.tokens for f in found if not isinstance(f, str)] == [4 * 64, 4 * 128]
    assert (
        bench.apart(config.override(precision="tf32"), 1)
        == "tf32 needs an NVIDIA GPU of compute capability 8.0 or newer; use --precision fp32."
    )


@pytest.mark.parametrize(
    ("what", "more"), [("train", ["--compile", "off"]), ("generate", ["--new-tokens", "4"])]
)
def test_side_by_side_with_transformers(
    what: str, more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    main(["bench", what, "gpt2-124m", *SMALL, *more, "--device", "cpu", "--json"])
    out = capsys.readouterr().out
    facts = json.loads(out.splitlines()[-1])
    assert facts["ratio_to_transformers"] > 0
    assert [len(t) for t in facts["seconds"].values()] == [2] * len(facts["seconds"])
    assert "transformers takes" in out
    assert [line for line in out.splitlines()[:-1] if len(line) > 80] == []


def test_evaluate_and_prepare_beside_the_usual_way(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    questions = [{"ind": i, "ctx": f"A cook stands in kitchen {i}. She", "endings": ["stirs", "flies off", "is a car", "sings"], "label": 0}
                 for i in range(12)]  # fmt: skip
    file = tmp_path / "hellaswag_val.jsonl"
    file.write_text(
        "".join(
            json.dumps(
                q
                | {
                    "ctx_a": "A",
                    "ctx_b": "b",
                    "activity_label": "Cooking",
                    "source_id": "1",
                    "split": "val",
                }
            )
            + "\n"
            for q in questions
        )
    )
    for what, other in (
        (["evaluate", "--file", str(file), "--examples", "3"], "one at a time"), (["prepare", "--documents", "20"], "script"),
    ):  # fmt: skip
        main(["bench", *what, "--rounds", "1", "--device", "cpu", "--json"])
        out = capsys.readouterr().out
        facts = json.loads(out.splitlines()[-1])
        assert set(facts["seconds"]) == {"anew", other}
        assert facts[f"ratio_to_{other.replace(' ', '_')}"] > 0


def test_a_side_that_dies_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="the process of other ended"):
        versus.alternate({"other": rivals.text_of}, (), 1)


def test_ratios_are_of_neighbouring_turns() -> None:
    assert versus.ratio([1.0, 2.0, 4.0], [2.0, 6.0, 4.0]) == (2.0, 1.0, 3.0)


def test_what_there_is_to_time_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    for line, words in (
        ("bench", "say which."),
        ("bench dreams", "not dreams"),
        ("bench ladder demo --rounds 0", "at least 1"),
    ):
        with pytest.raises(SystemExit) as left:
            main(line.split())
        assert left.value.code == 2
        assert words in capsys.readouterr().err
