"""A server thread that speaks the wire of the design, for the clients' own tests.

Its inspections are computed from the picture that arrives, so that a test can say what must come
back: score = the mean of the red channel / 255. It stands for no model; the tests marked `server`
drive the real one.
"""

import base64
import io
import json
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageOps

from looktwice_clients import Inspector
from tests.serving import Server

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SQUARE_HOLES = EXAMPLES / "plates" / "square_holes.jpg"
DATA_URI = "data:image/"


def red(level: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """A picture whose score is level / 255."""
    return Image.new("RGB", size, (level, 0, 0))


def encoded(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def inspection_of(
    url: str, index: int, request: dict[str, Any], version: str = "9f2c"
) -> dict[str, Any]:
    """The wire's inspection of one picture, whose score is its mean redness."""
    picture = ImageOps.exif_transpose(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))))
    mean = picture.convert("RGB").resize((1, 1), Image.Resampling.BOX)
    level = mean.getpixel((0, 0))[0]
    score = level / 255
    width, height = picture.size
    region = {
        "box": [0, height // 2, width // 2, height],
        "score": score,
        "area": 0.25,
        "position": "bottom left",
    }
    grey = Image.new("L", picture.size, level)
    name = request.get("reference")
    return {
        "id": f"insp_{level}",
        "image": index,
        "score": score,
        "verdict": "anomalous" if score >= 0.5 else "normal",
        "threshold": 0.5,
        "severity": "highly" if score >= 0.7 else "slightly",
        "regions": [region] if score >= 0.5 else [],
        "reference": {"name": name, "version": version} if name else None,
        "p_value": 0.02 if name else None,
        "width": width,
        "height": height,
        "map": {"png": base64.b64encode(encoded(grey)).decode()} if request.get("map") else None,
        "model": "looktwice-test",
        "expert": "0123abcd",
        "created": 1764000000,
    }


def filled(schema: dict[str, Any]) -> str:
    """JSON that fits a schema of texts: each is its own name."""
    assert schema["additionalProperties"] is False
    return json.dumps({name: name for name in schema["properties"]})


def reference_of(name: str, images: int, rate: float) -> dict[str, Any]:
    """The wire's reference object."""
    promised = max(rate, 1 / (images + 1))
    return {
        "object": "reference",
        "name": name,
        "version": "9f2c",
        "images": images,
        "patches": 196 * images,
        "false_alarm_rate": rate,
        "promised_rate": promised,
        "guaranteed_rate": min(1.0, 2 * promised),
        "threshold": -1.5,
        "created": 1764000000,
        "expert": "0123abcd",
        "calibration": "4567cdef",
        "warnings": ["few"] if promised > rate else [],
        "problem": None,
        "thumbnails": None,
    }


class RefusedError(Exception):
    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param = status, param


class WireHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "WireServer"

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/health":
            self._send(200, b"")
        elif self.path == "/v1/models" and self._admitted():
            models = [{"id": self.server.model, "object": "model", "created": 1, "owned_by": "x"}]
            self._json(200, {"object": "list", "data": models})
        elif self.path.startswith("/v1/references") and self.server.looktwice and self._admitted():
            self._references("GET", {})
        else:
            self._error(404, f"no {self.path} here")

    def do_PUT(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, body))
        self._references("PUT", body)

    def do_DELETE(self) -> None:
        self._references("DELETE", {})

    def _references(self, method: str, body: dict[str, Any]) -> None:
        """The routes of references; one keeps the first picture as its thumbnail."""
        path, _, query = self.path.removeprefix("/v1/references").partition("?")
        name, kept = path.lstrip("/"), self.server.references
        if method == "PUT":
            kept[name] = reference_of(name, len(body["images"]), body["false_alarm_rate"])
        if not name:
            self._json(200, {"object": "list", "model": "x", "data": list(kept.values())})
        elif name not in kept:
            self._error(404, f"no reference named {name}")
        elif method == "DELETE":
            del kept[name]
            self._json(200, {"object": "reference.deleted", "name": name, "deleted": True})
        else:
            jpeg = base64.b64encode(encoded(red(9), "JPEG")).decode()
            thumbnails = [jpeg] * kept[name]["images"] if query else None
            self._json(200, kept[name] | {"thumbnails": thumbnails})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._admitted():
            return
        with self.server.counting():
            self.server.requests.append((self.path, body))
            try:
                if self.path == "/v1/inspections" and self.server.looktwice:
                    self._inspections(body)
                elif self.path == "/v1/chat/completions":
                    self._chat(body)
                else:
                    raise RefusedError(404, f"no {self.path} here")
            except RefusedError as refusal:
                self._error(refusal.status, str(refusal), refusal.param)

    def _admitted(self) -> bool:
        key = self.server.key
        if key is None or self.headers["Authorization"] == f"Bearer {key}":
            return True
        self._error(401, "wrong or missing API key")
        return False

    def _inspections(self, body: dict[str, Any]) -> None:
        if not body["images"]:
            raise RefusedError(400, "images: at least one is needed")
        if self.server.broken.get("inspections"):
            self._json(200, self.server.broken["inspections"])
            return
        data = [self._inspect(url, index, body) for index, url in enumerate(body["images"])]
        time.sleep(self.server.delay(data[0]["score"]))
        self._json(200, {"object": "list", "model": self.server.model, "data": data})

    def _inspect(self, url: str, index: int, request: dict[str, Any]) -> dict[str, Any]:
        if not url.startswith(DATA_URI):
            raise RefusedError(400, "this server fetches no addresses")
        if (name := request.get("reference")) in self.server.unknown:
            raise RefusedError(404, f"no reference named {name}", "reference")
        try:
            return inspection_of(url, index, request, self.server.version)
        except OSError as error:
            raise RefusedError(400, f"images[{index}] cannot be read: {error}") from None

    def _chat(self, body: dict[str, Any]) -> None:
        contents = [m["content"] for m in body["messages"] if isinstance(m["content"], list)]
        parts = [part for content in contents for part in content]
        urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
        question = contents[-1][-1]["text"]
        if body["model"] == "gone":
            raise RefusedError(404, "the model 'gone' does not exist", "model")
        if question == "fail":
            raise RefusedError(400, "the prompt is longer than the context")
        asked = body.get("inspection", {})
        inspections = [self._inspect(url, i, asked) for i, url in enumerate(urls)]
        words = f"{question} {len(urls)} pictures, {len(body['messages'])} messages."
        if "response_format" in body:
            words = self.server.words or filled(body["response_format"]["json_schema"]["schema"])
        extra = {"inspections": inspections} if self.server.looktwice else {}
        if body.get("stream"):
            self._stream(words, extra, body.get("n", 1))
            return
        message = {"role": "assistant", "content": words}
        choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
        self._json(200, self._completion("chat.completion", [choice]) | extra)

    def _stream(self, words: str, extra: dict[str, Any], answers: int) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        pieces = words.split(" ")
        for position, word in enumerate(pieces):
            last = position == len(pieces) - 1
            delta = {"content": word if last else f"{word} "}
            delta |= {} if position else {"role": "assistant"}
            for index in range(answers):  # in turn, as vLLM writes several
                choice = {"index": index, "delta": delta, "finish_reason": "stop" if last else None}
                chunk = self._completion("chat.completion.chunk", [choice])
                chunk |= extra if last and index == answers - 1 else {}
                self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
            self.wfile.flush()
            self.server.speak.wait(300)
        usage = self._completion("chat.completion.chunk", [])
        self.wfile.write(f"data: {json.dumps(usage)}\n\ndata: [DONE]\n\n".encode())
        self.close_connection = True

    def _completion(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        head = {"id": "chatcmpl-1", "object": kind, "created": 1, "model": self.server.model}
        return {**head, "choices": choices}

    def _error(self, status: int, message: str, param: str | None = None) -> None:
        kind = "invalid_request_error"
        error = {"message": message, "type": kind, "param": param, "code": status}
        self._json(status, {"error": error})

    def _json(self, status: int, body: object) -> None:
        self._send(status, json.dumps(body).encode())

    def _send(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


class WireServer(ThreadingHTTPServer):
    """The thread's server, with what a test wants to set and to see."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), WireHandler)
        self.model = "looktwice-test"
        self.key: str | None = None
        self.looktwice = True
        self.broken: dict[str, object] = {}
        self.words = ""
        self.version = "9f2c"  # of every reference that a picture is compared with
        self.unknown = {"unknown"}  # names of references that are refused
        self.references: dict[str, dict[str, Any]] = {"bottle": reference_of("bottle", 8, 0.05)}
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.under_way = 0
        self.most_under_way = 0
        self.slowest = 0.0
        self.speak = threading.Event()  # clear it, and streams stop after their first word
        self.speak.set()
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def delay(self, score: float) -> float:
        """Low scores take longest: an unordered client would return them last."""
        return self.slowest * (1 - score)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that gives up closes its connections; anything else is printed."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def counting(self) -> "Counting":
        return Counting(self)


class Counting:
    def __init__(self, server: WireServer) -> None:
        self.server = server

    def __enter__(self) -> None:
        with self.server._lock:
            self.server.under_way += 1
            most = max(self.server.most_under_way, self.server.under_way)
            self.server.most_under_way = most

    def __exit__(self, *_: object) -> None:
        with self.server._lock:
            self.server.under_way -= 1


@pytest.fixture
def plates(server: Server) -> Iterator[str]:
    """The name of a real reference, made of good plates: their holes are round."""
    with Inspector(server.url) as inspector:
        good = sorted((EXAMPLES / "plates" / "good").iterdir())
        yield inspector.references.add("round-holes", good).name
        inspector.references.remove("round-holes")


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Iterator[WireServer]:
    for name in ("LOOKTWICE_API_KEY", "OPENAI_API_KEY", "LOOKTWICE_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    server = WireServer()
    monkeypatch.setenv("LOOKTWICE_URL", server.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()
