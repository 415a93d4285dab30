"""`looktwice train dialogue`: labelled pictures -> conversations.json in LLaVA's format.

What an answer says (verdict, count, 3x3 place, kind, extent, product) is computed from the label
and the mask of a picture, made up here or out of a data set (AnomalyGPT's question and answer
content). Verdict and places are written beside it, for the facts sentence that training tells: the
expert's own, which may be wrong about a picture, would contradict the answer.
"""

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import click
import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from looktwice_adapters.anomaly_map import find_regions
from looktwice_adapters.answers import Facts
from looktwice_adapters.datasets import (
    NORMAL,
    Sample,
    products,
    read_image,
    read_mask,
    read_product,
)
from looktwice_adapters.dialogue import make_dialogue, to_llava
from looktwice_adapters.scenes import PictureLibrary, draw_scene, texture
from looktwice_adapters.synthesis import DEFECTS, photograph, put_defect
from looktwice_adapters.train.options import seed_option
from looktwice_adapters.train.pictures import open_library

SPECK = 1e-4  # share of the picture below which a part of a mask is no region of its own


def facts_of_label(
    product: str, kind: str, mask: NDArray[np.bool_] | None, description: str | None = None
) -> Facts:
    """What label and mask say of a picture.

    Args:
        product: the product's name, as people say it.
        kind: "good", or the defect's name.
        mask: (H, W) where the defect is; None where nobody marked it.
        description: what the product should look like.
    """
    product = product.replace("_", " ")
    if kind == NORMAL:
        return Facts("normal", (), stated=False, product=product, description=description)
    positions: tuple[str, ...] = ()
    area = None
    if mask is not None and mask.any():
        # The innermost point of a region is where it is.
        depth = cv2.distanceTransform(np.pad(mask, 1).astype(np.uint8), cv2.DIST_L2, 3)[1:-1, 1:-1]
        height, width = mask.shape
        inside = np.where(mask, 0.5 + 0.5 * depth / depth.max(), 0).astype(np.float32)
        regions = find_regions(inside, (width, height), at_least_one=True)
        positions = tuple(r.position for r in regions if r.area >= SPECK or r is regions[0])
        area = float(mask.mean())
    return Facts(
        "anomalous",
        positions,
        "highly",
        stated=False,
        product=product,
        kind=kind.replace("_", " "),
        area=area,
        description=description,
    )


def made_up(
    count: int, rng: Generator, library: PictureLibrary, folder: Path
) -> Iterator[tuple[str, Facts]]:
    """Draw scenes, every other with a defect, into a folder: file name and facts of each."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in tqdm(range(count), desc="pictures", unit="picture"):
        scene = draw_scene(rng, library)
        picture, facts = scene.picture, facts_of_label("part", NORMAL, None)
        if number % 2:
            size = (scene.part.shape[0], scene.part.shape[1])
            try:
                made = put_defect(scene, texture(size, rng, library), rng, tuple(DEFECTS))
            except ValueError:  # nothing can be seen on this one: it stays normal
                pass
            else:
                picture, facts = made.picture, facts_of_label("part", made.kind, made.mask)
        path = folder / f"{number:06d}.png"
        Image.fromarray(photograph(picture, rng)).save(path)
        yield str(path.relative_to(folder.parent)), facts


def of_data_set(
    root: Path, descriptions: dict[str, str], start: Path
) -> Iterator[tuple[str, Facts]]:
    """Path from `start` and facts of every picture of a data set."""
    samples: list[Sample] = [
        sample for name, folder in products(root).items() for sample in read_product(folder, name)
    ]
    for sample in tqdm(samples, desc=root.name, unit="picture"):
        mask = None
        if sample.anomalous and sample.masks:
            mask = read_mask(sample, read_image(sample.path).shape[:2])
        product = sample.product.rpartition("/")[2]
        facts = facts_of_label(product, sample.kind, mask, descriptions.get(product))
        yield os.path.relpath(sample.path, start), facts


@click.command("dialogue")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Folder for conversations.json and the pictures that are made up.",
)
@click.option(
    "--count",
    type=click.IntRange(min=0),
    default=1000,
    show_default=True,
    help="Pictures that are made up, every other one with a defect.",
)
@click.option(
    "--data",
    multiple=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A data set in MVTec AD's layout, one conversation a picture, those of test/ too: report "
    "no figures on it. Its licence must allow training. May be given several times.",
)
@click.option(
    "--descriptions",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help='JSON of what products should look like: {"bottle": "Round, with a whole rim."}',
)
@click.option(
    "--pictures",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder that `looktwice train pictures` filled; without it all scenes are drawn.",
)
@seed_option("Of pictures, defects and wording.")
def dialogue(
    out: Path,
    count: int,
    data: tuple[Path, ...],
    descriptions: Path | None,
    pictures: Path | None,
    seed: int,
) -> None:
    """Write conversations about labelled pictures, for `looktwice train assistant`.

    Answers are computed from label and mask: is there a defect, how many, where (3x3), what kind,
    how large, what to do next, what is in the picture, and follow-up questions.
    """
    library = PictureLibrary() if pictures is None else open_library(pictures)
    described = json.loads(descriptions.read_text()) if descriptions else {}
    labelled = list(made_up(count, np.random.default_rng(seed), library, out / "pictures"))
    for root in data:
        labelled += of_data_set(root, described, out)
    if not labelled:
        raise click.UsageError("nothing to talk about: give --count or --data")
    records = []
    for number, (path, facts) in enumerate(labelled):
        conversation = make_dialogue(random.Random(f"{seed} {number}"), [facts])
        records.append(to_llava(conversation, f"{number:06d}", [path]))
    written = out / "conversations.json"
    written.write_text(json.dumps(records, indent=1) + "\n")
    defects = sum(facts.verdict == "anomalous" for _, facts in labelled)
    click.echo(f"{written}: {len(records)} conversations, {defects} about a defect")
