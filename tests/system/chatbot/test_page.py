"""The page in a real browser, against a server that speaks the wire."""

import base64
import itertools
import re
import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, Route, expect

from looktwice_clients.chatbot.database import database_url
from looktwice_clients.chatbot.history import PAGE, History
from looktwice_clients.chatbot.operators import LOGIN, OWNER
from tests.clients.chatbot.rows import inspection
from tests.clients.conftest import encoded, red
from tests.system.chatbot.conftest import DESKTOP, PHONE
from tests.system.chatbot.visit import (
    Chatbot,
    add_product,
    ask,
    choose_product,
    exported,
    give_picture,
    inspect,
    loaded,
    open_tab,
    overlay,
    past,
    running_chatbot,
    say,
    verdict,
)

USERS = 16

GRADIOS_OWN = ("nested-interactive", "#product-pictures")
"""What is wrong in Gradio's own file list, and where: the button for more wraps the file input."""


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    path = tmp_path / "scratched.png"
    path.write_bytes(encoded(red(222, (320, 240))))
    return path


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_a_shift_at_the_page(chatbot, plant, visit, bad, tmp_path, size):
    page = visit(chatbot.url, size=size)
    inspect(page, bad)
    assert verdict(page) == "anomalous"
    expect(page.locator(".result")).to_contain_text("Score 0.871, threshold 0.50")
    expect(page.locator(".result table")).to_contain_text("bottom left")
    picture = page.locator("#overlay img")
    loaded(page, picture)
    assert "anomalous" in picture.get_attribute("alt")

    first = ask(page, "Is it scratched?")
    expect(first).to_have_text("Is it scratched? 1 pictures, 1 messages.")
    expect(ask(page, "Where?")).to_have_text("Where? 1 pictures, 3 messages.")

    good = [tmp_path / f"good {n}.png" for n in range(4)]
    for n, path in enumerate(good):
        path.write_bytes(encoded(red(20 + n)))
    add_product(page, "plate", good)
    expect(page.locator("#products table")).to_contain_text("plate")
    choose_product(page, "plate")
    inspect(page, bad)
    expect(page.locator(".result")).to_contain_text("plate")
    assert plant.requests[-1][1]["reference"] == "plate"

    say(page, "wrong", "shadow, not a scratch")
    expect(page.locator("#feedback-said")).to_contain_text("Thank you")
    inspect(page, good[0])
    expect(page.locator("#opinion input:checked")).to_have_count(0)
    expect(page.locator("#feedback-said")).not_to_contain_text("Thank you")

    page.reload()
    _, newest, oldest = past(page, 3)
    for words in ("scratched.png", "anomalous", "plate", "Wrong: shadow, not a scratch"):
        assert words in newest
    assert "no feedback" in oldest
    picture = page.locator("#past img").nth(1)
    picture.scroll_into_view_if_needed()
    loaded(page, picture)
    page.locator("#past summary").nth(1).click()
    expect(page.locator("#past table").first).to_contain_text("bottom left")

    lines = exported(page)
    assert [line["product"] for line in lines] == ["plate", "plate", ""]
    assert lines[1]["word"] == "shadow, not a scratch"

    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]


def held_back(page: Page, address: str) -> list[Route]:
    """Requests to an address from now on, none of which goes on by itself."""
    held: list[Route] = []
    page.route(address, lambda request: held.append(request))
    return held


def top(page: Page, part: str) -> float:
    """How far below the head of the page a part of it begins, in pixels."""
    return page.locator(part).evaluate("part => part.getBoundingClientRect().top + scrollY")


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_what_arrives_late_moves_nothing_from_under_the_mouse(chatbot, visit, bad, size):
    page = visit(chatbot.url, size=size)
    events = held_back(page, "**/queue/join*")
    page.reload()
    give_picture(page, bad)
    inspect_at = top(page, "button#inspect")
    assert events
    for event in events:
        event.continue_()
    page.unroute("**/queue/join*")

    overlays = held_back(page, "**/file=**/image.png")
    with page.expect_request("**/file=**/image.png"):
        page.locator("button#inspect").click()
    expect(page.locator("#overlay img")).to_have_count(1)
    assert top(page, "button#inspect") == inspect_at
    ask_at = top(page, "button#ask")
    [waiting] = overlays
    waiting.continue_()
    loaded(page, page.locator("#overlay img"))
    assert top(page, "button#ask") == ask_at


def history_of(chatbot: Chatbot) -> Path:
    """Where the chatbot keeps its inspections."""
    return chatbot.log.parent / "looktwice"


def fill_history(chatbot: Chatbot, page: Page, files: list[str]) -> None:
    """Give the page's owner inspections of these files, the newest first."""
    [owner] = [one["value"] for one in page.context.cookies() if one["name"] == OWNER]
    folder = history_of(chatbot)
    history = History(database_url(f"sqlite:///{folder}/chatbot.sqlite", folder), folder)
    for minute, file in enumerate(reversed(files)):
        history.save(inspection(owner, minute, file_name=file))
    history.close()


def test_older_and_newer_go_through_the_history_page_by_page(chatbot, visit):
    page = visit(chatbot.url)
    files = [f"part {number}.png" for number in range(2 * PAGE + 3)]
    fill_history(chatbot, page, files)
    open_tab(page, "History")
    shown, newer, older = (page.locator(at) for at in ("#past h2", "#newer", "#older"))
    expect(shown).to_have_text(files[:PAGE])
    expect(newer).to_be_disabled()
    older.click()
    expect(shown).to_have_text(files[PAGE : 2 * PAGE])
    older.click()
    expect(shown).to_have_text(files[2 * PAGE :])
    expect(page.locator("#past")).to_contain_text("21 to 23 of 23")
    expect(older).to_be_disabled()
    newer.click()
    expect(shown).to_have_text(files[PAGE : 2 * PAGE])
    expect(older).to_be_enabled()
    newer.click()
    expect(shown).to_have_text(files[:PAGE])
    expect(page.locator("#past")).to_contain_text("1 to 10 of 23")
    expect(newer).to_be_disabled()


def test_a_question_that_comes_while_an_answer_is_written_is_asked_after_it(
    chatbot, plant, visit, bad
):
    page = visit(chatbot.url)
    inspect(page, bad)
    plant.speak.clear()
    first = ask(page, "Is it scratched?")
    expect(first).to_have_text("Is")
    page.locator("#question textarea").fill("Where?")
    page.locator("button#ask").dblclick()
    plant.speak.set()
    answers = page.locator("#talk .bot.message")
    expect(answers).to_have_count(2)
    expect(answers.first).to_have_text("Is it scratched? 1 pictures, 1 messages.")
    expect(answers.last).to_have_text("Where? 1 pictures, 3 messages.")
    expect(page.locator("#question textarea")).to_have_value("")
    expect(page.locator("#chat-said")).to_be_empty()


def test_a_question_that_comes_before_the_inspection_is_saved_is_answered(
    chatbot, plant, visit, bad
):
    page = visit(chatbot.url)
    with closing(sqlite3.connect(history_of(chatbot) / "chatbot.sqlite")) as database:
        database.execute("BEGIN EXCLUSIVE")
        inspect(page, bad)
        plant.speak.clear()
        answer = ask(page, "Is it scratched?")
        expect(answer).to_have_text("Is")
    past(page, 1)  # saved by now
    plant.speak.set()
    open_tab(page, "Inspect")
    expect(answer).to_have_text("Is it scratched? 1 pictures, 1 messages.")


def clear_talk(page: Page, bad: Path) -> None:
    page.get_by_role("button", name="Clear").click()


@pytest.mark.parametrize("end", [inspect, clear_talk], ids=["next picture", "cleared"])
def test_an_answer_that_was_ended_stays_away_and_the_next_question_begins_anew(
    chatbot, plant, visit, bad, end
):
    page = visit(chatbot.url)
    inspect(page, bad)
    plant.speak.clear()
    expect(ask(page, "Is it scratched?")).to_have_text("Is")
    end(page, bad)
    answers = page.locator("#talk .bot.message")
    expect(answers).to_have_count(0)
    plant.speak.set()
    expect(ask(page, "Where?")).to_have_text("Where? 1 pictures, 1 messages.")
    expect(answers).to_have_count(1)


def test_sixteen_users_at_once_see_their_own_pictures_alone(chatbot, plant, visit, tmp_path):
    plant.together = threading.Barrier(USERS)
    pages, levels = [], [6 * user for user in range(USERS)]
    for level in levels:
        path = tmp_path / f"user {level}.png"
        path.write_bytes(encoded(red(level)))
        page = visit(chatbot.url)
        give_picture(page, path)
        pages.append(page)
    for page in pages:
        page.locator("button#inspect").click()
    for page, level in zip(pages, levels, strict=True):
        expect(page.locator(".result")).to_contain_text(f"Score {level / 255:.3f}")
        shown = overlay(page)
        assert shown.getpixel((shown.width // 2, 100)) == (level, 0, 0)
        expect(page.locator("[role=alert]")).to_have_count(0)
    assert plant.most_under_way == USERS

    others = []
    for page, level in zip(pages, levels, strict=True):
        [entry] = past(page, 1)
        assert f"user {level}.png" in entry
        others.append(page.locator("#past img").get_attribute("src"))
    for page, other in zip(pages, [*others[1:], others[0]], strict=True):
        assert page.request.get(chatbot.url + other).status == 404


@pytest.mark.parametrize("language", ["en", "ko", "de"])
@pytest.mark.parametrize(
    ("scheme", "size"), list(itertools.product(["light", "dark"], [DESKTOP, PHONE]))
)
def test_the_page_fits_and_has_no_fault_that_axe_finds(chatbot, visit, bad, language, scheme, size):
    page = visit(f"{chatbot.url}/{language}/", size=size)
    page.emulate_media(color_scheme=scheme)
    page.locator("#picture input[type=file]").set_input_files(bad)
    page.wait_for_selector("#picture img")
    page.locator("button#inspect").click()
    page.wait_for_selector(".result table")
    page.wait_for_timeout(500)
    assert page.evaluate("document.documentElement.lang") == language
    for tab in range(3):
        page.get_by_role("tab").nth(tab).click()
        if tab == 2:
            page.locator("#product-pictures input[type=file]").set_input_files(bad)
            expect(page.locator("#product-pictures")).to_contain_text(bad.stem)
        page.wait_for_timeout(1000)
        assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
        faults = Axe().run(page).response["violations"]
        told = [(fault["id"], node["target"]) for fault in faults for node in fault["nodes"]]
        assert [fault for fault in told if not gradios_own(page, *fault)] == []


def gradios_own(page: Page, rule: str, target: list[str]) -> bool:
    known, place = GRADIOS_OWN
    return rule == known and page.locator(place).locator(target[-1]).count() == 1


def test_the_page_is_used_with_the_keyboard_alone(chatbot, visit, bad):
    page = visit(chatbot.url)
    page.on("filechooser", lambda _: None)  # Chromium begins to tell of them a little later
    page.wait_for_selector("header nav")
    give_by_keyboard(page, "#picture button", bad)
    expect(page.locator("#picture img")).to_be_visible()
    press(page, "button#inspect")
    expect(page.locator(".result")).to_be_visible()
    tab_to(page, "#question input, #question textarea")
    page.keyboard.type("Where?")
    page.keyboard.press("Enter")
    expect(page.locator("#talk .bot.message")).to_contain_text("1 messages.")
    press(page, "#opinion input", "Space")
    press(page, "button#send-feedback")
    expect(page.locator("#feedback-said")).to_contain_text("Thank you")

    page.locator("header a").first.focus()
    press(page, "[data-tab-id=history]")
    expect(page.locator("#past article")).to_have_count(1)
    press(page, "button#refresh")
    press(page, "#past summary")
    expect(page.locator("#past table")).to_be_visible()
    page.locator("#refresh").focus()
    with page.expect_download():
        press(page, "a.export")


def test_a_product_is_added_and_chosen_with_the_keyboard_alone(
    chatbot, plant, visit, bad, tmp_path
):
    good = tmp_path / "good.png"
    good.write_bytes(encoded(red(20)))
    page = visit(chatbot.url)
    page.on("filechooser", lambda _: None)
    page.wait_for_selector("header nav")
    press(page, "[data-tab-id=products]")
    tab_to(page, "#product-name input, #product-name textarea")
    page.keyboard.type("lid")
    give_by_keyboard(page, "#product-pictures button", good)
    expect(page.locator("#product-pictures")).to_contain_text("good")
    press(page, "button#add-product")
    expect(page.get_by_role("status").filter(has_text="is ready")).to_be_visible()

    page.locator("header a").first.focus()
    press(page, "[data-tab-id=inspect]")
    tab_to(page, "#product input")
    page.keyboard.type("lid")
    page.keyboard.press("Enter")
    # Gradio takes the choice as the list closes; a Tab in the same millisecond, which no hand
    # types, takes it back.
    expect(page.locator("#product [role=option]")).to_have_count(0)
    give_by_keyboard(page, "#picture button", bad)
    expect(page.locator("#picture img")).to_be_visible()
    press(page, "button#inspect")
    expect(page.locator(".result")).to_contain_text("lid")
    assert plant.requests[-1][1]["reference"] == "lid"


def tab_to(page: Page, selector: str) -> None:
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("s => document.activeElement.matches(s)", selector):
            return
    raise AssertionError(f"{selector} cannot be reached with the keyboard")


def press(page: Page, selector: str, *keys: str) -> None:
    tab_to(page, selector)
    for key in keys or ("Enter",):
        page.keyboard.press(key)


def give_by_keyboard(page: Page, selector: str, file: Path) -> None:
    with page.expect_file_chooser() as chooser:
        press(page, selector)
    chooser.value.set_files(file)


def test_what_happens_is_said_to_screen_readers(chatbot, visit, bad):
    page = visit(chatbot.url)
    inspect(page, bad)
    expect(page.get_by_role("status").filter(has_text="Inspected: anomalous.")).to_be_visible()
    expect(page.get_by_role("img", name="Score 0.871, threshold 0.50")).to_be_visible()
    expect(page.get_by_role("table", name="Suspicious regions")).to_be_visible()


def english(page: Page) -> list[str]:
    """What is seen or heard of the page's buttons in Latin letters."""
    names = page.locator("button:visible, button :visible, [role=log]").evaluate_all(
        "all => all.flatMap(one => [one.ariaLabel, one.title,"
        " ...[...one.childNodes].filter(node => node.nodeType === Node.TEXT_NODE)"
        ".map(node => node.nodeValue)])"
    )
    return [name for name in names if name and re.search("[A-Za-z]{2}", name)]


def test_gradios_own_buttons_speak_the_language_of_the_page_not_of_the_browser(chatbot, visit, bad):
    page = visit(f"{chatbot.url}/ko/", language="en-US")
    expect(page.get_by_label("클립보드에서 붙여넣기")).to_be_visible()
    assert english(page) == []
    page.context.grant_permissions(["camera"])
    page.get_by_label("카메라로 촬영").click()
    page.get_by_role("button").filter(has_text="눌러서 카메라 켜기").click()
    expect(page.get_by_label("촬영", exact=True)).to_be_visible()
    assert english(page) == []
    page.get_by_label("파일 올리기").click()
    inspect(page, bad)
    loaded(page, page.locator("#overlay img"))
    expect(ask(page, "어디?")).to_contain_text("1 messages.")
    assert english(page) == []
    page.get_by_role("tab").nth(2).click()
    expect(page.locator("#product-pictures")).to_contain_text("눌러서 선택")
    assert english(page) == []
    page.locator("#product-pictures input[type=file]").set_input_files(bad)
    expect(page.get_by_label("파일 더 올리기")).to_be_visible()
    assert english(page) == []


def test_a_picture_is_taken_with_the_camera(chatbot, visit):
    page = visit(chatbot.url)
    page.context.grant_permissions(["camera"])
    page.get_by_label("Capture from camera").click()
    page.locator("#picture").get_by_role("button").filter(has_text="Click to Access Webcam").click()
    page.wait_for_function("() => document.querySelector('#picture video')?.videoWidth > 0")
    page.locator("#picture button[aria-label='capture photo']").click()
    expect(page.locator("#picture img")).to_be_visible()
    page.locator("button#inspect").click()
    expect(page.locator(".result")).to_be_visible()


def test_a_picture_is_pasted(chatbot, visit, bad):
    page = visit(chatbot.url)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.wait_for_selector("#picture")
    page.evaluate(
        "async data => { const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0));"
        "await navigator.clipboard.write([new ClipboardItem("
        "{'image/png': new Blob([bytes], {type: 'image/png'})})])}",
        base64.b64encode(bad.read_bytes()).decode(),
    )
    page.get_by_label("Paste from clipboard").click()
    expect(page.locator("#picture img")).to_be_visible()
    page.locator("button#inspect").click()
    expect(page.locator(".result")).to_contain_text("Score 0.871")


def test_a_file_that_is_no_picture_and_a_server_that_went_away_are_told(
    chatbot, plant, visit, bad, tmp_path
):
    page = visit(chatbot.url)
    junk = tmp_path / "junk.png"
    junk.write_text("no picture")
    page.locator("#picture input[type=file]").set_input_files(junk)
    page.wait_for_selector("#picture img", state="attached")
    page.locator("button#inspect").click()
    expect(page.get_by_role("alert")).to_contain_text("junk.png: not a picture")
    page.reload()
    plant.away = True
    give_picture(page, bad)
    page.locator("button#inspect").click()
    expect(page.locator("#said")).to_contain_text("server cannot be reached")


def test_a_file_too_large_for_the_page_is_refused_and_the_next_one_taken(
    chatbot, visit, bad, tmp_path
):
    large = tmp_path / "large.png"
    with large.open("wb") as file:
        file.truncate(500_000_000)
    page = visit(chatbot.url)
    page.locator("#picture input[type=file]").set_input_files(large)
    expect(page.get_by_text("exceed the maximum allowed size").first).to_be_visible()
    page.reload()
    inspect(page, bad)


def test_with_a_key_one_logs_in_first(plant, visit, bad, tmp_path):
    with running_chatbot(tmp_path, plant.url, "--key", "a key of the plant") as chatbot:
        _log_in_and_out(visit(chatbot.url), bad)


def _log_in_and_out(page: Page, bad: Path) -> None:
    assert Axe().run(page).response["violations"] == []
    page.get_by_label("Your name").fill("Kim")
    page.get_by_label("Key of this plant").fill("a wrong key")
    page.get_by_role("button").click()
    expect(page.get_by_role("alert")).to_contain_text("not right")
    page.get_by_label("Your name").fill("Kim")
    page.get_by_label("Key of this plant").fill("a key of the plant")
    page.get_by_role("button").click()
    inspect(page, bad)
    assert "Kim" in page.locator("header").inner_text()
    [ticket] = [one for one in page.context.cookies() if one["name"] == LOGIN]
    page.context.clear_cookies(name=LOGIN)  # as when it ended
    page.locator("button#ask").click()
    expect(page.get_by_text("You are signed out. Reload the page")).to_be_visible()
    page.context.add_cookies([ticket])
    page.reload()
    past(page, 1)
    page.get_by_text("Sign out").click()
    expect(page.get_by_label("Your name")).to_be_visible()
