"""What the page's buttons do, without a browser, against the plant's server."""

import asyncio
import errno
import itertools
import threading
import time
from collections.abc import AsyncIterator, Callable
from http import HTTPStatus
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
from gradio.utils import get_upload_folder
from PIL import Image

from looktwice_clients.chatbot import fragments, station
from looktwice_clients.chatbot.history import PAGE
from looktwice_clients.chatbot.station import Session, Station
from looktwice_clients.chatbot.wording import wording
from looktwice_clients.errors import DatabaseError
from looktwice_clients.inspector import AsyncInspector
from tests.clients import conftest
from tests.clients.chatbot.rows import inspection
from tests.clients.conftest import WireHandler, encoded, red, reference_of

KIM = SimpleNamespace(request=SimpleNamespace(scope={"owner": "kim", "operator": "Kim"}))


@pytest.fixture
def play(plant, history) -> Callable[[Callable[[Station], Any]], Any]:
    """Run `act(station)` to its end, in one event loop with the station's connections."""

    def run(act, language="en", url=plant.url, timeout=60.0):
        async def session():
            inspector = AsyncInspector(url, timeout=timeout, max_retries=0)
            try:
                return await act(Station(inspector, history, wording(language)))
            finally:
                await inspector.close()

        return asyncio.run(session())

    return run


@pytest.fixture
def scratched(tmp_path: Path) -> str:
    path = tmp_path / "scratched.png"
    path.write_bytes(encoded(red(222)))
    return str(path)


async def last(steps: AsyncIterator[tuple[Any, ...]]) -> list[Any]:
    """The page after an event: the newest value of every output that was not skipped."""
    page: list[Any] = []
    async for step in steps:
        page = page or [None] * len(step)
        page = [
            old if isinstance(new, dict) and new.get("__type__") == "update" else new
            for old, new in zip(page, step, strict=True)
        ]
    return page


async def inspected(
    station: Station, picture: str, product: str = "", before: Session | None = None
) -> list[Any]:
    return await last(station.inspect(picture, product, before, KIM))


def test_an_inspection_shows_verdict_score_regions_and_is_in_the_history(play, history, scratched):
    said, overlay, result, session, talk, *_ = play(lambda s: inspected(s, scratched))
    assert "Inspected: anomalous." in said
    assert overlay.value is not None
    for words in (
        "anomalous",
        "Score 0.871, threshold 0.50",
        "bottom left",
        "x\N{NO-BREAK SPACE}0\N{NON-BREAKING HYPHEN}20",
        "y\N{NO-BREAK SPACE}15\N{NON-BREAKING HYPHEN}30",
    ):
        assert words in result
    assert talk == []
    [entry], _ = history.page("kim")
    assert entry.inspection.id == session.row.id
    assert (entry.inspection.file_name, entry.inspection.operator) == ("scratched.png", "Kim")


def test_the_overlay_is_compressed_outside_the_event_loop(play, scratched, monkeypatch):
    save, threads = Image.Image.save, set()

    def noted(picture, file, kind, **options):
        threads.add(threading.current_thread())
        save(picture, file, kind, **options)

    monkeypatch.setattr(Image.Image, "save", noted)
    overlay = play(lambda s: inspected(s, scratched))[1]
    assert threading.main_thread() not in threads
    path = Path(overlay.value["path"])
    assert path.is_relative_to(get_upload_folder())
    assert Image.open(path).format == "PNG"


def test_an_overlay_that_cannot_be_written_is_told(play, scratched, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(station, "save_pil_to_cache", full)
    said, *_ = play(lambda s: inspected(s, scratched))
    assert "No space left on device" in said
    assert "problem" in said


def test_an_undecided_verdict_says_what_to_do():
    row = inspection(verdict="undecided", regions=[])
    shown = fragments.result(wording("en"), row)
    assert "undecided" in shown
    assert "let a person look, and add more good pictures" in shown
    assert "let a person look" not in fragments.result(wording("en"), inspection())


@pytest.mark.parametrize(
    ("language", "verdict", "place"),
    [("ko", "이상", "왼쪽 아래"), ("de", "auffällig", "unten links")],
)
def test_the_result_is_in_the_pages_language(play, scratched, language, verdict, place):
    page = play(lambda s: inspected(s, scratched), language)
    assert verdict in page[0]
    assert place in page[2]


def test_the_product_goes_to_the_server_with_picture_and_questions(play, plant, scratched):
    async def act(station):
        page = await inspected(station, scratched, "bottle")
        await last(station.ask("Where?", page[3]))
        return page

    page = play(act)
    assert "bottle" in page[2]
    assert "0.020" in page[2]
    (_, looked), (_, chat) = plant.requests
    assert looked["reference"] == "bottle"
    assert chat["inspection"]["reference"] == "bottle"


def test_answers_grow_and_follow_up_questions_remember_the_talk(play, scratched):
    async def act(station):
        session = (await inspected(station, scratched))[3]
        seen = []
        async for _, talk, _ in station.ask("Is it scratched?", session):
            if isinstance(talk, list):
                seen.append(talk[-1]["content"])
        return seen, await last(station.ask("Where?", session))

    seen, (_, talk, _) = play(act)
    assert seen[0] == ""
    assert len(seen) > 3
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(seen))
    assert seen[-1] == "Is it scratched? 1 pictures, 1 messages."
    assert [turn["role"] for turn in talk] == ["user", "assistant"] * 2
    assert talk[-1]["content"] == "Where? 1 pictures, 3 messages."


@pytest.mark.parametrize(
    ("language", "changed", "removed"),
    [
        ("en", "follows the new verdict (anomalous)", "product bottle has been removed"),
        ("de", "dem neuen Urteil (auffällig)", "Produkt bottle wurde entfernt"),
        ("ko", "새 판정(이상)", "제품 bottle이(가) 삭제되어"),
    ],
)
def test_a_product_that_changed_since_the_inspection_is_told_with_the_answer(
    play, plant, scratched, language, changed, removed
):
    async def act(station):
        session = (await inspected(station, scratched, "bottle"))[3]
        same = await last(station.ask("Where?", session))
        plant.version = "51ab"
        replaced = await last(station.ask("Where?", session))
        plant.unknown.add("bottle")
        return same, replaced, await last(station.ask("Where?", session))

    same, replaced, gone = play(act, language)
    assert same[0] == ""
    assert changed in replaced[0]
    assert "problem" in replaced[0]
    assert replaced[1][-1]["content"].startswith("Where?")
    assert removed in gone[0]
    assert gone[1:] == [replaced[1], "Where?"]


def test_a_verdict_that_changed_without_a_product_is_told_too(play, scratched):
    async def act(station):
        session = (await inspected(station, scratched))[3]
        session.row.verdict = "normal"  # as another model had found
        return await last(station.ask("Where?", session))

    assert "follows the new verdict (anomalous)" in play(act)[0]


def test_the_second_click_of_two_changes_nothing(play, scratched):
    async def act(station):
        session = (await inspected(station, scratched))[3]
        await last(station.ask("Where?", session))
        return [step async for step in station.ask("", session)]

    assert play(act) == [(gr.skip(),) * 3]


def test_a_cleared_talk_begins_anew_about_the_same_picture(play, scratched):
    async def act(station):
        session = (await inspected(station, scratched))[3]
        await last(station.ask("One?", session))
        await station.forget(session)
        return await last(station.ask("Two?", session))

    assert play(act)[1][-1]["content"] == "Two? 1 pictures, 1 messages."


def test_a_talk_that_is_cleared_while_an_answer_is_written_stays_clear(play, scratched):
    async def act(station):
        session = (await inspected(station, scratched))[3]
        asking = station.ask("one two three", session)
        _, piece = [await anext(asking) for _ in range(2)]
        await station.forget(session)
        rest = [step async for step in asking]
        return piece[1][-1]["content"], rest, session.talk, session.conversation.messages

    assert play(act) == ("one ", [(gr.skip(), [], gr.skip())], [], [])


@pytest.mark.parametrize("question", ["one two three", "fail"])
def test_the_next_picture_ends_what_is_written_about_the_last_one(play, scratched, question):
    async def act(station):
        session = (await inspected(station, scratched))[3]
        asking = station.ask(question, session)
        await anext(asking)
        await inspected(station, scratched, before=session)
        return [step async for step in asking]

    assert play(act) == [(gr.skip(), [], gr.skip())]


def test_a_question_that_fails_stays_to_be_asked_again(play, scratched):
    async def act(station):
        session = (await inspected(station, scratched))[3]
        return await last(station.ask("fail", session))

    said, talk, question = play(act)
    assert "longer than the context" in said
    assert talk == []
    assert question == "fail"


def test_feedback_goes_into_the_history_with_the_operators_word(play, history, scratched):
    async def act(station):
        session = (await inspected(station, scratched))[3]
        return await station.feedback("wrong", " dust\x00 ", session)

    assert "Thank you" in play(act)
    [entry], _ = history.page("kim")
    assert (entry.feedback.right, entry.feedback.word) == (False, "dust\ufffd")
    assert entry.feedback.operator == "Kim"


def test_the_next_picture_begins_without_the_last_ones_talk_and_feedback(play, scratched):
    async def act(station):
        session = (await inspected(station, scratched))[3]
        await last(station.ask("Where?", session))
        return await inspected(station, scratched)

    assert play(act)[4:] == [[], None, "", ""]


def test_what_is_missing_is_asked_for(play, scratched):
    async def act(station):
        session = (await inspected(station, scratched))[3]
        return [
            (await last(station.inspect(None, "", session, KIM)))[0],
            (await last(station.ask("Where?", None)))[0],
            (await last(station.ask("  ", session)))[0],
            await station.feedback("right", "", None),
            await station.feedback(None, "", session),
            (await last(station.add("../x", ["a.png"], 0.05, False)))[0],
            (await last(station.add("plate", None, 0.05, False)))[0],
        ]

    notices = play(act)
    expected = ("no picture", "Inspect a picture", "Type a question", "Inspect a picture")
    expected += ("right or wrong", "letter or digit", "pictures of good parts")
    for notice, words in zip(notices, expected, strict=True):
        assert words in notice
        assert "problem" in notice


def test_a_file_that_is_no_picture_is_named_without_its_path(play, tmp_path):
    note = tmp_path / "note.png"
    note.write_text("no picture")
    for said, *_ in (
        play(lambda s: inspected(s, str(note))),
        play(lambda s: last(s.add("plate", [str(note)], 0.05, False))),
    ):
        assert "cannot be used: note.png: not a picture" in said
        assert str(tmp_path) not in said


BAD = {
    "missing": None,
    "empty": b"",
    "not_picture": b"no picture",
    "svg": b"<svg/>",
    "pdf": b"%PDF-1.7",
    "heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    "unreadable": encoded(Image.new("1", (20_000, 20_000))),
}


@pytest.mark.parametrize("code", BAD)
def test_what_is_wrong_with_a_picture_is_told_in_the_pages_language(play, tmp_path, code):
    path = tmp_path / "part: 1.png"
    if BAD[code] is not None:
        path.write_bytes(BAD[code])
    for language in ("en", "ko", "de"):
        words = wording(language)
        told = fragments.notice(
            words("error.picture", detail=f"part: 1.png: {words(f'picture.{code}')}"), problem=True
        )
        assert play(lambda s: inspected(s, str(path)), language)[0] == told


def test_a_server_that_is_away_or_refuses_is_told_in_the_pages_language(play, plant, scratched):
    away = play(lambda s: inspected(s, scratched), "de", "http://127.0.0.1:9/v1")
    assert "Prüfserver ist nicht erreichbar" in away[0]
    plant.key = "another"
    refused = play(lambda s: inspected(s, scratched), "ko")
    assert "키를 거부했습니다" in refused[0]


def test_a_server_that_does_not_answer_in_time_is_told(play, plant, scratched):
    plant.slowest = 20.0
    said, *_ = play(lambda s: inspected(s, scratched), timeout=0.5)
    assert "did not answer in time" in said


def test_a_product_may_take_longer_to_learn_than_a_picture_to_inspect(
    play, plant, scratched, monkeypatch
):
    learn = WireHandler.do_PUT

    def slowly(handler):
        time.sleep(2)
        learn(handler)

    monkeypatch.setattr(WireHandler, "do_PUT", slowly)
    said, *_ = play(lambda s: last(s.add("plate", [scratched], 0.05, False)), timeout=1.0)
    assert "plate is ready" in said


@pytest.mark.parametrize("status", [HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE])
def test_a_busy_server_is_told_and_the_question_stays(play, plant, scratched, status):
    async def act(station):
        session = (await inspected(station, scratched))[3]
        plant.busy = status
        return await inspected(station, scratched), await last(station.ask("Where?", session))

    (said, *_), (sorry, talk, question) = play(act)
    assert "server is busy. Try again in a moment." in said
    assert "answer was cut off: The inspection server is busy." in sorry
    assert (talk, question) == ([], "Where?")


def test_a_server_whose_products_cannot_be_listed_is_told_beside_the_choice(play, plant):
    hint = wording("en")("inspect.product_hint")
    assert play(lambda s: s.known())[0].info == hint
    plant.looktwice = False
    choice, listed = play(lambda s: s.known())
    assert "server refused" in choice.info
    assert "server refused" in listed


def test_a_product_is_added_warned_of_and_not_replaced_unasked(play, plant, scratched):
    async def act(station):
        first = await last(station.add("plate", [scratched] * 3, 0.05, False))
        again = await last(station.add("plate", [scratched], 0.05, False))
        over = await last(station.add("plate", [scratched] * 30, 0.05, True))
        return first, again, over

    first, again, over = play(act)
    assert "may be flagged: asked 5.0 %; 3 pictures can promise 25.0 %." in first[0]
    assert "Too few pictures to promise 5.0 %: what is flagged follows an estimate." in first[0]
    assert "Please check: few" in first[0]
    assert ("plate", "plate") in first[1].choices
    assert "<td>3</td><td>5.0 %</td><td>25.0 %</td>" in first[2]
    assert "already" in again[0]
    assert "problem" not in over[0]
    assert plant.references["plate"]["images"] == 30


def test_the_pictures_of_a_product_are_named_by_their_files(play, scratched, tmp_path, monkeypatch):
    good = str(tmp_path / "good.png")
    red(9).save(good)
    unlike = reference_of("cup", 2, 0.5) | {"warnings": ["images[1] looks unlike the others"]}
    monkeypatch.setattr(conftest, "reference_of", lambda *_: unlike)
    warned = play(lambda s: last(s.add("cup", [good, scratched], 0.5, False)))
    assert "images[1] (scratched.png) looks unlike the others" in warned[0]

    def refuse(handler):
        handler.rfile.read(int(handler.headers["Content-Length"]))
        handler._error(400, "images[0]: it is too small")

    monkeypatch.setattr(WireHandler, "do_PUT", refuse)
    refused = play(lambda s: last(s.add("jar", [good, scratched], 0.5, False)))
    assert "refused: images[0] (good.png): it is too small" in refused[0]


def test_a_product_that_cannot_be_used_is_told_and_not_offered(play, plant):
    plant.references["old"] = reference_of("old", 4, 0.05) | {"problem": "add 'old' again"}
    choice, listed = play(lambda s: s.known())
    assert "old" not in dict(choice.choices)
    assert "Please check: add &#x27;old&#x27; again" in listed


def test_a_history_that_cannot_be_written_is_told_and_the_result_stays(
    play, history, scratched, monkeypatch
):
    def broken(*_):
        raise DatabaseError("disk full")

    monkeypatch.setattr(history, "save", broken)
    page = play(lambda s: inspected(s, scratched))
    assert "disk full" in page[0]
    assert "anomalous" in page[2]


def test_behind_a_full_last_page_there_is_nothing_older(play, history):
    for minute in range(2 * PAGE):
        history.save(inspection("kim", minute))
    first, last_one = play(lambda s: asyncio.gather(s.newest(KIM), s.older(0, KIM)))
    assert [button.interactive for button in first[2:]] == [False, True]
    assert [button.interactive for button in last_one[2:]] == [True, False]


def test_nothing_that_came_from_elsewhere_becomes_html(play, history, tmp_path):
    path = tmp_path / "<img src=x>.png"
    path.write_bytes(encoded(red(222)))
    result = play(lambda s: inspected(s, str(path), "<b>product</b>"))[2]
    past = play(lambda s: s.past(0, KIM))[0]
    assert "<b>product" not in result + past
    assert "<img src=x>" not in past
    assert "&lt;img src=x&gt;.png" in past
