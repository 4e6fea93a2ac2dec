"""`anew sample MODEL`: generate text with a model.

anew sample runs/demo --prompt "def " --tokens 200
"""

import codecs
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from anew.checkpoint.huggingface import find_model, load_model
from anew.cli.parse import ModelArgument, parse, refuse_other_names
from anew.errors import UserError
from anew.inference.generate import check_options, stream, until_end_of_text
from anew.model.gpt import GPT
from anew.tokenizer.bpe import Tokenizer
from anew.utils.device import DTYPES, MATMUL_PRECISION, pick_device, pick_precision

Device = Literal["auto", "cpu", "cuda", "mps", "xpu"]
Precision = Literal["auto", "fp32", "tf32", "bf16", "fp16"]


@dataclass(frozen=True)
class SampleArgs:
    """Generate text with a model. Example: anew sample runs/demo --prompt "def " --tokens 200"""

    model: ModelArgument
    """a run, a checkpoint, a Hugging Face folder, a .pt file or a hub name"""
    prompt: str = ""
    """text to continue; without one, a new document begins"""
    prompt_file: str = ""
    """read the prompt from this file; - is standard input"""
    interactive: bool = False
    """read prompts, one a line, until an empty line"""
    tokens: int = 128
    """maximum new tokens of a sample, which may end before"""
    count: int = 1
    """number of samples of the prompt"""
    temperature: float = 0.8
    """0: always the likeliest token; 1: the model's probabilities"""
    top_k: int = 50
    """draw from this many likeliest tokens; 0: from all"""
    top_p: float = 1.0
    """draw from the likeliest tokens with this total probability"""
    seed: int = 1337
    """the same seed draws the same text"""
    device: Device = "auto"
    """where to compute; auto: the accelerator that torch finds, else cpu"""
    precision: Precision = "auto"
    """auto: the fastest that is safe on the device"""
    int8: bool = False
    """CPU, one sample: weights in 8 bits; faster, and changes the model a little"""
    json: bool = False
    """the last line of standard output is one JSON object"""


# What nanoGPT, transformers and llama.cpp call these flags.
NAMES_ELSEWHERE = {
    "length": "tokens",
    "max_length": "tokens",
    "max_new_tokens": "tokens",
    "max_tokens": "tokens",
    "n_predict": "tokens",
    "num_return_sequences": "count",
    "num_samples": "count",
    "start": "prompt",
    "temp": "temperature",
}


def run_sample(argv: list[str]) -> None:
    """Generate text from a prompt, a file, or prompts that are typed one after the other."""
    refuse_other_names(argv, NAMES_ELSEWHERE)
    args = parse(SampleArgs, argv, "sample")
    if args.count < 1:
        raise UserError(f"count {args.count} must be at least 1.")
    check_options(args.temperature, args.top_k, args.top_p, args.tokens)
    if args.interactive and (args.prompt or args.prompt_file):
        raise UserError("--interactive reads the prompts; leave out --prompt and --prompt-file.")
    prompts = iter([_prompt(args)])
    model, tokenizer = open_model(find_model(args.model), args.device, args.precision)
    if args.interactive:
        print("Type a prompt and press Enter. An empty line ends.", file=sys.stderr, flush=True)
        prompts = iter(lambda: input("> " if sys.stdin.isatty() else ""), "")
    texts: list[str] = []
    try:
        for prompt in prompts:
            texts = _write_samples(model, tokenizer, prompt, args)
    except EOFError:  # the end of the typed prompts
        pass
    if args.json:
        print(json.dumps({"model": args.model, "prompt": args.prompt, "samples": texts}))


def open_model(path: Path, device_name: str, precision_name: str) -> tuple[GPT, Tokenizer]:
    """Load a model and its tokenizer for generating text, and set the precision of torch."""
    device = pick_device(device_name)
    precision, _ = pick_precision(precision_name, device)
    torch.set_float32_matmul_precision(MATMUL_PRECISION[precision])
    model = load_model(path, device, DTYPES[precision])
    return model, Tokenizer.of_model(path, model.config.vocab_size)


def _prompt(args: SampleArgs) -> str:
    if not args.prompt_file:
        return args.prompt
    if args.prompt:
        raise UserError("give --prompt or --prompt-file, not both.")
    if args.prompt_file == "-":
        return sys.stdin.read()
    try:
        return Path(args.prompt_file).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(
            f"the prompt file {args.prompt_file} cannot be read ({error.strerror})."
        ) from error


def _write_samples(model: GPT, tokenizer: Tokenizer, prompt: str, args: SampleArgs) -> list[str]:
    """Print the samples and return their texts.

    A single sample is printed token by token; several are drawn together and printed at the end.
    """
    ids = tokenizer.encode(prompt) or [tokenizer.end_of_text]
    # A token may end within a UTF-8 character.
    decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in range(args.count)]
    texts = [prompt] * args.count
    is_single = args.count == 1
    not_printed = prompt  # until the first token, so that warnings stand above the text
    steps = stream(
        model,
        [ids] * args.count,
        args.tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        int8=args.int8,
    )
    for row, token in until_end_of_text(steps, tokenizer.end_of_text):
        piece = decoders[row].decode(tokenizer.decode_bytes([token]))
        texts[row] += piece
        if is_single:
            print(not_printed + piece, end="", flush=True)
            not_printed = ""
    if is_single:
        print(not_printed)
    else:
        for number, text in enumerate(texts, 1):
            print(f"--- {number} of {args.count} ---\n{text}")
    return texts
