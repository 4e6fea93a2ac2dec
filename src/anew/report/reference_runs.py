"""Public GPT-2 training runs, for context on a page and to project where a similar run will end.

    curve = CURVES[0]
    print(curve.source, curve.losses[-1])       # (tokens, validation loss in nats a token)
    projection = project(run.points("val/loss"))

CURVES has some dozen points of each training log, with the repository that published it. BASELINES
and HELLASWAG are figures of OpenAI's models, as their sources measured them. Each loss is on the
run's own validation text, and FineWeb-Edu's, FineWeb's and OpenWebText's do not compare with each
other. A curve is therefore context on a page and never the same measurement.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import linear_regression, mean

import numpy as np

from anew.config.config import Config
from anew.evaluate.published import FIGURES, size_of
from anew.report.svg import Points
from anew.utils.files import parse_json

TOKENS_A_STEP = 524_288  # in all runs below
HORIZON = 19_072 * TOKENS_A_STEP  # 10B tokens, the length of build-nanogpt's runs


@dataclass(frozen=True)
class Curve:
    """Points of a public training log, as text: steps, and the values at these steps."""

    name: str
    source: str  # the repository that published the log
    data: str
    is_gpt2: bool  # whether it has GPT-2's own architecture, 124M
    step_text: str
    loss_text: str
    hellaswag_text: str = ""

    def _points(self, value_text: str) -> Points:
        pairs = zip(self.step_text.split(), value_text.split(), strict=True)
        return [(int(step) * TOKENS_A_STEP, float(value)) for step, value in pairs]

    @property
    def losses(self) -> Points:
        """(tokens, validation loss in nats a token)."""
        return self._points(self.loss_text)

    @property
    def hellaswag(self) -> Points:
        """(tokens, HellaSwag acc_norm on raw text); empty where it was not logged."""
        return self._points(self.hellaswag_text) if self.hellaswag_text else []


STEPS = """
    0 250 500 750 1000 1250 1500 2000 2500 3000 4000 5000 6000 7000 8000 9000 10000 11000 12000
    13000 14000 15000 16000 17000 18000 19000
"""
CURVES = (
    Curve(
        name="build-nanogpt on 2 x H100",
        source="csabapalfi/build-nanogpt",
        data="FineWeb-Edu",
        is_gpt2=True,
        step_text=f"{STEPS} 19072",
        loss_text="""
            10.9512 6.1760 5.2980 4.5767 4.1544 3.9544 3.8140 3.6690 3.5744 3.5023 3.4153 3.3528
            3.3106 3.2689 3.2380 3.2161 3.1896 3.1689 3.1479 3.1327 3.1188 3.1072 3.0963 3.0897
            3.0820 3.0743 3.0717
        """,
        hellaswag_text="""
            0.2482 0.2439 0.2409 0.2502 0.2574 0.2528 0.2582 0.2593 0.2655 0.2716 0.2736 0.2758
            0.2805 0.2866 0.2896 0.2913 0.2939 0.2912 0.2957 0.3003 0.3032 0.2995 0.3034 0.3049
            0.3068 0.3073 0.3074
        """,
    ),
    Curve(
        name="build-nanogpt, a second run",
        source="logbob0401/build-nanogpt",
        data="FineWeb-Edu",
        is_gpt2=True,
        step_text=f"{STEPS} 19072",
        loss_text="""
            10.9514 6.1443 5.2742 4.5774 4.1372 3.9230 3.7933 3.6464 3.5548 3.4793 3.3915 3.3349
            3.2920 3.2491 3.2220 3.1912 3.1755 3.1477 3.1297 3.1105 3.0960 3.0860 3.0752 3.0664
            3.0611 3.0521 3.0526
        """,
        hellaswag_text="""
            0.2490 0.2438 0.2382 0.2462 0.2566 0.2539 0.2547 0.2614 0.2664 0.2710 0.2746 0.2769
            0.2779 0.2871 0.2884 0.2898 0.2917 0.2906 0.2969 0.3008 0.3000 0.2979 0.2995 0.3022
            0.3045 0.3051 0.3022
        """,
    ),
    Curve(
        name="build-nanogpt, learning rate 1.2e-3",
        source="ashegde/build-nanoGPT",
        data="FineWeb-Edu",
        is_gpt2=True,
        step_text=f"{STEPS} 19072",
        loss_text="""
            10.9512 5.9326 4.9877 4.3200 3.9906 3.8363 3.7184 3.5935 3.5179 3.4556 3.3829 3.3261
            3.2884 3.2525 3.2234 3.2014 3.1772 3.1564 3.1332 3.1170 3.1012 3.0870 3.0745 3.0655
            3.0573 3.0476 3.0447
        """,
    ),
    Curve(
        name="llm.c on 8 x H100",
        source="llm.c, in KellerJordan/modded-nanogpt records",
        data="FineWeb",
        is_gpt2=True,
        step_text=f"{STEPS} 19560",
        loss_text="""
            11.0092 6.1710 5.3743 4.7097 4.3170 4.1296 4.0060 3.8585 3.7652 3.6973 3.6176 3.5535
            3.5069 3.4726 3.4431 3.4159 3.3924 3.3706 3.3509 3.3305 3.3149 3.3003 3.2882 3.2803
            3.2746 3.2724 3.2722
        """,
    ),
    Curve(
        name="tuned AdamW, rotary positions",
        source="KellerJordan/modded-nanogpt records",
        data="FineWeb",
        is_gpt2=False,
        step_text="0 256 512 768 1024 1280 1536 2048 2560 2944 3968 4992 6016 7040 7936 8960 9536",
        loss_text="""
            10.9689 5.2311 4.3293 4.0551 3.9050 3.8163 3.7645 3.6842 3.6128 3.5875 3.5365 3.4898
            3.4801 3.4462 3.4107 3.3165 3.2760
        """,
    ),
    Curve(
        name="Muon, rotary positions",
        source="KellerJordan/modded-nanogpt records",
        data="FineWeb",
        is_gpt2=False,
        step_text="0 250 500 750 1000 1250 1500 2000 2500 3000 4000 4500 5000 5500 6000 6200",
        loss_text="""
            10.9264 4.5819 4.0168 3.8448 3.7447 3.6795 3.6302 3.5608 3.5171 3.4817 3.4313 3.4092
            3.3608 3.3200 3.2859 3.2785
        """,
    ),
)

# OpenAI's GPT-2 124M on validation text of each kind: nats a token, and who measured it.
BASELINES = {
    "FineWeb-Edu": (3.2924, "build-nanogpt's notebook"),
    "FineWeb": (3.4250, "llm.c"),
    "OpenWebText": (3.12, "nanoGPT's README"),
}
# HellaSwag acc_norm on raw text, and the source.
HELLASWAG = {
    "GPT-2 124M": (0.2955, "build-nanogpt hellaswag.py"),
    "GPT-3 124M": (0.337, "Brown et al. 2020, table H.1"),
}
# Examples in HellaSwag's validation split.
HELLASWAG_EXAMPLES = 10_042


def data_of(config: Config) -> str:
    """Return the text of BASELINES that a run reads; empty for any other text.

    It is found in the name of the data, or in the source that the data folder was made from.
    """
    text = config.data.data
    with contextlib.suppress(OSError, ValueError, KeyError):
        index = parse_json(Path(text) / "index.json")
        text += str(index["source"])
    found = [name for name in BASELINES if name.lower() in text.lower()]
    return max(found, key=len, default="")


def hellaswag_levels(size: str | None) -> list[tuple[str, float]]:
    """Return (name, published HellaSwag acc_norm) for GPT-2 of a size; empty if it is unpublished.

    For a shape that OpenAI did not release (None) they are those of the smallest GPT-2 and GPT-3.
    """
    if size in (None, "124M"):
        return [(name, value) for name, (value, _) in HELLASWAG.items()]
    [published] = [f for f in FIGURES if (f.task, f.figure) == ("hellaswag", "acc_norm")]
    return [(f"GPT-2 {size}", published.values[size])] if size in published.values else []


def at(points: Points, x: float) -> float:
    """Return the value at `x`, linear between points and constant outside."""
    x_values, y_values = zip(*points, strict=True)
    return float(np.interp(x, x_values, y_values))


@dataclass(frozen=True)
class Projection:
    """A value at the horizon, and the largest error of the same method on the reference runs."""

    value: float
    plus_minus: float


def is_like_them(config: Config) -> bool:
    """Return whether a run is GPT-2 124M over about 10B tokens, as the reference runs are."""
    return size_of(config.model) == "124M" and 0.9 < config.total_tokens / HORIZON < 1.1


def project(losses: Points) -> Projection | None:
    """Project the validation loss at 10B tokens from the first part of a run.

    Each reference curve is shifted up or down to where this run is, and the ends are averaged. A
    power law through the same points is off by 0.05 to 0.2 up to the middle of a run, because the
    falling learning rate bends the curve (docs/log.md, 11). Returns None before 5% of the run, or
    for fewer than three points.
    """
    own = [(x, y) for x, y in losses if x > 0]
    if not own or own[-1][0] < 0.05 * HORIZON:
        return None
    end = own[-1][0]
    references = [curve.losses for curve in CURVES if curve.is_gpt2]
    value = _shifted_end(own, references, end)
    if value is None:
        return None
    errors = [0.005]
    for i, curve in enumerate(references):
        others = references[:i] + references[i + 1 :]
        first_part = [point for point in curve if point[0] <= end]
        guess = _shifted_end(first_part, others, end)
        if guess is not None:
            errors.append(abs(guess - at(curve, HORIZON)))
    return Projection(value, max(errors))


def _shifted_end(own: Points, references: Sequence[Points], end: float) -> float | None:
    """Return the mean value at the horizon of the references, shifted to the last 30% of `own`."""
    recent = [point for point in own if point[0] > 0.7 * end]
    if len(recent) < 2 or len(own) < 3:
        return None
    ends = []
    for curve in references:
        shift = mean(y - at(curve, x) for x, y in recent)
        ends.append(at(curve, HORIZON) + shift)
    return mean(ends)


def project_hellaswag(accuracies: Points, losses: Points, loss: Projection) -> Projection | None:
    """Project HellaSwag's acc_norm at 10B tokens from the projected loss.

    In the reference runs the accuracy is a linear function of the loss below a loss of 4.
    """
    if not accuracies:
        return None
    pairs = [(at(curve.losses, x), y) for curve in CURVES for x, y in curve.hellaswag]
    pairs = [(x, y) for x, y in pairs if x < 4]
    reference_losses, reference_accuracies = zip(*pairs, strict=True)
    slope, intercept = linear_regression(reference_losses, reference_accuracies)

    def fitted(x: float) -> float:
        return slope * x + intercept

    worst = max(abs(y - fitted(x)) for x, y in pairs)
    recent = accuracies[-max(1, len(accuracies) // 3) :]
    shift = mean(y - fitted(at(losses, x)) for x, y in recent)
    standard_error = (0.3 * 0.7 / HELLASWAG_EXAMPLES) ** 0.5
    plus_minus = worst + abs(slope) * loss.plus_minus + standard_error
    return Projection(fitted(loss.value) + shift, plus_minus)
