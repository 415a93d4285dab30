"""The clients against the real server on nano: what one way of asking says, the others say too."""

import asyncio
import io
import json
from pathlib import Path

import openai
import pytest
from PIL import Image

from looktwice_clients import AsyncInspector, Inspection, Inspector
from looktwice_clients.cli import run
from looktwice_clients.doctor import server as examine_server
from tests.serving import Server

pytestmark = pytest.mark.server

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


def test_the_commands_drive_the_real_server(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overlay = tmp_path / "overlay.png"
    arguments = ["inspect", "--json", "--url", server.url, str(SCRATCHED), "--map", str(overlay)]
    assert run(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["path"] == str(SCRATCHED)
    assert Image.open(overlay).size[0] == 640
    assert [finding.state for finding in examine_server(server.url)] == ["ok"]
