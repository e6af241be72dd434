"""The loss of many windows of documents, each read from a fresh state, in few device calls.

A window feeds tokens start .. start + length - 1 of a document and predicts start + 1 ..
start + length. Windows of any lengths are packed into rows, each at a multiple of the model's chunk
and at position 0 there, which makes its result what it is alone. Two forms read the rows:

    whole    all tokens of a row at once, as in training
    stream   piece by piece through the recurrent form, `LanguageModel.extend`

The whole form's memory grows with the length of its rows; the stream's does not, save for full
attention, whose ring of keys has room for the longest window. Either is compiled once for all
windows that it reads, the whole form once more for each length beyond that of its common rows.

`auto` is whole up to the training length and streams beyond. On one H100, bfloat16, vocabulary
8,192, compilation included, a bmojo of 30m read 524,288 tokens in

    windows of 2,048    whole, 64 rows 6.9 s    stream, 93 rows 8.6 s
    windows of 8,192    whole, 16 rows 8.7 s    stream at 180,000 tokens/s once it is compiled

since the scan takes its steps one after another: few long rows leave a GPU idle. Full attention
has no constant memory to stream through, and is whole at any length (rows of 32,768: some 0.5 s
each, their cost is quadratic).

Dtype: the model's; losses leave the device in float32 (float64 in a float64 model).
"""

import functools
import heapq
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import jax
import numpy as np
import tqdm
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from bmojo_jax import losses, model, sharding
from bmojo_jax.cache import AttentionCache, BmojoCache, Cache, empty_cache, longest_piece
from bmojo_jax.checkpoint import Trained
from bmojo_jax.config import ModelConfig
from bmojo_jax.evaluate.validation import rows_together
from bmojo_jax.layers import at_least_float32

Form = Literal["auto", "whole", "stream"]
FORMS: tuple[Form, ...] = ("auto", "whole", "stream")

# Windows of up to so many times the training length share the rows of the whole form: what full
# attention wastes on longer ones costs more than another compilation.
_COMMON_LENGTHS = 4
# Tokens of a device call.
_WHOLE_TOKENS = 131_072
_STREAM_TOKENS = 32_768
_STREAM_BYTES = 8 * 2**30  # of caches and attention logits
_IN_FLIGHT = 4  # device calls whose results are not fetched yet


class Window(NamedTuple):
    document: int
    start: int
    length: int


class _Place(NamedTuple):
    """Where a window lies in packed rows."""

    window: int
    row: int
    column: int


class _Call(NamedTuple):
    """What a device call has computed: losses of these rows and columns."""

    rows: slice
    columns: slice
    nll_BL: Array


class _Job(NamedTuple):
    """Rows that one compiled function reads."""

    form: Literal["whole", "stream"]
    longest: int  # window
    rows: int  # of a device call
    length: int  # of the rows; all are read at once (whole) or piece by piece (stream)
    places: list[_Place]


def window_nll(
    trained: Trained,
    documents: Sequence[np.ndarray],
    windows: Sequence[Window],
    *,
    mesh: Mesh,
    form: Form = "auto",
    rows: int | None = None,
) -> list[Float[np.ndarray, " L"]]:
    """The nll of every target of every window, in nats.

    Args:
      trained: its parameters are placed on `mesh`.
      documents: ids; a window needs length + 1 of them from its start on.
      form: "auto": whole up to the training length, beyond that a stream unless the model has full
        attention.
      rows: of a device call, over all devices; None: as many as give it some 10^5 tokens.

    Raises:
      ValueError: an unknown form, rows that the devices do not divide, or a window that leaves its
        document.
    """
    if form not in FORMS:
        raise ValueError(f"form={form!r}: must be one of {FORMS}")
    unit = rows_together(mesh)
    if rows is not None and (rows < 1 or rows % unit):
        raise ValueError(f"{rows=}: must be a positive multiple of {unit}, for the devices")
    for window in windows:
        ids = len(documents[window.document])
        if window.length < 1 or not 0 <= window.start < ids - window.length:
            raise ValueError(f"{window}: must lie in its document of {ids} ids")
    jobs = _jobs(trained, windows, form=form, rows=rows, unit=unit)
    dtype = at_least_float32(trained.config.model.compute_dtype)
    result = [np.zeros(window.length, dtype) for window in windows]
    total = sum(_padded_rows(job) * job.length for job in jobs)
    with (
        jax.set_mesh(mesh),
        tqdm.tqdm(
            total=total, unit="token", unit_scale=True, desc="reading", mininterval=1, disable=None
        ) as progress,
    ):
        for job in jobs:
            batch = _batch(job, documents, windows)
            nll_BL = np.zeros(batch["inputs"].shape, dtype)
            read = _whole if job.form == "whole" else _stream
            pending: deque[_Call] = deque()
            for call in read(trained, job, batch, mesh):
                pending.append(call)
                # Fetched late, so that the device always has some to work on.
                if len(pending) == _IN_FLIGHT:
                    _fetch(pending.popleft(), nll_BL, progress)
            while pending:
                _fetch(pending.popleft(), nll_BL, progress)
            for place in job.places:
                own = result[place.window]
                own[:] = nll_BL[place.row, place.column : place.column + len(own)]
    return result


def _fetch(call: _Call, nll_BL: np.ndarray, progress: tqdm.tqdm) -> None:
    nll_BL[call.rows, call.columns] = np.asarray(call.nll_BL)
    progress.update(call.nll_BL.size)


def _jobs(
    trained: Trained, windows: Sequence[Window], *, form: Form, rows: int | None, unit: int
) -> list[_Job]:
    """Which form reads which windows, and where they lie."""
    config = trained.config.model
    trained_on = trained.config.data.sequence_length
    grows = any(block.mixer == "attention" for block in config.blocks)
    lengths = [window.length for window in windows]
    if form == "stream" or (form == "auto" and not grows):
        streamed = [form == "stream" or length > trained_on for length in lengths]
    else:
        streamed = [False] * len(windows)
    limit = _COMMON_LENGTHS * trained_on
    whole = [n for n, stream in zip(lengths, streamed, strict=True) if not stream and n <= limit]
    common = max(whole, default=0)
    groups: dict[tuple[Literal["whole", "stream"], int], list[int]] = {}
    for i, length in enumerate(lengths):
        key = ("stream", 0) if streamed[i] else ("whole", max(length, common))
        groups.setdefault(key, []).append(i)
    jobs = []
    for (kind, length), members in sorted(groups.items(), reverse=True):
        longest = max(lengths[i] for i in members)
        sizes = {i: _up(lengths[i], config.chunk) for i in members}
        # Longest first: what is left to fill up then is short.
        members = sorted(members, key=lambda i: (-sizes[i], i))
        if kind == "whole":
            length = _up(length, config.chunk)
            places = _fill(members, sizes, length)
            most = min(_WHOLE_TOKENS // length, places[-1].row + 1)
            together = rows or _up(max(most, 1), unit)
        else:
            most = min(_STREAM_TOKENS // longest_piece(config), len(members))
            most = min(most, _STREAM_BYTES // _stream_bytes(config, longest))
            together = rows or _up(max(most, 1), unit)
            places = _level(members, sizes, together)
            end = max(place.column + sizes[place.window] for place in places)
            length = _up(end, longest_piece(config))
        jobs.append(_Job(kind, longest, together, length, places))
    return jobs


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _fill(members: Sequence[int], sizes: dict[int, int], length: int) -> list[_Place]:
    """One window after another into rows of `length`."""
    places, row, column = [], 0, 0
    for i in members:
        if column + sizes[i] > length:
            row, column = row + 1, 0
        places.append(_Place(i, row, column))
        column += sizes[i]
    return places


def _level(members: Sequence[int], sizes: dict[int, int], rows: int) -> list[_Place]:
    """Every window into the row that is the shortest so far."""
    ends = [(0, row) for row in range(rows)]
    places = []
    for i in members:
        column, row = heapq.heappop(ends)
        places.append(_Place(i, row, column))
        heapq.heappush(ends, (column + sizes[i], row))
    return places


def _stream_bytes(config: ModelConfig, longest: int) -> int:
    """About what a row of a stream takes: its cache, and one layer's logits a few times."""
    piece = longest_piece(config)
    cache = jax.eval_shape(lambda: empty_cache(config, 1, max_length=longest + piece))
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    keys = 0
    for layer in cache.layers[0]:
        attention = layer.attention if isinstance(layer, BmojoCache) else layer
        if isinstance(attention, AttentionCache):
            rings = [ring for ring in (attention.window, attention.fading) if ring is not None]
            keys = max(keys, sum(ring.k_BRGK.shape[1] for ring in rings))
    return held + 4 * 4 * config.num_heads * piece * keys


def _padded_rows(job: _Job) -> int:
    return _up(max(place.row for place in job.places) + 1, job.rows)


def _batch(
    job: _Job, documents: Sequence[np.ndarray], windows: Sequence[Window]
) -> dict[str, np.ndarray]:
    """The rows of a job. Padding is 0: tokens that are documents of their own."""
    shape = (_padded_rows(job), job.length)
    batch = {name: np.zeros(shape, np.int32) for name in ("inputs", "targets", "positions")}
    for place in job.places:
        document, start, length = windows[place.window]
        columns = slice(place.column, place.column + length)
        ids = documents[document][start : start + length + 1]
        batch["inputs"][place.row, columns] = ids[:-1]
        batch["targets"][place.row, columns] = ids[1:]
        batch["positions"][place.row, columns] = np.arange(length)
    return batch


def _place_part(
    batch: dict[str, np.ndarray], rows: slice, columns: slice, mesh: Mesh
) -> dict[str, Array]:
    """These rows and columns on the devices; each process has all and gives its share."""
    part = {name: array[rows, columns] for name, array in batch.items()}
    readers = sharding.readers(mesh)
    share = len(part["inputs"]) // readers.count
    own = slice(readers.index * share, (readers.index + 1) * share)
    return sharding.place_batch({name: array[own] for name, array in part.items()}, mesh)


def _whole(
    trained: Trained, job: _Job, batch: dict[str, np.ndarray], mesh: Mesh
) -> Iterator[_Call]:
    config, vocab_chunk = trained.config.model, trained.config.vocab_chunk

    def nll(params: model.Params, batch: dict[str, Array]) -> Array:
        bound = model.bind(config, params)
        x_BLD, _ = bound.hidden_states(batch["inputs"], batch["positions"])
        w_VD = bound.output_weights()
        return losses.per_token_nll(x_BLD, w_VD, batch["targets"], vocab_chunk=vocab_chunk)

    step = jax.jit(nll, out_shardings=NamedSharding(mesh, PartitionSpec()))
    columns = slice(0, job.length)
    for first in range(0, len(batch["inputs"]), job.rows):
        rows = slice(first, first + job.rows)
        yield _Call(rows, columns, step(trained.params, _place_part(batch, rows, columns, mesh)))


def _stream(
    trained: Trained, job: _Job, batch: dict[str, np.ndarray], mesh: Mesh
) -> Iterator[_Call]:
    config, vocab_chunk = trained.config.model, trained.config.vocab_chunk
    piece = longest_piece(config)

    def nll(params: model.Params, cache: Cache, batch: dict[str, Array]) -> tuple[Array, Cache]:
        bound = model.bind(config, params)
        x_BLD, cache = bound.extend(batch["inputs"], cache, positions_BL=batch["positions"])
        w_VD = bound.output_weights()
        nll_BL = losses.per_token_nll(x_BLD, w_VD, batch["targets"], vocab_chunk=vocab_chunk)
        return nll_BL, cache

    # A ring of that size holds all keys of the longest window beside the piece that is written.
    empty = functools.partial(empty_cache, config, job.rows, max_length=job.longest + piece)
    by_row = NamedSharding(mesh, PartitionSpec(sharding.BATCH))
    placement = jax.tree.map(lambda x: by_row, jax.eval_shape(empty))
    replicated = NamedSharding(mesh, PartitionSpec())
    step = jax.jit(nll, out_shardings=(replicated, placement), donate_argnums=1)
    for first_row in range(0, len(batch["inputs"]), job.rows):
        rows = slice(first_row, first_row + job.rows)
        cache = jax.jit(empty, out_shardings=placement)()
        for first in range(0, job.length, piece):
            columns = slice(first, first + piece)
            part = _place_part(batch, rows, columns, mesh)
            nll_BL, cache = step(trained.params, cache, part)
            yield _Call(rows, columns, nll_BL)
