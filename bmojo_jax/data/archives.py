"""Files as byte ranges: what compressed files, tar archives and JSONL hold, and where.

Documents are read by their number, in any order, which a compressed file does not allow. It is
therefore unpacked, once, into the folder

    $XDG_CACHE_HOME/bmojo_jax/unpacked        (XDG_CACHE_HOME is ~/.cache unless it is set)

under a name made of its path, size and time of change. Nothing there is needed between runs.
"""

import fcntl
import functools
import gzip
import hashlib
import lzma
import os
import posixpath
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Literal, NamedTuple

import numpy as np
import zstandard
from jaxtyping import Int

_ENDINGS = {".tgz": ".tar.gz", ".txz": ".tar.xz", ".tzst": ".tar.zst"}
_COMPRESSED = (".gz", ".xz", ".zst")
_CHUNK = 2**22  # bytes read at once
_ZSTD_CHUNK = 2**16  # its content comes at once, and may be thousands of times as much
_DAMAGES = (EOFError, OSError, zlib.error, lzma.LZMAError, zstandard.ZstdError, tarfile.TarError)
_BLOCK = tarfile.BLOCKSIZE
_WIDEST_ZSTD_WINDOW = 2**31  # that of `zstd --ultra --long=31`


class DamagedError(Exception):
    """A file that cannot be unpacked or does not end as it should; says how."""


class Kind(NamedTuple):
    """What the name of a file says of it."""

    holds: Literal["document", "lines", "members"]
    compression: str  # a suffix, or "": not compressed


class Member(NamedTuple):
    """A member of a tar archive. `offset` is -1 for what has no bytes of its own."""

    name: str
    offset: int
    length: int
    problem: str  # why it is no document; "" if it can be one


def kind_of(name: str) -> Kind:
    lower = name.lower()
    for short, long in _ENDINGS.items():
        if lower.endswith(short):
            lower = lower.removesuffix(short) + long
    compression = next((suffix for suffix in _COMPRESSED if lower.endswith(suffix)), "")
    lower = lower.removesuffix(compression)
    if lower.endswith(".tar"):
        return Kind("members", compression)
    return Kind("lines" if lower.endswith(".jsonl") else "document", compression)


def cache_folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "bmojo_jax" / "unpacked"


def unpacked_path(path: Path) -> Path:
    """Where `unpack(path)` puts the content of a file as it is now."""
    real, status = os.path.realpath(path), path.stat()
    key = f"{real}\0{status.st_size}\0{status.st_mtime_ns}"
    return cache_folder() / hashlib.sha256(os.fsencode(key)).hexdigest()[:32]


def unpack(path: Path, compression: str, progress: Callable[[int], object]) -> Path:
    """The path of the uncompressed content; it is made unless it is there already.

    Several processes may do it at once: one works, the others wait. What is there under its name
    is complete, whenever a process ended.

    Args:
      progress: called with numbers of compressed bytes that add up to the size of the file,
        unless it is there already.

    Raises:
      DamagedError: the file is truncated or not what its name says.
      ValueError: the cache folder cannot be written, e.g. the disk is full.
    """
    target = unpacked_path(path)
    if target.exists():
        return target
    part = target.with_suffix(".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.with_suffix(".lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # ends with the process, whatever ends that
            if target.exists():
                progress(path.stat().st_size)
                return target
            try:
                _write(part, _uncompressed(path, compression, progress))
                part.replace(target)
            finally:
                part.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(
            f"{str(target.parent)!r}: must be a folder with room for {str(path)!r} unpacked "
            f"({error.strerror}); the environment variable XDG_CACHE_HOME moves it"
        ) from error
    return target


def _write(part: Path, chunks: Iterator[bytes]) -> None:
    with part.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())  # else the name could outlive a power cut and the content not


def _uncompressed(
    path: Path, compression: str, progress: Callable[[int], object]
) -> Iterator[bytes]:
    done = 0
    try:
        with path.open("rb") as packed:
            for chunk in _streams(packed, compression):
                yield chunk
                progress(packed.tell() - done)
                done = packed.tell()
    except _DAMAGES as error:
        raise DamagedError(str(error) or type(error).__name__) from error


def _streams(packed: IO[bytes], compression: str) -> Iterator[bytes]:
    if compression == ".zst":
        yield from _zstd_frames(packed)
        return
    opened = gzip.open(packed) if compression == ".gz" else lzma.open(packed)
    with opened as file:
        while chunk := file.read(_CHUNK):
            yield chunk


def _zstd_frames(packed: IO[bytes]) -> Iterator[bytes]:
    """Of all frames; zstandard's own reader takes a truncated file for a short one."""
    make = zstandard.ZstdDecompressor(max_window_size=_WIDEST_ZSTD_WINDOW).decompressobj
    frame, begun = make(), False
    while rest := packed.read(_ZSTD_CHUNK):
        while rest:
            yield frame.decompress(rest)
            rest, begun = frame.unused_data, True
            if frame.eof:
                frame, begun = make(), False
            else:
                break
    if begun:
        raise EOFError("Compressed file ended before the end-of-stream marker was reached")


@functools.lru_cache(maxsize=64)
def members(path: str, mtime_ns: int) -> tuple[Member, ...]:
    """The files in a tar archive, sorted by their names; of one name the last counts.

    Args:
      mtime_ns: of the file; a run opens its sources more than once.

    Raises:
      DamagedError: it is no tar archive, or has no end.
    """
    del mtime_ns
    found: dict[str, Member] = {}
    again = []
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                if info.isdir():
                    continue
                member = _member(info)
                if member.name in found:
                    again.append(found[member.name]._replace(problem="the same file again"))
                found[member.name] = member
            end = tar.offset
        # tarfile takes a header that it cannot read for the end.
        with open(path, "rb") as file:
            file.seek(end)
            if file.read(_BLOCK) != bytes(_BLOCK):
                raise DamagedError("truncated or not a tar archive to its end")
    except _DAMAGES as error:
        raise DamagedError(str(error) or type(error).__name__) from error
    return tuple(sorted([*found.values(), *again], key=lambda member: member.name))


def _member(info: tarfile.TarInfo) -> Member:
    name = posixpath.normpath(info.name).lstrip("/")
    if info.islnk() or info.issym():
        return Member(name, -1, 0, "the same file again")
    if not info.isreg() or info.issparse():
        return Member(name, -1, 0, "unreadable")
    kind = kind_of(name)
    packed = kind.compression or kind.holds == "members"
    return Member(name, info.offset_data, info.size, "packed within an archive" if packed else "")


@functools.lru_cache(maxsize=64)
def line_ends(path: str, offset: int, length: int, mtime_ns: int) -> Int[np.ndarray, " N"]:
    """Where the lines of a byte range end, counted from its start; newlines are not included.

    What follows the last newline is a line if there is anything. Raises OSError.
    """
    del mtime_ns
    ends, done = [], 0
    with open(path, "rb") as file:
        file.seek(offset)
        while chunk := file.read(min(_CHUNK, length - done)):
            ends.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + done)
            done += len(chunk)
    ends_N = np.concatenate(ends) if ends else np.zeros(0, np.int64)
    if done and (not len(ends_N) or ends_N[-1] != done - 1):
        ends_N = np.append(ends_N, done)
    return ends_N
