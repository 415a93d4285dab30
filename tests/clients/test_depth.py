"""Deep pictures are drawn as bright as the server sees them."""

import io

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from looktwice_adapters import picture_file
from looktwice_adapters.picture_file import to_rgb
from looktwice_clients import depth
from looktwice_clients.images import open_picture
from tests.adapters.test_picture_file import png, tiff, twelve_bits


def tiff_of(values: NDArray[np.generic], **options: object) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, values, **options)
    return file.getvalue()


def agrees(file: bytes) -> NDArray[np.uint8]:
    """What a client draws on, where it is what the server reads to a level."""
    drawn = np.asarray(open_picture(file))
    read = np.asarray(to_rgb(Image.open(io.BytesIO(file))))
    assert drawn.shape == read.shape
    assert np.abs(drawn.astype(int) - read).max() <= 1
    return drawn


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_a_12_bit_png_in_colour_is_drawn_as_bright_as_the_server_reads_it(channels: int) -> None:
    assert agrees(png(twelve_bits(channels))).max() == 255


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("compression", [None, "deflate"])
def test_a_12_bit_tiff_in_colour_is_drawn_as_bright_as_the_server_reads_it(
    order: str, compression: str | None
) -> None:
    assert agrees(tiff(twelve_bits(3), byteorder=order, compression=compression)).max() == 255


def test_deep_colours_are_drawn_upright() -> None:
    turned = tiff(twelve_bits(3), extratags=[(0x0112, 3, 1, 6, True)])
    assert agrees(turned).shape == (40, 30, 3)


@pytest.mark.parametrize(
    "values",
    [
        np.array([[0, 4095]], np.uint16),
        np.array([[30, 60]], np.uint16),
        np.array([[3000, 28500]], ">u2"),
        np.array([[0, 2**20]], np.int32),
        np.array([[-1.0, 1.0]], np.float32),
        np.array([[0.25, 0.75]], np.float32),
        np.array([[2047.0, np.inf]], np.float32),
        np.array([[0.5, -np.inf, 0.25, np.nan]], np.float32),
        np.array([[np.nan, -3.0]], np.float32),
        np.array([[np.inf, np.nan]], np.float32),
    ],
)
def test_deep_greys_are_drawn_as_bright_as_the_server_reads_them(
    values: NDArray[np.generic],
) -> None:
    agrees(tiff_of(values))


def test_the_tables_are_the_servers():
    assert depth.DEPTHS == picture_file.DEPTHS
    assert depth.LOWER == picture_file.LOWER


def test_a_fourth_byte_that_no_camera_filled_hides_nothing():
    picture = Image.new("RGBA", (40, 30), (200, 30, 10, 0))
    picture.putpixel((3, 3), (0, 0, 0, 0))
    file = io.BytesIO()
    picture.save(file, "PNG")
    drawn = agrees(file.getvalue())
    assert drawn[0, 0].tolist() == [200, 30, 10]
    assert drawn[3, 3].tolist() == [0, 0, 0]
