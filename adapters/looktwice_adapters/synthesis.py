"""Made-up defects: a normal scene -> a picture with a defect and its mask (H, W) bool.

CutPaste (Li et al., 2021), Poisson-blended patches as NSA (Schlüter et al., 2022), blended textures
as DRAEM (Zavrtanik et al., 2021), and the defects of practice: scratch, crack, stain, hole, dent,
missing piece, contamination, misplacement and more. Every defect lands on the part, differs visibly
from the picture it is put into, and is drawn from one seeded generator.
"""

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from looktwice_adapters.scenes import Part, Picture, Scene, fractal, noise, random_colour

Soft = NDArray[np.floating]  # (H, W) coverage in [0, 1]
Box = tuple[int, int, int, int]  # top, left, bottom, right

# NSA's parameters, as AnomalyGPT set them for objects: sizes as shares of the part's width.
PATCH_SIDE = (0.03, 0.4)  # least, and most
PATCH_GAMMA = (2.0, 0.05)  # shape and scale of what is added to the least
PATCH_RESIZE = (0.7, 1.3)
SMALLEST_PATCH = 16  # pixels; of smaller ones the blending leaves nothing
PATCHES = 3  # at most
MIN_OBJECT = 0.25  # share of a patch that must come from a part
MIN_OVERLAP = 0.25  # share of a patch that must land on the part
LABEL_SLOPE, LABEL_MIDDLE = 1 / 12, 24.0  # logistic of the grey levels by which a pixel changed
VISIBLE = 9.0  # grey levels by which a defect must differ, on its mask's mean
SMALLEST = 3e-4  # fraction of the picture that a defect covers at least


@dataclass(frozen=True)
class Defective:
    """A picture with a defect: what was made up, and where it can be seen."""

    picture: Picture
    mask: Part
    kind: str
    label: Soft  # (H, W) in [0, 1]: how much of a defect each pixel shows


# --- shapes: where a defect is -------------------------------------------------------------------


def spot_on(part: Part, rng: Generator) -> tuple[int, int]:
    """A random pixel (y, x) of the part."""
    inside = np.flatnonzero(part)
    index = int(inside[rng.integers(len(inside))]) if len(inside) else part.size // 2
    return divmod(index, part.shape[1])


def extent(part: Part, rng: Generator, low: float = 0.03, high: float = 0.35) -> float:
    """A defect's length in pixels: log-uniform between two fractions of the part's width."""
    width = np.sqrt(max(int(part.sum()), part.size // 20))
    return float(width * np.exp(rng.uniform(np.log(low), np.log(high))))


def blob(part: Part, rng: Generator, soft: float = 0.0, size: float | None = None) -> Soft:
    """A lump of random outline on the part; `soft` is the width of its edge by its size."""
    y, x = spot_on(part, rng)
    size = extent(part, rng) if size is None else size
    angle = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    radius = np.ones_like(angle)
    for wave in range(1, 8):
        radius += rng.normal(0, 0.35 / wave) * np.sin(wave * angle + rng.uniform(0, 6.3))
    radius = np.clip(radius, 0.15, None) * size / 2
    squash, turn = rng.uniform(0.3, 1.0), rng.uniform(0, np.pi)
    u, v = np.cos(angle) * radius, np.sin(angle) * radius * squash
    points = np.stack(
        (x + u * np.cos(turn) - v * np.sin(turn), y + u * np.sin(turn) + v * np.cos(turn)), -1
    )
    mask = np.zeros(part.shape, np.uint8)
    cv2.fillPoly(mask, [points.astype(np.int32)], 255)
    sigma = max(0.6, soft * size)
    return np.asarray(cv2.GaussianBlur(mask, (0, 0), sigma), np.float32) / 255


def polygon(part: Part, rng: Generator) -> Soft:
    """A sharp irregular polygon of 3 to 7 corners on the part."""
    y, x = spot_on(part, rng)
    size = extent(part, rng, 0.05, 0.4)
    angle = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 8)))
    radius = rng.uniform(0.3, 1, len(angle)) * size / 2
    points = np.stack((x + np.cos(angle) * radius, y + np.sin(angle) * radius), -1)
    mask = np.zeros(part.shape, np.uint8)
    cv2.fillPoly(mask, [points.astype(np.int32)], 255, cv2.LINE_AA)
    return mask.astype(np.float32) / 255


def patchy(part: Part, rng: Generator) -> Soft:
    """Thresholded noise within a lump: many patches of one defect."""
    region = blob(part, rng, 0.1, extent(part, rng, 0.1, 0.7))
    field = fractal((part.shape[0], part.shape[1]), rng, rng.uniform(6, 50))
    return np.asarray(region * np.clip((field - rng.uniform(0.35, 0.6)) * 12, 0, 1), np.float32)


def strokes(
    part: Part, rng: Generator, count: int, bend: float, width: tuple[float, float]
) -> Soft:
    """Smooth strokes through the part: scratches, fibres; `bend` is their wandering in radians."""
    mask = np.zeros(part.shape, np.uint8)
    y, x = spot_on(part, rng)
    length, heading = extent(part, rng, 0.08, 0.9), rng.uniform(0, 2 * np.pi)
    for _ in range(count):
        steps = 24
        turns = heading + rng.normal(0, 0.1) + np.cumsum(rng.normal(0, bend / steps**0.5, steps))
        start = np.array([x, y]) + rng.normal(0, 0.08 * length, 2) * (count > 1)
        moves = np.stack((np.cos(turns), np.sin(turns)), -1) * length * rng.uniform(0.5, 1) / steps
        points = start + np.cumsum(moves, 0) - moves.sum(0) / 2
        thick = max(1, round(rng.uniform(*width) * max(part.shape) / 448))
        cv2.polylines(mask, [(points * 8).astype(np.int32)], False, 255, thick, cv2.LINE_AA, 3)
    return np.asarray(cv2.GaussianBlur(mask, (0, 0), rng.uniform(0.4, 1.0)), np.float32) / 255


def branches(part: Part, rng: Generator) -> Soft:
    """A crack: a jagged walk that forks and thins out."""
    mask = np.zeros(part.shape, np.uint8)
    y, x = spot_on(part, rng)
    length, wide = extent(part, rng, 0.1, 0.9), rng.uniform(1, 5) * max(part.shape) / 448
    queue = [(np.array([x, y], float), rng.uniform(0, 2 * np.pi), length, wide)]
    forks = int(rng.integers(0, 5))
    while queue:
        point, heading, left, thick = queue.pop()
        while left > 0:
            heading += rng.normal(0, 0.45)
            move = rng.uniform(0.02, 0.08) * length
            stop = point + move * np.array([np.cos(heading), np.sin(heading)])
            ends = [tuple(int(c) for c in spot) for spot in (point, stop)]
            cv2.line(mask, ends[0], ends[1], 255, max(1, round(thick)), cv2.LINE_AA)
            point, left, thick = stop, left - move, max(1.0, thick * 0.96)
            if forks and rng.random() < 0.15:
                forks -= 1
                queue.append((point, heading + rng.choice([-1, 1]) * 0.8, left * 0.6, thick * 0.7))
    return np.asarray(cv2.GaussianBlur(mask, (0, 0), 0.6), np.float32) / 255


def box_on(part: Part, rng: Generator, low: float = 0.06, high: float = 0.4) -> Box:
    """An axis-parallel box about a spot of the part, inside the picture."""
    y, x = spot_on(part, rng)
    height, width = (max(6, round(extent(part, rng, low, high))) for _ in range(2))
    height, width = min(height, part.shape[0] - 2), min(width, part.shape[1] - 2)
    top = int(np.clip(y - height // 2, 0, part.shape[0] - height))
    left = int(np.clip(x - width // 2, 0, part.shape[1] - width))
    return top, left, top + height, left + width


def mix(picture: Picture, paint: NDArray, cover: Soft) -> Picture:
    """Paint (a colour or a picture) over the picture where `cover` is 1."""
    cover = cover[..., None]
    return np.clip(picture * (1 - cover) + paint * cover, 0, 255).astype(np.uint8)


def contrasting(picture: Picture, cover: Soft, rng: Generator) -> NDArray[np.float32]:
    """A colour that can be told from what lies under `cover`: darker, brighter, or another."""
    under = np.average(picture.reshape(-1, 3), axis=0, weights=cover.ravel() + 1e-6)
    if rng.random() < 0.25:
        return random_colour(rng)
    step = rng.choice([-1, 1], p=[0.6, 0.4]) * rng.uniform(20, 130)
    if not 0 < under.mean() + step < 255:
        step = -step
    return np.clip(under + step + rng.normal(0, 12, 3), 0, 255).astype(np.float32)


# --- defects: (scene, donor picture, rng) -> picture ----------------------------------------------

Draw = Callable[[Scene, Picture, Generator], Picture]


def scratch(scene: Scene, donor: Picture, rng: Generator) -> Picture:
    """Thin strokes, darker or brighter, with a lit side."""
    cover = strokes(scene.part, rng, int(rng.integers(1, 5)), rng.uniform(0, 0.8), (0.8, 4))
    paint = contrasting(scene.picture, cover, rng)
    picture = mix(scene.picture, paint, cover * rng.uniform(0.4, 1))
    if rng.random() < 0.5:
        lit = np.roll(cover, rng.integers(-2, 3, 2), (0, 1)) * (1 - cover) * rng.uniform(0.2, 0.7)
        picture = mix(picture, 255 - paint, lit)
    return picture


def crack(scene: Scene, donor: Picture, rng: Generator) -> Picture:
    """A dark forked line."""
    cover = branches(scene.part, rng)
    under = np.average(scene.picture.reshape(-1, 3), axis=0, weights=cover.ravel() + 1e-6)
    tone = under * rng.uniform(0.1, 0.6) if rng.random() < 0.8 else under + 90
    return mix(scene.picture, tone, cover * rng.uniform(0.6, 1))


def stain(scene: Scene, donor: Picture, rng: Generator) -> Picture:
    """A fluid's mark: a see-through colour, perhaps with a darker rim."""
    cover = blob(scene.part, rng, rng.choice([0.01, 0.05, 0.15]))
    paint = contrasting(scene.picture, cover, rng)
    picture = mix(scene.picture, paint, cover * rng.uniform(0.3, 0.95))
    if rng.random() < 0.4:
        rim = 4 * cover * (1 - cover)
        picture = mix(picture, paint * 0.5, rim * rng.uniform(0.2, 0.7))
    return picture


def hole(scene: Scene, donor: Picture, rng: Generator) -> Picture:
    """One or a few dark pits with a lit rim."""
    picture, size = scene.picture, extent(scene.part, rng, 0.02, 0.15)
    shift = rng.integers(-2, 3, 2)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        cover = blob(scene.part, rng, 0.03, size * rng.uniform(0.6, 1.4))
        rim = np.clip(np.roll(cover, shift, (0, 1)) - cover, 0, 1)
        picture = mix(picture, np.full(3, rng.uniform(0, 60)), cover * rng.uniform(0.7, 1))
        picture = mix(picture, np.full(3, 255.0), rim * rng.uniform(0, 0.7))
    return picture


def dent(scene: Scene, donor: Picture, rng: Generator) -> Picture:
    """A bump or hollow: one flank lit, the other in shade."""
    cover = blob(scene.part, rng, rng.uniform(0.1, 0.3), extent(scene.part, rng, 0.06, 0.4))
    dy, dx = np.gradient(cv2.GaussianBlur(cover, (0, 0), 2))
    angle = rng.uniform(0, 2 * np.pi)
    slope = np.cos(angle) * dx + np.sin(angle) * dy
    slope *= rng.uniform(30, 110) / max(float(np.abs(slope).max()), 1e-6)
    return np.clip(scene.picture + slope[..., None], 0, 255).astype(np.uint8)


def missing_piece(scene: Scene, donor: Picture, rng: Generator) -> Picture:
    """A piece broken off: what lies around or beneath the part shows instead."""
    cover = polygon(scene.part, rng) if rng.random() < 0.5 else blob(scene.part, rng, 0.01)
    outside = ~scene.part
    if outside.mean() < 0.05:
        broken = contrasting(scene.picture, cover, rng)
        grain = noise((scene.part.shape[0], scene.part.shape[1]), rng, 4)[..., None]
        return mix(scene.picture, broken * (0.7 + 0.6 * grain), cover)
    edge = cv2.dilate(scene.part.astype(np.uint8), np.ones((9, 9), np.uint8)) > scene.part
    near = np.flatnonzero(edge & outside if (edge & outside).any() else outside)
    y, x = divmod(int(near[rng.integers(len(near))]), scene.part.shape[1])
    rows, columns = np.nonzero(cover > 0.5)
    if len(rows) and rng.random() < 0.7:  # bite into the part's edge instead of its middle
        cover = np.roll(cover, (y - int(rows.mean()), x - int(columns.mean())), (0, 1))
    beneath = np.median(scene.picture[outside], axis=0)
    grain = scene.picture[outside].std() * 0.3 * rng.standard_normal(scene.part.shape)[..., None]
    return mix(scene.picture, beneath + grain, cover * scene.part)


def broken_off(scene: Scene, donor: Picture, rng: Generator) -> Picture:
    """Everything of the part beyond a ragged line is gone; full surfaces are torn instead."""
    height, width = scene.part.shape
    y, x = spot_on(scene.part, rng)
    angle = rng.uniform(0, 2 * np.pi)
    v, u = np.mgrid[:height, :width].astype(np.float32)
    side = (u - x) * np.cos(angle) + (v - y) * np.sin(angle)
    side += (fractal((height, width), rng, 60) - 0.5) * rng.uniform(5, 50)
    if scene.part.mean() > 0.95:
        gap = rng.uniform(2, 14)
        return mix(
            scene.picture, np.full(3, rng.uniform(0, 50)), (np.abs(side) < gap) * np.float32(1)
        )
    smaller = side if (scene.part & (side > 0)).sum() < scene.part.sum() / 2 else -side
    cover = np.clip(smaller, 0, 1) * scene.part
    return mix(scene.picture, np.median(scene.picture[~scene.part], axis=0), cover)


def colour_shift(scene: Scene, donor: Picture, rng: Generator) -> Picture:
    """The material in another tone: burnt, bleached, oxidised."""
    cover = blob(scene.part, rng, rng.choice([0.02, 0.1, 0.25]), extent(scene.part, rng, 0.08, 0.6))
    if rng.random() < 0.3:
        cover = patchy(scene.part, rng)
    shifted = scene.picture * rng.uniform(0.4, 1.6) + rng.normal(0, 25, 3)
    return mix(scene.picture, np.clip(shifted, 0, 255), cover)


def smear(scene: Scene, donor: Picture, rng: Generator) -> Picture:
    """The surface's structure wiped away along one direction."""
    size = int(rng.integers(7, 31)) | 1
    kernel = np.zeros((size, size), np.float32)
    angle, middle = rng.uniform(0, np.pi), size // 2
    reach = np.array([np.cos(angle), np.sin(angle)]) * middle
    ends = [
        (round(middle - reach[0]), round(middle - reach[1])),
        (round(middle + reach[0]), round(middle + reach[1])),
    ]
    cv2.line(kernel, ends[0], ends[1], 1.0, int(rng.integers(1, 6)))
    wiped = cv2.filter2D(scene.picture, -1, kernel / kernel.sum())
    return mix(scene.picture, wiped, blob(scene.part, rng, 0.05, extent(scene.part, rng, 0.1, 0.6)))


def remapped(picture: Picture, dx: NDArray, dy: NDArray) -> Picture:
    """The picture with every pixel fetched from (x + dx, y + dy)."""
    height, width = picture.shape[:2]
    y, x = np.mgrid[:height, :width].astype(np.float32)
    fetched = cv2.remap(
        picture,
        (x + dx).astype(np.float32),
        (y + dy).astype(np.float32),
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REFLECT_101,
    )
    return np.asarray(fetched, np.uint8)


def warp(scene: Scene, donor: Picture, rng: Generator) -> Picture:
    """The structure pulled aside: a bulge, a fold, a pulled thread."""
    size = extent(scene.part, rng, 0.1, 0.6)
    cover = blob(scene.part, rng, 0.2, size)
    pull = rng.normal(0, 1, 2)
    pull *= rng.uniform(0.1, 0.35) * size / np.linalg.norm(pull)
    return remapped(scene.picture, cover * pull[0], cover * pull[1])


def bend(scene: Scene, donor: Picture, rng: Generator) -> Picture:
    """A piece turned about a hinge: bent pins, limbs, edges; also a twist of the surface."""
    y, x = spot_on(scene.part, rng)
    cover = blob(scene.part, rng, 0.12, extent(scene.part, rng, 0.2, 0.8))
    angle = cover * rng.choice([-1, 1]) * rng.uniform(0.2, 0.9)
    v, u = np.mgrid[: cover.shape[0], : cover.shape[1]].astype(np.float32)
    u, v = u - x, v - y
    dx = u * np.cos(angle) - v * np.sin(angle) - u
    dy = u * np.sin(angle) + v * np.cos(angle) - v
    return remapped(scene.picture, dx, dy)


def misplaced(scene: Scene, donor: Picture, rng: Generator) -> Picture:
    """A box of the picture shifted, mirrored or turned in its place."""
    top, left, bottom, right = box_on(scene.part, rng, 0.08, 0.4)
    picture = scene.picture.copy()
    style = rng.integers(3)
    if style == 0:
        shift = rng.integers(3, max(4, (bottom - top) // 2 + 4), 2) * rng.choice([-1, 1], 2)
        picture[top:bottom, left:right] = np.roll(picture, shift, (0, 1))[top:bottom, left:right]
    elif style == 1:
        picture[top:bottom, left:right] = picture[top:bottom, left:right][::-1, ::-1]
    else:
        side = min(bottom - top, right - left)
        square = picture[top : top + side, left : left + side]
        picture[top : top + side, left : left + side] = np.rot90(square)
    return picture


def removed(scene: Scene, donor: Picture, rng: Generator) -> Picture:
    """A detail gone: the place filled from its surroundings."""
    cover = blob(scene.part, rng, 0.01, extent(scene.part, rng, 0.06, 0.3))
    hidden = (cover > 0.5).astype(np.uint8)
    small = tuple(max(8, side // 2) for side in hidden.shape[::-1])
    filled = cv2.inpaint(
        cv2.resize(scene.picture, small), cv2.resize(hidden, small), 3, cv2.INPAINT_TELEA
    )
    return mix(scene.picture, cv2.resize(filled, hidden.shape[::-1]), cover)


def particles(scene: Scene, donor: Picture, rng: Generator) -> Picture:
    """Contamination: a spray of specks, chips or crumbs near one place."""
    y, x = spot_on(scene.part, rng)
    spread, size = extent(scene.part, rng, 0.05, 0.4), extent(scene.part, rng, 0.008, 0.04)
    mask = np.zeros(scene.part.shape, np.uint8)
    for _ in range(rng.integers(1, 25)):
        centre = np.array([x, y]) + rng.normal(0, spread / 2, 2)
        axes = np.maximum(1, rng.uniform(0.4, 1.5, 2) * size)
        spot = (int(centre[0]), int(centre[1]))
        cv2.ellipse(
            mask,
            spot,
            (int(axes[0]), int(axes[1])),
            rng.uniform(0, 180),
            0,
            360,
            255,
            -1,
            cv2.LINE_AA,
        )
    cover = mask.astype(np.float32) / 255
    return mix(scene.picture, contrasting(scene.picture, cover, rng), cover * rng.uniform(0.6, 1))


def fibre(scene: Scene, donor: Picture, rng: Generator) -> Picture:
    """A hair or thread lying on the part, with a faint shadow."""
    cover = strokes(scene.part, rng, 1, rng.uniform(1, 3.5), (1.2, 5))
    shadow = np.roll(cover, (2, 2), (0, 1)) * 0.4
    picture = mix(scene.picture, np.zeros(3), shadow)
    return mix(picture, contrasting(scene.picture, cover, rng), cover * rng.uniform(0.7, 1))


def foreign_texture(scene: Scene, donor: Picture, rng: Generator) -> Picture:
    """Another material in patches, half transparent (DRAEM)."""
    cover = patchy(scene.part, rng) if rng.random() < 0.5 else blob(scene.part, rng, 0.02)
    return mix(scene.picture, donor, cover * rng.uniform(0.35, 1))


def lesion(scene: Scene, donor: Picture, rng: Generator) -> Picture:
    """A soft lump of its own brightness, mottled, perhaps ringed."""
    size = extent(scene.part, rng, 0.1, 0.45)
    cover = blob(scene.part, rng, rng.uniform(0.04, 0.15), size)
    shape = (scene.part.shape[0], scene.part.shape[1])
    mottled = 0.7 + 0.6 * (fractal(shape, rng, max(4.0, size / 3)) - 0.5)
    step = rng.choice([-1, 1], p=[0.35, 0.65]) * rng.uniform(25, 110)
    change = cover * mottled * step
    if rng.random() < 0.4:
        change += 4 * cover * (1 - cover) * rng.uniform(-70, 90)
    return np.clip(scene.picture + change[..., None], 0, 255).astype(np.uint8)


def dead_area(scene: Scene, donor: Picture, rng: Generator) -> Picture:
    """A straight-edged area darker or brighter: a dead cell, a band, a missed coat."""
    top, left, bottom, right = box_on(scene.part, rng, 0.08, 0.7)
    cover = np.zeros(scene.part.shape, np.float32)
    if rng.random() < 0.4:  # a band across the whole picture
        top, bottom = (0, scene.part.shape[0]) if rng.random() < 0.5 else (top, bottom)
        left, right = (left, right) if top == 0 else (0, scene.part.shape[1])
    cover[top:bottom, left:right] = 1
    cover = cv2.GaussianBlur(cover, (0, 0), rng.choice([0.6, 2, 8]))
    if rng.random() < 0.5:
        return np.clip(
            scene.picture * (1 - cover * rng.uniform(0.25, 0.8))[..., None], 0, 255
        ).astype(np.uint8)
    shifted = scene.picture * rng.uniform(0.6, 1.5) + rng.normal(0, 20)
    return mix(scene.picture, np.clip(shifted, 0, 255), cover)


def corrosion(scene: Scene, donor: Picture, rng: Generator) -> Picture:
    """Rust, mould or wear: mottled patches of one hue that roughen the surface."""
    cover = patchy(scene.part, rng)
    shape = (scene.part.shape[0], scene.part.shape[1])
    rough = noise(shape, rng, rng.uniform(1.5, 5))[..., None]
    return mix(
        scene.picture,
        contrasting(scene.picture, cover, rng) * (0.5 + rough),
        cover * rng.uniform(0.5, 1),
    )


def roughened(scene: Scene, donor: Picture, rng: Generator) -> Picture:
    """The same tone, another roughness: noise added or contrast raised in a lump."""
    cover = blob(scene.part, rng, 0.05, extent(scene.part, rng, 0.08, 0.5))
    shape = (scene.part.shape[0], scene.part.shape[1])
    rough = (noise(shape, rng, rng.uniform(1.2, 8)) - 0.5) * rng.uniform(60, 200)
    return mix(scene.picture, np.clip(scene.picture + rough[..., None], 0, 255), cover)


def cut_paste(scene: Scene, donor: Picture, rng: Generator) -> Picture:
    """CutPaste: a box of the picture, its tone changed, turned, pasted elsewhere."""
    top, left, bottom, right = box_on(scene.part, rng, 0.06, 0.4)
    height, width = bottom - top, right - left
    if rng.random() < 0.4:  # the "scar": a thin strip
        height, width = (
            (max(2, height // 6), width) if rng.random() < 0.5 else (height, max(2, width // 6))
        )
    y = int(rng.integers(scene.part.shape[0] - height))
    x = int(rng.integers(scene.part.shape[1] - width))
    patch = scene.picture[y : y + height, x : x + width] * rng.uniform(0.6, 1.4)
    layer, mask = np.zeros_like(scene.picture), np.zeros(scene.part.shape, np.uint8)
    layer[top : top + height, left : left + width] = np.clip(patch + rng.normal(0, 10, 3), 0, 255)
    mask[top : top + height, left : left + width] = 255
    middle = (left + width / 2, top + height / 2)
    turn = cv2.getRotationMatrix2D(middle, rng.uniform(-60, 60), 1.0)
    extent_xy = scene.part.shape[::-1]
    cover = cv2.warpAffine(mask, turn, extent_xy).astype(np.float32) / 255
    return mix(scene.picture, cv2.warpAffine(layer, turn, extent_xy), cover)


def poisson_paste(scene: Scene, donor: Picture, rng: Generator) -> Picture:
    """NSA: patches of another picture (or this one), resized, shifted, blended by Poisson editing.

    A patch shows at least a quarter of something (of the part, where it is this picture's own) and
    lands at least a quarter on the part.
    """
    picture = scene.picture
    own = rng.random() < 0.3
    source = scene.picture if own else donor
    content = scene.part if own else foreground(donor)
    for _ in range(int(rng.integers(1, PATCHES + 1))):
        picture = paste_patch(picture, scene.part, source, content, rng)
    return picture


def foreground(picture: Picture) -> Part:
    """Where a picture shows something: pixels that differ from its border's most frequent tone.

    Everything counts on a picture whose border is no plain background.
    """
    border = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]]).astype(float)
    ground = np.median(border, axis=0)
    if np.abs(border - ground).max(-1).mean() > 12:
        return np.ones(picture.shape[:2], np.bool_)
    return np.asarray(np.abs(picture - ground).max(-1) > 12, np.bool_)


def paste_patch(
    picture: Picture, part: Part, source: Picture, content: Part, rng: Generator, tries: int = 12
) -> Picture:
    """Blend one patch of the source into the picture; unchanged where no draw suits.

    Args:
        picture: (H, W, 3) to paste into.
        part: (H, W) where its part is.
        source: (H, W, 3) to cut the patch out of.
        content: (H, W) where the source shows something.
        rng: the only source of chance.
        tries: draws of sizes and places before giving up.
    """
    width_of_part = np.sqrt(max(int(part.sum()), part.size // 20))
    for _ in range(tries):
        shares = np.clip(PATCH_SIDE[0] + rng.gamma(*PATCH_GAMMA, 2), *PATCH_SIDE)
        cut = np.maximum(SMALLEST_PATCH, (shares * width_of_part).astype(int))
        factor = np.clip(rng.normal(1, 0.5), *PATCH_RESIZE)
        height, width = np.maximum(SMALLEST_PATCH, (cut * factor).astype(int)).tolist()
        rows, columns = part.shape
        if height > rows - 2 or width > columns - 2 or (cut > source.shape[:2]).any():
            continue
        y, x = (
            int(rng.integers(side - take + 1))
            for side, take in zip(source.shape[:2], cut, strict=True)
        )
        window = (slice(y, y + int(cut[0])), slice(x, x + int(cut[1])))
        middle = spot_on(part, rng)
        top = int(np.clip(middle[0] - height // 2, 1, rows - height - 1))
        left = int(np.clip(middle[1] - width // 2, 1, columns - width - 1))
        landing = part[top : top + height, left : left + width]
        if content[window].mean() < MIN_OBJECT or landing.mean() < MIN_OVERLAP:
            continue
        patch = cv2.resize(source[window], (width, height))
        mode = cv2.MIXED_CLONE if rng.random() < 0.4 else cv2.NORMAL_CLONE
        centre = (left + width // 2, top + height // 2)
        outline = patch_outline((height, width), rng)
        return np.asarray(cv2.seamlessClone(patch, picture, outline, centre, mode), np.uint8)
    return picture


def patch_outline(size: tuple[int, int], rng: Generator) -> NDArray[np.uint8]:
    """An ellipse or a rectangle (H, W) of 0 and 255 that leaves a patch's edge out."""
    mask = np.zeros(size, np.uint8)
    if rng.random() < 0.4:
        mask[2:-2, 2:-2] = 255
        return mask
    middle = (size[1] // 2, size[0] // 2)
    axes = (max(2, middle[0] - 2), max(2, middle[1] - 2))
    return np.asarray(cv2.ellipse(mask, middle, axes, 0, 0, 360, 255, -1), np.uint8)


DEFECTS: dict[str, Draw] = {
    "scratch": scratch,
    "crack": crack,
    "stain": stain,
    "hole": hole,
    "dent": dent,
    "missing_piece": missing_piece,
    "broken_off": broken_off,
    "colour_shift": colour_shift,
    "smear": smear,
    "warp": warp,
    "bend": bend,
    "misplaced": misplaced,
    "removed": removed,
    "particles": particles,
    "fibre": fibre,
    "foreign_texture": foreign_texture,
    "lesion": lesion,
    "dead_area": dead_area,
    "corrosion": corrosion,
    "roughened": roughened,
    "cut_paste": cut_paste,
    "poisson_paste": poisson_paste,
}


def visible_mask(before: Picture, after: Picture) -> Part:
    """Where the defect can be seen: the pictures' difference above a fifth of its peak, closed."""
    change = np.abs(after.astype(np.float32) - before).max(-1)
    change = cv2.GaussianBlur(change, (0, 0), 1.5)
    seen = (change > max(4.0, 0.2 * float(change.max()))).astype(np.uint8)
    side = max(3, max(seen.shape) // 48) | 1
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))
    return np.asarray(cv2.morphologyEx(seen, cv2.MORPH_CLOSE, kernel), np.bool_)


def intensity_label(before: Picture, after: Picture, mask: Part) -> Soft:
    """NSA's soft label (H, W) in [0, 1]: a logistic of how far each pixel changed, in grey levels.

    The change is the mean over the colours, median filtered; 0 outside the mask.
    """
    change = np.abs(after.astype(np.float32) - before).mean(-1)
    change = cv2.medianBlur(np.clip(change, 0, 255).astype(np.uint8), 5).astype(np.float32)
    return np.asarray(mask / (1 + np.exp(-LABEL_SLOPE * (change - LABEL_MIDDLE))), np.float32)


def put_defect(
    scene: Scene,
    donor: Picture,
    rng: Generator,
    kinds: tuple[str, ...] = tuple(DEFECTS),
    tries: int = 8,
) -> Defective:
    """Put one made-up defect of a random kind onto the part.

    Args:
        scene: a normal picture and its part.
        donor: another picture of the same size, whose material some defects borrow.
        rng: the only source of chance.
        kinds: names out of DEFECTS to draw from.
        tries: how many draws may be too faint or too small before giving up.

    Raises:
        ValueError: no draw was visible (a part of a few pixels).
    """
    for _ in range(tries):
        kind = str(rng.choice(kinds))
        picture = DEFECTS[kind](scene, donor, rng)
        mask = visible_mask(scene.picture, picture)
        change = np.abs(picture.astype(np.float32) - scene.picture).mean(-1)
        if SMALLEST < mask.mean() < 0.6 and change[mask].mean() > VISIBLE:
            label = intensity_label(scene.picture, picture, mask)
            return Defective(picture, mask, kind, label)
    raise ValueError(f"no visible defect in {tries} tries on a part of {int(scene.part.sum())} px")


# --- the camera: the same for normal and defective pictures ---------------------------------------


def photograph(picture: Picture, rng: Generator) -> Picture:
    """Take the picture with a random camera: light, tone, colour, blur, noise, scale and JPEG."""
    height, width = picture.shape[:2]
    image = picture.astype(np.float32)
    if rng.random() < 0.4:
        image *= 1 + rng.uniform(0, 0.6) * (noise((height, width), rng, 250)[..., None] - 0.5)
    if rng.random() < 0.3:
        image[:] = image @ np.array([0.3, 0.59, 0.11], np.float32)[:, None]
    elif rng.random() < 0.4:
        image *= rng.uniform(0.85, 1.15, 3).astype(np.float32)
    image = 255 * np.clip(image / 255, 0, 1) ** np.exp(rng.normal(0, 0.25))
    image = (image - 128) * rng.uniform(0.6, 1.25) + 128 + rng.normal(0, 18)
    if rng.random() < 0.35:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 1.8))
    if rng.random() < 0.4:
        grain = rng.standard_normal((height, width, 1), np.float32)
        image = image + grain * rng.uniform(1, 12)
    image = np.clip(image, 0, 255).astype(np.uint8)
    if rng.random() < 0.2:
        factor = rng.uniform(0.4, 0.9)
        small = cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
        image = cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR)
    if rng.random() < 0.6:
        quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(35, 98))]
        stored = cv2.imencode(".jpg", image, quality)[1]
        return np.asarray(cv2.imdecode(stored, cv2.IMREAD_COLOR), np.uint8)
    return np.asarray(image, np.uint8)
