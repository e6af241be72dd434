"""Packing: documents one after another, cut into rows of at most L tokens.

A document d0..d(n-1) is read as | d0..d(n-1) and predicted as d0..d(n-1) |, with | the boundary.
What does not fit into a row goes on in the next ones as pieces of their own, so that every token
of every document is a target exactly once. Documents "xy" and "uvw", L = 6, dots are padding (0):

    inputs       | x y | u v    w . . . . .      with              | x y . | u    v w . . . .
    targets      x y | u v w    | . . . . .      start_multiple=4  x y | . u v    w | . . . .
    segment_ids  1 1 1 2 2 2    1 . . . . .                        1 1 1 . 2 2    1 1 . . . .
    positions    0 1 2 0 1 2    0 . . . . .                        0 1 2 . 0 1    0 1 . . . .

All documents in their order are one stream, |xy|uvw|, and a row is a slice of it: n inputs and the
target of the last one, n + 1 ids. Since | stands nowhere else, everything in a row follows from its
ids. So `CutRows` yields these slices, which take a fifth of the memory while they wait in a shuffle
window, and `lay_out` makes a batch of them with a fixed number of NumPy operations.

grain 0.2.18 has `ConcatThenSplitIterDataset`, but it loses a document when its state has passed
through JSON (a tuple that comes back as a list), which is how grain's own checkpoints store it.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import grain
import numpy as np
from absl import logging
from jaxtyping import Int

from bmojo_jax.data.documents import BadDocument
from bmojo_jax.data.tokenizers import Tokenizer

_DTYPES = {
    "inputs": np.int32,
    "targets": np.int32,
    "weights": np.float32,
    "segment_ids": np.int32,
    "positions": np.int32,
}
_TOLD = 5  # documents of a reason that are named in the log
_PATIENCE = 1000  # documents beyond an epoch without one that can be used


def framed_ids(document: bytes, *, tokenizer: Tokenizer) -> Int[np.ndarray, " L"]:
    """The ids of a document between two boundaries: | d0..d(n-1) |."""
    ids_L = tokenizer.encode(document)
    framed_L = np.empty(len(ids_L) + 2, np.int32)
    framed_L[0] = framed_L[-1] = tokenizer.boundary_id
    framed_L[1:-1] = ids_L
    return framed_L


class CutRows(grain.IterDataset[np.ndarray]):
    """The ids of rows: slices of the stream that the documents of `parent` make.

    `parent` yields documents framed by boundaries, one or several in an array, | d0.. | e0.. |, and
    `BadDocument`s, which are left out, counted by their reason in the state, and the first few
    named in the log. The last row of a finite stream may be shorter than the others.

    Args:
      row_length: how many inputs a row holds at most.
      start_multiple: every piece starts at a multiple of this; padding in between counts.
      boundary_id: of the tokenizer.
      documents: "cut" where a row ends; "whole": a row ends before one that would have to be cut,
        unless it is longer than a row.
      name: of the documents, for messages.
      epoch: how many documents there are, to give up if many more in succession are bad.
    """

    def __init__(
        self,
        parent: grain.IterDataset,
        *,
        row_length: int,
        start_multiple: int,
        boundary_id: int,
        documents: Literal["cut", "whole"],
        name: str,
        epoch: int,
    ) -> None:
        super().__init__(parent)
        self._row_length = row_length
        self._start_multiple = start_multiple
        self._boundary_id = boundary_id
        self._documents: Literal["cut", "whole"] = documents
        self._name = name
        self._epoch = epoch

    def __iter__(self) -> grain.DatasetIterator[np.ndarray]:
        return _CutRowsIterator(
            iter(self._parent),
            self._row_length,
            self._start_multiple,
            self._boundary_id,
            self._documents,
            self._name,
            self._epoch,
        )


class _CutRowsIterator(grain.DatasetIterator[np.ndarray]):
    """Its state is the parent's before the open array, how much of that is done, and the counts."""

    def __init__(
        self,
        parent: grain.DatasetIterator,
        row_length: int,
        start_multiple: int,
        boundary_id: int,
        documents: Literal["cut", "whole"],
        name: str,
        epoch: int,
    ) -> None:
        super().__init__(parent)
        self._row_length = row_length
        self._start_multiple = start_multiple
        self._boundary_id = boundary_id
        self._documents: Literal["cut", "whole"] = documents
        self._name = name
        self._epoch = epoch
        self._left_out: dict[str, int] = {}
        self._close()

    def _close(self) -> None:
        self._open_L = np.zeros(0, np.int32)
        self._open_state = None
        self._done = 0  # inputs of the open array; the id at this place is the next one

    def _open(self) -> None:
        for _ in range(self._epoch + _PATIENCE):
            state = self._parent.get_state()
            document = next(self._parent)
            if not isinstance(document, BadDocument):
                break
            self._leave_out(document)
        else:
            raise ValueError(
                f"{self._name}: must hold documents that can be used; none of the last "
                f"{self._epoch + _PATIENCE} can: {self._left_out}"
            )
        boundary = self._boundary_id
        if len(document) < 3 or document[0] != boundary or document[-1] != boundary:
            raise ValueError(
                f"{self._name}: ids {document[:1]}..{document[-1:]}, {len(document)} in all: must "
                f"be documents between boundaries, {boundary}"
            )
        self._open_L = document
        self._open_state = state

    def _leave_out(self, document: BadDocument) -> None:
        count = self._left_out.get(document.reason, 0) + 1
        self._left_out[document.reason] = count
        if count <= _TOLD:
            more = "; further ones are counted only" if count == _TOLD else ""
            _warn_once(f"{document.name}: left out ({document.reason}){more}")

    def __next__(self) -> np.ndarray:
        parts = []
        column = 0
        while column < self._row_length:
            if self._open_state is None:
                try:
                    self._open()
                except StopIteration:
                    if not parts:
                        raise
                    break
            if self._documents == "whole" and 0 < column > self._row_length - len(self._open_L) + 1:
                break
            size, column = self._fitting(column)
            # The boundary at which an array ends is the one at which the next begins.
            first = self._done + bool(parts)
            self._done += size
            parts.append(self._open_L[first : self._done + 1])
            if self._done == len(self._open_L) - 1:
                self._close()
        # A copy: a slice would keep the whole document in memory.
        return np.concatenate(parts)

    def _fitting(self, column: int) -> tuple[int, int]:
        """How many inputs of the open array fit from `column` on, and the first column after."""
        multiple = self._start_multiple
        size = min(len(self._open_L) - 1 - self._done, self._row_length - column)
        if multiple == 1:
            return size, column + size
        inputs_L = self._open_L[self._done : self._done + size]
        starts = _piece_starts(inputs_L == self._boundary_id, 0)
        sizes = np.diff(starts, append=size)
        columns = column + _cumulative(_round_up(sizes, multiple))
        last = int(np.searchsorted(columns[:-1], self._row_length)) - 1
        taken = min(int(sizes[last]), self._row_length - int(columns[last]))
        return int(starts[last]) + taken, int(columns[last]) + _round_up(taken, multiple)

    def get_state(self) -> dict[str, Any]:
        is_open = self._open_state is not None
        return {
            "parent": self._open_state if is_open else self._parent.get_state(),
            "done": self._done,
            "left_out": dict(self._left_out),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["parent"])
        self._close()
        self._left_out = dict(state["left_out"])
        if state["done"]:
            self._open()
            if state["done"] >= len(self._open_L) - 1:
                raise ValueError(f"{state=}: must be of the same documents; this one is shorter")
            self._done = state["done"]


@functools.cache
def _warn_once(message: str) -> None:
    """Documents are read again in each evaluation, and where a run resumes."""
    logging.warning(message)


def lay_out(
    rows: Sequence[np.ndarray],
    *,
    row_length: int,
    start_multiple: int,
    boundary_id: int,
    row_count: int,
) -> dict[str, np.ndarray]:
    """A batch [row_count, row_length] of the rows that `CutRows` cuts; missing ones are padding."""
    batch = {name: np.zeros((row_count, row_length), dtype) for name, dtype in _DTYPES.items()}
    if not rows:
        return batch
    # T: the inputs of all rows, one after another; P: the pieces of documents among them.
    inputs_T = np.concatenate([row[:-1] for row in rows])
    targets_T = np.concatenate([row[1:] for row in rows])
    ends = np.cumsum([len(row) - 1 for row in rows])
    row_starts = np.concatenate([[0], ends[:-1]])
    starts_P = _piece_starts(inputs_T == boundary_id, row_starts)
    sizes_P = np.diff(starts_P, append=len(inputs_T))
    row_P = np.searchsorted(ends, starts_P, side="right")
    first_P = np.searchsorted(starts_P, row_starts)[row_P]  # the first piece of the same row
    columns_P = _cumulative(_round_up(sizes_P, start_multiple))[:-1]
    columns_P = columns_P - columns_P[first_P]
    tokens_T = np.arange(len(inputs_T))
    positions_T = tokens_T - np.repeat(starts_P, sizes_P)
    places_T = positions_T + np.repeat(row_P * row_length + columns_P, sizes_P)
    values = {
        "inputs": inputs_T,
        "targets": targets_T,
        "weights": 1,
        "segment_ids": np.repeat(np.arange(1, len(starts_P) + 1) - first_P, sizes_P),
        "positions": positions_T,
    }
    for name, values_T in values.items():
        batch[name].reshape(-1)[places_T] = values_T
    return batch


def _piece_starts(is_boundary_T: np.ndarray, row_starts: int | np.ndarray) -> np.ndarray:
    """Where pieces begin: at boundaries, and at the beginnings of rows. Changes its argument."""
    is_boundary_T[row_starts] = True
    return np.flatnonzero(is_boundary_T)


def _cumulative(sizes: np.ndarray) -> np.ndarray:
    """0, s0, s0 + s1, ..., the sum of all."""
    return np.concatenate([[0], np.cumsum(sizes)])


def _round_up[T: (int, np.ndarray)](size: T, multiple: int) -> T:
    return -(-size // multiple) * multiple


def left_out(state: Any) -> dict[str, int]:
    """How many documents were left out, by reason, summed over a state of any iterator of these.

    Counted is what was read, so a document that is read in two epochs counts twice.
    """
    total: dict[str, int] = {}
    if isinstance(state, Mapping):
        if "left_out" in state:  # what is nested below is counted in it
            return dict(sorted(state["left_out"].items()))
        parts = list(state.values())
    else:
        parts = state if isinstance(state, list | tuple) else []
    for part in parts:
        for reason, count in left_out(part).items():
            total[reason] = total.get(reason, 0) + count
    return dict(sorted(total.items()))
