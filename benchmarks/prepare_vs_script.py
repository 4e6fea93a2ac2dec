"""MB of text a second from jsonl to shards: `anew prepare` against the obvious script, alternating in one run.

    .venv/bin/python benchmarks/prepare_vs_script.py --file reviews.jsonl.xz --rounds 4

The obvious script is build-nanogpt's way: a multiprocessing.Pool over documents, tiktoken's encode_ordinary, 100M-token shards; no hashes,
no shuffle, no restart, no validation by document, no disk budget. Ours has them all. Both use as many workers as there are cores.
"""

import argparse
import json
import multiprocessing
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from anew.data import prepare, readers, sources

encoding = None


def start_worker() -> None:
    """Each worker of the script has its own tiktoken, over our packaged merges, since there is no network."""
    global encoding
    from anew import Tokenizer

    encoding = Tokenizer.named("gpt2")._tiktoken


def tokens_of(text: str) -> np.ndarray:
    """One document, end of text first."""
    return np.array([50256, *encoding.encode_ordinary(text)], dtype=np.uint16)  # type: ignore[attr-defined]


def script(file: Path, out: Path, workers: int, shard_tokens: int = 100_000_000) -> int:
    """What people write; returns the number of tokens."""
    out.mkdir()
    shard, used, number, total = np.empty(shard_tokens, dtype=np.uint16), 0, 0, 0
    with file.open(encoding="utf-8") as lines, multiprocessing.Pool(workers, start_worker) as pool:
        for tokens in pool.imap(tokens_of, (json.loads(line)["text"] for line in lines), chunksize=16):
            total += len(tokens)
            while len(tokens) > shard_tokens - used:
                room = shard_tokens - used
                shard[used:] = tokens[:room]
                np.save(out / f"shard_{number:06d}.npy", shard)
                tokens, used, number = tokens[room:], 0, number + 1
            shard[used : used + len(tokens)] = tokens
            used += len(tokens)
    np.save(out / f"shard_{number:06d}.npy", shard[:used])
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--file", required=True, help="jsonl, packed or not")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--documents", type=int, default=60_000)
    parser.add_argument("--json", action="store_true")
    a = parser.parse_args()
    workers = prepare.cores()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        text = root / "text.jsonl"
        size = 0
        with text.open("w", encoding="utf-8") as file:
            for _, document in zip(range(a.documents), readers.documents(Path(a.file)), strict=False):
                file.write(json.dumps({"text": document.decode()}) + "\n")
                size += len(document)
        prepare.Tokenizer.named("gpt2").encode("both sides have their tokenizer before the clock starts")
        rates: list[tuple[float, float]] = []
        for i in range(a.rounds):
            began = time.perf_counter()
            theirs = script(text, root / "script", workers)
            middle = time.perf_counter()
            ours = prepare.prepare(sources.find(str(text)), prepare.Settings("gpt2"), root / "ours", disk_budget=10**11)
            end = time.perf_counter()
            assert theirs == ours.n_tokens("train") + ours.n_tokens("val")
            rates.append((size / 1e6 / (end - middle), size / 1e6 / (middle - began)))
            print(
                f"round {i + 1}: {rates[-1][0]:.1f} MB/s, the script {rates[-1][1]:.1f}, ratio {rates[-1][0] / rates[-1][1]:.2f}",
                flush=True,
            )
            shutil.rmtree(root / "script")
            shutil.rmtree(root / "ours")
    ratios = sorted(x / y for x, y in rates)
    summary = {
        "mb_per_second": statistics.median(x for x, _ in rates),
        "ratio": statistics.median(ratios),
        "spread": [ratios[0], ratios[-1]],
    }
    spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
    print(f"{size / 1e6:.0f} MB, {workers} workers: {summary['mb_per_second']:.1f} MB/s, ratio {summary['ratio']:.2f} ({spread})")
    if a.json:
        print(json.dumps(summary))


if __name__ == "__main__":
    main()
