import asyncio
import threading
from typing import Any

import openai
import pytest
from PIL import Image

from looktwice_clients import AsyncInspector, ImageError, Inspector, ReplyError
from looktwice_clients.images import to_wire


def red(level: int) -> Image.Image:
    """What the wire fixture's server gives the score level / 255."""
    return Image.new("RGB", (40, 30), (level, 0, 0))


def test_ask_returns_the_words_with_the_facts_beside_them(wire: Any) -> None:
    with Inspector() as inspector:
        answer = inspector.ask(red(204), "Any defect?", "bottle", max_tokens=7)
    assert answer.text == "Any defect? 1 pictures, 1 messages."
    assert (answer.finish_reason, answer.model) == ("stop", "looktwice-test")
    assert [inspection.score for inspection in answer.inspections] == [pytest.approx(0.8)]
    assert answer.inspections[0].reference is not None
    _, body = wire.requests[0]
    assert body["inspection"] == {"reference": "bottle", "map": False, "grounding": True}
    assert (body["model"], body["max_tokens"]) == ("looktwice-test", 7)


def test_a_callers_own_extra_keys_go_along(wire: Any) -> None:
    with Inspector() as inspector:
        own = {"top_k": 3, "inspection": {"reference_images": [0]}}
        inspector.ask(red(204), "Any defect?", "bottle", extra_body=own)
    _, body = wire.requests[0]
    assert body["top_k"] == 3
    asked = body["inspection"]
    assert (asked["reference"], asked["reference_images"]) == ("bottle", [0])


def test_the_facts_of_an_answer_are_those_of_inspect(wire: Any) -> None:
    with Inspector() as inspector:
        answer = inspector.ask(red(99), "?", map=True, grounding=False)
        assert answer.inspections == [inspector.inspect(red(99))]
    assert wire.requests[0][1]["inspection"] == {"map": True, "grounding": False}


def test_a_conversation_carries_its_pictures_and_turns(wire: Any) -> None:
    with Inspector() as inspector:
        conversation = inspector.chat(red(204))
        first = conversation.send("Any defect?")
        second = conversation.send("And in this one?", red(20))
        third = conversation.send("Sure?")
    assert [answer.text for answer in (first, second, third)] == [
        "Any defect? 1 pictures, 1 messages.",
        "And in this one? 2 pictures, 3 messages.",
        "Sure? 2 pictures, 5 messages.",
    ]
    assert [round(i.score * 255) for i in conversation.inspections] == [204, 20]
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"] * 3
    assert conversation.messages[1]["content"] == first.text


def test_a_conversation_remembers_the_last_inspection_and_can_change_its_reference(
    wire: Any,
) -> None:
    with Inspector() as inspector:
        conversation = inspector.chat(red(204), "bottle")
        assert (conversation.inspection, conversation.reference) == (None, "bottle")
        conversation.send("Any defect?")
        conversation.send("And in this one?", red(20))
        assert conversation.inspection is not None
        assert round(conversation.inspection.score * 255) == 20
        conversation.reference = "capsule"
        conversation.send("Sure?")
        assert conversation.inspection.reference.name == "capsule"
    names = [body["inspection"]["reference"] for _, body in wire.requests]
    assert names == ["bottle", "bottle", "capsule"]


def test_a_streamed_answer_is_the_whole_answer_in_pieces(wire: Any) -> None:
    with Inspector() as inspector:
        conversation = inspector.chat(red(204))
        pieces = conversation.stream("Any defect?")
        with pytest.raises(ReplyError, match="not been read to its end"):
            _ = pieces.answer
        words = list(pieces)
        again = inspector.ask(red(204), "Any defect?")
    assert len(words) == 6
    assert "".join(words) == again.text
    assert pieces.answer == again
    assert conversation.messages[-1] == {"role": "assistant", "content": again.text}


def test_an_async_conversation_says_and_remembers_the_same(wire: Any) -> None:
    async def run() -> tuple[Any, ...]:
        async with AsyncInspector() as inspector:
            conversation = inspector.chat(red(204))
            first = await conversation.send("Any defect?")
            pieces = await conversation.stream("And here?", red(20))
            words = [word async for word in pieces]
            asked = await inspector.ask(red(204), "Any defect?")
            return first, words, pieces.answer, asked, conversation.messages

    first, words, second, asked, messages = asyncio.run(run())
    with Inspector() as inspector:
        conversation = inspector.chat(red(204))
        assert conversation.send("Any defect?") == first == asked
        assert conversation.send("And here?", red(20)) == second
    assert "".join(words) == second.text
    assert messages == conversation.messages


def test_a_failed_turn_is_forgotten_and_its_picture_waits(wire: Any) -> None:
    with Inspector() as inspector:
        conversation = inspector.chat(red(204))
        with pytest.raises(openai.BadRequestError, match="longer than the context"):
            conversation.send("fail")
        assert conversation.messages == []
        assert conversation.send("Again?").text == "Again? 1 pictures, 1 messages."


def test_a_stream_closed_early_is_forgotten(wire: Any) -> None:
    with Inspector() as inspector:
        conversation = inspector.chat(red(204))
        pieces = conversation.stream("one two three four five")
        assert next(iter(pieces)) == "one "
        pieces.close()
        assert conversation.messages == []
        assert conversation.send("Again?").text == "Again? 1 pictures, 1 messages."


def test_a_picture_that_is_attached_while_an_answer_is_written_waits_for_the_next_turn(
    wire: Any,
) -> None:
    with Inspector() as inspector:
        conversation = inspector.chat(red(204))
        for piece in conversation.stream("One?"):
            if piece == "One? ":
                conversation.attach(red(204))
        conversation.send("Two?")
    assert [round(i.score * 255) for i in conversation.inspections] == [204, 204]


def test_an_async_conversation_reads_pictures_beside_the_event_loop(
    wire: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading: list[threading.Thread] = []

    def noted(image: Any) -> str:
        reading.append(threading.current_thread())
        return to_wire(image)

    monkeypatch.setattr("looktwice_clients.conversation.to_wire", noted)

    async def run() -> None:
        async with AsyncInspector() as inspector:
            conversation = inspector.chat(red(204))
            await conversation.send("Any defect?", red(20))
            conversation.attach(red(30))
            pieces = await conversation.stream("And here?", red(40))
            assert [word async for word in pieces][-2:] == ["3 ", "messages."]
            await inspector.ask(red(50), "And here?")
            assert [round(i.score * 255) for i in conversation.inspections] == [204, 20, 30, 40]

    asyncio.run(run())
    assert len(reading) == 5
    assert threading.main_thread() not in reading


def test_an_async_conversation_refuses_a_broken_picture_once(wire: Any) -> None:
    async def run() -> None:
        async with AsyncInspector() as inspector:
            conversation = inspector.chat("missing.png")
            with pytest.raises(ImageError, match=r"missing\.png"):
                await conversation.send("Any defect?")
            assert (await conversation.send("And now?")).inspections == []

    asyncio.run(run())


def test_a_conversation_without_pictures_has_no_inspections(wire: Any) -> None:
    with Inspector() as inspector:
        assert inspector.chat().send("Hello").inspections == []


def test_a_broken_picture_is_refused_when_it_is_attached(wire: Any) -> None:
    with Inspector() as inspector, pytest.raises(ImageError, match=r"missing\.png"):
        inspector.chat("missing.png")
    assert wire.requests == []


@pytest.mark.parametrize("streamed", [False, True])
def test_a_server_without_inspections_is_not_taken_for_looktwice(wire: Any, streamed: bool) -> None:
    wire.looktwice = False
    with Inspector() as inspector:
        conversation = inspector.chat(red(1))
        with pytest.raises(ReplyError, match="is this a LookTwice server"):
            list(conversation.stream("?")) if streamed else conversation.send("?")
    assert conversation.messages == []


def test_the_model_is_asked_for_once_or_named(wire: Any) -> None:
    with Inspector() as inspector:
        assert inspector.model == "looktwice-test"
        wire.model = "another"
        assert inspector.model == "looktwice-test"
    with Inspector(model="named") as inspector:
        inspector.ask(red(1), "?")
    assert wire.requests[-1][1]["model"] == "named"


@pytest.mark.parametrize("streamed", [False, True])
def test_a_server_that_serves_another_model_now_is_asked_for_its_name_again(
    wire: Any, streamed: bool
) -> None:
    wire.model = "gone"
    with Inspector() as inspector:
        assert inspector.model == "gone"
        wire.model = "looktwice-test"
        chat = inspector.chat(red(1))
        words = "".join(chat.stream("?")) if streamed else chat.send("?").text
    assert words == "? 1 pictures, 1 messages."
    assert [body["model"] for _, body in wire.requests] == ["gone", "looktwice-test"]


def test_an_async_conversation_asks_for_the_name_again_too(wire: Any) -> None:
    async def run() -> list[str]:
        wire.model = "gone"
        async with AsyncInspector() as inspector:
            await inspector.model()
            wire.model = "looktwice-test"
            answer = await inspector.ask(red(1), "?")
            inspector._model = "gone"
            pieces = await inspector.chat(red(1)).stream("?")
            return [answer.text, "".join([piece async for piece in pieces])]

    assert asyncio.run(run()) == ["? 1 pictures, 1 messages."] * 2


def test_a_model_that_was_named_is_not_replaced(wire: Any) -> None:
    with Inspector(model="gone") as inspector, pytest.raises(openai.NotFoundError, match="gone"):
        inspector.ask(red(1), "?")


def test_of_several_streamed_answers_the_first_is_the_conversations(wire: Any) -> None:
    with Inspector() as inspector:
        pieces = inspector.chat(red(1), n=2, temperature=1).stream("Any defect?")
        words = "".join(pieces)
    assert words == pieces.answer.text == "Any defect? 1 pictures, 1 messages."
    assert pieces.answer.finish_reason == "stop"
    assert len(pieces.answer.inspections) == 1
