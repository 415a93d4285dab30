"""Fixtures of the tests that ask a server."""

from collections.abc import Iterator

import pytest

from tests.serving import Server, running_server


@pytest.fixture(scope="package")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two API processes, each remembering a few inspections; a worker that keeps a megabyte."""
    log = tmp_path_factory.mktemp("two-processes") / "log"
    with running_server(
        log,
        *("nano", "--dtype", "float32", "--api-server-count", "2", "--enforce-eager"),
        LOOKTWICE_FINDINGS_CACHED_MB="1",
        LOOKTWICE_EMBEDDINGS_CACHED_MB="1",
        LOOKTWICE_REFERENCES=str(log.parent / "references"),
        LOOKTWICE_MAX_REFERENCES="2",
        LOOKTWICE_REFERENCE_TOKENS_MB="8",
    ) as running:
        yield running
