"""Whole numbers as people write them, and flags with the names of other tools."""

from dataclasses import dataclass

import pytest

from anew import UserError
from anew.cli.main import main
from anew.cli.parse import parse, refuse_other_names, whole_number


@dataclass(frozen=True)
class Arguments:
    count: int = 7
    most: int | None = None


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("19073", 19_073),
        ("-3", -3),
        ("20k", 20_000),
        ("0.5M", 500_000),
        ("10B", 10**10),
        ("1e6", 10**6),
        ("10_485_760", 10_485_760),
        ("9007199254740993", 2**53 + 1),  # which a float cannot represent
    ],
)
def test_whole_numbers_may_have_a_unit(text: str, number: int) -> None:
    assert whole_number(text) == number
    assert parse(Arguments, ["--count", text, "--most", text], "x") == Arguments(number, number)


@pytest.mark.parametrize("text", ["", "k", "1.5", "0.0001k", "ten", "3 apples", "1e400"])
def test_what_is_not_a_whole_number_ends_with_exit_code_2(text: str) -> None:
    with pytest.raises(ValueError, match="is not a whole number"):
        whole_number(text)
    with pytest.raises(SystemExit) as end:
        parse(Arguments, ["--count", text], "x")
    assert end.value.code == 2


def test_settings_of_a_recipe_may_have_a_unit(capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", "gpt2-5m", "--steps", "2k", "--batch-tokens", "8192", "--dry-run"])
    assert "steps: 2,000 = 16.4M tokens" in capsys.readouterr().out


def test_flag_of_another_tool_is_answered_with_ours(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"there is no --start; use --prompt\."):
        refuse_other_names(["--start=Hello"], {"start": "prompt"})
    with pytest.raises(SystemExit) as end:
        main(["sample", "runs/demo", "--max_new_tokens", "20"])
    assert end.value.code == 2
    assert "there is no --max-new-tokens; use --tokens." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("train demo --step 100", "there is no flag '--step'; did you mean --steps?"),
        ("train --stp=100", "there is no flag '--stp'; did you mean --steps?"),
        ("train --no-recutt", "there is no flag '--no-recutt'; did you mean --recut?"),
        ("train --foo", "there is no flag '--foo'; `anew train --help` lists all flags."),
        ("serve model --prot 1", "there is no flag '--prot'; did you mean --port?"),
        ("prepare x --val_token 3", "there is no flag '--val-token'; did you mean --val-tokens?"),
    ],
)
def test_unknown_flag_is_answered_with_the_most_similar_one(
    words: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(words.split())
    assert end.value.code == 2
    assert capsys.readouterr().err.strip() == f"anew: {sentence}"
