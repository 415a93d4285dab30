"""The report page in a real browser: it sorts by a click, and runs nothing but its own script."""

import base64
import hashlib
import re
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from looktwice_clients import ImageError, Inspection
from looktwice_clients.report_page import ReportPage

INJECTED = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
SCORES = {"b.png": 0.125, "c.png": 0.9, "a.png": 0.5}
REPORT_ORDER = """
document.title = [...document.querySelectorAll("tbody tr")]
  .map((row) => row.cells[0].dataset.key).join(" ");
"""


@pytest.fixture
def page() -> str:
    report = ReportPage()
    for name, score in SCORES.items():
        verdict = "anomalous" if score >= 0.5 else "normal"
        found = Inspection(id="i", score=score, verdict=verdict, width=40, height=30)
        report.add(name, Image.new("RGB", (40, 30)), found)
    report.add("d.png", b"", ImageError(f"{INJECTED}: is empty"))
    return report.html()


def dom_after(page: str, script: str, folder: Path) -> str:
    """What the browser made of the page once `script`, let through by its policy, has run."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = page.replace("script-src ", f"script-src 'sha256-{digest}' ", 1)
    file = folder / "page.html"
    file.write_text(page.replace("</body>", f"<script>{script}</script></body>"))
    browser = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    profile = f"--user-data-dir={folder / 'profile'}"
    run = subprocess.run([*browser, profile, file.as_uri()], capture_output=True, timeout=120)
    return run.stdout.decode()


def title(dom: str) -> str:
    found = re.search(r"<title>(.*?)</title>", dom)
    assert found is not None
    return found[1]


@pytest.mark.parametrize(
    ("column", "clicks", "order"),
    [
        (0, 0, "c.png a.png b.png d.png"),
        (0, 1, "a.png b.png c.png d.png"),
        (0, 2, "d.png c.png b.png a.png"),
        (2, 1, "d.png b.png a.png c.png"),
        (2, 2, "c.png a.png b.png d.png"),
    ],
)
def test_a_click_on_a_heading_sorts_the_table(
    page: str, tmp_path: Path, column: int, clicks: int, order: str
) -> None:
    click = f'document.querySelectorAll("th button")[{column}].click();' * clicks
    assert title(dom_after(page, click + REPORT_ORDER, tmp_path)) == order


def test_a_file_name_runs_nothing_even_if_it_were_not_escaped(page: str, tmp_path: Path) -> None:
    assert title(dom_after(page, "0;", tmp_path)).startswith("Inspection report")
    unescaped = page.replace("d.png", INJECTED)
    assert title(dom_after(unescaped, "0;", tmp_path)).startswith("Inspection report")
    unprotected = re.sub(r"<meta http-equiv[^>]+>", "", unescaped)
    assert title(dom_after(unprotected, "0;", tmp_path)) == "owned"
