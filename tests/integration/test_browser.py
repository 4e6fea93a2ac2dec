"""The report and the playground in a real browser. Skipped without Debian's chromium.

    ANEW_PICTURES=DIR python -m pytest tests/integration/test_browser.py

also writes pictures of the pages; docs/screenshots.py makes those of the documentation.
"""

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from anew import Tokenizer, generate
from anew.checkpoint.huggingface import load_model
from anew.inference.interpret import Part, trace_of, without
from anew.report import html as page
from anew.report.run import Run
from anew.training.trainer import train
from tests.faults.common import tiny
from tests.support.pages import like_gpt2
from tests.support.serving import chat_model, models, served

pytestmark = pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")),
    reason="needs Debian's chromium and chromium-driver",
)
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update --hide-scrollbars "
    "--force-color-profile=srgb"
)
__all__ = ["chat_model", "models"]  # fixtures


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in FLAGS.split():
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def look(browser: Any, name: str, width: int, dark: bool = False) -> None:
    """Check that the page fits this width and logged no errors; take a picture if wanted."""
    scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
    sizes = {"width": width, "height": 700, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", sizes)
    wait_for(browser, f"innerWidth == {width}", 5)
    height = browser.execute_script("return document.documentElement.scrollHeight")
    sizes["height"] = min(max(700, height), 2600)
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", sizes)
    wait_for(browser, f"document.documentElement.scrollWidth <= {width}", 5)
    if folder := os.environ.get("ANEW_PICTURES"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        browser.save_screenshot(str(Path(folder) / f"{name}.png"))
    severe = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert [entry for entry in severe if "favicon" not in entry["message"]] == []


def wait_for(browser: Any, script: str, seconds: float = 30) -> Any:
    """Wait until a JavaScript expression is true, and return its value."""
    deadline = time.monotonic() + seconds
    while not (found := browser.execute_script(f"return {script}")):
        assert time.monotonic() < deadline, script
        time.sleep(0.05)
    return found


def fill(browser: Any, **fields: str) -> None:
    """Type a text into each field of a page, by its id."""
    for name, value in fields.items():
        element = browser.find_element("id", name)
        element.clear()
        element.send_keys(value)


def test_report_fits_phone_and_desktop_and_shows_values_under_the_pointer(
    browser: Any, tmp_path: Path
) -> None:
    config = tiny(
        tmp_path / "run",
        steps=60,
        evaluate_every=20,
        sample_every=20,
        sample_prompt="The king ",
        sample_tokens=60,
    )
    train(config)
    like_gpt2(tmp_path / "gpt2", 0.4)
    for name, folder in (("report-small-run", config.folder), ("report-124m", tmp_path / "gpt2")):
        file = page.write([folder], tmp_path / f"{name}.html", price=2.5)
        browser.get(f"file://{file}")
        for width, dark in ((375, False), (1200, True), (1200, False)):
            look(browser, f"{name}-{width}{'-dark' if dark else ''}", width, dark)
        assert not Run.read(folder).baseline
        fetched = browser.execute_script("return performance.getEntriesByType('resource').length")
        assert fetched == 0
        browser.execute_script("""
            const svg = document.querySelector("svg[data-lines]");
            const box = svg.getBoundingClientRect();
            const at = {clientX: box.left + box.width / 4, clientY: box.top + 50, bubbles: true};
            svg.dispatchEvent(new PointerEvent("pointermove", at));
        """)
        tip = browser.execute_script("return document.querySelector('.tip').innerText")
        assert "training" in tip or "validation" in tip
        assert any(c.isdigit() for c in tip)


def test_playground_generates_branches_compares_and_stops(browser: Any, models: list[Path]) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    def tokens(article: int) -> str:
        return f"document.querySelectorAll('article:nth-child({article}) .token')"

    def texts(article: int) -> Any:
        return browser.execute_script(f"return [...{tokens(article)}].map(t => t.textContent)")

    is_idle = "!document.getElementById('write').disabled"
    with served(*map(str, models)) as address:
        browser.get(address)
        wait_for(browser, "document.querySelectorAll('#model option').length == 2")
        fill(browser, prompt="The tower <b>", n_tokens="30", seed="5")
        browser.find_element(By.ID, "write").click()
        wait_for(browser, f"{is_idle} && {tokens(1)}.length > 20 && {tokens(2)}.length > 20")
        prompt = browser.execute_script("return document.querySelector('.prompt').textContent")
        assert prompt == "The tower <b>"
        before, other = texts(1), texts(2)
        assert before != other, "two models side by side"
        browser.execute_script(f"{tokens(1)}[7].click()")
        wait_for(browser, "!document.getElementById('choices').hidden")
        choices = browser.find_elements(By.CSS_SELECTOR, "#choices button")
        assert len(choices) == 10
        look(browser, "playground", 1200)
        chosen = next(c for c in choices if "taken" not in (c.get_attribute("class") or ""))
        label = chosen.find_element(By.TAG_NAME, "code").text
        chosen.click()
        wait_for(browser, f"{is_idle} && {tokens(1)}.length > 20")
        after = texts(1)
        assert after[:7] == before[:7], "the tokens before the chosen one stay"
        assert after[7].replace(" ", "\u00b7").replace("\n", "\u21b5") == label
        assert texts(2) == other
        look(browser, "playground-375", 375, dark=True)
        browser.find_element(By.ID, "n_tokens").clear()
        browser.find_element(By.ID, "n_tokens").send_keys("240")
        browser.find_element(By.ID, "prompt").send_keys(Keys.CONTROL, Keys.ENTER)
        wait_for(browser, f"{tokens(1)}.length > 3")
        browser.find_element(By.ID, "stop").click()
        wait_for(browser, is_idle)
        n_tokens = browser.execute_script(f"return {tokens(1)}.length + {tokens(2)}.length")
        assert n_tokens < 480


def test_conversation_on_the_page(browser: Any, chat_model: Path, models: list[Path]) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import Select

    def said() -> Any:
        return browser.execute_script("return [...texts.children].map(part => part.tagName)")

    is_idle = "!document.getElementById('write').disabled"
    answers = "document.querySelectorAll('article .token').length"
    with served(str(chat_model), str(models[1])) as address:
        browser.get(address)
        wait_for(browser, "document.getElementById('write').textContent == 'Send'")
        Select(browser.find_element(By.ID, "beside")).select_by_value("")
        fill(browser, n_tokens="20", temperature="0")
        prompt = browser.find_element(By.ID, "prompt")
        prompt.send_keys("Hello <b>", Keys.ENTER)
        wait_for(browser, f"{is_idle} && {answers} > 10")
        assert prompt.get_attribute("value") == ""
        assert said() == ["P", "ARTICLE"]
        assert browser.execute_script("return texts.firstChild.textContent") == "Hello <b>"
        first = browser.execute_script("return turns[0].answers[0].written()")
        prompt.send_keys("And now?", Keys.ENTER)
        wait_for(browser, f"{is_idle} && turns.length == 2 && turns[1].answers[0].tokens.length")
        assert said() == ["P", "ARTICLE"] * 2
        sent = browser.execute_script("return turns[1].answers[0].messages")
        assert [message["content"] for message in sent] == ["Hello <b>", first, "And now?"]
        for width, dark in ((375, False), (1200, True), (1200, False)):
            look(browser, f"chat-{width}{'-dark' if dark else ''}", width, dark)
        # Another token in the first answer changes what the model reads later.
        browser.execute_script("document.querySelectorAll('.token')[3].click()")
        wait_for(browser, "!document.getElementById('choices').hidden")
        chosen = "#choices button:not(.taken)"
        browser.find_element(By.CSS_SELECTOR, chosen).click()
        wait_for(browser, f"{is_idle} && turns[0].answers[0].written() != {first!r}")
        # The oldest messages are left out when the conversation becomes too long.
        for _ in range(6):
            prompt.send_keys("A long message about nothing at all.", Keys.ENTER)
            wait_for(browser, is_idle)
        note = "[...document.querySelectorAll('article h2')].pop().textContent"
        wait_for(browser, f"{note}.includes('oldest messages')")
        browser.find_element(By.ID, "renew").click()
        assert said() == []
        Select(browser.find_element(By.ID, "model")).select_by_value(str(models[1]))
        wait_for(browser, "document.getElementById('write').textContent == 'Write'")
        assert not browser.find_element(By.ID, "renew").is_displayed()


def test_inside_view_shows_and_removes_heads(browser: Any, models: list[Path]) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    def number_of(selector: str) -> int:
        return int(browser.execute_script(f"return document.querySelectorAll('{selector}').length"))

    def text_of(name: str) -> str:
        return str(browser.execute_script(f"return document.getElementById('{name}').textContent"))

    is_idle = "!document.getElementById('write').disabled"
    drawn = "document.querySelectorAll('#inside-tokens .option').length"
    with served(str(models[0])) as address:
        browser.get(address)
        wait_for(browser, "document.querySelectorAll('#model option').length == 1")
        fill(browser, prompt="The tower of", n_tokens="28", temperature="0")
        browser.find_element(By.ID, "write").click()
        wait_for(browser, f"{is_idle} && document.querySelectorAll('article .token').length > 0")
        browser.find_element(By.CLASS_NAME, "look").click()
        n_tokens = number_of("article .token") + len("The tower of")
        wait_for(browser, f"{drawn} == {n_tokens}")
        assert text_of("inside-title") == f"Inside {'/'.join(models[0].parts[-2:])}"
        assert number_of("#heads button") == 4
        assert number_of("#layers tbody tr") == 3, "the start and two blocks"
        assert number_of("#layers tbody tr:last-child .guess") == 10
        model = load_model(models[0])
        ids = browser.execute_script("return inside.ids")
        expected = trace_of(model, ids).attention[0, 0, -1]
        row = browser.execute_script("return inside.found.matrix[inside.token]")
        assert row == pytest.approx((10_000 * expected).tolist(), abs=1)
        look(browser, "inside", 1200)

        # The keys move the choice: to the token before, and from head 0.0 to head 1.0.
        browser.find_element(By.CSS_SELECTOR, "#inside-tokens [aria-selected=true]").send_keys(
            Keys.ARROW_LEFT
        )
        wait_for(browser, f"inside.found.rows[0][0].length == {n_tokens - 1}")
        assert number_of(".guess.came") >= 1, "the token that came next is framed"
        browser.find_element(By.CSS_SELECTOR, "#heads [aria-pressed=true]").send_keys(
            Keys.ARROW_DOWN
        )
        wait_for(browser, "document.getElementById('attention-text').textContent.includes('1.0')")
        focused = "return document.activeElement.getAttribute('aria-label')"
        assert "block 1, head 0" in browser.execute_script(focused), "the focus stays"
        browser.find_element(By.CSS_SELECTOR, "[name=view][value=lines]").click()
        wait_for(browser, "document.querySelectorAll('#lines line.chosen').length > 0")
        assert number_of("#lines text") == 2 * n_tokens
        look(browser, "inside-375", 375, dark=True)

        before = text_of("layers")
        buttons = browser.find_elements(By.CSS_SELECTOR, "#switches button")
        assert [button.text for button in buttons] == [
            "Switch off head 1.0",
            "Switch off attention 1",
            "Switch off MLP 1",
        ]
        buttons[0].click()
        wait_for(browser, "document.querySelectorAll('.head.off').length == 1")
        assert text_of("layers") != before
        browser.find_elements(By.CSS_SELECTOR, "#switches button")[2].click()
        wait_for(browser, "document.getElementById('off').textContent.includes('MLP 1')")
        browser.find_element(By.ID, "rewrite").click()
        wait_for(browser, f"{is_idle} && document.querySelectorAll('article').length == 2")
        wait_for(browser, "document.querySelectorAll('article:nth-child(2) .token').length > 0")
        title = "document.querySelector('article:nth-child(2) h2 span').textContent"
        assert "without head 1.0, MLP 1" in browser.execute_script(f"return {title}")
        written = browser.execute_script(
            "return [...document.querySelectorAll('article:nth-child(2) .token')]"
            ".map(token => token.textContent).join('')"
        )
        smaller = without(model, [Part(1, "head", 0), Part(1, "mlp")])
        prompt = Tokenizer.named("bytes").encode("The tower of")
        [ids] = generate(smaller, [prompt], 28, stop=256, temperature=0)
        assert written.removesuffix("end of text") == Tokenizer.named("bytes").decode(ids)
        look(browser, "inside-without", 1200)
        browser.find_element(By.ID, "inside-close").click()
        assert not browser.find_element(By.ID, "inside").is_displayed()
