"""`looktwice inspect`: files, folders, patterns, addresses -> a line each, overlays, exit code."""

import glob
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Self

import click

from looktwice_clients.cli import timeout_option, url_option
from looktwice_clients.errors import ImageError, one_line, printable

if TYPE_CHECKING:
    from looktwice_clients.images import ImageSource
    from looktwice_clients.inspector import Inspector
    from looktwice_clients.schemas import Inspection

PICTURE_SUFFIXES = {
    *(".avif", ".bmp", ".dib", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".jpx"),
    *(".mpo", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"),
}
"""What is taken for a picture inside a folder; a file named on its own may have any name."""

THUMBNAILS = "@eaDir"
"""Where a Synology disk station keeps small copies of a folder's pictures."""

OVERLAY_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}


@dataclass(frozen=True)
class Target:
    """One picture to inspect."""

    path: str
    """As it is reported: what the user named, or its path below the folder that the user named."""
    source: "ImageSource"
    problem: ImageError | None = None
    """Why it cannot even be sent."""
    overlay: Path | None = None
    """Where its overlay picture goes."""
    folder: Path | None = None
    """The folder that the user named, where it was found in one."""


@click.command()
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@click.option("--reference", metavar="NAME", help="Compare with this product's normal images.")
@click.option("--json", "as_json", is_flag=True, help="Print one inspection object a line.")
@click.option(
    "--map",
    "map_to",
    metavar="FILE.png|DIR",
    type=click.Path(path_type=Path),
    help="Write the overlay picture: the part with its anomaly map and regions.",
)
@click.option(
    "--report",
    "report_to",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    help="Write report.csv and report.html, a page with all overlays in it.",
)
@click.option(
    "--fail-on",
    type=click.Choice(["anomalous", "undecided"]),
    multiple=True,
    help="Exit with 1 if any picture has this verdict; may be given twice.",
)
@click.option(
    "--concurrency",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    help="Requests under way at once.",
)
@url_option
@timeout_option()
@click.pass_context
def inspect(
    ctx: click.Context,
    images: tuple[str, ...],
    reference: str | None,
    as_json: bool,
    map_to: Path | None,
    report_to: Path | None,
    fail_on: tuple[str, ...],
    concurrency: int,
    url: str | None,
    timeout: float,
) -> None:
    """Score, verdict and regions of each IMAGE: a file, a folder, a pattern or an http(s) address.

    A picture that cannot be inspected is reported in its line, and the exit code is 1.
    """
    from looktwice_clients.inspector import Inspector
    from looktwice_clients.report_page import ReportPage

    drawn = map_to is not None or report_to is not None
    targets = with_overlays(expand(images, fetch=drawn), map_to)
    tally: Counter[str] = Counter()
    undrawn = 0
    page = ReportPage() if report_to is not None else None
    try:
        with Inspector(url, timeout=timeout) as inspector, _Lines(as_json, len(targets)) as show:
            for target, result in results(inspector, targets, reference, concurrency, drawn):
                show.line(target, result)
                tally[_outcome(result)] += 1
                if page is not None:
                    page.add(target.path, target.source, result)
                if target.overlay is not None and not isinstance(result, Exception):
                    undrawn += not _write_overlay(target, result)
    finally:  # where the server went away or the user had enough, what is known is kept
        if page is not None and page.rows and report_to is not None:
            written = " and ".join(str(file) for file in page.write(report_to))
            click.echo(f"looktwice: wrote {printable(written)}", err=True)
    if len(targets) > 1 and not as_json:
        counts = [f"{count} {outcome}" for outcome, count in tally.items()]
        counts += [f"{undrawn} without overlay"] if undrawn else []
        click.echo(", ".join(counts), err=True)
    failed = undrawn or any(tally[outcome] for outcome in ("failed", *fail_on))
    ctx.exit(1 if failed else 0)


def expand(names: tuple[str, ...], fetch: bool = False) -> list[Target]:
    """The pictures behind files, folders (with all below them), patterns and addresses, in order.

    Args:
        names: what the user named.
        fetch: whether an address is fetched here, so that what is inspected is what is drawn on.
    """
    return [target for name in names for target in _expand_one(name, fetch)]


def _expand_one(name: str, fetch: bool) -> list[Target]:
    from looktwice_clients.images import is_web_address, read

    if not name:  # a script's empty variable, which as a path would be the folder that it runs in
        return [Target(name, name, ImageError("the name of a picture or folder is empty"))]
    path = Path(name)
    if is_web_address(name):
        if not fetch:
            return [Target(name, name)]
        try:
            return [Target(name, read(name))]
        except ImageError as error:
            return [Target(name, name, error)]
    try:
        is_folder, is_there = path.is_dir(), path.exists()
    except OSError:  # a name too long, a folder closed to us: whoever reads it says which
        return [Target(name, path)]
    if is_folder:
        return _pictures_in(path) or [Target(name, path, ImageError("no pictures in this folder"))]
    if not is_there and glob.has_magic(name):
        matches = sorted(glob.glob(name, recursive=True))
        found = [target for match in matches for target in _expand_one(match, fetch)]
        return found or [Target(name, path, ImageError("nothing matches"))]
    return [Target(name, path)]


def _pictures_in(folder: Path) -> list[Target]:
    """The folder's pictures, by name, and the folders in it that cannot be read.

    Other files and links to folders, which may lead round in a circle, are named on stderr, so that
    none is missed.
    """
    found, others, links = [], Counter[str](), 0

    def closed(error: OSError) -> None:
        path = Path(error.filename)
        if path == folder or not _is_hidden(path, folder):
            problem = ImageError(error.strerror or str(error))
            found.append(Target(str(path), path, problem, folder=folder))

    for parent, folders, files in os.walk(folder, onerror=closed):
        links += sum(os.path.islink(os.path.join(parent, name)) for name in folders)
        for path in (Path(parent, name) for name in files):
            ending = path.suffix.lower()
            if _is_hidden(path, folder) or not _is_file(path):
                continue
            if ending in PICTURE_SUFFIXES:
                found.append(Target(str(path), path, folder=folder))
            else:
                others[ending or "no ending"] += 1
    left = [f"{count} {ending}" for ending, count in sorted(others.items())]
    left += [f"{links} links to folders"] if links else []
    if left:
        where, counts = printable(str(folder)), printable(", ".join(left))
        click.echo(f"looktwice: in {where} not taken for pictures: {counts}", err=True)
    return sorted(found, key=lambda target: Path(target.path))


def _is_hidden(path: Path, folder: Path) -> bool:
    """Whether the path below the folder is hidden, as a bin's is, or one of thumbnails."""
    below = path.relative_to(folder).parts
    return any(part.startswith(".") or part == THUMBNAILS for part in below)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # whoever reads it says why
        return True


def with_overlays(targets: list[Target], map_to: Path | None) -> list[Target]:
    """The targets with the files of their overlays: `map_to`, or one each in the folder `map_to`.

    Raises:
        click.UsageError: one file for several pictures, or a picture could be overwritten, or
            the next run would inspect the overlays.
    """
    if map_to is None:
        return targets
    if map_to.suffix.lower() in OVERLAY_SUFFIXES and not map_to.is_dir():
        if len(targets) > 1:
            raise click.UsageError(f"--map {map_to} is one file for {len(targets)} pictures")
        files = [map_to]
    else:
        files = _files_in(map_to, targets)
    originals = {Path(target.path).resolve() for target in targets}
    for file in files:
        if file.resolve() in originals:
            raise click.UsageError(f"--map would overwrite the picture {file}")
    if files != [map_to] and map_to.resolve() in {original.parent for original in originals}:
        # Others of that folder's pictures may bear an overlay's name.
        raise click.UsageError(
            f"--map {map_to} holds pictures to inspect: give the overlays another folder"
        )
    _check_not_inspected(map_to, targets)
    return [replace(target, overlay=file) for target, file in zip(targets, files, strict=True)]


def _check_not_inspected(map_to: Path, targets: list[Target]) -> None:
    """Refuse overlays below a named folder, all of whose pictures are inspected."""
    overlays = map_to.resolve()
    for folder in {target.folder for target in targets if target.folder is not None}:
        inside = folder.resolve()
        if overlays.is_relative_to(inside) and not _is_hidden(overlays, inside):
            raise click.UsageError(
                f"--map {map_to} lies in the inspected folder {folder}, where the next run would "
                "inspect the overlays: give them another folder"
            )


def _files_in(folder: Path, targets: list[Target]) -> list[Path]:
    """A file name each: the picture's own, numbered where two pictures share it."""
    files: dict[Path, None] = {}  # in order
    numbers: dict[str, Iterator[int]] = {}  # not yet tried, by stem
    for target in targets:
        stem = Path(target.path.rstrip("/").partition("?")[0]).stem or "picture"
        file = folder / f"{stem}.png"
        while file in files:
            number = next(numbers.setdefault(stem, count(2)))
            file = folder / f"{stem}-{number}.png"
        files[file] = None
    return list(files)


def results(
    inspector: "Inspector",
    targets: list[Target],
    reference: str | None,
    concurrency: int,
    map: bool,
) -> "Iterator[tuple[Target, Inspection | Exception]]":
    """Each target with its inspection or its error, in order.

    Raises:
        click.ClickException: what would fail for every picture alike: no server, no access.
    """
    import openai

    inspections = inspector.inspect_many(
        (target.source for target in targets if target.problem is None),
        reference,
        map=map,
        concurrency=concurrency,
        return_exceptions=True,
    )
    for target in targets:
        result = target.problem or next(inspections)
        late = isinstance(result, openai.APITimeoutError)
        if isinstance(result, _hopeless()) and not late:
            raise click.ClickException(one_line(result, inspector.url))
        yield target, result


def _hopeless() -> tuple[type[Exception], ...]:
    """Errors that the next picture would meet too."""
    import openai

    return (
        openai.APIConnectionError,
        openai.AuthenticationError,
        openai.PermissionDeniedError,
        openai.NotFoundError,
        openai.ConflictError,  # the reference is outdated
    )


def _outcome(result: "Inspection | Exception") -> str:
    return "failed" if isinstance(result, Exception) else result.verdict


def _write_overlay(target: Target, inspection: "Inspection") -> bool:
    """Draw and save; whether that worked."""
    from looktwice_clients.overlay import draw_overlay

    assert target.overlay is not None
    try:
        target.overlay.parent.mkdir(parents=True, exist_ok=True)
        draw_overlay(target.source, inspection).save(target.overlay)
    except (ImageError, OSError) as error:
        click.echo(
            f"looktwice: no overlay of {printable(target.path)}: {one_line(error)}", err=True
        )
        return False
    return True


class _Lines:
    """Prints a line for each picture, and a progress bar where that takes over two seconds."""

    def __init__(self, as_json: bool, total: int) -> None:
        from tqdm import tqdm

        self.as_json = as_json
        # disable=None: no bar where stderr is no terminal.
        self.bar = tqdm(total=total, unit="picture", delay=2, leave=False, disable=None)

    def __enter__(self) -> Self:
        if not self.as_json:
            self._print(f"{'score':>5}  {'verdict':<10}  {'regions':<32}  picture")
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def line(self, target: Target, result: "Inspection | Exception") -> None:
        self._print(_json(target, result) if self.as_json else _row(target, result))
        self.bar.update()

    def _print(self, text: str) -> None:
        if self.bar.disable:
            click.echo(text)
        else:
            with self.bar.external_write_mode():
                click.echo(text)


def _row(target: Target, result: "Inspection | Exception") -> str:
    path = printable(target.path)
    if isinstance(result, Exception):
        reason = one_line(result).removeprefix(f"{path}: ")
        return f"{'-':>5}  {'failed':<10}  {reason:<32}  {path}"
    places = printable(result.places())
    return f"{result.score:5.3f}  {printable(result.verdict):<10}  {places:<32}  {path}"


def _json(target: Target, result: "Inspection | Exception") -> str:
    if isinstance(result, Exception):
        return json.dumps({"path": target.path, "error": one_line(result)})
    overlay = {"overlay": str(target.overlay)} if target.overlay else {}
    return json.dumps({"path": target.path, **result.model_dump(mode="json"), **overlay})
