"""Batches of a run, for one process of several.

    training     shuffle anew in each epoch -> documents of this process -> tokens -> rows
                 -> shuffle within a window -> batch
    validation   all documents in order -> tokens -> rows -> batch -> rows of this process

Each process trains on documents of its own. In validation every process packs the whole split and
keeps its share of each batch, so the tokens of a batch do not depend on how many processes there
are, and all see equally many batches.
"""

import functools
import itertools
from collections.abc import Iterator

import grain
import numpy as np
from absl import flags

from bmojo_jax.config import DataConfig
from bmojo_jax.data import packing, sources
from bmojo_jax.data.tokenizers import Tokenizer

# Documents are whole files, possibly large: few are read ahead.
_READ = grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)
_BATCHES_AHEAD = 4


def train_iterator(
    source: sources.TextFolder,
    data: DataConfig,
    chunk: int,
    tokenizer: Tokenizer,
    *,
    process_index: int,
    process_count: int,
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
    """Endless training batches of this process: `batch_size / process_count` rows each.

    `source` is that of `sources.open_source(data, "train")`.

    `get_state()` is JSON-able; `set_state()` resumes with exactly the batch that would have come
    next, provided the files, `data`, `chunk` and `process_count` are the same. `close()` ends its
    threads and reader processes.

    Raises:
      ValueError: the folder or the batch cannot be shared out among the processes.
    """
    rows = _rows_per_process(data, process_index, process_count)
    if len(source) < process_count:
        raise ValueError(
            f"data.path={data.path!r}: must hold at least {process_count=} training files, "
            f"it holds {len(source)}"
        )
    documents = grain.MapDataset.source(source).seed(data.seed).shuffle()
    documents = documents[process_index::process_count].repeat()
    packed = grain.experimental.WindowShuffleIterDataset(
        _pack(documents, data, chunk, tokenizer), window_size=data.shuffle_window, seed=data.seed
    )
    batches = packed.batch(rows)
    if data.workers:
        if not flags.FLAGS.is_parsed():  # grain reads its own, or fails in a way that is no help
            raise ValueError(
                f"data.workers={data.workers}: must be 0 unless absl's flags are parsed, by "
                "absl.app.run or, e.g. in a notebook, absl.flags.FLAGS.mark_as_parsed()"
            )
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(data.workers, _BATCHES_AHEAD))
    else:
        batches = grain.experimental.ThreadPrefetchIterDataset(
            batches, prefetch_buffer_size=_BATCHES_AHEAD
        )
    return iter(batches)


def validation_batches(
    source: sources.TextFolder,
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
    every evaluation is on the same files. The last batch is filled up with rows of padding.
    """
    rows = _rows_per_process(data, process_index, process_count)
    documents = grain.MapDataset.source(source)
    batches = _pack(documents, data, chunk, tokenizer).batch(
        data.batch_size,
        batch_fn=functools.partial(grain.experimental.batch_and_pad, batch_size=data.batch_size),
    )
    own = slice(process_index * rows, (process_index + 1) * rows)
    batches = batches.map(lambda batch: {name: batch[name][own] for name in batch})
    return itertools.islice(batches, limit or None)


def _pack(
    documents: grain.MapDataset, data: DataConfig, chunk: int, tokenizer: Tokenizer
) -> grain.IterDataset:
    # Not a nested function: reader processes receive it by pickling.
    tokenize = functools.partial(packing.framed_ids, tokenizer=tokenizer)
    return packing.PackRows(
        documents.map(tokenize).to_iter_dataset(_READ),
        row_length=data.sequence_length,
        start_multiple=chunk if data.document_start == "chunk" else 1,
    )


def _rows_per_process(data: DataConfig, process_index: int, process_count: int) -> int:
    if not 0 <= process_index < process_count:
        raise ValueError(f"{process_index=}: must be in [0, {process_count=})")
    if data.batch_size % process_count:
        raise ValueError(
            f"data.batch_size={data.batch_size}: must be a multiple of {process_count=}"
        )
    return data.batch_size // process_count
