import base64
import io
import struct
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from PIL import Image

from looktwice_clients import ImageError
from looktwice_clients.images import MAX_BYTES, open_picture, read, to_wire


def encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def content(uri: str) -> bytes:
    return base64.b64decode(uri.partition(",")[2])


PICTURE = Image.linear_gradient("L").resize((40, 30)).convert("RGB")


@pytest.mark.parametrize(
    ("kind", "mime"),
    [
        ("PNG", "image/png"),
        ("JPEG", "image/jpeg"),
        ("WEBP", "image/webp"),
        ("GIF", "image/gif"),
        ("BMP", "image/bmp"),
        ("TIFF", "image/tiff"),
    ],
)
def test_a_common_format_travels_byte_for_byte(tmp_path: Path, kind: str, mime: str) -> None:
    original = encoded(PICTURE, kind)
    file = tmp_path / "part.anything"
    file.write_bytes(original)
    for source in (file, str(file), original):
        uri = to_wire(source)
        assert uri.startswith(f"data:{mime};base64,")
        assert content(uri) == original


def test_a_phones_two_picture_jpeg_travels_as_jpeg() -> None:
    original = encoded(PICTURE, "MPO", save_all=True, append_images=[PICTURE])
    assert to_wire(original).startswith("data:image/jpeg;")
    assert content(to_wire(original)) == original


@pytest.mark.parametrize("kind", ["PPM", "JPEG2000"])
def test_another_format_travels_as_png_with_the_same_pixels(kind: str) -> None:
    options = {"irreversible": False} if kind == "JPEG2000" else {}
    sent = Image.open(io.BytesIO(content(to_wire(encoded(PICTURE, kind, **options)))))
    assert sent.format == "PNG"
    assert sent.tobytes() == PICTURE.tobytes()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "I;16"])
def test_a_pillow_picture_travels_without_loss(mode: str) -> None:
    via = {"I;16": "L", "PA": "LA", "RGBa": "RGBA"}.get(mode)
    start = PICTURE.convert(via) if via else PICTURE
    picture = start.convert("I").convert("I;16") if mode == "I;16" else start.convert(mode)
    sent = Image.open(io.BytesIO(content(to_wire(picture))))
    assert sent.convert("RGBA").tobytes() == picture.convert("RGBA").tobytes()


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "HSV", "LAB"])
def test_a_pillow_picture_in_another_colour_space_travels_as_rgb(mode: str) -> None:
    picture = Image.new("RGB", (8, 8), (250, 10, 10))
    sent = Image.open(io.BytesIO(content(to_wire(_in(mode, picture)))))
    assert sent.mode == "RGB"
    red, green, blue = sent.getpixel((0, 0))
    assert red > 200
    assert green < 60
    assert blue < 60


def _in(mode: str, picture: Image.Image) -> Image.Image:
    if mode != "LAB":
        return picture.convert(mode)
    from PIL import ImageCms

    lab = ImageCms.createProfile("LAB")
    return ImageCms.profileToProfile(picture, ImageCms.createProfile("sRGB"), lab, outputMode="LAB")


def test_a_32_bit_picture_within_16_bits_travels_as_16_bit_grey() -> None:
    sent = Image.open(io.BytesIO(content(to_wire(Image.new("I", (8, 8), 40000)))))
    assert sent.mode == "I;16"
    assert sent.getpixel((0, 0)) == 40000


@pytest.mark.parametrize("picture", [Image.new("F", (8, 8), 0.5), Image.new("I", (8, 8), -1)])
def test_a_picture_of_numbers_without_a_scale_is_refused(picture: Image.Image) -> None:
    with pytest.raises(ImageError, match=r"8 x 8: mode [FI] has no scale"):
        to_wire(picture)


def test_addresses_and_good_data_uris_travel_as_they_are() -> None:
    uri = to_wire(encoded(PICTURE, "PNG"))
    assert to_wire(uri) == uri
    head, body = uri.split(",")
    broken = f"{head},{base64.encodebytes(base64.b64decode(body)).decode()}"  # as e-mail does
    assert "\n" in broken
    assert to_wire(broken) in (broken, uri)
    for address in ("http://camera/part.png", "HTTPS://camera/part.png"):
        assert to_wire(address) == address


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.png", "missing.png: No such file or directory"),
        ("", ": No such file or directory"),
        ("a\0b", "a\0b: embedded null byte"),
        ("file:///etc/passwd", "file:///etc/passwd: only http://, https:// and data: addresses"),
        ("data:text/plain,hello", "a data URI must be data:image/...;base64,..."),
        ("data:image/png;base64,!!!", "not base64"),
        ("data:image/png;base64,aGVsbG8=", "not a picture"),
        ("data:image/png;base64,", "is empty"),
        (b"", "0 bytes: is empty"),
        (b"hello", "5 bytes: not a picture"),
        (b"<?xml version='1.0'?><svg/>", "not a picture (SVG is a drawing: export it as PNG)"),
        (b"%PDF-1.7", "not a picture (PDF is a document"),
        ("/", "/: is a folder"),
        ("/dev/zero", "/dev/zero: is not a file"),
        ("x" * 5000, "File name too long"),
    ],
)
def test_what_is_no_picture_is_refused_in_one_line(source: str | bytes, message: str) -> None:
    with pytest.raises(ImageError) as caught:
        to_wire(source)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_file_over_the_limit_is_refused_unread(tmp_path: Path) -> None:
    file = tmp_path / "huge.png"
    with file.open("wb") as stream:
        stream.truncate(5 * MAX_BYTES)  # sparse: reading it would take 500 MB
    with pytest.raises(ImageError, match="500 MB is too large, at most 100 MB"):
        to_wire(file)


def test_a_decompression_bomb_is_refused() -> None:
    bomb = encoded(Image.new("1", (20000, 20000)), "PNG")
    with pytest.raises(ImageError, match="cannot be read as a picture"):
        to_wire(bomb)


def truncated() -> Image.Image:
    return Image.open(io.BytesIO(encoded(PICTURE, "PNG")[:-40]))


def closed() -> Image.Image:
    picture = Image.open(io.BytesIO(encoded(PICTURE, "PNG")))
    picture.close()
    return picture


@pytest.mark.parametrize("broken", [truncated, closed, lambda: Image.new("RGB", (0, 0))])
def test_a_pillow_picture_that_cannot_be_read_is_refused(broken: Callable[[], Image.Image]) -> None:
    with pytest.raises(ImageError, match=r"a Pillow image of .*: cannot be read as a picture"):
        to_wire(broken())


@pytest.mark.parametrize("broken", [truncated, closed])
def test_a_pillow_picture_that_cannot_be_read_is_not_drawn_on(
    broken: Callable[[], Image.Image],
) -> None:
    with pytest.raises(ImageError, match=r"a Pillow image of .*: cannot be read as a picture"):
        open_picture(broken())


@pytest.mark.parametrize(
    "address", ["http://camera:abc/x", "http://[::1", "http://127.0.0.1:9/a b", "http://ü\0/x"]
)
def test_an_address_that_is_none_is_refused_in_one_line(address: str) -> None:
    with pytest.raises(ImageError) as caught:
        read(address)
    assert str(caught.value).startswith(f"{address}: ")
    assert "\n" not in str(caught.value)


def test_a_truncated_picture_cannot_be_drawn_on() -> None:
    with pytest.raises(ImageError, match="cannot be read as a picture"):
        open_picture(encoded(PICTURE, "PNG")[:-40])


def test_exif_rotation_is_honoured_where_the_picture_is_drawn() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    turned = encoded(PICTURE, "JPEG", exif=exif, quality=95)
    assert open_picture(turned).size == (30, 40)
    assert content(to_wire(turned)) == turned
    opened = Image.open(io.BytesIO(turned))
    assert Image.open(io.BytesIO(content(to_wire(opened)))).size == (30, 40)


@pytest.mark.parametrize("kind", [2, 6])  # a text, a signed byte: no resolution
def test_odd_exif_does_not_keep_a_picture_from_being_drawn_upright(kind: int) -> None:
    turned = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    odd = struct.pack("<HHI4s", 0x011A, kind, 4, b"abc\xff")
    directory = struct.pack("<H", 2) + turned + odd + struct.pack("<I", 0)
    exif = b"Exif\0\0" + struct.pack("<2sHI", b"II", 42, 8) + directory
    data = encoded(PICTURE, "JPEG", exif=exif)
    assert open_picture(data).size == (30, 40)
    opened = Image.open(io.BytesIO(data))
    sent = Image.open(io.BytesIO(content(to_wire(opened))))
    assert sent.size == (30, 40)
    assert 0x0112 not in sent.getexif()
    assert 0x0112 in opened.getexif()  # the caller's picture is as it was


def test_a_16_bit_picture_is_drawn_in_its_sensors_range() -> None:
    ramp = Image.linear_gradient("L").convert("I").point(lambda v: v * 10 + 1000).convert("I;16")
    drawn = open_picture(ramp)  # 1000 to 3550 of 12 bits
    assert drawn.mode == "RGB"
    assert drawn.getextrema() == ((62, 221),) * 3


def test_transparent_parts_are_drawn_white() -> None:
    picture = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    picture.putpixel((1, 1), (9, 9, 9, 255))
    drawn = open_picture(picture)
    assert (drawn.getpixel((0, 0)), drawn.getpixel((1, 1))) == ((255, 255, 255), (9, 9, 9))


def test_the_first_frame_of_an_animation_is_drawn() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    gif = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert open_picture(gif).getpixel((0, 0)) == (255, 0, 0)


def test_a_web_address_is_fetched_to_be_drawn_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    original = encoded(PICTURE, "PNG")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/part.png" else 404)
            self.end_headers()
            self.wfile.write(original)

        def log_message(self, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            assert open_picture(f"{address}/part.png").tobytes() == PICTURE.tobytes()
            with pytest.raises(ImageError, match=r"nothing.png: .*Not Found|Not Found"):
                open_picture(f"{address}/nothing.png")
        finally:
            server.shutdown()
            thread.join()
    with pytest.raises(ImageError, match="refused"):
        open_picture(f"{address}/part.png")
