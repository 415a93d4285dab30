"""The page in a real browser, against the real server on nano; makes the pictures of the docs.

$LOOKTWICE_PICTURES=docs/pictures keeps the screenshots there.
"""

import os
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import expect

from examples.make_pictures import good_part, scratched_part
from tests.serving import Server
from tests.system.chatbot.conftest import DESKTOP, PHONE
from tests.system.chatbot.visit import (
    add_product,
    ask,
    choose_product,
    inspect,
    past,
    running_chatbot,
    say,
    verdict,
)

EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return Path(os.environ.get("LOOKTWICE_PICTURES", tmp_path))


def test_the_scratch_is_found_shown_explained_and_remembered(
    server: Server, visit, tmp_path, pictures
):
    with running_chatbot(tmp_path, server.url) as chatbot:
        page = visit(chatbot.url, size=DESKTOP)
        inspect(page, EXAMPLES / "scratched.png")
        assert verdict(page) == "anomalous"
        expect(page.locator(".result table")).to_contain_text("right")
        assert "Yes" in ask(page, "Is there any defect in this picture? If so, where?")
        assert "right" in ask(page, "Where is it?")
        say(page, "right", "scratch from the gripper")
        expect(page.locator("#feedback-said")).to_contain_text("Thank you")
        page.screenshot(path=pictures / "chatbot.png", full_page=True)

        inspect(page, EXAMPLES / "good.png")
        assert verdict(page) == "normal"
        newest, oldest = past(page)
        assert "good.png" in newest
        assert "Right: scratch from the gripper" in oldest
        page.locator("#past img").last.scroll_into_view_if_needed()
        page.screenshot(path=pictures / "chatbot-history.png", full_page=True)

        phone = visit(f"{chatbot.url}/ko/", language="ko-KR", size=PHONE)
        inspect(phone, EXAMPLES / "scratched.png")
        assert verdict(phone) == "이상"
        phone.screenshot(path=pictures / "chatbot-phone.png", full_page=True)


def test_a_product_is_learned_from_good_parts_and_compared_with(server: Server, visit, tmp_path):
    if httpx.get(f"{server.url}/references").status_code == 404:
        pytest.skip("this server keeps no products yet")
    good = [tmp_path / f"good-{seed}.png" for seed in range(20)]
    for seed, path in enumerate(good):
        good_part(seed).save(path)
    bad = tmp_path / "bad.png"
    scratched_part(99).save(bad)
    with running_chatbot(tmp_path, server.url) as chatbot:
        page = visit(chatbot.url)
        add_product(page, "steel-sheet", good)
        expect(page.locator("#products table")).to_contain_text("steel-sheet")
        choose_product(page, "steel-sheet")
        inspect(page, bad)
        assert verdict(page) == "anomalous"
        expect(page.locator(".result dl")).to_contain_text("steel-sheet")
        expect(page.locator(".result dl")).to_contain_text("p-value")
        assert "Yes" in ask(page, "Is there any defect in this picture? If so, where?")
        assert "steel-sheet" in past(page)[0]
