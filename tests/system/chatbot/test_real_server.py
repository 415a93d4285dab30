"""The page in a real browser, against the real server on nano; makes the pictures of the docs.

$LOOKTWICE_PICTURES=docs/pictures keeps the screenshots there.
"""

import os
import re
from pathlib import Path

import pytest
from PIL import Image, ImageChops, ImageStat
from playwright.sync_api import expect

from looktwice_clients import Inspector, draw_overlay
from looktwice_clients.chatbot.station import OVERLAY_STYLE
from tests.serving import Server
from tests.system.chatbot.conftest import DESKTOP, PHONE
from tests.system.chatbot.visit import (
    add_product,
    ask,
    choose_product,
    exported,
    give_picture,
    inspect,
    loaded,
    overlay,
    past,
    running_chatbot,
    say,
    verdict,
)

EXAMPLES = Path(__file__).parents[3] / "examples"
USERS = 16
QUESTION = "Is there any defect in this picture? If so, where?"


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
        expect(ask(page, QUESTION)).to_contain_text("Yes")
        expect(ask(page, "Where is it?")).to_contain_text("right")
        say(page, "right", "scratch from the gripper")
        expect(page.locator("#feedback-said")).to_contain_text("Thank you")
        page.screenshot(path=pictures / "chatbot.png", full_page=True)

        inspect(page, EXAMPLES / "good.png")
        assert verdict(page) == "normal"
        newest, oldest = past(page, 2)
        assert "good.png" in newest
        assert "Right: scratch from the gripper" in oldest
        page.locator("#past img").last.scroll_into_view_if_needed()
        page.screenshot(path=pictures / "chatbot-history.png", full_page=True)

        phone = visit(f"{chatbot.url}/ko/", language="ko-KR", size=PHONE)
        inspect(phone, EXAMPLES / "scratched.png")
        assert verdict(phone) == "이상"
        phone.screenshot(path=pictures / "chatbot-phone.png", full_page=True)


def test_sixteen_users_at_once_get_their_own_pictures_results_and_answers(
    server: Server, visit, tmp_path
):
    scratched = Image.open(EXAMPLES / "scratched.png").convert("RGB")
    files = []
    for user in range(USERS):
        part = scratched.rotate(90 * (user % 4))  # the scratch at another place for each fourth
        part = part.point(lambda level, by=1 - 0.02 * (user // 4): round(level * by))
        files.append(tmp_path / f"user {user}.png")
        part.save(files[-1])
    with Inspector(server.url) as inspector:
        expected = list(inspector.inspect_many(files))
    assert len({one.score for one in expected}) == USERS
    drawn = [draw_overlay(*pair, OVERLAY_STYLE) for pair in zip(files, expected, strict=True)]
    with running_chatbot(tmp_path, server.url) as chatbot:
        pages = [visit(chatbot.url) for _ in range(USERS)]
        for page, file in zip(pages, files, strict=True):
            give_picture(page, file)
        for page in pages:
            page.locator("button#inspect").click()
        for page, one in zip(pages, expected, strict=True):
            expect(page.locator(".result")).to_contain_text(f"Score {one.score:.3f}")
        assert [likest(overlay(page), drawn) for page in pages] == list(range(USERS))
        for page in pages:
            page.locator("#question textarea").fill("Where is the defect?")
        for page in pages:
            page.locator("button#ask").click()
        for page, one in zip(pages, expected, strict=True):
            answer = page.locator("#talk .bot.message")
            expect(answer).to_contain_text(f"here: {one.regions[0].position}.")
        for page, file in zip(pages, files, strict=True):
            [entry] = past(page, 1)
            assert file.name in entry
            expect(page.locator("[role=alert]")).to_have_count(0)
        assert not re.search("ERROR|Traceback", chatbot.log.read_text())


def likest(shown: Image.Image, pictures: list[Image.Image]) -> int:
    """Which of the pictures is shown: the one that differs least."""
    differences = [sum(ImageStat.Stat(ImageChops.difference(shown, one)).mean) for one in pictures]
    return differences.index(min(differences))


def test_a_product_is_learned_from_good_parts_and_compared_with(
    server: Server, visit, tmp_path, pictures
):
    good, square = (
        sorted((EXAMPLES / "plates/good").iterdir()),
        EXAMPLES / "plates/square_holes.jpg",
    )
    with running_chatbot(tmp_path, server.url) as chatbot:
        page = visit(chatbot.url, size=DESKTOP)
        inspect(page, square)
        assert verdict(page) == "normal"
        add_product(page, "punched-plate", good)
        expect(page.locator("#product-said")).to_contain_text(
            "asked 5.0 %; 6 pictures can promise 14.3 %"
        )
        expect(page.locator("#products table")).to_contain_text("punched-plate")
        page.screenshot(path=pictures / "chatbot-products.png", full_page=True)

        choose_product(page, "punched-plate")
        inspect(page, square)
        assert verdict(page) == "anomalous"
        expect(page.locator(".result dl")).to_contain_text("punched-plate")
        expect(page.locator(".result dl")).to_contain_text("p-value0.143")
        expect(ask(page, QUESTION)).to_contain_text("Yes")
        against, alone = past(page, 2)
        assert "punched-plate" in against
        assert "punched-plate" not in alone


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_a_shift_at_the_page_of_the_real_server(server: Server, visit, tmp_path, size):
    plate = f"plate-{size['width']}"
    with running_chatbot(tmp_path, server.url) as chatbot:
        page = visit(chatbot.url, size=size)
        inspect(page, EXAMPLES / "scratched.png")
        assert verdict(page) == "anomalous"
        loaded(page, page.locator("#overlay img"))
        expect(ask(page, QUESTION)).to_contain_text("Yes")
        expect(ask(page, "Where is it?")).to_contain_text("right")

        add_product(page, plate, sorted((EXAMPLES / "plates/good").iterdir()))
        choose_product(page, plate)
        inspect(page, EXAMPLES / "plates/square_holes.jpg")
        assert verdict(page) == "anomalous"
        loaded(page, page.locator("#overlay img"))
        say(page, "right", "square holes")
        expect(page.locator("#feedback-said")).to_contain_text("Thank you")

        page.reload()
        newest, oldest = past(page, 2)
        for words in ("square_holes.jpg", "anomalous", plate, "Right: square holes"):
            assert words in newest
        assert "scratched.png" in oldest
        picture = page.locator("#past img").last
        picture.scroll_into_view_if_needed()
        loaded(page, picture)
        told = ("file", "product", "verdict", "feedback", "word")
        assert [tuple(line[name] for name in told) for line in exported(page)] == [
            ("square_holes.jpg", plate, "anomalous", "right", "square holes"),
            ("scratched.png", "", "anomalous", "", ""),
        ]
        assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
