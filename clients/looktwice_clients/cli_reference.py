"""`looktwice reference`: the normal pictures of a product, its threshold, and what it promises."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from looktwice_clients.cli import timeout_option, url_option
from looktwice_clients.errors import ImageError, LookTwiceError, one_line, printable

if TYPE_CHECKING:
    from PIL import Image

    from looktwice_clients.references import Reference

SHEET_COLUMNS = 8
SHEET_CELL = 132  # pixels

SPREADING = ("--calibrate-with", "--defect")
"""Options that take all pictures up to the next option, as the shell leaves a pattern."""

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


class AddCommand(click.Command):
    """Takes several pictures behind one option: what is left over would be a good one."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Name the option again before each of its pictures.

        Raises:
            UsageError: an option stands before NAME and IMAGE, and took them.
        """
        try:
            return super().parse_args(ctx, spread(args))
        except click.MissingParameter as error:
            if not any(arg.partition("=")[0] in SPREADING for arg in args):
                raise
            raise click.UsageError(
                f"{error.format_message().rstrip('.')}: NAME and IMAGE stand before "
                f"{' and '.join(SPREADING)}, which take all that follows",
                ctx,
            ) from None


@click.group()
def reference() -> None:
    """The normal pictures of a product: what later pictures are compared with.

    \b
    looktwice reference add bottle good/*.jpg
    looktwice inspect --reference bottle line3/*.jpg
    """


@reference.command(cls=AddCommand)
@click.argument("name")
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@click.option(
    "--false-alarm-rate",
    type=click.FloatRange(0.001, 0.5),
    default=0.05,
    show_default=True,
    help="Share of good parts that may be called anomalous.",
)
@click.option(
    "--calibrate-with",
    multiple=True,
    metavar="IMAGE...",
    help="More good ones, for the threshold; all up to the next option.",
)
@click.option(
    "--defect",
    multiple=True,
    metavar="IMAGE...",
    help="Known defects; all up to the next option.",
)
@click.option("--augment", is_flag=True, help="Compare with turned and mirrored copies too.")
@json_option
@url_option
@timeout_option()
def add(
    name: str,
    images: tuple[str, ...],
    false_alarm_rate: float,
    calibrate_with: tuple[str, ...],
    defect: tuple[str, ...],
    augment: bool,
    as_json: bool,
    url: str | None,
    timeout: float,
) -> None:
    """Make the reference NAME of good pictures, or replace it: files, folders or patterns.

    Of different parts: many pictures of one do not tell how parts differ.

    \b
    looktwice reference add bottle good/*.jpg --defect bad/*.jpg
    """
    import openai

    from looktwice_clients.inspector import Inspector
    from looktwice_clients.references import with_files

    good, calibrating, defects = map(_sources, (images, calibrate_with, defect))
    files = {"images": good, "calibration_images": calibrating, "defect_images": defects}
    counts = f"{len(good)} good, {len(calibrating)} calibration, {len(defects)} defect pictures"
    click.echo(f"{counts}; the server looks at one after the other", err=True)
    with Inspector(url, timeout=timeout) as inspector:
        try:
            with clock("the server is looking"):
                made = inspector.references.add(
                    name,
                    good,
                    false_alarm_rate=false_alarm_rate,
                    calibration_images=calibrating,
                    defect_images=defects,
                    augment=augment,
                )
        except openai.APIStatusError as error:
            raise LookTwiceError(with_files(one_line(error, inspector.url), files)) from None
    warnings = [with_files(warning, files) for warning in made.warnings]
    _print(made.model_copy(update={"warnings": warnings}), as_json)


@reference.command("list")
@json_option
@url_option
@timeout_option()
def list_all(as_json: bool, url: str | None, timeout: float) -> None:
    """All references of the server, one a line."""
    from looktwice_clients.inspector import Inspector

    with Inspector(url, timeout=timeout) as inspector:
        found = inspector.references.list()
    if not found and not as_json:
        click.echo("no references yet: looktwice reference add NAME IMAGE...", err=True)
    width = max((len(one.name) for one in found), default=0)
    for one in found:
        if one.problem is not None and not as_json:
            click.echo(f"{printable(one.name):<{width}}  cannot be used: {printable(one.problem)}")
            continue
        click.echo(
            one.model_dump_json()
            if as_json
            else f"{printable(one.name):<{width}}  {one.images:>4} images  {one.patches:>6} patches"
            f"  promises {one.promised_rate:.1%} (guaranteed {one.guaranteed_rate:.1%})"
            f"  version {printable(one.version)}"
        )


@reference.command()
@click.argument("name")
@click.option(
    "--sheet",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.png",
    help="Write its pictures, small, on one sheet.",
)
@json_option
@url_option
@timeout_option()
def show(name: str, sheet: Path | None, as_json: bool, url: str | None, timeout: float) -> None:
    """One reference: pictures, patches, threshold, promised false-alarm rate."""
    from looktwice_clients.inspector import Inspector

    with Inspector(url, timeout=timeout) as inspector:
        found = inspector.references.get(name, thumbnails=sheet is not None)
    if sheet is not None:
        sheet.parent.mkdir(parents=True, exist_ok=True)
        try:
            contact_sheet(found.pictures()).save(sheet)
        except ValueError as error:  # a file name that no format belongs to
            raise LookTwiceError(f"{sheet}: {error}") from None
        found = found.model_copy(update={"thumbnails": None})
    _print(found, as_json)


@reference.command()
@click.argument("name")
@url_option
@timeout_option()
def remove(name: str, url: str | None, timeout: float) -> None:
    """Delete the reference NAME."""
    from looktwice_clients.inspector import Inspector

    with Inspector(url, timeout=timeout) as inspector:
        inspector.references.remove(name)
    click.echo(f"removed {printable(name)}")


def spread(args: list[str]) -> list[str]:
    """Arguments in which each picture behind a spreading option has the option before it."""
    named: list[str] = []
    option, rest = "", iter(args)
    for arg in rest:
        if arg == "--":
            return [*named, arg, *rest]
        if arg.startswith("-") and len(arg) > 1:
            option = arg.partition("=")[0]
            named.append(arg)
        elif option in SPREADING and named[-1] != option:
            named += [option, arg]
        else:
            named.append(arg)
    return named


@contextmanager
def clock(what: str) -> Iterator[None]:
    """The time so far, where stderr is a terminal and it takes over two seconds.

    In place of a progress bar: one request tells nothing before it is answered.
    """
    from tqdm import tqdm

    ended = threading.Event()
    shown = f"{what}, {{elapsed}}"
    with tqdm(bar_format=shown, delay=2, leave=False, disable=None) as bar:

        def tick() -> None:
            while not ended.wait(0.5):
                bar.update(0)

        ticking = threading.Thread(target=tick, daemon=True)
        ticking.start()
        try:
            yield
        finally:
            ended.set()
            ticking.join()


def contact_sheet(pictures: "list[Image.Image]") -> "Image.Image":
    """Pictures in rows of eight on white, each numbered as the reference's warnings do."""
    from PIL import Image, ImageDraw

    columns = max(1, min(SHEET_COLUMNS, len(pictures)))
    rows = max(1, -(-len(pictures) // columns))
    sheet = Image.new("RGB", (columns * SHEET_CELL, rows * (SHEET_CELL + 14)), "white")
    draw = ImageDraw.Draw(sheet)
    for index, picture in enumerate(pictures):
        row, column = divmod(index, columns)
        x, y = column * SHEET_CELL, row * (SHEET_CELL + 14)
        picture.thumbnail((SHEET_CELL - 4, SHEET_CELL - 4))
        sheet.paste(picture, (x + (SHEET_CELL - picture.width) // 2, y + 2))
        draw.text((x + 4, y + SHEET_CELL), str(index), fill="black")
    return sheet


def _sources(names: tuple[str, ...]) -> list[str]:
    """The pictures behind files, folders and patterns.

    Raises:
        ImageError: there are none behind one of them.
    """
    from looktwice_clients.cli_inspect import expand

    targets = expand(names)
    for target in targets:
        if target.problem is not None:
            raise ImageError(f"{target.path}: {target.problem}")
    return [target.path for target in targets]


def _print(found: "Reference", as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(found.model_dump(mode="json")))
        return
    if found.problem is not None:
        click.echo(f"{printable(found.name)} cannot be used: {printable(found.problem)}")
        if not found.version:  # nothing else is known
            return
    created = datetime.fromtimestamp(found.created, UTC)
    click.echo(f"{printable(found.name)}, version {printable(found.version)}, {created:%F %R} UTC")
    click.echo(f"  {found.images} images, {found.patches} patches")
    click.echo(
        f"  false alarms: asked {found.false_alarm_rate:.1%}, promised {found.promised_rate:.1%}"
        f" (guaranteed {found.guaranteed_rate:.1%}); threshold {found.threshold:.3f}"
    )
    for warning in found.warnings:
        click.echo(f"  warning: {printable(warning)}")
