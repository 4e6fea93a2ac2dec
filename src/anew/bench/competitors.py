"""The sides of each comparison: one function a side, which sets everything up and returns what is timed.

Training: bf16, torch.compile, fused AdamW, clipping at 1.0, the same tokens, no dropout; theirs as a careful user would write it.
Writing: greedy, bf16, the same prompts. Scoring: HellaSwag, one example a forward on their side, as in build-nanogpt. Preparing: a
multiprocessing.Pool over documents with tiktoken on theirs; ours also hashes, shuffles, splits off validation and can be killed.
"""

import importlib.util
import json
import multiprocessing
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from anew.bench import timing as bench
from anew.bench.compare import Step
from anew.checkpoint.export import write_gguf
from anew.config.schema import Config, GPTConfig, RunConfig
from anew.data import prepare, readers, sources
from anew.data.dataloader import evaluation_windows
from anew.data.dataset import open_data
from anew.data.holdout import Settings
from anew.evaluate import runner
from anew.evaluate.tasks.table import TASKS
from anew.evaluate.tasks.task import Example
from anew.inference.generate import generate
from anew.model.gpt import GPT
from anew.tokenizer.bpe import Tokenizer
from anew.training.setup import training_loss
from anew.training.step import train_step
from anew.training.train_state import TrainState
from anew.utils import device as runtime
from anew.utils.signals import StopFlag

SHAPE = ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")
SHARD_TOKENS = 100_000_000


def is_installed(package: str) -> bool:
    """Can the other side be had?"""
    return importlib.util.find_spec(package) is not None


def our_step(config: Any, device: str) -> Step:
    """The product's own runtime, model and train_step."""
    config = config.override(device=device)
    rt = runtime.start(config.run)
    state, stop = TrainState(config, rt, ""), StopFlag()
    loss_of = training_loss(state)
    batch = bench.text_batch(config, rt.device)
    return lambda: train_step(loss_of, state, batch, 1.0, stop)


def their_step(config: Any, device: str) -> Step:
    """The same step with GPT2LMHeadModel under autocast."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape: Any = {name: getattr(config.model, name) for name in SHAPE}
    shape |= {
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "use_cache": False,
        "attn_implementation": "sdpa",
    }
    model: Any = GPT2LMHeadModel(GPT2Config(**shape)).train()
    model.to(device)
    return _usual_step(
        model, lambda forward, x, _: forward(input_ids=x, labels=x).loss, config, device
    )


def litgpt_step(config: Any, device: str) -> Step:
    """The same step with LitGPT's network in GPT-2's sizes. Positions are rotary and the head is not tied: 38M weights more."""
    from litgpt.config import Config as LitConfig
    from litgpt.model import GPT as LitGPT
    from litgpt.utils import chunked_cross_entropy

    m = config.model
    sizes = {
        "block_size": m.n_positions,
        "n_layer": m.n_layer,
        "n_head": m.n_head,
        "n_embd": m.n_embd,
        "vocab_size": m.vocab_size,
    }
    like_gpt2 = {"parallel_residual": False, "rotary_percentage": 1.0, "gelu_approximate": "tanh"}
    model = LitGPT(LitConfig(**sizes, **like_gpt2, padded_vocab_size=m.padded_vocab_size)).to(
        device
    )
    return _usual_step(
        model,
        lambda forward, x, y: chunked_cross_entropy(forward(x), y, chunk_size=0),
        config,
        device,
    )


def _usual_step(model: Any, loss_of: Any, config: Any, device: str) -> Step:
    """Autocast to bf16, torch.compile, fused AdamW."""
    compiled, _ = runtime.pick_compile(config.run.compile, torch.device(device))
    forward: Any = torch.compile(model, dynamic=False) if compiled else model
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    batch = bench.text_batch(config, torch.device(device))

    def step() -> None:
        for x, y in batch:
            with torch.autocast(device, torch.bfloat16):
                loss = loss_of(forward, x, y) / len(batch)
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def plain_step(config: Any, device: str) -> Step:
    """The same model and data in fp32, eager, with torch's default AdamW: a step as the oldest scripts take it on a CPU."""
    return our_step(config.override(**bench.BOTTOM), device)


def writing_dtype(device: str) -> torch.dtype:
    """What both sides of a comparison of writing compute in: bf16, but on MPS, where its attention looks ahead (pytorch 195910)."""
    return torch.float32 if device == "mps" else torch.bfloat16


def our_writing(
    config: Any, device: str, rows: int, prompt: int, tokens: int, int8: bool = False
) -> Step:
    """The product's own cached decoding, greedy."""
    model = GPT(config.model, writing_dtype(device), seed=0).to(device).eval()
    prompts = torch.randint(
        config.model.vocab_size, (rows, prompt), generator=torch.Generator().manual_seed(0)
    ).tolist()
    return lambda: generate(model, prompts, tokens, temperature=0.0, int8=int8)


def our_writing_int8(config: Any, device: str, rows: int, prompt: int, tokens: int) -> Step:
    """The same with weights in 8 bits."""
    return our_writing(config, device, rows, prompt, tokens, int8=True)


def their_writing(config: Any, device: str, rows: int, prompt: int, tokens: int) -> Step:
    """`generate` of transformers in bf16, greedy."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape: Any = {name: getattr(config.model, name) for name in SHAPE}
    model: Any = GPT2LMHeadModel(GPT2Config(**shape)).eval()
    model.to(device, writing_dtype(device))
    ids = torch.randint(
        config.model.vocab_size, (rows, prompt), generator=torch.Generator().manual_seed(0)
    ).to(device)
    how = {
        "max_new_tokens": tokens,
        "min_new_tokens": tokens,
        "do_sample": False,
        "pad_token_id": 50256,
    }

    def step() -> None:
        with torch.inference_mode():
            model.generate(ids, attention_mask=torch.ones_like(ids), **how)

    return step


def llama_writing(
    config: Any, device: str, rows: int, prompt: int, tokens: int, dtype: str = "bf16"
) -> Step:
    """llama.cpp on the exported GGUF, greedy, with as many threads."""
    from llama_cpp import Llama

    assert (rows, device) == (1, "cpu")
    with tempfile.TemporaryDirectory() as folder:
        write_gguf(
            Path(folder) / "model.gguf",
            GPT(config.model, seed=0),
            Tokenizer.named("gpt2"),
            dtype,
            "side by side",
        )
        threads = torch.get_num_threads()
        llama = Llama(
            str(Path(folder) / "model.gguf"),
            n_ctx=1024,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )
    [ids] = torch.randint(
        config.model.vocab_size, (rows, prompt), generator=torch.Generator().manual_seed(0)
    ).tolist()

    def step() -> None:
        llama.reset()
        for count, _ in enumerate(
            llama.generate(ids, top_k=1, temp=0.0, repeat_penalty=1.0), start=1
        ):
            if count == tokens:
                break

    return step


def llama_writing_q8(config: Any, device: str, rows: int, prompt: int, tokens: int) -> Step:
    """The same in llama.cpp's 8 bits."""
    return llama_writing(config, device, rows, prompt, tokens, "q8_0")


def our_scoring(file: Path, device: Any, n: int) -> Step:
    """HellaSwag by the product's scorer, the next `n` examples each turn."""
    rt = runtime.start(RunConfig(device=device, compile="off"))
    parts = _parts(file, n)
    model = GPT(GPTConfig(), rt.dtype, seed=1).to(rt.device).eval()
    runner.compile_blocks(model, next(parts) * 100)  # as `anew evaluate` does for the whole file
    return lambda: runner.run(model, TASKS["hellaswag"], next(parts))


def their_scoring(file: Path, device: Any, n: int) -> Step:
    """The same examples by build-nanogpt's procedure on transformers' model: four padded rows a forward, all logits."""
    from transformers import GPT2Config, GPT2LMHeadModel

    rt = runtime.start(RunConfig(device=device, compile="off"))
    parts = _parts(file, n)
    next(parts)
    model: Any = GPT2LMHeadModel(GPT2Config()).eval()
    model.to(rt.device, rt.dtype)

    @torch.no_grad()
    def step() -> None:
        for example in next(parts):
            context, endings = (
                list(example.question.context),
                [list(e) for e in example.question.endings],
            )
            width = len(context) + max(map(len, endings))
            ids, scored = torch.zeros(4, width, dtype=torch.long), torch.zeros(4, width)
            for row, ending in enumerate(endings):
                ids[row, : len(context) + len(ending)] = torch.tensor(context + ending)
                scored[row, len(context) : len(context) + len(ending)] = 1
            ids, scored = ids.to(rt.device), scored.to(rt.device)[:, 1:]
            logits = model(ids).logits[:, :-1]
            loss = (
                F.cross_entropy(
                    logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none"
                ).view(4, -1)
                * scored
            )
            (loss.sum(1) / scored.sum(1)).argmin().item()

    return step


def _parts(file: Path, n: int) -> Iterator[list[Example]]:
    """`n` examples from all over the file, others each time: it begins with its short half. `file`: the JSON lines, or its cleaned text."""
    examples = TASKS["hellaswag" if file.suffix == ".jsonl" else "hellaswag_harness"].examples(
        file, Tokenizer.named("gpt2"), 1024
    )
    stride, i = max(1, len(examples) // n), 0
    while True:
        yield examples[i % stride :: stride][:n]
        i += 1


def our_preparing(file: Path, folder: Path) -> Step:
    """Text to shards by `anew prepare`."""
    Tokenizer.named("gpt2").encode("loaded before the clock starts, on both sides")
    turns = iter(range(10**6))
    return lambda: prepare.prepare(
        sources.find(str(file)),
        Settings("gpt2"),
        folder / f"ours-{next(turns)}",
        disk_budget=10**12,
    )


def script_preparing(file: Path, folder: Path) -> Step:
    """What people write."""
    turns, workers = iter(range(10**6)), prepare.cores()

    def step() -> None:
        """A folder of .npy shards."""
        out = folder / f"script-{next(turns)}"
        out.mkdir()
        shard, used, number = np.empty(SHARD_TOKENS, dtype=np.uint16), 0, 0
        with (
            file.open(encoding="utf-8") as lines,
            multiprocessing.get_context("fork").Pool(workers, _start_worker) as pool,
        ):
            for tokens in pool.imap(
                _tokens_of, (json.loads(line)["text"] for line in lines), chunksize=16
            ):
                while len(tokens) > SHARD_TOKENS - used:
                    room = SHARD_TOKENS - used
                    shard[used:] = tokens[:room]
                    np.save(out / f"shard_{number:06d}.npy", shard)
                    tokens, used, number = tokens[room:], 0, number + 1
                shard[used : used + len(tokens)] = tokens
                used += len(tokens)
        np.save(out / f"shard_{number:06d}.npy", shard[:used])

    return step


_encoding: Any = None


def _start_worker() -> None:
    """Each worker has its own tiktoken, over our packaged merges, which need no network."""
    global _encoding  # what a pool's initialiser leaves for its workers
    _encoding = Tokenizer.named("gpt2")._tiktoken


def _tokens_of(text: str) -> np.ndarray:
    """One document, end of text first."""
    return np.array([50256, *_encoding.encode_ordinary(text)], dtype=np.uint16)


def text_of(file: str, folder: Path, documents: int) -> tuple[Path, int]:
    """Documents of `file`, or of Python's own source, as plain jsonl, and their bytes: what both sides prepare."""
    path, size = folder / "text.jsonl", 0
    texts = (
        (d.decode("utf-8", "replace") for d in readers.documents(Path(file)))
        if file
        else (p.read_text(encoding="utf-8", errors="replace") for p in bench.stdlib())
    )
    with path.open("w", encoding="utf-8") as out:
        for _, text in zip(range(documents), texts, strict=False):
            out.write(json.dumps({"text": text}) + "\n")
            size += len(text.encode())
    return path, size


def exported_loss(folder: Path, config: Config, device: str) -> float:
    """Mean loss in nats a token of a checkpoint folder as transformers reads and computes it in fp32, over its run's validation windows."""
    from transformers import GPT2LMHeadModel

    model: Any = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
    model.to(device)
    wanted = config.data.tokenizer
    total, scored = 0.0, 0
    with (
        open_data(
            config.data.data,
            wanted if wanted.startswith("train:") else Tokenizer.find(wanted, folder),
        ) as data,
        torch.no_grad(),
    ):
        for ids, targets in evaluation_windows(
            data.splits["val"], config.data.seq_len, config.data.val_tokens, 8
        ):
            logits = model(torch.from_numpy(ids).to(device)).logits.flatten(0, 1)
            total += F.cross_entropy(
                logits, torch.from_numpy(targets).to(device).flatten(), reduction="sum"
            ).item()
            scored += int((targets != -100).sum())
    return total / scored
