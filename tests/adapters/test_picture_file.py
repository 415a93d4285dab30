"""Deep colours: no bit of a 12-bit camera's picture is lost, however its file stores 16."""

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from looktwice_adapters.datasets import read_image
from looktwice_adapters.picture_file import UnreadPictureError, to_rgb
from looktwice_adapters.scenes import read_picture


def twelve_bits(channels):
    values = np.random.default_rng(0).integers(0, 4096, (30, 40, channels), np.uint16)
    values[0, 0] = 4095
    return values


def shown(values):
    """(H, W, 3) of 12-bit colours; a fourth channel is transparency."""
    levels = (values / 4095 * 255).round().astype(np.uint8)
    if levels.shape[2] == 3:
        return levels
    white = Image.new("RGB", (40, 30), "white")
    white.paste(Image.fromarray(levels), mask=Image.fromarray(levels))
    return np.asarray(white)


def png(values):
    """The file of big-endian samples; Pillow writes no colours of 16 bits."""
    height, width, channels = values.shape
    kind = {2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0),
        b"IDAT": zlib.compress(rows),
        b"IEND": b"",
    }
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks.items()
    )


def tiff(values, **options):
    file = io.BytesIO()
    tifffile.imwrite(file, values, photometric="rgb", **options)
    return file.getvalue()


def grey(values):
    file = io.BytesIO()
    tifffile.imwrite(file, values)
    return file.getvalue()


def read(data, bits=None):
    return np.asarray(to_rgb(Image.open(io.BytesIO(data)), bits))


@pytest.mark.parametrize("channels", [3, 4])
def test_a_12_bit_png_in_colour_is_as_bright_as_its_sensor_says(channels):
    values = twelve_bits(channels)
    assert (read(png(values)) == shown(values)).all()


def test_a_12_bit_png_in_grey_with_transparency_stands_on_white():
    values = twelve_bits(2)
    assert (read(png(values)) == shown(values[..., [0, 0, 0, 1]])).all()


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("compression", [None, "deflate"])
@pytest.mark.parametrize("alpha", [None, "unassalpha"])
def test_a_12_bit_tiff_in_colour_is_as_bright_as_its_sensor_says(order, compression, alpha):
    values = twelve_bits(4 if alpha else 3)
    extra = {"extrasamples": [alpha]} if alpha else {}
    data = tiff(values, byteorder=order, compression=compression, tile=(16, 16), **extra)
    assert (read(data) == shown(values)).all()


def test_all_16_bits_of_a_colour_count_and_the_depth_can_be_told():
    values = np.full((30, 40, 3), (200, 100, 65535), np.uint16)
    assert read(png(values))[0, 0].tolist() == [1, 0, 255]
    assert read(png(values // 64))[0, 0].tolist() == [1, 0, 255]  # 10 bits: 3, 1, 1023
    assert read(png(values // 64), bits=12)[0, 0].tolist() == [0, 0, 64]
    dark = np.eye(8, dtype=np.uint16)  # the light is off
    assert read(png(np.stack((dark,) * 3, axis=-1)), bits=12).max() == 0
    assert read(grey(dark), bits=12).max() == 0
    assert read(grey(dark.astype(np.float32)), bits=12).max() == 255  # shares of the whole range


@pytest.mark.parametrize("compression", [None, "deflate"])
def test_deep_colours_that_would_be_read_wrongly_are_refused(compression, tmp_path):
    planes = tiff(
        np.moveaxis(twelve_bits(3), -1, 0), planarconfig="separate", compression=compression
    )
    multiplied = tiff(twelve_bits(4), extrasamples=["assocalpha"], compression=compression)
    for data in (planes, multiplied):
        with pytest.raises(UnreadPictureError, match="16-bit colours with"):
            read(data)
    (tmp_path / "planes.tif").write_bytes(planes)
    with pytest.raises(ValueError, match=r"planes\.tif: 16-bit colours with"):
        read_image(tmp_path / "planes.tif")


def test_pictures_to_train_on_have_the_same_brightness(tmp_path):
    values = twelve_bits(4)
    (tmp_path / "cut.png").write_bytes(png(values))
    assert (read_picture(tmp_path / "cut.png") == (values / 4095 * 255).round()).all()
    cv2.imwrite(str(tmp_path / "grey.png"), values[..., 0])
    assert (read_picture(tmp_path / "grey.png") == shown(values[..., [0, 0, 0]])).all()


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "1", "CMYK"])
def test_8_bit_pictures_are_what_pillow_reads(tmp_path, mode):
    values = (twelve_bits(3) // 16).astype(np.uint8)
    picture = Image.fromarray(values).convert(mode)
    picture.save(tmp_path / "a.tif")
    assert (read_image(tmp_path / "a.tif") == np.asarray(picture.convert("RGB"))).all()
