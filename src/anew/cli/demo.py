"""The end of `make demo`: samples of a model trained on Python's standard library.

It also prints which share of the sampled lines is Python, according to Python's own `tokenize`.
"""

import io
import itertools
import tokenize
from pathlib import Path

from anew.checkpoint.huggingface import load_model
from anew.data import sources
from anew.inference.generate import generate
from anew.tokenizer.bpe import Tokenizer

SHOWN_PROMPTS = ("import os\n", "    def __init__(self", "def main():\n")
MORE_PROMPTS = ("def ",) * 32  # sampled to make the share less noisy, not printed
SAMPLE_BYTES = 400
LIBRARY_FILES = 40


def is_python(line: str) -> bool:
    """Say whether `tokenize` accepts a line. An open bracket or string may end on a later line."""
    readline = io.StringIO(line.strip() + "\n").readline
    try:
        types = [token.type for token in tokenize.generate_tokens(readline)]
    except tokenize.TokenError as error:
        return "EOF in multi-line" in str(error)
    except SyntaxError:
        return False
    return tokenize.ERRORTOKEN not in types


def share_of_python(text: str) -> float:
    """Return the share of the lines of `text`, without blank ones, that are Python."""
    lines = [line for line in text.splitlines() if line.strip()]
    return sum(map(is_python, lines)) / max(1, len(lines))


def show_demo(run: Path) -> dict[str, float]:
    """Print samples and the share of their lines that are Python. Return the shares.

    The share of the library's own lines is printed for comparison.
    """
    model = load_model(str(run))
    tokenizer = Tokenizer.named("bytes")
    prompts = [*SHOWN_PROMPTS, *MORE_PROMPTS]
    samples = generate(
        model,
        [tokenizer.encode(prompt) for prompt in prompts],
        SAMPLE_BYTES,
        tokenizer.end_of_text,
        temperature=0.7,
        seed=1,
    )
    texts = [prompt + tokenizer.decode(ids) for prompt, ids in zip(prompts, samples, strict=True)]
    for prompt, text in zip(SHOWN_PROMPTS, texts, strict=False):
        title = f"--- {prompt!r} continued "
        print(f"\n{title:-<78}\n{text}")
    # The last line of a sample is incomplete, so it is not counted.
    complete_lines = [text.rpartition("\n")[0] for text in texts]
    library = itertools.islice(sources.find("stdlib").documents(), LIBRARY_FILES)
    share = share_of_python("\n".join(complete_lines))
    library_share = share_of_python("\n".join(file.decode(errors="replace") for file in library))
    print(
        f"\nPython's tokenize accepts {share:.0%} of the sampled lines "
        f"(and {library_share:.0%} of the lines of real library files)"
    )
    return {"python_share": share, "python_share_of_real_files": library_share}
