"""Measure how much 8-bit weights (`--int8`) change the perplexity of a trained model.

    .venv/bin/python benchmarks/int8_quality.py runs/mine --tokens 20000

The text is the validation split of the run. It is decoded token by token as in sampling, once with
bf16 weights and once with 8-bit weights. The script also prints how often both choose the same
likeliest token.
"""

import argparse
import math
from pathlib import Path

import torch

from anew import GPT, Tokenizer
from anew.checkpoint.huggingface import find
from anew.config.schema import Config
from anew.data.dataset import open_data
from anew.inference.decoders import Kernel, pack
from anew.model.kv_cache import Cache


def validation_text(config: Config, tokenizer: Tokenizer, count: int) -> torch.Tensor:
    """Return at least the first `count` + 1 tokens of the validation split, if it has as many."""
    with open_data(config.data.data, tokenizer) as data:
        shards = [shard.tokens[: count + 1].astype("int64") for shard in data.splits["val"]]
    return torch.cat([torch.from_numpy(shard) for shard in shards])


def decode(
    model: GPT, text: torch.Tensor, count: int, seq_len: int, int8: bool
) -> tuple[float, list[int]]:
    """Return the mean loss of the tokens in nats, and the likeliest token at each position.

    The text is cut into windows of `seq_len` tokens.
    """
    decoder = pack(model, 1, int8)
    assert isinstance(decoder, Kernel), "this machine has no C++ compiler or no bf16"
    total = 0.0
    likeliest = []
    for start in range(0, min(count, len(text) - 1) - seq_len, seq_len):
        cache = Cache.empty(model, 1, seq_len)
        for position in range(start, start + seq_len):
            [logits] = decoder.step([int(text[position])], cache)
            log_probabilities = logits.log_softmax(0)
            total -= log_probabilities[text[position + 1]].item()
            likeliest.append(int(log_probabilities.argmax()))
    return total / len(likeliest), likeliest


def main() -> None:
    """Decode the text with both kinds of weights, and print the differences."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("--tokens", type=int, default=20_000)
    arguments = parser.parse_args()
    config = Config.read(Path(arguments.run) / "config.json")
    model = GPT.from_pretrained(arguments.run).eval()
    model.compute_dtype = torch.bfloat16
    tokenizer = Tokenizer.of_model(find(arguments.run), model.config.vocab_size)
    text = validation_text(config, tokenizer, arguments.tokens)
    losses = {}
    choices = {}
    for name in ("bf16", "int8"):
        loss, likeliest = decode(
            model, text, arguments.tokens, config.data.seq_len, int8=name == "int8"
        )
        losses[name] = loss
        choices[name] = likeliest
        print(
            f"{name}: loss {loss:.4f}, perplexity {math.exp(loss):.2f}, {len(likeliest):,} tokens",
            flush=True,
        )
    pairs = list(zip(choices["bf16"], choices["int8"], strict=True))
    same = sum(first == second for first, second in pairs) / len(pairs)
    change = math.exp(losses["int8"] - losses["bf16"]) - 1
    print(
        f"perplexity changes by {100 * change:+.2f}%; "
        f"the likeliest token is the same for {100 * same:.1f}%"
    )


if __name__ == "__main__":
    main()
