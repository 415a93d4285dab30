"""`looktwice train synthesis`: a contact sheet of made-up defects, to be judged by eye."""

from pathlib import Path

import click
import cv2
import numpy as np
from numpy.random import Generator
from PIL import Image
from tqdm import tqdm

from looktwice_adapters.scenes import Picture, PictureLibrary, draw_scene, texture
from looktwice_adapters.synthesis import DEFECTS, Defective, photograph, put_defect
from looktwice_adapters.train.options import seed_option
from looktwice_adapters.train.pictures import open_library

OUTLINE = (255, 0, 255)


def draw_defective(kind: str, rng: Generator, library: PictureLibrary, side: int) -> Defective:
    """A scene with a defect of this kind; scenes on which it cannot be seen are drawn again."""
    while True:
        scene = draw_scene(rng, library, (side, side))
        try:
            return put_defect(scene, texture((side, side), rng, library), rng, (kind,))
        except ValueError:
            continue


def outlined(defective: Defective) -> Picture:
    """The picture with its mask's outline."""
    contours, _ = cv2.findContours(
        defective.mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE
    )
    return np.asarray(
        cv2.drawContours(defective.picture.copy(), contours, -1, OUTLINE, 2), np.uint8
    )


def contact_sheet(library: PictureLibrary, seed: int, columns: int, side: int) -> Picture:
    """One row a kind of defect; every other picture is shown with its mask's outline."""
    rng = np.random.default_rng(seed)
    rows = []
    for kind in tqdm(DEFECTS, desc="defects"):
        row: list[Picture] = []
        for column in range(columns):
            defective = draw_defective(kind, rng, library, 2 * side)
            shown = photograph(defective.picture, rng) if column % 2 else outlined(defective)
            row.append(np.asarray(cv2.resize(shown, (side, side), interpolation=cv2.INTER_AREA)))
        strip = np.hstack(row)
        cv2.putText(strip, kind, (3, 12), cv2.FONT_HERSHEY_SIMPLEX, 0.42, OUTLINE, 1, cv2.LINE_AA)
        rows.append(strip)
    return np.vstack(rows)


@click.command("synthesis")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="Picture file to write, such as kinds.png.",
)
@click.option(
    "--pictures",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder that `looktwice train pictures` filled; without it all scenes are drawn.",
)
@seed_option("Of scenes and defects.")
@click.option(
    "--columns",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    help="Pictures of each kind.",
)
@click.option("--side", default=160, show_default=True, help="Pixels of one picture.")
def synthesis(out: Path, pictures: Path | None, seed: int, columns: int, side: int) -> None:
    """Write a contact sheet of made-up defects: a row a kind, every other one outlined."""
    library = PictureLibrary() if pictures is None else open_library(pictures)
    Image.fromarray(contact_sheet(library, seed, columns, side)).save(out)
    click.echo(f"{out}: {len(DEFECTS)} kinds of defects")
