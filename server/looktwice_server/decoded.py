"""Decoded pictures in memory: limited for a request, and held by a few requests at once.

A file of 20 kB can be 50 million pixels, and vLLM decodes all pictures of a request before the
processor cuts them.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from typing import Self

from looktwice_server.errors import PictureError
from looktwice_server.settings import Settings

HOLDING = 4  # requests whose pictures are in memory, decoded, at once
REQUEST_PIXELS = 4  # of one request's pictures together, in pictures of the largest size


class DecodedPictures:
    """The pictures of one request, from before they are decoded until they are cut into crops.

    A context: whoever decodes inside it finds it by `current`.
    """

    def __init__(self, settings: Settings, places: asyncio.Semaphore) -> None:
        """Take the limits, and the places for requests that hold decoded pictures."""
        self._limit = REQUEST_PIXELS * settings.max_pixels
        self._pixels = 0
        self._places = places
        self._turn = asyncio.Lock()
        self._fetches = 0
        self._fetched = asyncio.Event()
        self._fetched.set()
        self._holding = self._over = False
        self._before: Token[DecodedPictures | None] | None = None

    @staticmethod
    def current() -> "DecodedPictures | None":
        """Those of the request that this code runs for."""
        return _CURRENT.get()

    def __enter__(self) -> Self:
        """Be what `current` returns."""
        self._before = _CURRENT.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        """Let the next request decode."""
        assert self._before is not None
        _CURRENT.reset(self._before)
        self._over = True
        self._leave()

    @contextmanager
    def fetching(self) -> Iterator[None]:
        """One of the request's pictures is on its way: a slow camera keeps no place meanwhile."""
        self._fetches += 1
        self._fetched.clear()
        try:
            yield
        finally:
            self._fetches -= 1
            if not self._fetches:
                self._fetched.set()

    async def wait(self) -> None:
        """Wait until this request may decode; at its first picture only."""
        await asyncio.sleep(0)  # those that are to be fetched begin
        await self._fetched.wait()
        async with self._turn:
            if not self._holding:
                await self._places.acquire()
                self._holding = True
            if self._over:  # meanwhile another picture of the request was refused
                self._leave()

    def _leave(self) -> None:
        if self._holding:
            self._holding = False
            self._places.release()

    def add(self, size: tuple[int, int]) -> None:
        """Count a picture of (width, height) before it is decoded.

        Raises:
            PictureError: the request's pictures have too many pixels together.
        """
        self._pixels += size[0] * size[1]
        if self._pixels > self._limit:
            raise PictureError(
                "the request's pictures have more pixels together than this server takes "
                f"({self._limit:,}); send fewer or smaller ones"
            )


_CURRENT: ContextVar[DecodedPictures | None] = ContextVar("decoded_pictures", default=None)
