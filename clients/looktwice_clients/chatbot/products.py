"""Products on the wire: `PUT` and `GET /v1/references`, as typed objects."""

import asyncio
import re
from collections.abc import Sequence
from typing import TypeVar

from openai import NotFoundError
from pydantic import BaseModel, ConfigDict, ValidationError

from looktwice_clients.errors import ReplyError
from looktwice_clients.images import ImageSource, to_wire
from looktwice_clients.inspector import AsyncInspector

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""What the server takes for a name."""


class Product(BaseModel):
    """A product that the server knows: its good pictures, and what they promise."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str
    version: str | None = None
    images: int = 0
    false_alarm_rate: float | None = None
    promised_rate: float | None = None
    warnings: list[str] = []


Shape = TypeVar("Shape", bound=BaseModel)


class _ProductList(BaseModel):
    data: list[Product]


async def add(
    inspector: AsyncInspector, name: str, images: Sequence[ImageSource], false_alarm_rate: float
) -> Product:
    """Teach the server a product from pictures of good parts; one of that name is replaced.

    Raises:
        ImageError: one of the pictures is none.
        openai.OpenAIError: the server refused, failed, or could not be reached.
        ReplyError: the server answered with something else.
    """
    urls = await asyncio.to_thread(lambda: [to_wire(image) for image in images])
    body = {"images": urls, "false_alarm_rate": false_alarm_rate}
    reply = await inspector.client.put(f"/references/{name}", cast_to=object, body=body)
    return _read(Product, reply)


async def list_all(inspector: AsyncInspector) -> list[Product] | None:
    """The products that the server knows; None where it keeps none at all.

    Raises:
        openai.OpenAIError, ReplyError: as for `add`.
    """
    try:
        reply = await inspector.client.get("/references", cast_to=object)
    except NotFoundError:
        return None
    return _read(_ProductList, reply).data


def _read(shape: type[Shape], reply: object) -> Shape:
    try:
        return shape.model_validate(reply)
    except ValidationError as error:
        raise ReplyError(f"the reply is no product: {error}") from None
