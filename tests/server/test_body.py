"""Bodies: limited in size however they come, and refusals that name the key."""

from collections.abc import Iterator

import pytest
from fastapi import APIRouter, FastAPI
from starlette.testclient import TestClient

from looktwice_server import body
from looktwice_server.body import CheckedRoute, parse_object, shown
from looktwice_server.errors import RequestError, request_error_response
from looktwice_server.messages import checked_messages
from looktwice_server.schemas import InspectionsRequest
from looktwice_server.settings import Settings


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> TestClient:
    """An app with one checked route that takes a megabyte and says how many images came."""
    monkeypatch.setattr(body, "served", lambda: Settings(max_request_mb=1))
    router = APIRouter(route_class=CheckedRoute)

    @router.post("/")
    def count(request: InspectionsRequest) -> int:
        return len(request.images)

    app = FastAPI()
    app.include_router(router)
    app.add_exception_handler(RequestError, request_error_response)
    return TestClient(app)


def in_pieces(size: int) -> Iterator[bytes]:
    """A body of this size whose length is not said beforehand."""
    yield b'{"images": ["'
    for _ in range(size // 1000):
        yield b"x" * 1000
    yield b'"]}'


def test_a_body_in_pieces_is_taken_up_to_the_limit(client: TestClient) -> None:
    headers = {"Content-Type": "application/json"}
    assert client.post("/", content=in_pieces(1_000_000), headers=headers).json() == 1
    refused = client.post("/", content=in_pieces(1_100_000), headers=headers)
    assert refused.status_code == 413
    assert refused.json()["error"]["message"].startswith("the request is larger than 1 MB")


@pytest.mark.parametrize(
    ("body", "says", "param"),
    [
        ({}, "the key images is missing; add it", "images"),
        ({"images": ["a"], "mop": 1}, "unknown key 'mop' in the request; it takes images, ", "mop"),
        ({"images": ["a"], "map": "yes"}, "map should be true or false, got 'yes'", "map"),
        ({"images": []}, "images should have at least 1 item, got a list of 0", "images"),
        ({"images": {}}, "images should be a valid list, got an object", "images"),
    ],
)
def test_a_refusal_is_a_sentence_about_the_key(
    client: TestClient, body: dict[str, object], says: str, param: str
) -> None:
    error = client.post("/", json=body).json()["error"]
    assert error["message"].startswith(says)
    assert error["param"] == param


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"a": NaN}', b'{"a": -1e999}', b"\xff{}"])
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(RequestError):
        parse_object(body)


def test_half_a_surrogate_in_bytes_is_not_utf_8() -> None:
    with pytest.raises(RequestError, match="not valid UTF-8"):
        parse_object(b'{"url": "http:///\xed\xa0\x80"}')


def test_whole_surrogate_pairs_are_read_and_halves_are_not() -> None:
    assert parse_object(b'{"a": "\\ud83d\\ude00"}') == {"a": "\U0001f600"}
    with pytest.raises(RequestError, match="half of a surrogate pair"):
        parse_object(b'{"a": {"\\ude00": 1}}')


def test_what_was_sent_is_shown_short() -> None:
    assert len(shown("x" * 10**6)) < 50
    assert len(shown(10**1000)) < 50
    assert shown([1, 2]) == "a list of 2"
    assert shown({}) == "an object"
    assert shown(None) == "null"
    assert shown(False) == "false"


def test_messages_that_are_nested_too_deeply_are_refused() -> None:
    name: object = "x"
    for _ in range(5000):
        name = [name]
    with pytest.raises(RequestError, match="nested too deeply"):
        checked_messages([{"role": "user", "content": "hello", "name": name}], 1)
