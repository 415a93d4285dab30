"""Chat completions that inspect first, then talk.

vLLM's own handler renders the prompt; here every image of it is inspected, and the facts sentence
is put into the prompt behind the image.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Any, Self

from pydantic import PrivateAttr, model_validator
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.exceptions import RetryableRequestError

from looktwice_adapters.anomaly_map import placement
from looktwice_adapters.facts import facts_sentence
from looktwice_server.body import shown
from looktwice_server.decoded import HOLDING, DecodedPictures
from looktwice_server.errors import PictureError, ReferenceOutdated, RequestError
from looktwice_server.inspections import Crops, Finding, Inspections, together
from looktwice_server.messages import checked_messages, count_images
from looktwice_server.processor import set_identity
from looktwice_server.references import References
from looktwice_server.schemas import InspectionOptions, ReferenceVersion
from looktwice_server.settings import Settings, served
from looktwice_server.weights import ExpertSection


@dataclass(frozen=True)
class Inspected:
    """What was found on a request's images."""

    findings: dict[int, Finding]  # by the image's number, without the images that are references
    reference: ReferenceVersion | None


REFUSED_KEYS = ("mm_processor_kwargs", "media_io_kwargs", "prompt_embeds")
INLINE_NAME = "the pictures shown as they should be"
REFUSED_WITH_IMAGES = ("echo", "truncate_prompt_tokens")


class ChatRequest(ChatCompletionRequest):
    """vLLM's request with our key in it."""

    inspection: InspectionOptions = InspectionOptions()
    _inspected: "Inspected" = PrivateAttr(default_factory=lambda: Inspected({}, None))

    @model_validator(mode="before")
    @classmethod
    def _check(cls, data: Any) -> Any:
        """Say what is wrong in a sentence, before pydantic does in its own words."""
        for key in InspectionOptions.model_fields:
            if key in data:
                raise RequestError(
                    f'put {key} inside inspection: {{"inspection": {{"{key}": ...}}}}', param=key
                )
        # `"inspection": null` means the defaults, as other optional keys of the API do.
        data = {key: data[key] for key in data if (key, data[key]) != ("inspection", None)}
        outputs = data.get("structured_outputs")
        if outputs is not None and not isinstance(outputs, dict):
            raise RequestError(
                f"structured_outputs should be an object, got {shown(outputs)}",
                param="structured_outputs",
            )
        if "messages" in data:
            data["messages"] = checked_messages(data["messages"], served().max_images)
        check_keys(data)
        return data


def check_keys(data: Mapping[str, Any]) -> None:
    """Refuse keys that would change how pictures are read, or cannot work beside pictures.

    Raises:
        RequestError: one of them is set.
    """
    refused = dict.fromkeys(REFUSED_KEYS, "is not accepted by this server")
    if count_images(data.get("messages", ())):
        refused |= dict.fromkeys(REFUSED_WITH_IMAGES, "does not work with pictures")
    for key, why in refused.items():
        value = data.get(key)
        if value is not None and value is not False and value != {}:
            raise RequestError(f"{key} {why}; leave it out", param=key)


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
    references: References
    image_token_id: int
    crop_side: int  # pixels
    token_side: float  # of the expert, in pixels of a crop
    settings: Settings
    decoding: asyncio.Semaphore

    @classmethod
    def around(
        cls,
        stock: OpenAIServingChat,
        inspections: Inspections,
        references: References,
        settings: Settings,
    ) -> Self:
        """The stock handler with all its settings, inspecting."""
        chat = object.__new__(cls)
        chat.__dict__.update(stock.__dict__)
        chat.inspections = inspections
        chat.references = references
        hf_config = stock.model_config.hf_config
        chat.image_token_id = hf_config.image_token_index
        chat.crop_side = hf_config.vision_config.image_size
        chat.token_side = chat.crop_side / ExpertSection.from_config(hf_config).config.tower.grid
        chat.settings = settings
        chat.decoding = asyncio.Semaphore(HOLDING)
        return chat

    def _raise_if_error(self, finish_reason: str | None, request_id: str) -> None:
        """Make an error of half an answer too: vLLM ends it like a whole one while it stops."""
        super()._raise_if_error(finish_reason, request_id)
        if finish_reason == "abort":
            raise RetryableRequestError("the server ended before its answer did; ask again")

    async def render_chat_request(self, request: ChatCompletionRequest) -> Any:
        """Render the prompt, inspect its images and tell the model what was found."""
        rendered = await self.render(request)
        if isinstance(rendered, ErrorResponse):
            return rendered
        conversation, [engine_input] = rendered
        options = InspectionOptions()
        if isinstance(request, ChatRequest):
            options = request.inspection
        inspected = await self.inspect_images(engine_input, options)
        if isinstance(request, ChatRequest):
            request._inspected = inspected
            if inspected.findings and options.grounding:
                self._tell(engine_input, inspected)
        return conversation, [engine_input]

    async def render(self, request: ChatCompletionRequest) -> Any:
        """Check the request, unless it was when it was made, and let vLLM render it."""
        if not isinstance(request, ChatRequest):  # of a batch from files
            request.messages = checked_messages(request.messages, self.settings.max_images)
            check_keys(request.__dict__ | (request.model_extra or {}))
        with self.one_budget():
            return await super().render_chat_request(request)

    def one_budget(self) -> AbstractContextManager[object]:
        """Limits the pictures decoded inside together; within another one that one does."""
        if DecodedPictures.current() is not None:
            return nullcontext()
        return DecodedPictures(self.settings, self.decoding)

    def crops(self, engine_input: Any) -> list[Crops]:
        """The crops of a rendered prompt's images, in order of appearance.

        Raises:
            RequestError: an image token in the prompt belongs to no image.
            PictureError: an image is too long and thin to be judged.
        """
        hashes = (engine_input.get("mm_hashes") or {}).get("image", [])
        places = (engine_input.get("mm_placeholders") or {}).get("image", [])
        tokens = engine_input["prompt_token_ids"].count(self.image_token_id)
        if tokens != sum(place.length for place in places):
            raise RequestError(
                "the tools or other keys must not spell out <image>", param="messages"
            )
        found = list(map(_crops, hashes, engine_input["mm_kwargs"]["image"] if hashes else ()))
        for crops in found:
            self._check_shape(crops)
        return found

    def _check_shape(self, crops: Crops) -> None:
        """Refuse a picture of whose short side the grid of crops leaves less than a token.

        What is on it would be gone, and the picture found normal.
        """
        rows, columns = self.inspections.grid(crops)
        canvas = (columns * self.crop_side, rows * self.crop_side)
        place = placement(crops.size, canvas)
        left = min(place.width * canvas[0], place.height * canvas[1])
        if left < self.token_side:
            width, height = crops.size
            piece = int(min(crops.size) * max(canvas) / self.token_side)
            raise PictureError(
                f"a picture of {width} x {height} px is too long and thin: this model sees its "
                f"short side in {left:.0f} px, and needs {self.token_side:.0f}; cut it into pieces "
                f"of at most {piece} px"
            )

    async def inspect_images(self, engine_input: Any, options: InspectionOptions) -> Inspected:
        """The findings of a rendered prompt's images; the prompt's are then compared as they were.

        Raises:
            RequestError: the reference cannot be used, or an image token belongs to no image.
            ExpertUnavailable: the worker could not inspect.
        """
        images = dict(enumerate(self.crops(engine_input)))
        reference = await self._reference(options, images)
        if reference is not None:
            items, hashes = engine_input["mm_kwargs"], engine_input["mm_hashes"]
            for index in images.keys() - set(options.reference_images):
                crops = images[index] = images[index].compared(reference.version)
                hashes["image"][index] = crops.mm_hash
                set_identity(items["image"][index], crops.mm_hash, crops.version)
        chosen = [index for index in images if index not in options.reference_images]
        try:
            findings = await together(self.inspections.inspect(images[index]) for index in chosen)
        except ReferenceOutdated as error:
            if reference is not None and reference.name is None:
                self.references.forget(reference)
                error.headers = {}  # asked again, it is made anew
            raise
        return Inspected(dict(zip(chosen, findings, strict=True)), reference)

    async def _reference(
        self, options: InspectionOptions, images: dict[int, Crops]
    ) -> ReferenceVersion | None:
        """What the images are compared with.

        Raises:
            RequestError: it is named twice, unknown, or not among the images.
        """
        chosen = options.reference_images
        if not chosen:
            return await self.references.resolve(options.reference)
        param = "reference_images"
        if options.reference is not None:
            raise RequestError("give reference or reference_images, not both", param=param)
        if unknown := [index for index in chosen if index not in images]:
            raise RequestError(
                f"reference_images names image {unknown[0]}, the messages hold {len(images)} "
                "(counted from 0)",
                param=param,
            )
        return await self.references.of_conversation(
            [images[index] for index in sorted(set(chosen))]
        )

    def _tell(self, engine_input: Any, inspected: Inspected) -> None:
        """Put the facts sentence of each inspected image behind it."""
        reference = inspected.reference
        name = None if reference is None else reference.name or INLINE_NAME
        sentences = [
            facts_sentence(found.verdict, [region.position for region in found.regions], name)
            if (found := inspected.findings.get(index)) is not None
            else ""
            for index in range(len(engine_input["mm_placeholders"]["image"]))
        ]
        encode = self.renderer.tokenizer.encode
        insert_behind_images(
            engine_input, [encode(line, add_special_tokens=False) for line in sentences]
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


async def begun(stream: AsyncIterator[str]) -> AsyncIterator[str]:
    """The stream with its first event made: vLLM checks sampling parameters only then.

    Raises:
        RequestError: the first event is an error, which a status can still tell.
    """
    first = await anext(stream)
    if first.startswith('data: {"error"'):
        error = json.loads(first.removeprefix("data: "))["error"]
        refusal = RequestError(error["message"], param=error["param"])
        refusal.status = HTTPStatus(error["code"])
        raise refusal

    async def whole() -> AsyncIterator[str]:
        yield first
        async for event in stream:
            yield event

    return whole()


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
