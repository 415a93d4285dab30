"""Bodies of requests: bytes as they come -> JSON that is safe to hand on, or a sentence.

What pydantic and vLLM would let through to fail later (half a surrogate pair, NaN, a body that
fills the memory) is refused here, and pydantic's lists of errors become one sentence.
"""

import json
import re
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, NoReturn

from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from looktwice_server.errors import BodyTooLarge, RequestError, UnsupportedMediaType
from looktwice_server.settings import served

# A surrogate written as an escape; JSON allows half a pair, UTF-8 and the tokenizer do not.
SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
# What pydantic puts between the names in an error's place: "list[str]", "function-wrap[...]".
PLACE = re.compile(r"[a-z0-9_]+")
TYPES = {"str", "int", "float", "bool", "list", "dict", "none", "nullable"}
# What pydantic says of itself rather than of the value.
NOISE = re.compile("^(Value error, |Input |String |List )|, unable to .*| after validation, not .*")
SAID = {
    "bool_type": "should be true or false",
    "bool_parsing": "should be true or false",
    **dict.fromkeys(("model_attributes_type", "model_type", "dict_type"), "should be an object"),
}
SHOWN = 40  # characters of what was sent that a sentence repeats


class CheckedRequest(Request):
    """A request whose body is limited in size and holds one JSON object."""

    async def body(self) -> bytes:
        """The body.

        Raises:
            BodyTooLarge: it has more bytes than this server takes.
        """
        if not hasattr(self, "_body"):
            self._body = await self._read(served().max_request_mb)
        return self._body

    async def _read(self, limit_mb: int) -> bytes:
        """The body's bytes, as long as they are no more than the limit."""
        too_large = BodyTooLarge(
            f"the request is larger than {limit_mb} MB; send fewer or smaller pictures"
        )
        length = self.headers.get("content-length", "0")
        if length.isdecimal() and int(length) > limit_mb * 2**20:
            raise too_large
        body = bytearray()
        try:
            async for chunk in self.stream():
                body += chunk
                if len(body) > limit_mb * 2**20:
                    raise too_large
        except ClientDisconnect as error:
            raise RequestError("the client disconnected while sending the request") from error
        return bytes(body)

    async def json(self) -> Any:
        """The JSON object in the body.

        Raises:
            UnsupportedMediaType: the body is said to be something else.
            RequestError: it is not JSON, or not an object.
        """
        if not hasattr(self, "_json"):
            kind = self.headers.get("content-type", "")
            if kind.partition(";")[0].strip().lower() != "application/json":
                raise UnsupportedMediaType(
                    f"send JSON with the header Content-Type: application/json, not {kind!r}"
                )
            self._json = parse_object(await self.body())
        return self._json


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object in a body.

    Raises:
        RequestError: it is not JSON, or not an object, or holds what JSON cannot mean.
    """
    try:
        data = json.loads(body.decode(), parse_constant=_refuse_constant, parse_float=_finite)
        if SURROGATE_ESCAPE.search(body):
            json.dumps(data, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise RequestError(f"the body is not valid JSON: {error}") from error
    except UnicodeDecodeError as error:
        raise RequestError("the body is not valid UTF-8") from error
    except UnicodeEncodeError as error:
        raise RequestError(
            "the body holds half of a surrogate pair (\\ud800 to \\udfff); send whole characters"
        ) from error
    except RecursionError as error:
        raise RequestError("the body is nested too deeply") from error
    except ValueError as error:
        raise RequestError(f"the body is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise RequestError(f"the body must be a JSON object, got {shown(data)}")
    return data


def _refuse_constant(name: str) -> NoReturn:
    raise RequestError(f"the body contains {name}, which is not valid JSON; leave the key out")


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise RequestError(f"the number {text[:SHOWN]} is too large")
    return number


def shown(value: Any) -> str:
    """What was sent, as a sentence repeats it: short, containers by their kind."""
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"a list of {len(value)}"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    text = repr(value[: SHOWN + 1] if isinstance(value, str) else value)
    return text if len(text) <= SHOWN + 2 else text[:SHOWN] + "..."


class CheckedRoute(APIRoute):
    """A route whose handler gets checked bodies, and whose refusals are one sentence."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler between the two checks."""
        handle = super().get_route_handler()
        model = self.body_field.field_info.annotation if self.body_field else None

        async def checked(request: Request) -> Response:
            request = CheckedRequest(request.scope, request.receive)
            if model is not None:
                await request.json()
            try:
                return await handle(request)
            except RequestValidationError as error:
                raise refusal(error.errors(), model) from error

        return checked


def refusal(errors: Sequence[Mapping[str, Any]], model: Any) -> RequestError:
    """One of pydantic's errors as a sentence about the key that is wrong."""
    # Of a key that may have several types, each has its error: the one that says more comes first.
    error = min(errors, key=lambda error: error["type"].endswith("_type"))
    keys = [
        str(part)
        for part in error["loc"]
        if PLACE.fullmatch(str(part)) and part not in TYPES and part != "body"
    ]
    if error["type"] == "extra_forbidden":
        *parents, unknown = keys if keys else [str(error["loc"][-1])]
        known = ", ".join(_keys_at(model, parents))
        place = ".".join(parents) or "the request"
        return RequestError(f"unknown key {unknown!r} in {place}; it takes {known}", param=unknown)
    name = ".".join(keys) or "the request"
    if error["type"] == "missing":
        return RequestError(f"the key {name} is missing; add it", param=name)
    should = SAID.get(error["type"]) or NOISE.sub("", error["msg"])
    return RequestError(f"{name} {should}, got {shown(error['input'])}", param=name)


def _keys_at(model: Any, path: Sequence[str]) -> list[str]:
    """The keys that a model takes, or one inside it."""
    for key in path:
        field = model.model_fields.get(key) if _is_model(model) else None
        model = field.annotation if field else None
    return list(model.model_fields) if _is_model(model) else []


def _is_model(model: Any) -> bool:
    return isinstance(model, type) and issubclass(model, BaseModel)
