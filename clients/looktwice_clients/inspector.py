"""The Python client: pictures in, typed inspections and answers out, on the OpenAI SDK.

Retries, timeouts and errors are the SDK's own; its client is at `client` for everything else.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, overload
from weakref import WeakSet

from pydantic import BaseModel, ValidationError
from tqdm import tqdm

from looktwice_clients.address import TIMEOUT, server_key, server_url
from looktwice_clients.conversation import Answer, AsyncConversation, ChatOptions, Conversation
from looktwice_clients.errors import LookTwiceError, ReplyError, what_is_wrong
from looktwice_clients.images import ImageSource, to_wire
from looktwice_clients.references import AsyncReferences, References
from looktwice_clients.report import (
    MAX_TOKENS,
    QUESTION,
    RESPONSE_FORMAT,
    InspectionReport,
    report_from,
)
from looktwice_clients.schemas import Inspection, InspectionList

if TYPE_CHECKING:  # the SDK takes a second or more to import: only who connects waits for it
    from openai import AsyncOpenAI, OpenAI

BAR_DELAY = 2.0
"""Seconds that many pictures may take before a progress bar is shown."""


class _AnsweringModel:
    """The name of the model that answers questions: as given, else the server's first."""

    def __init__(self, model: str | None) -> None:
        self._model, self._given = model, model is not None

    def forget_model(self, error: Exception) -> bool:
        """Forget a name that `error` says is not served any more; False: it says something else.

        A name that was given stays.
        """
        from openai import NotFoundError

        unknown = isinstance(error, NotFoundError) and error.param == "model"
        if self._given or not unknown:
            return False
        self._model = None
        return True


class Inspector(_AnsweringModel):
    """A LookTwice server, for programs that wait for its answers.

    Safe to share between threads. Use it as a context manager, or call `close`.
    """

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        model: str | None = None,
        timeout: float = TIMEOUT,
        max_retries: int = 2,
        http_client: Any = None,
    ) -> None:
        """Connect to nothing yet.

        Args:
            url: the API's address; else $LOOKTWICE_URL, else http://127.0.0.1:8000/v1.
            api_key: else $LOOKTWICE_API_KEY, else $OPENAI_API_KEY, else none.
            model: which of the server's models answers questions; else its first.
            timeout: seconds that each try of a request may take.
            max_retries: how often a request is repeated: lost connection, timeout, busy server.
            http_client: the OpenAI SDK's own argument, for proxies, certificates and tests.
        """
        from openai import OpenAI

        self.url = server_url(url)
        super().__init__(model)
        self._many: WeakSet[Generator[Any, None, None]] = WeakSet()
        self.client: OpenAI = OpenAI(
            base_url=self.url,
            api_key=server_key(api_key),
            timeout=timeout,
            max_retries=max_retries,
            http_client=http_client,
        )
        self.references = References(self.client)

    @property
    def model(self) -> str:
        """The name of the model that answers questions, asked for once."""
        if self._model is None:
            self._model = model_names(self.client.get("/models", cast_to=object))[0]
        return self._model

    def inspect(
        self, image: ImageSource, reference: str | None = None, map: bool = True
    ) -> Inspection:
        """Score, verdict and regions of one picture, without the language model.

        Args:
            image: a path, a file's bytes, a Pillow image, an http(s) address, or a data URI.
            reference: name of the reference images to compare with.
            map: whether the inspection carries its anomaly map.

        Raises:
            ImageError: the picture is missing, too large, or no picture.
            openai.OpenAIError: the server refused, failed, or could not be reached.
            ReplyError: the server answered with something else.
        """
        body = _body(image, reference, map)
        return _only(self.client.post("/inspections", cast_to=object, body=body))

    @overload
    def inspect_many(
        self,
        images: Iterable[ImageSource],
        reference: str | None = None,
        map: bool = True,
        *,
        concurrency: int = 4,
        progress: bool = False,
        return_exceptions: Literal[False] = False,
    ) -> Generator[Inspection, None, None]: ...

    @overload
    def inspect_many(
        self,
        images: Iterable[ImageSource],
        reference: str | None = None,
        map: bool = True,
        *,
        concurrency: int = 4,
        progress: bool = False,
        return_exceptions: Literal[True],
    ) -> Generator[Inspection | Exception, None, None]: ...

    def inspect_many(
        self,
        images: Iterable[ImageSource],
        reference: str | None = None,
        map: bool = True,
        *,
        concurrency: int = 4,
        progress: bool = False,
        return_exceptions: bool = False,
    ) -> Generator[Inspection, None, None] | Generator[Inspection | Exception, None, None]:
        """Inspections of many pictures, in the pictures' order, as they become ready.

        Reads `images` only a little ahead, so that it may be endless; `close` ends it early. Where
        they come slowly, as from a camera, a picture's inspection comes with the next picture, or
        with a later one if it took long.

        Args:
            images: as for `inspect`.
            reference: as for `inspect`.
            map: as for `inspect`.
            concurrency: how many requests may be under way at once.
            progress: whether a terminal shows a bar (on stderr) where it takes over two seconds.
            return_exceptions: whether a picture's error takes its place instead of being raised.
        """
        from openai import OpenAIError

        _check_concurrency(concurrency)

        def call(image: ImageSource) -> Inspection | Exception:
            try:
                return self.inspect(image, reference, map)
            except (LookTwiceError, OpenAIError) as error:
                if return_exceptions:
                    return error
                raise

        many = _in_order(call, images, concurrency, progress)
        self._many.add(many)
        return many

    def ask(
        self,
        image: ImageSource,
        question: str,
        reference: str | None = None,
        map: bool = False,
        *,
        grounding: bool = True,
        **completion: Any,
    ) -> Answer:
        """One question about one picture: the answer's words and the inspection behind them.

        Args:
            image: as for `inspect`.
            question: what to ask.
            reference: as for `inspect`.
            map: as for `inspect`.
            grounding: whether the facts stand in the prompt.
            completion: arguments of the SDK's `chat.completions.create`, such as max_tokens.
        """
        options = ChatOptions(reference, map, grounding, completion)
        return Conversation(self, options, image).send(question)

    def report(
        self,
        image: ImageSource,
        reference: str | None = None,
        map: bool = False,
        **completion: Any,
    ) -> InspectionReport:
        """The inspection of one picture with the language model's words, each in its field.

        Raises:
            ReplyError: the model did not write what it was asked for.
        """
        question = {"response_format": RESPONSE_FORMAT, "max_tokens": MAX_TOKENS, **completion}
        return report_from(self.ask(image, QUESTION, reference, map, **question))

    def chat(
        self,
        image: ImageSource | None = None,
        reference: str | None = None,
        map: bool = False,
        *,
        grounding: bool = True,
        **completion: Any,
    ) -> Conversation:
        """A conversation that remembers its pictures; the arguments are those of `ask`."""
        return Conversation(self, ChatOptions(reference, map, grounding, completion), image)

    def close(self) -> None:
        """Wait for the requests of an unfinished `inspect_many`, then close the connections.

        Raises:
            LookTwiceError: another thread waits for the next inspection of one.
        """
        # A connection that is cut while a thread reads leaves it reading for ever.
        for many in list(self._many):
            try:
                many.close()
            except ValueError:  # it is under way
                raise LookTwiceError("an inspect_many is being read: end that first") from None
        self.client.close()

    def __enter__(self) -> Self:
        """Itself, closed at the end of the `with` block."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the connections; what ended the block early is not hidden by another error."""
        with suppress(*[LookTwiceError] if error else []):
            self.close()


class AsyncInspector(_AnsweringModel):
    """A LookTwice server, for programs with an event loop; the methods are those of `Inspector`."""

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        model: str | None = None,
        timeout: float = TIMEOUT,
        max_retries: int = 2,
        http_client: Any = None,
    ) -> None:
        """Connect to nothing yet; the arguments are those of `Inspector`."""
        from openai import AsyncOpenAI

        self.url = server_url(url)
        super().__init__(model)
        self.client: AsyncOpenAI = AsyncOpenAI(
            base_url=self.url,
            api_key=server_key(api_key),
            timeout=timeout,
            max_retries=max_retries,
            http_client=http_client,
        )
        self.references = AsyncReferences(self.client)

    async def model(self) -> str:
        """The name of the model that answers questions, asked for once."""
        if self._model is None:
            self._model = model_names(await self.client.get("/models", cast_to=object))[0]
        return self._model

    async def inspect(
        self, image: ImageSource, reference: str | None = None, map: bool = True
    ) -> Inspection:
        """Score, verdict and regions of one picture, as `Inspector.inspect` gives them."""
        body = await asyncio.to_thread(_body, image, reference, map)
        return _only(await self.client.post("/inspections", cast_to=object, body=body))

    @overload
    def inspect_many(
        self,
        images: Iterable[ImageSource],
        reference: str | None = None,
        map: bool = True,
        *,
        concurrency: int = 4,
        progress: bool = False,
        return_exceptions: Literal[False] = False,
    ) -> AsyncGenerator[Inspection, None]: ...

    @overload
    def inspect_many(
        self,
        images: Iterable[ImageSource],
        reference: str | None = None,
        map: bool = True,
        *,
        concurrency: int = 4,
        progress: bool = False,
        return_exceptions: Literal[True],
    ) -> AsyncGenerator[Inspection | Exception, None]: ...

    def inspect_many(
        self,
        images: Iterable[ImageSource],
        reference: str | None = None,
        map: bool = True,
        *,
        concurrency: int = 4,
        progress: bool = False,
        return_exceptions: bool = False,
    ) -> AsyncGenerator[Inspection, None] | AsyncGenerator[Inspection | Exception, None]:
        """Inspections of many pictures, as `Inspector.inspect_many` gives them; `async for`.

        `images` is read in threads, one picture at a time, so that a slow source stops nothing.
        """
        from openai import OpenAIError

        _check_concurrency(concurrency)

        async def call(image: ImageSource) -> Inspection | Exception:
            try:
                return await self.inspect(image, reference, map)
            except (LookTwiceError, OpenAIError) as error:
                if return_exceptions:
                    return error
                raise

        return _in_order_async(call, images, concurrency, progress)

    async def ask(
        self,
        image: ImageSource,
        question: str,
        reference: str | None = None,
        map: bool = False,
        *,
        grounding: bool = True,
        **completion: Any,
    ) -> Answer:
        """One question about one picture, as `Inspector.ask` answers it."""
        options = ChatOptions(reference, map, grounding, completion)
        return await AsyncConversation(self, options, image).send(question)

    async def report(
        self,
        image: ImageSource,
        reference: str | None = None,
        map: bool = False,
        **completion: Any,
    ) -> InspectionReport:
        """One picture's structured report, as `Inspector.report` gives it."""
        question = {"response_format": RESPONSE_FORMAT, "max_tokens": MAX_TOKENS, **completion}
        return report_from(await self.ask(image, QUESTION, reference, map, **question))

    def chat(
        self,
        image: ImageSource | None = None,
        reference: str | None = None,
        map: bool = False,
        *,
        grounding: bool = True,
        **completion: Any,
    ) -> AsyncConversation:
        """A conversation as `Inspector.chat` makes it; its first turn reads `image`."""
        return AsyncConversation(self, ChatOptions(reference, map, grounding, completion), image)

    async def close(self) -> None:
        """Close the connections."""
        await self.client.close()

    async def __aenter__(self) -> Self:
        """Itself, closed at the end of the `async with` block."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the connections."""
        await self.close()


def _body(image: ImageSource, reference: str | None, map: bool) -> dict[str, Any]:
    """The JSON of `POST /v1/inspections` for one picture."""
    body: dict[str, Any] = {"images": [to_wire(image)], "map": map}
    return body if reference is None else {**body, "reference": reference}


def _only(reply: object) -> Inspection:
    """The one inspection in the reply of `POST /v1/inspections`."""
    try:
        data = InspectionList.model_validate(reply).data
    except ValidationError as error:
        raise ReplyError(
            f"the reply is not a list of inspections: {what_is_wrong(error)}"
        ) from None
    if len(data) != 1:
        raise ReplyError(f"asked for one inspection, got {len(data)}")
    return data[0]


class _Model(BaseModel):
    id: str


class _Models(BaseModel):
    """The envelope of `GET /v1/models`."""

    data: list[_Model]


def model_names(reply: object) -> list[str]:
    """The models' names in the reply of `GET /v1/models`, at least one.

    Raises:
        ReplyError: it lists none, or is something else.
    """
    try:
        names = [model.id for model in _Models.model_validate(reply).data]
    except ValidationError as error:
        raise ReplyError(f"the reply is not a list of models: {what_is_wrong(error)}") from None
    if not names:
        raise ReplyError("the server lists no model")
    return names


def _check_concurrency(concurrency: int) -> None:
    if concurrency < 1:
        raise ValueError(f"concurrency must be at least 1, got {concurrency}")


def _in_order(
    call: Callable[[ImageSource], Inspection | Exception],
    images: Iterable[ImageSource],
    concurrency: int,
    progress: bool,
) -> Generator[Any, None, None]:
    """`call` of each image in threads; results in order, at most twice `concurrency` ahead."""
    waiting: deque[Future[Inspection | Exception]] = deque()
    with ThreadPoolExecutor(concurrency) as pool, _bar(images, progress) as bar:
        try:
            for image in images:
                waiting.append(pool.submit(call, image))
                # One for one, so that requests stay under way however slowly results are taken.
                if waiting[0].done() or len(waiting) >= 2 * concurrency:
                    yield waiting.popleft().result()
                    bar.update()
            while waiting:
                yield waiting.popleft().result()
                bar.update()
        finally:
            for future in waiting:
                future.cancel()


async def _in_order_async(
    call: Callable[[ImageSource], Any],
    images: Iterable[ImageSource],
    concurrency: int,
    progress: bool,
) -> AsyncGenerator[Any, None]:
    """As `_in_order`, with tasks of the running event loop."""
    turnstile = asyncio.Semaphore(concurrency)

    async def limited(image: Any) -> Inspection | Exception:
        async with turnstile:
            result: Inspection | Exception = await call(image)
            return result

    waiting: deque[asyncio.Task[Inspection | Exception]] = deque()
    pictures, end = iter(images), object()
    with _bar(images, progress) as bar:
        try:
            while (image := await asyncio.to_thread(next, pictures, end)) is not end:
                waiting.append(asyncio.create_task(limited(image)))
                if waiting[0].done() or len(waiting) >= 2 * concurrency:
                    yield await waiting.popleft()
                    bar.update()
            while waiting:
                yield await waiting.popleft()
                bar.update()
        finally:
            for task in waiting:
                task.cancel()
            for task in waiting:
                with suppress(asyncio.CancelledError, Exception):
                    await task


def _bar(images: Iterable[ImageSource], progress: bool) -> Any:
    """A progress bar, of a length where `images` has one; silent where stderr is no terminal."""
    total = len(images) if isinstance(images, Sized) else None
    hidden = None if progress else True
    return tqdm(total=total, unit="picture", delay=BAR_DELAY, leave=False, disable=hidden)
