"""References through the clients: what is sent, what comes back, what the terminal shows."""

import asyncio
import io
import json
import time
from collections.abc import Iterator

import pytest
from PIL import Image

from looktwice_clients import AsyncInspector, Inspector, Reference, ReplyError
from looktwice_clients.cli import run
from looktwice_clients.cli_reference import spread
from looktwice_clients.references import with_files
from tests.clients.conftest import WireHandler, WireServer, red, reference_of


@pytest.fixture
def inspector(wire: WireServer) -> Iterator[Inspector]:
    wire.references.clear()
    with Inspector(max_retries=0) as inspector:
        yield inspector


def test_add_get_list_remove(wire: WireServer, inspector: Inspector) -> None:
    made = inspector.references.add("bottle", [red(10), red(20)], false_alarm_rate=0.1)
    assert (made.name, made.images, made.false_alarm_rate) == ("bottle", 2, 0.1)
    assert inspector.references.get("bottle") == made
    assert inspector.references.list() == [made]
    inspector.references.remove("bottle")
    assert inspector.references.list() == []
    assert set(wire.requests[0][1]) == {"images", "false_alarm_rate"}


def test_the_async_client_says_the_same(wire: WireServer) -> None:
    wire.references.clear()

    async def run_all() -> Reference:
        async with AsyncInspector(max_retries=0) as inspector:
            made = await inspector.references.add("nut", [red(10)], defect_images=[red(200)])
            assert await inspector.references.list() == [made]
            found = await inspector.references.get("nut", thumbnails=True)
            await inspector.references.remove("nut")
            return found

    found = asyncio.run(run_all())
    assert found.pictures()[0].size == (40, 30)
    assert len(wire.requests[0][1]["defect_images"]) == 1


def test_a_thumbnail_that_is_none_is_a_reply_error() -> None:
    reference = Reference(
        name="x", version="1", images=1, patches=1, false_alarm_rate=0.05, promised_rate=1.0,
        guaranteed_rate=1.0, threshold=0.0, thumbnails=["AAAA"],
    )  # fmt: skip
    with pytest.raises(ReplyError, match="not a JPEG"):
        reference.pictures()


def test_the_commands_from_add_to_remove(wire, tmp_path, capsys) -> None:
    wire.references.clear()
    for index in range(3):
        red(10 * index).save(tmp_path / f"{index}.png")
    assert run(["reference", "add", "bottle", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "3 images" in out
    assert "asked 5.0%, promised 25.0% (guaranteed 50.0%); threshold" in out
    assert "warning: few" in out
    assert run(["reference", "list"]) == 0
    listed = capsys.readouterr().out
    assert listed.startswith("bottle     3 images")
    assert "promises 25.0% (guaranteed 50.0%)" in listed
    sheet = tmp_path / "sheets" / "bottle.png"
    assert run(["reference", "show", "bottle", "--sheet", str(sheet), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["thumbnails"] is None
    assert Image.open(sheet).width == 3 * 132
    assert run(["reference", "remove", "bottle"]) == 0
    assert run(["reference", "list"]) == 0
    assert "no references yet" in capsys.readouterr().err


def test_a_reference_that_cannot_be_used_is_shown_with_its_problem(wire, capsys) -> None:
    wire.references.clear()
    old, lost = reference_of("old", 4, 0.05), reference_of("lost", 0, 0.05)
    wire.references["old"] = old | {"problem": "made with another expert; add it again"}
    wire.references["lost"] = lost | {"problem": "broken; add it again", "version": ""}
    assert run(["reference", "list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert "old   cannot be used: made with another expert; add it again" in listed
    assert "lost  cannot be used: broken; add it again" in listed
    assert run(["reference", "show", "lost"]) == 0
    assert capsys.readouterr().out == "lost cannot be used: broken; add it again\n"
    assert run(["reference", "show", "old"]) == 0
    assert "4 images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["add", "--defect", "bad.png", "bottle", "good.png"], 2, "'NAME': NAME and IMAGE stand"),
        (["add", "bottle", "--defect", "bad.png", "good.png"], 2, "'IMAGE...': NAME and IMAGE"),
        (["add", "bottle", "good.png", "--defect"], 2, "'--defect' requires an argument"),
        (["show", "no-such"], 1, "no reference named no-such"),
        (["remove", "no-such"], 1, "no reference named no-such"),
        (["add", "bottle", "no-such.png"], 1, "no-such.png"),
        (["add", "bottle"], 2, "Missing argument"),
        (["add", "bottle", "x.png", "--false-alarm-rate", "2"], 2, "not in the range"),
    ],
)
def test_bad_use_is_one_line(wire, capsys, args, code, says) -> None:
    assert run(["reference", *args]) == code
    err = capsys.readouterr().err
    *before, line = err.splitlines()
    assert says in line
    assert before in (
        [],
        ["1 good, 0 calibration, 0 defect pictures; the server looks at one after the other"],
    )


def test_an_option_takes_all_pictures_up_to_the_next_one(wire, tmp_path, capsys) -> None:
    """As a shell leaves `good/* --defect bad/* --calibrate-with more --json`."""
    wire.references.clear()
    for folder, count in (("good", 2), ("bad", 3), ("more", 4)):
        (tmp_path / folder).mkdir()
        for index in range(count):
            red(10 * index).save(tmp_path / folder / f"{index}.png")
    good, bad = (sorted(map(str, (tmp_path / name).iterdir())) for name in ("good", "bad"))
    options = ["--defect", *bad, "--calibrate-with", str(tmp_path / "more"), "--json"]
    assert run(["reference", "add", "bottle", *good, *options]) == 0
    _, sent = wire.requests[-1]
    keys = ("images", "defect_images", "calibration_images")
    assert [len(sent[key]) for key in keys] == [2, 3, 4]
    shown = capsys.readouterr()
    assert "2 good, 4 calibration, 3 defect pictures" in shown.err
    assert json.loads(shown.out)["images"] == 2


@pytest.mark.parametrize("terminal", [True, False])
def test_adding_shows_on_a_terminal_how_long_it_takes(wire, tmp_path, monkeypatch, terminal):
    learn = WireHandler.do_PUT

    def slowly(handler):
        time.sleep(3.5)
        learn(handler)

    monkeypatch.setattr(WireHandler, "do_PUT", slowly)
    red(9).save(tmp_path / "good.png")
    stderr = io.StringIO()
    monkeypatch.setattr(stderr, "isatty", lambda: terminal)
    monkeypatch.setattr("sys.stderr", stderr)
    assert run(["reference", "add", "bottle", str(tmp_path / "good.png")]) == 0
    assert ("the server is looking, 00:02" in stderr.getvalue()) == terminal


@pytest.mark.parametrize(
    ("args", "spread_out"),
    [
        ("a 1 --defect 2 3 --json", "a 1 --defect 2 --defect 3 --json"),
        ("a 1 --defect=2 3", "a 1 --defect=2 --defect 3"),
        ("a 1 --false-alarm-rate=0.1 2", "a 1 --false-alarm-rate=0.1 2"),
        ("--defect 2 --defect 3 -- a 1 --x", "--defect 2 --defect 3 -- a 1 --x"),
        ("--defect 2 --false-alarm-rate 0.1 a 1", "--defect 2 --false-alarm-rate 0.1 a 1"),
        ("a 1 --defect --json", "a 1 --defect --json"),
        ("a 1 --defect - -", "a 1 --defect - --defect -"),
    ],
)
def test_an_option_is_named_again_before_each_of_its_pictures(args, spread_out) -> None:
    assert spread(args.split()) == spread_out.split()


def test_warnings_and_errors_name_the_files_behind_the_numbers() -> None:
    good, more = ["good/a.jpg", "good/b.jpg"], ["more/c.jpg"]
    files = {"images": good, "calibration_images": more, "defect_images": ["d"]}
    said = "calibration_images[0] is the same picture as images[1] and was left out"
    shown = "calibration_images[0] (more/c.jpg) is the same picture as images[1] (good/b.jpg) and"
    assert with_files(said, files) == f"{shown} was left out"
    assert with_files("19 good pictures promise", files) == "19 good pictures promise"
    assert with_files("images[7] looks unlike", files) == "images[7] looks unlike"
    assert with_files("others[0] looks unlike", files) == "others[0] looks unlike"
    assert with_files("images[1]: it is empty", files) == "images[1] (good/b.jpg): it is empty"
    assert with_files("defect_images[0]: no", files) == "defect_images[0] (d): no"
