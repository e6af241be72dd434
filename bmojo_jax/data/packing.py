"""Packing: documents one after another, cut into rows of exactly L tokens.

A document d0..d(n-1) is read as | d0..d(n-1) and predicted as d0..d(n-1) |, with | the boundary.
What does not fit into a row goes on in the next ones as pieces of their own, so that every token
of every document is a target exactly once. Documents "xy" and "uvw", L = 6, dots are padding (0):

    inputs       | x y | u v    w . . . . .      with              | x y . | u    v w . . . .
    targets      x y | u v w    | . . . . .      start_multiple=4  x y | . u v    w | . . . .
    segment_ids  1 1 1 2 2 2    1 . . . . .                        1 1 1 . 2 2    1 1 . . . .
    positions    0 1 2 0 1 2    0 . . . . .                        0 1 2 . 0 1    0 1 . . . .

grain 0.2.18 has `ConcatThenSplitIterDataset`, but it loses a document when its state has passed
through JSON (a tuple that comes back as a list), which is how grain's own checkpoints store it.
"""

from typing import Any

import grain
import numpy as np
from jaxtyping import Int

from bmojo_jax.data.tokenizers import Tokenizer

_DTYPES = {
    "inputs": np.int32,
    "targets": np.int32,
    "weights": np.float32,
    "segment_ids": np.int32,
    "positions": np.int32,
}


def framed_ids(document: bytes, *, tokenizer: Tokenizer) -> Int[np.ndarray, " L"]:
    """The ids of a document between two boundaries: | d0..d(n-1) |."""
    return np.pad(tokenizer.encode(document), 1, constant_values=tokenizer.boundary_id)


class PackRows(grain.IterDataset[dict[str, np.ndarray]]):
    """Rows (a batch without its first axis) of the framed documents of `parent`.

    The last row of a finite stream is padded. Every piece starts at a multiple of
    `start_multiple` in its row; the gap before it is padding.
    """

    def __init__(
        self, parent: grain.IterDataset, *, row_length: int, start_multiple: int = 1
    ) -> None:
        super().__init__(parent)
        self._row_length = row_length
        self._start_multiple = start_multiple

    def __iter__(self) -> grain.DatasetIterator[dict[str, np.ndarray]]:
        return _PackRowsIterator(iter(self._parent), self._row_length, self._start_multiple)


class _PackRowsIterator(grain.DatasetIterator[dict[str, np.ndarray]]):
    """Its state is the parent's before the open document, and how much of that is done."""

    def __init__(self, parent: grain.DatasetIterator, row_length: int, start_multiple: int) -> None:
        super().__init__(parent)
        self._row_length = row_length
        self._start_multiple = start_multiple
        self._close_document()

    def _close_document(self) -> None:
        self._open_L = np.zeros(0, np.int32)  # what is left; its first id is the next input
        self._open_state = None
        self._done = 0

    def _open_document(self) -> None:
        state = self._parent.get_state()
        self._open_L = next(self._parent)
        self._open_state = state

    def __next__(self) -> dict[str, np.ndarray]:
        row = {name: np.zeros(self._row_length, dtype) for name, dtype in _DTYPES.items()}
        column = segment = 0
        while column < self._row_length:
            if self._open_state is None:
                try:
                    self._open_document()
                except StopIteration:
                    if segment == 0:
                        raise
                    break
            size = min(len(self._open_L) - 1, self._row_length - column)
            segment += 1
            place = slice(column, column + size)
            row["inputs"][place] = self._open_L[:size]
            row["targets"][place] = self._open_L[1 : size + 1]
            row["weights"][place] = 1
            row["segment_ids"][place] = segment
            row["positions"][place] = np.arange(size)
            self._open_L = self._open_L[size:]
            self._done += size
            if len(self._open_L) == 1:
                self._close_document()
            column += -(-size // self._start_multiple) * self._start_multiple
        return row

    def get_state(self) -> dict[str, Any]:
        if self._open_state is None:
            return {"parent": self._parent.get_state(), "done": 0}
        return {"parent": self._open_state, "done": self._done}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["parent"])
        self._close_document()
        if state["done"]:
            self._open_document()
            self._done = state["done"]
            self._open_L = self._open_L[self._done :]
            if len(self._open_L) < 2:
                raise ValueError(f"{state=}: must be of the same documents; this one is shorter")
