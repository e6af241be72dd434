"""Rows of several sources drawn by weight, and shuffled within a window.

Row k of a mixture (k = 0, 1, ...) comes from the source that is furthest behind its share,

    argmax_i  (k + 1) w_i / sum(w) - rows of source i so far

(the first of equals), so every source has its share at any time, to within a row or so, and nothing
is random. `grain.IterDataset.mix` rounds weights to a hundredth of the smallest.

The shuffle cuts the stream into windows of n rows and puts each in a random order. For each row
that leaves, one of the next window is read: as many rows as the window are in memory, and work is
spread evenly. `grain.experimental.WindowShuffleIterDataset` reads a whole window at once, and a
training step that is as fast as the pipeline waits for it.
"""

from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from bmojo_jax.data import packing


class MixRows(grain.IterDataset[np.ndarray]):
    """Rows of the endless `parents`, by weight."""

    def __init__(self, parents: Sequence[grain.IterDataset], weights: Sequence[float]) -> None:
        super().__init__(parents)
        self._weights = tuple(weights)

    def __iter__(self) -> grain.DatasetIterator[np.ndarray]:
        # Of the attribute, for reader processes: there each source is cut to a share of its own.
        parents: Any = self._parents
        return _MixRowsIterator([iter(parent) for parent in parents], self._weights)


class _MixRowsIterator(grain.DatasetIterator[np.ndarray]):
    def __init__(
        self, parents: Sequence[grain.DatasetIterator], weights: tuple[float, ...]
    ) -> None:
        super().__init__(parents)
        self._shares = np.array(weights) / sum(weights)
        self._rows = np.zeros(len(weights), np.int64)

    def __next__(self) -> np.ndarray:
        behind = (self._rows.sum() + 1) * self._shares - self._rows
        chosen = int(np.argmax(behind))
        row = next(self._parents[chosen])
        self._rows[chosen] += 1
        return row

    def get_state(self) -> dict[str, Any]:
        return {
            "parents": [parent.get_state() for parent in self._parents],
            "rows": self._rows.tolist(),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        for parent, parent_state in zip(self._parents, state["parents"], strict=True):
            parent.set_state(parent_state)
        self._rows = np.array(state["rows"], np.int64)


class ShuffleRows(grain.IterDataset[np.ndarray]):
    """The endless `parent` in another order: each window of `window` rows is shuffled."""

    def __init__(self, parent: grain.IterDataset, *, window: int, seed: int) -> None:
        super().__init__(parent)
        self._window = window
        self._seed = seed

    def __iter__(self) -> grain.DatasetIterator[np.ndarray]:
        return _ShuffleRowsIterator(iter(self._parent), self._window, self._seed)


class _ShuffleRowsIterator(grain.DatasetIterator[np.ndarray]):
    """Its state is the parent's before the window, which is read again, and the place in it."""

    def __init__(self, parent: grain.DatasetIterator, window: int, seed: int) -> None:
        super().__init__(parent)
        self._size = window
        self._seed = seed
        self._begin(0, place=0)

    def _begin(self, window: int, *, place: int) -> None:
        """At the parent's place begins window number `window`, `place` rows of which have left."""
        self._window = window
        self._place = place
        self._start_state = self._parent.get_state()
        self._rows: list[np.ndarray | None] = []  # of this window; read at the first call
        self._following_state = None  # of the parent before the next window
        self._following: list[np.ndarray | None] = []

    def _order(self) -> np.ndarray:
        # The raw output of Philox never changes; that of NumPy's permutations may.
        numbers = np.random.Philox(key=[self._seed, self._window]).random_raw(self._size)
        return np.argsort(numbers, kind="stable")

    def _read_window(self) -> None:
        self._rows = [next(self._parent) for _ in range(self._size)]
        self._order_W = self._order()
        self._following_state = self._parent.get_state()
        for place in range(self._place):
            self._rows[self._order_W[place]] = None
            self._following.append(next(self._parent))

    def __next__(self) -> np.ndarray:
        if not self._rows:
            self._read_window()
        if self._place == self._size:
            self._window += 1
            self._place = 0
            self._start_state = self._following_state
            self._rows, self._following = self._following, []
            self._order_W = self._order()
            self._following_state = self._parent.get_state()
        index = self._order_W[self._place]
        row, self._rows[index] = self._rows[index], None
        assert row is not None
        self._following.append(next(self._parent))
        self._place += 1
        return row

    def get_state(self) -> dict[str, Any]:
        return {
            "parent": self._start_state,
            "window": self._window,
            "place": self._place,
            # As of now: the counts of the parent's state are of the window's beginning.
            "left_out": packing.left_out(self._parent.get_state()),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["parent"])
        self._begin(state["window"], place=state["place"])
        if self._place:  # now, so that the counts are those of the saved state
            self._read_window()
