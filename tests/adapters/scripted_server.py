"""An OpenAI-compatible server whose answers a test writes, with LookTwice's own routes."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[str, str, Any], tuple[int, Any]]  # method, path, body -> status, reply


@dataclass
class Scripted:
    url: str
    requests: list[tuple[str, str, Any]] = field(default_factory=list)

    def bodies(self, path: str) -> list[Any]:
        return [body for _, asked, body in self.requests if asked == path]


def completion(text: str, **more: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "finish_reason": "stop", "message": message, **more}
    return {
        "id": "c", "object": "chat.completion", "created": 0, "model": "scripted",
        "choices": [choice],
    }  # fmt: skip


def question_in(body: Any) -> str:
    """The words of the last turn."""
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


def pictures_in(body: Any) -> list[str]:
    return [
        part["image_url"]["url"]
        for message in body["messages"]
        if isinstance(message["content"], list)
        for part in message["content"]
        if part["type"] == "image_url"
    ]


@contextmanager
def scripted_server(answer: Answer) -> Iterator[Scripted]:
    """Serve until the block ends; `/v1/models` is answered already."""

    class Handler(BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            running.requests.append((self.command, self.path, body))
            if self.path == "/v1/models":
                status, reply = 200, {"object": "list", "data": [{"id": "scripted"}]}
            else:
                status, reply = answer(self.command, self.path, body)
            content = json.dumps(reply).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_DELETE = handle_any  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running = Scripted(f"http://127.0.0.1:{server.server_port}/v1")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield running
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
