"""The clients against the real server on nano: what one way of asking says, the others say too."""

import asyncio
import base64
import io
import json
from pathlib import Path
from typing import Any

import openai
import pytest
from jsonschema import validate
from langchain_core.messages import HumanMessage
from langchain_tests.integration_tests import ToolsIntegrationTests
from mcp import Client
from PIL import Image

from looktwice_clients import AsyncInspector, Inspection, Inspector, draw_overlay
from looktwice_clients.allowed_pictures import AllowedPictures
from looktwice_clients.cli import run
from looktwice_clients.doctor import server as examine_server
from looktwice_clients.langchain_chat import ChatLookTwice
from looktwice_clients.langchain_tool import InspectionTool
from looktwice_clients.mcp_server import mcp_server
from tests.clients.conftest import SQUARE_HOLES
from tests.clients.mcp_sessions import http_server, over_http, over_stdio
from tests.serving import Server

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
GOOD, SCRATCHED = EXAMPLES / "good.png", EXAMPLES / "scratched.png"


@pytest.fixture
def inspector(server: Server) -> Inspector:
    with Inspector(server.url) as inspector:
        yield inspector


def same(one: Inspection, other: Inspection) -> bool:
    """The same facts; the ids and times of two requests differ."""
    volatile = {"id", "created", "map", "score", "regions", "image"}
    scores = one.score == pytest.approx(other.score, abs=1e-5)
    boxes = [region.box for region in one.regions] == [region.box for region in other.regions]
    return (
        scores and boxes and one.model_dump(exclude=volatile) == other.model_dump(exclude=volatile)
    )


def test_an_inspection_keeps_the_promises_of_the_wire(inspector: Inspector) -> None:
    inspection = inspector.inspect(SCRATCHED)
    assert 0 <= inspection.score <= 1
    assert inspection.threshold == 0.5
    assert inspection.verdict == ("anomalous" if inspection.score >= 0.5 else "normal")
    assert (inspection.width, inspection.height) == Image.open(SCRATCHED).size
    assert bool(inspection.regions) == inspection.anomalous
    for region in inspection.regions:
        x0, y0, x1, y1 = region.box
        assert 0 <= x0 < x1 <= inspection.width
        assert 0 <= y0 < y1 <= inspection.height
    assert inspection.map is not None
    assert inspection.map.image().size == (512, 512)
    assert (inspection.reference, inspection.p_value) == (None, None)


def test_path_bytes_pillow_and_data_uri_are_the_same_picture(inspector: Inspector) -> None:
    from looktwice_clients.images import to_wire

    first = inspector.inspect(SCRATCHED)
    sources = [SCRATCHED.read_bytes(), Image.open(SCRATCHED), to_wire(SCRATCHED)]
    assert all(same(inspector.inspect(source), first) for source in sources)


def test_one_many_async_and_chat_agree_on_the_facts(server: Server, inspector: Inspector) -> None:
    one = [inspector.inspect(path, map=False) for path in (GOOD, SCRATCHED)]
    many = list(inspector.inspect_many([GOOD, SCRATCHED] * 4, map=False))
    assert all(same(found, one[position % 2]) for position, found in enumerate(many))

    async def both() -> list[Inspection]:
        async with AsyncInspector(server.url) as asynchronous:
            found = [i async for i in asynchronous.inspect_many([GOOD, SCRATCHED], map=False)]
            answer = await asynchronous.ask(SCRATCHED, "Any defect?", max_tokens=4)
            return [*found, *answer.inspections]

    assert all(same(a, b) for a, b in zip(asyncio.run(both()), [*one, one[1]], strict=True))
    conversation = inspector.chat(GOOD, max_tokens=4)
    conversation.send("Any defect?", SCRATCHED)
    assert [found.image for found in conversation.inspections] == [0, 1]
    assert all(same(a, b) for a, b in zip(conversation.inspections, one, strict=True))


def test_a_streamed_answer_equals_the_whole_one(inspector: Inspector) -> None:
    options = {"max_tokens": 16, "temperature": 0}
    whole = inspector.ask(SCRATCHED, "Where is the defect?", **options)
    pieces = inspector.chat(SCRATCHED, **options).stream("Where is the defect?")
    assert "".join(pieces) == whole.text
    assert same(pieces.answer.inspections[0], whole.inspections[0])


def test_exif_rotation_is_honoured_on_the_way(inspector: Inspector) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.open(SCRATCHED).crop((0, 0, 512, 300)).save(buffer, "JPEG", exif=exif, quality=95)
    inspection = inspector.inspect(buffer.getvalue())
    assert (inspection.width, inspection.height) == (300, 512)


def test_a_truncated_picture_is_refused_and_costs_the_others_nothing(inspector: Inspector) -> None:
    broken = SCRATCHED.read_bytes()[:-5000]
    results = list(inspector.inspect_many([GOOD, broken, SCRATCHED], return_exceptions=True))
    assert [isinstance(result, Inspection) for result in results] == [True, False, True]
    assert isinstance(results[1], openai.BadRequestError)


def test_a_report_has_the_facts_of_the_inspection_and_words_that_fit(
    inspector: Inspector, openai_client: openai.OpenAI
) -> None:
    # Another structured request before it: an engine keeps the backend of the first one it sees.
    chosen = openai_client.chat.completions.create(
        model="looktwice-nano",
        messages=[{"role": "user", "content": "Is it defective?"}],
        extra_body={"structured_outputs": {"choice": ["yes", "no"]}},
    )
    assert chosen.choices[0].message.content in ("yes", "no")
    for picture in (GOOD, SCRATCHED):
        report = inspector.report(picture, temperature=0)
        words = report.model_dump(include={"summary", "appearance", "advice"})
        facts = Inspection.model_validate(report.model_dump(exclude=set(words)))
        assert same(facts, inspector.inspect(picture, map=False))
        assert all(1 <= len(text) <= 200 for text in words.values())


def test_the_langchain_chat_model_keeps_the_inspections(server: Server) -> None:
    chat = ChatLookTwice(model="looktwice-nano", base_url=server.url, max_tokens=16, temperature=0)
    picture = base64.b64encode(SCRATCHED.read_bytes()).decode()
    block = {"type": "image", "base64": picture, "mime_type": "image/png"}
    message = HumanMessage([block, {"type": "text", "text": "Any defect?"}])
    answer = chat.invoke([message])
    chunks = list(chat.stream([message]))
    streamed = sum(chunks[1:], chunks[0])
    assert answer.text == streamed.text != ""
    for one in (answer, streamed):
        [found] = one.response_metadata["inspections"]
        assert found["verdict"] == "anomalous"


class TestLangChainToolConforms(ToolsIntegrationTests):
    @pytest.fixture(autouse=True)
    def address(self, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LOOKTWICE_URL", server.url)

    @property
    def tool_constructor(self) -> type[InspectionTool]:
        return InspectionTool

    @property
    def tool_constructor_params(self) -> dict[str, Any]:
        return {"roots": [EXAMPLES]}

    @property
    def tool_invoke_params_example(self) -> dict[str, Any]:
        return {"image": "scratched.png", "overlay": True}


@pytest.mark.parametrize("transport", ["stdio", "http"])
def test_an_assistant_uses_all_four_tools_over_mcp(
    server: Server, inspector: Inspector, plates: str, transport: str
) -> None:
    asked = {
        "inspect_image": {"image": "scratched.png"},
        "compare_with_reference": {"image": "plates/square_holes.jpg", "reference": plates},
        "list_references": {},
        "explain": {"image": "scratched.png", "question": "Any defect?"},
    }

    async def use(client: Client) -> tuple[dict[str, Any], dict[str, Any], Any]:
        found = {name: await client.call_tool(name, given) for name, given in asked.items()}
        unknown = asked["compare_with_reference"] | {"reference": "never-made"}
        refused = await client.call_tool("compare_with_reference", unknown)
        tools = (await client.list_tools()).tools
        return found, {tool.name: tool.output_schema for tool in tools}, refused

    if transport == "stdio":
        found, schemas, refused = over_stdio(EXAMPLES, server.url, use)
    else:
        with http_server(EXAMPLES, server.url) as address:
            found, schemas, refused = over_http(address, use)
    assert schemas.keys() == asked.keys()
    for name, schema in schemas.items():
        validate(found[name].structured_content, schema)
    inspected, compared = found["inspect_image"], found["compare_with_reference"]
    assert same(
        Inspection.model_validate(inspected.structured_content), inspector.inspect(SCRATCHED)
    )
    assert same(
        Inspection.model_validate(compared.structured_content),
        inspector.inspect(SQUARE_HOLES, plates),
    )
    for result in (inspected, compared):
        assert [block.type for block in result.content] == ["text", "image"]
    listed = found["list_references"].structured_content["references"]
    assert [one["images"] for one in listed if one["name"] == plates] == [6]
    explained = found["explain"].structured_content
    assert explained["answer"].startswith("Yes")
    assert explained["inspection"]["verdict"] == "anomalous"
    assert refused.is_error
    assert "no reference named 'never-made'" in refused.content[0].text


def test_what_only_the_reference_reveals_is_found_in_every_client(
    server: Server, inspector: Inspector, plates: str
) -> None:
    assert inspector.inspect(SQUARE_HOLES).verdict == "normal"
    one = inspector.inspect(SQUARE_HOLES, plates, map=False)
    assert (one.verdict, one.reference.name) == ("anomalous", plates)
    assert inspector.ask(SQUARE_HOLES, "Any defect?", plates).text.startswith("Yes")

    tool = InspectionTool(url=server.url, media={"part": SQUARE_HOLES})
    call = {"image": "part", "reference": plates}
    message = tool.invoke({"name": tool.name, "args": call, "id": "1", "type": "tool_call"})
    assert same(message.artifact, one)

    async def assistant() -> tuple[Any, Any]:
        async with AsyncInspector(server.url) as asynchronous:
            allowed = AllowedPictures([SQUARE_HOLES.parent])
            async with Client(mcp_server(asynchronous, allowed)) as client:
                picture = {"image": SQUARE_HOLES.name, "reference": plates, "overlay": False}
                compared = await client.call_tool("compare_with_reference", picture)
                return compared, await client.call_tool("list_references", {})

    compared, listed = asyncio.run(assistant())
    assert same(Inspection.model_validate(compared.structured_content), one)
    [found] = [r for r in listed.structured_content["references"] if r["name"] == plates]
    assert (found["images"], found["version"]) == (6, one.reference.version)


def test_the_commands_drive_the_real_server(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overlay = tmp_path / "overlay.png"
    arguments = ["inspect", "--json", "--url", server.url, str(SCRATCHED), "--map", str(overlay)]
    assert run(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["path"] == str(SCRATCHED)
    drawn = Image.open(overlay).convert("RGB")
    with Inspector(server.url) as inspector:
        inspected = inspector.inspect(SCRATCHED)
        told = inspector.ask(SCRATCHED, "Any defect?", map=True).inspections[0]
    for inspection in (inspected, told):
        assert drawn.tobytes() == draw_overlay(SCRATCHED, inspection).convert("RGB").tobytes()
    assert [finding.state for finding in examine_server(server.url)] == ["ok"]
