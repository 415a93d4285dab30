"""Reference store: names and versions of references in a folder that all processes share.

`versions/<version>.safetensors` holds a memory bank, its threshold and thumbnails; the version is
the hash of the file. `names/<name>.json` holds the card that the routes answer with. Files are
written beside their place and renamed into it, so that a killed process leaves nothing half
written, and of two writers the later one's name stands. A version without a name stays for an
hour, less where such versions take too much room: requests that began with it end with it.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import secrets
import time
from collections import OrderedDict
from itertools import chain
from pathlib import Path

import torch

from looktwice_adapters import few_shot
from looktwice_server.errors import (
    ReferenceOutdated,
    ReferenceUnavailable,
    RequestError,
    StoreFull,
    UnknownReference,
)
from looktwice_server.schemas import Reference

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
VERSION_DIGITS = 16
VERSION = re.compile(rf"[0-9a-f]{{{VERSION_DIGITS}}}\.safetensors")
GRACE_SECONDS = 3600  # that a version outlives its name
YOUNG_SECONDS = 120  # that it does even where there is no room for it
TEMPORARY = ".part"
FORMAT = 4  # of cards and files: what thresholds are of, and what a card tells of its making


def checked_name(name: str) -> str:
    """The name.

    Raises:
        RequestError: it is none.
    """
    if not NAME.fullmatch(name):
        raise RequestError(
            "a reference's name has 1 to 64 letters, digits, dots, dashes and underscores and "
            f"begins with a letter or digit, not {name[:70]!r}",
            param="name",
        )
    return name


class ReferenceStore:
    """The folder."""

    def __init__(self, folder: Path, max_names: int, nameless_bytes: int = 2**30) -> None:
        """Take the folder; it is made when the first reference is added.

        Args:
            folder: for names and versions.
            max_names: most names.
            nameless_bytes: what versions without a name may take before the oldest go.
        """
        self._names = folder / "names"
        self._versions = folder / "versions"
        self._max_names = max_names
        self._nameless_bytes = nameless_bytes

    def card(self, name: str) -> Reference:
        """What is known of a reference; its `problem` says why it cannot be used, if it cannot.

        Raises:
            RequestError: this is no name.
            UnknownReference: there is none of that name.
            ReferenceUnavailable: the disk does not answer now.
        """
        path = self._names / f"{checked_name(name)}.json"
        try:
            data = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise UnknownReference(
                f"no reference named {name!r} on this server; GET /v1/references lists them",
                param="reference",
            ) from error
        except OSError as error:
            raise _unread(name) from error
        try:
            kept = json.loads(data)
        except ValueError:
            return _lost(name, _broken(name))
        if not isinstance(kept, dict) or kept.get("name") != name:
            return _lost(name, _broken(name))
        problem = None
        if kept.pop("format", 1) != FORMAT:
            problem = (
                f"the reference {name!r} was made by another version of LookTwice; add it again"
            )
        try:
            card = Reference.model_validate(kept)
        except ValueError:
            return _lost(name, problem or _broken(name))
        try:
            self.path(card.version).stat()
        except FileNotFoundError:
            problem = problem or _broken(name)
        except OSError as error:
            raise _unread(name) from error
        return card.model_copy(update={"problem": problem})

    def cards(self) -> list[Reference]:
        """All references, by name, with those that must be added again."""
        found = []
        for name in self._known_names():
            try:
                found.append(self.card(name))
            except UnknownReference:  # removed meanwhile
                continue
            except ReferenceUnavailable as error:
                found.append(_lost(name, str(error)))
        return found

    def path(self, version: str) -> Path:
        """The file of a version."""
        return self._versions / f"{version}.safetensors"

    def thumbnails(self, name: str, version: str) -> list[bytes]:
        """The JPEGs of a version.

        Raises:
            ReferenceOutdated: its file is broken or gone.
            ReferenceUnavailable: the disk does not answer now.
        """
        from safetensors import safe_open

        try:
            with safe_open(self.path(version), "pt") as file:
                count = sum(key.startswith("thumbnail.") for key in file.keys())
                return [file.get_tensor(f"thumbnail.{i}").numpy().tobytes() for i in range(count)]
        except Exception as error:  # a broken file is reported by whatever the reader meets
            if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
                raise _unread(name) from error
            raise ReferenceOutdated(_broken(name), param="reference") from error

    def keep(self, data: bytes) -> str:
        """Write a version; its name in the store.

        Raises:
            StoreFull: the disk is full.
        """
        version = hashlib.sha256(data).hexdigest()[:VERSION_DIGITS]
        if not self._versions.exists():  # both at once: `clean` takes one alone for a part
            with contextlib.suppress(OSError):  # what is wrong, writing says
                self._names.mkdir(parents=True, exist_ok=True)
        self._write(self.path(version), data)
        return version

    def name(self, card: Reference) -> None:
        """Give a version its name, in one step, whatever had it before.

        Raises:
            StoreFull: the disk or the list is full.
        """
        path = self._names / f"{checked_name(card.name)}.json"
        if not path.exists() and len(self._known_names()) >= self._max_names:
            raise StoreFull(
                f"this server keeps {self._max_names} references; remove one first", param="name"
            )
        self._retire(path)
        kept = {"format": FORMAT} | card.model_dump(exclude={"problem"})
        self._write(path, json.dumps(kept).encode())

    def remove(self, name: str) -> None:
        """Delete a name.

        Raises:
            UnknownReference: there is none.
            ReferenceUnavailable: the disk does not answer now.
        """
        path = self._names / f"{checked_name(name)}.json"
        self._retire(path)
        try:
            path.unlink()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise UnknownReference(f"no reference named {name!r} on this server") from error
        except OSError as error:
            raise _unread(name) from error

    def clean(self) -> None:
        """Delete what a killed process left, and versions that have had no name for an hour.

        Of those without a name the oldest go sooner where all take more bytes than they may; none
        within two minutes, so that a request that was just given one ends with it. Other files in
        the folder stay, and what cannot be deleted now waits for the next time.
        """
        named, grace, young = set(), float(GRACE_SECONDS), float(YOUNG_SECONDS)
        try:
            cards = [Path(entry) for entry in os.scandir(self._names)]
        except FileNotFoundError:  # a store that is being restored: its versions came first
            cards, grace, young = [], math.inf, math.inf
        except OSError:
            return
        for path in cards:
            if path.suffix != ".json":
                continue
            try:
                named.add(_version_in(path.read_bytes()))
            except FileNotFoundError:
                continue
            except OSError:
                return  # a card that cannot be read now may name any of them
        now, room = time.time(), self._nameless_bytes
        for written, size, path in self._files_by_age():
            unfinished = path.suffix == TEMPORARY
            if unfinished or path.stem not in named:
                room -= size
                keep = GRACE_SECONDS if unfinished else grace
                if room < 0:
                    keep = min(keep, young)
                if written < now - keep:
                    with contextlib.suppress(OSError):
                        path.unlink()

    def renew(self, version: str) -> bool:
        """Restart the hour that a version is kept without a name; False: it is gone."""
        try:
            os.utime(self.path(version))
        except OSError:  # gone, or as good as gone
            return False
        return True

    def _known_names(self) -> list[str]:
        names = (path.stem for path in self._names.glob("*.json"))
        return sorted(name for name in names if NAME.fullmatch(name))

    def _files_by_age(self) -> list[tuple[float, int, Path]]:
        """Versions and unfinished files: when written, how large, where; the latest first."""
        found = []
        unfinished = (folder.glob(f".*{TEMPORARY}") for folder in (self._versions, self._names))
        versions = (one for one in self._versions.glob("*") if VERSION.fullmatch(one.name))
        for path in chain(versions, *unfinished):
            with contextlib.suppress(OSError):
                about = path.stat()
                found.append((about.st_mtime, about.st_size, path))
        return sorted(found, reverse=True)

    def _retire(self, card: Path) -> None:
        """Let the hour begin that a version outlives its name.

        Before the name goes: another process that cleans up in between would take the version from
        requests under way.
        """
        with contextlib.suppress(OSError):
            version = _version_in(card.read_bytes())
            if version is not None:
                self.renew(version)

    def _write(self, path: Path, data: bytes) -> None:
        """Replace a file in one step."""
        part = path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):  # its folder may be the reason
                part.unlink()
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            reason = "the disk is full" if full else error.strerror
            raise StoreFull(
                f"the reference could not be written: {reason}; nothing was changed"
            ) from error


def _version_in(card: bytes) -> str | None:
    """The version that a card's file names; None: it is broken."""
    try:
        return str(json.loads(card)["version"])
    except (ValueError, KeyError, TypeError):
        return None


def _unread(name: str) -> ReferenceUnavailable:
    message = f"the reference {name!r} cannot be read now; try again later"
    return ReferenceUnavailable(message, param="reference")


def _broken(name: str) -> str:
    return f"the reference {name!r} is corrupt on the server; add it again"


def _lost(name: str, problem: str) -> Reference:
    """The card of a reference of which no more is known than its name."""
    return Reference(
        name=name,
        version="",
        images=0,
        patches=0,
        false_alarm_rate=0.0,
        promised_rate=1.0,
        guaranteed_rate=1.0,
        threshold=0.0,
        created=0,
        expert="",
        calibration="",
        warnings=[],
        problem=problem,
    )


class LoadedReferences:
    """The references that a worker has read lately, by version, up to a number of bytes."""

    def __init__(self, store: ReferenceStore, device: torch.device, capacity: int) -> None:
        """Keep at most `capacity` bytes of memory banks beside the latest."""
        self._store = store
        self._device = device
        self._capacity = capacity
        self._kept: OrderedDict[str, few_shot.Reference] = OrderedDict()

    def get(self, version: str) -> few_shot.Reference:
        """The reference of a version, read and checked once.

        Raises:
            Exception: the file is missing or broken, in the words of whoever stumbled over it.
        """
        if version not in self._kept:
            path = self._store.path(version)
            if hashlib.sha256(path.read_bytes()).hexdigest()[:VERSION_DIGITS] != version:
                raise ValueError(f"{path.name} is not what was written")
            self._kept[version] = few_shot.Reference.read(path).to(self._device)
        self._kept.move_to_end(version)
        while len(self._kept) > 1 and self._size() > self._capacity:
            self._kept.popitem(last=False)
        return self._kept[version]

    def _size(self) -> int:
        return sum(reference.bank.nbytes for reference in self._kept.values())
