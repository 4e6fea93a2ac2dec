"""`anew sample MODEL`: let a model write."""

import codecs
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from anew.checkpoint import huggingface as weights
from anew.errors import UserError
from anew.inference.generate import stream
from anew.tokenizer.bpe import Tokenizer
from anew.utils import device as runtime

Device = Literal["auto", "cpu", "cuda", "mps", "xpu"]


@dataclass(frozen=True)
class SampleArgs:
    """Let a model write. Example: anew sample runs/demo --prompt "def " --tokens 200"""

    model: Annotated[
        str,
        tyro.conf.Positional,
        tyro.conf.arg(help="a run, a checkpoint, a Hugging Face folder, a .pt file or a hub name"),
    ]
    prompt: Annotated[str, tyro.conf.arg(help="text to continue; none: start a new document")] = ""
    prompt_file: Annotated[
        str, tyro.conf.arg(help="read the prompt from this file; - is standard input")
    ] = ""
    interactive: Annotated[
        bool, tyro.conf.arg(help="ask for prompts, one a line, until an empty one")
    ] = False
    tokens: Annotated[
        int, tyro.conf.arg(help="most new tokens a sample; it also ends at end of text")
    ] = 128
    count: Annotated[int, tyro.conf.arg(help="samples of the prompt")] = 1
    temperature: Annotated[
        float, tyro.conf.arg(help="0: always the likeliest token; 1: as the model says")
    ] = 0.8
    top_k: Annotated[int, tyro.conf.arg(help="draw among this many likeliest tokens; 0: all")] = 50
    top_p: Annotated[
        float, tyro.conf.arg(help="draw among the likeliest tokens that hold this share")
    ] = 1.0
    seed: Annotated[int, tyro.conf.arg(help="the same seed draws the same text")] = 1337
    device: Annotated[
        Device,
        tyro.conf.arg(help="where to compute; auto: the accelerator that torch finds, else cpu"),
    ] = "auto"
    precision: Annotated[
        Literal["auto", "fp32", "tf32", "bf16", "fp16"],
        tyro.conf.arg(help="auto: the fastest that is safe on the device"),
    ] = "auto"
    int8: Annotated[
        bool,
        tyro.conf.arg(
            help="CPU, one sample: weights in 8 bits; faster, and changes the model a little"
        ),
    ] = False
    json: Annotated[
        bool, tyro.conf.arg(help="the last line of standard output is one JSON object")
    ] = False


def run_sample(argv: list[str]) -> None:
    """Let a model write: from a prompt, a file, or a conversation of prompts."""
    a = tyro.cli(SampleArgs, args=argv, prog="anew sample")
    if a.count < 1:
        raise UserError(f"count {a.count} must be at least 1.")
    device = runtime.pick_device(a.device)
    precision, _ = runtime.pick_precision(a.precision, device)
    torch.set_float32_matmul_precision(runtime.MATMUL[precision])
    path = weights.find(a.model)
    model = weights.load_model(path, device, runtime.DTYPES[precision])
    tokenizer = Tokenizer.of_model(path, model.config.vocab_size)
    prompts = iter(input, "") if a.interactive else iter([_prompt(a)])
    texts: list[str] = []
    try:
        for prompt in prompts:
            texts = _write_samples(model, tokenizer, prompt, a)
    except EOFError:
        pass
    if a.json:
        print(json.dumps({"model": a.model, "prompt": a.prompt, "samples": texts}))


def _prompt(a: SampleArgs) -> str:
    if a.prompt and a.prompt_file:
        raise UserError("give --prompt or --prompt-file, not both.")
    if not a.prompt_file:
        return a.prompt
    try:
        return (
            sys.stdin.read()
            if a.prompt_file == "-"
            else Path(a.prompt_file).read_text(encoding="utf-8", errors="replace")
        )
    except OSError as error:
        raise UserError(
            f"the prompt file {a.prompt_file} cannot be read ({error.strerror})."
        ) from error


def _write_samples(model: Any, tokenizer: Tokenizer, prompt: str, a: SampleArgs) -> list[str]:
    """Print the samples and return their texts. A single one appears as it is drawn; several are drawn together."""
    ids = tokenizer.encode(prompt) or [tokenizer.end_of_text]
    decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in range(a.count)]
    texts, open_rows = [prompt] * a.count, set(range(a.count))
    if a.count == 1:
        print(prompt, end="", flush=True)
    for row_ids in stream(
        model,
        [ids] * a.count,
        a.tokens,
        temperature=a.temperature,
        top_k=a.top_k,
        top_p=a.top_p,
        seed=a.seed,
        int8=a.int8,
    ):
        for i in sorted(open_rows):
            if row_ids[i] == tokenizer.end_of_text:
                open_rows.discard(i)
                continue
            piece = decoders[i].decode(tokenizer.decode_bytes([row_ids[i]]))
            texts[i] += piece
            if a.count == 1:
                print(piece, end="", flush=True)
        if not open_rows:
            break
    if a.count == 1:
        print()
    else:
        for i, text in enumerate(texts, 1):
            print(f"--- {i} of {a.count} ---\n{text}")
    return texts
