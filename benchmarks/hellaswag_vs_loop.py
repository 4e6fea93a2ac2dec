"""HellaSwag examples a second: our scorer against the usual loop of one example a forward through transformers, alternating.

    .venv/bin/python benchmarks/hellaswag_vs_loop.py --file hellaswag_val.jsonl                            # bf16, 124M, random weights
    .venv/bin/python benchmarks/hellaswag_vs_loop.py --file F --precision fp32 --rounds 10 --examples 200  # and compare predictions

The loop is build-nanogpt's procedure: four rows of context + ending, padded, all logits, cross-entropy. Both sides see the same examples,
in turns of `--examples` each, spread over the file. Prints examples a second, the median ratio of neighbouring turns with its spread, and
how many predictions agree. The time our side takes to compile, once, is left out.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch.nn import functional as F

from anew import GPT, GPTConfig, Tokenizer, runtime, weights
from anew.config import RunConfig
from anew.evaluate import runner
from anew.evaluate.task import Example
from anew.evaluate.tasks import TASKS


@torch.no_grad()
def loop(model: torch.nn.Module, examples: list[Example]) -> list[tuple[int, int]]:
    """(likeliest ending, likeliest a token) of each example, one example a forward."""
    predictions = []
    device = next(model.parameters()).device
    for example in examples:
        context, endings = list(example.question.context), [list(e) for e in example.question.endings]
        width = len(context) + max(map(len, endings))
        ids = torch.zeros(4, width, dtype=torch.long)
        scored = torch.zeros(4, width)
        for row, ending in enumerate(endings):
            ids[row, : len(context) + len(ending)] = torch.tensor(context + ending)
            scored[row, len(context) : len(context) + len(ending)] = 1
        ids, scored = ids.to(device), scored.to(device)[:, 1:]
        logits = model(ids).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none").view(4, -1) * scored
        total = loss.sum(1)
        predictions.append((int(total.argmin()), int((total / scored.sum(1)).argmin())))
    return predictions


def ours(model: GPT, examples: list[Example]) -> list[tuple[int, int]]:
    """The same from the scorer, through the runner."""
    found: list[tuple[int, int]] = []

    class Predictions(type(TASKS["hellaswag"])):  # type: ignore[misc]
        def result(self, row, answer):
            totals = [ending.total for ending in answer]
            means = [ending.total / len(ending.log_p) for ending in answer]
            found.append((totals.index(max(totals)), means.index(max(means))))
            return super().result(row, answer)

    runner.run(model, Predictions(), examples)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--file", required=True, help="HellaSwag's JSON lines, or its cleaned text")
    parser.add_argument("--model", default="", help="a model folder; default: the 124M architecture with random weights")
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--examples", type=int, default=100, help="examples a turn")
    parser.add_argument("--json", action="store_true")
    a = parser.parse_args()
    from transformers import AutoModelForCausalLM

    rt = runtime.start(RunConfig(device=a.device, precision=a.precision, compile="off"))
    with tempfile.TemporaryDirectory() as folder:
        path = a.model or folder
        if not a.model:
            weights.save_model(Path(folder), GPT(GPTConfig(), seed=1), Tokenizer.named("gpt2"))
        model = weights.load_model(path, rt.device, rt.dtype)
        theirs = AutoModelForCausalLM.from_pretrained(path, dtype=rt.dtype).to(rt.device).eval()
    task = "hellaswag" if a.file.endswith(".jsonl") else "hellaswag_harness"
    examples = TASKS[task].examples(Path(a.file), Tokenizer.named("gpt2"), model.config.n_positions)
    runner.compile_blocks(model, examples)  # as `anew evaluate` does for as many
    ours(model, examples[:: len(examples) // 64])
    loop(theirs, examples[:8])
    rates: list[tuple[float, float]] = []
    agree = total = 0
    for i in range(a.rounds):
        part = examples[i :: len(examples) // a.examples][: a.examples]  # the file begins with its short half
        began = time.perf_counter()
        mine = ours(model, part)
        middle = time.perf_counter()
        other = loop(theirs, part)
        end = time.perf_counter()
        rates.append((len(part) / (middle - began), len(part) / (end - middle)))
        agree, total = agree + sum(x == y for x, y in zip(mine, other, strict=True)), total + len(part)
        fast, slow = rates[-1]
        print(f"turn {i + 1}: {fast:6.1f} a second, the loop {slow:5.1f}, ratio {fast / slow:.2f}")
    ratios = sorted(x / y for x, y in rates)
    summary = {
        "examples_per_second": statistics.median(x for x, _ in rates),
        "loop_examples_per_second": statistics.median(y for _, y in rates),
        "ratio": statistics.median(ratios),
        "ratio_spread": [ratios[0], ratios[-1]],
        "predictions_that_agree": [agree, total],
    }
    print(
        f"{a.precision}, {rt.device}: {summary['examples_per_second']:.1f} against {summary['loop_examples_per_second']:.1f} a second,"
        f" ratio {summary['ratio']:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}); {agree} of {total} predictions agree"
    )
    if a.json:
        print(json.dumps(summary))


if __name__ == "__main__":
    main()
