"""Which test pictures a report shows, and their overlays: cases -> small JPEGs as data URIs."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from looktwice_adapters.datasets import read_sample
from looktwice_adapters.evaluate.product import Case, telling

LONGEST = 240  # pixels of a picture's longer side in the report
QUALITY = 80  # of its JPEG
BLEND = (0.42, 0.65)  # scores up to the first leave the picture as it is, from the second cover it
OPACITY = 0.7
MASK_COLOUR = (0, 230, 255)


@dataclass(frozen=True)
class Shown:
    """A picture of the gallery."""

    title: str
    case: Case
    picture: str  # data URI
    overlay: str | None  # data URI, where there is a map


def gallery(cases: Sequence[Case]) -> list[Shown]:
    """Best, worst and wrong cases of one product, none twice."""
    return [_shown(title, case) for title, cases in telling(cases).items() for case in cases]


def _shown(title: str, case: Case) -> Shown:
    picture = read_sample(case.sample)
    factor = LONGEST / max(picture.shape[:2])
    size = max(1, round(picture.shape[1] * factor)), max(1, round(picture.shape[0] * factor))
    way = cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
    small = np.asarray(cv2.resize(picture, size, interpolation=way), np.uint8)
    overlay = None
    if case.anomaly_map is not None:
        overlay = _jpeg(draw_overlay(small, case.anomaly_map, case.mask))
    return Shown(title, case, _jpeg(small), overlay)


def draw_overlay(
    picture: NDArray[np.uint8],
    anomaly_map: NDArray[np.float32],
    mask: NDArray[np.bool_] | None,
) -> NDArray[np.uint8]:
    """The picture under its map, on the map's fixed scale, with the mask's outline.

    Args:
        picture: (H, W, 3) RGB.
        anomaly_map: (h, w) in [0, 1].
        mask: (h, w), or None.
    """
    size = picture.shape[1], picture.shape[0]
    values = np.clip(cv2.resize(anomaly_map, size, interpolation=cv2.INTER_LINEAR), 0, 1)
    colours = cv2.applyColorMap((255 * values).astype(np.uint8), cv2.COLORMAP_INFERNO)[..., ::-1]
    opacity = OPACITY * np.clip((values - BLEND[0]) / (BLEND[1] - BLEND[0]), 0, 1)[..., None]
    drawn = np.ascontiguousarray((picture * (1 - opacity) + colours * opacity).astype(np.uint8))
    if mask is not None and mask.any():
        large = cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
        outlines, _ = cv2.findContours(large, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(drawn, outlines, -1, MASK_COLOUR, 1)
    return drawn


def _jpeg(picture: NDArray[np.uint8]) -> str:
    _, content = cv2.imencode(
        ".jpg", np.ascontiguousarray(picture[..., ::-1]), [cv2.IMWRITE_JPEG_QUALITY, QUALITY]
    )
    return f"data:image/jpeg;base64,{base64.b64encode(content.tobytes()).decode('ascii')}"
