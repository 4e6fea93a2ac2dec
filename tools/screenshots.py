"""Take the pictures of the report and of the playground that README and docs show.

python tools/screenshots.py report docs/example/report.html docs/pictures/report.png
python tools/screenshots.py playground docs/pictures/playground.png MODEL [MODEL]
python tools/screenshots.py inside docs/pictures/inside.png MODEL TOKEN BLOCK HEAD

Needs selenium and headless Chromium (Debian: chromium and chromium-driver).
"""

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.chrome.service import Service

WIDTH = 1200
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
)
PORT = 8765
PROMPT = "    def __init__(self, "


def open_browser() -> Any:
    """Start a Chromium without a window."""
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for flag in FLAGS:
        options.add_argument(flag)
    return webdriver.Chrome(options, Service("/usr/bin/chromedriver"))


def save_top(browser: Any, height: int, output: str) -> None:
    """Save a picture of the upper `height` CSS pixels of the page."""
    sizes = {"width": WIDTH, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", sizes)
    time.sleep(0.5)
    browser.save_screenshot(output)


def bottom_of_last(browser: Any, selector: str) -> int:
    """Return the position at which the last element that matches the selector ends."""
    element = f"[...document.querySelectorAll({selector!r})].pop()"
    script = f"return {element}.getBoundingClientRect().bottom + scrollY"
    return int(browser.execute_script(script))


def take_report(browser: Any, page: str, output: str) -> None:
    """Take a picture of a report, from the verdict to the first curves."""
    save_top(browser, 900, output)  # sets the window's width before the page is laid out
    browser.get(Path(page).resolve().as_uri())
    save_top(browser, bottom_of_last(browser, ".charts.wide") + 24, output)


@contextlib.contextmanager
def written_texts(browser: Any, models: Sequence[str]) -> Iterator[None]:
    """Serve the models, and show the page on which they have continued PROMPT."""
    command = [sys.executable, "-m", "anew", "serve", *models, "--port", str(PORT)]
    server = subprocess.Popen(command)
    try:
        for _ in range(120):
            try:
                browser.get(f"http://127.0.0.1:{PORT}")
                break
            except WebDriverException:  # the server does not listen yet
                time.sleep(0.5)
        time.sleep(1)
        browser.execute_script(f"document.getElementById('prompt').value = {PROMPT!r}")
        browser.execute_script("document.getElementById('write').click()")
        time.sleep(1)
        while browser.execute_script("return document.getElementById('write').disabled"):
            time.sleep(0.2)
        yield
    finally:
        server.terminate()
        server.wait()


def take_playground(browser: Any, output: str, *models: str) -> None:
    """Take a picture of the texts of the models, with the alternatives for one token."""
    save_top(browser, 900, output)
    with written_texts(browser, models):
        tokens = "document.querySelectorAll('article:nth-child(1) .token')"
        browser.execute_script(f"{tokens}[24].click()")
        save_top(browser, bottom_of_last(browser, "article, #choices") + 40, output)


def take_inside(browser: Any, output: str, model: str, token: str, block: str, head: str) -> None:
    """Take a picture of the inside view with one token and one head chosen."""
    save_top(browser, 900, output)
    with written_texts(browser, [model]):
        browser.execute_script("document.querySelector('.look').click()")
        time.sleep(1)
        choice = f"{{ token: {token}, block: {block}, head: {head} }}"
        browser.execute_script(f"choose({choice})")
        time.sleep(1)
        browser.execute_script("scrollTo(0, 0)")
        save_top(browser, bottom_of_last(browser, "#inside") + 24, output)


PICTURES: dict[str, Callable[..., None]] = {
    "report": take_report,
    "playground": take_playground,
    "inside": take_inside,
}

if __name__ == "__main__":
    picture, *arguments = sys.argv[1:]
    browser = open_browser()
    try:
        PICTURES[picture](browser, *arguments)
    finally:
        browser.quit()
