"""The clients' wire server, which can go away, be busy, and answer nobody before all have asked."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus

from tests.clients.conftest import WireHandler, WireServer


class PlantHandler(WireHandler):
    server: "PlantServer"

    def parse_request(self) -> bool:
        """Hang up instead of answering, where the server is away."""
        if self.server.away:
            self.close_connection = True
            return False
        return super().parse_request()

    def _admitted(self) -> bool:
        """Turn everybody away, where the server is busy."""
        if self.server.busy is not None:
            self._error(self.server.busy, "too much to do")
            return False
        return super()._admitted()


class PlantServer(WireServer):
    def __init__(self) -> None:
        super().__init__()
        self.RequestHandlerClass = PlantHandler
        self.refresh()

    def refresh(self) -> None:
        """As at the start."""
        self.references.clear()
        self.away = False
        self.busy: HTTPStatus | None = None
        self.version, self.unknown = "9f2c", {"unknown"}
        self.speak.set()
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
