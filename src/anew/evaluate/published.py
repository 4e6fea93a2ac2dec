"""Published figures of OpenAI's GPT-2, each with its source and the rule for a verdict.

    compare("hellaswag", {"acc_norm": 0.2955}, size="124M", examples=10042, whole=True)[0].verdict

Two figures with the same name may come from different measurements: HellaSwag's 0.2955 and 0.3114
are the same model on the same examples, scored on raw text by mean loss per token and on cleaned
text by loss per character. So each entry names its protocol, and only a figure that somebody
outside OpenAI has reproduced with this protocol gives a verdict. The other figures are context.
"""

import math
from dataclasses import dataclass

from anew.config.schema import GPTConfig

GPT2_VOCABULARY = 50257
SIZES = {(12, 768): "124M", (24, 1024): "355M", (36, 1280): "774M", (48, 1600): "1558M"}
PAPER = "Radford et al. 2019, table 3"
BUILD_NANOGPT = "karpathy/build-nanogpt hellaswag.py"
HARNESS_HELLASWAG = f"lm-evaluation-harness, in {BUILD_NANOGPT}"
NANOCHAT = "karpathy/nanochat dev/estimate_gpt3_core.ipynb"
TWO_STANDARD_ERRORS = "2se"  # of a share of the examples
TWO_MEASURED_ERRORS = "2se as measured"  # of a mean whose standard error is a figure of the task


@dataclass(frozen=True)
class Published:
    """One figure of a task, for some sizes of GPT-2."""

    task: str
    figure: str
    values: dict[str, float]  # by size
    source: str
    tolerance: str | None  # "3%" of the value, TWO_..._ERRORS, or None: no verdict
    note: str = ""
    judged: tuple[str, ...] = tuple(SIZES.values())  # sizes with a verdict: others reproduced them
    examples: int = 0  # a verdict needs exactly as many; 0: the task knows whether it is whole

    @property
    def higher_is_better(self) -> bool:
        """Return whether a higher value is better: true for accuracies, false for perplexities."""
        return "acc" in self.figure


def _all_sizes(*values: float) -> dict[str, float]:
    return dict(zip(SIZES.values(), values, strict=True))


def _core_task(label: str, *values: float) -> Published:
    """Return the centered accuracies of a task of CORE, which are context for the mean."""
    return Published("core", label, _all_sizes(*values), source=NANOCHAT, tolerance=None)


FIGURES = (
    Published(
        "hellaswag",
        "acc",
        {"124M": 0.2859, "1558M": 0.3842},
        source=BUILD_NANOGPT,
        tolerance=TWO_STANDARD_ERRORS,
    ),
    Published(
        "hellaswag",
        "acc_norm",
        {"124M": 0.2955, "1558M": 0.4893},
        source=BUILD_NANOGPT,
        tolerance=TWO_STANDARD_ERRORS,
    ),
    Published(
        "hellaswag_harness",
        "acc",
        {"124M": 0.2892, "1558M": 0.4004},
        source=HARNESS_HELLASWAG,
        tolerance=TWO_STANDARD_ERRORS,
    ),
    Published(
        "hellaswag_harness",
        "acc_norm",
        {"124M": 0.3114, "1558M": 0.5089},
        source=HARNESS_HELLASWAG,
        tolerance=TWO_STANDARD_ERRORS,
    ),
    Published(
        "lambada",
        "acc",
        {"124M": 0.3256},
        source="lm-evaluation-harness issue 2159",
        tolerance=TWO_STANDARD_ERRORS,
        note="the whole last word",
    ),
    Published(
        "lambada",
        "perplexity",
        {"124M": 40.06, "1558M": 10.63},
        source="lm-evaluation-harness issues 2159, 911",
        tolerance="3%",
        note="last word",
    ),
    Published(
        "lambada",
        "last_token_acc",
        _all_sizes(0.4599, 0.5548, 0.6012, 0.6324),
        source=PAPER,
        tolerance=TWO_STANDARD_ERRORS,
        note="the last token only: 0.4667 in huggingface/transformers issue 13761",
        judged=("124M",),
    ),
    Published(
        "lambada",
        "last_token_perplexity",
        _all_sizes(35.13, 15.60, 10.87, 8.63),
        source=PAPER,
        tolerance=None,
        note="nobody has reproduced it",
    ),
    Published(
        "wikitext2",
        "token_perplexity",
        _all_sizes(29.41, 22.76, 19.93, 18.34),
        source=PAPER,
        tolerance=None,
        note="others get 29.94 on a text with more blank lines: "
        "huggingface/transformers issue 13761",
    ),
    Published(
        "wikitext103",
        "word_perplexity",
        _all_sizes(37.50, 26.37, 22.05, 17.48),
        source=PAPER,
        tolerance="3%",
        note="de-tokenised, per word, articles separate: "
        "37.37 in huggingface/transformers issue 13761",
        judged=("124M",),
    ),
    Published(
        "core",
        "centered_acc",
        _all_sizes(0.1139, 0.1849, 0.2146, 0.2565),
        source=NANOCHAT,
        tolerance=TWO_MEASURED_ERRORS,
        examples=91037,
        note="others measured 0.1084 (nanochat issue 772) and 0.1216 (SammyTourani/road-to-52) "
        "for 124M",
    ),
    _core_task("hellaswag_zeroshot", 0.0780, 0.1867, 0.2533, 0.3360),
    _core_task("lambada_openai", 0.3229, 0.4260, 0.4880, 0.5230),
    _core_task("hellaswag", 0.0772, 0.1933, 0.2587, 0.3493),
    _core_task("piqa", 0.2459, 0.3400, 0.3960, 0.4500),
    _core_task("arc_easy", 0.2166, 0.3067, 0.3800, 0.4600),
    _core_task("arc_challenge", -0.0375, 0.0160, 0.0187, 0.0653),
)


def size_of(config: GPTConfig) -> str | None:
    """Return which of GPT-2's released sizes a model has, such as "124M", or None."""
    if config.vocab_size != GPT2_VOCABULARY:
        return None
    return SIZES.get((config.n_layer, config.n_embd))


def published_value(task: str, figure: str, size: str) -> float | None:
    """Return the published value of a figure for a size of GPT-2, or None."""
    for published in FIGURES:
        if (published.task, published.figure) == (task, figure):
            return published.values.get(size)
    return None


@dataclass(frozen=True)
class Comparison:
    """A measured figure beside the published one."""

    published: Published
    theirs: float
    ours: float
    allowed: float | None  # by how much `ours` may be worse and still pass; None: no verdict

    @property
    def verdict(self) -> str:
        """Return "PASS", "FAIL", or "" for no verdict. Better than published always passes."""
        if self.allowed is None:
            return ""
        worse_by = self.ours - self.theirs
        if self.published.higher_is_better:
            worse_by = self.theirs - self.ours
        return "PASS" if worse_by <= self.allowed else "FAIL"


def compare(
    task: str, figures: dict[str, float], size: str | None, examples: int, whole: bool
) -> list[Comparison]:
    """Compare figures of a task, measured on `examples` examples, with those published for `size`.

    Only a `whole` measurement gets verdicts, which means all published examples in fp32: 300
    examples of HellaSwag cannot distinguish GPT-2 from random weights, and bf16 changes the loss.
    """
    if size is None:
        return []
    found = []
    for published in FIGURES:
        is_measured = published.task == task and published.figure in figures
        if not is_measured or size not in published.values:
            continue
        allowed = None
        is_whole = whole and published.examples in (0, examples)
        if is_whole and size in published.judged:
            allowed = _tolerance(published, size, figures, examples)
        ours = figures[published.figure]
        found.append(Comparison(published, published.values[size], ours, allowed))
    return found


def _tolerance(
    published: Published, size: str, figures: dict[str, float], examples: int
) -> float | None:
    """Return by how much a figure measured on `examples` examples may be worse than `published`.

    `figures` are those measured.
    """
    value = published.values[size]
    if published.tolerance is None:
        return None
    if published.tolerance == TWO_STANDARD_ERRORS:
        return 2 * math.sqrt(value * (1 - value) / examples)
    if published.tolerance == TWO_MEASURED_ERRORS:
        return 2 * figures["standard_error"]
    return value * float(published.tolerance.removesuffix("%")) / 100
