"""Batches: deterministic, shuffled, shared out by process, resumable bit by bit."""

import dataclasses
import itertools
import json
import logging
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from absl import flags

from bmojo_jax.config import DataConfig, SourceConfig
from bmojo_jax.data import packing, pipeline, sources
from bmojo_jax.data.documents import BadDocument
from bmojo_jax.data.tokenizers import ByteTokenizer

CHUNK = 4


@pytest.fixture
def parsed_flags():
    """What absl.app.run does for the entry points."""
    flags.FLAGS.mark_as_parsed()
    yield
    flags.FLAGS.unparse_flags()


@pytest.fixture
def folder(tmp_path, rng):
    """23 files of random letters, each beginning with a sign of its own; one empty, one long."""
    for n in range(23):
        size = 300 if n == 7 else rng.integers(1, 30)
        content = bytes([32 + n]) + rng.integers(64, 127, size, np.uint8).tobytes()
        (tmp_path / f"{n}.txt").write_bytes(content)
    (tmp_path / "empty.txt").write_bytes(b"")
    return tmp_path


def config(folder, **settings):
    """Rows in the order of their documents, unless the window says otherwise."""
    settings = {"shuffle_window": 1} | settings
    settings = {"sequence_length": 16, "batch_size": 4, "validation_fraction": 0.3, **settings}
    return DataConfig(path=str(folder), **settings)


def train(data, index=0, count=1):
    source = sources.open_source(data, "train")
    return pipeline.train_iterator(source, data, CHUNK, ByteTokenizer(), shard=index, shards=count)


def validation(data, index=0, count=1, limit=0):
    return list(
        pipeline.validation_batches(
            sources.open_source(data, "validation"),
            data,
            CHUNK,
            ByteTokenizer(),
            shard=index,
            shards=count,
            limit=limit,
        )
    )


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_same(batches, expected):
    assert len(batches) == len(expected)
    for batch, wanted in zip(batches, expected, strict=True):
        assert batch.keys() == wanted.keys()
        for name in wanted:
            np.testing.assert_array_equal(batch[name], wanted[name])


def documents_of(batches):
    """Documents in the order of the rows; the last is dropped where it is not complete."""
    targets = np.concatenate([b["targets"][b["weights"] > 0] for b in batches])
    parts = np.split(targets, np.flatnonzero(targets == 256) + 1)
    return [bytes(part[:-1].tolist()) for part in parts[:-1]]


@pytest.mark.parametrize("document_start", ["anywhere", "chunk"])
def test_an_epoch_is_all_documents_and_the_next_another_order(folder, document_start):
    data = config(folder, document_start=document_start)
    iterator = train(data)
    documents = documents_of(take(iterator, 60))
    iterator.close()
    wanted = sources.read_split(data, "train")
    size = len(wanted)
    assert len(documents) >= 3 * size
    epochs = [documents[start : start + size] for start in range(0, 3 * size, size)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(wanted)
        assert epoch != wanted
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_batches_follow_the_contract(folder):
    data = config(folder, document_start="chunk")
    iterator = train(data)
    for batch in take(iterator, 5):
        assert batch.keys() == {"inputs", "targets", "weights", "segment_ids", "positions"}
        for name, values_BL in batch.items():
            assert type(values_BL) is np.ndarray
            assert values_BL.shape == (4, 16)
            assert values_BL.dtype == (np.float32 if name == "weights" else np.int32)
        starts_BL = (batch["positions"] == 0) & (batch["segment_ids"] > 0)
        assert starts_BL.any() and not (np.nonzero(starts_BL)[1] % CHUNK).any()
    iterator.close()


def test_same_seed_same_batches_other_seed_others(folder):
    iterators = [train(config(folder, seed=seed)) for seed in (3, 3, 4)]
    first, again, other = (take(iterator, 10) for iterator in iterators)
    for iterator in iterators:
        iterator.close()
    assert_same(again, first)
    assert any((a["inputs"] != b["inputs"]).any() for a, b in zip(first, other, strict=True))


def test_processes_share_out_each_epoch(folder):
    data = config(folder)
    wanted = sources.read_split(data, "train")
    seen = []
    for index in range(2):
        iterator = train(data, index, 2)
        batches = take(iterator, 60)
        iterator.close()
        assert batches[0]["inputs"].shape == (2, 16)
        own = len(wanted[index::2])
        documents = documents_of(batches)
        seen.append([documents[start : start + own] for start in range(0, 2 * own, own)])
    for epoch in zip(*seen, strict=True):
        assert sorted(epoch[0] + epoch[1]) == sorted(wanted)
    assert set(seen[0][0]) != set(seen[0][1])  # shared out anew in each epoch


def check_resume(data, points, count=1):
    iterator = train(data, count - 1, count)
    states, batches = [iterator.get_state()], []
    for _ in range(max(points) + 6):
        batches.append(next(iterator))
        states.append(iterator.get_state())
    # In place, with batches read ahead that must not be kept.
    iterator.set_state(json.loads(json.dumps(states[2])))
    assert_same(take(iterator, 3), batches[2:5])
    iterator.close()
    for point in points:
        resumed = train(data, count - 1, count)
        resumed.set_state(json.loads(json.dumps(states[point])))
        assert json.loads(json.dumps(resumed.get_state())) == json.loads(json.dumps(states[point]))
        assert_same(take(resumed, 6), batches[point : point + 6])
        resumed.close()


@pytest.mark.parametrize("document_start", ["anywhere", "chunk"])
@pytest.mark.parametrize("count", [1, 2])
def test_resume_is_exact(folder, document_start, count):
    check_resume(config(folder, document_start=document_start), (0, 1, 2, 7, 25), count)


@pytest.mark.parametrize("window", [3, 7, 64])
def test_resume_is_exact_in_a_shuffled_window(folder, window):
    check_resume(config(folder, shuffle_window=window), (0, 1, 2, 7, 25))


def test_rows_are_shuffled_within_a_window(folder):
    def rows(window):
        iterator = train(config(folder, shuffle_window=window))
        batches = take(iterator, 8)
        iterator.close()
        return [row.tobytes() for batch in batches for row in batch["inputs"]]

    in_order, shuffled = rows(1), rows(8)
    assert in_order != shuffled
    for first in range(0, 32, 8):
        assert sorted(in_order[first : first + 8]) == sorted(shuffled[first : first + 8])


@pytest.mark.slow
@pytest.mark.usefixtures("parsed_flags")
@pytest.mark.parametrize("workers", [1, 2])
def test_resume_is_exact_with_reader_processes(folder, workers):
    check_resume(config(folder, workers=workers), (0, 3))


@pytest.mark.slow
@pytest.mark.usefixtures("parsed_flags")
def test_reader_processes_share_out_each_epoch(folder):
    data = config(folder, workers=2)
    iterator = train(data)
    batches = take(iterator, 80)
    iterator.close()
    wanted = sources.read_split(data, "train")
    size = len(wanted) - len(wanted) % 2
    # Batches come from the readers in turn, and each reader has every second document.
    own = [documents_of(batches[reader::2]) for reader in range(2)]
    mixed = [document for pair in zip(*own, strict=False) for document in pair]
    assert len(set(mixed[:size])) == size
    assert set(mixed) == set(wanted)


def test_validation_is_every_byte_in_order_and_then_padding(folder):
    data = config(folder)
    batches = validation(data)
    assert documents_of(batches) == sources.read_split(data, "validation")
    assert_same(validation(data), batches)
    assert_same(validation(data, limit=2), batches[:2])
    assert all(batch["inputs"].shape == (4, 16) for batch in batches)
    used = np.concatenate([batch["weights"].any(axis=1) for batch in batches])
    assert not used.all() and used[: used.sum()].all()
    last = {name: values_BL[~used[-4:]] for name, values_BL in batches[-1].items()}
    assert all(not values_BL.any() for values_BL in last.values())
    for batch in batches:
        np.testing.assert_array_equal(batch["weights"], batch["segment_ids"] > 0)


def test_validation_is_the_same_for_any_number_of_processes(folder):
    data = config(folder)
    parts = [validation(data, index, 4) for index in range(4)]
    together = [
        {name: np.concatenate([part[name] for part in step]) for name in step[0]}
        for step in zip(*parts, strict=True)
    ]
    assert_same(together, validation(data))


def test_shards_may_be_read_by_any_number_of_readers(folder):
    data = config(folder, batch_size=4, document_start="chunk")

    def readers(count):
        source = sources.open_source(data, "train")
        return [
            pipeline.Batches(
                source, data, CHUNK, ByteTokenizer(), shards=4, reader=i, readers=count
            )
            for i in range(count)
        ]

    def together(some):
        parts = [next(batches) for batches in some]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    one, two, four = readers(1), readers(2), readers(4)
    for _ in range(3):
        wanted = together(one)
        assert wanted["inputs"].shape[0] == 4
        for others in (two, four):
            got = together(others)
            assert all((got[name] == wanted[name]).all() for name in wanted)
    # Those of two readers together are where one reader, or four, go on.
    state = json.loads(json.dumps(two[0].get_state() | two[1].get_state()))
    assert set(state) == set("0123")
    wanted = together(two)
    for count in (1, 4):
        again = readers(count)
        for batches in again:
            batches.set_state(state)
        got = together(again)
        assert all((got[name] == wanted[name]).all() for name in wanted)
        for batches in again:
            batches.close()
    for batches in (*one, *two, *four):
        batches.close()
    with pytest.raises(ValueError, match=r"data\.shards=4: must be a multiple of .* own, 3"):
        readers(3)


def _of_one_reader(data):
    source = sources.open_source(data, "train")
    return pipeline.Batches(source, data, CHUNK, ByteTokenizer(), shards=1, reader=0, readers=1)


def test_slow_batches_are_told(folder, monkeypatch, caplog):
    monkeypatch.setattr(pipeline, "SLOW_S", 0.05)
    data = config(folder)
    batches = _of_one_reader(data)

    class Slow:
        def __next__(self):
            time.sleep(0.4)
            return {}

    batches._iterators[0] = Slow()
    with caplog.at_level("WARNING"):
        next(batches)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) >= 2
    assert re.match(
        r"no batch for 0 s: shards \[0\] of data\.path=.*, data\.workers=0", messages[0]
    )
    batches.close()


def test_errors_name_the_setting(folder):
    with pytest.raises(ValueError, match=r"data\.batch_size=4: must be a multiple of shards=3"):
        train(config(folder), 0, 3)
    with pytest.raises(ValueError, match=r"data\.batch_size=4: must be a multiple of shards=3"):
        validation(config(folder), 0, 3)
    with pytest.raises(ValueError, match=r"shard=2: must be in \[0, shards=2\)"):
        train(config(folder), 2, 2)
    with pytest.raises(ValueError, match=r"at least shards=32 training doc.* it holds 1"):
        train(config(folder, batch_size=32), 0, 32)
    with pytest.raises(ValueError, match=r"data\.workers=2: must be 0 unless absl's flags are"):
        train(config(folder, workers=2))
    with pytest.raises(ValueError, match=r"data\.path=''"):
        validation(DataConfig())


class Documents:
    """A source of what it is given."""

    def __init__(self, documents):
        self.documents = documents

    def __len__(self):
        return len(self.documents)

    def __getitem__(self, index):
        return self.documents[index]

    def fingerprint(self):
        return repr(self.documents)

    def __repr__(self):
        return "Documents"


@pytest.fixture
def mixture(folder, monkeypatch):
    """The folder, and documents of nothing but bytes 40 and of nothing but bytes 50."""
    added = [
        Documents([bytes([40]) * n for n in range(1, 12)]),
        Documents([b"2" * n for n in range(3, 9)] + [BadDocument("bad", "unreadable")]),
    ]
    monkeypatch.setattr(sources, "open_mixed_in", lambda data: added)
    sources_of = (SourceConfig(path="a", weight=1.5), SourceConfig(path="b", weight=0.5))
    return config(folder, weight=4.0, mixed_in=sources_of)


def rows_of(batches):
    return [row for batch in batches for row in batch["inputs"]]


def is_of(row, byte):
    return bool(np.isin(row, [byte, 256]).all())


def test_sources_are_mixed_by_weight(mixture):
    iterator = train(mixture)
    rows = rows_of(take(iterator, 60))
    iterator.close()
    counts = {byte: sum(is_of(row, byte) for row in rows) for byte in (40, 50)}
    assert counts == {40: 60, 50: 20}  # of 240: 1.5 and 0.5 of 6
    alone = train(dataclasses.replace(mixture, mixed_in=()))
    main = [row for row in rows if not is_of(row, 40) and not is_of(row, 50)]
    np.testing.assert_array_equal(main, rows_of(take(alone, 40)))  # 160 rows
    alone.close()


def test_every_mixed_source_is_shared_out_and_shuffled_in_each_epoch(mixture):
    seen = []
    for index in range(2):
        iterator = train(mixture, index, 2)
        rows = [row for row in rows_of(take(iterator, 120)) if is_of(row, 40)]
        iterator.close()
        lengths = np.diff(np.flatnonzero(np.concatenate(rows) == 256)) - 1
        seen.append([lengths[first : first + 6 - index] for first in (0, 6 - index)])
    for epoch in range(2):
        both = np.concatenate([lengths[epoch] for lengths in seen])
        assert sorted(both) == list(range(1, 12))
    assert list(seen[0][0]) != list(seen[0][1])


def test_resume_of_a_mixture_is_exact(mixture):
    for window in (1, 7):
        check_resume(dataclasses.replace(mixture, shuffle_window=window), (0, 1, 7, 20))


def test_too_few_documents_of_a_mixed_source_for_the_processes(mixture):
    data = dataclasses.replace(mixture, batch_size=8)
    with pytest.raises(ValueError, match=r"data\.mixed_in\[1\]\.path='b'.*=8 .* it holds 7"):
        train(data, 0, 8)


def test_the_fingerprint_is_of_all_sources(mixture, folder):
    source = sources.open_source(mixture, "train")
    whole = pipeline.fingerprint(source, mixture)
    assert whole == pipeline.fingerprint(source, mixture)
    assert whole != pipeline.fingerprint(source, dataclasses.replace(mixture, mixed_in=()))
    sources.open_mixed_in(mixture)[1].documents.append(b"new")
    assert whole != pipeline.fingerprint(source, mixture)


def with_bad_ones(rng):
    documents = [rng.integers(0, 256, 20, np.uint8).tobytes() for _ in range(12)]
    documents[3] = BadDocument("c.txt", "not UTF-8")
    documents[7] = BadDocument("g.txt", "unreadable")
    documents[8] = b""
    return Documents(documents)


def count_documents(data, source, batches):
    iterator = pipeline.train_iterator(source, data, CHUNK, ByteTokenizer(), shard=0, shards=1)
    seen = []
    for _ in range(batches):
        next(iterator)
        seen.append(pipeline.left_out(json.loads(json.dumps(iterator.get_state()))))
    state = iterator.get_state()
    iterator.set_state(state)
    assert pipeline.left_out(iterator.get_state()) == seen[-1]
    iterator.close()
    return seen


def test_bad_documents_are_counted_in_the_state(rng):
    # 9 documents of 21 targets in an epoch: 12 rows of 16 and a bit, 3 batches.
    data = DataConfig(sequence_length=16, batch_size=4, shuffle_window=5)
    seen = count_documents(data, with_bad_ones(rng), 30)
    assert seen[-1].keys() == {"empty", "not UTF-8", "unreadable"}
    # Read so far are the rows given out and the window: 125 rows, 10.6 epochs.
    assert all(10 <= count <= 11 for count in seen[-1].values())
    for earlier, later in itertools.pairwise(seen):
        assert all(later[reason] >= count for reason, count in earlier.items())


@pytest.mark.slow
@pytest.mark.usefixtures("parsed_flags")
def test_bad_documents_are_counted_in_reader_processes(rng):
    data = DataConfig(sequence_length=16, batch_size=4, shuffle_window=5, workers=2)
    seen = count_documents(data, with_bad_ones(rng), 30)
    # Each reader has every second document: together an epoch of rows is what it was.
    assert all(10 <= count <= 12 for count in seen[-1].values())


def test_bad_documents_of_the_validation_split_are_told_once(rng, caplog):
    for log in (pipeline._log_once, packing._warn_once):
        log.cache_clear()
    data = DataConfig(sequence_length=16, batch_size=4)
    source = with_bad_ones(rng)

    def run():
        batches = pipeline.validation_batches(
            source, data, CHUNK, ByteTokenizer(), shard=0, shards=1, limit=0
        )
        return documents_of(batches)

    good = [document for document in source.documents if isinstance(document, bytes) and document]
    with caplog.at_level(logging.WARNING):
        assert run() == run() == good
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        "c.txt: left out (not UTF-8)",
        "g.txt: left out (unreadable)",
        "document 8 of Documents: left out (empty)",
        "validation documents of data.path='': left out "
        "{'empty': 1, 'not UTF-8': 1, 'unreadable': 1}",
    ]
    source.documents = [b"", BadDocument("x", "unreadable")]
    with pytest.raises(ValueError, match=r"must be some that can be used; left out: \{'empty': 1"):
        run()


@pytest.mark.slow
@pytest.mark.usefixtures("parsed_flags")
def test_a_dead_reader_process_is_told(folder):
    data = config(folder, workers=1)
    before = set(multiprocessing.active_children())
    batches = _of_one_reader(data)
    next(batches)
    (reader,) = set(multiprocessing.active_children()) - before
    os.kill(reader.pid, signal.SIGKILL)
    with pytest.raises(
        pipeline.ReaderError, match=r"data\.workers=1: a reader .* code -9.*same com"
    ):
        for _ in range(50):
            next(batches)
    batches.close()


@pytest.mark.slow
@pytest.mark.usefixtures("parsed_flags")
def test_reader_processes_outlive_ctrl_c(folder):
    data = config(folder, workers=2)
    undisturbed = train(data)
    expected = take(undisturbed, 40)
    undisturbed.close()
    iterator = train(data)
    first = take(iterator, 2)
    readers = multiprocessing.active_children()
    assert len(readers) == 2
    for number in (signal.SIGINT, signal.SIGTERM):
        for reader in readers:
            os.kill(reader.pid, number)
    time.sleep(1)
    assert_same(first + take(iterator, 38), expected)  # more than had been read ahead
    assert multiprocessing.active_children() == readers
    iterator.close()
    assert not multiprocessing.active_children()


KILLED = """
import multiprocessing, os, signal, sys
from absl import flags
from bmojo_jax.config import DataConfig
from bmojo_jax.data import pipeline, sources
from bmojo_jax.data.tokenizers import ByteTokenizer

if __name__ == "__main__":
    flags.FLAGS.mark_as_parsed()
    data = DataConfig(path=sys.argv[1], sequence_length=16, batch_size=4, workers=2)
    iterator = pipeline.train_iterator(
        sources.open_source(data, "train"), data, 4, ByteTokenizer(),
        shard=0, shards=1,
    )
    next(iterator), next(iterator)
    print(*[reader.pid for reader in multiprocessing.active_children()], flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_reader_processes_end_with_the_one_that_reads(folder, tmp_path_factory):
    script = tmp_path_factory.mktemp("script") / "killed.py"
    script.write_text(KILLED)
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    process = subprocess.Popen(
        [sys.executable, str(script), str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        text=True,
    )
    readers = [int(pid) for pid in process.stdout.readline().split()]
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    assert len(readers) == 2
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and any(map(is_running, readers)):
        time.sleep(0.2)
    assert not any(map(is_running, readers))


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    try:  # ended, but nobody has asked for its exit status
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
