"""WikiText's test articles, as raw text (wikitext2) and as ordinary text (wikitext103).

Published figures are in `published.py`. WikiText-2 and WikiText-103 have the same test articles.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anew.errors import UserError
from anew.evaluate.tasks.running_text import RunningText, windows
from anew.evaluate.tasks.task import Example, Remote, read_text
from anew.tokenizer.bpe import Tokenizer

TEST_FILE = "wikitext-2-raw/wiki.test.raw"
TEST_BYTES = 1_290_590
# A title is a line ` = Title = ` between blank lines. Titles of sections have more than one `=`.
TITLE = re.compile(r"(?:^|\n) *\n( = [^=\n](?:[^\n]*[^=\n])? = \n *\n)")


def one_document(text: str) -> list[str]:
    """Return a text as a single document."""
    return [text]


def articles(text: str) -> list[str]:
    """Cut WikiText before the title of each article."""
    starts = [match.start(1) for match in TITLE.finditer(text)]
    ends = [*starts[1:], len(text)]
    found = [text[start:end] for start, end in zip(starts, ends, strict=True)]
    return found or [text]


def unchanged(text: str) -> str:
    """Return a text as it is."""
    return text


def _joined_heading(match: re.Match[str]) -> str:
    return match[0].replace(" ", "")


def _without_inner_spaces(left: str, right: str) -> tuple[str, str]:
    """Return the rule that removes the spaces inside a pair of brackets or quotes."""
    return rf"({left})\s*([^{right}]*?)\s*({right})", r"\1\2\3"


# Undo the tokenization of WikiText, in this order. The rules are lm-evaluation-harness's, so that
# figures can be compared.
DETOKENIZE_RULES: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"s '", "s'"),  # boys ' -> boys'
    (r" @([-,.])@ ", r"\1"),  # 1 @,@ 000 -> 1,000
    (r" (:) ", r"\1 "),
    (r" (;) ", r"\1 "),
    (r" (\.) ", r"\1 "),
    (r" (!) ", r"\1 "),
    (r" (\?) ", r"\1 "),
    (r" (,) ", r"\1 "),
    _without_inner_spaces(r"\(", r"\)"),
    _without_inner_spaces(r"\[", r"\]"),
    _without_inner_spaces("{", "}"),
    _without_inner_spaces('"', '"'),
    _without_inner_spaces("'", "'"),
    (r"=(?: =)+", _joined_heading),  # = = Heading = = -> == Heading ==
    (" ° ", "°"),
    (r" \n", "\n"),
    (r"\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)


def detokenize(text: str) -> str:
    """Return WikiText as ordinary text."""
    for pattern, replacement in DETOKENIZE_RULES:
        text = re.sub(pattern, replacement, text)
    return text


@dataclass(frozen=True)
class WikiText(RunningText):
    """WikiText's test articles. Words and bytes are counted in the published text.

    So a perplexity per word does not depend on `clean`, nor on the tokenizer.
    """

    name: str
    split: Callable[[str], list[str]]  # the file's text -> documents
    clean: Callable[[str], str]  # a document -> the text that is tokenized
    stride: int = 0  # tokens predicted by a window; 0: as many as fit

    remote = Remote(
        "https://huggingface.co/datasets/ggml-org/ci/resolve/"
        "927b3642933080f1b0e811e2f916e14c292992f9/wikitext-2-raw-v1.zip",
        "ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11",
    )

    def is_whole(self, examples: Sequence[Example]) -> bool:
        n_bytes = sum(example.row.bytes for example in examples)
        return self.stride == 0 and abs(n_bytes - TEST_BYTES) < TEST_BYTES // 500

    def rows(self, path: Path) -> list[Any]:
        documents = [text for text in self.split(read_text(path, TEST_FILE)) if text.strip()]
        if not documents:
            raise UserError(f"{path} holds no text.")
        return documents

    def read_examples(
        self, path: Path, tokenizer: Tokenizer, n_positions: int, limit: int
    ) -> Iterator[Example]:
        found: list[Example] = []
        for text in self.rows(path):
            # As lm-evaluation-harness counts words: spaces at an edge of the text add one.
            n_words = len(re.split(r"\s+", text))
            n_bytes = len(text.encode())
            ids = [tokenizer.end_of_text, *tokenizer.encode(self.clean(text))]
            found += windows(ids, n_positions, n_words, n_bytes, self.stride)
        yield from found[: limit or None]


WIKITEXT2 = WikiText("wikitext2", split=one_document, clean=unchanged)
WIKITEXT103 = WikiText("wikitext103", split=articles, clean=detokenize)
