"""The clients' wire server, with products: `PUT`, `GET` and `DELETE /v1/references`.

It learns nothing: a product is its name and how many pictures came. With a product the score is
that of the picture, as without.
"""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.clients.conftest import WireHandler, WireServer


class PlantHandler(WireHandler):
    server: "PlantServer"

    def parse_request(self) -> bool:
        """Hang up instead of answering, where the server is away."""
        if self.server.away:
            self.close_connection = True
            return False
        return super().parse_request()

    def do_GET(self) -> None:  # noqa: N802  http.server's name
        if self.path != "/v1/references":
            super().do_GET()
        elif not self.server.keeps_products:
            self._error(404, "no /v1/references here")
        elif self._admitted():
            known = list(self.server.products.values())
            self._json(200, {"object": "list", "model": self.server.model, "data": known})

    def do_PUT(self) -> None:  # noqa: N802
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._admitted():
            return
        self.server.requests.append((self.path, body))
        name = self.path.removeprefix("/v1/references/")
        count, asked = len(body["images"]), body["false_alarm_rate"]
        promised = max(asked, 1 / (count + 1))
        self.server.products[name] = {
            "object": "reference",
            "name": name,
            "version": f"{count:08x}",
            "images": count,
            "patches": 196 * count,
            "false_alarm_rate": asked,
            "promised_rate": promised,
            "threshold": 0.5,
            "created": 1764000000,
            "expert": "0123abcd",
            "warnings": ["image 1 looks unlike the others"] if count == 3 else [],
            "thumbnails": None,
        }
        self._json(200, self.server.products[name])


class PlantServer(WireServer):
    def __init__(self) -> None:
        super().__init__()
        self.RequestHandlerClass = PlantHandler
        self.refresh()

    def refresh(self) -> None:
        """As at the start."""
        self.products: dict[str, dict[str, Any]] = {}
        self.keeps_products = True
        self.away = False
        self.together: threading.Barrier | None = None
        self.most_under_way = 0
        self.requests.clear()

    def delay(self, score: float) -> float:
        """Answer nobody before as many have asked as a test wants at once."""
        if self.together is not None:
            self.together.wait(300)
        return super().delay(score)


@contextmanager
def running_plant() -> Iterator[PlantServer]:
    server = PlantServer()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
