"""What a person does on the page, in the words of a person; and the chatbot that serves it."""

import base64
import csv
import io
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from playwright.sync_api import Locator, Page, expect

from tests.serving import free_port

# The page's command, as its documentation gives it; the lines above it are those that make
# the environment and that `tests.serving` runs.
DOCUMENT = (Path(__file__).parents[3] / "docs" / "chatbot.md").read_text("utf-8")
*BEFORE, COMMAND = re.findall(r"^\$ (.*?) *(?:#.*)?$", DOCUMENT, re.MULTILINE)
assert BEFORE == ["pip install '.[chatbot]'", "looktwice serve"], BEFORE
START_SECONDS = 120
STOP_SECONDS = 30


@dataclass(frozen=True)
class Chatbot:
    """A running `looktwice chatbot`."""

    url: str
    process: subprocess.Popen
    log: Path


@contextmanager
def running_chatbot(folder: Path, server_url: str, *flags: str) -> Iterator[Chatbot]:
    """Run `looktwice chatbot` with its data in `folder` until the block ends."""
    port = free_port()
    log = folder / f"chatbot-{port}.log"
    program, *words = COMMAND.split()
    command = [str(Path(sys.executable).with_name(program)), *words, "--url", server_url]
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, "--port", str(port), *flags],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=os.environ | {"XDG_DATA_HOME": str(folder)},
        )
    chatbot = Chatbot(f"http://127.0.0.1:{port}", process, log)
    try:
        _wait_until_up(chatbot)
        yield chatbot
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise


def _wait_until_up(chatbot: Chatbot) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and chatbot.process.poll() is None:
        try:
            urllib.request.urlopen(f"{chatbot.url}/health", timeout=2).close()
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.2)
    raise RuntimeError(f"the chatbot did not start:\n{chatbot.log.read_text()}")


def give_picture(page: Page, picture: Path) -> None:
    """Put a picture into the page, instead of the one that is there."""
    page.wait_for_selector("#picture")
    if page.locator("#picture img").count():
        page.locator("#picture .icon-button").last.click()
    page.locator("#picture input[type=file]").set_input_files(picture)
    expect(page.locator("#picture img")).to_be_visible()


def inspect(page: Page, picture: Path) -> None:
    """Upload a picture and wait for its result."""
    give_picture(page, picture)
    page.evaluate("document.querySelector('.result')?.setAttribute('data-old', '')")
    page.locator("button#inspect").click()
    expect(page.locator(".result:not([data-old])")).to_be_visible()


def loaded(page: Page, picture: Locator) -> None:
    """Wait until the browser has an overlay's pixels."""
    page.wait_for_function("image => image.naturalWidth >= 640", arg=picture.element_handle())


def overlay(page: Page) -> Image.Image:
    """The overlay that the page shows."""
    picture = page.locator("#overlay img")
    loaded(page, picture)
    data = picture.evaluate(
        "async image => { const bytes = new Uint8Array(await (await fetch(image.src))"
        ".arrayBuffer()); return btoa(Array.from(bytes, b => String.fromCharCode(b)).join(''))}"
    )
    return Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")


def verdict(page: Page) -> str:
    """The verdict that the page shows."""
    return page.locator(".result .verdict").inner_text()


def ask(page: Page, question: str) -> Locator:
    """Ask; where the answer to this question appears and grows."""
    answers = page.locator("#talk .bot.message")
    before = answers.count()
    page.locator("#question input, #question textarea").fill(question)
    page.locator("button#ask").click()
    expect(answers).to_have_count(before + 1)
    return answers.nth(before)


def say(page: Page, opinion: str, word: str) -> None:
    """Give feedback; `opinion` is "right" or "wrong"."""
    page.locator(f"#opinion input[value={opinion}]").check()
    page.locator("#word input, #word textarea").fill(word)
    page.locator("button#send-feedback").click()


def open_tab(page: Page, name: str) -> None:
    """Go to a part of the page."""
    page.get_by_role("tab", name=name).click()


def past(page: Page, count: int) -> list[str]:
    """The history, once it has `count` inspections; an entry each, the newest first."""
    open_tab(page, "History")
    page.locator("button#refresh").click()
    expect(page.locator("#past article")).to_have_count(count)
    return page.locator("#past article").all_inner_texts()


def exported(page: Page) -> list[dict[str, str]]:
    """The lines of the history's CSV, as the browser downloads it."""
    open_tab(page, "History")
    with page.expect_download() as download:
        page.get_by_text("Export as CSV").click()
    with download.value.path().open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def add_product(page: Page, name: str, pictures: list[Path]) -> None:
    """Teach a product from pictures of good parts."""
    open_tab(page, "Products")
    page.locator("#product-name input, #product-name textarea").fill(name)
    page.locator("#product-pictures input[type=file]").set_input_files(pictures)
    expect(page.locator("#product-pictures")).to_contain_text(pictures[-1].stem)
    page.locator("button#add-product").click()
    expect(page.locator("#product-said")).to_contain_text("is ready")


def choose_product(page: Page, name: str) -> None:
    """Choose what pictures are compared with."""
    open_tab(page, "Inspect")
    page.locator("#product input").click()
    page.get_by_role("option", name=name).click()
