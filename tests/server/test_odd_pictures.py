"""Odd but valid pictures are inspected like the plain picture that they show.

Where nothing is lost in the file, nothing may differ: the server's findings must be the same to the
last digit as those of an RGB PNG with the same pixels.
"""

from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from tests.server.bad_input_table import QUESTION
from tests.server.wire import (
    ask,
    chat,
    data_uri,
    encoded,
    findings,
    image,
    inspect,
    scratched,
)
from tests.serving import Server

SIZE = (160, 96)
ORIENTATION = 0x0112  # the EXIF tag
Finder = Callable[[bytes], dict[str, Any]]


def plate() -> Image.Image:
    return scratched(SIZE)


def grey() -> Image.Image:
    return plate().convert("L")


def depth16(scale: int) -> Image.Image:
    """The grey plate, each level times the scale, 16 bits."""
    return Image.fromarray(np.asarray(grey(), dtype=np.uint16) * np.uint16(scale))


def deep_colours(kind: str) -> bytes:
    """The plate as a 12-bit camera's file, which Pillow cannot write."""
    twelve = np.asarray(plate(), np.float32)[..., ::-1] / 255 * 4095
    return cv2.imencode(f".{kind}", twelve.round().astype(np.uint16))[1].tobytes()


def cut_out(mode: str) -> Image.Image:
    """The plate with a transparent left half."""
    alpha = Image.new("L", SIZE, 255)
    alpha.paste(0, (0, 0, SIZE[0] // 2, SIZE[1]))
    picture = plate().convert(mode.rstrip("A")).convert(mode)
    picture.putalpha(alpha)
    return picture


def on_white(picture: Image.Image) -> Image.Image:
    """A half transparent picture on white."""
    white = Image.new("RGB", picture.size, "white")
    white.paste(picture.convert("RGB"), mask=picture.getchannel("A"))
    return white


def transparent_palette() -> tuple[bytes, Image.Image]:
    """A palette picture whose first colour is transparent, and what it shows."""
    picture = plate().quantize(16)
    shown = picture.convert("RGB")
    shown.paste("white", mask=picture.point(lambda index: 255 * (index == 0), "L"))
    return encoded(picture, transparency=0), shown


def reread(data: bytes) -> Image.Image:
    """What a lossy file holds, as Pillow decodes it."""
    import io

    with Image.open(io.BytesIO(data)) as picture:
        return picture.convert("RGB")


def lossy(kind: str, picture: Image.Image, **options: Any) -> tuple[bytes, Image.Image]:
    data = encoded(picture, kind, **options)
    return data, reread(data)


def odd_files() -> dict[str, tuple[bytes, Image.Image]]:
    """Files, and the plain picture that each shows."""
    animated: dict[str, Any] = {"save_all": True, "append_images": [ImageOps.invert(plate())]}
    palette = plate().quantize(64)
    one_bit = plate().convert("1")
    cmyk = plate().convert("CMYK")
    floats = Image.fromarray(np.asarray(grey(), dtype=np.float32) / 255)
    return {
        "grey": (encoded(grey()), grey()),
        "1 bit": (encoded(one_bit), one_bit),
        "palette": (encoded(palette), palette),
        "palette with a transparent colour": transparent_palette(),
        "RGBA": (encoded(cut_out("RGBA")), on_white(cut_out("RGBA"))),
        "LA": (encoded(cut_out("LA")), on_white(cut_out("LA"))),
        "CMYK TIFF": (encoded(cmyk, "TIFF"), cmyk),
        "CMYK JPEG": lossy("JPEG", cmyk),
        "16 bit PNG": (encoded(depth16(257)), grey()),
        "16 bit TIFF": (encoded(depth16(257), "TIFF"), grey()),
        "12 bits a colour, PNG": (deep_colours("png"), plate()),
        "12 bits a colour, TIFF": (deep_colours("tiff"), plate()),
        "float TIFF, 0 to 1": (encoded(floats, "TIFF"), grey()),
        "GIF, animated": (encoded(palette, "GIF", **animated), palette),
        "WebP, animated": (encoded(plate(), "WEBP", lossless=True, **animated), plate()),
        "PNG, animated": (encoded(plate(), "PNG", **animated), plate()),
        "TIFF of two pages": (encoded(plate(), "TIFF", **animated), plate()),
        "a phone's MPO of two pictures": lossy("MPO", plate(), **animated),
        "progressive JPEG": lossy("JPEG", plate(), progressive=True),
        "BMP": (encoded(plate(), "BMP"), plate()),
        "PPM": (encoded(plate(), "PPM"), plate()),
        "JPEG 2000": lossy("JPEG2000", plate()),
    }


@pytest.fixture
def find(server: Server) -> Finder:
    """The server's finding of one file."""

    def found(data: bytes) -> dict[str, Any]:
        answer = ask(server, inspect(data_uri(data), map=True))
        assert answer.status == 200, answer
        return findings(answer.data["data"])[0]

    return found


@pytest.mark.parametrize("says", odd_files())
def test_an_odd_picture_is_inspected_as_what_it_shows(find: Finder, says: str) -> None:
    data, shown = odd_files()[says]
    assert find(data) == find(encoded(shown.convert("RGB")))


def test_the_first_frame_is_not_the_second(find: Finder) -> None:
    assert find(encoded(plate())) != find(encoded(ImageOps.invert(plate())))


def test_a_12_bit_camera_in_a_16_bit_file_is_as_bright_as_its_sensor_says(find: Finder) -> None:
    sensor = np.asarray(grey(), dtype=np.float32) / 255 * 4095
    twelve = Image.fromarray(sensor.round().astype(np.uint16))
    eight = Image.fromarray((np.asarray(twelve) / 4095 * 255).round().astype(np.uint8))
    assert find(encoded(twelve)) == find(encoded(eight.convert("RGB")))


def test_the_noise_of_an_even_16_bit_part_is_not_stretched_into_contrast(find: Finder) -> None:
    noise = np.random.default_rng(3).integers(40_000, 40_040, SIZE[::-1], dtype=np.uint16)
    even = Image.new("RGB", SIZE, (156, 156, 156))
    assert find(encoded(Image.fromarray(noise))) == find(encoded(even))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_exif_rotation_is_honoured_in_score_map_and_boxes(
    find: Finder, orientation: int, kind: str
) -> None:
    stored, exif = plate(), Image.Exif()
    exif[ORIENTATION] = orientation
    upright = ImageOps.exif_transpose(tagged(stored, exif))
    found = find(encoded(stored, kind, exif=exif))
    assert (found["width"], found["height"]) == upright.size
    assert upright.size == (SIZE if orientation < 5 else SIZE[::-1])
    assert found == find(encoded(upright))


def tagged(picture: Image.Image, exif: Image.Exif) -> Image.Image:
    """The picture with the tag in it, as if read from a file."""
    picture = picture.copy()
    picture.getexif()[ORIENTATION] = exif[ORIENTATION]
    return picture


@pytest.mark.parametrize("size", [(780, 28), (28, 780), (14_000, 504), (28, 28), (3000, 2000)])
def test_extreme_sizes_are_inspected_in_their_own_pixels(
    find: Finder, size: tuple[int, int]
) -> None:
    found = find(encoded(scratched(size), "JPEG"))
    assert (found["width"], found["height"]) == size
    for region in found["regions"]:
        left, top, right, bottom = region["box"]
        assert 0 <= left < right <= size[0]
        assert 0 <= top < bottom <= size[1]


@pytest.mark.parametrize("says", ["CMYK JPEG", "16 bit PNG", "LA", "GIF, animated"])
def test_a_chat_gets_the_same_inspection(server: Server, find: Finder, says: str) -> None:
    data, _ = odd_files()[says]
    answer = ask(server, chat(image(data_uri(data)), QUESTION, inspection={"map": True}))
    assert findings(answer.data["inspections"]) == [find(data)]


@pytest.mark.parametrize("kind", ["image/gif", "application/octet-stream", "nonsense", ""])
def test_the_media_type_in_a_data_uri_does_not_matter(
    server: Server, find: Finder, kind: str
) -> None:
    data = encoded(plate())
    answer = ask(server, inspect(data_uri(data, kind), map=True))
    assert findings(answer.data["data"]) == [find(data)]
