"""The exercises of the lessons: each solution is right, and each known mistake is recognised."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jupytext
import pytest

from tests.support import ROOT

LESSONS = sorted((ROOT / "notebooks").glob("[0-9]*.py"))
SOLUTION = re.compile(r"<summary>Solution (\d+)</summary>\n\n```python\n(.*?)```", re.DOTALL)
PACKAGES = {*sys.stdlib_module_names, "anew", "numpy", "torch"}

# By lesson and exercise: wrong answers, and what the check says about each.
MISTAKES = {
    ("00_walkthrough", 1): [
        (
            "def n_parameters(L, C): return (2 * 50257 + 1024 + 2) * C + L * (12 * C * C + 13 * C)",
            "the head is counted",
        ),
        (
            "def n_parameters(L, C): return (50257 + 1024 + 2) * C + L * 12 * C * C",
            "biases and layer norms of each block are missing",
        ),
        ("def n_parameters(L, C): return 124_439_808", "GPT-2 XL"),
    ],
    ("00_walkthrough", 2): [
        (
            "share_of_embedding = 2 * 50257 * 768 / (124_439_808 + 50257 * 768)",
            "counts the table t",
        ),
        ("share_of_embedding = (50257 + 1024) * 768 / 124_439_808", "the position embedding too"),
        ("share_of_embedding = 0.9", "50,257 rows"),
    ],
    ("01_data", 1): [
        ("def n_sequences(n, T): return n // T", "has no next token"),
        ("def n_sequences(n, T): return n // (T + 1)", "neighbours share a token"),
        ("def n_sequences(n, T): return max(1, (n - 1) // T)", "10 tokens give 0 sequences"),
    ],
    ("01_data", 2): [
        (
            "def is_held_out(document): return hash(document) % 10 == 0",
            "another one in each process",
        ),
        (
            "def is_held_out(document):\n    import random\n    return random.random() < 0.1",
            "once held out and once not",
        ),
        ("def is_held_out(document): return document[-1] % 2 == 0", "not a tenth"),
        (
            "n = [0]\ndef is_held_out(document):\n    n[0] += 1\n    return n[0] % 10 == 0",
            "once held out and once not",
        ),
    ],
    ("02_attention", 1): [
        ("def causal_weights(q, k): return (q @ k.T / 4).softmax(-1)", "attends to later ones"),
        ("def causal_weights(q, k): return (q @ k.T / 4).softmax(-1).tril()", "do not sum to 1"),
        (
            "def causal_weights(q, k):\n    later = torch.ones(6, 6).triu(1).bool()\n"
            "    return (q @ k.T).masked_fill(later, -torch.inf).softmax(-1)",
            "not divided by the square root",
        ),
    ],
    ("02_attention", 2): [
        (
            "def window_mask(T, w):\n    row, column = torch.arange(T)[:, None], torch.arange(T)\n"
            "    return (column <= row) & (column >= row - w)",
            "one too wide",
        ),
        (
            "def window_mask(T, w):\n    row, column = torch.arange(T)[:, None], torch.arange(T)\n"
            "    return (column - row).abs() < w",
            "sees later ones",
        ),
        (
            "def window_mask(T, w):\n    row, column = torch.arange(T)[:, None], torch.arange(T)\n"
            "    return (column == row) | ((column < row) & (column < w - 1))",
            "or the wrong ones",
        ),
    ],
    ("03_loss", 1): [
        ("losses = (-math.log(0.4505), -math.log(0.2))", "the logarithm of the mean"),
        ("losses = (5.059, 2.322)", "these are bits"),
        ("losses = (1.0, 1.0)", "take -log"),
    ],
    ("03_loss", 2): [
        (
            "def unigram_loss(ids):\n    import collections\n"
            "    shares = [n / len(ids) for n in collections.Counter(ids).values()]\n"
            "    return -sum(share * math.log2(share) for share in shares)",
            "these are bits",
        ),
        (
            "def unigram_loss(ids):\n    import collections\n"
            "    shares = [n / len(ids) for n in collections.Counter(ids).values()]\n"
            "    return -sum(map(math.log, shares)) / len(shares)",
            "counts three times",
        ),
    ],
    ("04_transformer", 1): [
        (
            "def my_norm(x, weight, bias):\n    d = x - x.mean(-1, keepdim=True)\n"
            "    return d / (x.var(-1, keepdim=True) + 1e-5).sqrt() * weight + bias",
            "divides by n - 1",
        ),
        (
            "def my_norm(x, weight, bias):\n    d = x - x.mean(-1, keepdim=True)\n"
            "    return d / (x.std(-1, keepdim=True, unbiased=False) + 1e-5) * weight + bias",
            "under the root",
        ),
        (
            "def my_norm(x, weight, bias):\n"
            "    return x / ((x * x).mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias",
            "RMSNorm",
        ),
    ],
    ("04_transformer", 2): [
        ("def std_of_c_proj(n): return 0.02 / math.sqrt(n)", "add 24 times"),
        ("def std_of_c_proj(n): return 0.02 / (2 * n)", "square root"),
        ("def std_of_c_proj(n): return 0.02", "0.02000 for 12 blocks"),
        ("def std_of_c_proj(n): return 0.02 / math.sqrt(24)", "for 48 blocks"),
    ],
    ("05_training", 1): [
        (
            "def loss_of_batch(means, counts): return sum(means) / len(means)",
            "the mean of the means",
        ),
        ("def loss_of_batch(means, counts): return sum(means)", "this is the sum"),
    ],
    ("05_training", 2): [
        (
            "def clipped(gradients, most): return [g * min(1, most / g.norm()) for g in gradients]",
            "clipped by itself",
        ),
        (
            "def clipped(gradients, most):\n    norm = torch.cat(gradients).norm()\n"
            "    return [g * most / norm for g in gradients]",
            "a small gradient is made larger",
        ),
    ],
    ("06_logging", 1): [
        (
            "def smoothed(values, beta):\n    mean, result = 0.0, []\n    for value in values:\n"
            "        mean = beta * mean + (1 - beta) * value\n        result.append(mean)\n"
            "    return result",
            "begins near 0",
        ),
        (
            "def smoothed(values, beta):\n    mean, result = values[0], []\n"
            "    for value in values:\n        mean = beta * mean + (1 - beta) * value\n"
            "        result.append(mean)\n    return result",
            "beginning at the first value",
        ),
    ],
    ("06_logging", 2): [
        ("def mfu(rate, n, peak): return 2 * n * rate / peak", "the forward pass"),
        ("def mfu(rate, n, peak): return 600 * n * rate / peak", "in percent"),
    ],
    ("07_speed_ladder", 1): [
        ("seconds = 2 * 124.4e6 * 524_288 / 989e12", "the forward pass"),
        ("seconds = 396", "in milliseconds"),
        ("seconds = 3", "6 operations"),
    ],
    ("07_speed_ladder", 2): [
        ("speedup = 1.225", "1 / 0.775"),
        ("speedup = 4", "even without any attention"),
        ("speedup = 1.1", "its inverse"),
    ],
    ("08_inside", 1): [
        (
            "def kept(probabilities, p):\n    shares, order = probabilities.sort(descending=True)\n"
            "    return set(order[shares.cumsum(0) - shares <= p].tolist())",
            "nothing more is needed",
        ),
        (
            "def kept(probabilities, p):\n    shares, order = probabilities.sort(descending=True)\n"
            "    return set(order[shares.cumsum(0) <= p].tolist())",
            "the token that crosses p",
        ),
        (
            "def kept(probabilities, p):\n    before = probabilities.cumsum(0) - probabilities\n"
            "    return set((before < p).nonzero().flatten().tolist()) - {2, 3}",
            "sort by probability",
        ),
    ],
    ("08_inside", 2): [
        (
            "def induction_score(weights, P):\n    t = torch.arange(P, len(weights))\n"
            "    return weights[t, t - P + 1].max().item()",
            "no mean over the tokens",
        ),
        (
            "def induction_score(weights, P):\n    t = torch.arange(P, len(weights))\n"
            "    return weights[t, t - P].mean().item()",
            "the token itself, one period ago",
        ),
        (
            "def induction_score(weights, P):\n    t = torch.arange(P, len(weights))\n"
            "    return weights[t, t - P + 1].sum().item() / len(weights)",
            "leave it out of the mean",
        ),
    ],
    ("09_mistakes", 1): [
        ("def inputs_and_targets(ids): return ids[:-1], ids[:-1]", "learn to copy"),
        ("def inputs_and_targets(ids): return ids[1:], ids[:-1]", "write backwards"),
    ],
    ("09_mistakes", 2): [
        ("def sees_the_future(logits_of): return True", "accuses a model"),
        ("def sees_the_future(logits_of): return False", "looks at the whole text"),
        (
            "def sees_the_future(logits_of):\n    ids = torch.arange(8)\n    other = ids.clone()\n"
            "    other[4] = 200\n"
            "    return bool((logits_of(ids)[:3] != logits_of(other)[:3]).any())",
            "looks one token ahead",
        ),
    ],
    ("11_backpropagation", 1): [
        (
            "def gradient_of_logits(logits, target):\n    p = np.exp(logits - logits.max())\n"
            "    return p / p.sum()",
            "1 less",
        ),
        (
            "def gradient_of_logits(logits, target):\n    p = np.exp(logits - logits.max())\n"
            "    return np.eye(len(p))[target] - p / p.sum()",
            "the sign is turned",
        ),
        (
            "def gradient_of_logits(logits, target):\n"
            "    with np.errstate(all='ignore'):\n        p = np.exp(logits)\n"
            "        return p / p.sum() - np.eye(len(p))[target]",
            "too large for a float",
        ),
    ],
    ("11_backpropagation", 2): [
        ("def gradients(x, W, g): return g @ W.T, x.T @ g, g.mean(0)", "summed, not averaged"),
        ("def gradients(x, W, g): return g @ W.T, g.T @ x, g.sum(0)", "the shape (4, 3)"),
        ("def gradients(x, W, g): return 2 * g @ W.T, x.T @ g, g.sum(0)", "the gradient of x"),
    ],
    ("12_kv_cache", 1): [
        (
            "def cache_bytes(layers, width, tokens, size): return layers * width * tokens * size",
            "tw",
        ),
        (
            "def cache_bytes(n, width, tokens, size): return 24 * width * tokens * size * n",
            "the heads share n_embd",
        ),
    ],
    ("12_kv_cache", 2): [
        ("def tokens_read(p, n, cached): return p + n", "never read"),
        ("def tokens_read(p, n, cached): return p + n - 1", "10 + 11 + 12 = 33"),
        (
            "def tokens_read(p, n, cached): return p + 2 if cached else 33",
            "each token is read once",
        ),
    ],
    ("13_muon", 1): [
        (
            "def nearest_orthogonal(g):\n    u, s, vt = torch.linalg.svd(g, full_matrices=False)\n"
            "    return u @ s.diag() @ vt",
            "this is the matrix itself",
        ),
        ("def nearest_orthogonal(g): return g / g.norm()", "all should be 1"),
        ("def nearest_orthogonal(g): return torch.eye(4, 6)", "not the nearest"),
    ],
    ("13_muon", 2): [
        (
            "def driven_to(s, steps):\n    for _ in range(max(1, steps - 1)):\n"
            "        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5\n    return s",
            "again and again",
        ),
        (
            "def driven_to(s, steps): return 3.4445 * s - 4.7750 * s**2 + 2.0315 * s**3",
            "the powers are 1, 3 and 5",
        ),
        (
            "def driven_to(s, steps): return 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5",
            "again and again",
        ),
    ],
    ("10_chat", 1): [
        ("def targets_of(ids, is_answer): return ids[1:]", "the user's tokens are learnt too"),
        (
            "def targets_of(ids, is_answer):\n"
            "    return [t if a else -100 for t, a in zip(ids, is_answer)][:-1]",
            "one place off",
        ),
    ],
    ("10_chat", 2): [
        ("def n_left_out(turns, room): return 0", "with room for 60 tokens, 2 are left out"),
        (
            "def n_left_out(turns, room):\n    return next((n for n in range(4)"
            " if sum(turns[: 4 - n]) <= room), 4)",
            "are left out",
        ),
    ],
}


def cells(lesson: Path) -> Any:
    return jupytext.read(lesson).cells


def namespace(lesson: Path) -> dict[str, Any]:
    """Return the imports and the checks of a lesson, without running it."""
    wanted: list[ast.stmt] = []
    for cell in cells(lesson):
        if cell.cell_type != "code":
            continue
        for node in ast.parse(cell.source).body:
            is_check = isinstance(node, ast.FunctionDef) and node.name.startswith("check_")
            if is_check or set(_packages(node)) & PACKAGES:
                wanted.append(node)
    found: dict[str, Any] = {}
    exec(compile(ast.Module(wanted, []), str(lesson), "exec"), found)
    return found


def _packages(node: ast.stmt) -> Iterator[str]:
    """Yield the packages that a statement imports from."""
    if isinstance(node, ast.Import):
        yield from (alias.name.split(".")[0] for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
        yield node.module.split(".")[0]


def verdict(lesson: Path, number: int, answer: str) -> str:
    """Return what the check of an exercise says about an answer."""
    names = namespace(lesson)
    exec(answer, names)
    [call] = [
        line
        for cell in cells(lesson)
        if cell.cell_type == "code"
        for line in cell.source.splitlines()
        if line.startswith(f"print(check_{number}(")
    ]
    return str(eval(call.removeprefix("print"), names))


def solutions(lesson: Path) -> dict[int, str]:
    """Return the code of the folded solutions, by exercise."""
    text = "\n".join(cell.source for cell in cells(lesson) if cell.cell_type == "markdown")
    return {int(number): code for number, code in SOLUTION.findall(text)}


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.stem)
def test_every_exercise_has_a_check_that_accepts_its_solution(lesson: Path) -> None:
    text = "\n".join(cell.source for cell in cells(lesson) if cell.cell_type == "markdown")
    exercises = [int(number) for number in re.findall(r"\*\*Exercise (\d+)\.\*\*", text)]
    found = solutions(lesson)
    assert exercises == sorted(found)
    assert len(exercises) >= 2
    for number in exercises:
        assert MISTAKES[lesson.stem, number], "each exercise has a known mistake"
        said = verdict(lesson, number, found[number])
        assert said.startswith("right"), (number, said)


@pytest.mark.parametrize(
    ("lesson", "number", "answer", "words"),
    [
        (lesson, number, answer, words)
        for (lesson, number), mistakes in MISTAKES.items()
        for answer, words in mistakes
    ],
)
def test_mistake_is_recognised(lesson: str, number: int, answer: str, words: str) -> None:
    said = verdict(ROOT / "notebooks" / f"{lesson}.py", number, answer)
    assert said.startswith("wrong"), said
    assert words in said


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.stem)
def test_exercises_of_the_shipped_notebook_are_not_answered(lesson: Path) -> None:
    notebook = jupytext.read(lesson.with_suffix(".ipynb"))
    outputs = [
        output["text"]
        for cell in notebook.cells
        if cell.cell_type == "code" and "print(check_" in cell.source
        for output in cell.outputs
    ]
    assert outputs == ["not answered yet\n"] * len(solutions(lesson))


def test_page_of_the_lessons_has_all_of_them_with_a_picture() -> None:
    page = (ROOT / "docs" / "lessons.md").read_text()
    for lesson in LESSONS:
        assert f"(notebooks/{lesson.stem}.ipynb)" in page
        assert f"(pictures/lessons/{lesson.stem[:2]}.png)" in page
        assert (ROOT / "docs" / "pictures" / "lessons" / f"{lesson.stem[:2]}.png").is_file()
