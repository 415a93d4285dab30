"""The report of a folder: complete, self-contained, and harmless whatever a file is called."""

import base64
import csv
import hashlib
import io
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from looktwice_clients import ImageError, Inspection, Inspector
from looktwice_clients.cli import run
from looktwice_clients.report_page import ALL_OVERLAYS, ReportPage
from looktwice_clients.spreadsheet import cell

INJECTION = '<img src=x onerror=alert(1)>"><script>alert(2)</script>.png'


class Page(HTMLParser):
    """The tags, attributes and texts of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """Good and bad pictures, one of them named to attack the report, and junk between them."""
    folder = tmp_path / "parts"
    (folder / "deep").mkdir(parents=True)
    for name, level in (("a.png", 20), ("=b.jpg", 230), ("deep/c,d.png", 100), ("e.png", 204)):
        Image.new("RGB", (40, 30), (level, 0, 0)).save(folder / name, quality=95)
    Image.new("RGB", (40, 30), (140, 0, 0)).save(folder / INJECTION.replace("/", "_"))
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing more")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "program.png").write_bytes(b"\x7fELF" + bytes(1000))
    (folder / "drawing.png").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (folder / "Thumbs.db").write_bytes(bytes(10))
    (folder / "notes.txt").write_text("no picture")
    (folder / "folder.png").mkdir()
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    with (folder / "huge.png").open("wb") as huge:
        huge.truncate(500_000_000)
    return folder


def inspection(score: float, **fields: Any) -> Inspection:
    verdict = "anomalous" if score >= 0.5 else "normal"
    return Inspection(id="i", score=score, verdict=verdict, width=40, height=30, **fields)


def test_a_folder_with_mixed_junk_becomes_a_whole_report(
    parts: Path, wire: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(["inspect", str(parts), "--report", str(out)]) == 1
    captured = capsys.readouterr()
    assert f"wrote {out}/report.csv and {out}/report.html" in captured.err
    assert "3 anomalous" in captured.err
    assert "5 failed" in captured.err
    with (out / "report.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = {Path(row["picture"]).name: row for row in csv.DictReader(file)}
    assert len(rows) == 10
    assert (rows["a.png"]["verdict"], rows["a.png"]["score"]) == ("normal", "0.0784")
    assert (rows["e.png"]["verdict"], rows["e.png"]["places"]) == ("anomalous", "bottom left")
    assert "500 MB is too large" in rows["huge.png"]["error"]
    assert "export it as PNG" in rows["drawing.png"]["error"]
    page = Page((out / "report.html").read_text(encoding="utf-8"))
    assert len(page.all("img")) == 5
    assert [text for text in page.texts if re.fullmatch(r"0\.\d{3}", text)] == sorted(
        [f"{level / 255:.3f}" for level in (20, 230, 100, 204, 140)], reverse=True
    )


def test_the_page_loads_nothing_and_runs_nothing_but_its_own_script(
    parts: Path, wire: Any, tmp_path: Path
) -> None:
    run(["inspect", str(parts), "--report", str(tmp_path / "out")])
    html = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert all(image["src"].startswith("data:image/jpeg;base64,") for image in page.all("img"))
    assert not [name for _, attributes in page.tags for name in attributes if name[:2] == "on"]
    assert not page.all("link") + page.all("iframe") + page.all("a")
    assert len(page.all("script")) == 1
    script = re.search(r"<script>(.*?)</script>", html, re.DOTALL)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    [policy] = [meta["content"] for meta in page.all("meta") if "http-equiv" in meta]
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert f"script-src 'sha256-{digest}'" in policy
    assert any(INJECTION.replace("/", "_") in text for text in page.texts)


def test_the_embedded_overlays_are_pictures(tmp_path: Path) -> None:
    page = ReportPage()
    page.add("part", Image.new("RGB", (40, 30)), inspection(0.9))
    [row] = page.rows
    assert Image.open(io.BytesIO(base64.b64decode(row.overlay))).size[0] == 560


@pytest.mark.parametrize("name", ["=HYPERLINK(1)", "+1", "-1", "@SUM(1)"])
def test_a_name_never_becomes_a_formula_of_a_spreadsheet(tmp_path: Path, name: str) -> None:
    page = ReportPage()
    page.add(name, b"", ImageError(f"{name}: is empty"))
    table, _ = page.write(tmp_path)
    with table.open(encoding="utf-8-sig", newline="") as file:
        [row] = csv.DictReader(file)
    assert (row["picture"], row["error"]) == (f"'{name}", f"'{name}: is empty")


def test_what_follows_a_tab_or_a_carriage_return_is_no_formula_either() -> None:
    assert [cell(text) for text in ("\t=1", "\r=1", "a=1", "", -1)] == [
        *("'\t=1", "'\r=1", "a=1", "", -1)
    ]


def test_names_in_any_writing_survive(tmp_path: Path) -> None:
    page = ReportPage()
    for name in ("나사.png", "Prüfling.png", "a\udcffb.png"):
        page.add(name, Image.new("RGB", (40, 30)), inspection(0.1))
    for file in page.write(tmp_path):
        written = file.read_text(encoding="utf-8-sig")
        assert all(name in written for name in ("나사.png", "Prüfling.png", "a\ufffdb.png"))


def test_a_picture_that_is_gone_is_reported_without_its_overlay(tmp_path: Path) -> None:
    page = ReportPage()
    page.add("part.png", tmp_path / "part.png", inspection(0.9))
    [row] = page.rows
    assert (row.outcome, row.overlay) == ("anomalous", "")
    assert "no overlay" in page.html()


def test_of_many_pictures_only_the_suspicious_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    draw: Callable[..., bytes] = lambda source, *_: drawn.append(source) or b"x"  # noqa: E731
    monkeypatch.setattr("looktwice_clients.report_page.overlay_jpeg", draw)
    page = ReportPage()
    for number in range(ALL_OVERLAYS + 20):
        page.add(str(number), str(number), inspection(0.9 if number % 10 == 9 else 0.1))
    assert drawn == [str(n) for n in range(ALL_OVERLAYS)] + ["1009", "1019"]


def test_the_report_of_what_was_inspected_is_kept_when_the_server_goes_away(
    parts: Path,
    wire: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    inspect = Inspector.inspect

    def once(self: Inspector, *arguments: Any) -> Inspection:
        found = inspect(self, *arguments)
        wire.key = "changed"
        return found

    monkeypatch.setattr(Inspector, "inspect", once)
    pictures = [str(parts / name) for name in ("a.png", "e.png")]
    out = tmp_path / "out"
    assert run(["inspect", *pictures, "--report", str(out), "--concurrency", "1"]) == 1
    assert "wants an API key" in capsys.readouterr().err
    with (out / "report.csv").open(encoding="utf-8-sig", newline="") as file:
        assert [Path(row["picture"]).name for row in csv.DictReader(file)] == ["a.png"]


def test_a_report_that_cannot_be_written_is_one_line(
    parts: Path, wire: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert run(["inspect", str(parts / "a.png"), "--report", str(tmp_path / "file")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert run(["inspect", str(parts / "a.png"), "--report", str(tmp_path / "file/deep")]) == 1
    assert "Not a directory" in capsys.readouterr().err
