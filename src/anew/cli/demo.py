"""What `make demo` shows at its end: three samples of a model that has read the standard library for a few minutes, and how much of
what it writes is Python, in the judgement of Python's own `tokenize`.
"""

import io
import tokenize
from pathlib import Path

from anew.checkpoint import huggingface as weights
from anew.data import sources
from anew.inference.generate import generate
from anew.tokenizer.bpe import Tokenizer

PROMPTS = ("import os\n", "    def __init__(self", "def main():\n")
SAMPLE_BYTES, MANY = 400, 32


def is_python(line: str) -> bool:
    """Does `tokenize` accept this line on its own? A bracket or string left open is fine: the next line may close it."""
    try:
        return all(
            t.type != tokenize.ERRORTOKEN
            for t in tokenize.generate_tokens(io.StringIO(line.strip() + "\n").readline)
        )
    except tokenize.TokenError as error:
        return "EOF in multi-line" in str(error)
    except SyntaxError:
        return False


def share_of_python(text: str) -> float:
    """Share of the lines of `text` that are Python; blank lines do not count."""
    lines = [line for line in text.splitlines() if line.strip()]
    return sum(map(is_python, lines)) / max(1, len(lines))


def show_demo(run: Path) -> dict[str, object]:
    """Print samples and the share of their lines that are Python, beside the same share of the library itself."""
    model, tokenizer = weights.load_model(str(run)), Tokenizer.named("bytes")
    prompts = [*PROMPTS, *["def "] * MANY]
    rows = generate(
        model,
        [tokenizer.encode(p) for p in prompts],
        SAMPLE_BYTES,
        tokenizer.end_of_text,
        temperature=0.7,
        seed=1,
    )
    texts = [prompt + tokenizer.decode(ids) for prompt, ids in zip(prompts, rows, strict=True)]
    for prompt, text in zip(PROMPTS, texts, strict=False):
        print(f"\n{f'--- {prompt!r} continued ':-<78}\n{text}")
    # the last line of a sample was cut by its length, so it is not judged
    ours = share_of_python("\n".join(text.rpartition("\n")[0] for text in texts))
    real = share_of_python(
        "\n".join(
            d.decode(errors="replace")
            for _, d in zip(range(40), sources.find("stdlib").documents(), strict=False)
        )
    )
    print(
        f"\nPython's tokenize accepts {ours:.0%} of the sampled lines (and {real:.0%} of the lines of real library files)"
    )
    return {"python_share": ours, "python_share_of_real_files": real}
