"""What a run found -> one HTML page that needs nothing beside it, for a screen and for paper."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from looktwice_adapters.evaluate.gallery import gallery
from looktwice_adapters.evaluate.plots import calibration_plot, histogram, roc_plot
from looktwice_adapters.evaluate.results import COLUMNS, Report, cell
from looktwice_adapters.metrics import Metrics

MAX_GALLERIES = 24  # products with pictures: keeps the page below about 10 MB
CLEARLY_ABOVE = 0.05  # so far must an AUROC lie above the best trivial statistic's


def write_html(report: Report, path: Path) -> None:
    """Write the page."""
    page = Environment(
        loader=PackageLoader("looktwice_adapters.evaluate", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page.globals.update(cell=cell, interval=_interval, suspicious=suspicious)
    template = page.get_template("report.html.jinja")
    path.write_text(
        template.render(
            report=report,
            columns=_columns(report),
            means=[(row, row.mean() if row.products else None) for row in report.rows],
            categories=max((len(row.products) for row in report.rows), default=0),
            products=_products(report),
        ),
        encoding="utf-8",
        errors="backslashreplace",  # a file's name need not be UTF-8
    )


def suspicious(metrics: Metrics) -> bool:
    """Whether a trivial statistic is about as good, or better: the AUROC then says little."""
    if metrics.image_auroc is None or metrics.shortcut_auroc is None:
        return False
    return metrics.image_auroc < metrics.shortcut_auroc + CLEARLY_ABOVE


def _columns(report: Report) -> dict[str, str]:
    """The figures that any row has, with their headings."""
    every = [asdict(result.metrics) for row in report.rows for result in row.products.values()]
    return {n: title for n, title in COLUMNS.items() if any(row[n] is not None for row in every)}


def _products(report: Report) -> list[dict[str, Any]]:
    """Plots and pictures of every product that our judge has seen."""
    if report.ours is None:
        return []
    found: list[dict[str, Any]] = []
    for name, result in report.ours.products.items():
        judges = {row.name: row.products[name].cases for row in report.rows if name in row.products}
        judged = any(case.verdict is not None for case in result.cases)
        found.append(
            {
                "name": name,
                "metrics": result.metrics,
                "roc": roc_plot(judges),
                "histogram": histogram(result.cases),
                "calibration": calibration_plot(result.cases) if judged else None,
                "gallery": gallery(result.cases) if len(found) < MAX_GALLERIES else None,
            }
        )
    return found


def _interval(metrics: Metrics, column: str) -> list[str]:
    """A figure's interval in percent; empty where it has none."""
    return [cell(column, bound) for bound in metrics.intervals.get(column, ())]
