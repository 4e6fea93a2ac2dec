"""Tasks of running text: how well a model predicts every token of a corpus, and what its own text looked like before it was tokenised."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anew.errors import UserError
from anew.evaluate.scorer import Question, Scored
from anew.evaluate.tasks.task import Example, Remote, Result, Task, perplexity, text_of
from anew.tokenizer.bpe import Tokenizer

POSITION_EDGES = (
    0,
    1,
    2,
    4,
    8,
    16,
    32,
    64,
    128,
    256,
    512,
    1024,
)  # tokens seen before the one predicted
CONFIDENCE_BINS = 10


@dataclass(frozen=True)
class Window:
    """A stretch of text to predict behind `seen` tokens; `words` and `bytes` are its share, by tokens, of its document's."""

    seen: int
    words: float = 0
    bytes: float = 0


def window_result(window: Window, answer: Sequence[Scored]) -> Result:
    """What is kept of one window: sums, and sums by position and by confidence."""
    [scored] = answer
    nats = -scored.log_p.astype(np.float64)
    place = (
        np.searchsorted(
            POSITION_EDGES, np.arange(window.seen, window.seen + len(nats)), side="right"
        )
        - 1
    )
    confidence = np.exp(scored.best.astype(np.float64))
    bin_of = np.minimum((confidence * CONFIDENCE_BINS).astype(int), CONFIDENCE_BINS - 1)
    return {
        "nats": float(nats.sum()), "tokens": len(nats), "hits": int(scored.hit.sum()), "words": window.words, "bytes": window.bytes,
        "position_nats": np.bincount(place, nats, len(POSITION_EDGES)).tolist(),
        "position_tokens": np.bincount(place, minlength=len(POSITION_EDGES)).tolist(),
        "confidence": np.bincount(bin_of, confidence, CONFIDENCE_BINS).tolist(),
        "confidence_hits": np.bincount(bin_of, scored.hit, CONFIDENCE_BINS).tolist(),
        "confidence_tokens": np.bincount(bin_of, minlength=CONFIDENCE_BINS).tolist(),
    }  # fmt: skip


def window_figures(results: Sequence[Result]) -> dict[str, Any]:
    """Figures of running text; nats are a token's, `loss_by_position` and `calibration` are tables."""
    total = {
        key: sum(r[key] for r in results) for key in ("nats", "tokens", "hits", "words", "bytes")
    }
    tables = {
        key: np.sum([r[key] for r in results], axis=0)
        for key in results[0]
        if "_" in key or key == "confidence"
    }
    loss = total["nats"] / total["tokens"]
    figures: dict[str, Any] = {
        "loss": loss,
        "token_perplexity": perplexity(loss),
        "acc": total["hits"] / total["tokens"],
    }
    if total["words"]:
        figures["word_perplexity"] = perplexity(total["nats"] / total["words"])
    if total["bytes"]:
        figures["bits_per_byte"] = total["nats"] / math.log(2) / total["bytes"]
    counts = tables["confidence_tokens"]
    figures["calibration_error"] = float(
        np.abs(tables["confidence"] - tables["confidence_hits"]).sum() / counts.sum()
    )
    figures["loss_by_position"] = {
        str(edge): nats / n
        for edge, nats, n in zip(
            POSITION_EDGES,
            tables["position_nats"].tolist(),
            tables["position_tokens"].tolist(),
            strict=True,
        )
        if n
    }
    figures["calibration"] = [
        {"confidence": c / n, "hit_rate": h / n, "tokens": int(n)}
        for c, h, n in zip(
            tables["confidence"].tolist(),
            tables["confidence_hits"].tolist(),
            counts.tolist(),
            strict=True,
        )
        if n
    ]
    return figures


def windows(
    ids: Sequence[int], words: int, size: int, positions: int, stride: int = 0
) -> Iterator[Example]:
    """Windows over a document `ids`, of which the first is given and each other is predicted once, `stride` at a time (0: as many as fit).

    A window holds as much context as fits, so a small stride gives every token a long past, at the price of reading it again.
    """
    stride = min(stride or positions, positions)
    for start in range(1, len(ids), stride):
        ending = ids[start : start + stride]
        context = ids[max(0, start + len(ending) - 1 - positions) : start]
        share = len(ending) / (len(ids) - 1)
        yield Example(
            Window(len(context), words * share, size * share), Question(context, [ending])
        )


@dataclass(frozen=True)
class Corpus(Task):
    """Running text: loss and perplexity a token, perplexity a word and bits a byte of the original, by position, calibration.

    Published figures by corpus: published.py. `documents` cuts the file; `polish` undoes its tokenisation. Words and bytes are counted
    before it, so a perplexity a word is one of the published text's words.
    """

    name: str
    remote: Remote
    member: str = ""  # the text's name inside an archive
    documents: Callable[[str], list[str]] = lambda text: [text]
    polish: Callable[[str], str] = lambda text: text
    stride: int = 0
    size: int = 0  # bytes of the published text; 0: not known

    def is_whole(self, examples: Sequence[Example]) -> bool:
        return (
            self.stride == 0
            and self.size > 0
            and abs(sum(e.row.bytes for e in examples) - self.size) < self.size // 500
        )

    def rows(self, path: Path) -> list[Any]:
        documents = [text for text in self.documents(text_of(path, self.member)) if text.strip()]
        if not documents:
            raise UserError(f"{path} holds no text.")
        return documents

    def examples(self, path: Path, tokenizer: Tokenizer, positions: int) -> list[Example]:
        found: list[Example] = []
        for text in self.rows(path):
            words = len(
                re.split(r"\s+", text)
            )  # as lm-evaluation-harness counts them: an edge counts too
            ids = [tokenizer.end_of_text, *tokenizer.encode(self.polish(text))]
            found += windows(ids, words, len(text.encode()), positions, self.stride)
        return found

    def result(self, row: Any, answer: Sequence[Scored]) -> Result:
        return window_result(row, answer)

    def figures(self, results: Sequence[Result]) -> dict[str, Any]:
        return window_figures(results)


def wikitext_articles(text: str) -> list[str]:
    """WikiText cut before each article's title, which is a line ` = Title = ` between blank ones."""
    starts = [
        match.start(1)
        for match in re.finditer(r"(?:^|\n) *\n( = [^=\n](?:[^\n]*[^=\n])? = \n *\n)", text)
    ]
    return [
        text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True)
    ] or [text]


# What WikiText's tokenisation did, undone in this order. The rules are lm-evaluation-harness's, so that figures can be compared.
WIKITEXT_RULES: tuple[tuple[str, Any], ...] = (
    (r"s '", "s'"),  # boys ' -> boys'
    (r" @([-,.])@ ", r"\1"),  # 1 @,@ 000 -> 1,000
    *((rf" ({mark}) ", r"\1 ") for mark in (":", ";", r"\.", "!", r"\?", ",")),
    *(
        (rf"({a})\s*([^{b}]*?)\s*({b})", r"\1\2\3")
        for a, b in ((r"\(", r"\)"), (r"\[", r"\]"), ("{", "}"), ('"', '"'), ("'", "'"))
    ),
    (r"=(?: =)+", lambda match: match[0].replace(" ", "")),  # = = Heading = = -> == Heading ==
    (" ° ", "°"),
    (r" \n", "\n"),
    (r"\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)


def wikitext_polish(text: str) -> str:
    """WikiText as ordinary text."""
    for pattern, replacement in WIKITEXT_RULES:
        text = re.sub(pattern, replacement, text)
    return text


WIKITEXT = Remote(
    "https://huggingface.co/datasets/ggml-org/ci/resolve/927b3642933080f1b0e811e2f916e14c292992f9/wikitext-2-raw-v1.zip",
    "ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11",
)
WIKITEXT_TEST = (
    "wikitext-2-raw/wiki.test.raw"  # WikiText-2's test text, which is WikiText-103's too
)
WIKITEXT_BYTES = 1_290_590

CORPORA = (
    Corpus("wikitext2", WIKITEXT, WIKITEXT_TEST, size=WIKITEXT_BYTES),
    Corpus(
        "wikitext103",
        WIKITEXT,
        WIKITEXT_TEST,
        wikitext_articles,
        wikitext_polish,
        size=WIKITEXT_BYTES,
    ),
)
