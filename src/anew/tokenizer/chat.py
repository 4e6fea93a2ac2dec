"""Conversations as token ids, in the tokens that GPT-2 has.

    messages = [Message("user", "Hello"), Message("assistant", "Hi! What can I do?")]
    ids = encode(tokenizer, messages)                        # for training
    ids = encode(tokenizer, messages[:1], asks_reply=True)   # for the model to continue

A turn is the end-of-text token, the name of the role in a line of its own, and the text:

    <|endoftext|>user
    Hello<|endoftext|>assistant
    Hi! What can I do?<|endoftext|>

So a model ends its answer as it ends a document, and no token is new. The text of a message is
encoded as ordinary characters, also if it contains "<|endoftext|>", and a turn can begin only after
that token. No text can therefore pretend to be another turn.

`TEMPLATE` says the same as a template of Jinja. It is stored with a model, and transformers'
`apply_chat_template` makes the same ids from it. transformers would read "<|endoftext|>" in the
text of a message as the token, so the template, and `encode` as well, write "<|end_of_text|>".
"""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from anew.errors import UserError
from anew.tokenizer.bpe import Tokenizer
from anew.tokenizer.files import END_OF_TEXT, TOKENIZER_CONFIG
from anew.utils.files import parse_json

USER = "user"
ASSISTANT = "assistant"
SYSTEM = "system"
ROLES = (SYSTEM, USER, ASSISTANT)
HARMLESS = "<|end_of_text|>"  # how a message may write END_OF_TEXT
TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] -%}"
    "{{- raise_exception('the role ' ~ message['role'] ~ ' does not exist') -}}"
    "{%- endif -%}"
    f"{{{{- '{END_OF_TEXT}' ~ message['role'] ~ '\\n' -}}}}"
    f"{{{{- message['content'] | trim | replace('{END_OF_TEXT}', '{HARMLESS}') -}}}}"
    "{%- endfor -%}"
    f"{{{{- '{END_OF_TEXT}' -}}}}"
    "{%- if add_generation_prompt -%}{{- 'assistant\\n' -}}{%- endif -%}"
)


class Message(NamedTuple):
    """One message of a conversation."""

    role: str  # one of ROLES
    content: str


def encode(
    tokenizer: Tokenizer, messages: Sequence[Message], asks_reply: bool = False
) -> list[int]:
    """Return the ids of a conversation, from its first end-of-text token to its last.

    With `asks_reply` the beginning of the assistant's turn follows, for the model to continue. The
    ids then begin the ids of the same conversation with any answer.
    """
    ids = []
    for message in messages:
        ids += _encode_turn(tokenizer, message)
    ids.append(tokenizer.end_of_text)
    if asks_reply:
        ids += reply_header(tokenizer)
    return ids


def _encode_turn(tokenizer: Tokenizer, message: Message) -> list[int]:
    """Return the ids of a message, from the end-of-text token before it to its last one."""
    content = message.content.strip().replace(END_OF_TEXT, HARMLESS)
    # Encoded together, as transformers does. White space between the two would be merged.
    return [tokenizer.end_of_text, *tokenizer.encode(f"{message.role}\n{content}")]


def encode_document(tokenizer: Tokenizer, line: bytes) -> np.ndarray:
    """Return the ids of a conversation in JSON without the first one, uint16 (tokens).

    The preparation of data puts an end-of-text token in front of every document.
    """
    return np.array(encode(tokenizer, from_json(line))[1:], dtype=np.uint16)


def prompt_of(
    tokenizer: Tokenizer, messages: Sequence[Message], most_ids: int
) -> tuple[list[int], int]:
    """Return the ids after which the assistant answers, and how many messages were left out.

    If there are more than `most_ids`, the oldest messages are left out, but not a system message at
    the beginning. Raises UserError if the last message, with the system message, is too long.
    """
    turns = [_encode_turn(tokenizer, message) for message in messages]
    end = [tokenizer.end_of_text, *reply_header(tokenizer)]
    n_kept = 1 if messages and messages[0].role == SYSTEM else 0
    size = sum(map(len, turns)) + len(end)
    n_left_out = 0
    while size > most_ids and n_kept + n_left_out < len(turns) - 1:
        size -= len(turns[n_kept + n_left_out])
        n_left_out += 1
    if size > most_ids:
        raise UserError(
            f"the message is too long: with it the prompt has {size:,} tokens, and the model "
            f"reads at most {most_ids:,} beside its answer."
        )
    rest = turns[:n_kept] + turns[n_kept + n_left_out :]
    return [token for turn in rest for token in turn] + end, n_left_out


def reply_header(tokenizer: Tokenizer) -> list[int]:
    """Return the ids between the end-of-text token and the text of an answer."""
    return tokenizer.encode(f"{ASSISTANT}\n")


def answer_mask(ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Return which ids of conversations (n,) the assistant has written, as booleans (n,).

    These are the ids of its texts, each with the end-of-text token that ends it.
    """
    header = np.array(reply_header(tokenizer))
    ends = np.flatnonzero(ids == tokenizer.end_of_text)
    turns, next_turns = ends[:-1], ends[1:]
    is_long_enough = next_turns - turns > len(header)
    turns, next_turns = turns[is_long_enough], next_turns[is_long_enough]
    headers = ids[turns[:, None] + 1 + np.arange(len(header))]  # (turns, tokens of the header)
    is_reply = (headers == header).all(axis=1)
    # 1 where an answer begins and -1 behind its end, so that the sum is 1 within.
    steps = np.zeros(len(ids) + 1, dtype=np.int8)
    np.add.at(steps, turns[is_reply] + 1 + len(header), 1)
    np.add.at(steps, next_turns[is_reply] + 1, -1)
    return np.cumsum(steps[:-1], dtype=np.int8).astype(bool)


def is_chat_model(folder: Path) -> bool:
    """Return whether the model in `folder` was trained on conversations in this form."""
    template = ""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        template = parse_json(folder / TOKENIZER_CONFIG).get("chat_template")
    with contextlib.suppress(OSError, ValueError):  # where newer versions of transformers write it
        template = template or (folder / "chat_template.jinja").read_text(encoding="utf-8")
    return template == TEMPLATE


def to_json(messages: Sequence[Message]) -> bytes:
    """Return a conversation as one line of JSON, which is the same for equal conversations."""
    return json.dumps(messages, ensure_ascii=False).encode(errors="replace")


def from_json(line: bytes) -> list[Message]:
    """Return the conversation that `to_json` has written."""
    return [Message(role, content) for role, content in json.loads(line)]
