"""Published data sets' own folder layouts: a folder -> the samples of each of its products.

MVTec AD, MPDD and BTAD share one layout (`datasets.py`). Where a set comes without a split, all of
its pictures are test pictures.
"""

import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import click

from looktwice_adapters.datasets import (
    NORMAL,
    Sample,
    pictures_in,
    products,
    read_image,
    read_painted,
    read_product,
)

Products = dict[str, list[Sample]]


@dataclass(frozen=True)
class Layout:
    """How a data set lies on disk."""

    sets: str
    looks_like: str
    read: Callable[[Path], Products | None]
    """Its products; None where the folder is laid out otherwise."""


def read_dataset(root: Path) -> Products:
    """Name -> samples, train and test, of every product of a data set in any known layout.

    Raises:
        ValueError: no layout fits, or a file of it cannot be read; one line.
    """
    for layout in LAYOUTS:
        found = layout.read(root)
        if found is not None:
            return found
    known = "; ".join(f"{layout.looks_like} ({layout.sets})" for layout in LAYOUTS)
    raise ValueError(f"{root}: no known data set layout; known are: {known}")


def _mvtec(root: Path) -> Products | None:
    """A product's folder, or a folder of such: `<product>/test/<kind>/`, ground_truth beside."""
    try:
        folders = products(root)
    except ValueError:
        return None
    return {name: read_product(folder, name) for name, folder in folders.items()}


def _visa(root: Path) -> Products | None:
    """VisA, or a product's folder in it: `split_csv/1cls.csv` says of each picture product, split,
    label and mask.
    """
    table, above = root / "split_csv" / "1cls.csv", root.resolve().parent
    if not table.is_file():
        whole = _visa(above) if (above / "split_csv" / "1cls.csv").is_file() else None
        return {name: s for name, s in (whole or {}).items() if name == root.resolve().name} or None
    found: Products = {}
    for row in _rows(table, ("object", "split", "label", "image", "mask")):
        normal = row["label"] == "normal"
        masks = () if normal or not row["mask"] else (root / row["mask"],)
        kind = NORMAL if normal else "anomaly"
        sample = Sample(root / row["image"], row["object"], row["split"], kind, masks)
        found.setdefault(row["object"], []).append(sample)
    return found


def _aitex(root: Path) -> Products | None:
    """AITEX: strips of fabric, `nnnn_ddd_ff.png`, read as square tiles of their height.

    ddd is the defect's code. A defective strip's tiles count where its mask covers some of them:
    the others lie beside a defect, and no label says that they are normal.
    """
    if not (root / "Defect_images").is_dir() or not (root / "NODefect_images").is_dir():
        return None
    normal = [
        Sample(path, root.name, "test", NORMAL, (), box)
        for path in pictures_in(root / "NODefect_images", "**/*")
        for box in _tiles(path)
    ]
    defective = list(_aitex_defects(root))
    if not defective:
        raise ValueError(f"{root}: no mask in Mask_images/ covers a strip of Defect_images/")
    return {root.name: normal + defective}


def _aitex_defects(root: Path) -> Iterator[Sample]:
    for path in pictures_in(root / "Defect_images"):
        masks = tuple(pictures_in(root / "Mask_images", f"{path.stem}_mask*"))
        covered = [read_painted(mask) for mask in masks]
        if not covered:
            click.echo(f"looktwice: {path} has no mask and is left out", err=True)
        code = path.stem.split("_")[1] if path.stem.count("_") == 2 else "defect"
        for left, top, right, bottom in _tiles(path):
            if any(mask[top:bottom, left:right].any() for mask in covered):
                yield Sample(path, root.name, "test", code, masks, (left, top, right, bottom))


def _tiles(path: Path) -> list[tuple[int, int, int, int]]:
    height, width = read_image(path).shape[:2]
    return [(left, 0, left + height, height) for left in range(0, width - height + 1, height)]


def _elpv(root: Path) -> Products | None:
    """ELPV: `labels.csv` with path, probability of a defect and module type, split by blanks.

    Cells of probability 0 are normal, of 1 anomalous; the experts doubted those between, which are
    left out, as is usual in anomaly detection (Ding et al., CVPR 2022: 377 of the normal ones).
    """
    table = root / "labels.csv"
    if not table.is_file() or not (root / "images").is_dir():
        return None
    samples = []
    for number, line in enumerate(table.read_text().splitlines(), 1):
        fields = line.split()
        try:
            path, probability = root / fields[0], float(fields[1])
        except (IndexError, ValueError):
            raise ValueError(
                f"{table}, line {number}: expected `images/NAME.png 0.333 mono`, got {line!r}"
            ) from None
        if probability in (0.0, 1.0):
            kind = "defect" if probability else NORMAL
            samples.append(Sample(path, root.name, "test", kind))
    return {root.name: samples}


def _head_ct(root: Path) -> Products | None:
    """HeadCT: `labels.csv` with id and hemorrhage; pictures `head_ct/.../000.png` by id."""
    table = root / "labels.csv"
    if not table.is_file() or not (root / "head_ct").is_dir():
        return None
    by_id = {
        int(path.stem): path
        for path in pictures_in(root / "head_ct", "**/*")
        if path.stem.isdecimal()
    }
    samples = []
    for row in _rows(table, ("id", "hemorrhage")):
        if not row["id"].isdecimal() or int(row["id"]) not in by_id:
            raise ValueError(f"{table}: no picture in {root / 'head_ct'} has the id {row['id']!r}")
        kind = "hemorrhage" if row["hemorrhage"] == "1" else NORMAL
        samples.append(Sample(by_id[int(row["id"])], root.name, "test", kind))
    return {root.name: samples}


def _yes_no(root: Path) -> Products | None:
    """BrainMRI and Br35H: `yes/` are scans with a tumour, `no/` without."""
    folder = next(
        (path for path in (root, root / "brain_tumor_dataset") if (path / "yes").is_dir()), None
    )
    if folder is None or not (folder / "no").is_dir():
        return None
    return {
        root.name: [
            Sample(path, root.name, "test", kind)
            for name, kind in (("no", NORMAL), ("yes", "tumour"))
            for path in pictures_in(folder / name)
        ]
    }


def _rows(table: Path, columns: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """A CSV file's rows, blanks around names and values removed.

    Raises:
        ValueError: a column is missing, or a row is shorter than the header.
    """
    with table.open(newline="") as lines:
        reader = csv.DictReader(lines, skipinitialspace=True, restval=None)
        reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
        missing = [name for name in columns if name not in reader.fieldnames]
        if missing:
            raise ValueError(f"{table} has no column {missing[0]}; expected {', '.join(columns)}")
        for row in reader:
            if any(row[name] is None for name in columns):
                raise ValueError(f"{table}, line {reader.line_num}: too few columns")
            yield {name: row[name].strip() for name in columns}


LAYOUTS = (
    Layout("VisA", "split_csv/1cls.csv", _visa),
    Layout("AITEX", "Defect_images/ and NODefect_images/", _aitex),
    Layout("ELPV", "labels.csv and images/", _elpv),
    Layout("HeadCT", "labels.csv and head_ct/", _head_ct),
    Layout("BrainMRI, Br35H", "yes/ and no/", _yes_no),
    Layout("MVTec AD, MPDD, BTAD and yours", "<product>/test/good/ and test/<defect>/", _mvtec),
)
"""In the order in which they are tried."""
