"""A plant's server, and a history of its own."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from looktwice_clients.chatbot.database import database_url
from looktwice_clients.chatbot.history import History
from tests.clients.chatbot.plant import PlantServer, running_plant


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Iterator[PlantServer]:
    for name in ("LOOKTWICE_API_KEY", "OPENAI_API_KEY", "LOOKTWICE_DATABASE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with running_plant() as server:
        yield server


@pytest.fixture
def history(tmp_path: Path) -> Iterator[History]:
    history = History(database_url(f"sqlite:///{tmp_path}/history.sqlite", tmp_path), tmp_path)
    yield history
    history.close()
