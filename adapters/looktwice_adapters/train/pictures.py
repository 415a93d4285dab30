"""Free pictures to train on: Debian packages by name, and scikit-image -> a PictureLibrary.

`fetch` downloads and unpacks packages with Debian's own tools; `open_library` sorts what it finds
into textures, photographs and cut-outs (pictures with transparency around them).
"""

import subprocess
import zipfile
from pathlib import Path

import click
import cv2
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from looktwice_adapters.checkpoint import file_hash
from looktwice_adapters.scenes import PictureLibrary
from looktwice_adapters.train.draft import draft_of

# Package -> what its pictures are. Licences: each package's debian/copyright (GPL-2+, CC BY(-SA),
# CC0 and public domain); pictures only train the expert, none is shipped.
PACKAGES = {
    "gnome-backgrounds": "photographs",
    "plasma-workspace-wallpapers": "photographs",
    "mate-backgrounds": "photographs",
    "sway-backgrounds": "photographs",
    "ukui-wallpapers": "photographs",
    "lomiri-wallpapers-16.04": "photographs",
    "lomiri-wallpapers-20.04": "photographs",
    "openarena-081-textures": "textures",
    "ufoai-textures": "textures",
    "tuxpaint-stamps-default": "cutouts",
    "sweethome3d-furniture": "cutouts",
}
ARCHIVES = ("*.pk3", "*.sh3f")  # zip files by another name
ENDINGS = {".jpg", ".jpeg", ".png", ".webp"}
# Not pictures of a surface: normal, gloss, shine and roughness maps, fonts, skies.
LEFT_OUT = ("_nm", "_norm", "_gm", "_sm", "_rm", "_shine", "_glow", "font", "env", "sky", "flare")
INDEX, UNUSABLE = "library.txt", "unusable.txt"
SCIKIT_IMAGE = ("brick.png", "grass.png", "gravel.png")  # CC0
SMALLEST, LONGEST = 128, 1024  # pixels a side; longer ones are shrunk when they are unpacked


def fetch(folder: Path) -> None:
    """Download and unpack every package of PACKAGES that `folder` does not hold yet.

    Raises:
        subprocess.CalledProcessError: apt-get or dpkg-deb failed (not a Debian machine, offline).
    """
    folder.mkdir(parents=True, exist_ok=True)
    for package in tqdm(PACKAGES, desc="pictures"):
        target = folder / package
        if target.exists():
            continue
        subprocess.run(
            ["apt-get", "download", package], cwd=folder, check=True, stdout=subprocess.DEVNULL
        )
        (archive,) = folder.glob(f"{package}_*.deb")
        partial = folder / f"{package}.partial"
        subprocess.run(["dpkg-deb", "-x", archive, partial], check=True)
        for pattern in ARCHIVES:
            for inner in partial.rglob(pattern):
                with zipfile.ZipFile(inner) as unpacked:
                    unpacked.extractall(inner.with_suffix(".unpacked"))
        shrink(partial)
        partial.rename(target)
        archive.unlink()


def shrink(folder: Path) -> None:
    """Shrink the pictures under a folder to LONGEST pixels, in place: they are read many times."""
    for path in folder.rglob("*"):
        if path.suffix.lower() not in ENDINGS or path.is_symlink():
            continue
        picture = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        if picture is not None and max(picture.shape[:2]) > LONGEST:
            factor = LONGEST / max(picture.shape[:2])
            small = cv2.resize(picture, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
            cv2.imwrite(str(path), small)


def open_library(folder: Path) -> PictureLibrary:
    """Sort the pictures under a folder that `fetch` filled (or your own, in its subfolders).

    Pictures of a subfolder that is no package of PACKAGES count as textures; those with
    transparency around them as cut-outs wherever they lie. The order is kept in library.txt, and
    what cannot be used in unusable.txt; pictures that came or went since then change both.

    Raises:
        ValueError: the folder holds no picture that can be used.
    """
    shelves: dict[str, list[Path]] = {"textures": [], "photographs": [], "cutouts": []}
    for name, shelf in _index(folder).items():
        shelves[shelf].append(folder / name)
    if not any(shelves.values()):
        raise ValueError(
            f"{folder} holds no picture to train on: of at least {SMALLEST} px a side, and not of "
            "one even colour"
        )
    shelves["textures"] += _scikit_image()
    return PictureLibrary(**{name: tuple(paths) for name, paths in shelves.items()})


def index_hash(folder: Path) -> str:
    """Hash of which pictures the library of a folder has, and in which order."""
    return file_hash(folder / INDEX)


def _index(folder: Path) -> dict[str, str]:
    """Name -> shelf of every usable picture; only pictures that are new are looked at."""
    known = {}
    for line in _lines(folder / INDEX):
        shelf, _, name = line.partition("\t")
        known[name] = shelf
    unusable = set(_lines(folder / UNUSABLE))
    names = [str(path.relative_to(folder)) for path in _candidates(folder)]
    if set(names) == known.keys() | unusable:
        return known
    shelves: dict[str, str | None] = {}
    for name in tqdm(names, desc="sorting pictures"):
        if name in known or name in unusable:
            shelves[name] = known.get(name)
        else:
            path = folder / name
            shelves[name] = _shelf(path, PACKAGES.get(Path(name).parts[0]))
    usable = {name: shelf for name, shelf in shelves.items() if shelf is not None}
    _write_lines(folder / UNUSABLE, [name for name in names if name not in usable])
    if usable != known:
        _write_lines(folder / INDEX, [f"{shelf}\t{name}" for name, shelf in usable.items()])
        return usable
    return known  # in its own order


def _candidates(folder: Path) -> list[Path]:
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in ENDINGS
        and not path.is_symlink()
        and not (_packed(path, folder) and any(part in path.stem.lower() for part in LEFT_OUT))
    ]


def _packed(path: Path, folder: Path) -> bool:
    """Whether a picture comes from one of PACKAGES."""
    return path.relative_to(folder).parts[0] in PACKAGES


def _lines(path: Path) -> list[str]:
    text = path.read_text() if path.exists() else ""
    return [line for line in text.split("\n") if line]


def _write_lines(path: Path, lines: list[str]) -> None:
    with draft_of(path) as draft:
        draft.write_text("".join(f"{line}\n" for line in lines))


def _shelf(path: Path, packed: str | None) -> str | None:
    """Where a picture belongs, `packed` being what its package holds; None: nowhere."""
    picture = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if picture is None or min(picture.shape[:2]) < SMALLEST:
        return None
    if picture.ndim == 2 and packed is not None:  # of games, grey ones are maps of relief or shine
        return None
    if picture.ndim == 3 and picture.shape[2] == 4:
        opaque = float((picture[..., 3] > 127).mean())
        if opaque < 0.97:
            return "cutouts" if opaque > 0.1 else None
    if packed == "cutouts" or picture.std() < 3:  # opaque beside cut-outs: texture atlases
        return None
    return packed or "textures"


def _scikit_image() -> list[Path]:
    import skimage

    folder = Path(skimage.__file__).parent / "data"
    return [folder / name for name in SCIKIT_IMAGE]


def part_of(picture: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Guess where the part is on a plain background: (H, W) bool, all True on full surfaces."""
    border = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    ground, spread = np.median(border, axis=0), border.std(axis=0).mean()
    away = np.abs(picture.astype(np.float32) - ground).max(-1)
    part = (cv2.GaussianBlur(away, (0, 0), 2) > max(25.0, 2.5 * float(spread))).astype(np.uint8)
    part = cv2.morphologyEx(part, cv2.MORPH_CLOSE, np.ones((9, 9), np.uint8))
    if not 0.05 < part.mean() < 0.8:
        return np.ones(part.shape, np.bool_)
    return np.asarray(part > 0, np.bool_)


@click.command("pictures")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Folder for the pictures.",
)
def pictures(out: Path) -> None:
    """Fetch the free pictures that the recipes train on, from Debian's packages by name."""
    try:
        fetch(out)
    except (OSError, subprocess.CalledProcessError) as error:
        raise click.ClickException(f"cannot fetch pictures: {error}") from error
    library = open_library(out)
    click.echo(
        f"{out}: {len(library.textures)} textures, {len(library.photographs)} photographs, "
        f"{len(library.cutouts)} cut-outs"
    )
