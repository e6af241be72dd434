"""Rows of several sources by weight, shuffled within a window: exact, and resumable anywhere."""

import json

import grain
import numpy as np
import pytest

from bmojo_jax.data.mixing import MixRows, ShuffleRows


def endless(source, size=1000):
    """Rows [source, 0], [source, 1], ..., each as an array."""
    rows = [np.array([source, n], np.int32) for n in range(size)]
    return grain.MapDataset.source(rows).repeat().to_iter_dataset()


def take(iterator, count):
    return [tuple(next(iterator).tolist()) for _ in range(count)]


@pytest.mark.parametrize("weights", [(1, 1), (3.0, 1.0), (0.31, 0.07, 2.5), (1e-3, 5, 1)])
def test_every_source_has_its_share_at_any_time(weights):
    rows = take(iter(MixRows([endless(i) for i in range(len(weights))], weights)), 1000)
    chosen = np.array([source for source, _ in rows])
    for source, weight in enumerate(weights):
        so_far = np.cumsum(chosen == source)
        share = weight / sum(weights) * np.arange(1, 1001)
        assert np.abs(so_far - share).max() <= 1.5
        # Each source in its own order, nothing lost.
        assert [n for s, n in rows if s == source] == list(range(so_far[-1]))


def test_a_window_holds_its_rows_in_another_order():
    rows = [n for _, n in take(iter(ShuffleRows(endless(0), window=50, seed=3)), 500)]
    windows = [rows[first : first + 50] for first in range(0, 500, 50)]
    orders = set()
    for number, window in enumerate(windows):
        assert sorted(window) == list(range(50 * number, 50 * number + 50))
        orders.add(tuple(n - 50 * number for n in window))
    assert len(orders) == 10  # each window in one of its own, none as it was
    assert tuple(range(50)) not in orders
    moved = np.abs(np.array(windows[0]) - np.arange(50))
    assert 10 < moved.mean() < 24  # a third of the window, as of random places
    again = [n for _, n in take(iter(ShuffleRows(endless(0), window=50, seed=3)), 500)]
    other = [n for _, n in take(iter(ShuffleRows(endless(0), window=50, seed=4)), 500)]
    assert again == rows != other


def test_as_many_rows_as_the_window_are_read_ahead():
    iterator = iter(ShuffleRows(endless(0), window=50, seed=0))
    for taken in range(1, 120):
        next(iterator)
        parent = iterator._parent.get_state()
        assert parent["next_index"] == taken + 50
        held = [row for row in [*iterator._rows, *iterator._following] if row is not None]
        assert len(held) == 50


@pytest.mark.parametrize("window", [1, 2, 7])
def test_any_state_goes_through_json(window):
    def rows():
        return iter(
            ShuffleRows(MixRows([endless(0, 5), endless(1)], (2, 1)), window=window, seed=1)
        )

    iterator = rows()
    states, expected = [iterator.get_state()], []
    for _ in range(30):
        expected += take(iterator, 1)
        states.append(iterator.get_state())
    for done in (0, 1, 2, 6, 7, 8, 13, 14, 20):
        resumed = rows()
        take(resumed, done % 4)  # wherever it stood before
        resumed.set_state(json.loads(json.dumps(states[done])))
        assert resumed.get_state() == states[done]
        assert take(resumed, 5) == expected[done : done + 5]
