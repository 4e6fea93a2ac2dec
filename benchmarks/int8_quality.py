"""What `--int8` costs: perplexity of a trained model on held-out text, decoded token by token as
sampling does, in bf16 and 8 bits.

    .venv/bin/python benchmarks/int8_quality.py runs/mine --tokens 20000

The text is the validation split of the run. Also how often the likeliest token is another one.
"""

import argparse
import math
from pathlib import Path

import torch

from anew import GPT, Tokenizer
from anew.checkpoint import huggingface as weights
from anew.config.config import Config
from anew.data.dataset import open_data
from anew.inference.cpu_decoder import CpuDecoder
from anew.inference.decoders import decoder_for
from anew.model.gpt import Cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("--tokens", type=int, default=20_000)
    a = parser.parse_args()
    config = Config.read(Path(a.run) / "config.json")
    model = GPT.from_pretrained(a.run).eval()
    model.compute_dtype = torch.bfloat16
    folder = weights.find_model(a.run)
    with open_data(config.data.data, Tokenizer.of_model(folder, model.config.vocab_size)) as data:
        text = torch.cat(
            [
                torch.from_numpy(shard.tokens[: a.tokens + 1].astype("int64"))
                for shard in data.splits["val"]
            ]
        )
    T = config.data.seq_len
    losses, choices = {}, {}
    for int8 in (False, True):
        decoder = decoder_for(model, 1, int8)
        assert isinstance(decoder, CpuDecoder), "it needs Linux and a C++ compiler"
        assert decoder.int8 == int8, "the width is not divisible by 32"
        total, likeliest, count = 0.0, [], 0
        for start in range(0, min(a.tokens, len(text) - 1) - T, T):
            cache = Cache.empty(model, 1, T)
            for i in range(T):
                log_p = decoder.step([int(text[start + i])], cache)[0].log_softmax(0)
                total -= log_p[text[start + i + 1]].item()
                likeliest.append(int(log_p.argmax()))
                count += 1
        losses[int8], choices[int8] = total / count, likeliest
        print(
            f"{'int8' if int8 else 'bf16'}: loss {losses[int8]:.4f}, perplexity "
            f"{math.exp(losses[int8]):.2f}, {count:,} tokens",
            flush=True,
        )
    same = sum(x == y for x, y in zip(choices[False], choices[True], strict=True)) / len(
        choices[True]
    )
    change = math.exp(losses[True] - losses[False]) - 1
    print(
        f"perplexity changes by {100 * change:+.2f}%; the likeliest token is the same for "
        f"{100 * same:.1f}%"
    )


if __name__ == "__main__":
    main()
