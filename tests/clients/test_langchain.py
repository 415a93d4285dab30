"""The LangChain tool and chat model: LangChain's own suites, then what they promise themselves."""

import asyncio
import base64
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from langchain_core.messages import AIMessageChunk, HumanMessage, ToolMessage
from langchain_core.tools import BaseTool, ToolException
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests, ToolsUnitTests
from PIL import Image

from looktwice_clients import Inspection
from looktwice_clients.images import MAX_BYTES, to_wire
from looktwice_clients.langchain_chat import ChatLookTwice
from looktwice_clients.langchain_tool import InspectionTool
from tests.clients.conftest import EXAMPLES
from tests.serving import Server


class TestInspectionToolConforms(ToolsUnitTests):
    @property
    def tool_constructor(self) -> type[BaseTool]:
        return InspectionTool

    @property
    def tool_constructor_params(self) -> dict[str, Any]:
        return {"url": "http://127.0.0.1:8000/v1", "roots": [Path("line3")]}

    @property
    def tool_invoke_params_example(self) -> dict[str, Any]:
        return {"image": "part.png", "reference": "bottle", "overlay": True}


class TestChatLookTwiceConforms(ChatModelUnitTests):
    @property
    def chat_model_class(self) -> type[ChatLookTwice]:
        return ChatLookTwice

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "looktwice-nano", "base_url": "http://127.0.0.1:8000/v1"}

    @property
    def supports_image_inputs(self) -> bool:
        return True

    @property
    def init_from_env_params(self) -> tuple[dict[str, str], dict[str, Any], dict[str, Any]]:
        environment = {"LOOKTWICE_API_KEY": "secret", "LOOKTWICE_URL": "http://line3:8000"}
        expected = {"openai_api_key": "secret", "openai_api_base": "http://line3:8000/v1"}
        return environment, {"model": "looktwice-nano"}, expected


class TestChatLookTwiceServes(ChatModelIntegrationTests):
    """The real server's answers, in what nano can do: words about pictures, no tools, no fields."""

    @pytest.fixture(autouse=True)
    def _served(self, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LOOKTWICE_URL", server.url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        picture = (EXAMPLES / "scratched.png").read_bytes()  # for the one that the suite fetches
        monkeypatch.setattr(httpx, "get", lambda *_, **__: SimpleNamespace(content=picture))

    @property
    def chat_model_class(self) -> type[ChatLookTwice]:
        return ChatLookTwice

    @property
    def chat_model_params(self) -> dict[str, Any]:
        # LangChain keeps one asynchronous client, and every test here has its own event loop.
        once = {"Connection": "close"}
        return {"model": "looktwice-nano", "default_headers": once}

    @property
    def supports_image_inputs(self) -> bool:
        return True

    @property
    def has_tool_calling(self) -> bool:
        return False

    @property
    def has_structured_output(self) -> bool:
        return False


def red(level: int) -> Image.Image:
    """What the wire fixture's server gives the score level / 255."""
    return Image.new("RGB", (40, 30), (level, 0, 0))


@pytest.fixture
def tool(tmp_path: Path, wire: Any) -> InspectionTool:
    red(204).save(tmp_path / "part.png")
    (tmp_path / "notes.png").write_text("the password is swordfish")
    return InspectionTool(roots=[tmp_path], media={"media:1": red(51)})


def call(image: str, **arguments: Any) -> dict[str, Any]:
    """A tool call as a model makes it."""
    arguments = {"image": image, **arguments}
    return {"name": "inspect_image", "args": arguments, "id": "1", "type": "tool_call"}


def test_the_model_reads_facts_and_the_program_gets_the_inspection(tool: InspectionTool) -> None:
    message = tool.invoke(call("part.png"))
    assert isinstance(message.artifact, Inspection)
    assert message.content == (
        "anomalous, score 0.800 (threshold 0.50); highly suspicious; regions 1: bottom left\n"
        "picture 40 x 30 pixels, boxes are x0, y0, x1, y1\n"
        "region [0, 15, 20, 30] score 0.800 bottom left"
    )
    assert message.artifact.map is None


def test_the_async_tool_says_the_same_by_itself(
    tool: InspectionTool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = call("media:1", reference="bottle", overlay=True)
    same = {"content": True, "artifact": True, "status": True}
    one = tool.invoke(asked)
    monkeypatch.setattr(InspectionTool, "_run", None)  # what LangChain's own would call in a thread
    other = asyncio.run(tool.ainvoke(asked))
    assert one.model_dump(include=same) == other.model_dump(include=same)
    assert "reference bottle; p 0.020" in one.content[0]["text"]


def test_the_overlay_is_an_image_block_on_request(tool: InspectionTool) -> None:
    text, block = tool.invoke(call("part.png", overlay=True)).content
    assert text["type"] == "text"
    assert (block["type"], block["mime_type"]) == ("image", "image/jpeg")
    assert Image.open(io.BytesIO(base64.b64decode(block["base64"]))).size[0] == 640


def test_data_uris_media_ids_and_files_are_inspected_alike(tool: InspectionTool) -> None:
    uri = to_wire(red(51))
    scores = [tool.invoke(call(name)).artifact.score for name in (uri, "media:1", "part.png")]
    assert scores == [pytest.approx(0.2), pytest.approx(0.2), pytest.approx(0.8)]


def test_an_address_is_fetched_by_the_server_and_only_from_an_allowed_host(
    tool: InspectionTool, wire: Any
) -> None:
    closed = tool.invoke(call("http://camera/now.png"))
    assert (closed.status, wire.requests) == ("error", [])
    opened = InspectionTool(hosts=["camera"]).invoke(call("http://camera/now.png"))
    assert opened.content == "this server fetches no addresses (HTTP 400)"
    assert wire.requests[-1][1]["images"] == ["http://camera/now.png"]


@pytest.mark.parametrize("name", ["../part.png", "/etc/passwd", "notes.png", "media:2"])
def test_what_is_closed_or_no_picture_is_a_sentence_for_the_model(
    tool: InspectionTool, wire: Any, name: str
) -> None:
    message = tool.invoke(call(name))
    assert (message.status, message.artifact) == ("error", None)
    assert "\n" not in message.content
    assert "swordfish" not in message.content
    assert "root:" not in message.content
    assert wire.requests == []


def test_an_unknown_reference_is_a_sentence_too(tool: InspectionTool) -> None:
    message = tool.invoke(call("part.png", reference="unknown"))
    assert message.content == "no reference named unknown (HTTP 404)"


@pytest.mark.parametrize("arguments", [{}, {"image": ""}, {"image": 3}, {"image": ["a.png"]}])
def test_arguments_that_do_not_fit_are_answered_not_raised(
    tool: InspectionTool, arguments: dict[str, Any]
) -> None:
    asked = {"name": "inspect_image", "args": arguments, "id": "1", "type": "tool_call"}
    message = tool.invoke(asked)
    assert isinstance(message, ToolMessage)
    assert message.status == "error"


def test_errors_are_raised_where_the_program_wants_them(wire: Any) -> None:
    with pytest.raises(ToolException, match="allowed folders"):
        InspectionTool(handle_tool_error=False).invoke({"image": "part.png"})


def test_a_server_that_is_down_or_refuses_the_key_is_a_sentence(
    tool: InspectionTool, wire: Any
) -> None:
    wire.key = "right"
    refused = InspectionTool(roots=tool.roots, api_key="wrong").invoke(call("part.png"))
    assert "LOOKTWICE_API_KEY" in refused.content
    assert "wrong or missing API key" in refused.content
    down = InspectionTool(roots=tool.roots, url="http://127.0.0.1:9/v1").invoke(call("part.png"))
    assert down.content.startswith("cannot reach the server")


def test_a_huge_file_is_refused_unread(tool: InspectionTool, tmp_path: Path, wire: Any) -> None:
    with (tmp_path / "huge.png").open("wb") as huge:
        huge.truncate(500_000_000)
    message = tool.invoke(call("huge.png"))
    assert message.content.endswith(f"500 MB is too large, at most {MAX_BYTES // 1_000_000} MB")
    assert wire.requests == []


def test_the_key_is_not_printed(tool: InspectionTool) -> None:
    assert "secret" not in repr(InspectionTool(api_key="secret", media={"1": b"secret"}))
    assert "secret" not in repr(ChatLookTwice(model="nano", api_key="secret"))


def picture_message(level: int) -> HumanMessage:
    block = {"type": "image", "base64": to_wire(red(level)).partition(",")[2]}
    text = {"type": "text", "text": "Any defect?"}
    return HumanMessage(content=[block | {"mime_type": "image/png"}, text])


def test_an_answer_keeps_its_inspections(wire: Any) -> None:
    chat = ChatLookTwice(model="looktwice-test", extra_body={"inspection": {"map": True}})
    answer = chat.invoke([picture_message(204)])
    [found] = map(Inspection.model_validate, answer.response_metadata["inspections"])
    assert (answer.content, found.score) == ("Any defect? 1 pictures, 1 messages.", 0.8)
    assert found.map is not None
    assert asyncio.run(chat.ainvoke([picture_message(204)])).response_metadata == (
        answer.response_metadata
    )


def test_a_streamed_answer_keeps_its_inspections(wire: Any) -> None:
    chat = ChatLookTwice(model="looktwice-test")

    async def streamed() -> AIMessageChunk:
        chunks = [chunk async for chunk in chat.astream([picture_message(204)])]
        return sum(chunks[1:], chunks[0])

    chunks = list(chat.stream([picture_message(204)]))
    for whole in (sum(chunks[1:], chunks[0]), asyncio.run(streamed())):
        assert whole.content == "Any defect? 1 pictures, 1 messages."
        assert [one["score"] for one in whole.response_metadata["inspections"]] == [0.8]


def test_a_streamed_answer_in_fields_keeps_its_inspections_too(wire: Any) -> None:
    wire.words = '{"summary": "fine"}'
    chat = ChatLookTwice(model="looktwice-test")
    schema = {"type": "object", "properties": {"summary": {"type": "string", "minLength": 1}}}
    described = {"name": "words", "schema": schema}
    asked = {"type": "json_schema", "json_schema": described}
    chunks = list(chat.stream([picture_message(204)], response_format=asked))
    whole = sum(chunks[1:], chunks[0])
    assert [one["score"] for one in whole.response_metadata["inspections"]] == [0.8]


def test_a_server_without_inspections_gives_an_ordinary_answer(wire: Any) -> None:
    wire.looktwice = False
    answer = ChatLookTwice(model="looktwice-test").invoke([picture_message(204)])
    assert "inspections" not in answer.response_metadata
