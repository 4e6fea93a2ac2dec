"""Verdicts on published figures."""

import pytest

from anew import GPTConfig
from anew.evaluate.published import compare, size_of


@pytest.mark.guarantee("evidence")
@pytest.mark.parametrize(
    ("ours", "verdict"), [(0.2955, "PASS"), (0.2870, "PASS"), (0.2850, "FAIL"), (0.4, "PASS")]
)
def test_accuracy_passes_within_two_standard_errors_or_above(ours: float, verdict: str) -> None:
    [found] = compare("hellaswag", {"acc_norm": ours}, "124M", 10042, whole=True)
    assert found.verdict == verdict
    [part] = compare("hellaswag", {"acc_norm": ours}, "124M", 300, whole=False)
    assert part.verdict == ""


@pytest.mark.parametrize(
    ("ours", "verdict"), [(20.0, "PASS"), (37.5, "PASS"), (38.5, "PASS"), (38.7, "FAIL")]
)
def test_perplexity_passes_within_its_tolerance_or_below(ours: float, verdict: str) -> None:
    found = compare("wikitext103", {"word_perplexity": ours}, "124M", 60, whole=True)
    assert found[0].verdict == verdict


def test_size_is_known_for_released_shapes_only() -> None:
    assert size_of(GPTConfig()) == "124M"
    assert size_of(GPTConfig(n_layer=3)) is None
