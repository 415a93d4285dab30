"""Normal pictures to train on: a seeded generator -> picture (H, W, 3) uint8 and its part (H, W).

Two sources: free pictures from disk (textures, photographs, cut-outs with transparency), and
procedural ones drawn here: surfaces, turned parts, bevelled silhouettes, panels of cells, slices of
bodies. The variety is the point: made-up defects teach only what their pictures do not give away.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from looktwice_adapters.picture_file import eight_bits

Picture = NDArray[np.uint8]  # (H, W, 3)
Field = NDArray[np.float32]  # (H, W)
Part = NDArray[np.bool_]  # (H, W)
Size = tuple[int, int]  # H, W


@dataclass(frozen=True)
class Scene:
    """A normal picture and where its part is: defects land there."""

    picture: Picture
    part: Part
    kind: str


@dataclass(frozen=True)
class PictureLibrary:
    """Free pictures on disk: opaque ones, and cut-outs (with transparency)."""

    textures: tuple[Path, ...] = ()
    photographs: tuple[Path, ...] = ()
    cutouts: tuple[Path, ...] = ()


def noise(size: Size, rng: Generator, scale: float, stretch: float = 1.0) -> Field:
    """Smooth noise, roughly in [0, 1], whose blobs are `scale` pixels wide and stretched in x."""
    height, width = size
    rows = max(2, round(height / scale) + 1)
    columns = max(2, round(width / (scale * stretch)) + 1)
    grid = rng.random((rows, columns), np.float32)
    return np.asarray(cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC), np.float32)


def fractal(size: Size, rng: Generator, scale: float, stretch: float = 1.0) -> Field:
    """Noise summed over octaves from `scale` down to two pixels, rescaled to [0, 1]."""
    total = np.zeros(size, np.float32)
    weight, decay = 1.0, rng.uniform(0.4, 0.8)
    while scale >= 2:
        total += weight * noise(size, rng, scale, stretch)
        weight, scale = weight * decay, scale / 2
    return rescaled(total)


def rescaled(field: Field) -> Field:
    """The field's 1st and 99th percentile moved to 0 and 1, clipped."""
    low, high = np.percentile(field[::3, ::3], (1, 99))
    return np.clip((field - low) / max(high - low, 1e-6), 0, 1).astype(np.float32)


def turned(field: Field, rng: Generator, angle: float | None = None) -> Field:
    """The field rotated about its middle (mirrored at the borders)."""
    height, width = field.shape[:2]
    angle = rng.uniform(0, 360) if angle is None else angle
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), angle, 1.0)
    return np.asarray(
        cv2.warpAffine(field, matrix, (width, height), borderMode=cv2.BORDER_REFLECT_101)
    )


def random_colour(rng: Generator) -> NDArray[np.float32]:
    """A colour in [0, 255]: often grey or weakly saturated, as materials are."""
    grey = rng.uniform(5, 250)
    saturation = rng.choice([0.0, 0.15, 0.4, 1.0], p=[0.35, 0.3, 0.2, 0.15])
    tint = rng.uniform(-90, 90, 3)
    return np.clip(grey + saturation * tint, 0, 255).astype(np.float32)


def coloured(field: Field, rng: Generator, contrast: float | None = None) -> Picture:
    """Map a field in [0, 1] to a ramp between two or three random colours."""
    contrast = rng.uniform(0.1, 1.0) if contrast is None else contrast
    stops = [random_colour(rng) for _ in range(rng.integers(2, 4))]
    stops = [stops[0], *(stops[0] + contrast * (stop - stops[0]) for stop in stops[1:])]
    positions = np.linspace(0, 1, len(stops))
    channels = [
        np.interp(field, positions, [stop[channel] for stop in stops]) for channel in range(3)
    ]
    return np.clip(np.stack(channels, -1), 0, 255).astype(np.uint8)


def cells(size: Size, rng: Generator, count: int) -> tuple[Field, NDArray[np.int32]]:
    """Voronoi cells of random points: distance to the nearest point, and its number."""
    height, width = size
    seeds = np.full(size, 255, np.uint8)
    seeds[rng.integers(0, height, count), rng.integers(0, width, count)] = 0
    distance, labels = cv2.distanceTransformWithLabels(
        seeds, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL
    )
    return np.asarray(distance, np.float32), np.asarray(labels, np.int32)


# --- surfaces: a field in [0, 1] -----------------------------------------------------------------


def grain_surface(size: Size, rng: Generator) -> Field:
    """Cast, sand-blasted or felted: noise at one fine scale, perhaps over clouds."""
    fine = noise(size, rng, rng.uniform(1.2, 5), rng.choice([1.0, 1.0, 3.0]))
    return rescaled(fine + rng.uniform(0, 1.5) * noise(size, rng, rng.uniform(40, 200)))


def cloud_surface(size: Size, rng: Generator) -> Field:
    """Stone, plaster, hide: fractal noise."""
    return fractal(size, rng, rng.uniform(8, 160), rng.choice([1.0, 1.0, 2.0]))


def brushed_surface(size: Size, rng: Generator) -> Field:
    """Brushed or rolled: noise stretched along one direction."""
    long = rng.uniform(15, 100)
    field = noise(size, rng, rng.uniform(1, 4), long) + rng.uniform(0, 1) * noise(size, rng, 60)
    return turned(rescaled(field), rng, rng.choice([0.0, 90.0, rng.uniform(0, 180)]))


def woven_surface(size: Size, rng: Generator) -> Field:
    """Cloth or mesh: two crossed waves, slightly irregular."""
    y, x = np.mgrid[: size[0], : size[1]].astype(np.float32)
    period = rng.uniform(5, 30)
    wobble = rng.uniform(0, 1.5) * noise(size, rng, 40)
    warp = np.sin(2 * np.pi * x / period + wobble)
    weft = np.sin(2 * np.pi * y / (period * rng.uniform(0.7, 1.4)) + wobble)
    mixed = warp * weft if rng.random() < 0.5 else np.maximum(warp, weft)
    field = rescaled(mixed.astype(np.float32)) + rng.uniform(0, 0.4) * noise(size, rng, 3)
    return turned(rescaled(field), rng, rng.choice([0.0, 45.0, rng.uniform(0, 90)]))


def wood_surface(size: Size, rng: Generator) -> Field:
    """Grain lines of wood: waves over a stretched noise."""
    field = noise(size, rng, rng.uniform(20, 80), rng.uniform(4, 12))
    rings = np.sin(field * rng.uniform(10, 60)) + 0.5 * noise(size, rng, 2, 20)
    return turned(rescaled(rings.astype(np.float32)), rng, rng.choice([0.0, 90.0]))


def cellular_surface(size: Size, rng: Generator) -> Field:
    """Leather or foam: Voronoi cells, dark at their borders."""
    count = int(size[0] * size[1] / rng.uniform(6, 24) ** 2)
    distance, _ = cells(size, rng, count)
    return rescaled(-distance + rng.uniform(0, 3) * noise(size, rng, 3))


def crystal_surface(size: Size, rng: Generator) -> Field:
    """Crystals or terrazzo: Voronoi cells, each of one brightness."""
    count = int(rng.integers(20, 900))
    _, labels = cells(size, rng, count)
    field = rng.random(labels.max() + 1).astype(np.float32)[labels]
    return rescaled(field + rng.uniform(0, 1) * noise(size, rng, rng.uniform(2, 60)))


def speckled_surface(size: Size, rng: Generator) -> Field:
    """Granite or terrazzo: a few levels of thresholded noise."""
    field = np.zeros(size, np.float32)
    for _ in range(rng.integers(1, 4)):
        speck = noise(size, rng, rng.uniform(2, 14)) > rng.uniform(0.6, 0.85)
        field += rng.uniform(-1, 1) * speck
    return rescaled(field + rng.uniform(0, 0.5) * noise(size, rng, 2))


def tiled_surface(size: Size, rng: Generator) -> Field:
    """Bricks, tiles, studs or a perforated sheet: one element repeated."""
    y, x = np.mgrid[: size[0], : size[1]].astype(np.float32)
    step_y, step_x = rng.uniform(12, 90, 2)
    step_x = step_y if rng.random() < 0.5 else step_x
    x = x + (np.floor(y / step_y) % 2) * step_x / 2 * (rng.random() < 0.4)
    u, v = np.abs(x / step_x % 1 - 0.5), np.abs(y / step_y % 1 - 0.5)
    reach = np.hypot(u, v) if rng.random() < 0.5 else np.maximum(u, v)
    edge, soft = rng.uniform(0.2, 0.47), rng.uniform(0.01, 0.08)
    field = 1 / (1 + np.exp(np.clip((reach - edge) / soft, -30, 30)))
    return rescaled(field.astype(np.float32) + rng.uniform(0, 0.5) * fractal(size, rng, 30))


def smooth_surface(size: Size, rng: Generator) -> Field:
    """Painted, polished or blank: nearly nothing to see but the light."""
    return (0.5 + rng.uniform(0, 0.3) * (noise(size, rng, 300) - 0.5)).astype(np.float32)


SURFACES: dict[str, Callable[[Size, Generator], Field]] = {
    "grain": grain_surface,
    "cloud": cloud_surface,
    "brushed": brushed_surface,
    "woven": woven_surface,
    "wood": wood_surface,
    "cellular": cellular_surface,
    "crystal": crystal_surface,
    "speckled": speckled_surface,
    "tiled": tiled_surface,
    "smooth": smooth_surface,
}


def procedural_texture(size: Size, rng: Generator) -> Picture:
    """One of the surfaces, coloured."""
    name = rng.choice(list(SURFACES))
    picture = coloured(SURFACES[name](size, rng), rng)
    if rng.random() < 0.3:
        other = coloured(SURFACES[rng.choice(list(SURFACES))](size, rng), rng)
        picture = cv2.addWeighted(picture, 0.75, other, 0.25, 0).astype(np.uint8)
    return picture


# --- silhouettes: a mask (H, W) uint8 in {0, 255} -------------------------------------------------


def polar_silhouette(side: int, rng: Generator) -> NDArray[np.uint8]:
    """A closed curve about the middle: disc, nut, gear, star, flower or a lump."""
    angle = np.linspace(0, 2 * np.pi, 720, endpoint=False)
    corners = int(rng.integers(3, 25))
    radius: NDArray[Any] = np.ones_like(angle)
    style = rng.choice(["disc", "polygon", "gear", "lump", "flower"])
    if style == "polygon":
        corners = int(rng.integers(3, 9))
        sector = np.pi / corners
        radius = np.cos(sector) / np.cos(angle % (2 * sector) - sector)
    elif style == "gear":
        radius = 1 - rng.uniform(0.05, 0.25) * (np.sin(corners * angle) > rng.uniform(-0.5, 0.5))
    elif style == "flower":
        radius = 1 - rng.uniform(0.05, 0.3) * (0.5 + 0.5 * np.sin(corners * angle))
    elif style == "lump":
        for wave in range(1, 7):
            radius += rng.normal(0, 0.25 / wave**1.3) * np.sin(wave * angle + rng.uniform(0, 6.3))
    reach = radius / radius.max() * side * 0.48
    squash = rng.uniform(0.5, 1) if rng.random() < 0.4 else 1.0
    points = np.stack((np.cos(angle) * reach, np.sin(angle) * reach * squash), -1) + side / 2
    mask = np.zeros((side, side), np.uint8)
    cv2.fillPoly(mask, [points.astype(np.int32)], 255)
    return mask


def jointed_silhouette(side: int, rng: Generator) -> NDArray[np.uint8]:
    """Bars joined at a middle: bolts, keys, brackets, figures, capsules."""
    mask = np.zeros((side, side), np.uint8)
    middle = np.array([side / 2, side / 2])
    symmetric = rng.random() < 0.6
    for _ in range(rng.integers(1, 4)):
        end = middle + rng.uniform(-0.4, 0.4, 2) * side
        ends = [end, (side - end[0], end[1])] if symmetric else [end]
        width = int(side * rng.uniform(0.05, 0.25))
        for stop in ends:
            cv2.line(mask, _point(middle), _point(np.asarray(stop)), 255, width)
    if rng.random() < 0.6:
        centre = middle + np.array([0, rng.uniform(-0.3, 0.3) * side])
        axes = _point(rng.uniform(0.1, 0.3, 2) * side)
        cv2.ellipse(mask, _point(centre), axes, 0, 0, 360, 255, -1)
    return mask


def boxed_silhouette(side: int, rng: Generator) -> NDArray[np.uint8]:
    """Rounded boxes: blocks, plugs, tablets, housings; perhaps with pins."""
    mask = np.zeros((side, side), np.uint8)
    half = rng.uniform(0.2, 0.42, 2) * side
    corner = max(1, int(min(half) * rng.uniform(0.05, 0.95)))
    low, high = side / 2 - half + corner, side / 2 + half - corner
    cv2.rectangle(mask, _point(low), _point(high), 255, -1)
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * corner + 1, 2 * corner + 1))
    mask = np.asarray(cv2.dilate(mask, kernel), np.uint8)
    if rng.random() < 0.4:
        pins, width = int(rng.integers(2, 9)), max(2, int(side * rng.uniform(0.01, 0.04)))
        for x in np.linspace(low[0], high[0], pins):
            cv2.line(mask, _point(np.array([x, side / 2])), (int(x), int(side * 0.97)), 255, width)
    return mask


def with_holes(mask: NDArray[np.uint8], rng: Generator) -> NDArray[np.uint8]:
    """Bores at the middle and, evenly spaced, around it."""
    side = len(mask)
    if rng.random() < 0.35:
        cv2.circle(mask, (side // 2, side // 2), int(side * rng.uniform(0.04, 0.25)), 0, -1)
    if rng.random() < 0.25:
        count, reach = int(rng.integers(2, 9)), side * rng.uniform(0.2, 0.36)
        radius = int(side * rng.uniform(0.015, 0.05))
        for angle in np.arange(count) * 2 * np.pi / count + rng.uniform(0, 6.3):
            spot = np.array([np.cos(angle), np.sin(angle)]) * reach + side / 2
            cv2.circle(mask, _point(spot), radius, 0, -1)
    return mask


def _point(values: NDArray[np.floating]) -> tuple[int, int]:
    return int(values[0]), int(values[1])


def bevelled(mask: NDArray[np.uint8], paint: Picture, rng: Generator) -> Picture:
    """Light a silhouette as if its height rose from the edge: matt shading and a highlight."""
    depth = cv2.distanceTransform(mask, cv2.DIST_L2, 5)
    rim = max(2.0, float(depth.max()) * rng.uniform(0.1, 1.0))
    height = np.sqrt(np.clip(1 - (1 - np.minimum(depth / rim, 1)) ** 2, 0, 1)) * rim
    height = cv2.GaussianBlur(height.astype(np.float32), (0, 0), 1 + 0.02 * len(mask))
    dy, dx = np.gradient(height)
    normal = np.stack((-dx, -dy, np.ones_like(dx)), -1)
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    light = np.array([rng.uniform(-1, 1), rng.uniform(-1, 1), rng.uniform(0.5, 2)])
    light /= np.linalg.norm(light)
    facing = np.clip(normal @ light, 0, 1)
    ambient = rng.uniform(0.2, 0.7)
    gloss = rng.uniform(0, 200) * facing ** rng.uniform(8, 80) * (rng.random() < 0.6)
    shaded = paint * (ambient + (1 - ambient) * facing)[..., None] + gloss[..., None]
    return np.clip(shaded, 0, 255).astype(np.uint8)


def turned_part(side: int, paint: Picture, rng: Generator) -> tuple[Picture, NDArray[np.uint8]]:
    """A part of revolution seen along its axis: rings of a random profile, with light arcs."""
    y, x = np.mgrid[:side, :side].astype(np.float32) - side / 2
    radius, angle = np.hypot(x, y) / (side * 0.48), np.arctan2(y, x)
    stops = np.sort(rng.random(rng.integers(2, 9)))
    profile = rng.uniform(0, 1.4, len(stops) + 1)
    ring = profile[np.searchsorted(stops, np.clip(radius, 0, 1))].astype(np.float32)
    ring = cv2.GaussianBlur(ring, (0, 0), rng.uniform(0.6, 3))
    waves = int(rng.integers(1, 4))
    arcs = np.clip(np.cos(waves * angle + rng.uniform(0, 6.3)), 0, 1) ** rng.uniform(2, 20)
    shine = (
        rng.uniform(0, 120)
        * arcs
        * (rng.random(len(profile)) > 0.5)[np.searchsorted(stops, np.clip(radius, 0, 1))]
    )
    picture = np.clip(paint * ring[..., None] + shine[..., None], 0, 255).astype(np.uint8)
    return picture, ((radius <= 1) * 255).astype(np.uint8)


def procedural_object(
    side: int, paint: Picture, rng: Generator
) -> tuple[Picture, NDArray[np.uint8]]:
    """A drawn part (side, side, 3) and its silhouette."""
    style = rng.choice(["polar", "jointed", "boxed", "turned"], p=[0.4, 0.2, 0.2, 0.2])
    if style == "turned":
        return turned_part(side, paint, rng)
    draw = {"polar": polar_silhouette, "jointed": jointed_silhouette, "boxed": boxed_silhouette}
    mask = with_holes(draw[style](side, rng), rng)
    picture = bevelled(mask, paint, rng)
    if rng.random() < 0.3:  # a marking that belongs to the part: a ring, a bar or letters
        ink = random_colour(rng).tolist()
        _mark(picture, ink, rng)
    return picture, mask


def _mark(picture: Picture, ink: list[float], rng: Generator) -> None:
    side = len(picture)
    spot = _point(rng.uniform(0.3, 0.6, 2) * side)
    thick = int(rng.integers(1, 4))
    style = rng.integers(3)
    if style == 0:
        cv2.circle(picture, (side // 2, side // 2), int(side * rng.uniform(0.1, 0.4)), ink, thick)
    elif style == 1:
        cv2.rectangle(picture, spot, _point(np.add(spot, side * 0.2)), ink, thick)
    else:
        text = "".join(chr(int(code)) for code in rng.integers(48, 91, rng.integers(1, 5)))
        cv2.putText(picture, text, spot, cv2.FONT_HERSHEY_SIMPLEX, side / 300, ink, thick)


# --- pictures from disk ---------------------------------------------------------------------------


@lru_cache(maxsize=256)
def read_picture(path: Path, longest: int = 1024) -> NDArray[np.uint8]:
    """A picture (H, W, 3), with transparency (H, W, 4), its longer side at most `longest`.

    As it is stored: a cut-out keeps its transparency, and no texture has an upright.
    """
    picture = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if picture is None:
        raise ValueError(f"{path} cannot be read as a picture")
    if picture.dtype != np.uint8:
        picture = _eight_bits(picture)
    if picture.ndim == 2:
        picture = cv2.cvtColor(picture, cv2.COLOR_GRAY2RGB)
    else:
        code = cv2.COLOR_BGRA2RGBA if picture.shape[2] == 4 else cv2.COLOR_BGR2RGB
        picture = cv2.cvtColor(picture, code)
    factor = longest / max(picture.shape[:2])
    if factor < 1:
        picture = cv2.resize(picture, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
    return np.asarray(picture, np.uint8)


def _eight_bits(picture: NDArray) -> NDArray[np.uint8]:
    """8 bits of a deeper (H, W) or (H, W, C), whose transparency has a depth of its own."""
    if picture.ndim == 2:
        return eight_bits(picture.astype(np.float32))
    parts = (picture[..., :3], picture[..., 3:])
    return np.dstack([eight_bits(part.astype(np.float32)) for part in parts if part.size])


def disk_texture(size: Size, rng: Generator, paths: tuple[Path, ...]) -> Picture:
    """A random crop, scale and turn of a picture on disk, repeated where it is too small."""
    picture = read_picture(paths[rng.integers(len(paths))])[..., :3]
    factor = rng.uniform(0.35, 1.0) * min(1.0, 1024 / max(picture.shape[:2]))
    need = max(size) / min(picture.shape[:2])
    factor = max(factor, need / 3, 0.15)
    picture = cv2.resize(picture, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
    tiles = [-(-want // have) for want, have in zip(size, picture.shape[:2], strict=True)]
    picture = np.tile(picture, (*tiles, 1))
    top = int(rng.integers(picture.shape[0] - size[0] + 1))
    left = int(rng.integers(picture.shape[1] - size[1] + 1))
    picture = picture[top : top + size[0], left : left + size[1]]
    if size[0] == size[1]:
        picture = np.rot90(picture, int(rng.integers(4)))
    return np.ascontiguousarray(picture)


def disk_cutout(side: int, rng: Generator, paths: tuple[Path, ...]) -> tuple[Picture, NDArray]:
    """A cut-out, its transparent margin removed, centred on a square (side, side)."""
    picture = read_picture(paths[rng.integers(len(paths))])
    alpha = picture[..., 3]
    rows, columns = np.nonzero(alpha.any(1))[0], np.nonzero(alpha.any(0))[0]
    picture = picture[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    factor = side * 0.95 / max(picture.shape[:2])
    shrink = cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
    picture = cv2.resize(picture, None, fx=factor, fy=factor, interpolation=shrink)
    canvas = np.zeros((side, side, 4), np.uint8)
    top, left = (side - picture.shape[0]) // 2, (side - picture.shape[1]) // 2
    canvas[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return canvas[..., :3], canvas[..., 3]


# --- scenes ---------------------------------------------------------------------------------------


def texture(size: Size, rng: Generator, library: PictureLibrary) -> Picture:
    """A surface, from disk or drawn."""
    if library.textures and rng.random() < 0.55:
        return disk_texture(size, rng, library.textures)
    return procedural_texture(size, rng)


def background(size: Size, rng: Generator, library: PictureLibrary) -> Picture:
    """What a part lies on: mostly plain, black or white, sometimes a texture."""
    style = rng.choice(["plain", "black", "white", "texture"], p=[0.35, 0.15, 0.15, 0.35])
    if style == "texture":
        return texture(size, rng, library)
    level = {"black": rng.uniform(0, 20), "white": rng.uniform(235, 255)}.get(style)
    colour = random_colour(rng) if level is None else np.full(3, level, np.float32)
    light = 1 + rng.uniform(0, 0.3) * (noise(size, rng, 300) - 0.5)
    grain = rng.normal(0, rng.uniform(0, 4), size)
    return np.clip(colour * light[..., None] + grain[..., None], 0, 255).astype(np.uint8)


def place(
    canvas: Picture,
    part: Part,
    item: Picture,
    alpha: NDArray,
    corner: tuple[int, int],
    shade: float,
) -> None:
    """Draw an item with its shadow onto the canvas, in place; what sticks out is cut off."""
    top, left = corner
    height, width = canvas.shape[:2]
    y0, x0 = max(0, top), max(0, left)
    y1, x1 = min(height, top + item.shape[0]), min(width, left + item.shape[1])
    if y0 >= y1 or x0 >= x1:
        return
    window = (slice(y0, y1), slice(x0, x1))
    inner = (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))
    opaque = alpha.astype(np.float32)[..., None] / 255
    if shade:
        soft = cv2.GaussianBlur(alpha, (0, 0), 1 + len(alpha) * 0.02).astype(np.float32) / 255
        soft = np.roll(soft, (len(alpha) // 40, len(alpha) // 40), (0, 1))[inner][..., None]
        canvas[window] = (canvas[window] * (1 - shade * soft)).astype(np.uint8)
    mixed = canvas[window] * (1 - opaque[inner]) + item[inner] * opaque[inner]
    canvas[window] = mixed.astype(np.uint8)
    part[window] |= alpha[inner] > 127


def item_of(side: int, rng: Generator, library: PictureLibrary) -> tuple[Picture, NDArray]:
    """One part, from disk or drawn, with its silhouette (side, side)."""
    if library.cutouts and rng.random() < 0.4:
        return disk_cutout(side, rng, library.cutouts)
    return procedural_object(side, texture((side, side), rng, library), rng)


def object_scene(size: Size, rng: Generator, library: PictureLibrary) -> Scene:
    """One part on a background."""
    canvas, part = background(size, rng, library), np.zeros(size, np.bool_)
    side = int(min(size) * rng.uniform(0.55, 1.05))
    item, alpha = item_of(side, rng, library)
    if rng.random() < 0.6:
        angle = rng.uniform(0, 360)
        matrix = cv2.getRotationMatrix2D((side / 2, side / 2), angle, 0.95)
        item = np.asarray(cv2.warpAffine(item, matrix, (side, side)), np.uint8)
        alpha = np.asarray(cv2.warpAffine(alpha, matrix, (side, side)), np.uint8)
    jitter = rng.normal(0, 0.04, 2) * min(size)
    corner = (int((size[0] - side) / 2 + jitter[0]), int((size[1] - side) / 2 + jitter[1]))
    place(canvas, part, item, alpha, corner, rng.uniform(0, 0.7) * (rng.random() < 0.5))
    return Scene(canvas, part, "object")


def several_scene(size: Size, rng: Generator, library: PictureLibrary) -> Scene:
    """Many pieces of one part, in rows or strewn."""
    canvas, part = background(size, rng, library), np.zeros(size, np.bool_)
    rows = int(rng.integers(2, 6))
    step = min(size) / rows
    side = max(16, int(step * rng.uniform(0.7, 0.98)))
    item, alpha = item_of(side, rng, library)
    strewn, shade = rng.random() < 0.4, rng.uniform(0, 0.6) * (rng.random() < 0.5)
    for row in range(int(size[0] / step)):
        for column in range(int(size[1] / step)):
            spot = np.array([row + 0.5, column + 0.5]) * step - side / 2
            matrix = cv2.getRotationMatrix2D(
                (side / 2, side / 2), rng.uniform(0, 360) * strewn, 0.9 if strewn else 1.0
            )
            piece, cover = (
                np.asarray(cv2.warpAffine(layer, matrix, (side, side)), np.uint8)
                for layer in (item, alpha)
            )
            spot += rng.normal(0, 0.12 * strewn, 2) * step
            place(canvas, part, piece, cover, (int(spot[0]), int(spot[1])), shade)
    return Scene(canvas, part, "several")


def texture_scene(size: Size, rng: Generator, library: PictureLibrary) -> Scene:
    """A surface that fills the picture."""
    return Scene(texture(size, rng, library), np.ones(size, np.bool_), "texture")


def photograph_scene(size: Size, rng: Generator, library: PictureLibrary) -> Scene:
    """A crop of a free photograph."""
    if not library.photographs:
        return texture_scene(size, rng, library)
    return Scene(
        disk_texture(size, rng, library.photographs), np.ones(size, np.bool_), "photograph"
    )


def panel_scene(size: Size, rng: Generator, library: PictureLibrary) -> Scene:
    """A board or cell: a material crossed by lines, with pads or chips at regular places."""
    canvas = texture(size, rng, library)
    height, width = size
    for axis, extent in enumerate(size):
        for share in np.linspace(0, extent, int(rng.integers(0, 6)) + 2)[1:-1]:
            at = int(share)
            ink, thick = random_colour(rng).tolist(), int(rng.integers(1, 9))
            start, stop = ((0, at), (width, at)) if axis == 0 else ((at, 0), (at, height))
            cv2.line(canvas, start, stop, ink, thick)
    pitch = rng.uniform(20, 90)
    pad = pitch * rng.uniform(0.1, 0.4)
    if rng.random() < 0.6:
        ink = random_colour(rng).tolist()
        for y in np.arange(pitch / 2, height, pitch):
            for x in np.arange(pitch / 2, width, pitch):
                low, high = (int(x - pad), int(y - pad)), (int(x + pad), int(y + pad))
                cv2.rectangle(canvas, low, high, ink, -1)
    if rng.random() < 0.5:  # a frame: corners cut off, dark margin
        cv2.rectangle(canvas, (0, 0), (width - 1, height - 1), (0, 0, 0), int(rng.integers(2, 16)))
    return Scene(canvas, np.ones(size, np.bool_), "panel")


def slice_scene(size: Size, rng: Generator, library: PictureLibrary) -> Scene:
    """A scan through a body on black: rim, layers, and inner structure alike left and right."""
    del library
    height, width = size
    y, x = np.mgrid[:height, :width].astype(np.float32)
    u, v = (
        (x - width / 2) / (width * rng.uniform(0.3, 0.48)),
        (y - height / 2) / (height * rng.uniform(0.36, 0.48)),
    )
    edge = 0.12 * (noise(size, rng, 120) - 0.5)
    radius = np.hypot(u, v) + edge + edge[:, ::-1]
    inner = fractal(size, rng, rng.uniform(20, 120))
    inner = (inner + inner[:, ::-1]) / 2 + rng.uniform(0, 0.3) * fractal(size, rng, 20)
    stops = np.sort(rng.uniform(0.3, 1.0, rng.integers(2, 6)))
    levels = rng.uniform(0.1, 1, len(stops) + 1)
    levels[-1] = 0
    body = levels[np.searchsorted(stops / stops[-1], radius)] * (0.4 + 0.6 * inner)
    body = cv2.GaussianBlur(body.astype(np.float32), (0, 0), rng.uniform(0.7, 2.5))
    body = body + rng.normal(0, rng.uniform(0, 0.03), size)
    grey = np.clip(body / max(body.max(), 1e-6) * rng.uniform(120, 255), 0, 255).astype(np.uint8)
    return Scene(np.repeat(grey[..., None], 3, -1), radius < 0.95, "slice")


SCENES: dict[str, tuple[Callable[[Size, Generator, PictureLibrary], Scene], float]] = {
    "texture": (texture_scene, 0.32),
    "object": (object_scene, 0.32),
    "several": (several_scene, 0.1),
    "panel": (panel_scene, 0.1),
    "slice": (slice_scene, 0.08),
    "photograph": (photograph_scene, 0.08),
}


def random_size(rng: Generator) -> Size:
    """Picture sizes as cameras and crops give them: 224 to 512 pixels, every aspect up to 2."""
    longer = int(rng.choice([512, 448, 384, 320, 256, 224], p=[0.4, 0.2, 0.1, 0.1, 0.1, 0.1]))
    shorter = longer if rng.random() < 0.6 else int(longer * rng.uniform(0.5, 1.0))
    return (longer, shorter) if rng.random() < 0.4 else (shorter, longer)


def draw_scene(rng: Generator, library: PictureLibrary, size: Size | None = None) -> Scene:
    """A random normal scene of any kind."""
    size = random_size(rng) if size is None else size
    names = list(SCENES)
    chances = np.array([SCENES[name][1] for name in names])
    name = names[rng.choice(len(names), p=chances / chances.sum())]
    return SCENES[name][0](size, rng, library)
