import errno
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import click
import pytest
from PIL import Image

from looktwice_clients import cli
from looktwice_clients.cli import COMMANDS, CommandEntry, missing_extra, run
from looktwice_clients.cli_inspect import Target, _files_in
from looktwice_clients.conversation import Conversation
from tests.clients.conftest import RefusedError, WireHandler

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """A folder with three pictures, one broken one, and what is no picture."""
    folder = tmp_path / "parts"
    (folder / "deep").mkdir(parents=True)
    for name, level in (("a.png", 20), ("b.jpg", 230), ("deep/c.png", 100)):
        Image.new("RGB", (40, 30), (level, 0, 0)).save(folder / name, quality=95)
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing more")
    (folder / "notes.txt").write_text("no picture")
    (folder / ".hidden.png").write_text("no picture")
    return folder


@pytest.fixture
def looktwice(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """The command in this process: arguments and stdin in; exit code, stdout, stderr out."""

    def call(*args: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        code = run(args)
        return code, *capsys.readouterr()

    return call


def test_every_command_is_listed_with_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    listed = capsys.readouterr().out
    for entry in entry_points(group="looktwice.commands"):
        assert f"  {entry.name} " in listed
        assert COMMANDS[entry.name].split()[0] in listed


@pytest.mark.parametrize("name", ["inspect", "chat", "mcp", "doctor"])
def test_the_help_of_a_command_is_its_own(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([name, "--help"]) == 0
    assert f"Usage: looktwice {name} " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nothing"], "looktwice: No such command 'nothing'. Try `looktwice --help`."),
        (["inspect"], "looktwice: Missing argument 'IMAGE...'. Try `looktwice inspect --help`."),
        (
            ["inspect", "--zzz"],
            "looktwice: No such option '--zzz'. Try `looktwice inspect --help`.",
        ),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(args) == 2
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [message]
    assert captured.out == ""


def test_a_command_without_its_extra_says_which_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    at_import = "import a_package_that_is_not_there\n"
    at_call = f"import click\n@click.command()\ndef later():\n    {at_import}"
    (tmp_path / "needs_at_import.py").write_text(at_import)
    (tmp_path / "needs_at_call.py").write_text(at_call)
    monkeypatch.syspath_prepend(tmp_path)
    found = [
        EntryPoint("serve", "needs_at_import:serve", "looktwice.commands"),
        EntryPoint("train", "needs_at_call:later", "looktwice.commands"),
    ]
    monkeypatch.setattr(
        cli, "entry_points", lambda group, name=None: [e for e in found if name in (None, e.name)]
    )
    assert run(["serve"]) == 2
    assert run(["train"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "looktwice: `looktwice serve` needs a_package_that_is_not_there: "
        "pip install 'looktwice[cpu]' (or 'looktwice[gpu]')",
        "looktwice: `looktwice train` needs a_package_that_is_not_there: "
        "pip install 'looktwice[train]'",
    ]
    assert run(["--help"]) == 0


def test_a_module_of_our_own_that_is_missing_is_no_missing_extra() -> None:
    own = ModuleNotFoundError("no", name="looktwice_server.nowhere")
    assert missing_extra("serve", own) is own
    assert isinstance(
        missing_extra("serve", ModuleNotFoundError("no", name="torch.nn")), click.ClickException
    )


def test_a_command_of_another_distribution_is_listed_with_its_package() -> None:
    entry = EntryPoint("plc", "plant_bridge.commands:plc", "looktwice.commands")
    assert CommandEntry(entry).get_short_help_str() == "From plant_bridge."


def test_an_unexpected_error_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails() -> None:
        raise KeyError("surprise")

    entry = EntryPoint("odd", "somewhere:odd", "looktwice.commands")
    monkeypatch.setattr(EntryPoint, "load", lambda self: click.command()(fails))
    monkeypatch.setattr(cli, "entry_points", lambda group, name=None: [entry])
    monkeypatch.delenv("LOOKTWICE_DEBUG", raising=False)
    assert run(["odd"]) == 1
    assert capsys.readouterr().err == "looktwice: KeyError: 'surprise'\n"
    monkeypatch.setenv("LOOKTWICE_DEBUG", "1")
    with pytest.raises(KeyError):
        run(["odd"])


def test_inspect_prints_a_line_for_each_picture_of_a_folder(
    wire: Any, parts: Path, looktwice: Command
) -> None:
    code, out, err = looktwice("inspect", str(parts), str(parts / "missing.png"))
    assert code == 1
    lines = out.splitlines()
    assert lines[0].split() == ["score", "verdict", "regions", "picture"]
    assert [line.split()[:2] for line in lines[1:]] == [
        ["0.078", "normal"],
        ["0.902", "anomalous"],
        ["-", "failed"],
        ["0.392", "normal"],
        ["-", "failed"],
    ]
    names = ["a.png", "b.jpg", "broken.png", "deep/c.png", "missing.png"]
    assert [line.split()[-1] for line in lines[1:]] == [str(parts / name) for name in names]
    assert "1: bottom left" in lines[2]
    assert "No such file or directory" in lines[5]
    assert err.splitlines() == [
        f"looktwice: in {parts} not taken for pictures: 1 .txt",
        "2 normal, 1 anomalous, 2 failed",
    ]


def test_inspect_json_is_one_object_a_line_with_its_path(
    wire: Any, parts: Path, looktwice: Command
) -> None:
    files = [str(parts / name) for name in ("b.jpg", "broken.png", "a.png")]
    code, out, err = looktwice("inspect", "--json", "--reference", "bottle", *files)
    objects = [json.loads(line) for line in out.splitlines()]
    assert code == 1
    assert err == ""
    assert [found["path"] for found in objects] == files
    assert objects[0]["score"] == pytest.approx(230 / 255, abs=0.01)
    assert (objects[0]["reference"]["name"], objects[0]["reference"]["version"]) == (
        "bottle",
        "9f2c",
    )
    assert objects[0]["map"] is None
    assert set(objects[1]) == {"path", "error"}
    assert objects[2]["regions"] == []


@pytest.mark.parametrize(
    ("args", "code"),
    [
        ([], 0),
        (["--fail-on", "anomalous"], 1),
        (["--fail-on", "undecided"], 0),
        (["--fail-on", "undecided", "--fail-on", "anomalous"], 1),
    ],
)
def test_fail_on_sets_the_exit_code(
    wire: Any, parts: Path, args: list[str], code: int, looktwice: Command
) -> None:
    assert looktwice("inspect", *args, str(parts / "a.png"), str(parts / "b.jpg"))[0] == code
    assert looktwice("inspect", *args, str(parts / "a.png"))[0] == 0


def test_map_writes_one_overlay_or_a_folder_of_them(
    wire: Any, parts: Path, tmp_path: Path, looktwice: Command
) -> None:
    one = tmp_path / "new" / "overlay.png"
    assert looktwice("inspect", str(parts / "b.jpg"), "--map", str(one))[0] == 0
    with Image.open(one) as overlay:
        assert overlay.width == 640
    (parts / "broken.png").unlink()
    same_name = parts / "deep" / "a.png"
    Image.new("RGB", (40, 30)).save(same_name)
    folder = tmp_path / "overlays"
    code, out, _ = looktwice("inspect", "--json", str(parts), "--map", str(folder))
    assert code == 0
    written = [json.loads(line)["overlay"] for line in out.splitlines()]
    assert written == [str(folder / n) for n in ("a.png", "b.png", "a-2.png", "c.png")]
    assert sorted(written) == sorted(map(str, folder.iterdir()))


def test_a_numbered_overlay_takes_no_other_pictures_name() -> None:
    targets = [Target(name, name, None) for name in ("x/a.png", "y/a.png", "z/a-2.png")]
    names = [file.name for file in _files_in(Path("out"), targets)]
    assert names == ["a.png", "a-2.png", "a-2-2.png"]


def test_map_never_overwrites_a_picture(
    wire: Any, parts: Path, tmp_path: Path, looktwice: Command
) -> None:
    original = (parts / "a.png").read_bytes()
    for target in (parts / "a.png", parts):
        code, _, err = looktwice("inspect", str(parts / "a.png"), "--map", str(target))
        assert code == 2
        assert "--map would overwrite the picture" in err
    assert (parts / "a.png").read_bytes() == original
    code, _, err = looktwice("inspect", str(parts), "--map", str(tmp_path / "one.png"))
    assert code == 2
    assert "is one file for 4 pictures" in err


def test_map_takes_no_folder_of_the_pictures_where_an_overlay_could_replace_another(
    wire: Any, parts: Path, looktwice: Command
) -> None:
    original = (parts / "a.png").read_bytes()
    (parts / "a.jpg").write_bytes((parts / "b.jpg").read_bytes())
    code, out, err = looktwice("inspect", str(parts / "a.jpg"), "--map", f"{parts}/deep/..")
    assert (code, out) == (2, "")
    [line] = err.splitlines()
    assert "holds pictures to inspect: give the overlays another folder" in line
    assert (parts / "a.png").read_bytes() == original
    overlays = str(parts / "overlays")
    for _ in range(2):  # the second writes over the first one's overlay
        assert looktwice("inspect", str(parts / "a.jpg"), "--map", overlays)[0] == 0


@pytest.mark.parametrize("overlay", ["overlays", "overlay.png"])
@pytest.mark.parametrize("named", ["deep", "dee*"])
def test_map_puts_no_overlay_where_the_next_run_would_inspect_it(
    wire: Any, parts: Path, looktwice: Command, named: str, overlay: str
) -> None:
    asked = ("inspect", str(parts / named), "--map")
    code, out, err = looktwice(*asked, str(parts / "deep" / overlay))
    assert (code, out, wire.requests) == (2, "", [])
    [line] = err.splitlines()
    assert f"lies in the inspected folder {parts / 'deep'}" in line
    for _ in range(2):
        assert looktwice(*asked, str(parts / "deep" / ".overlays"))[0] == 0


def test_an_overlay_that_cannot_be_written_is_counted_apart(
    wire: Any, parts: Path, tmp_path: Path, looktwice: Command
) -> None:
    out = tmp_path / "out"
    asked = ("inspect", str(parts / "a.png"), str(parts / "b.jpg"), "--map", str(out))
    assert looktwice(*asked)[::2] == (0, "1 normal, 1 anomalous\n")
    (out / "a.png").unlink()
    (out / "a.png").mkdir()
    code, _, err = looktwice(*asked)
    assert code == 1
    assert err.splitlines()[1:] == ["1 normal, 1 anomalous, 1 without overlay"]


@pytest.mark.parametrize(
    "address", ["http://camera:abc/x", "http://[::1", "http://127.0.0.1:9/a b.png"]
)
def test_an_address_that_is_none_fails_alone(
    wire: Any, parts: Path, tmp_path: Path, looktwice: Command, address: str
) -> None:
    asked = (str(parts / "a.png"), address, "--map", str(tmp_path / "out"))
    code, out, err = looktwice("inspect", *asked)
    assert code == 1
    good, bad = out.splitlines()[1:]
    assert good.split()[:2] == ["0.078", "normal"]
    assert bad.split()[:2] == ["-", "failed"]
    assert err == "1 normal, 1 failed\n"


def test_patterns_are_expanded_and_files_with_odd_names_found(
    wire: Any, parts: Path, looktwice: Command
) -> None:
    odd = parts / "part[1] ü\n.png"
    (parts / "a.png").rename(odd)
    code, out, _ = looktwice("inspect", "--json", str(odd), str(parts / "**" / "c.*"))
    assert code == 0
    paths = [json.loads(line)["path"] for line in out.splitlines()]
    assert paths == [str(odd), str(parts / "deep" / "c.png")]
    code, out, _ = looktwice("inspect", str(odd), str(parts / "*.tga"), str(parts / "deep"))
    assert len(out.splitlines()) == 4
    assert "nothing matches" in out


def test_a_folder_without_pictures_says_so(wire: Any, tmp_path: Path, looktwice: Command) -> None:
    code, out, _ = looktwice("inspect", str(tmp_path))
    assert code == 1
    assert "no pictures in this folder" in out


def test_what_a_folder_holds_beside_pictures_is_named(
    wire: Any, parts: Path, looktwice: Command
) -> None:
    (parts / "a.png").rename(parts / "a.JFIF")
    (parts / "deep" / "phone.heic").write_bytes(b"")
    _, out, err = looktwice("inspect", "--json", str(parts))
    assert {Path(json.loads(line)["path"]).name for line in out.splitlines()} == {
        *("a.JFIF", "b.jpg", "broken.png", "c.png")
    }
    assert err.startswith(f"looktwice: in {parts} not taken for pictures: 1 .heic, 1 .txt\n")


def test_a_folder_that_is_closed_or_a_link_is_not_passed_over(
    wire: Any, parts: Path, looktwice: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    (parts / "today").symlink_to(parts / "deep")
    listed = os.scandir

    def closed(folder: str) -> Any:
        if Path(folder) == parts / "deep":
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))
        return listed(folder)

    monkeypatch.setattr(os, "scandir", closed)
    code, out, err = looktwice("inspect", "--json", str(parts))
    results = [json.loads(line) for line in out.splitlines()]
    names = [Path(result["path"]).name for result in results]
    assert names == ["a.png", "b.jpg", "broken.png", "deep"]
    assert (code, results[-1]["error"]) == (1, "Permission denied")
    assert err.startswith(
        f"looktwice: in {parts} not taken for pictures: 1 .txt, 1 links to folders\n"
    )


def test_an_empty_name_is_not_the_folder_that_the_command_runs_in(
    wire: Any, parts: Path, looktwice: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(parts)
    code, out, _ = looktwice("inspect", "")
    assert code == 1
    assert "the name of a picture or folder is empty" in out


def test_hidden_folders_and_thumbnails_are_left_out_unless_they_are_named(
    wire: Any, parts: Path, looktwice: Command
) -> None:
    for hidden in (".Trash-1000/files", "deep/@eaDir/c.png"):
        (parts / hidden).mkdir(parents=True)
        Image.new("RGB", (40, 30)).save(parts / hidden / "defect.png")
    assert "defect.png" not in looktwice("inspect", str(parts))[1]
    assert "defect.png" in looktwice("inspect", str(parts / ".Trash-1000"))[1]


def test_a_path_that_cannot_be_looked_at_fails_alone(
    wire: Any, parts: Path, looktwice: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = looktwice("inspect", "--json", "x" * 300, str(parts / "a.png"))
    bad, good = map(json.loads, out.splitlines())
    assert (code, err) == (1, "")
    assert "File name too long" in bad["error"]
    assert good["verdict"] == "normal"

    def closed(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", closed)
    assert len(looktwice("inspect", "--json", str(parts))[1].splitlines()) == 4


def test_a_server_that_is_not_there_ends_the_run_with_one_line(
    parts: Path, looktwice: Command
) -> None:
    (parts / "notes.txt").unlink()
    code, _, err = looktwice("inspect", "--url", "http://127.0.0.1:9/v1", str(parts))
    assert code == 1
    assert err.splitlines() == [
        "looktwice: cannot reach http://127.0.0.1:9/v1: is `looktwice serve` running there? "
        "(--url, $LOOKTWICE_URL)"
    ]


def test_what_would_fail_for_every_picture_ends_the_run(
    wire: Any, parts: Path, looktwice: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    (parts / "notes.txt").unlink()
    code, _, err = looktwice("inspect", "--reference", "unknown", str(parts))
    assert (code, err) == (1, "looktwice: no reference named unknown (HTTP 404)\n")
    wire.key = "secret"
    code, _, err = looktwice("inspect", str(parts))
    assert code == 1
    assert "wants an API key: set LOOKTWICE_API_KEY" in err
    monkeypatch.setenv("LOOKTWICE_API_KEY", "secret")
    assert looktwice("inspect", str(parts / "a.png"))[0] == 0


def test_an_outdated_reference_ends_the_run(
    wire: Any, parts: Path, looktwice: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise RefusedError(409, "add 'bottle' again")

    monkeypatch.setattr(WireHandler, "_inspect", refuse)
    pictures = [str(parts / name) for name in ("a.png", "b.jpg")]
    code, out, err = looktwice("inspect", "--reference", "bottle", *pictures)
    assert (code, err) == (1, "looktwice: add 'bottle' again (HTTP 409)\n")
    assert len(out.splitlines()) == 1  # the heading


def test_chat_answers_a_pipe_and_prints_each_pictures_facts_once(
    wire: Any, parts: Path, looktwice: Command
) -> None:
    script = f"Any defect?\n\nSure?\n/image '{parts / 'b.jpg'}'\nAnd here?\n/quit\nnever\n"
    code, out, err = looktwice("chat", str(parts / "a.png"), stdin=script)
    assert (code, err) == (0, "")
    first = f"[{parts / 'a.png'}: normal, score 0.078 (threshold 0.50); slightly suspicious; "
    second = f"[{parts / 'b.jpg'}: anomalous, score 0.902 (threshold 0.50); highly suspicious; "
    assert out.splitlines() == [
        "Any defect? 1 pictures, 1 messages.",
        f"{first}regions none]",
        "Sure? 1 pictures, 3 messages.",
        "And here? 2 pictures, 5 messages.",
        f"{second}regions 1: bottom left]",
    ]


def test_chat_goes_on_after_a_failed_turn_and_says_so_at_the_end(
    wire: Any, parts: Path, looktwice: Command
) -> None:
    script = "/image missing.png\n/tea\nfail\nAny defect?\n"
    code, out, err = looktwice("chat", str(parts / "a.png"), stdin=script)
    assert code == 1
    assert out.startswith("Any defect? 1 pictures, 1 messages.\n")
    assert err.splitlines() == [
        "looktwice: missing.png: No such file or directory",
        "looktwice: no command /tea; /help lists them",
        "looktwice: the prompt is longer than the context (HTTP 400)",
        "looktwice: /drop takes the question's pictures out",
    ]


def test_chat_goes_on_after_bytes_that_are_no_utf_8(
    wire: Any, parts: Path, looktwice: Command
) -> None:
    code, out, err = looktwice("chat", str(parts / "a.png"), stdin="Kratzer f\udcfcr?\nSure?\n")
    assert (code, err) == (0, "")
    assert [line.split("?")[0] for line in out.splitlines()[::2]] == ["Kratzer f\ufffdr", "Sure"]


def test_chat_takes_the_pictures_of_a_question_out_again(
    wire: Any, parts: Path, looktwice: Command
) -> None:
    attach = f"/image {parts / 'b.jpg'}"
    script = "\n".join(["One?", attach, "/drop", "Two?", "/drop", attach, "Three?"])
    code, out, err = looktwice("chat", str(parts / "a.png"), stdin=script)
    assert (code, err) == (1, "")
    said = [line for line in out.splitlines() if not line.startswith("[")]
    assert said == [
        "One? 1 pictures, 1 messages.",
        f"taken out: {parts / 'b.jpg'}",
        "Two? 1 pictures, 3 messages.",
        "taken out: no picture waits",
        "Three? 2 pictures, 5 messages.",
    ]
    assert f"[{parts / 'b.jpg'}: anomalous" in out


def test_ctrl_c_before_the_first_word_ends_the_turn_and_not_the_talk(
    wire: Any, parts: Path, looktwice: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Conversation.stream

    def stopped(self: Conversation, text: str) -> Any:
        if text == "one":
            raise KeyboardInterrupt
        return stream(self, text)

    monkeypatch.setattr(Conversation, "stream", stopped)
    _, out, _ = looktwice("chat", str(parts / "a.png"), stdin="one\ntwo\n")
    assert out.splitlines()[0] == " [stopped; this turn is forgotten]"
    assert "two 1 pictures, 1 messages." in out


def test_chat_refuses_a_first_picture_that_is_none(
    wire: Any, parts: Path, looktwice: Command
) -> None:
    code, out, err = looktwice("chat", str(parts / "notes.txt"), stdin="hello\n")
    assert (code, out) == (1, "")
    assert err == f"looktwice: {parts / 'notes.txt'}: not a picture\n"


def test_nothing_that_a_model_or_a_file_name_says_reaches_the_terminal_raw(
    wire: Any, parts: Path, looktwice: Command
) -> None:
    evil = parts / "\x1b]0;title\x07.png"
    (parts / "a.png").rename(evil)
    assert "\x1b" not in looktwice("inspect", str(evil))[1]
    code, out, _ = looktwice("chat", str(evil), stdin="say \x1b[31mred\n")
    assert code == 0
    assert "\x1b" not in out
    assert "red" in out


def test_the_command_as_a_process_of_its_own(wire: Any, parts: Path) -> None:
    command = [sys.executable, "-m", "looktwice_clients"]
    picture = str(parts / "b.jpg")
    done = subprocess.run([*command, "inspect", "--json", picture], capture_output=True, check=True)
    assert json.loads(done.stdout)["verdict"] == "anomalous"
    refused = subprocess.run([*command, "inspect"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "Traceback" not in refused.stderr
    talk = [*command, "chat", picture]
    said = subprocess.run(talk, input="Any defect?", capture_output=True, text=True, check=True)
    assert said.stdout.startswith("Any defect? 1 pictures, 1 messages.\n[")
