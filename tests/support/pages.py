"""Report pages in tests: a strict HTML parser, and a run that looks like GPT-2 124M."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from anew.config.recipes import RECIPES
from anew.report import reference_runs as reference
from anew.report.run import Run

WITHOUT_END_TAG = {"meta", "link", "br", "input", "img", "hr"}
LOADING_ATTRIBUTES = ("src", "href", "data", "action", "srcset")


class StrictParser(HTMLParser):
    """Collect the text of a page and what it loads; check that every tag is closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in LOADING_ATTRIBUTES:
                self.loaded.append(f"{tag} {name}={value}")
        if tag not in WITHOUT_END_TAG:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data


def text_of(html: str) -> str:
    """Return the text of a page that is well formed and loads nothing."""
    parser = StrictParser()
    parser.feed(html)
    assert parser.open == []
    assert parser.loaded == [], "a page loads nothing"
    assert not re.search(r"url\((?!#)|@import", html)
    return parser.text


def like_gpt2(folder: Path, share: float, status: str = "running") -> Run:
    """Write a run of gpt2-124m up to a share of its steps, with the curve of a reference run."""
    folder.mkdir(parents=True)
    config = RECIPES["gpt2-124m"][1]
    (folder / "config.json").write_text(config.to_json())
    curve = reference.CURVES[0]
    rows: list[dict[str, Any]] = []
    for (tokens, loss), (_, accuracy) in zip(curve.losses, curve.hellaswag, strict=True):
        if 0 < tokens <= share * reference.HORIZON:
            step = int(tokens) // reference.TOKENS_A_STEP
            rows.append(
                {
                    "step": step,
                    "tokens": tokens,
                    "seconds": step * 0.3,
                    "train/loss": loss,
                    "train/lr": 6e-4,
                    "train/grad_norm": 0.3,
                    "speed/tokens_per_second": 1.7e6,
                    "speed/mfu": 0.5,
                    "val/loss": loss,
                    "val/precision": "fp32",
                    "eval/hellaswag/acc_norm": accuracy,
                    "eval/hellaswag/acc": accuracy - 0.01,
                    "eval/hellaswag/precision": "fp32",
                    "eval/hellaswag/examples": 10042,
                }
            )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run_state.json").write_text(json.dumps({"status": status, "starts": 2}))
    return Run.read(folder)
