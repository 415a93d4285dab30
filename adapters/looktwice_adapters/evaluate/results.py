"""What one run of `looktwice evaluate` found -> a table, JSON and CSV."""

import csv
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from looktwice_adapters.evaluate.product import Case, ProductResult, mean_result
from looktwice_adapters.metrics import Metrics

COLUMNS = {
    "image_auroc": "img AUROC",
    "image_ap": "img AP",
    "image_f1max": "F1-max",
    "pixel_auroc": "px AUROC",
    "pixel_ap": "px AP",
    "aupro": "AUPRO",
    "verdict_accuracy": "accuracy",
    "verdict_f1": "F1",
    "answer_accuracy": "answers",
    "ece": "ECE",
    "shortcut_auroc": "shortcut",
    "n_normal": "normal",
    "n_anomalous": "anomalous",
}


@dataclass(frozen=True)
class Row:
    """One judge's results, or why it has none, or not all."""

    name: str
    sets: dict[str, dict[str, ProductResult]] = field(default_factory=dict)  # set -> product
    problem: str | None = None

    @property
    def products(self) -> dict[str, ProductResult]:
        """Product -> result, of all sets."""
        return {
            name: result for products in self.sets.values() for name, result in products.items()
        }

    def mean(self) -> Metrics:
        """The macro mean over all products."""
        return mean_result(list(self.products.values()))

    def as_json(self) -> dict[str, Any]:
        """`categories` and `mean`, and each set's mean where there are several sets."""
        if not self.sets:
            return {"not_run": self.problem}
        found: dict[str, Any] = {} if self.problem is None else {"ended_early": self.problem}
        found |= {
            "categories": {name: asdict(r.metrics) for name, r in self.products.items()},
            "mean": asdict(self.mean()),
        }
        if len(self.sets) > 1:
            found["sets"] = {
                name: asdict(mean_result(list(products.values())))
                for name, products in self.sets.items()
            }
        return found


@dataclass(frozen=True)
class Report:
    """Everything that one run found."""

    ours: Row | None  # None where only questions were asked
    baselines: tuple[Row, ...] = ()
    reasoning: dict[str, dict[str, Any]] = field(default_factory=dict)  # file -> figures
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> list[Row]:
        """All judges' rows, ours first."""
        return [*([self.ours] if self.ours else []), *self.baselines]

    @property
    def problems(self) -> list[str]:
        """What was not measured, and why."""
        return [
            f"{row.name} {'ended early' if row.sets else 'was not run'}: {row.problem}"
            for row in self.rows
            if row.problem is not None
        ] + [
            f"{name} was not run to its end: {figures['not_run']}"
            for name, figures in self.reasoning.items()
            if "not_run" in figures
        ]

    def as_json(self) -> dict[str, Any]:
        """What `--json` prints."""
        found = self.ours.as_json() if self.ours else {}
        if self.baselines:
            found["baselines"] = {row.name: row.as_json() for row in self.baselines}
        if self.reasoning:
            found["reasoning"] = self.reasoning
        return found | {"settings": self.settings}


def cell(column: str, value: Any) -> str:
    """A figure as a table shows it: percent, a whole number, or a dash."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    return str(value) if column.startswith("n_") else f"{100 * value:.1f}"


def table(report: Report) -> str:
    """The figures in percent, aligned, for a terminal; columns without any are left out."""
    lines = list(_lines(report))
    shown = [
        column
        for column in COLUMNS
        if any(metrics and asdict(metrics)[column] is not None for _, metrics in lines)
    ]
    rows = [["", *(COLUMNS[column] for column in shown)]]
    for name, metrics in lines:
        values = asdict(metrics) if metrics else {}
        rows.append([name, *(cell(column, values.get(column)) for column in shown)])
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    text = [
        row[0].ljust(widths[0])
        + "".join(f"  {value:>{width}}" for value, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]
    return "\n".join([*(text if lines else []), *_reasoning_lines(report)])


def _lines(report: Report) -> Iterator[tuple[str, Metrics | None]]:
    many = len(report.rows) > 1
    for row in report.rows:
        if not row.sets:
            yield f"{row.name}: not run", None
            continue
        before = f"{row.name}: " if many else ""
        for name, result in row.products.items():
            yield before + name, result.metrics
        if len(row.products) > 1:
            yield f"{before}mean", row.mean()


def _reasoning_lines(report: Report) -> Iterator[str]:
    for name, figures in report.reasoning.items():
        if "not_run" in figures:
            yield f"{name}: not run to its end"
        elif "subtasks" in figures:
            for subtask, row in figures["subtasks"].items():
                chance = 100 * row["chance"]
                yield (
                    f"{name}, {subtask}: {100 * row['accuracy']:.1f} "
                    f"(chance {chance:.1f}, {row['questions']} questions)"
                )
            yield f"{name}, average: {100 * figures['average']:.1f}"
            if compared := figures["with_references"]:
                yield f"{name}: {compared} of {figures['questions']} questions against references"
        else:
            mark = "-" if figures["mark"] is None else f"{100 * figures['mark']:.1f}"
            yield (
                f"{name}: ROUGE-L {100 * figures['rouge_l']:.1f}, similarity "
                f"{100 * figures['similarity']:.1f}, mark {mark} ({figures['answers']} answers)"
            )


def write_csv(report: Report, folder: Path) -> None:
    """`metrics.csv`, a line a judge and product; `images.csv`, a line a judge and picture."""
    with _csv_file(folder / "metrics.csv") as out:
        names = [name for name in asdict(Metrics()) if name != "intervals"]
        bounds = [f"{name}_{end}" for name in COLUMNS for end in ("low", "high")]
        writer = csv.DictWriter(out, ["judge", "category", *names, *bounds], restval="")
        writer.writeheader()
        for row in report.rows:
            products = {name: result.metrics for name, result in row.products.items()}
            if products:
                products["mean"] = row.mean()
            for name, metrics in products.items():
                values = asdict(metrics)
                ends = {
                    f"{figure}_{end}": bound
                    for figure, interval in values.pop("intervals").items()
                    for end, bound in zip(("low", "high"), interval, strict=True)
                    if figure in COLUMNS
                }
                writer.writerow({"judge": row.name, "category": name, **values, **ends})
    with _csv_file(folder / "images.csv") as out:
        columns = "judge category path box kind anomalous score verdict answer".split()
        lines = csv.writer(out)
        lines.writerow(columns)
        for row in report.rows:
            for name, result in row.products.items():
                lines.writerows([row.name, name, *_image_line(case)] for case in result.cases)


def _csv_file(path: Path) -> TextIO:
    """A file to write rows into; a picture's name in them need not be UTF-8."""
    return path.open("w", newline="", encoding="utf-8", errors="backslashreplace")


def _image_line(case: Case) -> tuple[Any, ...]:
    sample = case.sample
    box = " ".join(map(str, sample.box or ()))
    said = case.score, case.verdict or "", case.answer or ""
    return sample.path, box, sample.kind, int(sample.anomalous), *said
