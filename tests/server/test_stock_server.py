"""Stock vLLM on models/nano: its LLaVA-OneVision part needs nothing of ours."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.bad_input_table import QUESTION
from tests.server.wire import ask, chat, good_uri, image
from tests.serving import Server, stock_server

NANO = Path(__file__).parents[2] / "models" / "nano"


@pytest.fixture
def stock(tmp_path: Path) -> Iterator[Server]:
    flags = ("--enforce-eager", "--max-model-len", "2048", "--dtype", "float32")
    with stock_server(tmp_path / "log", NANO, *flags) as server:
        yield server


def test_stock_vllm_answers_about_a_picture_with_nanos_weights(stock: Server) -> None:
    answer = ask(stock, chat(image(good_uri()), QUESTION, max_tokens=24))
    assert answer.status == 200, answer
    [choice] = answer.data["choices"]
    assert choice["message"]["content"].strip()
    assert choice["finish_reason"] in ("stop", "length")
    assert "inspections" not in answer.data
