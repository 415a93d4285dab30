"""A plant's server, and rows of the history."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from looktwice_clients.chatbot.database import database_url
from looktwice_clients.chatbot.history import History
from looktwice_clients.chatbot.tables import FeedbackRow, InspectionRow, new_id
from tests.clients.chatbot.plant import PlantServer, running_plant

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)


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


@pytest.fixture
def inspection() -> Callable[..., InspectionRow]:
    def make(owner: str = "a", minute: int = 0, **fields: object) -> InspectionRow:
        region = {"box": [0, 1, 2, 3], "score": 0.9, "area": 0.1, "position": "top left"}
        values = {
            "id": new_id(),
            "owner": owner,
            "operator": "Kim",
            "created": NOON + timedelta(minutes=minute),
            "file_name": "part.png",
            "product": "bottle",
            "product_version": "9f2c",
            "verdict": "anomalous",
            "score": 0.87,
            "threshold": 0.5,
            "severity": "highly",
            "p_value": 0.02,
            "regions": [region],
            "width": 40,
            "height": 30,
            "model": "looktwice-test",
            "expert": "0123abcd",
            "overlay": b"jpeg of " + owner.encode(),
        }
        return InspectionRow(**(values | fields))

    return make


@pytest.fixture
def feedback() -> Callable[..., FeedbackRow]:
    def make(row: InspectionRow, minute: int = 0, **fields: object) -> FeedbackRow:
        values = {
            "id": new_id(),
            "inspection_id": row.id,
            "created": NOON + timedelta(minutes=minute),
            "operator": "Kim",
            "right": True,
            "word": "",
        }
        return FeedbackRow(**(values | fields))

    return make
