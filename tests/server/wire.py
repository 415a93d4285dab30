"""What a client sends, as it stands on the wire -> the server's status and JSON."""

import base64
import http.client
import json
from dataclasses import dataclass, field
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from tests.serving import Server

CHAT = "/v1/chat/completions"
INSPECTIONS = "/v1/inspections"
SCRATCHED = Path(__file__).parents[2] / "examples" / "scratched.png"


@dataclass(frozen=True)
class Sent:
    """One request."""

    path: str
    body: Any = None  # bytes as they are; anything else as JSON
    method: str = "POST"
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    data: Any  # the JSON, or the bytes where it is none

    @property
    def error(self) -> dict[str, Any]:
        return self.data["error"]


def ask(server: Server, sent: Sent, *, timeout: float = 60) -> Answer:
    """Send a request and wait for the whole answer."""
    connection = http.client.HTTPConnection(urlsplit(server.root).netloc, timeout=timeout)
    body = sent.body if isinstance(sent.body, bytes) else json.dumps(sent.body)
    headers = {"Content-Type": "application/json"} | sent.headers
    try:
        connection.request(sent.method, sent.path, body, headers)
        response = connection.getresponse()
        content = response.read()
    finally:
        connection.close()
    try:
        return Answer(response.status, json.loads(content))
    except ValueError:
        return Answer(response.status, content)


def events(answer: Answer) -> list[dict[str, Any]]:
    """The chunks of a streamed answer."""
    lines = [line for line in answer.data.decode().split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def image(url: str, **beside: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}, **beside}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def chat(*parts: Any, **keys: Any) -> Sent:
    """A chat with one user message of these parts, greedy and short."""
    return talk([user(*parts)], **keys)


def talk(messages: Any, **keys: Any) -> Sent:
    return Sent(CHAT, {"messages": messages, "max_tokens": 8, "temperature": 0, **keys})


def inspect(*images: Any, **keys: Any) -> Sent:
    return Sent(INSPECTIONS, {"images": list(images), **keys})


def encoded(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """A picture's file."""
    buffer = BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def data_uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


@cache
def scratched(size: tuple[int, int] = (96, 96)) -> Image.Image:
    """The demo's scratched plate, smaller."""
    with Image.open(SCRATCHED) as picture:
        return picture.convert("RGB").resize(size)


@cache
def good_uri() -> str:
    return data_uri(encoded(scratched()))


def findings(inspections: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Inspections without what differs from one to the next of the same picture."""
    return [
        {key: value for key, value in inspection.items() if key not in ("id", "created", "image")}
        for inspection in inspections
    ]
