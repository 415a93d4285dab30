"""Messages of a chat: as the client sent them -> text and image parts, and nothing else.

What is not served is refused here, before vLLM reads it. Special tokens that are spelled out in a
text are respelled so that they stay text: an image token would move the place of a picture, a turn
token would put words into another speaker's mouth.
"""

import re
from collections.abc import Iterable
from typing import Any

from looktwice_server.body import shown
from looktwice_server.errors import RequestError

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
TEXT_PARTS = {"text", "input_text", "output_text", "refusal", "thinking"}
# Of Qwen2's and LLaVA-OneVision's tokenizers, and nano's: <image>, <video>, <|im_start|>, ...
SPECIAL_TOKEN = re.compile(r"<(image|video|\|\w+\|)>")


def checked_messages(messages: Any, max_images: int) -> list[dict[str, Any]]:
    """The messages with their contents checked.

    Raises:
        RequestError: a shape, role or kind of content that is not served, or too many images.
    """
    if not isinstance(messages, list) or not messages:
        raise _error(f"messages must be a list of at least one message, got {shown(messages)}")
    try:
        checked = [
            _checked_message(message, f"messages[{index}]")
            for index, message in enumerate(messages)
        ]
    except RecursionError as error:
        raise _error("messages are nested too deeply") from error
    if (images := count_images(checked)) > max_images:
        raise _error(f"at most {max_images} images a request, got {images}; send fewer")
    return checked


def count_images(messages: Iterable[Any]) -> int:
    """The number of image parts in checked messages."""
    contents = [message.get("content") for message in messages]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return sum(part["type"] == "image_url" for part in parts)


def respelled(value: Any) -> Any:
    """A text, or all texts in a JSON value, with special tokens spelled so that they stay text."""
    if isinstance(value, str):
        return SPECIAL_TOKEN.sub(r"< \1 >", value)
    if isinstance(value, dict):
        return {respelled(key): respelled(item) for key, item in value.items()}
    if isinstance(value, list):
        return [respelled(item) for item in value]
    return value


def _error(sentence: str, param: str = "messages") -> RequestError:
    return RequestError(sentence, param=param)


def _checked_message(message: Any, place: str) -> dict[str, Any]:
    """One message: its role known, its content text and images, all else respelled."""
    if not isinstance(message, dict):
        raise _error(f"{place} must be an object with role and content, got {shown(message)}")
    if (role := message.get("role")) not in ROLES:
        raise _error(f"{place}.role must be one of {', '.join(ROLES)}, got {shown(role)}")
    if (calls := message.get("tool_calls")) is not None:
        _check_calls(calls, f"{place}.tool_calls")
    checked = {key: respelled(value) for key, value in message.items() if key != "content"}
    content = message.get("content")
    if content is None:
        if role != "assistant":
            raise _error(f"{place}.content is missing; send a text or a list of parts")
        return checked | ({"content": None} if "content" in message else {})
    return checked | {"content": _checked_content(content, f"{place}.content")}


def _check_calls(calls: Any, place: str) -> None:
    """Refuse what is no list of calls."""
    # Validated messages hold iterators where the JSON had lists.
    if not isinstance(calls, Iterable) or isinstance(calls, (str, dict)):
        raise _error(f"{place} must be a list, got {shown(calls)}")
    for call in calls if isinstance(calls, list) else ():
        if not isinstance(call, dict) or not isinstance(call.get("function"), dict):
            raise _error(
                f'{place} holds objects {{"id": ..., "type": "function", "function": '
                f'{{"name": ..., "arguments": ...}}}}, not {shown(call)}'
            )


def _checked_content(content: Any, place: str) -> str | list[dict[str, Any]]:
    """A message's text, or its list of parts."""
    if isinstance(content, str):
        return str(respelled(content))
    if not isinstance(content, Iterable) or isinstance(content, dict):
        raise _error(f"{place} must be a text or a list of parts, got {shown(content)}")
    return [_checked_part(part, f"{place}[{index}]") for index, part in enumerate(content)]


def _checked_part(part: Any, place: str) -> dict[str, Any]:
    """A text or image part with the keys that count."""
    if isinstance(part, str):
        return {"type": "text", "text": respelled(part)}
    if not isinstance(part, dict):
        raise _error(f"{place} must be a text or image_url part, got {shown(part)}")
    if part.get("uuid") is not None:
        raise _error("uuid is not accepted beside a picture; leave it out", "uuid")
    kind = part.get("type") or next((key for key in part if key != "text"), "text")
    if kind == "image_url":
        return {"type": "image_url", "image_url": {"url": _url(part, place)}}
    if not isinstance(kind, str) or kind not in TEXT_PARTS:
        raise _error(f"{place}: a message holds text and image_url parts here, not {shown(kind)}")
    text = part.get(kind, part.get("text"))
    if not isinstance(text, str):
        raise _error(f'{place}: a text part looks like {{"type": "text", "text": "..."}}')
    return {"type": "text", "text": respelled(text)}


def _url(part: dict[str, Any], place: str) -> str:
    """The URL of an image part."""
    url = part.get("image_url")
    url = url.get("url") if isinstance(url, dict) else url
    if not isinstance(url, str) or not url:
        raise _error(
            f'{place}: an image part looks like {{"type": "image_url", "image_url": '
            '{"url": "..."}}'
        )
    return url
