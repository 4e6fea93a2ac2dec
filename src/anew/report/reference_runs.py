"""What others' runs looked like, and where a run that is like them will end.

Losses are on each run's own validation text: FineWeb-Edu's, FineWeb's and OpenWebText's do not compare with each other. So another run's
curve is context on a page, never the same measurement.
"""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from anew.config.schema import Config
from anew.evaluate.published import FIGURES, size_of

TOKENS_A_STEP = 524_288
HORIZON = 19_072 * TOKENS_A_STEP  # 10B tokens, where the runs of build-nanogpt's recipe end
Points = list[tuple[float, float]]  # tokens, value


@dataclass(frozen=True)
class Curve:
    """Some dozen points of a public training log. `is_gpt2`: GPT-2's own architecture, 124M."""

    name: str
    source: str
    data: str
    is_gpt2: bool
    step_text: str
    loss_text: str
    hellaswag_text: str = ""

    def _points(self, values: str) -> Points:
        return [
            (int(s) * TOKENS_A_STEP, float(v))
            for s, v in zip(self.step_text.split(), values.split(), strict=True)
        ]

    @property
    def losses(self) -> Points:
        """Validation loss in nats a token."""
        return self._points(self.loss_text)

    @property
    def hellaswag(self) -> Points:
        """HellaSwag acc_norm on raw text; empty where it was not logged."""
        return self._points(self.hellaswag_text) if self.hellaswag_text else []


CURVES = (
    Curve(
        "build-nanogpt on 2 x H100", "csabapalfi/build-nanogpt", "FineWeb-Edu", True,
        ("0 250 500 750 1000 1250 1500 2000 2500 3000 4000 5000 6000 7000 8000 9000 10000 11000 12000 13000 14000 15000 16000 17000 18000 "
            "19000 19072"),
        ("10.9512 6.1760 5.2980 4.5767 4.1544 3.9544 3.8140 3.6690 3.5744 3.5023 3.4153 3.3528 3.3106 3.2689 3.2380 3.2161 3.1896 3.1689 "
            "3.1479 3.1327 3.1188 3.1072 3.0963 3.0897 3.0820 3.0743 3.0717"),
        ("0.2482 0.2439 0.2409 0.2502 0.2574 0.2528 0.2582 0.2593 0.2655 0.2716 0.2736 0.2758 0.2805 0.2866 0.2896 0.2913 0.2939 0.2912 "
            "0.2957 0.3003 0.3032 0.2995 0.3034 0.3049 0.3068 0.3073 0.3074"),
    ),
    Curve(
        "build-nanogpt, a second run", "logbob0401/build-nanogpt", "FineWeb-Edu", True,
        ("0 250 500 750 1000 1250 1500 2000 2500 3000 4000 5000 6000 7000 8000 9000 10000 11000 12000 13000 14000 15000 16000 17000 18000 "
            "19000 19072"),
        ("10.9514 6.1443 5.2742 4.5774 4.1372 3.9230 3.7933 3.6464 3.5548 3.4793 3.3915 3.3349 3.2920 3.2491 3.2220 3.1912 3.1755 3.1477 "
            "3.1297 3.1105 3.0960 3.0860 3.0752 3.0664 3.0611 3.0521 3.0526"),
        ("0.2490 0.2438 0.2382 0.2462 0.2566 0.2539 0.2547 0.2614 0.2664 0.2710 0.2746 0.2769 0.2779 0.2871 0.2884 0.2898 0.2917 0.2906 "
            "0.2969 0.3008 0.3000 0.2979 0.2995 0.3022 0.3045 0.3051 0.3022"),
    ),
    Curve(
        "build-nanogpt, learning rate 1.2e-3", "ashegde/build-nanoGPT", "FineWeb-Edu", True,
        ("0 250 500 750 1000 1250 1500 2000 2500 3000 4000 5000 6000 7000 8000 9000 10000 11000 12000 13000 14000 15000 16000 17000 18000 "
            "19000 19072"),
        ("10.9512 5.9326 4.9877 4.3200 3.9906 3.8363 3.7184 3.5935 3.5179 3.4556 3.3829 3.3261 3.2884 3.2525 3.2234 3.2014 3.1772 3.1564 "
            "3.1332 3.1170 3.1012 3.0870 3.0745 3.0655 3.0573 3.0476 3.0447"),
    ),
    Curve(
        "llm.c on 8 x H100", "llm.c, in KellerJordan/modded-nanogpt records", "FineWeb", True,
        ("0 250 500 750 1000 1250 1500 2000 2500 3000 4000 5000 6000 7000 8000 9000 10000 11000 12000 13000 14000 15000 16000 17000 18000 "
            "19000 19560"),
        ("11.0092 6.1710 5.3743 4.7097 4.3170 4.1296 4.0060 3.8585 3.7652 3.6973 3.6176 3.5535 3.5069 3.4726 3.4431 3.4159 3.3924 3.3706 "
            "3.3509 3.3305 3.3149 3.3003 3.2882 3.2803 3.2746 3.2724 3.2722"),
    ),
    Curve(
        "tuned AdamW, rotary positions", "KellerJordan/modded-nanogpt records", "FineWeb", False,
        "0 256 512 768 1024 1280 1536 2048 2560 2944 3968 4992 6016 7040 7936 8960 9536",
        "10.9689 5.2311 4.3293 4.0551 3.9050 3.8163 3.7645 3.6842 3.6128 3.5875 3.5365 3.4898 3.4801 3.4462 3.4107 3.3165 3.2760",
    ),
    Curve(
        "Muon, rotary positions", "KellerJordan/modded-nanogpt records", "FineWeb", False,
        "0 250 500 750 1000 1250 1500 2000 2500 3000 4000 4500 5000 5500 6000 6200",
        "10.9264 4.5819 4.0168 3.8448 3.7447 3.6795 3.6302 3.5608 3.5171 3.4817 3.4313 3.4092 3.3608 3.3200 3.2859 3.2785",
    ),
)  # fmt: skip

# OpenAI's GPT-2 124M on validation text of each kind, as others measured it on theirs.
BASELINES = {
    "FineWeb-Edu": (3.2924, "build-nanogpt's notebook"),
    "FineWeb": (3.4250, "llm.c"),
    "OpenWebText": (3.12, "nanoGPT's README"),
}
HELLASWAG = {
    "GPT-2 124M": (0.2955, "build-nanogpt hellaswag.py"),
    "GPT-3 124M": (0.337, "Brown et al. 2020, table H.1"),
}


def data_of(config: Config) -> str:
    """Which of the texts above a run reads, by its name or by what its folder says it was made from; empty for any other."""
    text = config.data.data
    with contextlib.suppress(OSError, ValueError, KeyError):
        text += str(json.loads((Path(text) / "index.json").read_text(encoding="utf-8"))["source"])
    found = [name for name in BASELINES if name.lower() in text.lower()]
    return max(found, key=len, default="")


def hellaswag_levels(size: str | None) -> list[tuple[str, float]]:
    """GPT-2 of this size where it was published; the smallest GPT-2 and GPT-3 for a shape that OpenAI did not release."""
    if size in (None, "124M"):
        return [(name, value) for name, (value, _) in HELLASWAG.items()]
    [published] = [f for f in FIGURES if (f.task, f.figure) == ("hellaswag", "acc_norm")]
    return [(f"GPT-2 {size}", published.values[size])] if size in published.values else []


def at(points: Points, x: float) -> float:
    """The value at `x`, linear between points, level outside."""
    before, after = [p for p in points if p[0] <= x], [p for p in points if p[0] >= x]
    if not before or not after:
        return (before or after)[-1 if before else 0][1]
    (x0, y0), (x1, y1) = before[-1], after[0]
    return y0 if x1 == x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)


@dataclass(frozen=True)
class Projection:
    """A value at the horizon, and how far it may be off: the largest error of the same method on the reference runs themselves."""

    value: float
    plus_minus: float


def is_like_them(config: Config) -> bool:
    """GPT-2 124M over about 10B tokens: then the shape of their curves is the shape of this one."""
    return size_of(config.model) == "124M" and 0.9 < config.total_tokens / HORIZON < 1.1


def project(losses: Points) -> Projection | None:
    """The validation loss at 10B tokens, from a part of such a run: each reference curve, moved up or down to where this one is.

    A power law through the same points is off by 0.05 to 0.2 up to the middle of a run, since the falling learning rate bends the curve
    (docs/log.md, 11). None before 5% of the run, or from fewer than three points.
    """
    own = [(x, y) for x, y in losses if x > 0]
    if not own or own[-1][0] < 0.05 * HORIZON:
        return None
    end = own[-1][0]
    references = [curve.losses for curve in CURVES if curve.is_gpt2]
    found = _moved(own, references, end)
    if found is None:
        return None
    errors = [0.005]
    for i, curve in enumerate(references):
        guess = _moved([p for p in curve if p[0] <= end], references[:i] + references[i + 1 :], end)
        errors += [abs(guess - at(curve, HORIZON))] if guess is not None else []
    return Projection(found, max(errors))


def _moved(own: Points, references: Sequence[Points], end: float) -> float | None:
    recent = [p for p in own if p[0] > 0.7 * end]
    if len(recent) < 2 or len(own) < 3:
        return None
    return mean(
        at(curve, HORIZON) + mean(y - at(curve, x) for x, y in recent) for curve in references
    )


def project_hellaswag(accuracies: Points, losses: Points, loss: Projection) -> Projection | None:
    """HellaSwag's acc_norm at 10B tokens, from the projected loss: in the reference runs it is a straight line in the loss."""
    if not accuracies:
        return None
    pairs = [(at(c.losses, x), y) for c in CURVES for x, y in c.hellaswag if at(c.losses, x) < 4]
    mx, my = mean(x for x, _ in pairs), mean(y for _, y in pairs)
    slope = sum((x - mx) * (y - my) for x, y in pairs) / sum((x - mx) ** 2 for x, _ in pairs)
    worst = max(abs(y - my - slope * (x - mx)) for x, y in pairs)
    recent = accuracies[-max(1, len(accuracies) // 3) :]
    moved = mean(y - my - slope * (at(losses, x) - mx) for x, y in recent)
    chance = (0.3 * 0.7 / 10_042) ** 0.5  # one standard error of that many examples
    return Projection(
        my + slope * (loss.value - mx) + moved, worst + abs(slope) * loss.plus_minus + chance
    )
