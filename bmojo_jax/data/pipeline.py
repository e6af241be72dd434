"""Batches of a run, for one process of several.

    training     each source: shuffle anew in each epoch -> documents of this process -> tokens
                 -> rows; rows of all sources by weight -> shuffle within a window -> batch
    validation   all documents in order -> tokens -> rows -> batch -> rows of this process

Each process trains on documents of its own. In validation every process packs the whole split and
keeps its share of each batch, so the tokens of a batch do not depend on how many processes there
are, and all see equally many batches.

Documents that cannot be used are left out, and counted by reason in the state of the iterator:
`left_out(iterator.get_state())`. It counts what this process has read, each epoch anew.
"""

import functools
import hashlib
import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import SupportsIndex

import grain
import numpy as np
from absl import flags, logging

from bmojo_jax.config import DataConfig, SourceConfig
from bmojo_jax.data import packing, sources
from bmojo_jax.data.documents import BadDocument, Source
from bmojo_jax.data.mixing import MixRows, ShuffleRows
from bmojo_jax.data.packing import left_out
from bmojo_jax.data.tokenizers import Tokenizer

__all__ = ["fingerprint", "left_out", "train_iterator", "validation_batches"]

# Documents are whole files, possibly large: few are read ahead.
_READ = grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)
_BATCHES_AHEAD = 4


def train_iterator(
    source: Source,
    data: DataConfig,
    chunk: int,
    tokenizer: Tokenizer,
    *,
    process_index: int,
    process_count: int,
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
    """Endless training batches of this process: `batch_size / process_count` rows each.

    `source` is that of `sources.open_source(data, "train")`; those of `data.mixed_in` are opened
    here.

    `get_state()` is JSON-able; `set_state()` resumes with exactly the batch that would have come
    next, provided the documents (`fingerprint`), `data`, `chunk` and `process_count` are the same.
    `close()` ends its threads and reader processes.

    Raises:
      ValueError: a source or the batch cannot be shared out among the processes.
    """
    row_count = _rows_per_process(data, process_index, process_count)
    streams = []
    settings = [data, *data.mixed_in]
    for setting, (name, documents) in zip(settings, _named(source, data), strict=True):
        if len(documents) < process_count:
            raise ValueError(
                f"{name}: must hold at least {process_count=} training documents or records, "
                f"one for each process; it holds {len(documents)}"
            )
        shuffled = grain.MapDataset.source(_Tokenized(documents, tokenizer))
        shuffled = shuffled.seed(data.seed).shuffle()[process_index::process_count].repeat()
        streams.append(_cut(shuffled, len(documents), name, setting, data, chunk, tokenizer))
    rows = (
        MixRows(streams, [setting.weight for setting in settings])
        if len(streams) > 1
        else streams[0]
    )
    rows = ShuffleRows(rows, window=data.shuffle_window, seed=data.seed)
    batches = rows.batch(row_count, batch_fn=_lay_out(row_count, data, chunk, tokenizer))
    if data.workers:
        if not flags.FLAGS.is_parsed():  # grain reads its own, or fails in a way that is no help
            raise ValueError(
                f"data.workers={data.workers}: must be 0 unless absl's flags are parsed, by "
                "absl.app.run or, e.g. in a notebook, absl.flags.FLAGS.mark_as_parsed()"
            )
        batches = batches.mp_prefetch(
            grain.MultiprocessingOptions(data.workers, _BATCHES_AHEAD), _outlive_signals
        )
    else:
        batches = grain.experimental.ThreadPrefetchIterDataset(
            batches, prefetch_buffer_size=_BATCHES_AHEAD
        )
    return iter(batches)


def validation_batches(
    source: Source,
    data: DataConfig,
    chunk: int,
    tokenizer: Tokenizer,
    *,
    process_index: int,
    process_count: int,
    limit: int,
) -> Iterator[dict[str, np.ndarray]]:
    """This process's part of the validation batches: the first `limit`, or all if it is 0.

    `source` is that of `sources.open_source(data, "validation")`, opened once in a run so that
    every evaluation is on the same documents. The last batch is filled up with rows of padding.
    How many documents are left out is logged, once in a run.

    Raises:
      ValueError: the batch cannot be shared out among the processes; there is no batch.
    """
    row_count = _rows_per_process(data, process_index, process_count)
    documents = grain.MapDataset.source(_Tokenized(source, tokenizer))
    name = f"validation documents of data.path={data.path!r}"
    rows = _cut(documents, len(source), name, data, data, chunk, tokenizer)
    own = slice(process_index * row_count, (process_index + 1) * row_count)
    lay_out = _lay_out(row_count, data, chunk, tokenizer)
    batches = rows.batch(data.batch_size, batch_fn=lambda rows: lay_out(rows[own]))
    return _counted(iter(batches), name, limit)


def _counted(
    batches: grain.DatasetIterator, name: str, limit: int
) -> Iterator[dict[str, np.ndarray]]:
    batch = None
    try:
        for batch in itertools.islice(batches, limit or None):
            yield batch
        counts = left_out(batches.get_state())
    finally:
        batches.close()
    if batch is None:
        raise ValueError(f"{name}: must be some that can be used; left out: {counts}")
    if counts:
        _log_once(f"{name}: left out {counts}")


@functools.cache
def _log_once(message: str) -> None:
    logging.warning(message)


def fingerprint(source: Source, data: DataConfig) -> str:
    """Changes when the training documents do, those of `data.mixed_in` too."""
    documents = [documents.fingerprint() for _, documents in _named(source, data)]
    return hashlib.sha256("\0".join(documents).encode()).hexdigest()


def _named(source: Source, data: DataConfig) -> list[tuple[str, Source]]:
    """All sources of training documents, each with its name in messages."""
    named = [(f"data.path={data.path!r}", source)]
    if data.mixed_in:
        opened = sources.open_mixed_in(data)
        for i, (setting, documents) in enumerate(zip(data.mixed_in, opened, strict=True)):
            named.append((f"data.mixed_in[{i}].path={setting.path!r}", documents))
    return named


class _Tokenized:
    """The documents of a source as ids between boundaries; a `RandomAccessDataSource` itself."""

    def __init__(self, source: Source, tokenizer: Tokenizer) -> None:
        self._source = source
        self._tokenizer = tokenizer

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: SupportsIndex) -> np.ndarray | BadDocument:
        document = self._source[index]
        if isinstance(document, bytes):
            document = packing.framed_ids(document, tokenizer=self._tokenizer)
        if not isinstance(document, BadDocument) and len(document) < 3:
            return BadDocument(f"document {index.__index__()} of {self._source!r}", "empty")
        return document

    def __repr__(self) -> str:
        return f"tokens of {self._source!r}"


def _cut(
    documents: grain.MapDataset,
    epoch: int,
    name: str,
    setting: SourceConfig,
    data: DataConfig,
    chunk: int,
    tokenizer: Tokenizer,
) -> grain.IterDataset[np.ndarray]:
    return packing.CutRows(
        documents.to_iter_dataset(_READ),
        row_length=data.sequence_length,
        start_multiple=_start_multiple(data, chunk),
        boundary_id=tokenizer.boundary_id,
        # An answer means nothing without what it was asked about.
        documents="whole" if setting.source == "needles" else "cut",
        name=name,
        epoch=epoch,
    )


def _lay_out(
    row_count: int, data: DataConfig, chunk: int, tokenizer: Tokenizer
) -> "functools.partial[dict[str, np.ndarray]]":
    # Not a nested function: reader processes receive it by pickling.
    return functools.partial(
        packing.lay_out,
        row_length=data.sequence_length,
        start_multiple=_start_multiple(data, chunk),
        boundary_id=tokenizer.boundary_id,
        row_count=row_count,
    )


def _start_multiple(data: DataConfig, chunk: int) -> int:
    return chunk if data.document_start == "chunk" else 1


def _outlive_signals(worker: int, workers: int) -> None:
    """Prepares a reader process; it ends when the process that reads from it ends.

    Ctrl-C and some schedulers' SIGTERM go to all processes of a run, but it is the trainer that
    decides when to stop: it may still need a batch before its checkpoint. Readers whose trainer was
    killed would wait for ever.
    """
    del worker, workers
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _rows_per_process(data: DataConfig, process_index: int, process_count: int) -> int:
    if not 0 <= process_index < process_count:
        raise ValueError(f"{process_index=}: must be in [0, {process_count=})")
    if data.batch_size % process_count:
        raise ValueError(
            f"data.batch_size={data.batch_size}: must be a multiple of {process_count=}"
        )
    return data.batch_size // process_count
