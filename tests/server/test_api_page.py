"""docs/api.md is what the running server says of itself."""

import json
import urllib.request
from pathlib import Path

from looktwice_server.api_page import api_page
from tests.serving import Server

PAGE = Path(__file__).resolve().parents[2] / "docs" / "api.md"


def test_the_api_reference_is_that_of_the_running_server(server: Server) -> None:
    with urllib.request.urlopen(f"{server.root}/openapi.json") as reply:
        spec = json.load(reply)
    assert PAGE.read_text() == api_page(spec), (
        "write it again: python -m looktwice_server.api_page > docs/api.md"
    )
