"""Write the table of guarantees into README.md from the markers of the tests.

    python tools/guarantees.py            # rewrite the table
    python tools/guarantees.py --check    # exit with 1 if it is out of date

A test with `@pytest.mark.guarantee("resume")` belongs to the guarantee of that name.
"""

import ast
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
BEGIN = "<!-- guarantees: written by tools/guarantees.py from the tests' markers -->\n"
END = "<!-- end of guarantees -->"
# Name in the marker: what is guaranteed.
GUARANTEES = {
    "gpt2": (
        "**A true GPT-2.** Tensor names, layout and arithmetic are OpenAI's. Logits equal those of "
        "`transformers` to 2e-5 in fp32, ten training steps equal those of `transformers` with "
        "`torch.optim.AdamW`, and a folder that holds another model is refused by name."
    ),
    "resume": (
        "**The step is the only clock.** Tokens, learning rate and random numbers are functions of "
        "(seed, step). A run resumes bit for bit, and reads the same tokens with any number of "
        "ranks "
        "and any micro-batch. On a GPU, equal bits need `--deterministic`."
    ),
    "durable": (
        "**Nothing is lost.** Checkpoints and data are written beside their place, hashed, "
        "flushed and "
        "renamed. SIGKILL at any moment, a full disk or a flipped bit costs at most the steps "
        "since the "
        "last good checkpoint."
    ),
    "speed": (
        "**Measured speed.** A ratio to another package is the median of alternating measurements "
        "in one run, and both sides compute the same result."
    ),
    "evidence": (
        "**Evidence.** Evaluation gives the scores of lm-evaluation-harness, example by example; "
        "evaluating and sampling do not affect training; a verdict needs fp32, the whole task and "
        "a "
        "published figure that others have reproduced."
    ),
    "chat": (
        "**Conversations.** Only what the assistant says is learnt, its ids are those of "
        "`apply_chat_template` of `transformers`, and no text of a message can begin another turn."
    ),
}


def marked_tests() -> dict[str, Counter[str]]:
    """Return, for each guarantee, the number of marked test functions in each test file."""
    found: dict[str, Counter[str]] = {name: Counter() for name in GUARANTEES}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef):
                continue
            for name in guarantees_of(node):
                if name not in found:
                    sys.exit(f"{path}: there is no guarantee '{name}'; add it to {__file__}.")
                found[name][path.relative_to(ROOT).as_posix()] += 1
    return found


def guarantees_of(function: ast.FunctionDef) -> list[str]:
    """Return the names in the `guarantee` markers of a test function."""
    names = []
    for decorator in function.decorator_list:
        if not isinstance(decorator, ast.Call):
            continue
        if ast.unparse(decorator.func) == "pytest.mark.guarantee":
            names += [str(ast.literal_eval(argument)) for argument in decorator.args]
    return names


def table() -> str:
    """Return the table in Markdown."""
    lines = ["| guarantee | tests |", "|---|---|"]
    for name, files in marked_tests().items():
        if not files:
            sys.exit(f"no test is marked with the guarantee '{name}'.")
        links = [f"[{Path(path).stem}]({path}) ({count})" for path, count in files.items()]
        lines.append(f"| {GUARANTEES[name]} | {', '.join(links)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    new = before + BEGIN + table() + END + after
    if "--check" in sys.argv[1:]:
        if new != text:
            sys.exit("the guarantees in README.md are out of date; run python tools/guarantees.py.")
        return
    readme.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
