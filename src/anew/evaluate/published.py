"""What others measured for OpenAI's GPT-2, each figure with its source and what it takes to stand beside it.

Two figures of one name need not be one measurement: HellaSwag's 0.2955 and 0.3114 are the same model on the same rows, scored on raw text
by mean token loss and on cleaned text by loss a character. So each entry names the protocol, and a verdict is given only where somebody
outside OpenAI has reproduced the figure with it; the rest is context.
"""

import math
from dataclasses import dataclass

from anew.config.schema import GPTConfig

SIZES = {(12, 768): "124M", (24, 1024): "355M", (36, 1280): "774M", (48, 1600): "1558M"}
PAPER = "Radford et al. 2019, table 3"
BUILD_NANOGPT = "karpathy/build-nanogpt hellaswag.py"


@dataclass(frozen=True)
class Published:
    """One figure of a task for some sizes of GPT-2. `tolerance` None: no verdict, for the reason in `note`."""

    task: str
    figure: str
    values: dict[str, float]
    source: str
    tolerance: (
        str | None
    )  # "3%" of the value, or "2se": two standard errors of a share of n examples
    note: str = ""
    judged: tuple[str, ...] = tuple(
        SIZES.values()
    )  # sizes that get a verdict: those for which others found the figure too

    @property
    def higher_is_better(self) -> bool:
        """Shares are; perplexities and bits are not."""
        return "acc" in self.figure


def _sizes(*values: float) -> dict[str, float]:
    return dict(zip(SIZES.values(), values, strict=True))


FIGURES = (
    Published("hellaswag", "acc", {"124M": 0.2859, "1558M": 0.3842}, BUILD_NANOGPT, "2se"),
    Published("hellaswag", "acc_norm", {"124M": 0.2955, "1558M": 0.4893}, BUILD_NANOGPT, "2se"),
    Published("hellaswag_harness", "acc", {"124M": 0.2892, "1558M": 0.4004}, f"lm-evaluation-harness, in {BUILD_NANOGPT}", "2se"),
    Published("hellaswag_harness", "acc_norm", {"124M": 0.3114, "1558M": 0.5089}, f"lm-evaluation-harness, in {BUILD_NANOGPT}", "2se"),
    Published("lambada", "acc", {"124M": 0.3256}, "lm-evaluation-harness issue 2159", "2se", "the whole last word"),
    Published("lambada", "perplexity", {"124M": 40.06, "1558M": 10.63}, "lm-evaluation-harness issues 2159, 911", "3%", "last word"),
    Published(
        "lambada", "last_token_acc", _sizes(0.4599, 0.5548, 0.6012, 0.6324), PAPER, "2se",
        "the last token only: 0.4667 in huggingface/transformers issue 13761", ("124M",),
    ),
    Published("lambada", "last_token_perplexity", _sizes(35.13, 15.60, 10.87, 8.63), PAPER, None, "reproduced by nobody"),
    Published(
        "wikitext2", "token_perplexity", _sizes(29.41, 22.76, 19.93, 18.34), PAPER, None,
        "others get 29.94 on a text with more blank lines: huggingface/transformers issue 13761",
    ),
    Published(
        "wikitext103", "word_perplexity", _sizes(37.50, 26.37, 22.05, 17.48), PAPER, "3%",
        "de-tokenised, a word, articles apart: 37.37 in huggingface/transformers issue 13761", ("124M",),
    ),
)  # fmt: skip


def size_of(config: GPTConfig) -> str | None:
    """ "124M" for a model of GPT-2's smallest shape and so on; None for a shape OpenAI did not release."""
    return SIZES.get((config.n_layer, config.n_embd)) if config.vocab_size == 50257 else None


@dataclass(frozen=True)
class Comparison:
    """One of our figures beside the published one."""

    published: Published
    theirs: float
    ours: float
    allowed: float | None  # how much worse still passes

    @property
    def verdict(self) -> str:
        """PASS: not worse than theirs by more than the tolerance; better always passes."""
        if self.allowed is None:
            return ""
        worse = (
            self.theirs - self.ours if self.published.higher_is_better else self.ours - self.theirs
        )
        return "PASS" if worse <= self.allowed else "FAIL"


def compare(
    task: str, figures: dict[str, float], size: str | None, examples: int, whole: bool
) -> list[Comparison]:
    """Every published figure of `task` for a model of `size`, beside ours, which was measured on `examples` examples.

    Nothing passes or fails but `whole`, the published measurement: 300 of HellaSwag's examples cannot tell GPT-2 from random weights, and
    a loss in bf16 is not one in fp32.
    """
    found = []
    for published in FIGURES:
        if (
            published.task != task
            or published.figure not in figures
            or size not in published.values
        ):
            continue
        theirs, allowed = published.values[size], None
        if not whole or size not in published.judged:
            pass
        elif published.tolerance == "2se":
            allowed = 2 * math.sqrt(theirs * (1 - theirs) / examples)
        elif published.tolerance:
            allowed = theirs * float(published.tolerance.removesuffix("%")) / 100
        found.append(Comparison(published, theirs, figures[published.figure], allowed))
    return found
