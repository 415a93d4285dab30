"""The reference store: whatever happens to a process or the disk, what is read is whole."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from looktwice_adapters.few_shot import Reference
from looktwice_adapters.memory_bank import MemoryBank
from looktwice_adapters.threshold import NORMAL, Threshold
from looktwice_server import reference_store
from looktwice_server.errors import (
    ReferenceOutdated,
    ReferenceUnavailable,
    RequestError,
    StoreFull,
    UnknownReference,
)
from looktwice_server.reference_store import (
    FORMAT,
    GRACE_SECONDS,
    LoadedReferences,
    ReferenceStore,
)
from tests.server.cards import card

WRITER = """
import itertools, os, sys, time
from pathlib import Path
from looktwice_server.reference_store import ReferenceStore
from tests.server.cards import card
store = ReferenceStore(Path(sys.argv[1]), 9)
writes = itertools.count(1)
def written_but_not_renamed(descriptor):
    if next(writes) == int(sys.argv[2]):
        print("written", flush=True)
        time.sleep(60)
os.fsync = written_but_not_renamed
for number in range(2):
    version = store.keep(bytes([number]) * 400_000)
    store.name(card("part", version, created=number))
"""


@pytest.fixture
def store(tmp_path: Path) -> ReferenceStore:
    return ReferenceStore(tmp_path, max_names=3)


def made(seed: int) -> bytes:
    """A small reference's file."""
    tokens = torch.randn(1, 16, 8, generator=torch.Generator().manual_seed(seed))
    threshold = Threshold.fit([0.0, float(seed)], prior=NORMAL)
    return Reference(MemoryBank.of([[tokens]]), threshold).encode({})


def add(store: ReferenceStore, name: str, data: bytes) -> str:
    version = store.keep(data)
    store.name(card(name, version))
    return version


def test_a_version_is_the_hash_of_its_content(store):
    assert add(store, "one", made(1)) == add(store, "two", made(1)) != add(store, "one", made(2))
    assert [kept.name for kept in store.cards()] == ["one", "two"]


@pytest.mark.parametrize("write", [3, 4])  # of the second version, of the card that names it
def test_kill_9_between_write_and_rename_leaves_the_old_reference_whole(tmp_path, write):
    store = ReferenceStore(tmp_path, 9)
    command = [sys.executable, "-c", WRITER, str(tmp_path), str(write)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
        assert writer.stdout.readline() == b"written\n"
        writer.send_signal(signal.SIGKILL)
    kept = store.card("part")
    assert (kept.created, kept.problem) == (0, None)
    assert store.path(kept.version).read_bytes() == bytes(400_000)
    [part] = tmp_path.rglob("*.part")
    os.utime(part, (0, 0))
    store.clean()
    assert not part.exists()


def _write_many(folder: str, name: str, number: int) -> None:
    store = ReferenceStore(Path(folder), 9)
    for _ in range(10):
        add(store, name, made(number))


def test_of_two_writers_of_one_name_one_stands_whole(tmp_path):
    context = get_context("spawn")
    writers = [
        context.Process(target=_write_many, args=(str(tmp_path), "part", number))
        for number in (1, 2)
    ]
    for writer in writers:
        writer.start()
    store, seen = ReferenceStore(tmp_path, 9), set()
    while any(writer.is_alive() for writer in writers):
        for kept in store.cards():
            seen.add(store.path(kept.version).read_bytes())
    assert seen <= {made(1), made(2)}
    assert store.path(store.card("part").version).read_bytes() in (made(1), made(2))


@pytest.mark.parametrize("written", [0, 1])  # nothing, or the version and then not its name
def test_a_full_disk_is_said_and_changes_nothing(store, monkeypatch, written):
    before = add(store, "part", made(1))
    room = iter(range(written))

    def full(_descriptor: int) -> None:
        if next(room, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(reference_store.os, "fsync", full)
    with pytest.raises(StoreFull, match="the disk is full; nothing was changed") as caught:
        add(store, "part", made(2))
    assert caught.value.status == 507
    assert store.card("part").version == before
    assert [card.version for card in store.cards()] == [before]
    assert not list(store.path("x").parent.parent.rglob("*.part"))


def test_a_folder_that_is_a_file_is_said(tmp_path):
    folder = tmp_path / "references"
    folder.write_text("a file")
    store = ReferenceStore(folder, 9)
    assert store.cards() == []
    with pytest.raises(StoreFull, match=r"could not be written: .*; nothing was changed"):
        store.keep(b"bank")


def test_a_corrupt_file_is_refused_by_its_hash(store):
    version = add(store, "part", made(1))
    loaded = LoadedReferences(store, torch.device("cpu"), 2**20)
    data = bytearray(store.path(version).read_bytes())
    data[-5] ^= 1
    store.path(version).write_bytes(data)
    with pytest.raises(ValueError, match="is not what was written"):
        loaded.get(version)
    store.path(version).unlink()
    assert "corrupt on the server; add it again" in store.card("part").problem
    with pytest.raises(ReferenceOutdated, match="corrupt on the server; add it again"):
        store.thumbnails("part", version)


@pytest.mark.parametrize(
    "broken",
    [
        *(b"", b"{", b"[]", b'{"name": "other"}'),
        json.dumps({"name": "part", "format": FORMAT, "version": "0"}).encode(),
    ],
)
def test_a_broken_card_is_one_reference_lost_and_no_other(store, broken):
    add(store, "good", made(1))
    version = add(store, "part", made(2))
    (store._names / "part.json").write_bytes(broken)
    assert [(one.name, one.problem) for one in store.cards()] == [
        ("good", None),
        ("part", "the reference 'part' is corrupt on the server; add it again"),
    ]
    store.name(card("part", version))  # adding it again helps
    assert (store.card("part").version, store.card("part").problem) == (version, None)


def test_a_reference_of_an_older_version_is_to_be_added_again(store):
    version = add(store, "part", made(1))
    path = store._names / "part.json"
    older = json.loads(path.read_bytes())
    del older["format"]
    path.write_text(json.dumps(older))
    [listed] = store.cards()
    assert "made by another version of LookTwice; add it again" in listed.problem
    assert listed.images == 4
    path.write_text('{"name": "part", "format": 1}')
    [listed] = store.cards()
    assert "made by another version of LookTwice; add it again" in listed.problem
    assert listed.version == ""
    store.name(card("part", version))
    assert (store.card("part").version, store.card("part").problem) == (version, None)
    store.remove("part")


def test_what_counts_towards_the_limit_is_listed_and_can_be_removed(store):
    for name in ("a", "b", "c"):
        add(store, name, made(1))
    (store._names / "a.json").write_bytes(b"{")
    (store._names / "no name.json").write_bytes(b"{}")  # somebody else's
    with pytest.raises(StoreFull):
        add(store, "d", made(1))
    assert [one.name for one in store.cards()] == ["a", "b", "c"]
    store.remove("a")
    add(store, "d", made(1))
    assert [one.name for one in store.cards()] == ["b", "c", "d"]


@pytest.mark.parametrize("change", ["name", "remove"])
def test_another_process_that_cleans_during_a_change_leaves_the_requests_their_version(
    store, tmp_path, monkeypatch, change
):
    version = add(store, "part", made(1))
    os.utime(store.path(version), (0, 0))
    step = {"name": "replace", "remove": "unlink"}[change]
    real = getattr(Path, step)

    def and_another_cleans(path, *args):
        real(path, *args)
        monkeypatch.undo()
        ReferenceStore(tmp_path, 3).clean()

    monkeypatch.setattr(Path, step, and_another_cleans)
    store.remove("part") if change == "remove" else store.name(card("part", "another"))
    assert store.path(version).exists()


def test_versions_without_a_name_have_a_limit_and_the_oldest_go(tmp_path):
    store = ReferenceStore(tmp_path, 3, nameless_bytes=25)
    named = store.keep(b"named" * 9)
    store.name(card("part", named))
    versions = [store.keep(bytes([number]) * 10) for number in range(5)]
    ages = (9999, 500, 400, 300, 100, 0)  # seconds
    for version, age in zip((named, *versions), ages, strict=True):
        os.utime(store.path(version), (0, time.time() - age))
    store.clean()
    assert [store.path(version).exists() for version in versions] == [
        False,
        False,
        False,
        True,
        True,
    ]
    assert store.path(named).exists()
    for version in (store.keep(b"x" * 10), store.keep(b"y" * 10)):  # too many, and all young
        assert store.path(version).exists()
    store.clean()
    assert len(list(store.path("x").parent.iterdir())) == 5


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../up", "a/b", "/etc", "a b", "-x", "x" * 65, "ü"]
)
def test_what_is_no_name_reaches_no_file(store, name):
    for call in (store.card, store.remove, lambda name: store.name(card(name, "0"))):
        with pytest.raises(RequestError, match="a reference's name has 1 to 64"):
            call(name)


def test_a_removed_version_stays_for_the_requests_under_way(store):
    version = add(store, "part", made(1))
    os.utime(store.path(version), (0, 0))
    store.remove("part")
    store.clean()
    assert store.path(version).exists()
    os.utime(store.path(version), (0, time.time() - GRACE_SECONDS - 1))
    store.clean()
    assert not store.path(version).exists()
    with pytest.raises(UnknownReference):
        store.remove("part")


def test_nothing_is_cleaned_away_while_a_card_cannot_be_read(store, monkeypatch):
    version = add(store, "one", made(1))
    os.utime(store.path(version), (0, 0))
    read = Path.read_bytes

    def no_files_left(path):
        if path.suffix == ".json":
            raise OSError(errno.EMFILE, "Too many open files")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", no_files_left)
    store.clean()
    assert store.path(version).exists()
    with pytest.raises(ReferenceUnavailable, match="cannot be read now; try again later"):
        store.card("one")
    assert [card.problem for card in store.cards()] == [
        "the reference 'one' cannot be read now; try again later"
    ]


@pytest.mark.parametrize("away", ["missing", "closed"])
def test_nothing_is_cleaned_away_while_the_names_are(tmp_path, monkeypatch, away):
    store = ReferenceStore(tmp_path, max_names=3, nameless_bytes=1)  # nor where room is short
    version = add(store, "one", made(1))
    os.utime(store.path(version), (0, 0))
    if away == "missing":  # a restored folder, whose versions came first
        store._names.rename(store._names.with_name("later"))
    else:
        scan = os.scandir

        def closed(folder):  # this one alone: the versions can be listed
            if Path(folder) == store._names:
                raise PermissionError(errno.EACCES, "Permission denied")
            return scan(folder)

        monkeypatch.setattr(os, "scandir", closed)
    store.clean()
    assert store.path(version).exists()


def test_what_others_keep_in_the_folder_is_left_alone_and_stops_nothing(store, monkeypatch):
    version = store.keep(b"one")
    folder = store.path(version).parent
    others = [folder / "0001_migration.py", folder / "@eaDir" / f"{version}.safetensors"]
    for path in others:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    for path in (*others, others[1].parent, store.path(version)):
        os.utime(path, (0, 0))
    unlink = Path.unlink

    def busy(path, *, missing_ok=False):
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(Path, "unlink", busy)
    store.clean()
    monkeypatch.setattr(Path, "unlink", unlink)
    store.clean()
    assert not store.path(version).exists()
    assert all(path.exists() for path in others)


def test_a_version_with_a_name_is_never_cleaned_away(store):
    version = add(store, "part", made(1))
    os.utime(store.path(version), (0, 0))
    store.clean()
    assert store.path(version).exists()


def test_the_list_has_an_end(store):
    for name in ("a", "b", "c", "a"):
        add(store, name, made(1))
    with pytest.raises(StoreFull, match="keeps 3 references"):
        add(store, "d", made(1))


def test_a_worker_keeps_the_latest_banks_within_its_memory(store):
    versions = [add(store, "part", made(seed)) for seed in range(3)]
    size = LoadedReferences(store, torch.device("cpu"), 2**20).get(versions[0]).bank.nbytes
    loaded = LoadedReferences(store, torch.device("cpu"), 2 * size)
    first = loaded.get(versions[0])
    assert loaded.get(versions[0]) is first
    for version in versions[1:]:
        loaded.get(version)
    assert len(loaded._kept) == 2
    assert loaded.get(versions[0]) is not first
    assert json.dumps(first.threshold.scores) == "[0.0, 0.0]"
