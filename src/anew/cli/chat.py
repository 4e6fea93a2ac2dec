"""`anew chat MODEL`: talk to a model that was trained on conversations.

anew chat runs/chat
echo "How many letters has the word apple?" | anew chat runs/chat --temperature 0
"""

import codecs
import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from anew.checkpoint.huggingface import find_model
from anew.cli.parse import ModelArgument, parse
from anew.cli.sample import Device, Precision, open_model
from anew.errors import UserError
from anew.inference.generate import check_options, stream, until_end_of_text
from anew.model.gpt import GPT
from anew.tokenizer.bpe import Tokenizer
from anew.tokenizer.chat import ASSISTANT, SYSTEM, USER, Message, is_chat_model, prompt_of
from anew.utils.words import counted

HELP = """Type a message and press Enter. An empty line ends.
/reset      begin a new conversation
/save NAME.jsonl  append this conversation to a file, in the form for training
/quit       end"""


@dataclass(frozen=True)
class ChatArgs:
    """Talk to a model that was trained on conversations. Example: anew chat runs/chat

    Between messages, /reset begins a new conversation, and /save NAME.jsonl keeps this one.
    """

    model: ModelArgument
    """a run, a checkpoint, a Hugging Face folder or a hub name"""
    system: str = ""
    """a message before the conversation that says how to answer"""
    tokens: int = 256
    """maximum tokens of an answer, at most half of the model's positions"""
    temperature: float = 0.8
    """0: always the likeliest token; 1: the model's probabilities"""
    top_k: int = 50
    """draw from this many likeliest tokens; 0: from all"""
    top_p: float = 1.0
    """draw from the likeliest tokens with this total probability"""
    seed: int = 1337
    """the same seed and messages give the same answers"""
    device: Device = "auto"
    """where to compute; auto: the accelerator that torch finds, else cpu"""
    precision: Precision = "auto"
    """auto: the fastest that is safe on the device"""
    int8: bool = False
    """CPU: weights in 8 bits; faster, and changes the model a little"""


def run_chat(argv: list[str]) -> None:
    """Read messages and print answers until an empty line or the end of the input."""
    args = parse(ChatArgs, argv, "chat")
    check_options(args.temperature, args.top_k, args.top_p, args.tokens)
    path = find_model(args.model)
    refuse_other_models(args.model, path)
    model, tokenizer = open_model(path, args.device, args.precision)
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):  # Windows has no such module
            import readline  # noqa: F401 (input() then has a history)
        print(HELP, file=sys.stderr, flush=True)
    start = [Message(SYSTEM, args.system)] if args.system.strip() else []
    messages = list(start)
    for line in typed_lines():
        if line in ("/quit", "/exit"):
            return
        if line == "/reset":
            messages = list(start)
            print("A new conversation.", file=sys.stderr)
        elif line.split()[0] == "/save":
            save(messages, line.removeprefix("/save").strip())
        elif line.startswith("/") and " " not in line:
            print(HELP, file=sys.stderr)
        else:
            messages.append(Message(USER, line))
            try:
                reply = print_reply(model, tokenizer, messages, args)
            except UserError as error:
                messages.pop()
                print(error, file=sys.stderr)
                continue
            messages.append(Message(ASSISTANT, reply))


def refuse_other_models(name: str, path: Path) -> None:
    """Raise UserError if a model was not trained on conversations in our form."""
    if not is_chat_model(path):
        raise UserError(
            f"{name} continues texts and was not trained to chat; anew sample writes with it, and "
            "anew train chat makes a model for conversations of it."
        )


def typed_lines() -> Iterator[str]:
    """Yield what is typed, until an empty line or the end of the input."""
    prompt = "> " if sys.stdin.isatty() else ""
    with contextlib.suppress(EOFError):
        while line := input(prompt).strip():
            yield line


def print_reply(model: GPT, tokenizer: Tokenizer, messages: list[Message], args: ChatArgs) -> str:
    """Print the answer of the assistant token by token, and return it."""
    positions = model.config.n_positions
    n_tokens = min(args.tokens, positions // 2)
    ids, n_left_out = prompt_of(tokenizer, messages, positions - n_tokens)
    if n_left_out:
        oldest = counted(n_left_out, "oldest message")
        print(
            f"(the model does not see the {oldest}: it reads {positions} tokens)", file=sys.stderr
        )
    steps = stream(
        model,
        [ids],
        n_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed + len(messages),
        int8=args.int8,
    )
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a token may end in a character
    reply = ""
    for _, token in until_end_of_text(steps, tokenizer.end_of_text):
        piece = decoder.decode(tokenizer.decode_bytes([token]))
        reply += piece
        print(piece, end="", flush=True)
    print(flush=True)
    return reply


def save(messages: list[Message], name: str) -> None:
    """Append a conversation to a file, in the form that `anew train chat` reads."""
    if not name.endswith(".jsonl"):
        print("the name of the file must end in .jsonl, as in /save talk.jsonl", file=sys.stderr)
        return
    if ASSISTANT not in [message.role for message in messages]:
        print("there is no answer to keep yet", file=sys.stderr)
        return
    listed = [{"role": message.role, "content": message.content} for message in messages]
    try:
        with Path(name).expanduser().open("a", encoding="utf-8") as file:
            file.write(json.dumps({"messages": listed}, ensure_ascii=False) + "\n")
    except OSError as error:
        print(f"{name} cannot be written ({error.strerror}).", file=sys.stderr)
        return
    print(f"{counted(len(messages), 'message')} added to {name}", file=sys.stderr)
