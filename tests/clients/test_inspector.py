import asyncio
import io
import itertools
import threading
import time
from collections.abc import Iterator
from inspect import GEN_CREATED, getgeneratorstate
from typing import Any

import httpx2
import openai
import pytest
from PIL import Image

from looktwice_clients import (
    AsyncInspector,
    ImageError,
    Inspector,
    LookTwiceError,
    ReplyError,
)


def red(level: int) -> Image.Image:
    """What the wire fixture's server gives the score level / 255."""
    return Image.new("RGB", (40, 30), (level, 0, 0))


LEVELS = [250, 10, 130, 0, 255, 64, 200, 127, 128, 3, 90, 17]


def test_inspect_returns_the_servers_facts(wire: Any) -> None:
    with Inspector() as inspector:
        inspection = inspector.inspect(red(204))
    assert inspection.score == pytest.approx(0.8)
    assert (inspection.verdict, inspection.severity) == ("anomalous", "highly")
    assert inspection.regions[0].box == (0, 15, 20, 30)
    assert inspection.map is not None
    assert inspection.map.image().getextrema() == (204, 204)
    assert (inspection.reference, inspection.p_value) == (None, None)


def test_inspect_asks_for_the_reference_and_the_map_on_the_wire(wire: Any) -> None:
    with Inspector() as inspector:
        inspection = inspector.inspect(red(10), reference="bottle", map=False)
    path, body = wire.requests[0]
    assert path == "/v1/inspections"
    assert {name: body[name] for name in body if name != "images"} == {
        "map": False,
        "reference": "bottle",
    }
    assert inspection.reference is not None
    assert (inspection.reference.name, inspection.reference.version) == ("bottle", "9f2c")
    assert inspection.map is None


def test_inspect_many_keeps_the_order_within_its_concurrency(wire: Any) -> None:
    wire.slowest = 0.1
    with Inspector() as inspector:
        found = list(inspector.inspect_many(map(red, LEVELS), concurrency=3))
    assert [round(inspection.score * 255) for inspection in found] == LEVELS
    assert 2 <= wire.most_under_way <= 3


def test_inspect_many_async_keeps_the_order_within_its_concurrency(wire: Any) -> None:
    wire.slowest = 0.1

    async def run() -> list[int]:
        async with AsyncInspector() as inspector:
            many = inspector.inspect_many(map(red, LEVELS), concurrency=3)
            return [round(inspection.score * 255) async for inspection in many]

    assert asyncio.run(run()) == LEVELS
    assert 2 <= wire.most_under_way <= 3


class Terminal(io.StringIO):
    """A stderr that is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("terminal", "asked"), [(True, True), (True, False), (False, True)], ids=str
)
def test_inspect_many_shows_its_progress_on_a_terminal_where_asked_to(
    wire: Any, monkeypatch: pytest.MonkeyPatch, terminal: bool, asked: bool
) -> None:
    monkeypatch.setattr("looktwice_clients.inspector.BAR_DELAY", 0.0)
    wire.slowest = 0.2

    async def run() -> None:
        async with AsyncInspector() as inspector:
            async for _ in inspector.inspect_many([red(0)] * 3, concurrency=1, progress=asked):
                pass

    def many() -> None:
        with Inspector() as inspector:
            list(inspector.inspect_many([red(0)] * 3, concurrency=1, progress=asked))

    for ask in (many, lambda: asyncio.run(run())):
        stderr = Terminal() if terminal else io.StringIO()
        monkeypatch.setattr("sys.stderr", stderr)
        ask()
        assert ("2/3" in stderr.getvalue()) == (terminal and asked)


def test_inspect_many_is_faster_than_one_after_another(wire: Any) -> None:
    wire.slowest = 0.2
    with Inspector() as inspector:
        inspector.inspect(red(0))  # the SDK's first request builds its models
        start = time.perf_counter()
        list(inspector.inspect_many([red(0)] * 8, concurrency=8))
    assert time.perf_counter() - start < 8 * 0.2 / 2


def test_inspect_many_reads_an_endless_source_a_little_ahead_and_stops(wire: Any) -> None:
    taken = 0

    def endless() -> Iterator[Image.Image]:
        nonlocal taken
        for level in itertools.cycle(range(256)):
            taken += 1
            yield red(level)

    with Inspector() as inspector:
        many = inspector.inspect_many(endless(), concurrency=2)
        first = list(itertools.islice(many, 5))
        many.close()
    assert [round(inspection.score * 255) for inspection in first] == [0, 1, 2, 3, 4]
    assert taken <= 5 + 2 * 2


@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_inspection_is_handed_out_before_slow_pictures_have_filled_the_queue(
    wire: Any, asynchronous: bool
) -> None:
    taken = 0

    def camera() -> Iterator[Image.Image]:
        nonlocal taken
        for level in range(20):
            taken += 1
            time.sleep(0.3)
            yield red(level)

    async def first() -> None:
        async with AsyncInspector() as inspector:
            await anext(inspector.inspect_many(camera(), concurrency=8))

    if asynchronous:
        asyncio.run(first())
    else:
        with Inspector() as inspector:
            next(inspector.inspect_many(camera(), concurrency=8))
    assert taken < 16


def test_an_inspector_in_use_by_another_thread_is_not_closed(wire: Any) -> None:
    wire.slowest = 3.0
    inspector = Inspector()
    many = inspector.inspect_many([red(0)], concurrency=1)
    reader = threading.Thread(target=list, args=(many,))
    reader.start()
    while getgeneratorstate(many) == GEN_CREATED:
        time.sleep(0.001)
    with pytest.raises(LookTwiceError, match="an inspect_many is being read"):
        inspector.close()
    reader.join()
    inspector.close()


def test_closing_the_inspector_waits_for_the_requests_under_way(
    wire: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, finished = [], []
    inspect = Inspector.inspect

    def noted(self: Inspector, image: Any, *options: Any) -> Any:
        started.append(image)
        result = inspect(self, image, *options)
        finished.append(image)
        return result

    monkeypatch.setattr(Inspector, "inspect", noted)
    wire.slowest = 0.2
    inspector = Inspector()
    many = inspector.inspect_many(map(red, LEVELS), concurrency=4)
    next(many)
    inspector.close()
    assert len(started) == len(finished) < len(LEVELS)
    assert list(many) == []


def test_a_broken_picture_takes_its_place_among_the_results(wire: Any) -> None:
    images = [red(10), "missing.png", b"no picture", truncated(), red(20)]
    with Inspector() as inspector:
        results = list(inspector.inspect_many(images, return_exceptions=True))
    kinds = [type(result).__name__ for result in results]
    assert kinds == ["Inspection", "ImageError", "ImageError", "BadRequestError", "Inspection"]

    async def run() -> list[str]:
        async with AsyncInspector() as inspector:
            many = inspector.inspect_many(images, return_exceptions=True)
            return [type(result).__name__ async for result in many]

    assert asyncio.run(run()) == kinds


def truncated() -> bytes:
    """A PNG whose header is whole: only the server, which decodes it, can tell."""
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "PNG")
    return buffer.getvalue()[:-200]


def test_a_pillow_picture_that_breaks_while_it_is_read_takes_its_place_too(wire: Any) -> None:
    file = io.BytesIO()
    red(9).resize((400, 300)).save(file, "PNG")
    truncated = Image.open(io.BytesIO(file.getvalue()[:-40]))
    images = [red(10), truncated, Image.new("RGB", (0, 0)), red(20)]
    with Inspector() as inspector:
        results = list(inspector.inspect_many(images, return_exceptions=True))
    assert [isinstance(result, ImageError) for result in results] == [False, True, True, False]


def test_without_return_exceptions_the_broken_picture_raises_in_its_turn(wire: Any) -> None:
    with Inspector() as inspector:
        many = inspector.inspect_many([red(10), "missing.png", red(20)])
        assert next(many).score == pytest.approx(10 / 255)
        with pytest.raises(ImageError, match=r"missing\.png"):
            next(many)


@pytest.mark.parametrize("concurrency", [0, -1])
def test_a_concurrency_below_one_is_refused_at_once(concurrency: int) -> None:
    with Inspector("http://127.0.0.1:9/v1") as inspector, pytest.raises(ValueError, match="least"):
        inspector.inspect_many([], concurrency=concurrency)


def test_sync_and_async_return_the_same(wire: Any) -> None:
    async def run() -> Any:
        async with AsyncInspector() as inspector:
            return await inspector.inspect(red(77), "bottle"), await inspector.model()

    with Inspector() as inspector:
        assert asyncio.run(run()) == (inspector.inspect(red(77), "bottle"), inspector.model)


def test_the_sdks_errors_pass_through(wire: Any) -> None:
    wire.key = "secret"
    with Inspector() as inspector, pytest.raises(openai.AuthenticationError):
        inspector.inspect(red(1))
    with Inspector(api_key="secret") as inspector:
        assert inspector.inspect(red(1)).verdict == "normal"
        with pytest.raises(openai.NotFoundError, match="no reference named unknown"):
            inspector.inspect(red(1), reference="unknown")
    with Inspector(wire.url.replace("/v1", "/v2")) as inspector:
        with pytest.raises(openai.AuthenticationError):
            inspector.inspect(red(1))


def test_the_keys_come_from_the_environment(wire: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wire.key = "secret"
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with Inspector() as inspector:
        assert inspector.inspect(red(1)).verdict == "normal"
    monkeypatch.setenv("LOOKTWICE_API_KEY", "another")
    with Inspector() as inspector, pytest.raises(openai.AuthenticationError):
        inspector.inspect(red(1))


def test_the_sdk_repeats_a_request_that_a_busy_server_refused() -> None:
    attempts = []

    def busy_once(request: httpx2.Request) -> httpx2.Response:
        attempts.append(request.url.path)
        if len(attempts) == 1:
            return httpx2.Response(503, headers={"retry-after": "0.01"}, json={"error": {}})
        data = [{"id": "i", "score": 0.1, "verdict": "normal", "width": 4, "height": 3}]
        return httpx2.Response(200, json={"object": "list", "model": "m", "data": data})

    client = httpx2.Client(transport=httpx2.MockTransport(busy_once))
    with Inspector("http://plant/v1", http_client=client) as inspector:
        assert inspector.inspect(red(1)).score == 0.1
    assert attempts == ["/v1/inspections"] * 2


def test_a_server_that_is_not_there_is_a_connection_error() -> None:
    with Inspector("http://127.0.0.1:9/v1", max_retries=0) as inspector:
        with pytest.raises(openai.APIConnectionError):
            inspector.inspect(red(1))


@pytest.mark.parametrize(
    "reply",
    [
        {"object": "list", "data": [{"score": 1}]},
        {"hello": "world"},
        {"object": "list", "model": "m", "data": []},
        [1],
    ],
)
def test_a_reply_off_the_wire_says_so(wire: Any, reply: object) -> None:
    wire.broken["inspections"] = reply or [1]
    if reply == {"object": "list", "model": "m", "data": []}:
        message = "asked for one inspection, got 0"
    else:
        message = "not a list of inspections"
    with Inspector() as inspector, pytest.raises(ReplyError, match=message):
        inspector.inspect(red(1))


@pytest.mark.parametrize(
    ("given", "environment", "url"),
    [
        (None, None, "http://127.0.0.1:8000/v1"),
        (None, "http://plant:9000/v1", "http://plant:9000/v1"),
        ("http://other/v1/", "http://plant:9000/v1", "http://other/v1"),
        ("http://other:81", None, "http://other:81/v1"),
        ("other:81/", None, "http://other:81/v1"),
        ("https://plant/looktwice/v1", None, "https://plant/looktwice/v1"),
    ],
)
def test_the_address_is_option_else_environment_else_this_machine(
    given: str | None, environment: str | None, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOOKTWICE_URL", raising=False)
    if environment:
        monkeypatch.setenv("LOOKTWICE_URL", environment)
    with Inspector(given) as inspector:
        assert inspector.url == url
        assert str(inspector.client.base_url).rstrip("/") == url


@pytest.mark.parametrize("end", ["\n", "\r\n", " "])
def test_a_key_or_address_with_a_line_end_is_the_same(
    wire: Any, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    wire.key = "secret"
    monkeypatch.setenv("LOOKTWICE_API_KEY", "secret" + end)
    monkeypatch.setenv("LOOKTWICE_URL", wire.url + end)
    with Inspector(max_retries=0) as inspector:
        assert inspector.inspect(red(1)).verdict == "normal"


@pytest.mark.parametrize("key", ["gehe\u00efm", "two\nlines"])
def test_a_key_that_cannot_be_sent_is_one_line(key: str) -> None:
    with pytest.raises(LookTwiceError, match="the API key has characters that no key has"):
        Inspector(api_key=key)
