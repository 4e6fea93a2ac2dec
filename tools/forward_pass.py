"""Write a moving picture of a model that writes: tokens, attention, predictions, the next token.

python tools/forward_pass.py MODEL docs/pictures/forward_pass.gif ["PROMPT"]

Each new token is shown in stages. In each block, a line from the last token to an earlier one is as
strong as the largest weight of any head; beside the block stand the tokens that would come next if
the model ended there (the logit lens). At the end the likeliest token is appended.
"""

import io
import sys
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image

import anew
from anew import Tokenizer
from anew.inference.interpret import Trace, logit_lens, trace_of
from anew.model.gpt import GPT

PROMPT = "    def __init__(self, "
NEW_TOKENS = 14
SHOWN = 4  # predictions beside each block
SIZE = (9.6, 4.2)  # inches
DPI = 80
COLOURS = 24
STAGE_MS, LAST_STAGE_MS = 260, 520
INK, SOFT, ACCENT, WARM = "#1d2430", "#98a2b3", "#1f5fbf", "#d97706"
LEFT, RIGHT = 0.02, 0.70  # of the tokens
SYMBOLS = {" ": "·", "\n": "↵", "\t": "⇥"}


def shown(text: str) -> str:
    """Return a token with visible white space, and a square for what cannot be printed."""
    letters = [SYMBOLS.get(letter, letter) for letter in text]
    return "".join(letter if letter.isprintable() else "□" for letter in letters)


def draw(
    axes: Any, model: GPT, tokenizer: Tokenizer, ids: list[int], room: int, trace: Trace, stage: int
) -> None:
    """Draw one frame: the tokens, with `room` for that many, and the first `stage` blocks."""
    labels = [tokenizer.decode([token]) for token in ids]
    n_layer = model.config.n_layer
    axes.clear()
    axes.set(xlim=(0, 1), ylim=(-0.6, n_layer + 1.0))
    axes.axis("off")
    step = (RIGHT - LEFT) / room
    places = [LEFT + step * (i + 0.5) for i in range(len(labels))]
    last = places[-1]
    for layer in range(n_layer + 1):
        is_done = layer <= stage
        for i, place in enumerate(places):
            is_last = i == len(labels) - 1
            colour = ACCENT if is_last and is_done else INK if layer == 0 else SOFT
            text = shown(labels[i]) if layer == 0 else "●" if is_last and is_done else "·"
            weight = "bold" if is_last else "normal"
            axes.text(place, layer, text, color=colour, ha="center", va="center", weight=weight)
        name = "tokens" if layer == 0 else f"block {layer - 1}"
        axes.text(0.715, layer, name, color=SOFT, va="center", fontsize=9)
        if not is_done:
            continue
        if layer > 0:
            strongest = trace.attention[layer - 1, :, -1].amax(0).tolist()  # over heads
            for place, share in zip(places, strongest, strict=True):
                if share > 0.03:
                    line = [place, last], [layer - 0.86, layer - 0.14]
                    axes.plot(*line, color=WARM, alpha=min(1.0, share), linewidth=1 + 2 * share)
        lens = logit_lens(model, trace.residual[layer, -1]).exp().topk(SHOWN)
        for rank, (token, p) in enumerate(zip(lens.indices.tolist(), lens.values, strict=True)):
            x = 0.81 + 0.05 * rank
            axes.add_patch(plt.Rectangle((x - 0.02, layer - 0.25), 0.04, 0.5 * p, color=WARM))
            axes.text(
                x,
                layer + 0.42,
                shown(tokenizer.decode([token])),
                color=INK,
                ha="center",
                va="center",
            )
    axes.text(0.715, n_layer + 0.62, "what would come next", color=SOFT, fontsize=9)
    axes.text(LEFT, n_layer + 0.62, "a GPT-2 writes: each block looks back", color=INK, fontsize=11)


def main(path: str, output: str, prompt: str = PROMPT) -> None:
    """Write the picture."""
    model = anew.load(path).eval()
    tokenizer = Tokenizer.from_pretrained(path)
    ids = tokenizer.encode(prompt)
    room = len(ids) + NEW_TOKENS
    plt.rcParams["font.family"] = "DejaVu Sans Mono"
    figure, axes = plt.subplots(figsize=SIZE)
    figure.subplots_adjust(0, 0, 1, 1)
    frames, times = [], []
    for _ in range(NEW_TOKENS):
        trace = trace_of(model, ids)
        for stage in range(model.config.n_layer + 1):
            draw(axes, model, tokenizer, ids, room, trace, stage)
            file = io.BytesIO()
            figure.savefig(file, dpi=DPI, format="png")
            frames.append(Image.open(file).convert("RGB").quantize(COLOURS))
            times.append(LAST_STAGE_MS if stage == model.config.n_layer else STAGE_MS)
        ids.append(int(logit_lens(model, trace.residual[-1, -1]).argmax()))
    frames[0].save(
        output, save_all=True, append_images=frames[1:], duration=times, loop=0, optimize=True
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
