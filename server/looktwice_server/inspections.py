"""Inspections on the API side: an image's crops -> worker -> finding -> inspection.

A finding is what was found on a picture, whoever asks; it is remembered under the picture's
content hash. An inspection is a finding as one request gets it.
"""

import asyncio
import base64
import time
import uuid
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from vllm.exceptions import VLLMError

from looktwice_adapters.anomaly_map import Region, find_regions, stitch
from looktwice_adapters.anomaly_prompt import ADVERBS, Adverb, adverb_index
from looktwice_adapters.expert import Calibration
from looktwice_adapters.facts import THRESHOLD, Verdict, verdict_of
from looktwice_server import metrics, schemas
from looktwice_server.errors import ExpertUnavailable, ReferenceOutdated
from looktwice_server.processor import against, crop_grid, image_key
from looktwice_server.settings import Settings


def one_intraop_thread() -> None:
    """Let torch work in this thread alone, for as long as it lives.

    Maps are small: a second thread only waits for the core on which the worker is. The number is
    read when a thread first asks for it, and would be that of the process, which vLLM's renderer
    puts back with every request.
    """
    torch.get_num_threads()
    torch.set_num_threads(1)


FINDERS = ThreadPoolExecutor(1, "find", initializer=one_intraop_thread)

T = TypeVar("T")
Rpc = Callable[[str, tuple[Any, ...]], Awaitable[list[Any]]]


@dataclass(frozen=True)
class Crops:
    """A picture as the processor leaves it."""

    mm_hash: str
    pixels: Tensor  # (B, 3, S, S)
    size: tuple[int, int]  # (width, height) of the upright picture
    version: str | None = None  # of the reference that it is compared with

    def compared(self, version: str) -> "Crops":
        """The same picture, to be compared with a version of a reference."""
        return replace(self, mm_hash=against(self.mm_hash, version), version=version)


@dataclass(frozen=True, eq=False)  # two pictures that look alike are two
class Finding:
    """What was found on a picture."""

    score: float  # calibrated, [0, 1]
    verdict: Verdict
    severity: Adverb
    anomaly_map: NDArray[np.uint8]  # (H, W), 255 * calibrated score
    regions: tuple[Region, ...]
    size: tuple[int, int]
    p_value: float | None = None  # against a reference

    def inspection(
        self,
        *,
        image: int,
        model: str,
        expert: str,
        reference: schemas.ReferenceVersion | None,
        with_map: bool,
    ) -> schemas.Inspection:
        """This finding as the answer to a request, of whose pictures it is the `image`th."""
        return schemas.Inspection(
            id=f"insp_{uuid.uuid4().hex}",
            image=image,
            score=self.score,
            verdict=self.verdict,
            threshold=THRESHOLD,
            severity=self.severity,
            regions=[
                schemas.Region(
                    box=region.box, score=region.score, area=region.area, position=region.position
                )
                for region in self.regions
            ],
            reference=reference,
            p_value=self.p_value,
            width=self.size[0],
            height=self.size[1],
            map=schemas.AnomalyMap(png=_png(self.anomaly_map)) if with_map else None,
            model=model,
            expert=expert,
            created=int(time.time()),
        )


def _png(values: NDArray[np.uint8]) -> str:
    """An 8 bit grey PNG in base64."""
    buffer = BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


async def together(asked: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All results, in order; the first error, or a client that goes away, ends the others."""
    tasks = [asyncio.ensure_future(one) for one in asked]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


@dataclass
class Waiting:
    """A picture that is to be inspected, and for how many who ask."""

    crops: Crops
    future: asyncio.Future[Finding]
    asking: int = 0
    taken: bool = False  # the worker has it


class Inspections:
    """Asks the worker for what is not known yet, a few pictures at a time, one call in flight."""

    def __init__(
        self, rpc: Rpc, hf_config: Any, calibration: Calibration, settings: Settings
    ) -> None:
        """Take the way to the workers and what belongs to the checkpoint."""
        self._rpc = rpc
        self._hf_config = hf_config
        self._calibration = calibration
        self._settings = settings
        self._known: OrderedDict[str, Finding] = OrderedDict()
        self._waiting: dict[str, Waiting] = {}
        self._task: asyncio.Task[None] | None = None

    def known(self, mm_hash: str) -> Finding | None:
        """The finding of a picture inspected lately."""
        if mm_hash in self._known:
            self._known.move_to_end(mm_hash)
        return self._known.get(mm_hash)

    async def inspect(self, crops: Crops) -> Finding:
        """The finding of a picture; the same picture asked for twice is inspected once.

        Raises:
            ExpertUnavailable: the worker could not.
        """
        if (finding := self.known(crops.mm_hash)) is not None:
            return finding
        if crops.mm_hash not in self._waiting:
            future = asyncio.get_running_loop().create_future()
            self._waiting[crops.mm_hash] = Waiting(self.own_crops(crops), future)
            if self._task is None or self._task.done():
                self._task = asyncio.create_task(self._work())
        waiting = self._waiting[crops.mm_hash]
        waiting.asking += 1
        # Shielded: whoever else waits for this picture keeps waiting when one client goes away.
        try:
            return await asyncio.shield(waiting.future)
        except (ExpertUnavailable, ReferenceOutdated) as error:
            # Each caller adds to its own.
            raise type(error)(str(error), param=error.param) from error
        finally:
            waiting.asking -= 1
            if not waiting.asking and not waiting.taken:  # all who asked have gone away
                self._waiting.pop(crops.mm_hash, None)

    def own_crops(self, crops: Crops) -> Crops:
        """The crops without the empty ones that pad a smaller grid to that of its neighbours."""
        rows, columns = self.grid(crops)
        return replace(crops, pixels=crops.pixels[: 1 + rows * columns])

    def grid(self, crops: Crops) -> tuple[int, int]:
        """Rows and columns of a picture's own crops."""
        return crop_grid(self._hf_config, width=crops.size[0], height=crops.size[1])

    async def _work(self) -> None:
        """Serve who waits, until nobody does."""
        while batch := self._next_batch():
            try:
                await self._inspect_batch(batch)
            except Exception as error:
                for one in batch:
                    self._fail(one, error)

    def _fail(self, waiting: Waiting, error: Exception) -> None:
        """Tell who waits for a picture why it could not be inspected."""
        if self._waiting.get(waiting.crops.mm_hash) is waiting:  # not one that asked again since
            del self._waiting[waiting.crops.mm_hash]
        if not waiting.future.done():
            waiting.future.set_exception(error)
            waiting.future.exception()  # seen: the client may have gone away

    def _next_batch(self) -> list[Waiting]:
        """Those who wait longest, up to the number of crops of one call, at least one picture."""
        batch: list[Waiting] = []
        total = 0
        for one in self._waiting.values():
            total += len(one.crops.pixels)
            if batch and total > self._settings.crops_per_call:
                break
            one.taken = True
            batch.append(one)
        return batch

    async def _inspect_batch(self, batch: list[Waiting]) -> None:
        """One call to the worker, then one finding for each picture."""
        start = time.perf_counter()
        answers = await self.ask("looktwice_inspect", [payload(one.crops) for one in batch])
        metrics.EXPERT_SECONDS.observe(time.perf_counter() - start)
        records = answers[0]  # of the first tensor-parallel rank; all ranks say the same
        if isinstance(records, str):
            raise ExpertUnavailable(records)
        for one, record in zip(batch, records, strict=True):
            if "broken_reference" in record:
                self._fail(one, _outdated())
                continue
            if "failed" in record:
                self._fail(one, ExpertUnavailable(record["failed"]))
                continue
            loop = asyncio.get_running_loop()
            try:
                finding = await loop.run_in_executor(FINDERS, self._find, one.crops, record)
            except Exception as error:  # of this picture alone
                self._fail(one, error)
                continue
            self._known[one.crops.mm_hash] = finding
            self._waiting.pop(one.crops.mm_hash)
            if not one.future.done():
                one.future.set_result(finding)
        self._forget()

    def _forget(self) -> None:
        """Forget the oldest findings beyond the memory for their maps."""
        size = sum(finding.anomaly_map.nbytes for finding in self._known.values())
        while len(self._known) > 1 and size > self._settings.findings_cached_mb * 2**20:
            size -= self._known.popitem(last=False)[1].anomaly_map.nbytes

    async def ask(self, method: str, *arguments: Any) -> list[Any]:
        """What the workers answer, each its part.

        Raises:
            ExpertUnavailable: they did not, this time; a dead engine is vLLM's own to report.
        """
        try:
            return await self._rpc(method, arguments)
        except VLLMError:
            raise
        except Exception as error:
            raise ExpertUnavailable(
                f"the picture could not be inspected now ({error}); try again later"
            ) from error

    def _find(self, crops: Crops, record: dict[str, Any]) -> Finding:
        """Calibrate a record, stitch its map and find the regions."""
        significance = torch.frombuffer(
            bytearray(record["significance"]), dtype=torch.float32
        ).view(record["shape"])
        whole = stitch(
            significance,
            self.grid(crops),
            crops.size,
            self._hf_config.vision_config.image_size,
        )
        score: float = record["score"]
        verdict: Verdict | None = record["verdict"]
        if verdict is None:  # against a reference the map is calibrated already
            verdict = verdict_of(score)
            whole = self._calibration.map(whole)
        anomaly_map = whole.numpy()
        regions: list[Region] = []
        if verdict != "normal":
            regions = find_regions(anomaly_map, crops.size, at_least_one=verdict == "anomalous")
        return Finding(
            score,
            verdict,
            ADVERBS[int(adverb_index(torch.tensor(score, dtype=torch.float64)))],
            np.round(anomaly_map * 255).astype(np.uint8),
            tuple(regions),
            crops.size,
            record["p_value"],
        )


def _outdated() -> ReferenceOutdated:
    return ReferenceOutdated(
        "the reference is broken or gone on the server's disk; add it again, or send the pictures "
        "of the conversation once more",
        param="reference",
    )


def payload(crops: Crops) -> dict[str, Any]:
    """A picture's crops in the types that vLLM's calls carry."""
    pixels = crops.pixels.contiguous()
    return {
        "key": image_key(crops.mm_hash),
        "pixels": pixels.view(torch.uint8).numpy().tobytes(),
        "dtype": str(pixels.dtype).removeprefix("torch."),
        "shape": list(pixels.shape),
        "size": [crops.size[1], crops.size[0]],
        "reference": crops.version,
    }
