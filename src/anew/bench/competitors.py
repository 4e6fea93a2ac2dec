"""The sides of each comparison: functions that set everything up and return the turn that is timed.

    turn = transformers_training(config, "cpu")     # `compare.alternate` calls it in a new process
    turn()                                          # one training step

- Training: torch.compile, fused AdamW, clipping at 1.0, no dropout, the same tokens. The other side
  is written as a careful user of the package writes it.
- Generation: greedy, the same prompts, by transformers' `generate` or llama.cpp.
- Scoring: HellaSwag. The other side has one example in a forward pass, as build-nanogpt does.
- Preparing: text to shards of GPT-2's tokens. The other side runs tiktoken in a
  multiprocessing.Pool over documents; ours also hashes, shuffles, splits off validation, and
  can be killed at any time.

All sides of training and generation compute in bf16, or all in fp32 (`common_precision`), except
that `fp32, eager` is always in fp32 and that some store weights in 8 bits.
"""

import importlib.util
import itertools
import json
import multiprocessing
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from anew.bench.compare import Turn
from anew.bench.ladder import BOTTOM
from anew.bench.timing import standard_library_files, text_batch
from anew.checkpoint.gguf import write_gguf
from anew.config.config import Config
from anew.config.schema import GPTConfig, RunConfig
from anew.data.dataloader import evaluation_windows
from anew.data.dataset import open_data
from anew.data.holdout import Settings
from anew.data.prepare import cores, prepare_data
from anew.data.readers import documents
from anew.data.sources import find
from anew.errors import UserError
from anew.evaluate import runner
from anew.evaluate.scorer import Question
from anew.evaluate.tasks.registry import TASKS
from anew.evaluate.tasks.task import Example
from anew.inference.cpu_decoder import CpuDecoder
from anew.inference.decoders import decoder_for
from anew.inference.generate import generate
from anew.model.gpt import GPT
from anew.tokenizer.bpe import Tokenizer
from anew.training.setup import training_loss
from anew.training.step import train_step
from anew.training.train_state import TrainState
from anew.utils.device import DTYPES, Runtime, pick_compile, pick_precision, set_up_device
from anew.utils.signals import StopFlag

SHAPE = ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")
SHARD_TOKENS = 100_000_000
END_OF_TEXT = 50256


def is_installed(package: str) -> bool:
    """Return whether a package can be imported."""
    return importlib.util.find_spec(package) is not None


def transformers_model(shape: GPTConfig, **settings: Any) -> Any:
    """Return transformers' GPT-2 of this shape with random weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {name: getattr(shape, name) for name in SHAPE}
    return GPT2LMHeadModel(GPT2Config(**sizes, **settings))


def common_precision(config: Config, device: str) -> str:
    """Return the precision of the sides of a comparison: bf16 or fp32.

    With `auto` it is bf16 where training would take bf16, and fp32 elsewhere. Raises UserError for
    other precisions, which the other sides do not have.
    """
    wanted = config.run.precision
    if wanted not in ("auto", "bf16", "fp32"):
        raise UserError(
            f"packages are compared in bf16 or fp32, not in {wanted}; use --precision bf16 or fp32."
        )
    precision, _ = pick_precision(wanted, torch.device(device))
    return "bf16" if precision == "bf16" else "fp32"


# Training


def anew_training(config: Config, device: str) -> Turn:
    """Return a step of the product's own `train_step`."""
    config = config.override(device=device)
    runtime = set_up_device(config.run)
    state = TrainState(config, runtime, "")
    stop = StopFlag()
    loss_of = training_loss(state)
    batch = text_batch(config, runtime.device)
    return lambda: train_step(loss_of, state, batch, 1.0, stop)


def eager_fp32_training(config: Config, device: str) -> Turn:
    """Return a step in fp32, eager, with torch's default AdamW, as plain scripts for a CPU do."""
    return anew_training(config.override(**BOTTOM), device)


def transformers_training(config: Config, device: str) -> Turn:
    """Return a step of transformers' GPT2LMHeadModel with fused AdamW, and autocast in bf16."""
    model = transformers_model(
        config.model,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        attn_implementation="sdpa",
    )
    model.train().to(device)
    compiles, _ = pick_compile(config.run.compile, torch.device(device))
    network: Any = torch.compile(model, dynamic=False) if compiles else model
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=6e-4,
        betas=(0.9, 0.95),
        weight_decay=0.1,
        fused=True,
    )
    batch = text_batch(config, torch.device(device))
    assert config.run.precision in ("bf16", "fp32")
    is_bf16 = config.run.precision == "bf16"

    def step() -> None:
        for inputs, _ in batch:
            with torch.autocast(device, torch.bfloat16, enabled=is_bf16):
                # The model shifts the labels itself, so each row has one target fewer than ours.
                loss = network(input_ids=inputs, labels=inputs).loss / len(batch)
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


# Generation


@dataclass(frozen=True)
class Generation:
    """What every side of a comparison of generation does in a turn."""

    config: Config
    device: str
    precision: str  # bf16 or fp32
    rows: int
    prompt_tokens: int
    new_tokens: int

    @property
    def prompts(self) -> torch.Tensor:
        """Random token ids, (rows, prompt_tokens), the same for every side."""
        generator = torch.Generator().manual_seed(0)
        shape = (self.rows, self.prompt_tokens)
        return torch.randint(self.config.model.vocab_size, shape, generator=generator)


def anew_generation(task: Generation, int8: bool = False) -> Turn:
    """Return greedy decoding with the product's own cache."""
    model = GPT(task.config.model, DTYPES[task.precision], seed=0)
    model.to(task.device).eval()
    if int8:
        decoder = decoder_for(model, 1, int8)
        if not isinstance(decoder, CpuDecoder) or not decoder.int8:
            raise UserError("int8 weights need Linux and a C++ compiler.")
    prompts = task.prompts.tolist()
    return lambda: generate(model, prompts, task.new_tokens, temperature=0.0, int8=int8)


def anew_int8_generation(task: Generation) -> Turn:
    """Return the same with weights in 8 bits."""
    return anew_generation(task, int8=True)


def transformers_generation(task: Generation) -> Turn:
    """Return greedy decoding by transformers' `generate`."""
    model = transformers_model(task.config.model).eval()
    model.to(task.device, DTYPES[task.precision])
    ids = task.prompts.to(task.device)

    def generate_tokens() -> None:
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=task.new_tokens,
                min_new_tokens=task.new_tokens,
                do_sample=False,
                pad_token_id=END_OF_TEXT,
            )

    return generate_tokens


def llama_cpp_generation(task: Generation, dtype: str | None = None) -> Turn:
    """Return greedy decoding by llama.cpp on the exported GGUF, with as many threads as ours.

    `dtype` is that of the matrices in the file; None: the precision of the other sides. The cache
    is in fp16, llama.cpp's default.
    """
    from llama_cpp import Llama

    assert task.rows == 1
    assert task.device == "cpu"
    threads = torch.get_num_threads()
    dtype = dtype or {"bf16": "bf16", "fp32": "f32"}[task.precision]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        model = GPT(task.config.model, seed=0)
        write_gguf(path, model, Tokenizer.named("gpt2"), dtype, "side by side")
        llama = Llama(
            str(path),
            n_ctx=1024,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )
    [ids] = task.prompts.tolist()

    def generate_tokens() -> None:
        llama.reset()
        tokens = llama.generate(ids, top_k=1, temp=0.0, repeat_penalty=1.0)
        for _ in itertools.islice(tokens, task.new_tokens):
            pass

    return generate_tokens


def llama_cpp_q8_generation(task: Generation) -> Turn:
    """Return the same with llama.cpp's 8-bit weights."""
    return llama_cpp_generation(task, "q8_0")


# Scoring


def anew_scoring(file: Path, device: Any, count: int) -> Turn:
    """Return the product's scorer on the next `count` examples of HellaSwag."""
    runtime = _eager_runtime(device)
    parts = _parts(file, count)
    model = GPT(GPTConfig(), runtime.dtype, seed=1).to(runtime.device).eval()
    # `anew evaluate` decides by the number of examples whether compiling pays, and has all of them.
    runner.compile_blocks(model, next(parts) * 100)
    return lambda: runner.run_task(model, TASKS["hellaswag"], next(parts))


def transformers_scoring(file: Path, device: Any, count: int) -> Turn:
    """Return build-nanogpt's procedure on transformers' model, for the same examples.

    A forward pass has the four padded rows of one example and returns all logits.
    """
    runtime = _eager_runtime(device)
    parts = _parts(file, count)
    next(parts)  # the other side uses the first part to compile
    model = transformers_model(GPTConfig()).eval()
    model.to(runtime.device, runtime.dtype)

    @torch.no_grad()
    def score() -> None:
        for example in next(parts):
            ids, is_scored = _padded_rows(example.question, runtime.device)
            logits = model(ids).logits[:, :-1].flatten(0, 1).float()
            targets = ids[:, 1:].flatten()
            losses = F.cross_entropy(logits, targets, reduction="none").view(4, -1)
            row_losses = (losses * is_scored).sum(1)
            mean_losses = row_losses / is_scored.sum(1)
            mean_losses.argmin().item()

    return score


def _eager_runtime(device: Any) -> Runtime:
    return set_up_device(RunConfig(device=device, compile="off"))


def _padded_rows(question: Question, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the four rows of a question and which of their predictions are scored."""
    context = list(question.context)
    rows = [context + list(ending) for ending in question.endings]
    width = max(map(len, rows))
    ids = torch.zeros(4, width, dtype=torch.long)
    is_scored = torch.zeros(4, width)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        is_scored[row, len(context) : len(tokens)] = 1
    return ids.to(device), is_scored.to(device)[:, 1:]


def _parts(file: Path, count: int) -> Iterator[list[Example]]:
    """Yield `count` examples from all over the file, other ones each time.

    A part is spread over the file because the file begins with its short examples. `file` holds
    HellaSwag's JSON lines or its cleaned text.
    """
    task = TASKS["hellaswag" if file.suffix == ".jsonl" else "hellaswag_harness"]
    examples = task.examples(file, Tokenizer.named("gpt2"), 1024)
    stride = max(1, len(examples) // count)
    for first in itertools.cycle(range(stride)):
        yield examples[first::stride][:count]


# Preparing


def anew_preparing(file: Path, folder: Path) -> Turn:
    """Return the conversion of text to shards by `anew prepare`."""
    # The tokenizer loads before the clock starts, on both sides.
    Tokenizer.named("gpt2").encode_document(b"a text")
    numbers = itertools.count()

    def prepare_text() -> None:
        out = folder / f"ours-{next(numbers)}"
        prepare_data(find(str(file)), Settings("gpt2"), out, disk_budget=10**12)

    return prepare_text


def script_preparing(file: Path, folder: Path) -> Turn:
    """Return the conversion of text to .npy shards as common scripts do it."""
    numbers = itertools.count()
    workers = cores()

    def prepare_text() -> None:
        out = folder / f"script-{next(numbers)}"
        out.mkdir()
        context = multiprocessing.get_context("fork")
        with file.open(encoding="utf-8") as lines, context.Pool(workers, _start_worker) as pool:
            texts = (json.loads(line)["text"] for line in lines)
            _write_shards(out, pool.imap(_tokens_of, texts, chunksize=16))

    return prepare_text


def _write_shards(out: Path, token_arrays: Iterator[np.ndarray]) -> None:
    """Write the tokens to files of SHARD_TOKENS each."""
    shard = np.empty(SHARD_TOKENS, dtype=np.uint16)
    used = 0
    number = 0
    for tokens in token_arrays:
        while len(tokens) > SHARD_TOKENS - used:
            room = SHARD_TOKENS - used
            shard[used:] = tokens[:room]
            np.save(out / f"shard_{number:06d}.npy", shard)
            tokens = tokens[room:]
            used = 0
            number += 1
        shard[used : used + len(tokens)] = tokens
        used += len(tokens)
    np.save(out / f"shard_{number:06d}.npy", shard[:used])


_encoding: Any = None


def _start_worker() -> None:
    """Load tiktoken in a worker, from this package's merges, which need no network."""
    global _encoding  # a pool's initializer can only leave a global for the worker's calls
    _encoding = Tokenizer.named("gpt2")._tiktoken


def _tokens_of(text: str) -> np.ndarray:
    """Return the tokens of one document, end of text first."""
    return np.array([END_OF_TEXT, *_encoding.encode_ordinary(text)], dtype=np.uint16)


def write_text(file: str, folder: Path, limit: int) -> tuple[Path, int]:
    """Write the text that both sides prepare as JSON lines; return the path and the bytes of text.

    The text is the first `limit` documents of `file`, or of Python's source if `file` is empty.
    """
    path = folder / "text.jsonl"
    if file:
        texts = (document.decode("utf-8", "replace") for document in documents(Path(file)))
    else:
        texts = (
            source.read_text(encoding="utf-8", errors="replace")
            for source in standard_library_files()
        )
    size = 0
    with path.open("w", encoding="utf-8") as out:
        for text in itertools.islice(texts, limit):
            out.write(json.dumps({"text": text}) + "\n")
            size += len(text.encode())
    return path, size


# Loss of a checkpoint


def exported_loss(folder: Path, config: Config, device: str) -> float:
    """Return the mean loss of a checkpoint in nats a token, computed by transformers in fp32.

    The text is the validation windows of `config`, which is the config of the checkpoint's run.
    """
    from transformers import GPT2LMHeadModel

    model: Any = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
    model.to(device)
    total = 0.0
    scored = 0
    data_config = config.data
    tokenizer: str | Tokenizer = data_config.tokenizer
    if not data_config.tokenizer.startswith("train:"):
        tokenizer = Tokenizer.find(data_config.tokenizer, folder)
    with open_data(data_config.data, tokenizer) as data, torch.no_grad():
        windows = evaluation_windows(
            data.splits["val"], data_config.seq_len, data_config.val_tokens, 8
        )
        for ids, targets in windows:
            logits = model(torch.from_numpy(ids).to(device)).logits.flatten(0, 1)
            flat_targets = torch.from_numpy(targets).to(device).flatten()
            total += F.cross_entropy(logits, flat_targets, reduction="sum").item()
            scored += int((targets != -100).sum())
    return total / scored
