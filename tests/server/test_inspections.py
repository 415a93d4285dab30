"""Inspections on the API side: who asks the worker, how often, and what becomes of failures."""

import asyncio
import base64
import time
from io import BytesIO
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from looktwice_adapters.expert import Calibration
from looktwice_server.errors import ExpertUnavailable
from looktwice_server.inspections import FINDERS, Crops, Inspections, together
from looktwice_server.model import EmbeddingCache
from looktwice_server.settings import Settings

SIDE = 8
CONFIG = SimpleNamespace(
    image_grid_pinpoints=[[SIDE, SIDE], [SIDE, 2 * SIDE], [2 * SIDE, 2 * SIDE]],
    vision_config=SimpleNamespace(image_size=SIDE),
)
CALIBRATION = Calibration(map_scale=1.5, map_bias=-0.25)


def numbered(number: int, size: tuple[int, int] = (SIDE, SIDE), crops: int = 2) -> Crops:
    """A picture whose crops all hold its number."""
    return Crops(f"{number:032x}" * 2, torch.full((crops, 3, SIDE, SIDE), float(number)), size)


def number_in(image: dict) -> int:
    return int(np.frombuffer(image["pixels"], np.float32)[0])


class ScriptedWorker:
    """Answers as the worker does: the score is a hundredth of the number in the crops."""

    def __init__(self) -> None:
        self.calls: list[list[dict]] = []
        self.failures: list[Exception | str] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self, method, args):
        assert method == "looktwice_inspect"
        [images] = args
        self.calls.append(images)
        await self.gate.wait()
        if self.failures:
            failure = self.failures.pop(0)
            if isinstance(failure, Exception):
                raise failure
            return [failure]
        return [[self.record(image) for image in images]]

    def record(self, image: dict) -> dict:
        value = number_in(image) / 100
        significance = np.full((image["shape"][0], 2, 2), value, np.float32)
        return {
            "score": float(value),
            "shape": list(significance.shape),
            "significance": significance.tobytes(),
            "p_value": None,
            "verdict": None,
        }

    @property
    def asked(self) -> list[list[int]]:
        """The picture numbers of each call."""
        return [[number_in(image) for image in call] for call in self.calls]


@pytest.fixture
def worker() -> ScriptedWorker:
    return ScriptedWorker()


def inspections(worker: ScriptedWorker, **settings: int) -> Inspections:
    return Inspections(worker, CONFIG, CALIBRATION, Settings(**settings))


async def settled(*coroutines):
    """Start all, and let each get as far as it can."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    for _ in range(5):
        await asyncio.sleep(0)
    return tasks


def test_findings_are_made_by_one_thread_of_torch_whatever_the_process_has():
    before = torch.get_num_threads()
    try:
        FINDERS.submit(int).result()
        torch.set_num_threads(2)  # as vLLM's renderer puts back what it found
        assert FINDERS.submit(torch.get_num_threads).result() == 1
    finally:
        torch.set_num_threads(before)


def test_a_picture_asked_for_by_two_at_once_is_inspected_once(worker):
    async def run():
        asker = inspections(worker)
        first, second = await asyncio.gather(asker.inspect(numbered(7)), asker.inspect(numbered(7)))
        assert first is second
        assert await asker.inspect(numbered(7)) is first

    asyncio.run(run())
    assert worker.asked == [[7]]


def test_pictures_that_wait_share_a_call_up_to_the_limit_of_crops(worker):
    async def run():
        asker = inspections(worker, crops_per_call=4)
        worker.gate.clear()
        tasks = await settled(*(asker.inspect(numbered(i)) for i in range(1, 7)))
        worker.gate.set()
        findings = await asyncio.gather(*tasks)
        assert [finding.score for finding in findings] == [i / 100 for i in range(1, 7)]

    asyncio.run(run())
    assert worker.asked == [[1, 2], [3, 4], [5, 6]]


@pytest.mark.parametrize("failure", [TimeoutError("no answer"), "out of memory now"])
def test_a_failing_worker_is_a_503_and_the_next_request_works(worker, failure):
    async def run():
        asker = inspections(worker)
        worker.failures = [failure]
        results = await asyncio.gather(
            asker.inspect(numbered(1)), asker.inspect(numbered(1)), return_exceptions=True
        )
        assert [type(result) for result in results] == [ExpertUnavailable] * 2
        assert results[0] is not results[1]
        assert all(result.status == 503 and str(failure) in str(result) for result in results)
        assert (await asker.inspect(numbered(1))).score > 0

    asyncio.run(run())
    assert worker.asked == [[1], [1]]


def test_a_failed_call_leaves_those_who_wait_for_the_next_one_alone(worker):
    async def run():
        asker = inspections(worker, crops_per_call=2)
        worker.failures = [RuntimeError("broken")]
        failed, served = await asyncio.gather(
            asker.inspect(numbered(1)), asker.inspect(numbered(2)), return_exceptions=True
        )
        assert isinstance(failed, ExpertUnavailable)
        assert served.severity == "slightly"

    asyncio.run(run())


def test_a_request_that_goes_away_takes_nobody_with_it(worker):
    async def run():
        asker = inspections(worker)
        worker.gate.clear()
        gone, stays, other = await settled(
            asker.inspect(numbered(1)), asker.inspect(numbered(1)), asker.inspect(numbered(2))
        )
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        worker.gate.set()
        assert (await stays).score < (await other).score
        return await asker.inspect(numbered(3))

    assert asyncio.run(run()).verdict == "normal"
    assert worker.asked == [[1, 2], [3]]


def test_what_nobody_waits_for_any_more_is_not_inspected(worker):
    async def run():
        asker = inspections(worker)
        worker.gate.clear()
        [first] = await settled(asker.inspect(numbered(1)))  # the worker has it
        gone, twice, again = await settled(
            *(asker.inspect(numbered(number)) for number in (2, 3, 3))
        )
        gone.cancel()
        twice.cancel()
        await asyncio.sleep(0)
        worker.gate.set()
        await asyncio.gather(first, again)

    asyncio.run(run())
    assert worker.asked == [[1], [3]]


def test_the_first_error_ends_what_was_asked_together():
    ended = []

    async def endless():
        try:
            await asyncio.sleep(3600)
        finally:
            ended.append(True)

    async def broken():
        await asyncio.sleep(0.01)
        raise ValueError("broken")

    async def run():
        with pytest.raises(ValueError, match="broken"):
            await together([endless(), broken()])
        await asyncio.sleep(0)

    asyncio.run(run())
    assert ended == [True]


def test_a_picture_whose_only_asker_went_away_during_a_failure_can_be_asked_again(worker):
    async def run():
        asker = inspections(worker)
        worker.failures = [RuntimeError("broken")]
        worker.gate.clear()
        [gone] = await settled(asker.inspect(numbered(1)))
        gone.cancel()
        worker.gate.set()
        await asyncio.sleep(0.01)
        assert (await asker.inspect(numbered(1))).score > 0

    asyncio.run(run())
    assert worker.asked == [[1], [1]]


def test_the_oldest_findings_are_forgotten_and_inspected_again(worker):
    async def run():
        asker = inspections(worker, findings_cached_mb=1)
        for number in (1, 2, 1, 3, 1, 2):  # a map has 0.4 MB
            await asker.inspect(numbered(number, size=(800, 500), crops=5))

    asyncio.run(run())
    assert worker.asked == [[1], [2], [3], [2]]


def test_crops_that_only_pad_a_batch_are_not_sent(worker):
    async def run():
        padded = numbered(9, size=(SIDE, SIDE), crops=5)
        wide = numbered(8, size=(2 * SIDE, 2 * SIDE), crops=5)
        await asyncio.gather(*map(inspections(worker).inspect, (padded, wide)))

    asyncio.run(run())
    [[padded, wide]] = worker.calls
    assert padded["shape"] == [2, 3, SIDE, SIDE]
    assert wide["shape"] == [5, 3, SIDE, SIDE]
    assert len(padded["pixels"]) == 2 * 3 * SIDE * SIDE * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_crops_reach_the_worker_bit_for_bit(worker, dtype):
    from looktwice_server.worker import _tensor

    crops = numbered(3)
    pixels = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)).to(dtype)

    async def run():
        worker.record = lambda image: ScriptedWorker.record(worker, {**image, "pixels": bytes(4)})
        await inspections(worker).inspect(Crops(crops.mm_hash, pixels, crops.size))

    asyncio.run(run())
    received = _tensor(worker.calls[0][0])
    assert received.dtype == dtype
    assert torch.equal(received, pixels)


def test_map_of_an_inspection_is_the_calibrated_significance_to_half_a_grey_level(worker):
    async def run():
        return await inspections(worker).inspect(numbered(90))

    finding = asyncio.run(run())
    inspection = finding.inspection(image=4, model="m", expert="e", reference=None, with_map=True)
    grey = np.asarray(Image.open(BytesIO(base64.b64decode(inspection.map.png))))
    expected = float(CALIBRATION.map(torch.tensor(0.9)))
    assert np.abs(grey / 255 - expected).max() <= 0.5 / 255 + 1e-6
    assert inspection.image == 4
    assert inspection.severity == "highly"
    assert inspection.verdict == "anomalous"
    assert [region.box for region in inspection.regions] == [(0, 0, SIDE, SIDE)]
    assert inspection.regions[0].score == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("number", "regions"), [(40, 0), (80, 1)])
def test_an_undecided_picture_has_the_regions_that_its_map_shows(worker, number, regions):
    record = worker.record
    worker.record = lambda image: record(image) | {"verdict": "undecided", "p_value": 0.25}
    found = asyncio.run(inspections(worker).inspect(numbered(number)))
    assert (found.verdict, len(found.regions)) == ("undecided", regions)


def test_a_normal_picture_has_no_regions_and_an_anomalous_one_at_least_its_peak(worker):
    # The map stays below 0.5 while the score does not, and the other way round.
    async def run(number, map_bias):
        asker = Inspections(worker, CONFIG, Calibration(map_bias=map_bias), Settings())
        return await asker.inspect(numbered(number))

    anomalous, normal = asyncio.run(run(60, -5.0)), asyncio.run(run(40, 5.0))
    assert (anomalous.verdict, len(anomalous.regions)) == ("anomalous", 1)
    assert (normal.verdict, len(normal.regions)) == ("normal", 0)


def test_embedding_cache_keeps_the_latest_used_within_its_bytes():
    cache, one = EmbeddingCache(capacity=3 * 40), torch.zeros(10)
    for key in (b"a", b"b", b"c"):
        cache.put(key, one)
    cache.put(b"a", one)  # again: neither counted twice nor the oldest any more
    cache.get(b"b")
    cache.put(b"d", one)
    assert [key for key in (b"a", b"b", b"c", b"d") if cache.get(key) is not None] == [
        b"a",
        b"b",
        b"d",
    ]


def test_embedding_cache_passes_over_what_is_larger_than_itself():
    cache = EmbeddingCache(capacity=40)
    cache.put(b"large", torch.zeros(100))
    assert cache.get(b"large") is None
    cache.put(b"small", torch.zeros(10))
    assert cache.get(b"small") is not None


def test_a_reference_that_cannot_be_read_now_fails_its_own_picture_alone(worker):
    record = worker.record

    def unread(image):
        return {"failed": "try again later"} if number_in(image) == 1 else record(image)

    worker.record = unread

    async def run():
        asker = inspections(worker)
        return await asyncio.gather(
            *(asker.inspect(numbered(i)) for i in (1, 2)), return_exceptions=True
        )

    failed, found = asyncio.run(run())
    assert isinstance(failed, ExpertUnavailable)
    assert str(failed) == "try again later"
    assert found.score == 0.02


def test_a_picture_whose_finding_fails_takes_no_other_with_it(worker, monkeypatch):
    """Nor one that was asked for again while the others of its batch were still being found."""
    record, find, again = worker.record, Inspections._find, []

    def unread(image):
        return {"failed": "try again later"} if number_in(image) == 1 else record(image)

    def broken(self, crops, record):
        if record["score"] == 0.02:
            worker.record = ScriptedWorker().record
            asking = asker.inspect(numbered(1))
            again.append(asyncio.run_coroutine_threadsafe(asking, loop))
            time.sleep(0.1)  # while the first picture waits for the next call
            raise RuntimeError("broken")
        return find(self, crops, record)

    worker.record = unread
    monkeypatch.setattr(Inspections, "_find", broken)

    async def run():
        nonlocal asker, loop
        asker, loop = inspections(worker), asyncio.get_running_loop()
        results = await asyncio.gather(
            *(asker.inspect(numbered(i)) for i in (1, 2, 3)), return_exceptions=True
        )
        return results, await asyncio.wait_for(asyncio.wrap_future(again[0]), 10)

    asker = loop = None
    (first, second, third), found = asyncio.run(run())
    assert isinstance(first, ExpertUnavailable)
    assert str(second) == "broken"
    assert (third.score, found.score) == (0.03, 0.01)
