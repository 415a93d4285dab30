"""The structured report: facts by code, words by the model, and nothing else by the model."""

import asyncio
from typing import Any

import pytest
from PIL import Image

from looktwice_clients import AsyncInspector, InspectionReport, Inspector, ReplyError
from looktwice_clients.report import RESPONSE_FORMAT

RED = Image.new("RGB", (40, 30), (204, 0, 0))


def test_a_report_is_the_inspection_with_words_beside_it(wire: Any) -> None:
    with Inspector() as inspector:
        report = inspector.report(RED, "bottle", map=True, max_tokens=300)
        facts = inspector.inspect(RED, "bottle")
    assert isinstance(report, InspectionReport)
    words = {"summary", "appearance", "advice"}
    assert report.model_dump(exclude=words) == facts.model_dump()
    assert {name: getattr(report, name) for name in words} == {name: name for name in words}
    body = wire.requests[0][1]
    assert (body["response_format"], body["max_tokens"]) == (RESPONSE_FORMAT, 300)


def test_the_async_report_is_the_same(wire: Any) -> None:
    async def run() -> InspectionReport:
        async with AsyncInspector() as inspector:
            return await inspector.report(RED)

    with Inspector() as inspector:
        assert asyncio.run(run()) == inspector.report(RED)


def test_the_model_is_given_words_of_bounded_length_and_nothing_that_decides(wire: Any) -> None:
    properties = RESPONSE_FORMAT["json_schema"]["schema"]["properties"]
    assert set(properties) == {"summary", "appearance", "advice"}
    assert all(p["type"] == "string" and p["maxLength"] <= 200 for p in properties.values())


@pytest.mark.parametrize(
    "words",
    [
        "The part is fine.",
        '{"summary": "a", "appearance": "b"}',
        '{"summary": "a", "appearance": "b", "advice": "c", "verdict": "normal"}',
        '{"summary": "a", "appearance": "b", "advice": 3}',
        '{"summary": "a", "appearance": "b", "advice": "' + "x" * 201 + '"}',
        '{"summary": "a", "appearance": "b", "adv',
        '{"summary": "a", "appearance": "", "advice": "c"}',
        '{"summary": "a\\u001b[2J", "appearance": "b", "advice": "c"}',
    ],
)
def test_words_that_do_not_fit_are_an_error_and_never_a_fact(wire: Any, words: str) -> None:
    wire.words = words
    with Inspector() as inspector, pytest.raises(ReplyError, match="not the report"):
        inspector.report(RED)


def test_a_model_cannot_turn_the_log_around(wire: Any) -> None:
    wire.words = '{"summary": "fine\\u202etxet", "appearance": "b", "advice": "c"}'
    with Inspector() as inspector:
        assert inspector.report(RED).summary == "fine\ufffdtxet"
