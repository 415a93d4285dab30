"""Chat completions that inspect first, then talk.

vLLM's own handler renders the prompt; here every image of it is inspected, and the facts sentence
is put into the prompt behind the image.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any, Self

from pydantic import PrivateAttr, model_validator
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.serve.engine.protocol import ErrorResponse

from looktwice_adapters.facts import facts_sentence
from looktwice_server.errors import RequestError
from looktwice_server.inspections import Crops, Finding, Inspections
from looktwice_server.schemas import InspectionOptions

# Parts of a message that carry what the expert cannot inspect.
TEXT_PARTS = {"text", "input_text", "output_text", "refusal", "thinking"}
IMAGE_TOKENS = ("<image>", "<video>")


class ChatRequest(ChatCompletionRequest):
    """vLLM's request with our key in it."""

    inspection: InspectionOptions = InspectionOptions()
    _findings: list[Finding] = PrivateAttr(default_factory=list)

    @model_validator(mode="before")
    @classmethod
    def _accept_null(cls, data: Any) -> Any:
        """`"inspection": null` means the defaults, as other optional keys of the API do."""
        if isinstance(data, dict) and data.get("inspection", ...) is None:
            data = {key: value for key, value in data.items() if key != "inspection"}
        return data


def check_parts(request: ChatCompletionRequest, max_images: int) -> None:
    """Refuse what must not reach the processor, and take the meaning out of literal tokens.

    Raises:
        RequestError: a kind of content or a key that is not served, or too many images.
    """
    for key in ("mm_processor_kwargs", "media_io_kwargs"):
        if getattr(request, key, None):
            raise RequestError(f"{key} is not accepted by this server; leave it out", param=key)
    images = 0
    for message in request.messages:
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, str):
            message["content"] = without_image_tokens(content)
        elif isinstance(content, (list, tuple)):
            message["content"] = parts = [_checked_part(part) for part in content]
            images += sum(isinstance(part, dict) and "image_url" in part for part in parts)
    if images > max_images:
        raise RequestError(
            f"at most {max_images} images a request, got {images}; send fewer", param="messages"
        )


def without_image_tokens(text: str) -> str:
    """The text with literal image placeholders spelled so that they stay text."""
    for token in IMAGE_TOKENS:
        text = text.replace(token, f"< {token[1:-1]} >")
    return text


def _checked_part(part: Any) -> Any:
    """A text or image part, or an error that names what it was."""
    if isinstance(part, str):
        return without_image_tokens(part)
    part = dict(part)
    if part.get("uuid") is not None:
        raise RequestError("uuid is not accepted beside a picture; leave it out", param="uuid")
    kind = part.get("type") or next((key for key in part if key != "text"), "text")
    if kind in TEXT_PARTS:
        return {
            key: without_image_tokens(value) if isinstance(value, str) and key != "type" else value
            for key, value in part.items()
        }
    if kind != "image_url":
        raise RequestError(
            f"a message holds text and image_url parts here, not {kind!r}", param="messages"
        )
    url = part.get("image_url")
    url = url.get("url") if isinstance(url, dict) else url
    if not isinstance(url, str) or not url:
        raise RequestError(
            'an image part looks like {"type": "image_url", "image_url": {"url": "..."}}',
            param="messages",
        )
    return {"type": "image_url", "image_url": {"url": url}}


def insert_behind_images(engine_input: Any, insertions: Sequence[list[int]]) -> None:
    """Put token ids behind each image of a rendered prompt, in order, in place."""
    ids, ranges = list(engine_input["prompt_token_ids"]), []
    shift = 0
    for place, tokens in zip(engine_input["mm_placeholders"]["image"], insertions, strict=True):
        place = replace(place, offset=place.offset + shift)
        end = place.offset + place.length
        ids[end:end] = tokens
        shift += len(tokens)
        ranges.append(place)
    engine_input["prompt_token_ids"] = ids
    engine_input["mm_placeholders"] = {"image": ranges}


class InspectingChat(OpenAIServingChat):
    """vLLM's chat handler that inspects every image before the model talks."""

    inspections: Inspections
    image_token_id: int
    max_images: int

    @classmethod
    def around(cls, stock: OpenAIServingChat, inspections: Inspections, max_images: int) -> Self:
        """The stock handler with all its settings, inspecting."""
        chat = object.__new__(cls)
        chat.__dict__.update(stock.__dict__)
        chat.inspections = inspections
        chat.image_token_id = stock.model_config.hf_config.image_token_index
        chat.max_images = max_images
        return chat

    async def render_chat_request(self, request: ChatCompletionRequest) -> Any:
        """Render the prompt, inspect its images and tell the model what was found."""
        rendered = await self.render(request)
        if isinstance(rendered, ErrorResponse):
            return rendered
        conversation, [engine_input] = rendered
        findings = await self.inspect_images(engine_input)
        if isinstance(request, ChatRequest):
            request._findings = findings
            if findings and request.inspection.grounding:
                self._tell(engine_input, findings)
        return conversation, [engine_input]

    async def render(self, request: ChatCompletionRequest) -> Any:
        """Check the request and let vLLM render it."""
        check_parts(request, self.max_images)
        return await super().render_chat_request(request)

    async def inspect_images(self, engine_input: Any) -> list[Finding]:
        """The findings of a rendered prompt's images, in order of appearance.

        Raises:
            RequestError: an image token in the prompt belongs to no image.
            ExpertUnavailable: the worker could not inspect.
        """
        hashes = (engine_input.get("mm_hashes") or {}).get("image", [])
        places = (engine_input.get("mm_placeholders") or {}).get("image", [])
        tokens = engine_input["prompt_token_ids"].count(self.image_token_id)
        if tokens != sum(place.length for place in places):
            raise RequestError(f"the text must not contain {IMAGE_TOKENS[0]}", param="messages")
        if not hashes:
            return []
        crops = map(_crops, hashes, engine_input["mm_kwargs"]["image"])
        return await asyncio.gather(*map(self.inspections.inspect, crops))

    def _tell(self, engine_input: Any, findings: list[Finding]) -> None:
        """Put the facts sentence of each image behind it."""
        encode = self.renderer.tokenizer.encode
        insert_behind_images(
            engine_input,
            [
                encode(
                    facts_sentence(
                        finding.verdict, [region.position for region in finding.regions]
                    ),
                    add_special_tokens=False,
                )
                for finding in findings
            ],
        )
        length, limit = len(engine_input["prompt_token_ids"]), self.model_config.max_model_len
        if length >= limit:
            raise RequestError(
                f"the prompt has {length} tokens with its images, the context is {limit}; "
                "send fewer images or a shorter text",
                param="messages",
            )


def _crops(mm_hash: str, item: Any) -> Crops:
    """The crops of one rendered image."""
    data = item.get_data()
    height, width = data["image_sizes"].tolist()
    return Crops(mm_hash, data["pixel_values"], (width, height))


async def with_inspections(
    stream: AsyncIterator[str], choices: int, inspections: list[dict[str, Any]]
) -> AsyncIterator[str]:
    """Add `inspections` to the last chunk of a stream that has choices."""
    unfinished = choices
    async for event in stream:
        if unfinished and '"finish_reason":"' in event:
            chunk = json.loads(event.removeprefix("data: "))
            unfinished -= sum(choice["finish_reason"] is not None for choice in chunk["choices"])
            if unfinished <= 0:
                chunk["inspections"] = inspections
                event = f"data: {json.dumps(chunk, separators=(',', ':'))}\n\n"
        yield event
