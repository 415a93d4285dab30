"""Inspection data sets on disk: a folder in MVTec AD's layout -> samples; a picture -> its crops.

Layout: `<product>/{train/good, test/good, test/<defect>, ground_truth/<defect>/<name>_mask.png}`,
or a folder of such folders; `layouts.py` reads the others. Crops are AnyRes' (LLaVA-OneVision):
base view, then a grid.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.v2.functional import InterpolationMode, resize
from transformers.image_processing_utils import select_best_resolution

from looktwice_adapters.anomaly_map import placement
from looktwice_adapters.picture_file import UnreadPictureError, to_rgb

T = TypeVar("T")

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
NORMAL = "good"
NORMAL_FOLDERS = {NORMAL, "ok"}  # BTAD's normal ones are ok, its defective ones ko


@dataclass(frozen=True)
class Sample:
    """One picture of a data set, or one tile of it."""

    path: Path
    product: str
    split: str  # train or test
    kind: str  # good, or the defect's name
    masks: tuple[Path, ...] = ()  # ground truth, their union; none where there is none
    box: tuple[int, int, int, int] | None = None  # left, top, right, bottom of a tile, in pixels

    @property
    def anomalous(self) -> bool:
        """Whether the picture is labelled anomalous."""
        return self.kind != NORMAL


def products(root: Path) -> dict[str, Path]:
    """Name -> folder of every product at or below `root`, in alphabetical order.

    Raises:
        ValueError: nothing below `root` has a test folder.
    """
    folders, seen = [], set()
    for path, names, _ in os.walk(root, followlinks=True):
        folder = Path(path)
        if (real := folder.resolve()) in seen:  # another link to it, or a circle
            names.clear()
            continue
        seen.add(real)
        names[:] = filter(_is_meant, names)
        names.sort(key=lambda name: (folder / name).is_symlink())  # the folder first
        if "test" in names:
            folders.append(folder)
    if not folders:
        raise ValueError(f"{root} is not a data set: it has no folder test/good or test/<defect>")
    return {
        root.name if folder == root else str(folder.relative_to(root)): folder
        for folder in sorted(folders)
    }


def read_product(folder: Path, name: str | None = None) -> list[Sample]:
    """All pictures of one product, train and test, in alphabetical order."""
    painted = pictures_in(folder / "ground_truth", "*/*")
    masks = {(path.parent.name, path.stem): path for path in painted}
    return [
        Sample(
            path,
            name or folder.name,
            split,
            NORMAL if path.parent.name.lower() in NORMAL_FOLDERS else path.parent.name,
            _masks_of(path, masks) if split == "test" else (),
        )
        for split in ("train", "test")
        for path in pictures_in(folder / split, "*/*")
    ]


def pictures_in(folder: Path, pattern: str = "*") -> list[Path]:
    """The picture files of a folder that match, in alphabetical order."""
    return sorted(
        path
        for path in folder.glob(pattern)
        if path.suffix.lower() in ENDINGS and all(map(_is_meant, path.relative_to(folder).parts))
    )


def _is_meant(name: str) -> bool:
    """Whether a file or folder is part of a data set, not what a Mac or Jupyter put beside it."""
    return not name.startswith(".") and name != "__MACOSX"


def _masks_of(path: Path, masks: dict[tuple[str, str], Path]) -> tuple[Path, ...]:
    """The mask of a test picture, of those by kind and stem."""
    names = ((path.parent.name, stem) for stem in (f"{path.stem}_mask", path.stem))
    return tuple(masks[name] for name in names if name in masks)[:1]


def read_image(path: Path) -> NDArray[np.uint8]:
    """A picture as RGB (H, W, 3) uint8, upright, as the server reads it.

    Raises:
        ValueError: the file is missing or no picture; the message names it.
    """
    return np.array(_opened(path, to_rgb), np.uint8)


def read_painted(path: Path) -> NDArray[np.bool_]:
    """Where a mask's file (H, W) is not black.

    Any colour counts: VisA's masks hold small numbers, one for each kind of defect, and a palette
    may show them as any colour. A transparent background is not painted, whatever its colour, nor
    is 1 of 65535 rounded to black, as it is in a picture. In a JPEG half of white and more counts:
    around an outline it is never quite black.

    Raises:
        ValueError: the file is missing or no picture; the message names it.
    """
    return _opened(path, _painted)


def _painted(file: Image.Image) -> NDArray[np.bool_]:
    mask = ImageOps.exif_transpose(file)
    if mask.mode in ("I", "F") or mask.mode.startswith("I;16"):
        return np.asarray(mask) != 0
    colours = np.asarray(mask.convert("RGBA"))
    lit: NDArray[np.bool_] = colours[..., :3].max(-1) > (127 if file.format == "JPEG" else 0)
    shown = colours[..., 3] > 0
    if shown.all():
        return lit
    return lit & shown if (lit & shown).any() else shown  # black may be the brush's colour


def _opened(path: Path, read: Callable[[Image.Image], T]) -> T:
    try:
        with Image.open(path) as image:
            return read(image)
    except Exception as error:  # Pillow's readers report a broken file by whatever went wrong in it
        reason = getattr(error, "strerror", None) or "cannot be read as a picture"
        if isinstance(error, UnreadPictureError | Image.DecompressionBombError):
            reason = str(error)
        raise ValueError(f"{path}: {reason}") from error


def read_sample(sample: Sample) -> NDArray[np.uint8]:
    """A sample's picture, or its tile, as RGB (H, W, 3) uint8."""
    picture = read_image(sample.path)
    if sample.box is None:
        return picture
    left, top, right, bottom = sample.box
    return picture[top:bottom, left:right]


def read_mask(sample: Sample, size: tuple[int, int]) -> NDArray[np.bool_] | None:
    """A sample's mask (H, W); all False for a normal one; None where an anomalous one has none.

    Where it is shrunk, a place counts of which any part is painted, so that no defect is too small.
    """
    if not sample.anomalous:
        return np.zeros(size, np.bool_)
    if not sample.masks:
        return None
    return np.any([_one_mask(path, sample.box, size) for path in sample.masks], axis=0)


def _one_mask(
    path: Path, box: tuple[int, int, int, int] | None, size: tuple[int, int]
) -> NDArray[np.bool_]:
    mask = np.asarray(Image.fromarray(read_painted(path)).crop(box), np.float32)
    shrunk = size[0] <= mask.shape[0] and size[1] <= mask.shape[1]
    method = cv2.INTER_AREA if shrunk else cv2.INTER_NEAREST_EXACT
    resized: NDArray[np.bool_] = cv2.resize(mask, size[::-1], interpolation=method) > 0
    return resized


@dataclass(frozen=True)
class AnyRes:
    """How pictures are cut: the crop's side and the canvases (height, width) to choose from."""

    side: int = 224
    pinpoints: tuple[tuple[int, int], ...] = ((224, 224), (224, 448), (448, 224), (448, 448))

    @classmethod
    def of_checkpoint(cls, model: str | Path) -> Self:
        """As the processor of a LLaVA-OneVision checkpoint (folder or hub name) cuts them.

        Raises:
            OSError, ValueError: there is no such checkpoint.
        """
        from transformers import LlavaOnevisionConfig

        config = LlavaOnevisionConfig.from_pretrained(model)
        pinpoints = tuple((height, width) for height, width in config.image_grid_pinpoints)
        return cls(config.vision_config.image_size, pinpoints)

    def canvas(self, size: tuple[int, int]) -> tuple[int, int]:
        """The canvas (height, width) for a picture of `size` (height, width)."""
        height, width = select_best_resolution(size, list(self.pinpoints))
        return int(height), int(width)

    def fitted(self, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Top, left, height and width of a picture of `size` (height, width) on its canvas."""
        height, width = self.canvas(size)
        place = placement((size[1], size[0]), (width, height))
        return (
            round(place.top * height),
            round(place.left * width),
            round(place.height * height),
            round(place.width * width),
        )

    def crops(self, picture: NDArray[np.uint8]) -> Tensor:
        """The crops of a picture (H, W, 3): uint8 (B, 3, S, S), as the checkpoint's processor's."""
        image = torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)
        size = (image.shape[1], image.shape[2])
        top, left, height, width = self.fitted(size)
        canvas = torch.zeros(3, *self.canvas(size), dtype=torch.uint8)
        smooth = InterpolationMode.BICUBIC
        canvas[:, top : top + height, left : left + width] = resize(image, [height, width], smooth)
        base = resize(image, [self.side, self.side], smooth)
        return torch.stack([base, *self._tiles(canvas)])

    def crop_masks(self, mask: NDArray[np.bool_] | NDArray[np.floating], grid: int) -> Tensor:
        """Share of each token that a mask (H, W) covers: (B, grid, grid) in [0, 1]."""
        cover = torch.from_numpy(mask.astype(np.float32))[None, None]
        size = (mask.shape[0], mask.shape[1])
        top, left, height, width = self.fitted(size)
        canvas = torch.zeros(1, *self.canvas(size))
        canvas[:, top : top + height, left : left + width] = _area(cover, (height, width))
        base = _area(cover, (self.side, self.side))
        tiles = torch.stack([base, *self._tiles(canvas)])
        return _area(tiles, (grid, grid)).squeeze(1)

    def _tiles(self, canvas: Tensor) -> Iterator[Tensor]:
        for top in range(0, canvas.shape[1], self.side):
            for left in range(0, canvas.shape[2], self.side):
                yield canvas[:, top : top + self.side, left : left + self.side]


def _area(cover: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (B, 1, H, W) with antialiasing; a single (1, 1, H, W) comes back as (1, H, W)."""
    out = interpolate(cover, size, mode="bilinear", antialias=True)
    return out[0] if len(cover) == 1 else out
