"""Recipes, the rules of settings, and config.json."""

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anew.config.config import Config
from anew.config.recipes import RECIPES, read_recipe, recipe
from anew.config.schema import FIELDS
from anew.errors import UserError


def test_recipe_gpt2_124m_has_the_published_figures() -> None:
    config = recipe("gpt2-124m")
    optim = config.optim
    assert (optim.beta1, optim.beta2, optim.eps) == (0.9, 0.95, 1e-8)
    assert (optim.weight_decay, optim.clip) == (0.1, 1.0)
    assert (optim.lr, optim.warmup_steps, optim.schedule) == (6e-4, 715, "cosine")
    assert optim.min_lr == pytest.approx(6e-5)
    assert (config.run.batch_tokens, config.run.steps) == (524_288, 19_073)
    assert (config.run.micro_batch, config.data.seq_len) == ("auto", 1024)
    assert config.run.steps * config.run.batch_tokens == pytest.approx(10e9, rel=1e-4)
    assert recipe("gpt2-124m-openwebtext").run.steps == 90_000


def test_auto_micro_batch_on_four_ranks_is_that_of_the_reference() -> None:
    assert recipe("gpt2-124m").micro_batches(4) == (16, 8)


@pytest.mark.parametrize(
    ("name", "layers", "heads", "width", "lr"),
    [
        ("gpt2-350m", 24, 16, 1024, 3e-4),
        ("gpt2-355m", 24, 16, 1024, 3e-4),
        ("gpt2-774m", 36, 20, 1280, 2.5e-4),
        ("gpt2-1558m", 48, 25, 1600, 2e-4),
    ],
)
def test_larger_recipes_have_the_published_shapes_and_learning_rates(
    name: str, layers: int, heads: int, width: int, lr: float
) -> None:
    config = recipe(name)
    model = config.model
    assert (model.n_layer, model.n_head, model.n_embd) == (layers, heads, width)
    assert config.optim.lr == lr


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_can_be_run(name: str) -> None:
    settings = {"init": "x", "data": "y"} if name in ("finetune", "chat") else {}
    assert recipe(name, **settings).recipe == name


def test_every_recipe_summary_fits_the_overview() -> None:
    assert all(len(summary) <= 55 for summary, _ in RECIPES.values())


def test_every_setting_has_a_help_line() -> None:
    assert all(len(field.metadata["help"]) > 10 for field in FIELDS.values())


@pytest.mark.parametrize(("steps", "warm_up"), [(40, 20), (39, 3), (8, 0), (1000, 20)])
def test_warm_up_of_more_than_half_a_run_is_shortened(steps: int, warm_up: int) -> None:
    config, lines = recipe("shakespeare").override(steps=steps).adapted({"steps"})
    assert config.optim.warmup_steps == warm_up
    assert len(lines) == (warm_up < 20)
    kept, _ = config.override(warmup_steps=30).adapted({"steps", "warmup_steps"})
    assert kept.optim.warmup_steps == 30


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lr": math.nan}, "lr is nan; it must be a finite number"),
        ({"lr": -1.0}, "above 0"),
        ({"n_embd": 100, "n_head": 12}, "100 / 12"),
        ({"seq_len": 2048}, "longer than the model's 1024 positions"),
        ({"steps": 0}, "steps 0"),
        ({"steps": 10, "warmup_steps": 20}, "a warm-up of 20 steps does not fit in a run of 10 st"),
        ({"batch_tokens": 1000}, "less than one sequence"),
        ({"batch_tokens": 1500}, "1,500 is not a multiple of 1 rank x 1024"),
        ({"batch_tokens": 7168, "micro_batch": 4}, "7 sequences cannot be cut into micro-batches"),
        ({"micro_batch": "many"}, "micro_batch is 'many'; it must be a whole number or auto"),
        ({"min_lr": 1.0}, "min_lr 1 is not between 0 and lr 0.0006"),
        ({"beta2": 1.0}, "must lie in"),
        ({"keep": -1}, "keep -1 cannot be negative"),
        ({"schedule": "square"}, "schedule is 'square'; it must be one of cosine, linear"),
        ({"no_such": 1}, "no setting 'no_such'"),
        ({"zero_init": True}, "the setting zero_init no longer exists"),
    ],
)
def test_invalid_setting_is_refused_in_one_sentence(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        recipe("gpt2-124m", **settings)
    assert "\n" not in str(caught.value)


def test_unknown_recipe_is_refused() -> None:
    with pytest.raises(UserError, match="no recipe 'gpt3'"):
        recipe("gpt3")


def test_finetune_without_init_is_refused() -> None:
    with pytest.raises(UserError, match="--init MODEL"):
        recipe("finetune")


def test_dependent_settings_are_adjusted_and_reported() -> None:
    config = read_recipe("gpt2-124m").override(steps=20, batch_tokens=4096, micro_batch=16)
    adapted, lines = config.adapted({"steps", "batch_tokens"})
    assert adapted.optim.warmup_steps == 2
    assert adapted.micro_batches(ranks=1) == (4, 1)
    assert len(lines) == 1


def test_micro_batch_of_a_recipe_is_an_upper_bound_on_any_number_of_ranks() -> None:
    config = recipe("shakespeare")
    assert config.run.micro_batch == 32
    assert config.micro_batches(ranks=2) == (16, 1)
    larger = recipe("gpt2-124m").override(micro_batch=12)
    assert larger.micro_batches(ranks=64) == (8, 1)


def test_micro_batch_that_the_user_chose_must_divide_the_share_of_a_rank() -> None:
    config = read_recipe("shakespeare").override(micro_batch=32)
    config.check(given={"micro_batch"}, ranks=1)
    with pytest.raises(UserError, match="choose a --micro-batch that divides 16"):
        config.check(given={"micro_batch"}, ranks=2)


def test_settings_that_the_user_chose_are_not_adjusted() -> None:
    config = read_recipe("gpt2-124m").override(steps=20, warmup_steps=30)
    adapted, lines = config.adapted({"steps", "warmup_steps"})
    assert adapted.optim.warmup_steps == 30
    assert lines == []


@given(st.integers(1, 8), st.integers(1, 64), st.sampled_from([1, 2, 4]))
def test_accumulation_keeps_the_batch_size(ranks: int, sequences: int, seq_len: int) -> None:
    tokens = ranks * sequences * seq_len
    config = Config().override(seq_len=seq_len, batch_tokens=tokens, micro_batch="auto")
    micro_batch, accumulation = config.micro_batches(ranks)
    assert micro_batch * accumulation * ranks * seq_len == tokens
    assert micro_batch <= 16


def test_config_is_equal_after_writing_and_reading(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    config = recipe("shakespeare", steps=7, lr=1e-3)
    path.write_text(config.to_json())
    assert Config.read(path) == config


def test_file_that_is_not_a_config_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"recipe": 3}')
    with pytest.raises(UserError, match=r"not the config\.json of a run"):
        Config.read(path)


def test_differences_name_only_settings_that_make_another_run() -> None:
    config = recipe("shakespeare")
    resumed = config.override(micro_batch=2, device="cpu", save_every=7, out="elsewhere")
    assert config.differences(resumed) == []
    assert config.differences(config.override(seed=2)) == ["seed: 1337 -> 2"]


@pytest.mark.parametrize("settings", [{"steps": "ten"}, {"lr": "1e-3"}, {"n_layer": 2.0}])
def test_value_of_the_wrong_type_is_refused_before_it_is_used(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="it must be a"):
        recipe("shakespeare", **settings)


def test_folder_that_is_not_a_run_is_named_for_what_it_is(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "mine"
    checkpoint = run / "checkpoints" / "step-00000010"
    checkpoint.mkdir(parents=True)
    (run / "config.json").write_text(Config().to_json())
    (checkpoint / "config.json").write_text('{"model_type": "gpt2"}')
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "gpt2"}')
    assert Config.of_run(run) == Config()
    for folder, sentence in (
        (checkpoint, f"name its run, {run}"),
        (model, "is a model"),
        (tmp_path / "runs", "has no config.json"),
        (tmp_path / "runs" / "mime", f"did you mean {run}"),
    ):
        with pytest.raises(UserError, match=sentence):
            Config.of_run(folder)


def test_setting_named_as_in_other_trainers_is_answered_with_ours() -> None:
    with pytest.raises(UserError, match="'learning_rate'; it is called lr"):
        recipe("shakespeare", learning_rate=1e-3)


def test_paths_are_taken_as_text(tmp_path: Path) -> None:
    config = recipe("shakespeare", data=tmp_path / "my.txt", out=tmp_path / "run")
    assert config.data.data == str(tmp_path / "my.txt")
    path = tmp_path / "config.json"
    path.write_text(config.to_json())
    assert Config.read(path) == config
