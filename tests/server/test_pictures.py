"""Reading pictures: files, data URIs and addresses that are asked, or never."""

import asyncio
import random
import socket
import struct
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import aiohttp
import numpy as np
import pytest
from aiohttp.abc import AbstractResolver
from PIL import Image, ImageFile
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat

from looktwice_adapters.datasets import read_image
from looktwice_adapters.picture_file import ORIENTATION
from looktwice_server import pictures
from looktwice_server.chat import InspectingChat
from looktwice_server.decoded import DecodedPictures
from looktwice_server.errors import PictureError
from looktwice_server.pictures import (
    PictureConnector,
    decode,
    decode_data_uri,
    fetch,
    refuse_private,
)
from looktwice_server.routes import LookTwice
from looktwice_server.settings import Settings
from tests.server.bad_input_table import camera
from tests.server.wire import data_uri, encoded, good_uri, scratched

SETTINGS = Settings(fetch_timeout=1, max_download_mb=1)
LOCAL = frozenset({"127.0.0.1"})


def download(url: str, allowed: frozenset[str] = LOCAL) -> bytes:
    return asyncio.run(fetch(url, allowed, SETTINGS))


# Files.


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM"])
def test_no_broken_file_raises_anything_but_a_picture_error(kind: str) -> None:
    whole, dice = encoded(scratched((64, 48)), kind), random.Random(kind)
    for _ in range(150):
        broken = bytearray(whole[: dice.randrange(len(whole))] if dice.random() < 0.3 else whole)
        for _ in range(dice.randrange(1, 8)):
            if broken:
                broken[dice.randrange(min(len(broken), 400))] = dice.randrange(256)
        try:
            assert decode(bytes(broken), SETTINGS).mode == "RGB"
        except PictureError as error:
            assert str(error)  # noqa: PT017  # most are refused, some survive


def test_a_picture_is_measured_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.new("1", (9000, 9000)))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(PictureError, match="9000 x 9000 pixels, more than"):
        decode(data, SETTINGS)


@pytest.mark.parametrize(
    ("values", "eight_bits"),
    [
        (np.array([[0, 65535]], np.uint16), [0, 255]),
        (np.array([[0, 4095]], np.uint16), [0, 255]),
        (np.array([[30, 60]], np.uint16), [30, 60]),
        (np.array([[1000, 1000]], np.uint16), [249, 249]),
        (np.array([[-1.0, 1.0]], np.float32), [0, 255]),
        (np.array([[0.0, 1.0]], np.float32), [0, 255]),
        (np.array([[np.nan, 1.0]], np.float32), [0, 255]),
        (np.array([[np.nan, np.nan]], np.float32), [0, 0]),
        (np.array([[np.inf, np.inf]], np.float32), [0, 0]),
        (np.array([[2047.0, np.inf]], np.float32), [127, 127]),
        (np.array([[0.5, -np.inf]], np.float32), [128, 128]),
        (np.array([[0, 2**20]], np.int32), [0, 255]),
    ],
)
def test_deep_greys_keep_the_range_of_their_sensor(
    values: np.ndarray[Any, Any], eight_bits: list[int]
) -> None:
    tall = np.repeat(np.repeat(values, 28, 0), 28, 1)
    found = decode(encoded(Image.fromarray(tall), "TIFF"), SETTINGS)
    assert found.mode == "RGB"
    assert [found.getpixel((0, 0))[0], found.getpixel((55, 0))[0]] == eight_bits


def test_the_depth_of_a_sensor_can_be_told() -> None:
    dim = np.full((28, 56), 200, np.uint16)
    glint = dim.copy()
    glint[0, 0] = 1030
    settings = replace(SETTINGS, grey_bits=12)
    for values in (dim, glint):
        found = decode(encoded(Image.fromarray(values), "TIFF"), settings)
        assert found.getpixel((5, 5)) == (12, 12, 12)


@pytest.mark.parametrize("kind", [2, 6])  # a text, a signed byte: no resolution
def test_odd_exif_does_not_keep_a_picture_from_being_turned_upright(kind: int) -> None:
    turned = struct.pack("<HHIHH", ORIENTATION, 3, 1, 6, 0)
    odd = struct.pack("<HHI4s", 0x011A, kind, 4, b"abc\xff")
    directory = struct.pack("<H", 2) + turned + odd + struct.pack("<I", 0)
    exif = b"Exif\0\0" + struct.pack("<2sHI", b"II", 42, 8) + directory
    data = encoded(scratched((40, 30)), "JPEG", exif=exif)
    found = decode(data, SETTINGS)
    assert found.size == (30, 40)
    assert ORIENTATION not in found.getexif()


@pytest.mark.parametrize("mode", ["I;16", "RGBA", "P", "LA", "RGB"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_evaluation_and_training_read_a_file_as_the_server_does(
    tmp_path: Path, mode: str, orientation: int
) -> None:
    picture = scratched((40, 30)).convert({"I;16": "L", "LA": "L"}.get(mode, mode))
    options: dict[str, Any] = {}
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(picture, np.uint16) * np.uint16(257))
    elif mode.endswith("A"):
        picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    elif mode == "P":
        options["transparency"] = 0
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    file = tmp_path / "a.png"
    file.write_bytes(encoded(picture, exif=exif, **options))
    assert Image.open(file).mode == mode
    served = decode(file.read_bytes(), SETTINGS)
    assert served.size == ((40, 30) if orientation == 1 else (30, 40))
    assert (read_image(file) == np.asarray(served)).all()


# All pictures of a request.


def test_the_pictures_of_a_request_are_limited_together_before_they_are_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uri = data_uri(encoded(Image.new("1", (7000, 7000))))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: None)
    monkeypatch.setattr(pictures, "to_rgb", lambda picture, bits: picture)

    async def four_then_one_more() -> None:
        fetch_image = PictureConnector().fetch_image_async
        places = asyncio.Semaphore(1)
        with DecodedPictures(SETTINGS, places):
            await asyncio.gather(*(fetch_image(uri) for _ in range(4)))
            assert places.locked()
            with pytest.raises(PictureError, match="more pixels together than this server takes"):
                await fetch_image(uri)
        assert not places.locked()

    asyncio.run(four_then_one_more())


def test_the_pictures_of_inspections_have_one_budget_and_a_references_one_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limits = replace(SETTINGS, max_pixels=400, min_side=1)
    monkeypatch.setattr(pictures, "served", lambda: limits)

    async def render(self: Any, request: Any) -> Any:
        [part] = request.messages[0]["content"]
        await PictureConnector().fetch_image_async(part["image_url"]["url"])
        return None, [None]

    monkeypatch.setattr(OpenAIServingChat, "render_chat_request", render)
    looktwice, chat = object.__new__(LookTwice), object.__new__(InspectingChat)
    chat.settings, looktwice.chat = limits, chat
    monkeypatch.setattr(InspectingChat, "crops", lambda self, rendered: [rendered])
    uri = data_uri(encoded(Image.new("1", (20, 20))))

    async def ask() -> None:
        chat.decoding = asyncio.Semaphore(1)
        for _ in range(5):  # as References.add does
            await looktwice.crops(uri)
        with pytest.raises(PictureError, match=r"images\[\d\]: .* more pixels together"):
            await looktwice.find([uri] * 5, None)
        assert not chat.decoding.locked()

    asyncio.run(ask())


def test_a_request_waits_until_another_has_let_go_of_its_pictures() -> None:
    uri, order = good_uri(), []

    async def request(name: str, places: asyncio.Semaphore) -> None:
        with DecodedPictures(SETTINGS, places):
            await PictureConnector().fetch_image_async(uri)
            order.append(f"{name} decoded")
            await asyncio.sleep(0.05)
            await PictureConnector().fetch_image_async(uri)
            order.append(f"{name} done")

    async def both() -> None:
        places = asyncio.Semaphore(1)
        await asyncio.gather(request("a", places), request("b", places))

    asyncio.run(both())
    assert order == ["a decoded", "a done", "b decoded", "b done"]


def test_a_request_that_waits_for_a_camera_keeps_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    uri, answered, order = good_uri(), asyncio.Event(), []

    async def slow(*_: Any) -> bytes:
        await answered.wait()
        return encoded(Image.new("RGB", (40, 40)))

    monkeypatch.setattr(pictures, "fetch", slow)

    async def request(name: str, places: asyncio.Semaphore, *urls: str) -> None:
        with DecodedPictures(SETTINGS, places):
            await asyncio.gather(*map(PictureConnector().fetch_image_async, urls))
        order.append(name)

    async def both() -> None:
        places = asyncio.Semaphore(1)
        waiting = asyncio.create_task(request("camera", places, uri, "http://camera.example/"))
        await asyncio.wait_for(request("other", places, uri), 10)
        answered.set()
        await waiting

    asyncio.run(both())
    assert order == ["other", "camera"]


def test_a_picture_that_comes_after_its_request_has_ended_holds_no_place() -> None:
    async def late() -> None:
        places = asyncio.Semaphore(1)
        with DecodedPictures(SETTINGS, places) as ended:
            pass
        await ended.wait()
        assert not places.locked()

    asyncio.run(late())


# Data URIs.


@pytest.mark.parametrize(
    "spelling",
    [
        lambda uri: uri.replace("data:", "DATA:"),
        lambda uri: uri.replace(";base64,", ";BASE64,"),
        lambda uri: uri.replace("image/png", ""),
        lambda uri: uri.replace("image/png", "image/png;name=a.png"),
        lambda uri: uri[:80] + "\r\n" + uri[80:] + "\n",
    ],
)
def test_spellings_of_a_data_uri_that_others_read_are_read(spelling: Any) -> None:
    uri = spelling(data_uri(encoded(scratched())))
    connector = PictureConnector()
    assert connector.fetch_image(uri).tobytes() == scratched().tobytes()


@pytest.mark.parametrize("uri", ["data:", "data:,", "data:image/png;base64", "data:a;base64,a=b"])
def test_other_data_uris_are_refused(uri: str) -> None:
    with pytest.raises(PictureError):
        decode_data_uri(uri, SETTINGS)


# Addresses.


def test_a_camera_on_the_allow_list_is_asked_in_any_spelling_of_its_name() -> None:
    with camera() as address:
        assert download(f"{address}/200") == encoded(scratched())
        named = PictureConnector(allowed_media_domains=["LocalHost"])
        picture = named.fetch_image(address.replace("127.0.0.1", "localhost") + "/200")
        assert picture.tobytes() == scratched().tobytes()


def test_a_camera_that_is_not_on_the_list_is_never_connected_to() -> None:
    asked: list[str] = []

    class Nosy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Nosy)
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    port = server.server_port
    hosts = ["127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "2130706433", "0x7f.1", "127.1"]
    for host in hosts:
        with pytest.raises(PictureError):
            download(f"http://{host}:{port}/a.png", frozenset())
    with pytest.raises(PictureError, match=r"fetched from camera\.plant only"):
        download(f"http://127.0.0.1:{port}/a.png", frozenset({"camera.plant"}))
    server.shutdown()
    server.server_close()
    assert not asked


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(status: int) -> None:
    with (
        camera() as address,
        pytest.raises(PictureError, match=f"answered {status}, and redirects are not followed"),
    ):
        download(f"{address}/{status}")


class Rebinding(AbstractResolver):
    """A name that is public when it is looked up first, and the plant's own from then on."""

    def __init__(self, addresses: Iterator[str]) -> None:
        self.addresses = addresses
        self.asked = 0

    async def resolve(self, host: str, port: int = 0, family: Any = socket.AF_INET) -> Any:
        self.asked += 1
        return [
            {
                **{"hostname": host, "host": next(self.addresses), "port": port},
                **{"family": socket.AF_INET, "proto": 0, "flags": socket.AI_NUMERICHOST},
            }
        ]

    async def close(self) -> None:
        """Nothing to close."""


def test_a_name_that_changes_its_address_is_connected_to_at_the_address_that_was_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resolver = Rebinding(iter(["127.0.0.1", "93.184.216.34"]))
    monkeypatch.setattr(pictures, "DefaultResolver", lambda: resolver)
    with pytest.raises(PictureError, match="private addresses"):
        download("http://rebinding.example/a.png", frozenset())
    assert resolver.asked == 1

    connected: list[str] = []

    async def refuse(self: Any, *_: Any, addr_infos: Any, **__: Any) -> Any:
        connected.extend(info[4][0] for info in addr_infos)
        raise OSError("no network in tests")

    monkeypatch.setattr(aiohttp.TCPConnector, "_wrap_create_connection", refuse)
    resolver = Rebinding(iter(["93.184.216.34", "127.0.0.1"]))
    monkeypatch.setattr(pictures, "DefaultResolver", lambda: resolver)
    with pytest.raises(PictureError):
        download("http://rebinding.example/a.png", frozenset())
    assert connected == ["93.184.216.34"]


def test_one_private_address_among_public_ones_is_enough_to_refuse(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Mixed(Rebinding):
        async def resolve(self, *question: Any) -> Any:
            return [(await Rebinding.resolve(self, *question))[0] for _ in range(2)]

    resolver = Mixed(iter(["93.184.216.34", "10.0.0.7"]))
    monkeypatch.setattr(pictures, "DefaultResolver", lambda: resolver)
    with pytest.raises(PictureError, match="private addresses"):
        download("http://mixed.example/a.png", frozenset())


class Slow(BaseHTTPRequestHandler):
    """Too much, or too slowly, as the path says."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        try:
            if self.path == "/endless":
                while True:
                    self.wfile.write(b"\0" * 2**16)
            self.wfile.write(b"\x89PNG")
            self.wfile.flush()
            self.connection.settimeout(5)
            self.connection.recv(1)
        except OSError:
            """The server under test has gone away, as it should."""

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


@pytest.mark.parametrize(
    ("path", "says"), [("/endless", "is larger than 1 MB"), ("/late", "no answer within 1 s")]
)
def test_a_camera_cannot_fill_the_memory_or_hold_a_request(path: str, says: str) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        with pytest.raises(PictureError, match=says):
            download(f"http://127.0.0.1:{server.server_port}{path}")
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    "url", ["http://", "http://[::1", "http://a b/", "http:///x", "http://é:x"]
)
def test_urls_that_are_none_are_refused(url: str) -> None:
    with pytest.raises(PictureError):
        download(url, frozenset())


@pytest.mark.parametrize(
    "host",
    [
        "127\u30020\u30020\u30021",
        "\uff11\uff12\uff17.0.0.1",
        "\u2460\u2461\u2466.0.0.1",
        "[fe80::1%25lo]",
    ],
)
def test_an_address_in_other_digits_is_the_address_that_is_connected_to(host: str) -> None:
    with pytest.raises(PictureError, match="private addresses"):
        download(f"http://{host}:9/a.png", frozenset())


@pytest.mark.parametrize(
    "address",
    [
        *("fec0::1", "feff::1"),  # site-local
        *("::10.0.0.1", "::8.8.8.8", "::ffff:0:10.0.0.1"),  # IPv4 in deprecated spellings
        *("64:ff9b:1::8.8.8.8", "64:ff9b::10.0.0.1", "::ffff:10.0.0.1"),
        *("2002:a00:1::", "2002:c0a8:101::1"),  # 6to4 of 10.0.0.1 and 192.168.1.1
        *("2001:0:808:808:0:0:f5ff:fffe", "2001:0:a00:1::"),  # Teredo
        *("5f00::1", "4000::1", "2001:db8::1", "ff0e::1"),
        *("192.0.0.192", "192.0.0.9"),
    ],
)
def test_an_address_that_the_public_network_does_not_route_is_refused(address: str) -> None:
    with pytest.raises(PictureError, match="private addresses"):
        refuse_private(address, "camera")


@pytest.mark.parametrize(
    "address",
    [
        *("93.184.216.34", "2606:4700::1", "2001:4860:4860::8888"),
        *("::ffff:8.8.8.8", "64:ff9b::8.8.8.8", "2002:808:808::1"),  # lead to a public IPv4 one
    ],
)
def test_a_public_address_may_be_asked(address: str) -> None:
    refuse_private(address, "camera")


def test_an_error_repeats_only_the_beginning_of_a_long_url() -> None:
    with pytest.raises(PictureError) as refused:
        download("http://no-such-host.invalid/" + "a" * 10_000, frozenset())
    assert len(str(refused.value)) < 200
