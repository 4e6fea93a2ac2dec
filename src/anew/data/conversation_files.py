"""Read conversations from files.

| file | a conversation |
|---|---|
| `.jsonl`, `.parquet`, also compressed | a row with "messages": a list of {"role", "content"} |
| the same | a row with "conversations": a list of {"from", "value"}, as ShareGPT has them |
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
SHAREGPT = "conversations"  # the key of a list of {"from": "human", "value": "Hello"}
SHAREGPT_ROLES = {"human": USER, "gpt": ASSISTANT}
FORM_OF_ROW = (
    'a row needs "messages": [{"role": "user", "content": "..."}, ...], or "prompt" and "response"'
)
FORM_OF_TEXT = 'each turn of a text begins with a line "user:" or "assistant:"'


def conversations_in(
    path: Path, column: str = "messages", skip: int = 0, encoding: str = "", warn: bool = True
) -> Iterator[bytes]:
    """Yield each conversation of a file as one line of JSON, without the first `skip`.

    `column` holds the messages of a row. With `warn`, what was left out is logged.
    """
    problems: Counter[str] = Counter()
    number = 0
    is_table = readers.is_table(path)
    for part in _parts(path, encoding, warn):
        try:
            messages = _messages_of_row(part, column) if is_table else _messages_of_text(part)
            line = to_json(parse(messages))
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


def form_of(path: Path) -> str:
    """Return the form that conversations have in a file, for a message."""
    return FORM_OF_ROW if readers.is_table(path) else FORM_OF_TEXT


def _parts(path: Path, encoding: str, warn: bool) -> Iterator[Any]:
    """Yield the rows of a table, or the parts of a text that "---" separates."""
    if readers.is_table(path):
        yield from readers.rows_of(path, encoding)
    else:
        parts = END_LINE.split(readers.text_of(path, encoding, warn))
        yield from (part for part in parts if part.strip())


def _messages_of_row(row: Any, column: str) -> Any:
    """Return the messages of a row, which `parse` checks. Raises ValueError if it has none."""
    if not isinstance(row, dict):
        raise ValueError("not a row of JSON")
    if row.get(column) is not None:  # a row of parquet has every column, some of them null
        return row[column]
    if isinstance(row.get(SHAREGPT), list):
        return [_message_of_sharegpt(turn) for turn in row[SHAREGPT]]
    for question, answer in PAIRS:
        if row.get(question) is not None and answer in row:
            asked = row[question]
            if isinstance(asked, str) and isinstance(row.get("input"), str):
                asked = f"{asked}\n\n{row['input']}".strip()
            return [{"role": USER, "content": asked}, {"role": ASSISTANT, "content": row[answer]}]
    if column in row:
        return row[column]
    names = ", ".join(str(name) for name in row)
    raise ValueError(f"no messages among {names[:60]}")


def _message_of_sharegpt(turn: Any) -> Any:
    if not isinstance(turn, dict) or "from" not in turn:
        return turn
    role = turn["from"]
    if isinstance(role, str):
        role = SHAREGPT_ROLES.get(role, role)
    return {"role": role, "content": turn.get("value")}


def _messages_of_text(text: str) -> Any:
    """Return the turns of a text whose turns begin with a line such as "user: Hello".

    Raises ValueError if something stands before the first turn, because nobody says it.
    """
    before, *parts = TURN_LINE.split(text)
    if before.strip():
        raise ValueError("text before the first turn")
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
