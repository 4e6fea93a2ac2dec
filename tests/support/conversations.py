"""Conversations for tests: questions with one right answer each."""

import json
from pathlib import Path

from anew.tokenizer.chat import Message


def numbered(count: int) -> list[list[Message]]:
    """Return conversations of different lengths, of one to three questions."""
    talks = []
    for number in range(count):
        talk = []
        for turn in range(1, 2 + number % 3):
            talk += [
                Message("user", f"What is {number} times {turn}?" + " Please." * (number % 7)),
                Message("assistant", f"It is {number * turn}."),
            ]
        talks.append(talk)
    return talks


def as_dicts(talk: list[Message]) -> list[dict[str, str]]:
    """Return messages in the form of OpenAI's API."""
    return [{"role": message.role, "content": message.content} for message in talk]


def write_talks(path: Path, talks: list[list[Message]]) -> Path:
    """Write conversations as JSON lines; return the path."""
    lines = [json.dumps({"messages": as_dicts(talk)}) for talk in talks]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path
