"""Which files of a folder hold documents, what is left out and why.

Globs are those of `pathlib.Path.glob`: `**` stands for any number of folders, `*` for part of a
name. A name in an archive is matched as if the archive were a folder; a glob that matches the
archive itself matches all of it. A JSONL file is matched by its own name.
"""

import dataclasses
import fnmatch
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import tqdm
from absl import logging
from jaxtyping import Int

from bmojo_jax.config import SourceConfig
from bmojo_jax.data import archives
from bmojo_jax.data.sources import log_once

_EVERYTHING = "**/*"
_SNIFFED = 8192  # bytes in which a file that is no text is expected to have a NUL
_WORTH_A_BAR = 2**25  # compressed bytes that take a second or more

# In the order in which they are told.
_REASONS = (
    "in a folder of data.exclude",
    "empty",
    "unreadable",
    "a link to a folder",
    "damaged",
    "packed within an archive",
    "binary",
    "the same file again",
)


@dataclasses.dataclass(frozen=True)
class Place:
    """A byte range of an uncompressed file: what a file or a member of an archive holds."""

    name: str
    path: str
    offset: int
    length: int
    mtime_ns: int
    holds: str  # "document" or "lines"
    included: bool  # matched by `include`
    held_out: bool  # matched by `validation_include`


@dataclasses.dataclass(frozen=True)
class _File:
    """A file on disk. Of an archive that is the path itself, members are named alone."""

    name: str
    path: Path
    kind: archives.Kind
    prefix: str  # of the names of its members


def lines(place: Place) -> Int[np.ndarray, " N"] | None:
    """Where its lines end, counted from its start; None if it is one document."""
    if place.holds == "document":
        return None
    return archives.line_ends(place.path, place.offset, place.length, place.mtime_ns)


def find(source: SourceConfig, *, field: str, held_out: str) -> list[Place]:
    """What `source.include` or the glob `held_out` matches and can be used, sorted by name.

    The rest is counted and logged. Compressed files are unpacked.

    Args:
      field: the prefix of the names of settings in messages, "data." for the main source.

    Raises:
      ValueError: the path does not exist, a glob is none, or nothing is left.
    """
    return _Search(source, field, held_out).run()


class _Search:
    """One search: what it has found so far, and what it has left out."""

    def __init__(self, source: SourceConfig, field: str, held_out: str) -> None:
        self._source, self._field = source, field
        self._root = Path(source.path)
        if not source.path or not self._root.exists():
            raise ValueError(
                f"{field}path={source.path!r}: must be the path of an existing folder or file"
            )
        self._include = _parts(f"{field}include", source.include or _EVERYTHING)
        self._held_out = _parts(f"{field}validation_include", held_out) if held_out else None
        self._excluded = set(source.exclude)
        self._seen: set[tuple[int, int]] = set()
        self._found = 0
        self._left_out: dict[str, list[str]] = {reason: [] for reason in _REASONS}
        self._places: list[Place] = []

    def run(self) -> list[Place]:
        usable = [file for file in self._files() if self._is_usable(file)]
        packed = [file.path for file in usable if file.kind.compression]
        size = sum(
            path.stat().st_size for path in packed if not archives.unpacked_path(path).exists()
        )
        with tqdm.tqdm(
            total=size,
            desc=f"unpacking {self._source.path}",
            unit="B",
            unit_scale=True,
            disable=size < _WORTH_A_BAR,
        ) as bar:
            for file in usable:
                self._open(file, bar.update)
        self._tell()
        return sorted(self._places, key=lambda place: place.name)

    def _files(self) -> list[_File]:
        """What the globs match, and the archives in which they could match something."""
        root = self._root
        if not root.is_dir():
            return [_File(root.name, root, archives.kind_of(root.name), "")]
        names = _glob(root, self._include) | _glob(root, self._held_out or ())
        return [
            _File(name, root / name, archives.kind_of(name), f"{name}/") for name in sorted(names)
        ]

    def _leave_out(self, name: str, reason: str) -> None:
        self._found += 1
        self._left_out[reason].append(name)

    def _is_usable(self, file: _File) -> bool:
        name, path = file.name, file.path
        in_folders = PurePosixPath(file.prefix + "x" if file.kind.holds == "members" else name)
        if not self._excluded.isdisjoint(in_folders.parts[:-1]):
            self._leave_out(name, "in a folder of data.exclude")
            return False
        try:
            status = path.stat()
        except OSError:  # among others a link to nothing
            self._leave_out(name, "unreadable")
            return False
        # Two names of one file, also by a hard link, could put it into both splits.
        target = (status.st_dev, status.st_ino)
        if stat.S_ISDIR(status.st_mode):
            self._leave_out(name, "a link to a folder")
        elif not stat.S_ISREG(status.st_mode) or not os.access(path, os.R_OK):
            self._leave_out(name, "unreadable")
        elif status.st_size == 0:
            self._leave_out(name, "empty")
        elif target in self._seen:
            self._leave_out(name, "the same file again")
        else:
            self._seen.add(target)
            return True
        return False

    def _open(self, file: _File, progress: Callable[[int], object]) -> None:
        try:
            path = file.path
            if file.kind.compression:
                path = archives.unpack(path, file.kind.compression, progress)
            real, status = os.path.realpath(path), path.stat()
            if file.kind.holds == "members":
                found = archives.members(real, status.st_mtime_ns)
            else:
                found = [archives.Member(file.name, 0, status.st_size, "")]
        except archives.DamagedError as error:
            self._leave_out(file.name, "damaged")
            logging.warning(
                f"{self._field}path={self._source.path!r}: left out {file.name!r}, which is "
                f"damaged: {error}"
            )
            return
        except OSError:
            self._leave_out(file.name, "unreadable")
            return
        for member in found:
            name = member.name
            if file.kind.holds == "members":
                name = file.prefix + name
            self._add(file, name, member, real, status.st_mtime_ns)

    def _add(
        self, file: _File, name: str, member: archives.Member, path: str, mtime_ns: int
    ) -> None:
        matched_by = [
            parts is not None and (_matches(name, parts) or _matches(file.name, parts))
            for parts in (self._include, self._held_out)
        ]
        if not any(matched_by):
            return
        reason = member.problem
        if not self._excluded.isdisjoint(PurePosixPath(name).parts[:-1]):
            reason = "in a folder of data.exclude"
        elif not reason and member.length == 0:
            reason = "empty"
        elif not reason and not self._source.include and not matched_by[1]:
            reason = _sniffed(path, member)
        if reason:
            self._leave_out(name, reason)
            return
        self._found += 1
        self._places.append(
            Place(
                name,
                path,
                offset=member.offset,
                length=member.length,
                mtime_ns=mtime_ns,
                holds=archives.kind_of(name).holds,
                included=matched_by[0],
                held_out=matched_by[1],
            )
        )

    def _tell(self) -> None:
        source = self._source
        for reason, names in self._left_out.items():
            if names:
                log_once(
                    f"{self._field}path={source.path!r}: left out {len(names)} of {self._found} "
                    f"files ({reason}), e.g. {names[0]!r}"
                )
        if not self._places and not self._root.is_dir():
            reasons = [reason for reason, names in self._left_out.items() if names]
            raise ValueError(
                f"{self._field}path={source.path!r}: must be a file with text that "
                f"{self._field}include={source.include!r} matches ({', '.join(reasons) or 'none'})"
            )
        if not self._places:
            raise ValueError(
                f"{self._field}include={source.include!r}: must match files below "
                f"{self._field}path={source.path!r} that are readable and not empty, outside of "
                f"{self._field}exclude={source.exclude!r}; it matches {self._found} names"
            )


def _sniffed(path: str, member: archives.Member) -> str:
    """ "binary" if it seems to be no text, else nothing."""
    try:
        with open(path, "rb") as file:
            file.seek(member.offset)
            return "binary" if b"\0" in file.read(min(_SNIFFED, member.length)) else ""
    except OSError:
        return "unreadable"


def _parts(field: str, pattern: str) -> tuple[str, ...]:
    """A glob, checked, as the parts of a path."""
    parts = PurePosixPath(pattern).parts
    if PurePosixPath(pattern).is_absolute():
        raise ValueError(
            f"{field}={pattern!r}: must be a glob relative to data.path, e.g. "
            '"**/*.txt", or empty for every text file'
        )
    if not parts or any("**" in part and part != "**" for part in parts):
        raise ValueError(f'{field}={pattern!r}: must be a glob, with "**" only as a whole folder')
    return (*parts, "*") if parts[-1] == "**" else parts


def _glob(root: Path, parts: tuple[str, ...]) -> set[str]:
    """The relative paths that match, and those of archives in which something could."""

    def matches(parts: tuple[str, ...]) -> Iterator[str]:
        for path in root.glob("/".join(parts)):
            if path.is_symlink() or not path.is_dir():
                yield path.relative_to(root).as_posix()

    heads = {parts[:n] for n in range(1, len(parts))}
    heads = {(*head, "*") if head[-1] == "**" else head for head in heads} - {parts}
    inside = {name for head in heads for name in matches(head) if _is_archive(name)}
    return inside | set(matches(parts) if parts else ())


def _is_archive(name: str) -> bool:
    return archives.kind_of(name).holds == "members"


def _matches(name: str, parts: tuple[str, ...]) -> bool:
    return _match(name.split("/"), parts)


def _match(names: Sequence[str], parts: Sequence[str]) -> bool:
    if not parts:
        return not names
    if parts[0] == "**":
        return _match(names, parts[1:]) or (bool(names) and _match(names[1:], parts))
    return bool(names) and fnmatch.fnmatchcase(names[0], parts[0]) and _match(names[1:], parts[1:])
