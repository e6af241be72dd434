"""The manifest of a checkpoint: size and SHA-256 of each of its files, so that damage is found.

It lies in the checkpoint's folder as `manifest.json` and is written before the folder gets its
name, so a checkpoint either has a whole one or, from before there were manifests, none: then only
what is JSON can be checked without loading the arrays. `sha256sum` checks a file by hand.

Writing it also flushes the files to the disk. What a power cut can lose is thus at most a
checkpoint that does not have its name yet; and where a full disk is reported late (network file
systems, quotas) it is reported while the folder is still a temporary one.

Measured on two cores (SHA-256: 2.0 GB/s of each): of a checkpoint of 0.9 GB, writing the manifest
takes 0.4 s of the 4.4 s of saving, which is done in the background, and reading everything again
takes 0.5 s, before the 3.4 s of restoring.
"""

import errno
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

NAME = "manifest.json"
_ARRAYS = "state"  # the item that may be large
# Orbax writes these after the manifest. They say when a checkpoint was saved, and that it was.
_LATER = ("_CHECKPOINT_METADATA", "commit_success.txt")
_THREADS = min(8, os.cpu_count() or 1)  # hashing leaves Python's lock


def write(directory: pathlib.Path) -> None:
    """Writes the manifest of what lies in `directory`, all of it safe on the disk."""
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    names = [path.relative_to(directory).as_posix() for path in files]
    chosen = [(n, path) for n, path in zip(names, files, strict=True) if n not in (*_LATER, NAME)]
    with ThreadPoolExecutor(_THREADS) as pool:
        entries = list(pool.map(lambda item: _entry(item[1]), chosen))
    content = {"files": {name: e for (name, _), e in zip(chosen, entries, strict=True)}}
    with (directory / NAME).open("w") as file:
        json.dump(content, file, indent=1)
    flush(directory / NAME, *(path for path in directory.rglob("*") if path.is_dir()), directory)


def flush(*paths: pathlib.Path) -> None:
    """Returns when files, or the names in folders, are on the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def flush_name(directory: pathlib.Path) -> None:
    """Flushes what orbax has added after the manifest, and the folder's name."""
    flush(*(directory / name for name in _LATER), directory, directory.parent)


def find_damage(directory: pathlib.Path, depth: Literal["quick", "full"]) -> str | None:
    """Says which file of a checkpoint is damaged, and how; None if none is.

    Args:
      depth: "quick" compares the sizes of all files and the content of all but the arrays; "full"
        reads everything.
    """
    try:
        content = json.loads((directory / NAME).read_text())
        entries = {name: (entry["bytes"], entry["sha256"]) for name, entry in _files(content)}
    except FileNotFoundError:
        return _find_unreadable(directory)
    except (ValueError, LookupError, TypeError, AttributeError):
        return f"{NAME} is unreadable"
    for name in _LATER:
        if not (directory / name).is_file():
            return f"{name} is missing"
    for name, (size, _) in entries.items():
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    read = [name for name in entries if depth == "full" or not name.startswith(f"{_ARRAYS}/")]
    with ThreadPoolExecutor(_THREADS) as pool:
        hashes = pool.map(lambda name: _sha256(directory / name), read)
        for name, found in zip(read, hashes, strict=True):
            if found is None:
                return f"{name} cannot be read"
            if found != entries[name][1]:
                return f"{name} has other content than it was saved with (SHA-256 {found[:16]}..)"
    return None


def is_in(directory: pathlib.Path) -> bool:
    return (directory / NAME).is_file()


def _files(content: dict[str, Any]) -> Iterable[tuple[str, Any]]:
    return content["files"].items()


def _find_unreadable(directory: pathlib.Path) -> str | None:
    """What can be said of a checkpoint without a manifest and without loading it."""
    needed = ("config/metadata", "data/metadata", f"{_ARRAYS}/_METADATA")
    for name in (*needed, "metrics/metrics", "tokenizer/metadata"):
        path = directory / name
        if not path.is_file():
            if name in needed or path.parent.is_dir():
                return f"{name} is missing"
            continue
        try:
            json.loads(path.read_text())
        except ValueError:
            return f"{name} is unreadable"
    return None


def _entry(path: pathlib.Path) -> dict[str, Any]:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": found}


def _sha256(path: pathlib.Path) -> str | None:
    """None where the disk gives an error; any other one, e.g. of permissions, is no damage."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return None
