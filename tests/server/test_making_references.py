"""References on the API side: what a worker saw of some pictures -> a file, within its memory."""

import asyncio
import os
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from looktwice_adapters.expert import Calibration
from looktwice_server.errors import ReferenceOutdated, StoreFull, request_error_response
from looktwice_server.inspections import Crops, Inspections
from looktwice_server.processor import crop_grid
from looktwice_server.reference_store import ReferenceStore
from looktwice_server.references import References
from looktwice_server.settings import Settings

SIDE = 8
CONFIG = SimpleNamespace(
    image_grid_pinpoints=[[SIDE, SIDE]], vision_config=SimpleNamespace(image_size=SIDE)
)
HUB = SimpleNamespace(
    image_grid_pinpoints=[
        [384 * row, 384 * column] for row in range(1, 7) for column in range(1, 7)
    ],
    vision_config=SimpleNamespace(image_size=384),
)


def picture(number: int) -> Crops:
    pixels = torch.full((2, 3, SIDE, SIDE), float(number))
    return Crops(f"{number:032x}" * 2, pixels, (SIDE, SIDE))


async def looking(method: str, args: tuple) -> list[dict]:
    """A worker whose pictures take half a megabyte each."""
    assert method == "looktwice_look"
    rng = np.random.default_rng(int(np.frombuffer(args[0]["pixels"], np.float32)[0]))
    tokens = rng.normal(size=(2, 4, 2**15)).astype(np.float16)
    suspicion = np.zeros((2, 2, 2), np.float32)
    return [
        {
            "suspicion": suspicion.tobytes(),
            "grid": [2, 2, 2],
            "tokens": [(list(tokens.shape), tokens.tobytes())],
            "copies": [],
        }
    ]


def references(folder: Path, **limits: int) -> References:
    settings = Settings(references=folder, **limits)
    store = ReferenceStore(folder, settings.max_references)
    inspections = Inspections(looking, CONFIG, Calibration(), settings)
    return References(store, inspections, "e", "c", settings)


def test_a_conversations_pictures_keep_within_the_memory_for_making_a_reference(tmp_path):
    small = references(tmp_path, reference_tokens_mb=1)
    assert asyncio.run(small.of_conversation([picture(1), picture(2)])).name is None
    says = r"^reference_images\[2\] exceeds the 1 MB limit .*LOOKTWICE_REFERENCE_TOKENS_MB"
    with pytest.raises(StoreFull, match=says):
        asyncio.run(small.of_conversation([picture(number) for number in range(4)]))


def test_a_conversations_reference_makes_room_for_itself(tmp_path):
    """Each stays for an hour at most, and for less where they take more than they may."""
    small = references(tmp_path)
    small.store = ReferenceStore(tmp_path, 9, nameless_bytes=3 * 2**19)
    kept = []
    for number in range(3):
        made = asyncio.run(small.of_conversation([picture(number)]))
        kept.append(small.store.path(made.version))
        os.utime(kept[-1], (0, time.time() - 1000 + number))
    asyncio.run(small.of_conversation([picture(9)]))
    assert [path.exists() for path in kept] == [False, False, True]


def test_a_conversations_broken_reference_is_made_again(tmp_path):
    made_by = references(tmp_path)
    version = asyncio.run(made_by.of_conversation([picture(1)]))
    path = made_by.store.path(version.version)
    written = path.read_bytes()
    path.write_bytes(b"broken")
    made_by.forget(version)
    assert asyncio.run(made_by.of_conversation([picture(1)])) == version
    assert path.read_bytes() == written


def test_a_conversations_reference_tells_what_it_promises(tmp_path):
    version = asyncio.run(references(tmp_path).of_conversation([picture(n) for n in range(3)]))
    assert (version.name, version.false_alarm_rate, version.promised_rate) == (None, 0.05, 0.25)
    assert any("3 good pictures promise" in warning for warning in version.warnings)


def test_the_default_memory_holds_what_five_percent_needs_of_large_pictures():
    """19 pictures of 1600 x 1200, cut as the hub's checkpoints do, by so400m's four levels."""
    rows, columns = crop_grid(HUB, width=1600, height=1200)
    assert (rows, columns) == (4, 5)
    tokens = (1 + rows * columns) * 729 * 4 * 1152 * 2  # bytes, in half precision
    assert 19 * tokens <= Settings().reference_tokens_mb * 2**20


@pytest.mark.parametrize(
    ("error", "status"), [(StoreFull("no room"), 507), (ReferenceOutdated("add it again"), 409)]
)
def test_openais_clients_do_not_repeat_what_cannot_help(error, status):
    answer = asyncio.run(request_error_response(None, error))
    assert (answer.status_code, answer.headers["x-should-retry"]) == (status, "false")


def test_a_reference_whose_client_went_away_is_ended_before_the_next_is_built(tmp_path):
    made_by, building, most = references(tmp_path), [], []
    build = made_by._build

    def slow(*arguments):
        building.append(True)
        most.append(len(building))
        time.sleep(0.2)
        building.pop()
        return build(*arguments)

    made_by._build = slow

    async def run():
        for number in range(3):
            making = asyncio.create_task(made_by.of_conversation([picture(number)]))
            await asyncio.sleep(0.1)
            making.cancel()
        await asyncio.wait([making])
        assert (await made_by.of_conversation([picture(3)])).warnings

    asyncio.run(run())
    assert set(most) == {1}


def test_the_store_is_cleaned_every_hour_whatever_befalls_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("looktwice_server.references.GRACE_SECONDS", 0.01)
    made = references(tmp_path)
    calls = iter([None, OSError("the disk does not answer"), None])
    done = asyncio.Event()

    async def run() -> None:
        loop = asyncio.get_running_loop()

        def clean() -> None:
            if isinstance(error := next(calls, done), OSError):
                raise error
            if error is done:
                loop.call_soon_threadsafe(done.set)

        monkeypatch.setattr(made.store, "clean", clean)
        task = asyncio.create_task(made.keep_clean())
        await asyncio.wait_for(done.wait(), 10)
        task.cancel()

    asyncio.run(run())
