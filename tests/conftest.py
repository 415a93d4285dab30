"""Fixtures shared by all tests."""

import pytest
from openai import OpenAI

from tests.serving import Server, running_server

# Fixtures that start one. Tests that start one themselves are marked by hand.
REAL_SERVERS = {"server", "two_processes", "served", "camera_server", "killed", "stock"}


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what asks for a real server, through other fixtures too."""
    for item in items:
        if REAL_SERVERS.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.server)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Server:
    """The one real server of the suite: nano in float32, so that it can be compared with torch."""
    log = tmp_path_factory.mktemp("server") / "log"
    store = str(log.parent / "references")
    with running_server(log, "nano", "--dtype", "float32", LOOKTWICE_REFERENCES=store) as running:
        yield running


@pytest.fixture
def openai_client(server: Server) -> OpenAI:
    return OpenAI(base_url=server.url, api_key="none", max_retries=0)
