"""What sources of documents have in common.

A source is a `grain.sources.RandomAccessDataSource`: a length, and documents by their number. A
document is one of

    bytes         UTF-8 text
    ids           int32, tokenized already: documents framed by boundaries, | d0..d(n-1) | e0.. |
    BadDocument   what cannot be used, and why; it is passed on, so that it can be counted

`fingerprint()` changes when the documents do: a place in a source means nothing in another one.
"""

import dataclasses
from typing import Literal, Protocol, SupportsIndex, runtime_checkable

import numpy as np

Split = Literal["train", "validation"]


@dataclasses.dataclass(frozen=True)
class BadDocument:
    """A document that is left out."""

    name: str  # e.g. the file, with the line or member
    reason: str  # e.g. "not UTF-8"; documents are counted by it


Document = bytes | np.ndarray | BadDocument


@runtime_checkable
class Source(Protocol):
    """Documents of a split. It can be pickled."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: SupportsIndex) -> Document: ...

    def fingerprint(self) -> str: ...
