"""What fine-tuning on conversations gives and costs, on two CPU cores.

    python benchmarks/chat.py --answers           # right answers before and after, three seeds
    python benchmarks/chat.py --padding FOLDER    # padded rows beside packed rows, in seconds

FOLDER has data of CORE, such as ../shared/data/core; its questions become conversations. A padded
row is a conversation. A packed row has several, and a mask that hides them from one another.
"""

import argparse
import json
import lzma
import random
import re
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import anew
from anew.data.conversations import Conversations
from anew.data.dataset import open_data
from anew.tokenizer.chat import Message, encode

BYTES = anew.Tokenizer.named("bytes")
TASKS = ("arc_easy", "boolq", "commonsense_qa", "piqa")
SEQ_LEN = 256
STEP = 32  # conversations
ROUNDS = 9


def main() -> None:
    """Run the measurement that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--answers", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--padding", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.answers:
            measure_answers(Path(folder), arguments.seeds)
        if arguments.padding:
            measure_padding(Path(folder), arguments.padding)


def write_talks(path: Path, talks: list[list[Message]]) -> Path:
    """Write conversations as JSON lines; return the path."""
    rows = [{"messages": [message._asdict() for message in talk]} for talk in talks]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# --- Right answers


def question(word: str, kind: int) -> list[Message]:
    """Return a conversation about a word, as in lesson 10."""
    asked, answer = (
        (f"Spell {word}.", "-".join(word)),
        (f"How many letters has {word}?", str(len(word))),
    )[kind]
    return [Message("user", asked), Message("assistant", answer)]


def share_of_right_answers(model: anew.GPT, words: list[str], kind: int) -> float:
    """Return the share of questions about `words` that the model answers right."""
    talks = [question(word, kind) for word in words]
    prompts = [encode(BYTES, talk[:1], asks_reply=True) for talk in talks]
    written = anew.generate(model, prompts, 20, BYTES.end_of_text, temperature=0.0)
    answers = [BYTES.decode(ids) for ids in written]
    return sum(a == talk[1].content for a, talk in zip(answers, talks, strict=True)) / len(talks)


def measure_answers(folder: Path, seeds: int) -> None:
    """Train a small text model, fine-tune it with each seed, and print the shares."""
    library = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:150]
    text = "".join(path.read_text(encoding="utf-8", errors="ignore") for path in library)
    words = sorted(set(re.findall(r"\b[a-z]{3,8}\b", text)))
    random.Random(1).shuffle(words)
    unseen, known = words[:200], words[200:]
    file = write_talks(
        folder / "talks.jsonl", [question(w, kind) for w in known for kind in (0, 1)]
    )
    base = folder / "base"
    shape = {"n_layer": 2, "n_head": 3, "n_embd": 96}
    settings = {"evaluate_every": 0, "sample_every": 0, "device": "cpu"}
    anew.train(anew.recipe("demo", steps=200, out=base, **shape, **settings))
    print(f"{len(known):,} words to learn from, {len(unseen)} to test with")
    print("seed    spelled  counted   loss on answers   loss on the old text")
    model = anew.GPT.from_pretrained(base).eval()
    shares = [share_of_right_answers(model, unseen, kind) for kind in (0, 1)]
    print(f"before  {shares[0]:7.1%}  {shares[1]:7.1%}", flush=True)
    for seed in range(1, seeds + 1):
        run = folder / f"chat-{seed}"
        config = anew.recipe(
            "chat",
            init=base,
            data=file,
            out=run,
            seed=seed,
            optimizer="muon",
            muon_lr=0.01,
            lr=3e-3,
            min_lr=0.0,
            schedule="linear",
            steps=400,
            seq_len=128,
            batch_tokens=32 * 128,
            micro_batch=32,
            general_data="stdlib",
            val_tokens=65_536,
            evaluate_every=200,
            save_every=400,
            device="cpu",
            precision="fp32",
        )
        anew.train(config)
        model = anew.GPT.from_pretrained(run).eval()
        shares = [share_of_right_answers(model, unseen, kind) for kind in (0, 1)]
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        answers = [row["val/loss"] for row in rows if "val/loss" in row]
        general = [row["general/loss"] for row in rows if "general/loss" in row]
        print(
            f"{seed:<6}  {shares[0]:7.1%}  {shares[1]:7.1%}   {answers[-1]:.4f}            "
            f"{general[-1]:.4f}",
            flush=True,
        )


# --- Padding beside packing


def core_talks(folder: Path) -> list[list[Message]]:
    """Return the questions of several tasks of CORE as conversations, in a random order."""
    talks = []
    for task in TASKS:
        lines = lzma.decompress((folder / f"{task}.jsonl.xz").read_bytes()).decode().splitlines()
        for row in map(json.loads, lines):
            answer = row["choices"][row["gold"]]
            talks.append([Message("user", row["query"]), Message("assistant", answer)])
    random.Random(1).shuffle(talks)
    return talks


def measure_padding(folder: Path, core: Path) -> None:
    """Print the share of padding, and the seconds of a step's passes in both forms, by turns."""
    file = write_talks(folder / "talks.jsonl", core_talks(core))
    data = open_data(str(file), "gpt2", conversations=True)
    tokenizer = anew.Tokenizer.named("gpt2")
    conversations = Conversations(data.splits["train"], tokenizer, SEQ_LEN, seed=1)
    shape = anew.GPTConfig(
        n_layer=6, n_head=4, n_embd=256, n_positions=SEQ_LEN, vocab_size=tokenizer.n_vocab
    )
    model = anew.GPT(shape, seed=1)
    seconds: dict[str, list[float]] = {"padded": [], "packed": []}
    losses: dict[str, list[float]] = {"padded": [], "packed": []}
    cells = {"padded": 0, "packed": 0}
    inputs = 0
    for step in range(ROUNDS):
        n_inputs, n_targets = conversations.sizes(step * STEP, STEP)
        inputs += n_inputs
        groups = conversations.micro_batches(step * STEP, STEP, size=4)
        rows = packed_rows([conversations.row(step * STEP + i) for i in range(STEP)])
        cells["padded"] += sum(ids.size for ids, _ in groups)
        cells["packed"] += len(rows) * SEQ_LEN
        for name, passes in (
            ("padded", lambda groups=groups: padded_passes(model, groups)),
            ("packed", lambda rows=rows: packed_passes(model, rows)),
        ):
            took, loss = timed(passes)
            seconds[name].append(took)
            losses[name].append(loss / n_targets)
    difference = max(abs(a - b) for a, b in zip(*losses.values(), strict=True))
    ratios = [a / b for a, b in zip(seconds["padded"], seconds["packed"], strict=True)][1:]
    for name in seconds:
        filled = inputs / cells[name]
        print(f"{name}: {filled:.0%} of the positions are text, {np.median(seconds[name]):.3f} s")
    print(f"losses differ by at most {difference:.1e}")
    print(
        f"padded / packed, seconds: {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f}), {len(ratios)} turns"
    )


def timed(passes: Callable[[], float]) -> tuple[float, float]:
    """Return the seconds that `passes` takes, and its result."""
    start = time.perf_counter()
    result = passes()
    return time.perf_counter() - start, result


def padded_passes(model: anew.GPT, groups: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """Return the summed loss of padded rows after forward and backward passes."""
    total = 0.0
    for ids, targets in groups:
        count = int((targets != -100).sum())
        loss = model(torch.from_numpy(ids), torch.from_numpy(targets), few_targets=True) * count
        loss.backward()
        total += loss.item()
    model.zero_grad()
    return total


def packed_rows(
    rows: list[tuple[np.ndarray, np.ndarray]],
) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """Return the conversations of each packed row: the first row that has room, longest first."""
    packed: list[list[tuple[np.ndarray, np.ndarray]]] = []
    for row in sorted(rows, key=lambda row: -len(row[0])):
        for others in packed:
            if sum(len(ids) for ids, _ in others) + len(row[0]) <= SEQ_LEN:
                others.append(row)
                break
        else:
            packed.append([row])
    return packed


def packed_passes(model: anew.GPT, rows: list[list[tuple[np.ndarray, np.ndarray]]]) -> float:
    """Return the summed loss of packed rows, four at a time, after both passes."""
    total = 0.0
    for first in range(0, len(rows), 4):
        ids, targets, position, mask = packed_tensors(rows[first : first + 4])
        count = int((targets != -100).sum())
        hidden = model.hidden(ids, position=position, mask=mask)
        wte = model.transformer.wte.weight
        vocab_size = model.config.vocab_size
        is_target = targets != -100
        loss = model.head_loss(hidden[is_target], wte, targets[is_target], vocab_size, True)
        (loss * count).backward()
        total += loss.item() * count
    model.zero_grad()
    return total


def packed_tensors(
    rows: list[list[tuple[np.ndarray, np.ndarray]]],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ids, targets and positions (B, T), and the mask (B, 1, T, T) of packed rows."""
    ids = torch.zeros(len(rows), SEQ_LEN, dtype=torch.int64)
    targets = torch.full_like(ids, -100)
    position = torch.zeros_like(ids)
    owner = torch.full_like(ids, -1)
    for i, row in enumerate(rows):
        start = 0
        for number, (row_ids, row_targets) in enumerate(row):
            end = start + len(row_ids)
            ids[i, start:end] = torch.from_numpy(row_ids)
            targets[i, start:end] = torch.from_numpy(row_targets)
            position[i, start:end] = torch.arange(len(row_ids))
            owner[i, start:end] = number
            start = end
    same = owner[:, None, :, None] == owner[:, None, None, :]
    causal = torch.ones(SEQ_LEN, SEQ_LEN, dtype=torch.bool).tril()
    return ids, targets, position, same & causal


if __name__ == "__main__":
    main()
