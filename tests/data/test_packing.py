"""Packing: nothing lost, nothing twice, everything in its place, resumable after any row."""

import json

import grain
import numpy as np
import pytest

from bmojo_jax.data import packing
from bmojo_jax.data.tokenizers import ByteTokenizer

BOUNDARY = 256
LENGTHS = (0, 3, 5, 6, 1, 40, 11, 2)


def documents(rng, lengths=LENGTHS):
    return [rng.integers(0, 256, n, np.uint8) for n in lengths]


def packed(ids, row_length, start_multiple=1):
    framed = [packing.framed_ids(bytes(d.tolist()), tokenizer=ByteTokenizer()) for d in ids]
    parent = grain.MapDataset.source(framed).to_iter_dataset()
    return packing.PackRows(parent, row_length=row_length, start_multiple=start_multiple)


def pieces(row):
    """(start, inputs, targets) of each piece of a row."""
    for segment in range(1, row["segment_ids"].max() + 1):
        columns = np.flatnonzero(row["segment_ids"] == segment)
        start, stop = columns[0], columns[-1] + 1
        np.testing.assert_array_equal(columns, np.arange(start, stop))
        np.testing.assert_array_equal(row["positions"][columns], np.arange(len(columns)))
        yield start, row["inputs"][columns], row["targets"][columns]


@pytest.mark.parametrize(
    "start_multiple, inputs, targets, segment_ids, positions",
    [
        (1, "|xy|uv w.....", "xy|uvw |.....", "111222 1.....", "012012 0....."),
        (4, "|xy.|u vw....", "xy|.uv w|....", "111.22 11....", "012.01 01...."),
    ],
)
def test_rows_of_the_worked_example(start_multiple, inputs, targets, segment_ids, positions):
    ids = [np.frombuffer(document, np.uint8) for document in (b"xy", b"uvw")]
    rows = list(packed(ids, 6, start_multiple))
    letters = {ord(letter): letter for letter in "xyuvw"} | {BOUNDARY: "|", 0: "."}
    digits = {0: ".", 1: "1", 2: "2"}
    for name, table, wanted in (
        ("inputs", letters, inputs),
        ("targets", letters, targets),
        ("segment_ids", digits, segment_ids),
    ):
        assert " ".join("".join(table[int(v)] for v in row[name]) for row in rows) == wanted
    shown = [
        "".join(str(p) if w else "." for p, w in zip(row["positions"], row["weights"], strict=True))
        for row in rows
    ]
    assert " ".join(shown) == positions


@pytest.mark.parametrize("start_multiple", [1, 2, 4, 5])
@pytest.mark.parametrize("row_length", [1, 4, 7, 8, 64, 200])
def test_every_token_is_a_target_once(rng, row_length, start_multiple):
    ids = documents(rng)
    rows = list(packed(ids, row_length, start_multiple))
    inputs, targets = [], []
    for row in rows:
        for name, dtype in packing._DTYPES.items():
            assert row[name].shape == (row_length,) and row[name].dtype == dtype
        np.testing.assert_array_equal(row["weights"], row["segment_ids"] > 0)
        for name in row:
            assert not row[name][row["segment_ids"] == 0].any()
        for start, piece_inputs, piece_targets in pieces(row):
            assert start % start_multiple == 0
            np.testing.assert_array_equal(piece_inputs[1:], piece_targets[:-1])
            inputs.append(piece_inputs)
            targets.append(piece_targets)
    boundary = [BOUNDARY]
    np.testing.assert_array_equal(
        np.concatenate(inputs), np.concatenate([boundary + d.tolist() for d in ids])
    )
    np.testing.assert_array_equal(
        np.concatenate(targets), np.concatenate([d.tolist() + boundary for d in ids])
    )
    if start_multiple == 1:
        assert all(row["weights"].all() for row in rows[:-1])


@pytest.mark.parametrize("start_multiple", [1, 4])
@pytest.mark.parametrize("row_length", [4, 7, 12])
def test_state_after_any_row_goes_through_json(rng, row_length, start_multiple):
    # Lengths that fill rows exactly too: then no document is open between two rows.
    rows = packed(documents(rng, (3, 11, 0, 4, 30, 6, 6)), row_length, start_multiple)
    expected = list(rows)
    iterator = iter(rows)
    for done in range(len(expected) + 1):
        state = json.loads(json.dumps(iterator.get_state()))
        resumed = iter(rows)
        for _ in range(done % 3):  # wherever the resumed iterator stood before
            next(resumed)
        resumed.set_state(state)
        rest = list(resumed)
        assert len(rest) == len(expected) - done
        for row, wanted in zip(rest, expected[done:], strict=True):
            for name in wanted:
                np.testing.assert_array_equal(row[name], wanted[name])
        next(iterator, None)


def test_state_of_other_documents_is_refused(rng):
    iterator = iter(packed(documents(rng, (40, 40)), 32))
    next(iterator)
    other = iter(packed(documents(rng, (8, 40)), 32))
    with pytest.raises(ValueError, match=r"'done': 32.*must be of the same documents"):
        other.set_state(iterator.get_state())
