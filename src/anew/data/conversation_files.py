"""Read conversations from files.

| file | a conversation |
|---|---|
| `.jsonl`, `.parquet`, also compressed | a row with "messages": a list of {"role", "content"} |
| the same, and `.csv`, `.tsv` | a row with "prompt" and "response" (see PAIRS) |
| any other text | turns that begin with a line "user:" or "assistant:"; "---" in a line ends one |

Roles are system (first only), user and assistant. A row without an answer, or with anything but
text in it, is left out and counted.
"""

import logging
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from anew.data import readers
from anew.tokenizer.chat import ASSISTANT, ROLES, SYSTEM, USER, Message, to_json
from anew.utils.words import counted

log = logging.getLogger("anew")

TURN_LINE = re.compile(rf"^({'|'.join(ROLES)}):[ \t]*", re.IGNORECASE | re.MULTILINE)
END_LINE = re.compile(r"^---[ \t]*$", re.MULTILINE)
PAIRS = (("prompt", "response"), ("question", "answer"), ("instruction", "output"))
FORM = (
    'a row needs "messages": [{"role": "user", "content": "..."}, ...], or "prompt" and "response"'
)


def conversations_in(
    path: Path, column: str = "messages", skip: int = 0, encoding: str = "", warn: bool = True
) -> Iterator[bytes]:
    """Yield each conversation of a file as one line of JSON, without the first `skip`.

    `column` holds the messages of a row. With `warn`, what was left out is logged.
    """
    problems: Counter[str] = Counter()
    number = 0
    for candidate in _candidates(path, column, encoding, warn):
        try:
            line = to_json(parse(candidate))
        except ValueError as error:
            problems[str(error)] += 1
            continue
        if number >= skip:
            yield line
        number += 1
    if problems and warn:
        reasons = "; ".join(f"{n:,}: {reason}" for reason, n in problems.most_common())
        left_out = counted(problems.total(), "conversation")
        log.warning(f"{path}: left out {left_out} ({reasons})")


def _candidates(path: Path, column: str, encoding: str, warn: bool) -> Iterator[Any]:
    """Yield what may be conversations: lists of messages, or None for a row without any."""
    if not readers.is_table(path):
        text = readers.text_of(path, encoding, warn)
        for part in END_LINE.split(text):
            if part.strip():
                yield _messages_of_text(part)
        return
    for row in readers.rows_of(path, encoding):
        yield _messages_of_row(row, column)


def _messages_of_row(row: Any, column: str) -> Any:
    if not isinstance(row, dict):
        return None
    if column in row:
        return row[column]
    for question, answer in PAIRS:
        if question in row and answer in row:
            asked = row[question]
            if isinstance(asked, str) and isinstance(row.get("input"), str):
                asked = f"{asked}\n\n{row['input']}".strip()
            return [{"role": USER, "content": asked}, {"role": ASSISTANT, "content": row[answer]}]
    return None


def _messages_of_text(text: str) -> Any:
    """Return the turns of a text whose turns begin with a line such as "user: Hello"."""
    before, *parts = TURN_LINE.split(text)
    if before.strip():  # nobody says this
        return None
    roles, contents = parts[::2], parts[1::2]
    pairs = zip(roles, contents, strict=True)
    return [{"role": role.lower(), "content": content} for role, content in pairs]


def parse(messages: Any) -> list[Message]:
    """Return the messages of a conversation. Raises ValueError with the reason if it is none."""
    if not isinstance(messages, list) or not messages:
        raise ValueError("no messages")
    parsed: list[Message] = []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError("a message without a role")
        role = message["role"]
        content = message.get("content")
        if role not in ROLES or (role == SYSTEM and parsed):
            raise ValueError(f"the role {role[:20]!r} where it cannot be")
        if not isinstance(content, str):
            raise ValueError("a message that is not text")
        if not content.strip():
            raise ValueError("an empty message")
        parsed.append(Message(role, content))
    if ASSISTANT not in [message.role for message in parsed]:
        raise ValueError("no answer of the assistant")
    return parsed
