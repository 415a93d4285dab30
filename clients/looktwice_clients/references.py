"""References: a product's normal pictures in -> a name that inspections compare with.

`Inspector.references` and `AsyncInspector.references`.
"""

from __future__ import annotations

import asyncio
import base64
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError

from looktwice_clients.errors import ReplyError, what_is_wrong
from looktwice_clients.images import ImageSource, to_wire

if TYPE_CHECKING:
    from openai import AsyncOpenAI, OpenAI

M = TypeVar("M", bound=BaseModel)


class Reference(BaseModel):
    """A product's normal pictures as the server keeps them, and what they promise."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str
    version: str
    """Hash of the content: another version, other answers."""
    images: int
    patches: int
    """Size of the memory bank."""
    false_alarm_rate: float
    """What was asked for."""
    promised_rate: float
    """What so few pictures can promise in practice: never below 1 / (pictures + 1)."""
    guaranteed_rate: float
    """What is guaranteed whatever the distribution: twice `promised_rate`, unless calibration
    pictures alone were counted."""
    threshold: float
    """Of the server's raw evidence; the calibrated score's threshold is 0.5 with any reference."""
    created: int = 0
    """Seconds since 1970, UTC."""
    expert: str = ""
    calibration: str = ""
    warnings: list[str] = []
    problem: str | None = None
    """Why the server cannot use it; what is not known then is 0 or empty."""
    thumbnails: list[str] | None = None
    """Base64 JPEGs, where they were asked for."""

    def pictures(self) -> list[Image.Image]:
        """The thumbnails.

        Raises:
            ReplyError: one of them is not a JPEG.
        """
        try:
            return [
                Image.open(io.BytesIO(base64.b64decode(one)), formats=["JPEG"]).convert("RGB")
                for one in self.thumbnails or ()
            ]
        except (OSError, ValueError) as error:
            raise ReplyError(f"a thumbnail of {self.name} is not a JPEG: {error}") from None


class _References(BaseModel):
    """The envelope of `GET /v1/references`."""

    data: list[Reference]


class References:
    """The references of a server; raises as `Inspector.inspect` does."""

    def __init__(self, client: OpenAI) -> None:
        """Share the inspector's connections."""
        self._client = client

    def add(
        self,
        name: str,
        images: Iterable[ImageSource],
        *,
        false_alarm_rate: float = 0.05,
        calibration_images: Iterable[ImageSource] = (),
        defect_images: Iterable[ImageSource] = (),
        augment: bool = False,
    ) -> Reference:
        """Make a reference of normal pictures, or replace the one of that name.

        Args:
            name: letters, digits, dots, dashes and underscores, 64 at most.
            images: normal pictures, of which later ones are compared.
            false_alarm_rate: share of good parts that may be called anomalous; 19 pictures are
                needed for 5 %.
            calibration_images: more normal ones, which only set the threshold.
            defect_images: known defects, which may only lower it.
            augment: whether turned and mirrored copies belong to the reference too.
        """
        body = _body(images, false_alarm_rate, calibration_images, defect_images, augment)
        return _read(Reference, self._client.put(_path(name), cast_to=object, body=body))

    def get(self, name: str, *, thumbnails: bool = False) -> Reference:
        """One reference, with small pictures where asked for."""
        return _read(Reference, self._client.get(_path(name, thumbnails), cast_to=object))

    def list(self) -> list[Reference]:
        """All references, by name."""
        return _read(_References, self._client.get("/references", cast_to=object)).data

    def remove(self, name: str) -> None:
        """Delete a reference."""
        self._client.delete(_path(name), cast_to=object)


class AsyncReferences:
    """The references of a server, for an event loop; the methods are those of `References`."""

    def __init__(self, client: AsyncOpenAI) -> None:
        """Share the inspector's connections."""
        self._client = client

    async def add(
        self,
        name: str,
        images: Iterable[ImageSource],
        *,
        false_alarm_rate: float = 0.05,
        calibration_images: Iterable[ImageSource] = (),
        defect_images: Iterable[ImageSource] = (),
        augment: bool = False,
    ) -> Reference:
        """Make a reference, as `References.add` does."""
        body = await asyncio.to_thread(
            _body, images, false_alarm_rate, calibration_images, defect_images, augment
        )
        return _read(Reference, await self._client.put(_path(name), cast_to=object, body=body))

    async def get(self, name: str, *, thumbnails: bool = False) -> Reference:
        """One reference, as `References.get` gives it."""
        return _read(Reference, await self._client.get(_path(name, thumbnails), cast_to=object))

    async def list(self) -> list[Reference]:
        """All references, by name."""
        return _read(_References, await self._client.get("/references", cast_to=object)).data

    async def remove(self, name: str) -> None:
        """Delete a reference."""
        await self._client.delete(_path(name), cast_to=object)


def with_files(said: str, files: Mapping[str, Sequence[str]]) -> str:
    """What the server said of a reference, with the file behind each picture that it names.

    Args:
        said: addresses pictures as the request does: `images[3]`, `calibration_images[0]`.
        files: of each of the request's keys its pictures' files.
    """

    def named(match: re.Match[str]) -> str:
        group, number = files.get(match[1], ()), int(match[2])
        return f"{match[0]} ({group[number]})" if number < len(group) else match[0]

    return re.sub(r"(\w+)\[(\d+)\]", named, said)


def _path(name: str, thumbnails: bool = False) -> str:
    """The address of a reference; what is no name is the server's to refuse."""
    from urllib.parse import quote

    query = "?thumbnails=true" if thumbnails else ""
    return f"/references/{quote(name, safe='')}{query}"


def _body(
    images: Iterable[ImageSource],
    rate: float,
    calibration: Iterable[ImageSource],
    defects: Iterable[ImageSource],
    augment: bool,
) -> dict[str, Any]:
    """The JSON of `PUT /v1/references/{name}`."""
    body: dict[str, Any] = {
        "images": [to_wire(image) for image in images],
        "false_alarm_rate": float(rate),
    }
    more = {
        "calibration_images": [to_wire(image) for image in calibration],
        "defect_images": [to_wire(image) for image in defects],
        "augment": augment,
    }
    return body | {key: value for key, value in more.items() if value}


def _read(kind: type[M], reply: object) -> M:
    """The reply as one of our objects."""
    try:
        return kind.model_validate(reply)
    except ValidationError as error:
        raise ReplyError(f"the reply is not a reference: {what_is_wrong(error)}") from None
