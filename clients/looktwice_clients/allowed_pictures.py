"""What an agent may look at: a name that a language model gave -> a picture, or a refusal.

A language model repeats what it has read, also from a picture or a file name that somebody made for
it. So the operator says which folders and hosts are open; nothing is open by default but data URIs
and the pictures that the program itself handed over.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from looktwice_clients.errors import ImageError
from looktwice_clients.images import ImageSource, is_web_address, name_of, to_wire

ANY_HOST = "*"


@dataclass(frozen=True)
class AllowedPictures:
    """The folders, hosts and media ids that are open."""

    roots: Sequence[Path] = ()
    """Folders whose pictures, and those below them, may be named."""
    hosts: Collection[str] = ()
    """Hosts from which the server may be asked to fetch, such as a camera's; "*" opens all."""
    media: Mapping[str, ImageSource] = field(default_factory=dict)
    """Pictures that the program holds, by the id under which it told the model of them."""

    def find(self, name: str) -> str:
        """What `to_wire` makes of the picture that `name` stands for.

        A name is a media id, a data URI, an address, or a file. A relative path is looked for in
        each of `roots`. Symbolic links and `..` are followed first, and where they end counts. What
        is wrong with a file is told under `name`.

        Raises:
            ImageError: it is not open, or no picture; neither where the folders are nor whether
                such a file exists elsewhere is told.
        """
        if name in self.media:
            return self._read(self.media[name], name)
        if name[:5].lower() == "data:":
            return name
        return self._address(name) if is_web_address(name) else self._file(name)

    def _address(self, name: str) -> str:
        # A reader of addresses may take a backslash or a user's name for something else.
        doubtful = not name.isprintable() or set(name) & {"\\", "@", " "}
        try:
            host = urlsplit(name).hostname or ""
        except ValueError:
            host = ""
        opened = {allowed.lower() for allowed in self.hosts}
        if not doubtful and host and opened & {host, ANY_HOST}:
            return name
        names = ", ".join(sorted(opened)) or "none"
        raise ImageError(f"{name_of(name)}: not at an allowed host (allowed: {names})")

    def _file(self, name: str) -> str:
        return self._read(self._path(name), name)

    @staticmethod
    def _read(source: ImageSource, name: str) -> str:
        try:
            return to_wire(source)
        except ImageError as error:
            told = str(error).replace(name_of(source), name_of(name), 1)  # it stands first
            raise ImageError(told, error.code) from None

    def _path(self, name: str) -> Path:
        for root in self.roots:
            try:
                base = root.resolve()
                path = (base / name).resolve()
                if path.is_relative_to(base) and path.is_file():
                    return path
            except (OSError, RuntimeError, ValueError):  # too long, a loop of links, a NUL
                continue
        raise ImageError(f"{name_of(name)}: no such picture in the allowed folders")
