"""Asking about pictures: questions in, words and the inspections behind them out.

A conversation remembers its pictures and turns, because the server remembers nothing: every request
carries them all. A turn that fails is forgotten as if it had not been said; the pictures attached
for it wait for the next one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from json import JSONDecodeError
from typing import TYPE_CHECKING, Any, cast

from pydantic import ValidationError

from looktwice_clients.errors import ImageError, ReplyError, what_is_wrong
from looktwice_clients.images import ImageSource, to_wire
from looktwice_clients.schemas import Inspection

if TYPE_CHECKING:
    from openai import AsyncStream, Stream
    from openai.types.chat import ChatCompletion, ChatCompletionChunk

    from looktwice_clients.inspector import AsyncInspector, Inspector


@dataclass(frozen=True)
class Answer:
    """The language model's words, and the facts beside them."""

    text: str
    inspections: list[Inspection]
    """One for each picture of the conversation so far that is no reference, in order; `image`
    counts them all."""
    finish_reason: str | None = None
    """Why the text ended: "stop", or "length" where it was cut."""
    model: str = ""


@dataclass(frozen=True)
class ChatOptions:
    """What every request of a conversation asks for."""

    reference: str | None = None
    """Name of the reference images to compare with."""
    map: bool = False
    """Whether the inspections carry their anomaly maps."""
    grounding: bool = True
    """Whether the facts stand in the prompt; false gives Anomaly-OV's layout, with the adverb of
    the calibrated score."""
    completion: dict[str, Any] = field(default_factory=dict)
    """Arguments of the OpenAI SDK's `chat.completions.create`, such as max_tokens; `inspection` in
    `extra_body` goes before the options above."""


@dataclass(frozen=True)
class _Turn:
    """A question that was put to the server, until its answer is there."""

    request: dict[str, Any]
    """Arguments of `chat.completions.create`: all turns so far and this one."""
    waited: list[object]
    """Keys of the pictures in it that had waited for it."""


class _History:
    """The turns and pictures of one conversation, and the requests made of them."""

    def __init__(self, options: ChatOptions, image: ImageSource | None = None) -> None:
        self.options = options
        self.messages: list[dict[str, Any]] = []
        self.inspections: list[Inspection] = []
        self._waiting: dict[object, ImageSource] = {}
        """Pictures for the next turn, by a key that no other has: one may be attached twice."""
        if image is not None:
            self.attach(image)

    @property
    def inspection(self) -> Inspection | None:
        """That of the latest picture; None before the first answer about one."""
        return self.inspections[-1] if self.inspections else None

    @property
    def reference(self) -> str | None:
        """Name of the reference images that the coming turns compare with."""
        return self.options.reference

    @reference.setter
    def reference(self, name: str | None) -> None:
        self.options = replace(self.options, reference=name)

    def attach(self, image: ImageSource) -> None:
        """Put a picture into the next turn.

        Raises:
            ImageError: it is missing, too large, or no picture.
        """
        self._waiting[object()] = to_wire(image)

    @property
    def waiting(self) -> int:
        """How many pictures wait for the next turn."""
        return len(self._waiting)

    def detach(self) -> int:
        """Take the pictures that wait for the next turn out again; how many."""
        count = len(self._waiting)
        self._waiting.clear()
        return count

    def _turn(self, text: str, pictures: list[str], waited: list[object], model: str) -> _Turn:
        content = [{"type": "image_url", "image_url": {"url": url}} for url in pictures]
        message = {"role": "user", "content": [*content, {"type": "text", "text": text}]}
        inspection: dict[str, Any] = {"map": self.options.map, "grounding": self.options.grounding}
        if self.options.reference is not None:
            inspection |= {"reference": self.options.reference}
        completion = self.options.completion
        extra = completion.get("extra_body", {})
        request = {
            **completion,
            "model": model,
            "messages": [*self.messages, message],
            "extra_body": extra | {"inspection": inspection | extra.get("inspection", {})},
        }
        return _Turn(request, waited)

    def _remember(self, turn: _Turn, answer: Answer) -> Answer:
        reply = {"role": "assistant", "content": answer.text}
        self.messages = [*turn.request["messages"], reply]
        self.inspections = answer.inspections
        for key in turn.waited:  # what was attached since then waits for the next turn
            self._waiting.pop(key, None)
        return answer


class Conversation(_History):
    """Several turns about the same pictures; made by `Inspector.chat`."""

    def __init__(
        self, inspector: Inspector, options: ChatOptions, image: ImageSource | None = None
    ) -> None:
        """Start with no turns; `image` waits for the first one."""
        super().__init__(options, image)
        self._inspector = inspector

    def send(self, text: str, *images: ImageSource) -> Answer:
        """Say `text`, with more pictures if any, and wait for the whole answer."""
        turn = self._next(text, images)
        with _readable():
            answer = _answer(cast("ChatCompletion", self._ask(turn)))
        return self._remember(turn, answer)

    def stream(self, text: str, *images: ImageSource) -> AnswerStream:
        """Say `text`; iterate over the result for the pieces of the answer as they come."""
        turn = self._next(text, images)
        chunks = self._ask(turn, stream=True)
        return AnswerStream(self, turn, cast("Stream[ChatCompletionChunk]", chunks))

    def _ask(self, turn: _Turn, **how: bool) -> object:
        create: Any = self._inspector.client.chat.completions.create
        try:
            return create(**turn.request, **how)
        except Exception as error:
            if not self._inspector.forget_model(error):
                raise
        turn.request["model"] = self._inspector.model
        return create(**turn.request, **how)

    def _next(self, text: str, images: tuple[ImageSource, ...]) -> _Turn:
        waiting = dict(self._waiting)
        pictures = [*map(str, waiting.values()), *map(to_wire, images)]
        return self._turn(text, pictures, list(waiting), self._inspector.model)


class AsyncConversation(_History):
    """Several turns about the same pictures; made by `AsyncInspector.chat`."""

    def __init__(
        self, inspector: AsyncInspector, options: ChatOptions, image: ImageSource | None = None
    ) -> None:
        """Start with no turns; `image` waits for the first one."""
        super().__init__(options, image)
        self._inspector = inspector

    def attach(self, image: ImageSource) -> None:
        """Put a picture into the next turn; it is read then, so that the event loop goes on.

        That turn raises `ImageError` where it is missing, too large, or no picture, and drops it.
        """
        self._waiting[object()] = image

    async def send(self, text: str, *images: ImageSource) -> Answer:
        """Say `text`, with more pictures if any, and wait for the whole answer."""
        turn = await self._next(text, images)
        with _readable():
            answer = _answer(cast("ChatCompletion", await self._ask(turn)))
        return self._remember(turn, answer)

    async def stream(self, text: str, *images: ImageSource) -> AsyncAnswerStream:
        """Say `text`; iterate over the result for the pieces of the answer as they come."""
        turn = await self._next(text, images)
        chunks = await self._ask(turn, stream=True)
        return AsyncAnswerStream(self, turn, cast("AsyncStream[ChatCompletionChunk]", chunks))

    async def _ask(self, turn: _Turn, **how: bool) -> object:
        create: Any = self._inspector.client.chat.completions.create
        try:
            return await create(**turn.request, **how)
        except Exception as error:
            if not self._inspector.forget_model(error):
                raise
        turn.request["model"] = await self._inspector.model()
        return await create(**turn.request, **how)

    async def _next(self, text: str, images: tuple[ImageSource, ...]) -> _Turn:
        waiting = dict(self._waiting)
        pictures = []
        for key, image in waiting.items():
            try:
                pictures.append(await asyncio.to_thread(to_wire, image))
            except ImageError:
                self._waiting.pop(key, None)  # it would be refused with every turn
                raise
        pictures += [await asyncio.to_thread(to_wire, image) for image in images]
        return self._turn(text, pictures, list(waiting), await self._inspector.model())


class _Pieces:
    """What has arrived of a streamed answer."""

    def __init__(self, history: _History, turn: _Turn) -> None:
        self._history = history
        self._turn = turn
        self._text: list[str] = []
        self._extra: dict[str, Any] = {}
        self._finish_reason: str | None = None
        self._model = ""
        self._answer: Answer | None = None

    @property
    def answer(self) -> Answer:
        """The whole answer, once the last piece has come.

        Raises:
            ReplyError: pieces are still to come, or never came.
        """
        if self._answer is None:
            raise ReplyError("the streamed answer has not been read to its end")
        return self._answer

    def _add(self, chunk: ChatCompletionChunk) -> str:
        self._extra |= chunk.model_extra or {}
        self._model = chunk.model or self._model
        # Of several answers (`n`) the first is the conversation's, as in `send`.
        choice = next((one for one in chunk.choices if one.index == 0), None)
        if choice is None:
            return ""
        self._finish_reason = choice.finish_reason or self._finish_reason
        piece = choice.delta.content or ""
        self._text.append(piece)
        return piece

    def _finish(self) -> None:
        text = "".join(self._text)
        answer = Answer(text, _inspections(self._extra), self._finish_reason, self._model)
        self._answer = self._history._remember(self._turn, answer)


class AnswerStream(_Pieces):
    """Pieces of an answer as they come; `answer` is whole after the last one.

    Closing it early tells the server to stop; the turn is then forgotten.
    """

    def __init__(self, history: _History, turn: _Turn, chunks: Stream[ChatCompletionChunk]) -> None:
        """Take over an open stream; `history` remembers the turn when it ends."""
        super().__init__(history, turn)
        self._chunks = chunks

    def __iter__(self) -> Iterator[str]:
        """The pieces of text, none of them empty."""
        with self._chunks as chunks, _readable():
            for chunk in chunks:
                if piece := self._add(chunk):
                    yield piece
        self._finish()

    def close(self) -> None:
        """Stop reading; the server stops writing."""
        self._chunks.close()


class AsyncAnswerStream(_Pieces):
    """Pieces of an answer as they come; `answer` is whole after the last one.

    Closing it early tells the server to stop; the turn is then forgotten.
    """

    def __init__(
        self, history: _History, turn: _Turn, chunks: AsyncStream[ChatCompletionChunk]
    ) -> None:
        """Take over an open stream; `history` remembers the turn when it ends."""
        super().__init__(history, turn)
        self._chunks = chunks

    async def __aiter__(self) -> AsyncIterator[str]:
        """The pieces of text, none of them empty."""
        async with self._chunks as chunks:
            with _readable():
                async for chunk in chunks:
                    if piece := self._add(chunk):
                        yield piece
        self._finish()

    async def close(self) -> None:
        """Stop reading; the server stops writing."""
        await self._chunks.close()


@contextmanager
def _readable() -> Iterator[None]:
    """Raise `ReplyError` for what is not a chat completion: the SDK passes on anything."""
    try:
        yield
    except (AttributeError, IndexError, JSONDecodeError, KeyError, TypeError) as error:
        reason = "the reply is not a chat completion: is this a LookTwice server?"
        raise ReplyError(reason) from error


def _answer(completion: ChatCompletion) -> Answer:
    inspections = _inspections(completion.model_extra or {})
    if not completion.choices:
        raise ReplyError("the server's answer has no choices")
    choice = completion.choices[0]
    return Answer(choice.message.content or "", inspections, choice.finish_reason, completion.model)


def _inspections(extra: dict[str, Any]) -> list[Inspection]:
    """The `inspections` beside an answer; a server that sends none is not LookTwice."""
    if "inspections" not in extra:
        raise ReplyError("the answer carries no `inspections`: is this a LookTwice server?")
    try:
        return [Inspection.model_validate(one) for one in extra["inspections"]]
    except ValidationError as error:
        reason = what_is_wrong(error)
        raise ReplyError(f"the answer's `inspections` cannot be read: {reason}") from None
    except TypeError:
        raise ReplyError("the answer's `inspections` are not a list") from None
