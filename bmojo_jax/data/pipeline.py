"""Batches of a run, in shards that are shared out among the processes.

    training     each source: shuffle anew in each epoch -> documents of a shard -> tokens -> rows;
                 rows of all sources by weight -> shuffle within a window -> rows of a batch
    validation   all documents in order -> tokens -> rows -> batch -> rows of a shard

A training batch is the rows of all shards, each of which reads documents of its own, whoever reads
them: a run goes on with the same batches on fewer processes, or more. In validation every process
packs the whole split and keeps its share of each batch, so the tokens of a batch do not depend on
how many processes there are, and all see equally many batches.

Documents that cannot be used are left out, and counted by reason in the state of the iterator:
`left_out(iterator.get_state())`. It counts what a shard has read, each epoch anew.
"""

import contextlib
import functools
import hashlib
import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, SupportsIndex

import grain
import numpy as np
from absl import flags, logging

from bmojo_jax.config import DataConfig, SourceConfig
from bmojo_jax.data import packing, sources
from bmojo_jax.data.documents import BadDocument, Source
from bmojo_jax.data.mixing import MixRows, ShuffleRows
from bmojo_jax.data.packing import left_out
from bmojo_jax.data.tokenizers import Tokenizer

__all__ = [
    "Batches",
    "ReaderError",
    "fingerprint",
    "left_out",
    "train_iterator",
    "validation_batches",
]

# Documents are whole files, possibly large: few are read ahead.
_READ = grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)
_BATCHES_AHEAD = 4
SLOW_S = 60.0  # after that long without a batch it is said


class ReaderError(RuntimeError):
    """A process that reads documents has ended."""


def train_iterator(
    source: Source,
    data: DataConfig,
    chunk: int,
    tokenizer: Tokenizer,
    *,
    shard: int,
    shards: int,
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
    """Endless training batches of a shard: `batch_size / shards` rows each.

    `source` is that of `sources.open_source(data, "train")`; those of `data.mixed_in` are opened
    here.

    `get_state()` is JSON-able; `set_state()` resumes with exactly the batch that would have come
    next, provided the documents (`fingerprint`), `data`, `chunk` and `shards` are the same.
    `close()` ends its threads and reader processes.

    Raises:
      ValueError: a source or the batch cannot be shared out among the shards.
    """
    row_count = _rows_per_shard(data, shard, shards)
    streams = []
    settings = [data, *data.mixed_in]
    for setting, (name, documents) in zip(settings, _named(source, data), strict=True):
        if len(documents) < shards:
            raise ValueError(
                f"{name}: must hold at least {shards=} training documents or records, "
                f"one for each shard; it holds {len(documents)}"
            )
        shuffled = grain.MapDataset.source(_Tokenized(documents, tokenizer))
        shuffled = shuffled.seed(data.seed).shuffle()[shard::shards].repeat()
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


class Batches:
    """The training batches of a reader: the rows of its shards below each other.

    Example: of 4 shards, reader 1 of 2 has shards 2 and 3.
    """

    def __init__(
        self,
        source: Source,
        data: DataConfig,
        chunk: int,
        tokenizer: Tokenizer,
        *,
        shards: int,
        reader: int,
        readers: int,
    ) -> None:
        """Raises ValueError if the shards cannot be shared out among the readers, or the rows."""
        if shards % readers:
            raise ValueError(
                f"data.shards={shards}: must be a multiple of the number of processes that read "
                f"rows of their own, {readers}"
            )
        self._data = data
        own = range(reader * shards // readers, (reader + 1) * shards // readers)
        with contextlib.ExitStack() as stack:
            self._iterators = {}
            for shard in own:
                iterator = train_iterator(
                    source, data, chunk, tokenizer, shard=shard, shards=shards
                )
                stack.callback(iterator.close)
                self._iterators[shard] = iterator
            self._stack = stack.pop_all()

    def __next__(self) -> dict[str, np.ndarray]:
        """Raises ReaderError if a reader process has ended."""
        with self._told_if_slow():
            try:
                parts = [next(iterator) for iterator in self._iterators.values()]
            except RuntimeError as error:
                if "terminated unexpectedly" not in str(error):  # what a reader itself has raised
                    raise
                raise ReaderError(
                    f"data.workers={self._data.workers}: a reader process has ended: {error}. "
                    "The same command continues from the last checkpoint"
                ) from error
        if len(parts) == 1:
            return parts[0]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    @contextlib.contextmanager
    def _told_if_slow(self) -> Iterator[None]:
        """Warns, again and again, while a batch is waited for."""
        here = threading.Event()

        def tell() -> None:
            waited = 0.0
            while not here.wait(SLOW_S):
                waited += SLOW_S
                logging.warning(
                    "no batch for %.0f s: shards %s of data.path=%r, data.workers=%d",
                    *(waited, list(self._iterators), self._data.path, self._data.workers),
                )

        thread = threading.Thread(target=tell, daemon=True)
        thread.start()
        try:
            yield
        finally:
            here.set()
            thread.join()

    def get_state(self) -> dict[str, Any]:
        """Where each shard of this reader stands, by its number; JSON-able."""
        return {str(n): iterator.get_state() for n, iterator in self._iterators.items()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Resumes with the batch that would have come next; `state` may hold more shards."""
        for n, iterator in self._iterators.items():
            iterator.set_state(state[str(n)])

    def close(self) -> None:
        """Ends its threads and reader processes."""
        self._stack.close()


def validation_batches(
    source: Source,
    data: DataConfig,
    chunk: int,
    tokenizer: Tokenizer,
    *,
    shard: int,
    shards: int,
    limit: int,
) -> Iterator[dict[str, np.ndarray]]:
    """A shard's part of the validation batches: the first `limit`, or all if it is 0.

    `source` is that of `sources.open_source(data, "validation")`, opened once in a run so that
    every evaluation is on the same documents. The last batch is filled up with rows of padding.
    How many documents are left out is logged, once in a run.

    Raises:
      ValueError: the batch cannot be shared out among the shards; there is no batch.
    """
    row_count = _rows_per_shard(data, shard, shards)
    documents = grain.MapDataset.source(_Tokenized(source, tokenizer))
    name = f"validation documents of data.path={data.path!r}"
    rows = _cut(documents, len(source), name, data, data, chunk, tokenizer)
    own = slice(shard * row_count, (shard + 1) * row_count)
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


def _rows_per_shard(data: DataConfig, shard: int, shards: int) -> int:
    if not 0 <= shard < shards:
        raise ValueError(f"{shard=}: must be in [0, {shards=})")
    if data.batch_size % shards:
        raise ValueError(f"data.batch_size={data.batch_size}: must be a multiple of {shards=}")
    return data.batch_size // shards
