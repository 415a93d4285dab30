"""Debian's Chromium, the chatbot as a process of its own, and a server that speaks the wire."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.clients.chatbot.plant import PlantServer, running_plant
from tests.system.chatbot.visit import Chatbot, running_chatbot

CHROMIUM_FLAGS = [
    "--no-sandbox",  # CI runs as root
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
]
DESKTOP = {"width": 1280, "height": 900}
PHONE = {"width": 390, "height": 844}

expect.set_options(timeout=180_000)  # sixteen pages on two busy cores take their time


@pytest.fixture(scope="module")  # its event loop must not be there for other tests
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium")
    assert chromium, "no Chromium: run .ci/system-packages first"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[PlantServer, Chatbot]]:
    """The one chatbot for the tests that do not care which, and the server behind it."""
    folder = tmp_path_factory.mktemp("chatbot")
    with running_plant() as plant, running_chatbot(folder, plant.url) as chatbot:
        yield plant, chatbot


@pytest.fixture
def plant(started: tuple[PlantServer, Chatbot]) -> PlantServer:
    started[0].refresh()
    return started[0]


@pytest.fixture
def chatbot(plant: PlantServer, started: tuple[PlantServer, Chatbot]) -> Chatbot:
    return started[1]


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Page]]:
    """A page in a browser profile of its own; requests to other hosts fail the test."""
    with ExitStack() as open_profiles:
        strangers: list[str] = []

        def open_page(address: str, language: str = "en", size: dict = DESKTOP) -> Page:
            profile = browser.new_context(locale=language, viewport=size)
            open_profiles.callback(profile.close)
            profile.on("request", lambda request: _note(strangers, request.url))
            profile.set_default_timeout(180_000)
            page = profile.new_page()
            page.goto(address)
            return page

        yield open_page
        assert strangers == []


def _note(strangers: list[str], address: str) -> None:
    if not address.startswith(("http://127.0.0.1:", "data:", "blob:")):
        strangers.append(address)
