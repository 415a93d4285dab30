"""Every bad input there is a rule for -> docs/bad-input.md, written from the server's answers.

`python -m tests.server.bad_input_table` starts the servers, asks them and writes the page.
"""

import io
import re
import struct
import sys
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import tifffile
from PIL import Image

from tests.server.wire import (
    CHAT,
    INSPECTIONS,
    Answer,
    Sent,
    ask,
    chat,
    data_uri,
    encoded,
    good_uri,
    image,
    inspect,
    scratched,
    talk,
    text,
    user,
)
from tests.serving import Server, running_server

PAGE = Path(__file__).parents[2] / "docs" / "bad-input.md"
QUESTION = text("Is there any defect?")
# The server that may fetch from a camera and wants a key, beside the one that all tests ask.
API_KEY = "a-plant-s-secret"
CAMERA_FLAGS = (
    *("nano", "--dtype", "float32", "--enforce-eager"),
    *("--allowed-media-domains", "127.0.0.1", "--api-key", API_KEY),
)


@dataclass(frozen=True)
class Row:
    """A bad request and the status that it deserves."""

    says: str
    sent: Sent
    status: int = 400


def chunk(kind: bytes, data: bytes) -> bytes:
    """A PNG chunk."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of_size(width: int, height: int, *extra: bytes) -> bytes:
    """A PNG that claims a size and holds next to nothing."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [chunk(b"IHDR", header), *extra, chunk(b"IDAT", zlib.compress(b"\0" * 999))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + chunk(b"IEND", b"")


def planes_of_16_bits() -> bytes:
    """A TIFF that Pillow reads with half its bits."""
    values = np.asarray(scratched(), np.uint16) * 257
    file = io.BytesIO()
    tifffile.imwrite(file, values.transpose(2, 0, 1), photometric="rgb", planarconfig="separate")
    return file.getvalue()


def pictures() -> dict[str, str]:
    """URLs and data URIs of pictures that cannot be had or judged."""
    good = encoded(scratched())
    svg = b'<svg xmlns="http://www.w3.org/2000/svg" width="99" height="99"/>'
    text_bomb = chunk(b"zTXt", b"a\0\0" + zlib.compress(b"\0" * 2_000_000))
    files = {
        "a truncated PNG": good[: len(good) // 2],
        "a truncated JPEG": encoded(scratched(), "JPEG")[:-500],
        "an empty file": b"",
        "a text file": b"hello",
        "an SVG": svg,
        "a PDF": encoded(scratched(), "PDF"),
        "an EPS (PostScript, a program)": encoded(scratched(), "EPS"),
        "an 81-megapixel PNG of 10 kB": encoded(Image.new("1", (9000, 9000))),
        "a decompression bomb (10,000 megapixels in 74 bytes)": png_of_size(100_000, 100_000),
        "a decompression bomb in a PNG's text": png_of_size(99, 99, text_bomb),
        "a picture of 27 x 300": encoded(scratched((27, 300))),
        "a picture of 1 x 1": encoded(scratched((1, 1))),
        "a picture of 2800 x 28": encoded(scratched((2800, 28))),
        "a TIFF of 16-bit colours in separate planes": planes_of_16_bits(),
    }
    hosts = {
        "loopback": "127.0.0.1",
        "loopback, IPv6": "[::1]",
        "loopback, IPv4 in IPv6": "[::ffff:127.0.0.1]",
        "loopback by name": "localhost",
        "loopback in decimal": "2130706433",
        "loopback in octal": "0177.0.0.1",
        "loopback in hexadecimal": "0x7f.1",
        "loopback, short": "127.1",
        "link-local (a cloud's metadata)": "169.254.169.254",
        "link-local, IPv6": "[fe80::1]",
        "private, 10.x": "10.0.0.1",
        "private, 172.16.x": "172.16.0.1",
        "private, 192.168.x": "192.168.1.20",
        "private, IPv6": "[fc00::1]",
        "site-local, IPv6": "[fec0::1]",
        "private, IPv4 in IPv6": "[::10.0.0.1]",
        "private through NAT64": "[64:ff9b::10.0.0.1]",
        "a site's own NAT64": "[64:ff9b:1::10.0.0.1]",
        "carrier-grade NAT": "100.64.0.1",
        "the protocols' own": "192.0.0.8",
        "multicast": "224.0.0.1",
        "no address": "0.0.0.0",
        "a user's name before a private one": "user:pw@10.0.0.1",
    }
    body = good_uri().partition(",")[2]
    return {
        **{says: data_uri(data) for says, data in files.items()},
        "a data URI without a comma": "data:image/png;base64",
        "a data URI that is not base64": f"data:image/png,{body[:20]}",
        "a data URI with wrong base64": "data:image/png;base64,%%%",
        "a data URI with base64 cut short": "data:image/png;base64,abc",
        "a data URI with letters that base64 has not": "data:image/png;base64,é",
        "no picture, a space": " ",
        "file://": "file:///etc/passwd",
        "a path": "/etc/passwd",
        "ftp://": "ftp://example.com/a.png",
        "a URL without a host": "http:///a.png",
        "a URL that is broken": "http://[::1",
        "a port that is none": "http://example.com:99999/a.png",
        **{f"{says}: {host}": f"http://{host}/a.png" for says, host in hosts.items()},
        "a host that does not exist": "http://no-such-host.invalid/a.png",
    }


def contents() -> Iterator[Row]:
    """Contents and keys of a chat that are not served."""
    good = image(good_uri())
    parts = {
        "image_embeds": {"type": "image_embeds", "image_embeds": "AAAA"},
        "video_url": {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AA"}},
        "audio_url": {"type": "audio_url", "audio_url": {"url": "data:audio/wav;base64,AA"}},
        "input_audio": {"type": "input_audio", "input_audio": {"data": "AA", "format": "wav"}},
        "prompt_embeds": {"type": "prompt_embeds", "data": "AAAA"},
        "file": {"type": "file", "file": {"file_id": "file-1"}},
        "a part of unknown type": {"type": "hologram", "hologram": "x"},
        "a client's own uuid": {**good, "uuid": "mine"},
        "a uuid alone": {"type": "image_url", "image_url": None, "uuid": "mine"},
        "an image part without url": {"type": "image_url", "image_url": {}},
        "an image part with an empty url": image(""),
        "an image part with a number": {"type": "image_url", "image_url": 5},
        "a text part with a number": {"type": "text", "text": 5},
        "a part that is a number": 5,
        "an empty part": {},
    }
    for says, part in parts.items():
        yield Row(says, chat(part, QUESTION))
    for role in ("system", "assistant", "tool"):
        message = {"role": role, "content": [{**good, "uuid": "mine"}]}
        yield Row(f"a uuid in a message of role {role}", talk([message, user(QUESTION)]))
    keys = {
        "mm_processor_kwargs": {"crop_size": 5},
        "media_io_kwargs": {"image": {"rgba_background_color": [0, 0, 0]}},
        "prompt_embeds": "AAAA",
        "echo": True,
        "truncate_prompt_tokens": 10,
        "chat_template": "{{ messages }}",
    }
    for key, value in keys.items():
        yield Row(f"{key}, with a picture", chat(good, QUESTION, **{key: value}))


def messages() -> Iterator[Row]:
    """Messages of the wrong shape."""
    wrong = {
        "no messages": [],
        "messages: null": None,
        "messages: a text": "hello",
        "a message that is a text": ["hello"],
        "a message without role": [{"content": "hello"}],
        "a role that does not exist": [{"role": "wizard", "content": "hello"}],
        "content: null": [{"role": "user", "content": None}],
        "no content": [{"role": "user"}],
        "content: a number": [{"role": "user", "content": 5}],
        "content: an object": [{"role": "user", "content": QUESTION}],
        "tool_calls: a text": [user(QUESTION), {"role": "assistant", "tool_calls": "f()"}],
    }
    for says, value in wrong.items():
        yield Row(says, talk(value))
    yield Row("<image> in a tool's description", talk([user(QUESTION)], **image_token_in_tools()))


def image_token_in_tools() -> dict[str, object]:
    """Tool choice without a parser; a template that prints tools would print the token."""
    function = {"name": "f", "description": "<image>", "parameters": {"type": "object"}}
    return {"tools": [{"type": "function", "function": function}]}


def options() -> Iterator[Row]:
    """Wrong values of `inspection`, of the model and of the body of /v1/inspections."""
    good = image(good_uri())
    ours = {
        "inspection: a text": "yes",
        "inspection: a list": [],
        "inspection: a number": 5,
        "inspection: true": True,
        "inspection.map: a text": {"map": "yes"},
        "inspection.map: a number": {"map": 1},
        "inspection.grounding: a text": {"grounding": "false"},
        "inspection.grounding: null": {"grounding": None},
        "inspection.reference: a number": {"reference": 5},
        "an unknown key in inspection": {"maps": True},
    }
    for says, value in ours.items():
        yield Row(says, chat(good, QUESTION, inspection=value))
    yield Row("a key of inspection outside it", chat(good, QUESTION, map=True))
    yield Row("an unknown reference", chat(good, QUESTION, inspection={"reference": "cup"}), 404)
    yield Row("an unknown model", chat(good, QUESTION, model="gpt-5"), 404)
    yield Row("model: a number", chat(good, QUESTION, model=5))
    yield Row("17 pictures", chat(*[good] * 17, QUESTION))
    large = image(data_uri(encoded(Image.new("1", (7000, 7000)))))
    yield Row("five pictures of 49 megapixels", chat(*[large] * 5, QUESTION))
    yield Row("17 pictures in two messages", talk([user(*[good] * 9), user(*[good] * 8)]))
    yield Row("an unknown reference", inspect(good_uri(), reference="cup"), 404)
    yield Row("an unknown model", inspect(good_uri(), model="gpt-5"), 404)
    yield Row("17 pictures", inspect(*[good_uri()] * 17))
    yield Row("five pictures of 49 megapixels", inspect(*[large["image_url"]["url"]] * 5))
    yield Row("no pictures", inspect())
    yield Row("images is missing", Sent(INSPECTIONS, {}))
    yield Row("images: a text", Sent(INSPECTIONS, {"images": good_uri()}))
    yield Row("images: objects", inspect({"url": good_uri()}))
    yield Row("images: a number among them", inspect(good_uri(), 5))
    yield Row("images: an empty text", inspect(""))
    yield Row("map: a text", inspect(good_uri(), map="yes"))
    yield Row("reference: a list", inspect(good_uri(), reference=["cup"]))
    yield Row("an unknown key", inspect(good_uri(), maps=True))


def sampling() -> Iterator[Row]:
    """Sampling parameters that cannot be; vLLM's own words, some in a stream."""
    good = image(good_uri())
    wrong = {
        "n: 0": {"n": 0},
        "n: -1": {"n": -1},
        "n: 17": {"n": 17, "temperature": 1},
        "n: 2, greedy": {"n": 2},
        "max_tokens: 0": {"max_tokens": 0},
        "max_tokens: -1": {"max_tokens": -1},
        "max_tokens: 1000000000": {"max_tokens": 10**9},
        "max_tokens: a text": {"max_tokens": "many"},
        "temperature: -1": {"temperature": -1},
        "temperature: a text": {"temperature": "hot"},
        "top_p: 0": {"top_p": 0},
        "stop: an empty text": {"stop": ""},
        "stop: five": {"stop": list("abcde")},
        "top_logprobs: 5000": {"logprobs": True, "top_logprobs": 5000},
        "prompt_logprobs: 1000000": {"prompt_logprobs": 10**6},
        "logit_bias: a token that is none": {"logit_bias": {"999999999": 1}},
        "beam search with 1000 beams": {"use_beam_search": True, "n": 1000},
        "structured_outputs: a text": {"structured_outputs": "json"},
        "a regular expression that is none": {"structured_outputs": {"regex": "("}},
        "tools without a parser": image_token_in_tools(),
        "stream_options without stream": {"stream_options": {"include_usage": True}},
        "stream: a text": {"stream": "maybe"},
    }
    for says, keys in wrong.items():
        yield Row(says, chat(good, QUESTION, **keys))
    for says in ("top_logprobs: 5000", "a regular expression that is none", "n: 2, greedy"):
        yield Row(f"{says}, streamed", chat(good, QUESTION, stream=True, **wrong[says]))


def lengths() -> Iterator[Row]:
    """Prompts beyond the context."""
    long = text("plate " * 9000)
    yield Row("a text beyond the context", chat(long))
    yield Row("a text beyond the context, with a picture", chat(image(good_uri()), long))
    yield Row("a text of 2 MB", chat(text("plate " * 350_000)))


def bodies() -> Iterator[Row]:
    """Bodies that are no JSON object, and wrong ways to send one."""
    question = '"messages": [{"role": "user", "content": "x"}]'
    half = f'{{{question}, "stop": "\\ud800"}}'
    wrong = {
        "an empty body": b"",
        "broken JSON": b'{"messages": [',
        "a JSON list": b"[]",
        "a JSON text": b'"hello"',
        "bytes that are not UTF-8": b'{"messages": "\xff\xfe"}',
        "half a surrogate pair": half.encode(),
        "NaN": f'{{{question}, "temperature": NaN}}'.encode(),
        "a number beyond all floats": f'{{{question}, "presence_penalty": 1e999}}'.encode(),
        "a whole number of 10,000 digits": f'{{{question}, "seed": {"9" * 10_000}}}'.encode(),
        "JSON nested 200,000 deep": b"[" * 200_000,
        "half a surrogate in bytes": b'{"messages": "\xed\xa0\x80"}',
    }
    for path in (CHAT, INSPECTIONS):
        for says, body in wrong.items():
            yield Row(says, Sent(path, body))
        for kind in ("text/plain", "multipart/form-data; boundary=x", ""):
            sent = Sent(path, b"{}", headers={"Content-Type": kind})
            yield Row(f"Content-Type: {kind or 'none'}", sent, 415)
        sent = Sent(path, b"{", headers={"Content-Length": str(300 * 2**20)})
        yield Row("a body of 300 MB", sent, 413)
        for method in ("GET", "PUT", "DELETE"):
            yield Row(f"the method {method}", Sent(path, b"{}", method=method), 405)


def routes() -> Iterator[Row]:
    """vLLM's own routes that could carry a picture past the checks."""
    message = [user(image(good_uri()), QUESTION)]
    for path in (
        "/v1/responses",
        "/v1/messages",
        "/v1/chat/completions/batch",
        "/v1/chat/completions/render",
        "/v1/completions",
        "/inference/v1/generate",
        "/invocations",
        "/tokenize",
        "/",
    ):
        yield Row(path, Sent(path, {"messages": message, "input": message, "prompt": "x"}), 404)


def references() -> Iterator[Row]:
    """References that cannot be made, found or used."""
    good = good_uri()

    def put(name: str, **body: object) -> Sent:
        return Sent(f"/v1/references/{name}", body, "PUT")

    for name in ("..", ".hidden", "a%20b", "a%2Fb", "-a", "%C3%BC"):
        yield Row(f"the name {name}", put(name, images=[good]), 404 if "%2F" in name else 400)
    yield Row("a name of 65 letters", put("a" * 65, images=[good]))
    yield Row("no images", put("cup"))
    yield Row("an empty list of images", put("cup", images=[]))
    yield Row("images: a text", put("cup", images=good))
    yield Row("257 images", put("cup", images=[good] * 257))
    yield Row("a picture that is none", put("cup", images=[good, data_uri(b"hello")]))
    yield Row("a known defect that is none", put("cup", images=[good], defect_images=["x"]))
    for rate in (0, 0.6, "5%", True):
        yield Row(f"false_alarm_rate {rate!r}", put("cup", images=[good], false_alarm_rate=rate))
    yield Row("an unknown key", put("cup", images=[good], threshold=0.5))
    yield Row("a body that is not JSON", Sent("/v1/references/cup", b"{", "PUT"))
    yield Row("one that is not there", Sent("/v1/references/cup", method="GET"), 404)
    yield Row("removing one that is not there", Sent("/v1/references/cup", method="DELETE"), 404)
    yield Row("thumbnails=maybe", Sent("/v1/references/cup?thumbnails=maybe", method="GET"))
    yield Row("another method", Sent("/v1/references/cup", {}), 405)
    for chosen in ([1], [-1], ["0"], 0, [0.5]):
        options = {"reference_images": chosen}
        yield Row(f"reference_images {chosen}", chat(image(good), QUESTION, inspection=options))
    both = {"reference": "cup", "reference_images": [0]}
    yield Row("reference and reference_images", chat(image(good), QUESTION, inspection=both))


SECTIONS = {
    "References": references,
    "Pictures": lambda: (Row(says, chat(image(url))) for says, url in pictures().items()),
    "Contents and keys": contents,
    "Messages": messages,
    "`inspection`, model, reference, number of pictures": options,
    "Sampling": sampling,
    "Length": lengths,
    "Bodies and methods": bodies,
    "Other routes": routes,
}


class Camera(BaseHTTPRequestHandler):
    """A camera on the plant's network, with all that can go wrong with one."""

    def do_GET(self) -> None:
        """A picture, or what the path says."""
        status = int(self.path.strip("/").split("/")[0] or 200)
        self.send_response(status)
        if 300 <= status < 400:
            self.send_header("Location", "/")
        self.end_headers()
        if status == 200:
            broken = self.path.endswith("broken")
            self.wfile.write(b"no picture" if broken else encoded(scratched()))

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


@contextmanager
def camera() -> Iterator[str]:
    """A camera's address on this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Camera)
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def camera_rows(address: str) -> Iterator[Row]:
    """What goes wrong with a camera that may be asked, and without the key."""
    send = partial(Sent, CHAT, headers={"Authorization": f"Bearer {API_KEY}"})

    def photo(url: str) -> Sent:
        return send({"messages": [user(image(url), QUESTION)]})

    yield Row("a camera that redirects", photo(f"{address}/302"))
    yield Row("a camera that has no such picture", photo(f"{address}/404"))
    yield Row("a camera that fails", photo(f"{address}/500"))
    yield Row("a camera that sends no picture", photo(f"{address}/200/broken"))
    yield Row("a camera that is off", photo("http://127.0.0.1:9/a.png"))
    yield Row("a host that is not on the list", photo("http://10.0.0.1/a.png"))
    yield Row("a public host that is not on the list", photo("http://example.com/a.png"))
    yield Row("no API key", Sent(CHAT, {"messages": [user(QUESTION)]}), 401)
    wrong = {"Authorization": "Bearer wrong"}
    yield Row("a wrong API key", Sent(INSPECTIONS, {"images": [good_uri()]}, headers=wrong), 401)


HEAD = """# Bad input

What the server answers to requests that it cannot serve. Written by
`python -m tests.server.bad_input_table` from the answers of a running server; `tests/server` asks
it again and compares. Every answer is OpenAI's error object, `{"error": {"message", "type",
"param", "code"}}`, so that the OpenAI SDK raises its own exceptions.

Not refused, but made harmless: special tokens that are spelled out in a message (`<image>`,
`<video>`, `<|im_start|>`, `<|im_end|>`, `<|endoftext|>`) are respelled as `< image >`,
`< |im_start| >` and so on. They stay text: a picture keeps its place, and a text cannot open
another speaker's turn. A chat's unknown keys outside `inspection` are ignored, as vLLM does.

Pictures are refused in the same words by `/v1/chat/completions` and `/v1/inspections`; the latter
names the picture first (`images[0]: ...`).
"""


def table(title: str, rows: list[Row], answers: list[Answer]) -> str:
    """One section of the page."""
    lines = [f"## {title}", "", "| sent | to | status | message |", "|---|---|---|---|"]
    for row, answer in zip(rows, answers, strict=True):
        to = f"{row.sent.method} {row.sent.path}"
        lines.append(
            f"| {cell(row.says)} | `{to}` | {answer.status} | {cell(shown_message(answer))} |"
        )
    return "\n".join(lines) + "\n"


def shown_message(answer: Answer) -> str:
    """The message, without what differs from model to model and machine to machine."""
    message = " ".join(answer.error["message"].split())
    message = re.sub(r"127\.0\.0\.1:\d{4,5}", "127.0.0.1:PORT", message)
    return re.sub(r"\d+(?= (input |characters|tokens))|(?<==)\d{4,}", "N", message)


def cell(words: str) -> str:
    """Text as a table's cell shows it."""
    return words.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def sections(server: Server) -> dict[str, tuple[list[Row], list[Answer]]]:
    """All rows by section, with the server's answers."""
    rows = {title: list(make()) for title, make in SECTIONS.items()}
    return {
        title: (section, [ask(server, row.sent) for row in section])
        for title, section in rows.items()
    }


def camera_section(server: Server) -> tuple[str, list[Row], list[Answer]]:
    """The rows of a server with an allow-list and a key, with its answers."""
    with camera() as address:
        rows = list(camera_rows(address))
        answers = [ask(server, row.sent) for row in rows]
    return "With `--allowed-media-domains 127.0.0.1` and `--api-key KEY`", rows, answers


def main() -> None:
    """Write the page."""
    with tempfile.TemporaryDirectory() as folder:
        flags, store = ("nano", "--dtype", "float32"), str(Path(folder, "references"))
        with running_server(Path(folder, "log"), *flags, LOOKTWICE_REFERENCES=store) as server:
            tables = [table(title, *found) for title, found in sections(server).items()]
        with running_server(Path(folder, "log"), *CAMERA_FLAGS) as server:
            tables.append(table(*camera_section(server)))
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text("\n".join([HEAD, *tables]))


if __name__ == "__main__":
    sys.exit(main())
