"""Sources of documents: random access to raw bytes, cut into a training and a validation split.

Whole files go to one split or the other, by a hash of their path below the folder: a file stays
where it is when others come or go. Nothing here decodes or changes a byte.
"""

import functools
import hashlib
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, SupportsIndex

from absl import logging

from bmojo_jax.config import DataConfig

Split = Literal["train", "validation"]

_EVERYTHING = "**/*"
_SNIFFED = 8192  # bytes in which a file that is no text is expected to have a NUL


class TextFolder:
    """Files of a folder as documents: a `grain.sources.RandomAccessDataSource` of bytes."""

    def __init__(self, root: Path, paths: Sequence[str]) -> None:
        self._root = root
        self.paths = tuple(paths)  # relative to root

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: SupportsIndex) -> bytes:
        return (self._root / self.paths[index]).read_bytes()

    def fingerprint(self) -> str:
        """Changes when files come or go."""
        return hashlib.sha256(os.fsencode("\0".join(self.paths))).hexdigest()

    def __repr__(self) -> str:
        return f"TextFolder({str(self._root)!r}, files={len(self)})"


def open_source(data: DataConfig, split: Split) -> TextFolder:
    """The documents of a split, in the order of their names.

    Raises:
      ValueError: the folder does not exist, or holds too few files that can be used.
    """
    root = Path(data.path)
    if not data.path or not root.is_dir():
        raise ValueError(f"data.path={data.path!r}: must be the path of an existing folder")
    paths = _split(_usable_files(root, data), data.validation_fraction)[split]
    _log_once(f"data.path={data.path!r}: {len(paths)} files for {split}")
    return TextFolder(root, paths)


@functools.cache
def _log_once(message: str) -> None:
    """A run opens its sources more than once."""
    logging.info(message)


def read_split(data: DataConfig, split: Split) -> list[bytes]:
    """All documents of a split, e.g. for baselines on the bytes that a model is tested on."""
    source = open_source(data, split)
    return [source[index] for index in range(len(source))]


def _usable_files(root: Path, data: DataConfig) -> list[str]:
    """Relative paths, sorted; what is left out is counted and logged."""
    if Path(data.include).is_absolute():
        raise ValueError(
            f"data.include={data.include!r}: must be a glob relative to data.path, e.g. "
            '"**/*.txt", or empty for every text file'
        )
    excluded = set(data.exclude)
    try:
        matches = list(root.glob(data.include or _EVERYTHING))
    except ValueError as error:
        raise ValueError(f"data.include={data.include!r}: must be a glob ({error})") from error
    found = sorted(path.relative_to(root).as_posix() for path in matches if not path.is_dir())
    usable: list[str] = []
    reasons = (
        "in a folder of data.exclude",
        "empty",
        "unreadable",
        "binary",
        "the same file again",
    )
    left_out: dict[str, list[str]] = {reason: [] for reason in reasons}
    seen = set()
    for path in found:
        if not excluded.isdisjoint(Path(path).parts[:-1]):
            left_out["in a folder of data.exclude"].append(path)
            continue
        try:
            status = (root / path).stat()
        except OSError:  # among others a link to nothing
            left_out["unreadable"].append(path)
            continue
        # Two names of one file could put it into both splits.
        target = os.path.realpath(root / path)
        if not stat.S_ISREG(status.st_mode) or not os.access(root / path, os.R_OK):
            left_out["unreadable"].append(path)
        elif status.st_size == 0:
            left_out["empty"].append(path)
        elif not data.include and _is_binary(root / path):
            left_out["binary"].append(path)
        elif target in seen:
            left_out["the same file again"].append(path)
        else:
            seen.add(target)
            usable.append(path)
    for reason, paths in left_out.items():
        if paths:
            _log_once(
                f"data.path={data.path!r}: left out {len(paths)} of {len(found)} files "
                f"({reason}), e.g. {paths[0]!r}"
            )
    if not usable:
        raise ValueError(
            f"data.include={data.include!r}: must match files below data.path={data.path!r} that "
            f"are readable and not empty, outside of data.exclude={data.exclude!r}; "
            f"it matches {len(found)} names"
        )
    if len(usable) == 1:
        raise ValueError(
            f"data.path={data.path!r}: must hold at least 2 usable files, one to train on and one "
            f"to validate on; data.include={data.include!r} matches only {usable[0]!r}"
        )
    return usable


def _is_binary(path: Path) -> bool:
    with path.open("rb") as file:
        return b"\0" in file.read(_SNIFFED)


def _split(paths: Sequence[str], validation_fraction: float) -> dict[Split, list[str]]:
    fractions = {path: _hash_fraction(path) for path in paths}
    chosen = {path for path in paths if fractions[path] < validation_fraction}
    # A split that would be empty gets the file whose hash is nearest to belonging there.
    chosen.add(min(paths, key=fractions.__getitem__))
    chosen.discard(max(paths, key=fractions.__getitem__))
    return {
        "train": [path for path in paths if path not in chosen],
        "validation": [path for path in paths if path in chosen],
    }


def _hash_fraction(path: str) -> float:
    """A number in [0, 1) that depends on the path alone."""
    return int.from_bytes(hashlib.sha256(os.fsencode(path)).digest()[:6]) / 2**48
