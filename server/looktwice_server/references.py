"""References on the API side: pictures of a product -> memory bank, threshold, a name in the store.

The worker's tower makes the tokens, a picture a call; the bank is made here, beside the engine, so
that making one stops nobody's answer.
"""

import asyncio
import base64
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from io import BytesIO
from itertools import chain
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from looktwice_adapters.few_shot import Built, Looked, build, common_grid
from looktwice_adapters.recut import Grid
from looktwice_adapters.threshold import NORMAL, NormalScores
from looktwice_server.errors import (
    ExpertUnavailable,
    ReferenceOutdated,
    RequestError,
    StoreFull,
    naming,
)
from looktwice_server.inspections import Crops, Inspections, payload
from looktwice_server.reference_store import GRACE_SECONDS, ReferenceStore
from looktwice_server.schemas import Reference, ReferenceRequest, ReferenceVersion
from looktwice_server.settings import Settings

THUMBNAIL = 128  # pixels of the longer side
REMEMBERED = 64  # references made of a conversation's own pictures
INLINE_RATE = 0.05  # false alarms asked of those

Fetch = Callable[[str], Awaitable[Crops]]

logger = logging.getLogger(__name__)


class Seen(NamedTuple):
    """One picture as a reference keeps it while it is made."""

    looked: Looked
    copies: list[Tensor]  # L of (B', N, C_l); none where copies were not wanted
    thumbnail: bytes  # JPEG

    @property
    def nbytes(self) -> int:
        """Memory of the tokens."""
        return sum(level.nbytes for level in (*self.looked.tokens, *self.copies))


class References:
    """Adds references, and knows which version a name means."""

    def __init__(
        self,
        store: ReferenceStore,
        inspections: Inspections,
        expert: str,
        calibration: str,
        settings: Settings,
        prior: NormalScores = NORMAL,
    ) -> None:
        """Take the store, who asks the workers, and of the served expert its hashes and prior."""
        self.store = store
        self._inspections = inspections
        self._expert = expert
        self._calibration = calibration
        self._settings = settings
        self._prior = prior
        self._one_at_a_time = asyncio.Lock()
        self._one_conversation_at_a_time = asyncio.Lock()  # waits for no named reference
        self._inline: OrderedDict[tuple[str, ...], ReferenceVersion] = OrderedDict()

    async def resolve(self, name: str | None) -> ReferenceVersion | None:
        """What a request's reference means from now to the request's end.

        Raises:
            UnknownReference: there is none of that name.
            ReferenceOutdated: it was made with another expert, or is broken.
            ReferenceUnavailable: the disk does not answer now.
        """
        if name is None:
            return None
        card = await asyncio.to_thread(self.card, name)
        if card.problem is not None:
            raise ReferenceOutdated(card.problem, param="reference")
        return ReferenceVersion(
            name=name,
            version=card.version,
            false_alarm_rate=card.false_alarm_rate,
            promised_rate=card.promised_rate,
            warnings=card.warnings,
        )

    def card(self, name: str) -> Reference:
        """What is known of a reference, as `ReferenceStore.card` tells it, on this server."""
        return self._on_this_server(self.store.card(name))

    def cards(self) -> list[Reference]:
        """All references, by name, with those that cannot be used."""
        return [self._on_this_server(card) for card in self.store.cards()]

    def _on_this_server(self, card: Reference) -> Reference:
        """The card with the problem that another expert made it, if so."""
        if card.problem is not None:
            return card
        if card.expert != self._expert:
            made = f"the expert {card.expert}, this server runs {self._expert}"
        elif card.calibration != self._calibration:
            made = "another calibration of the expert than this server's"
        else:
            return card
        problem = f"the reference {card.name!r} was made with {made}; add it again"
        return card.model_copy(update={"problem": problem})

    async def add(self, name: str, request: ReferenceRequest, fetch: Fetch) -> Reference:
        """Make a reference and give it its name.

        Args:
            name: checked.
            request: the pictures.
            fetch: the way from a URL to a picture's crops.

        Raises:
            RequestError: a picture cannot be had, or there are too many; nothing was changed.
        """
        groups = {
            "images": request.images,
            "calibration_images": request.calibration_images,
            "defect_images": request.defect_images,
        }
        limit = self._settings.max_reference_images
        for key, urls in groups.items():
            if len(urls) > limit:
                raise RequestError(
                    f"at most {limit} {key} a reference, got {len(urls)}; send fewer", param=key
                )
        async with self._one_at_a_time:
            grid, seen = await self._see(groups, fetch, turned=request.augment)
            built, data = await self._built(grid, seen, request.false_alarm_rate)
            version = await asyncio.to_thread(self.store.keep, data)
            threshold = built.reference.threshold
            card = Reference(
                name=name,
                version=version,
                images=built.images,
                patches=len(built.reference.bank),
                false_alarm_rate=threshold.rate,
                promised_rate=threshold.promised_rate,
                guaranteed_rate=threshold.guaranteed_rate,
                threshold=threshold.value,
                created=int(time.time()),
                expert=self._expert,
                calibration=self._calibration,
                warnings=built.warnings,
            )
            await asyncio.to_thread(self.store.name, card)
            await asyncio.to_thread(self.store.clean)
        return card

    async def of_conversation(self, pictures: Sequence[Crops]) -> ReferenceVersion:
        """The reference that some pictures of a conversation make, kept without a name."""
        key = tuple(crops.mm_hash for crops in pictures)
        async with self._one_conversation_at_a_time:
            made = self._inline.get(key)
            if made is None or not self.store.renew(made.version):
                grid = common_grid([self._inspections.grid(crops) for crops in pictures])
                looked: list[Seen] = []
                for index, crops in enumerate(pictures):
                    looked.append(await self._look(crops, grid, turned=False))
                    self._check_memory(looked, "reference_images", index)
                built, data = await self._built(grid, {"images": looked}, INLINE_RATE)
                made = ReferenceVersion(
                    name=None,
                    version=await asyncio.to_thread(self.store.keep, data),
                    false_alarm_rate=INLINE_RATE,
                    promised_rate=built.reference.threshold.promised_rate,
                    warnings=built.warnings,
                )
                await asyncio.to_thread(self.store.clean)
        self._inline[key] = made
        self._inline.move_to_end(key)
        if len(self._inline) > REMEMBERED:
            self._inline.popitem(last=False)
        return made

    def forget(self, broken: ReferenceVersion) -> None:
        """Make a conversation's reference anew when it is asked for next: its file is broken."""
        for key in [key for key, made in self._inline.items() if made.version == broken.version]:
            del self._inline[key]

    async def keep_clean(self) -> None:
        """Clean the store now and every hour: what lost its name must not wait for a request."""
        while True:
            try:
                await asyncio.to_thread(self.store.clean)
            except Exception:
                logger.exception("the references' folder could not be cleaned")
            await asyncio.sleep(GRACE_SECONDS)

    async def _see(
        self, groups: dict[str, list[str]], fetch: Fetch, *, turned: bool
    ) -> tuple[Grid, dict[str, list[Seen]]]:
        """All pictures, one after the other, cut on the grid that most good ones have."""
        seen: dict[str, list[Seen]] = {key: [] for key in groups}

        async def see(key: str, index: int, grid: Grid | None) -> tuple[Grid, Seen]:
            with naming(key, index):
                crops = await fetch(groups[key][index])
                one = await self._look(crops, grid, turned=turned and key == "images")
            self._check_memory([one, *chain(*seen.values())], key, index)
            return self._inspections.grid(crops), one

        own: list[Grid] = []
        for index in range(len(groups["images"])):
            grid, one = await see("images", index, None)
            own.append(grid)
            seen["images"].append(one)
        common = common_grid(own)
        for index, grid in enumerate(own):
            if grid != common:  # seldom, so that its crops were not kept
                seen["images"][index] = (await see("images", index, common))[1]
        for key in ("calibration_images", "defect_images"):
            for index in range(len(groups[key])):
                seen[key].append((await see(key, index, common))[1])
        return common, seen

    def _check_memory(self, seen: Iterable[Seen], key: str, index: int) -> None:
        """Raise StoreFull, naming the latest picture, where the tokens take too much memory."""
        limit = self._settings.reference_tokens_mb
        if sum(one.nbytes for one in seen) > limit * 2**20:
            raise StoreFull(
                f"{key}[{index}] exceeds the {limit} MB limit for building a reference "
                "(LOOKTWICE_REFERENCE_TOKENS_MB); send fewer or smaller pictures",
                param=key,
            )

    async def _look(self, crops: Crops, grid: Grid | None, *, turned: bool) -> Seen:
        """One picture's tokens from the worker, cut on its own grid or another."""
        crops = self._inspections.own_crops(crops)
        [record, *_] = await self._inspections.ask("looktwice_look", payload(crops), turned, grid)
        if isinstance(record, str):
            raise ExpertUnavailable(record)
        suspicion = _tensor(record["grid"], record["suspicion"], torch.float32)
        tokens, copies = (
            [_tensor(shape, data, torch.half) for shape, data in record[key]]
            for key in ("tokens", "copies")
        )
        return Seen(Looked(tokens, suspicion), copies, thumbnail(crops))

    async def _built(
        self, grid: Grid, seen: dict[str, list[Seen]], rate: float
    ) -> tuple[Built, bytes]:
        """`_build` beside the event loop; one that is cancelled lets it end, for its memory."""
        building = asyncio.create_task(asyncio.to_thread(self._build, grid, seen, rate))
        try:
            return await asyncio.shield(building)
        except asyncio.CancelledError:
            await asyncio.wait([building])
            raise

    def _build(self, grid: Grid, seen: dict[str, list[Seen]], rate: float) -> tuple[Built, bytes]:
        """The reference and the file that it is kept in."""
        images = seen["images"]
        built = build(
            [one.looked for one in images],
            rate=rate,
            calibration=[one.looked for one in seen.get("calibration_images", ())],
            defects=[one.looked for one in seen.get("defect_images", ())],
            copies=[one.copies for one in images] if images[0].copies else (),
            grid=grid,
            patches=self._settings.reference_patches,
            prior=self._prior,
        )
        thumbnails = {
            f"thumbnail.{i}": torch.frombuffer(bytearray(one.thumbnail), dtype=torch.uint8)
            for i, one in enumerate(images)
        }
        return built, built.reference.encode({"expert": self._expert}, **thumbnails)


def thumbnail(crops: Crops) -> bytes:
    """A small JPEG of a picture, from its base view in its own aspect."""
    base = (crops.pixels[0].float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
    width, height = crops.size
    scale = THUMBNAIL / max(crops.size)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    buffer = BytesIO()
    Image.fromarray(base.permute(1, 2, 0).numpy()).resize(size).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def in_base64(pictures: Sequence[bytes]) -> list[str]:
    """Thumbnails as the wire carries them."""
    return [base64.b64encode(picture).decode() for picture in pictures]


def _tensor(shape: list[int], data: bytes, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype).view(shape)
