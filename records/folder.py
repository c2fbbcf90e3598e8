"""Reading a folder that somebody else made: nothing is executed, no link is followed, every read has an end.

A `Folder` lists what is there once. Links, devices and everything else that is no plain file or folder are named in
`faults` and never opened; a file is opened without following a link and without waiting for a writer, and only so
much of it is read as the caller allows. `read_json` also says what ordinary JSON readers pass over: a byte order mark,
a key that stands twice, numbers that are none.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any, NamedTuple

MOST_ENTRIES, MOST_DEPTH = 2000, 6
JSON_LIMIT_BYTES = 1 << 20
TEXT_LIMIT_BYTES = 1 << 20
LOG_LIMIT_BYTES = 8 << 20  # the challenge's logs have 45 KB on average
HASH_LIMIT_BYTES = 64 << 20
MOST_FAULTS = 20


class FolderError(Exception):
    """A file that cannot be read as what it should be; the message is one clear line."""


def shown(text: object, most: int = 80) -> str:
    """A stranger's text for one line of a terminal: control characters and undecodable bytes escaped, cut."""
    plain = "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in str(text)[:most + 1])
    return plain if len(plain) <= most else plain[:most - 3] + "..."


class Json(NamedTuple):
    """A JSON value and what is wrong with the text that it stands in, one line each."""

    value: Any
    faults: list[str]


class Folder:
    """The files under a root by relative name (`/` between parts) with their sizes, and the faults of the walk."""

    def __init__(self, root: Path) -> None:
        self.root, self.files, self.folders = root, {}, set()
        self.faults: list[str] = []
        self.links = 0
        self._walk(root, "", 0)

    def _walk(self, path: Path, inside: str, depth: int) -> None:
        """Enter one folder's entries, in the order of their names."""
        try:
            with os.scandir(path) as found:
                entries = sorted((entry for entry, _ in zip(found, range(MOST_ENTRIES + 1), strict=False)),
                                 key=lambda entry: entry.name)
        except OSError as error:
            self._note(f"{shown(inside) or 'the folder'}: cannot be listed ({error.strerror})")
            return
        for entry in entries:
            name = f"{inside}/{entry.name}" if inside else entry.name
            if len(self.files) + len(self.folders) >= MOST_ENTRIES:
                self._note(f"more than {MOST_ENTRIES} entries")
                return
            mode = entry.stat(follow_symlinks=False).st_mode
            if stat.S_ISREG(mode):
                self.files[name] = entry.stat(follow_symlinks=False).st_size
            elif not stat.S_ISDIR(mode):
                self.links += stat.S_ISLNK(mode)
                self._note(f"{shown(name)}: is a {'link' if stat.S_ISLNK(mode) else 'special file'}")
            elif depth + 1 >= MOST_DEPTH:
                self._note(f"{shown(name)}: more than {MOST_DEPTH} folders deep")
            else:
                self.folders.add(name)
                self._walk(path / entry.name, name, depth + 1)

    def _note(self, fault: str) -> None:
        if len(self.faults) < MOST_FAULTS and fault not in self.faults:
            self.faults.append(fault)

    def read(self, name: str, limit: int) -> bytes:
        """The bytes of a file of this folder; FolderError where it is absent, no plain file, or larger than `limit`."""
        if name not in self.files:
            raise FolderError(f"{shown(name)}: is not there")
        if self.files[name] > limit:
            raise FolderError(f"{shown(name)}: has {self.files[name]} bytes, at most {limit} are read")
        try:
            handle = os.open(self.root / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            with os.fdopen(handle, "rb") as file:
                if not stat.S_ISREG(os.fstat(handle).st_mode):
                    raise FolderError(f"{shown(name)}: is no plain file")
                data = file.read(limit + 1)
        except OSError as error:
            raise FolderError(f"{shown(name)}: cannot be read ({error.strerror})") from None
        if len(data) > limit:
            raise FolderError(f"{shown(name)}: has more than the {limit} bytes that are read")
        return data

    def text(self, name: str, limit: int = TEXT_LIMIT_BYTES) -> str:
        """A file as UTF-8 text; FolderError where it is none."""
        try:
            return self.read(name, limit).decode()
        except UnicodeDecodeError as error:
            raise FolderError(f"{shown(name)}: is not UTF-8 (byte {error.start})") from None

    def json(self, name: str) -> Json:
        """A JSON object of this folder; FolderError where it cannot be read as one."""
        return read_json(self.read(name, JSON_LIMIT_BYTES), name)

    def sha256(self, name: str) -> str:
        """Hex sha256 of a file's bytes."""
        return hashlib.sha256(self.read(name, HASH_LIMIT_BYTES)).hexdigest()


def read_json(data: bytes, name: str) -> Json:
    """The JSON object in `data`, with what is wrong in it; FolderError where it cannot be read as one."""
    faults: list[str] = []

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in items:
            if key in seen and len(faults) < MOST_FAULTS:
                faults.append(f"{shown(name)}: the key {shown(key)} stands twice")
            seen[key] = value
        return seen

    def constant(word: str) -> float:
        faults.append(f"{shown(name)}: {word} is no JSON number")
        return float(word.replace("Infinity", "inf"))
    try:
        text = data.decode()
        if text.startswith("\ufeff"):
            faults.append(f"{shown(name)}: begins with a byte order mark")
        value = json.loads(text.removeprefix("\ufeff"), object_pairs_hook=pairs, parse_constant=constant)
    except UnicodeDecodeError as error:
        raise FolderError(f"{shown(name)}: is not UTF-8 (byte {error.start})") from None
    except RecursionError:
        raise FolderError(f"{shown(name)}: is nested too deeply") from None
    except ValueError as error:
        raise FolderError(f"{shown(name)}: is not JSON ({shown(error)})") from None
    if not isinstance(value, dict):
        raise FolderError(f"{shown(name)}: must be a JSON object")
    return Json(value, faults)
