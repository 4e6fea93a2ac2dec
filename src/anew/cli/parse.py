"""Parse a command line with tyro, and read whole numbers as people write them.

args = parse(PrepareArgs, argv, "prepare")  # --limit-tokens 1.5M is 1,500,000
"""

import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from anew.errors import UserError, unknown_name

# The model of a command, as help and messages name it.
ModelArgument = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]

FACTORS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9}
WHOLE_NUMBERS = ConstructorRegistry()


def parse(kind: Any, argv: Sequence[str], command: str, **options: Any) -> Any:
    """Return `argv` as an instance of `kind`, whose fields are the flags of `anew COMMAND`.

    `options` are those of `tyro.cli`, which ends the process if a value is wrong (exit code 2) or
    if help was asked for. Raises UserError for a flag that `kind` does not have.
    """
    refuse_unknown_flags(argv, set(flag_names(kind)), command)
    return tyro.cli(kind, args=argv, prog=f"anew {command}", registry=WHOLE_NUMBERS, **options)


def whole_number(text: str) -> int:
    """Return the number that `text` means, such as 19073, 20k, 0.5M, 10B or 1e6.

    Raises ValueError if it is not a whole number.
    """
    match = re.fullmatch(r"([+-]?[\d_]*\.?\d+(?:e\d+)?) ?([KMBG]?)", text, re.IGNORECASE)
    if match is None:
        raise ValueError(f"{text} is not a whole number")
    number, unit = match.groups()
    if number.lstrip("+-").replace("_", "").isdigit():  # exact at any size
        return int(number) * FACTORS[unit.upper()]
    value = float(number) * FACTORS[unit.upper()]
    if not value.is_integer():
        raise ValueError(f"{text} is not a whole number")
    return int(value)


@WHOLE_NUMBERS.primitive_rule
def _read_whole_numbers(type_info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[int] | None:
    """Give tyro `whole_number` for flags of the type int."""
    if type_info.type is not int:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT",
        instance_from_str=lambda words: whole_number(words[0]),
        is_instance=lambda value: isinstance(value, int) and not isinstance(value, bool),
        str_from_instance=lambda number: [str(number)],
    )


def flag_names(kind: Any) -> Iterator[str]:
    """Yield the flags of a dataclass or a TypedDict, whose groups are TypedDicts, without "--"."""
    types = typing.get_type_hints(kind)
    annotated_types = typing.get_type_hints(kind, include_extras=True)
    for field, type in types.items():
        if typing.is_typeddict(type):
            yield from flag_names(type)
        else:
            yield flag_name(field, annotated_types[field])


def flag_name(field: str, annotated_type: Any) -> str:
    """Return the flag of a field: the name that tyro.conf.arg gives it, or that of the field."""
    options = getattr(annotated_type, "__metadata__", ())
    for option in options:
        given_name: str | None = getattr(option, "name", None)
        if given_name:
            return given_name
    return field.replace("_", "-")


def refuse_unknown_flags(argv: Sequence[str], known: set[str], command: str) -> None:
    """Raise UserError, which suggests the most similar flag, for the first flag not in `known`."""
    known = known | {"help"}
    for word in argv:
        if word == "--":  # what follows are no flags
            return
        if not word.startswith("--"):
            continue
        name = typed_name(word).replace("_", "-")
        if name in known or name.removeprefix("no-") in known:
            continue
        flags = [f"--{flag}" for flag in sorted(known)]
        advice = f"`anew {command} --help` lists all flags."
        raise unknown_name("flag", f"--{name}", flags, advice)


def typed_name(word: str) -> str:
    """Return the name in a flag as it was typed, such as "steps" of "--steps=100"."""
    flag, _, _ = word.partition("=")
    return flag.removeprefix("--")


def refuse_other_names(argv: Sequence[str], names: Mapping[str, str]) -> None:
    """Raise UserError if a flag has the name that another tool gives to one of ours.

    `names` has, for the name elsewhere, our name and what it means: {"start": "prompt: a text"}.
    """
    for word in argv:
        name = typed_name(word).replace("-", "_")
        if word.startswith("--") and name in names:
            raise UserError(f"there is no --{name.replace('_', '-')}; use --{names[name]}.")
