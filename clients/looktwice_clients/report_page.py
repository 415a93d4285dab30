"""The report of many pictures: inspections -> a CSV for a spreadsheet and one HTML page for people.

The page needs nothing but itself: overlays are embedded, its script only sorts, and its content
security policy lets nothing else run or load, whatever a file is called.
"""

import base64
import csv
import hashlib
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from looktwice_clients.errors import LookTwiceError, one_line, printable
from looktwice_clients.images import ImageSource
from looktwice_clients.overlay import OverlayStyle, overlay_jpeg
from looktwice_clients.schemas import Inspection
from looktwice_clients.spreadsheet import cell

OVERLAY = OverlayStyle(shortest=560, longest=560)

ALL_OVERLAYS = 1000
"""Up to so many pictures all are shown; of the later ones only those that are not normal."""

COLUMNS = (
    *("picture", "verdict", "score", "threshold", "severity", "regions", "places", "reference"),
    *("reference_version", "p_value", "width", "height", "model", "expert", "created", "id"),
    "error",
)

SORT = """
const table = document.querySelector("table");
for (const button of table.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th");
    const up = head.getAttribute("aria-sort") !== "ascending";
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = (row) => row.cells[head.cellIndex].dataset.key;
    const order = new Intl.Collator(undefined, { numeric: true }).compare;
    const rows = [...table.tBodies[0].rows].sort((a, b) => order(key(a), key(b)));
    table.tBodies[0].append(...(up ? rows : rows.reverse()));
  });
}
"""


@dataclass(frozen=True)
class Row:
    """One picture of the report."""

    picture: str
    inspection: Inspection | None
    error: str = ""
    overlay: str = ""
    """Base64 of a JPEG; empty where there is none."""

    @property
    def outcome(self) -> str:
        """The verdict, or failed."""
        return self.inspection.verdict if self.inspection else "failed"

    def fields(self) -> dict[str, Any]:
        """The row of the CSV, by the names in `COLUMNS`."""
        found = self.inspection
        if found is None:
            return {"picture": self.picture, "verdict": "failed", "error": self.error}
        reference = found.reference
        return {
            "picture": self.picture,
            "verdict": found.verdict,
            "score": f"{found.score:.4f}",
            "threshold": f"{found.threshold:.4f}",
            "severity": found.severity,
            "regions": len(found.regions),
            "places": found.places().partition(": ")[2],
            "reference": reference.name if reference else "",
            "reference_version": (reference.version or "") if reference else "",
            "p_value": "" if found.p_value is None else f"{found.p_value:.4f}",
            "width": found.width,
            "height": found.height,
            "model": found.model,
            "expert": found.expert,
            "created": datetime.fromtimestamp(found.created, UTC).isoformat(),
            "id": found.id,
            "error": self.error,
        }


@dataclass
class ReportPage:
    """Collects pictures as they are inspected, then writes report.csv and report.html."""

    rows: list[Row] = field(default_factory=list)

    def add(self, picture: str, source: ImageSource, result: Inspection | Exception) -> None:
        """One more picture: its name, the picture itself for the overlay, and what came of it."""
        name = printable(picture)
        if isinstance(result, Exception):
            self.rows.append(Row(name, None, one_line(result)))
            return
        inspection = result.model_copy(update={"map": None})
        overlay, error = "", ""
        if len(self.rows) < ALL_OVERLAYS or result.verdict != "normal":
            try:
                jpeg = overlay_jpeg(source, result, OVERLAY)
                overlay = base64.b64encode(jpeg).decode("ascii")
            except LookTwiceError as problem:
                error = f"no overlay: {one_line(problem)}"
        self.rows.append(Row(name, inspection, error, overlay))

    def write(self, folder: Path) -> list[Path]:
        """Write both files into `folder`, made where it is missing; which they are.

        Raises:
            OSError: they cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        table, page = folder / "report.csv", folder / "report.html"
        # The mark at the start tells spreadsheets that it is UTF-8.
        with table.open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            for row in self.rows:
                fields = row.fields()
                writer.writerow({name: cell(value) for name, value in fields.items()})
        page.write_text(self.html(), encoding="utf-8")
        return [table, page]

    def html(self) -> str:
        """The page: most suspicious first, what failed last."""
        template = files("looktwice_clients").joinpath("report_page.html").read_text("utf-8")
        environment = Environment(autoescape=True, undefined=StrictUndefined)
        environment.filters["day"] = _day
        hashed = base64.b64encode(hashlib.sha256(SORT.encode()).digest()).decode("ascii")
        rows = sorted(self.rows, key=lambda row: -row.inspection.score if row.inspection else 1)
        found = [row.inspection for row in rows if row.inspection]
        return environment.from_string(template).render(
            rows=rows,
            counts=Counter(row.outcome for row in rows),
            models=sorted({(inspection.model, inspection.expert) for inspection in found}),
            made=datetime.now(UTC).timestamp(),
            script=SORT,
            script_hash=hashed,
        )


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
