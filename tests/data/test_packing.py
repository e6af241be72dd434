"""Packing: nothing lost, nothing twice, everything in its place, resumable after any row."""

import functools
import json
import logging

import grain
import numpy as np
import pytest

from bmojo_jax.data import packing
from bmojo_jax.data.documents import BadDocument
from bmojo_jax.data.tokenizers import ByteTokenizer

BOUNDARY = 256
LENGTHS = (3, 5, 6, 1, 40, 11, 2)


def documents(rng, lengths=LENGTHS):
    return [rng.integers(0, 256, n, np.uint8) for n in lengths]


def framed(ids):
    return packing.framed_ids(bytes(ids.tolist()), tokenizer=ByteTokenizer())


def together(ids):
    """Several documents in one array: | d0.. | e0.. |."""
    return np.concatenate([framed(d)[:-1] for d in ids] + [[BOUNDARY]]).astype(np.int32)


def cut(elements, row_length, start_multiple=1, repeat=False, documents="cut"):
    parent = grain.MapDataset.source(elements)
    return packing.CutRows(
        (parent.repeat() if repeat else parent).to_iter_dataset(),
        row_length=row_length,
        start_multiple=start_multiple,
        boundary_id=BOUNDARY,
        documents=documents,
        name="these",
        epoch=len(elements),
    )


def lay_out(rows, row_length, start_multiple, row_count):
    return packing.lay_out(
        rows,
        row_length=row_length,
        start_multiple=start_multiple,
        boundary_id=BOUNDARY,
        row_count=row_count,
    )


def packed(elements, row_length, start_multiple=1):
    """Rows of a batch, each laid out on its own."""
    layout = functools.partial(
        lay_out, row_length=row_length, start_multiple=start_multiple, row_count=1
    )
    rows = cut(elements, row_length, start_multiple).map(lambda row: layout([row]))
    return rows.map(lambda batch: {name: batch[name][0] for name in batch})


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
    rows = list(packed([framed(d) for d in ids], 6, start_multiple))
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
@pytest.mark.parametrize("form", ["one by one", "together", "in twos"])
def test_every_token_is_a_target_once(rng, row_length, start_multiple, form):
    ids = documents(rng)
    size = {"one by one": 1, "together": len(ids), "in twos": 2}[form]
    elements = [together(ids[first : first + size]) for first in range(0, len(ids), size)]
    rows = list(packed(elements, row_length, start_multiple))
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
    ids = documents(rng, (3, 11, 1, 4, 30, 6, 6))
    bad = BadDocument("b", "unreadable")
    elements = [bad, framed(ids[0]), bad, together(ids[1:3]), together(ids[3:5]), bad]
    rows = packed([*elements, *map(framed, ids[5:])], row_length, start_multiple)
    expected = list(rows)
    iterator = iter(rows)
    for done in range(len(expected) + 1):
        state = json.loads(json.dumps(iterator.get_state()))
        resumed = iter(rows)
        for _ in range(done % 3):  # wherever the resumed iterator stood before
            next(resumed)
        resumed.set_state(state)
        assert json.loads(json.dumps(resumed.get_state())) == state
        rest = list(resumed)
        assert len(rest) == len(expected) - done
        for row, wanted in zip(rest, expected[done:], strict=True):
            for name in wanted:
                np.testing.assert_array_equal(row[name], wanted[name])
        next(iterator, None)


def test_state_of_other_documents_is_refused(rng):
    iterator = iter(cut([framed(d) for d in documents(rng, (40, 40))], 32))
    next(iterator)
    other = iter(cut([framed(d) for d in documents(rng, (8, 40))], 32))
    with pytest.raises(ValueError, match=r"'done': 32.*must be of the same documents"):
        other.set_state(iterator.get_state())


@pytest.mark.parametrize("start_multiple", [1, 4])
def test_a_batch_is_its_rows_and_then_padding(rng, start_multiple):
    elements = [together(documents(rng)) for _ in range(5)]
    rows = list(packed(elements, 16, start_multiple))
    batch = lay_out(list(cut(elements, 16, start_multiple)), 16, start_multiple, len(rows) + 2)
    for name, values_BL in batch.items():
        np.testing.assert_array_equal(values_BL[:-2], np.stack([row[name] for row in rows]))
        assert not values_BL[-2:].any()
    empty = lay_out([], 16, start_multiple, 2)
    assert all(v.shape == (2, 16) and not v.any() for v in empty.values())


def test_bad_documents_are_left_out_counted_and_the_first_named(rng, caplog):
    packing._warn_once.cache_clear()
    good = [framed(d) for d in documents(rng)]
    bad = [BadDocument(f"x{n}.txt", "not UTF-8") for n in range(8)]
    elements = [bad[0], good[0], *bad[1:], BadDocument("y.txt", "empty"), *good[1:]]
    iterator = iter(cut(elements, 4))
    with caplog.at_level(logging.WARNING):
        first = next(iterator)
        assert packing.left_out(iterator.get_state()) == {"not UTF-8": 1}
        rows = [first, *iterator]
    for row, wanted in zip(rows, cut(good, 4), strict=True):
        np.testing.assert_array_equal(row, wanted)
    assert packing.left_out(iterator.get_state()) == {"empty": 1, "not UTF-8": 8}
    named = [f"x{n}.txt" for n in range(5)] + ["y.txt"]
    assert [record.getMessage().split(":")[0] for record in caplog.records] == named
    assert caplog.records[4].getMessage() == (
        "x4.txt: left out (not UTF-8); further ones are counted only"
    )


def test_nothing_but_bad_documents_ends_and_says_so():
    iterator = iter(cut([BadDocument("x", "empty")] * 3, 4, repeat=True))
    with pytest.raises(ValueError, match=r"these: must hold .* last 1003 can: \{'empty': 1003\}"):
        next(iterator)


@pytest.mark.parametrize("wrong", [[1, 2, BOUNDARY], [BOUNDARY, 1, 2], [BOUNDARY, BOUNDARY]])
def test_documents_without_boundaries_are_refused(wrong):
    with pytest.raises(ValueError, match=r"these: ids .* must be documents between boundaries"):
        next(iter(cut([np.array(wrong, np.int32)], 4)))


def test_counts_are_found_wherever_they_are_nested():
    inner = {"parent": {"next_index": 3}, "left_out": {"empty": 2}}
    window = {"parent": inner, "place": 1, "left_out": {"empty": 5, "not UTF-8": 1}}
    state = {"states": [window, {"state": inner}, None], "exhausted": [0, 0]}
    assert packing.left_out(state) == {"empty": 7, "not UTF-8": 1}
    assert packing.left_out({}) == {}


@pytest.mark.parametrize("start_multiple", [1, 4])
def test_whole_documents_are_cut_only_if_longer_than_a_row(rng, start_multiple):
    lengths = (3, 5, 6, 1, 40, 11, 2, 7, 15, 15, 14)
    texts = documents(rng, lengths)
    dataset = cut([framed(d) for d in texts], 16, start_multiple, documents="whole")
    iterator, rows, states = iter(dataset), [], []
    while True:
        states.append(json.loads(json.dumps(iterator.get_state())))
        try:
            rows.append(next(iterator))
        except StopIteration:
            break
    together = np.concatenate([rows[0], *(row[1:] for row in rows[1:])])
    np.testing.assert_array_equal(
        together, np.concatenate([framed(d)[:-1] for d in texts] + [[256]])
    )
    whole = [row for row in rows if row[0] == BOUNDARY and row[-1] == BOUNDARY]
    assert len(rows) - len(whole) == 3  # the pieces of the long one
    for n, state in enumerate(states[:-1]):
        again = iter(cut([framed(d) for d in texts], 16, start_multiple, documents="whole"))
        again.set_state(state)
        np.testing.assert_array_equal(next(again), rows[n])
