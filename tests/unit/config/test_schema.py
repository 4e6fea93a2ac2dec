import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anew.config.recipes import RECIPES, recipe
from anew.config.schema import FIELDS, Config
from anew.errors import UserError


def test_the_reference_recipe_carries_the_published_figures() -> None:
    c = recipe("gpt2-124m")
    assert (c.optim.beta1, c.optim.beta2, c.optim.eps, c.optim.weight_decay, c.optim.clip) == (
        0.9,
        0.95,
        1e-8,
        0.1,
        1.0,
    )
    assert (c.optim.lr, c.optim.warmup_steps, c.optim.schedule) == (6e-4, 715, "cosine")
    assert c.optim.min_lr == pytest.approx(6e-5)
    assert (c.run.batch_tokens, c.run.micro_batch, c.data.seq_len, c.run.steps) == (
        524_288,
        "auto",
        1024,
        19_073,
    )
    assert c.micro_batches(4) == (16, 8), (
        "as the reference runs on four GPUs, before it is known what fits"
    )
    assert c.run.steps * c.run.batch_tokens == pytest.approx(10e9, rel=1e-4)
    assert recipe("gpt2-124m-openwebtext").run.steps == 90_000


@pytest.mark.parametrize(("name", "layers", "heads", "width", "lr"), [
    ("gpt2-350m", 24, 16, 1024, 3e-4), ("gpt2-355m", 24, 16, 1024, 3e-4),
    ("gpt2-774m", 36, 20, 1280, 2.5e-4), ("gpt2-1558m", 48, 25, 1600, 2e-4),
])  # fmt: skip
def test_larger_sizes(name: str, layers: int, heads: int, width: int, lr: float) -> None:
    c = recipe(name)
    assert (c.model.n_layer, c.model.n_head, c.model.n_embd, c.optim.lr) == (
        layers,
        heads,
        width,
        lr,
    )


def test_every_recipe_is_sound_and_every_setting_explains_itself() -> None:
    for name in RECIPES:
        recipe(name, **({"init": "x"} if name == "finetune" else {}))
    assert all(len(f.metadata["help"]) > 10 for f in FIELDS.values())


@pytest.mark.parametrize(("settings", "words"), [
    ({"lr": math.nan}, "lr is nan"),
    ({"lr": -1.0}, "above 0"),
    ({"n_embd": 100, "n_head": 12}, "100 / 12"),
    ({"seq_len": 2048}, "longer than the model's 1024 positions"),
    ({"steps": 0}, "steps 0"),
    ({"steps": 10, "warmup_steps": 20}, "a warm-up of 20 steps does not fit in a run of 10 steps"),
    ({"batch_tokens": 1000}, "less than one sequence"),
    ({"batch_tokens": 1500}, "1,500 is not a multiple of 1 rank x 1024"),
    ({"batch_tokens": 7168, "micro_batch": 4}, "7 sequences cannot be cut into micro-batches of 4"),
    ({"min_lr": 1.0}, "min_lr 1 is not between 0 and lr 0.0006"),
    ({"beta2": 1.0}, "must lie in"),
    ({"no_such": 1}, "no setting 'no_such'"),
])  # fmt: skip
def test_impossible_settings_are_refused_with_the_arithmetic(
    settings: dict[str, float], words: str
) -> None:
    with pytest.raises(UserError, match=words.replace("(", r"\(")) as caught:
        recipe("gpt2-124m", **settings)
    assert "\n" not in str(caught.value)


def test_unknown_recipe_and_missing_init() -> None:
    with pytest.raises(UserError, match="no recipe 'gpt3'"):
        recipe("gpt3")
    with pytest.raises(UserError, match="--init MODEL"):
        recipe("finetune")


def test_settings_that_follow_from_others_move_and_say_so() -> None:
    config, said = (
        dataclasses.replace(RECIPES["gpt2-124m"][1], recipe="x")
        .override(steps=20, batch_tokens=4096, micro_batch=16)
        .adapted({"steps", "batch_tokens"})
    )
    assert config.optim.warmup_steps == 2
    assert config.run.micro_batch == 4
    assert len(said) == 2


@given(st.integers(1, 8), st.integers(1, 64), st.sampled_from([1, 2, 4]))
def test_accumulation_never_changes_the_batch(ranks: int, sequences: int, T: int) -> None:
    config = Config().override(seq_len=T, batch_tokens=ranks * sequences * T, micro_batch="auto")
    micro, accumulation = config.micro_batches(ranks)
    assert micro * accumulation * ranks * T == config.run.batch_tokens
    assert micro <= 16


def test_config_survives_its_file(tmp_path) -> None:
    config = recipe("shakespeare", steps=7, lr=1e-3)
    (tmp_path / "config.json").write_text(config.to_json())
    assert Config.read(tmp_path / "config.json") == config
    (tmp_path / "config.json").write_text('{"recipe": 3}')
    with pytest.raises(UserError, match=r"not the config\.json of a run"):
        Config.read(tmp_path / "config.json")


def test_differences_name_what_would_be_another_run() -> None:
    a = recipe("shakespeare")
    assert (
        a.differences(a.override(micro_batch=2, device="cpu", save_every=7, out="elsewhere")) == []
    )
    assert a.differences(a.override(seed=2)) == ["seed: 1337 -> 2"]
