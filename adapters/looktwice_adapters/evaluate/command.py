"""`looktwice evaluate`: data set folders -> a table of figures, or JSON."""

import json
from dataclasses import asdict
from pathlib import Path

import click

COLUMNS = {
    "image_auroc": "img AUROC",
    "image_ap": "img AP",
    "image_f1max": "F1-max",
    "pixel_auroc": "px AUROC",
    "pixel_ap": "px AP",
    "aupro": "AUPRO",
    "verdict_accuracy": "accuracy",
    "verdict_f1": "F1",
    "ece": "ECE",
    "shortcut_auroc": "shortcut",
    "n_normal": "normal",
    "n_anomalous": "anomalous",
}


@click.command()
@click.argument(
    "datasets",
    nargs=-1,
    required=True,
    metavar="DATASET_DIR...",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
)
@click.option(
    "--model",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default="models/nano",
    show_default=True,
    help="Checkpoint folder whose expert has a tower of its own.",
)
@click.option("--limit", type=click.IntRange(1), help="At most this many test images a product.")
@click.option("--seed", default=0, show_default=True, help="Which images --limit draws.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def evaluate(
    datasets: tuple[Path, ...], model: Path, limit: int | None, seed: int, as_json: bool
) -> None:
    """Measure the expert on folders in MVTec AD's layout: image, pixel and verdict figures.

    A DATASET_DIR is a product (it has a folder test) or holds products. `shortcut` is the AUROC of
    the best trivial statistic (brightness, contrast, gradient energy, bytes per pixel): a figure
    that is not well above it says little.
    """
    from looktwice_adapters.checkpoint import ExpertFileError
    from looktwice_adapters.datasets import products
    from looktwice_adapters.evaluate.detector import CheckpointError, Detector
    from looktwice_adapters.evaluate.product import evaluate_product, test_samples
    from looktwice_adapters.metrics import mean_of

    figures = {}
    try:
        detector = Detector.from_folder(model)
        for root in datasets:
            for name, folder in products(root.resolve()).items():
                label = name if name == root.resolve().name else f"{root.resolve().name}/{name}"
                figures[label] = evaluate_product(
                    detector, test_samples(folder, label, limit, seed)
                )
    except (CheckpointError, ExpertFileError, ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    mean = asdict(mean_of(list(figures.values())))
    result = {name: asdict(metrics) for name, metrics in figures.items()}
    if as_json:
        click.echo(json.dumps({"categories": result, "mean": mean}))
    else:
        click.echo(table(result | {"mean": mean}))


def table(rows: dict[str, dict[str, float | None]]) -> str:
    """Figures as text: fractions in per cent with one decimal, counts as they are, "-" for none."""
    width = max(len(name) for name in rows)
    lines = [" " * width + "".join(f"{title:>11}" for title in COLUMNS.values())]
    for name, figures in rows.items():
        values = "".join(f"{_cell(column, figures[column]):>11}" for column in COLUMNS)
        lines.append(f"{name:<{width}}{values}")
    return "\n".join(lines)


def _cell(column: str, value: float | None) -> str:
    if value is None:
        return "-"
    return str(int(value)) if column.startswith("n_") else f"{100 * value:.1f}"
