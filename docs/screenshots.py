"""The pictures of pages in README and docs, taken in headless Chromium (Debian's chromium and chromium-driver).

python docs/screenshots.py report docs/example/report.html docs/pictures/report.png
python docs/screenshots.py playground docs/pictures/playground.png MODEL [MODEL]
"""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from selenium import webdriver
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


def chromium() -> Any:
    """A browser that nobody sees."""
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for flag in FLAGS:
        options.add_argument(flag)
    return webdriver.Chrome(options, Service("/usr/bin/chromedriver"))


def take(browser: Any, height: int, out: str) -> None:
    """The page's upper `height` points."""
    sizes = {"width": WIDTH, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", sizes)
    time.sleep(0.5)
    browser.save_screenshot(out)


def bottom(browser: Any, selector: str) -> int:
    """Where the last of these elements ends."""
    found = f"[...document.querySelectorAll({selector!r})].pop().getBoundingClientRect().bottom"
    return int(browser.execute_script(f"return {found} + scrollY"))


def report(browser: Any, page: str, out: str) -> None:
    """From the verdict to the first curves."""
    take(browser, 900, out)
    browser.get(Path(page).resolve().as_uri())
    take(browser, bottom(browser, ".charts.wide") + 24, out)


def playground(browser: Any, out: str, *models: str) -> None:
    """Two models' texts, and the choices behind one token."""
    server = subprocess.Popen([sys.executable, "-m", "anew", "serve", *models, "--port", str(PORT)])
    try:
        take(browser, 900, out)
        for _ in range(120):
            try:
                browser.get(f"http://127.0.0.1:{PORT}")
                break
            except Exception:  # noqa: BLE001 (it is not up yet)
                time.sleep(0.5)
        time.sleep(1)
        browser.execute_script(
            f"document.getElementById('prompt').value = {PROMPT!r}; document.getElementById('write').click()"
        )
        time.sleep(1)
        while browser.execute_script("return document.getElementById('write').disabled"):
            time.sleep(0.2)
        browser.execute_script(
            "document.querySelectorAll('article:nth-child(1) .token')[24].click()"
        )
        take(browser, bottom(browser, "article, #choices") + 40, out)
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    browser = chromium()
    try:
        {"report": report, "playground": playground}[sys.argv[1]](browser, *sys.argv[2:])
    finally:
        browser.quit()
