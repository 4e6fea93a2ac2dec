"""What a run's settings become before its first step."""

import re
import shlex
from pathlib import Path

import pytest

from anew import Config, UserError, train
from anew.cli.main import main
from anew.cli.train import TRAIN
from anew.config.recipes import read_recipe
from anew.training.run_settings import eager_if_short, resolve_config
from tests.faults.common import tiny


def short_run(out: Path, **settings: object) -> Config:
    return tiny(out, compile="auto", **settings)


def store(config: Config) -> None:
    config.folder.mkdir(parents=True)
    (config.folder / "config.json").write_text(config.to_json())


def test_short_run_is_not_compiled_unless_asked(tmp_path: Path) -> None:
    assert eager_if_short(short_run(tmp_path / "run")).run.compile == "off"
    assert eager_if_short(tiny(tmp_path / "run", compile="on")).run.compile == "on"
    assert eager_if_short(tiny(tmp_path / "run", compile="blocks")).run.compile == "blocks"


def test_reproduction_of_gpt2_is_compiled() -> None:
    config = read_recipe("gpt2-124m").override(device="cpu")
    assert eager_if_short(config).run.compile == "auto"


def test_resumed_run_computes_as_it_began(tmp_path: Path) -> None:
    config = short_run(tmp_path / "run", schedule="linear", decay_share=0.5)
    store(resolve_config(config))
    longer = config.override(steps=10**9)  # long enough for compiling, if the run were new
    assert eager_if_short(longer).run.compile == "auto"
    assert resolve_config(longer).run.compile == "off"


def test_run_of_an_earlier_version_stays_compiled(tmp_path: Path) -> None:
    config = short_run(tmp_path / "run")
    store(config)  # earlier versions stored "auto" and compiled
    assert resolve_config(config).run.compile == "auto"


def test_run_is_not_begun_in_a_folder_with_other_files(tmp_path: Path) -> None:
    config = short_run(tmp_path / "run")
    config.folder.mkdir()
    (config.folder / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds other files, such as thesis\.txt"):
        resolve_config(config)


def test_run_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    config = short_run(tmp_path / "run")
    config.folder.write_text("mine")
    with pytest.raises(UserError, match="is a file; choose another --out"):
        resolve_config(config)


def test_run_that_was_killed_before_it_wrote_its_settings_can_begin_again(tmp_path: Path) -> None:
    config = short_run(tmp_path / "run")
    for name in ("log.txt", "metrics.jsonl", ".lock"):
        config.folder.mkdir(exist_ok=True)
        (config.folder / name).touch()
    assert resolve_config(config).folder == config.folder


def test_refused_run_leaves_no_folder(tmp_path: Path) -> None:
    config = tiny(tmp_path / "run").override(data=str(tmp_path / "nothing.txt"))
    with pytest.raises(UserError, match="there is no data"):
        train(config)
    assert not config.folder.exists()


def test_fewer_steps_than_were_taken_are_refused_before_any_other_rule(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    (run / "checkpoints" / "step-00000020").mkdir(parents=True)
    (run / "config.json").write_text(tiny(run, warmup_steps=15).to_json())
    with pytest.raises(SystemExit):
        main(["train", "--resume", str(run), "--steps", "10"])
    assert "has taken 20 steps already" in capsys.readouterr().err


def test_run_of_another_recipe_is_named_with_what_differs(tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    store(read_recipe("demo").override(out=out))
    with pytest.raises(UserError) as caught:
        resolve_config(read_recipe("shakespeare").override(out=out))
    sentence = str(caught.value)
    assert "is another run of the recipe demo (n_layer: 4 -> 2; " in sentence
    assert re.search(r"; and \d+ more\); use the same settings", sentence)


def test_another_length_is_answered_with_a_command_that_keeps_what_was_chosen(
    tmp_path: Path,
) -> None:
    run = tmp_path / "my run"
    config = read_recipe("shakespeare").override(
        out=str(run), data="my text.txt", lr=0.001, deterministic=True, recut=False, steps=900
    )
    store(config)
    (run / "checkpoints" / "step-00000600").mkdir(parents=True)
    with pytest.raises(UserError, match="planned for 900 steps") as caught:
        resolve_config(config.override(steps=2000))
    command = str(caught.value).rpartition("a new warm-up: anew ")[2]
    words = shlex.split(command)
    assert words[:4] == ["train", "shakespeare", "--init", str(run)]
    typed = TRAIN.read(words[1:])
    wanted = {
        "init": str(run),
        "data": "my text.txt",
        "lr": 0.001,
        "deterministic": True,
        "recut": False,
        "out": "NEW",
        "steps": 2000,
    }
    assert typed.settings == wanted


def test_warm_up_that_follows_the_steps_is_not_called_a_difference(tmp_path: Path) -> None:
    run = tmp_path / "run"
    short, _ = read_recipe("shakespeare").override(out=str(run), steps=20).adapted({"steps"})
    longer, _ = read_recipe("shakespeare").override(out=str(run), steps=30).adapted({"steps"})
    assert short.optim.warmup_steps != longer.optim.warmup_steps
    store(short)
    (run / "checkpoints" / "step-00000020").mkdir(parents=True)
    with pytest.raises(UserError, match="planned for 20 steps"):
        resolve_config(longer)
    with pytest.raises(UserError, match=r"is another run \(lr: 0.006 -> 0.1; warmup_steps"):
        resolve_config(longer.override(lr=0.1))


def test_finetune_needs_a_text(tmp_path: Path) -> None:
    config = read_recipe("finetune").override(init=str(tmp_path), out=str(tmp_path / "run"))
    with pytest.raises(UserError, match="no text to train on is named: add --data"):
        config.check()


def test_batch_of_a_recipe_keeps_its_sequences_for_a_model_with_fewer_positions(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny(tmp_path / "model")
    train(model)
    recipe = read_recipe("finetune").override(init=str(model.folder), data=model.data.data)
    with caplog.at_level("INFO", "anew"):
        config = resolve_config(recipe.override(out=str(tmp_path / "run")))
    sequences = recipe.run.batch_tokens // recipe.data.seq_len
    assert config.data.seq_len == 16
    assert config.run.batch_tokens == 16 * sequences
    assert f"and batch_tokens to {16 * sequences:,}" in caplog.text
    typed = resolve_config(recipe.override(out=str(tmp_path / "typed"), batch_tokens=4096))
    assert typed.run.batch_tokens == 4096
    # A run of an earlier version keeps the batch that it began with.
    earlier = tmp_path / "earlier"
    earlier.mkdir()
    old = config.override(out=str(earlier), batch_tokens=recipe.run.batch_tokens)
    (earlier / "config.json").write_text(old.to_json())
    resumed = resolve_config(recipe.override(out=str(earlier)))
    assert resumed.run.batch_tokens == recipe.run.batch_tokens
