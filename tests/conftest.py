"""Fixtures shared by all tests."""

import pytest
from openai import OpenAI

from tests.serving import Server, running_server


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
