"""How recipes and settings are read from the command line, and what the help shows."""

import re

import pytest

from anew.cli.args import BASIC_SETTINGS, SETTINGS, Command, flag
from anew.cli.main import main
from anew.config.recipes import read_recipe
from anew.config.schema import GROUP_OF, GROUPS
from anew.errors import UserError

COMMAND = Command("train", about="Train.", flags=[flag("json", bool, False, "print JSON")])


def help_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(["train", *argv])
    assert end.value.code == 0
    return capsys.readouterr().out


def flags_in(text: str) -> set[str]:
    """Return the settings whose flags a help text lists."""
    flags = re.findall(r"^│ --([a-z0-9-]+)", text, re.MULTILINE)
    return {flag.replace("-", "_") for flag in flags}


def test_only_typed_settings_are_reported_also_those_equal_to_the_default() -> None:
    typed = COMMAND.read(["--steps", "1000", "shakespeare", "--no-recut", "--n_layer=3", "--json"])
    assert typed.recipe == "shakespeare"
    assert typed.settings == {"steps": 1000, "recut": False, "n_layer": 3}
    assert typed.options.json is True
    assert COMMAND.read([]).settings == {}


def test_removed_setting_is_refused_with_its_reason() -> None:
    typed = COMMAND.read(["--average", "0.3"])
    with pytest.raises(UserError, match="the setting average no longer exists: averaging"):
        read_recipe("demo").override(**typed.settings)


def test_second_recipe_is_refused() -> None:
    with pytest.raises(UserError, match="'twice' is one word too many"):
        COMMAND.read(["shakespeare", "twice"])


def test_help_lists_basic_settings_and_help_all_lists_every_setting(
    capsys: pytest.CaptureFixture[str],
) -> None:
    own = {"resume", "memorise", "dry_run", "json"}
    assert flags_in(help_of(capsys, "--help")) == set(BASIC_SETTINGS) | own
    assert 20 <= len(BASIC_SETTINGS) <= 25
    complete = help_of(capsys, "--help-all")
    assert flags_in(complete) == set(SETTINGS) | own
    for title in ("model", "data", "optimizer", "run"):
        assert f"─ {title} options ─" in complete
    assert {GROUP_OF[name] for name in BASIC_SETTINGS} == set(GROUPS)


def test_help_of_a_recipe_shows_its_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(capsys, "gpt2-1558m", "--help").replace("\n", " ")
    assert re.search(r"--n-layer INT.{0,200}default: 48", text)


def test_overview_fits_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
