"""The bodies of the Mosaic TPU kernels of the memory attention; `pallas_tpu.py` calls them.

A step of a kernel holds one tile of queries and one tile of keys of every stream, while the next
ones are on their way; `tpu_tiles.py` says which. Tiles inside a band are not masked but by
documents, tiles that a border cuts where it cuts them, memories by their chunk and by their bias,
which is `LEAST` where a slot is empty.

Layout: logits [queries, keys] in the kernels by queries, [keys, queries] in those by keys, so that
every sum over tiles is a plain matrix product. What belongs to rows of logits is kept in all 128
lanes of scratch ("columns"); sums over columns stay apart by lane until the last step.

Logits are in units of log 2, so that exp2 is all there is. A row that sees no key of a tile gathers
weights relative to `LEAST`; the row's first real key, and every query has one, itself, makes them
vanish.

Source: FlashAttention-2 (arXiv 2307.08691) for the online softmax and for two backward kernels,
one by queries and one by keys; bands, memory and their common softmax are ours.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from pallas_kernels.memory_attention.tpu_tiles import (
    LANES,
    Plan,
    Stream,
    Strip,
    cut,
    quotient,
    whole,
)

Refs = Mapping[str, Any]
LN_2, LOG2_E = math.log(2), math.log2(math.e)
LEAST = -1e30


def _column(row: Array) -> Array:
    """[1, size] to [size, 128], the same in all lanes."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def _wide(column: Array, width: int) -> Array:
    """[size, 128] to [size, width]."""
    repeats = -(-width // LANES)
    return jnp.concatenate([column] * repeats, axis=1)[:, :width]


def _by_lane(a: Array) -> Array:
    """[size, width] to [size, 128], summed over groups of 128 columns."""
    parts = [a[:, at : at + LANES] for at in range(0, a.shape[1], LANES)]
    return functools.reduce(jnp.add, parts)


def _masked(s: Array, strip: Strip, documents: tuple[Array, Array] | None) -> Array:
    """Logits with `LEAST` where a key is not seen, or is of another document."""
    parts = []
    for begin, end, low, high in strip.pieces:
        part = s[:, begin - strip.columns.start : end - strip.columns.start]
        row = lax.broadcasted_iota(jnp.int32, part.shape, 0)
        difference = row - lax.broadcasted_iota(jnp.int32, part.shape, 1)
        # In the tile's own numbers it is less by this.
        less = begin - strip.rows.start
        if low is not None:
            part = jnp.where(difference >= low + less, part, LEAST)
        if high is not None:
            part = jnp.where(difference <= high + less, part, LEAST)
        parts.append(part)
    s = jnp.concatenate(parts, axis=1)
    return s if documents is None else jnp.where(documents[0] == documents[1], s, LEAST)


def _in_chunk(s: Array, age: Array, stream: Stream) -> Array:
    return jnp.where((age >= stream.near) & (age <= stream.far), s, LEAST)


def _visit(
    stream: Stream,
    plan: Plan,
    here: Array,
    offset: Array,
    visit: Callable[[Stream, Iterable[Strip]], None],
    *,
    by_keys: bool,
) -> None:
    """visit(stream, strips) of a tile with this difference of first query and key, if `here`."""
    rows, columns = (stream.keys, plan.queries) if by_keys else (plan.queries, stream.keys)
    if stream.memory:
        pl.when(here)(lambda: visit(stream, whole(rows, columns)))
        return
    if stream.has_inside(plan.queries):
        inside = stream.inside(offset, plan.queries)
        pl.when(here & inside)(lambda: visit(stream, whole(rows, columns)))
    for border in stream.borders(plan.queries, plan.tiles):
        low, high = stream.near - border, stream.far - border
        if by_keys:
            low, high = -high, -low
        strips = cut(rows, columns, low, high)
        pl.when(here & (offset == border))(functools.partial(visit, stream, strips))


def _in_stages(work: Iterable[Iterator[None]]) -> None:
    """Runs the first stage of all strips, then the second of all, and so on.

    The compiler keeps close to the order of the program, and a strip alone leaves the units for
    products and for vectors waiting for each other."""
    for _ in itertools.zip_longest(*work):
        pass


def _over_keys(
    ref: Refs,
    plan: Plan,
    visit: Callable[[slice, Callable[[], Array], Array, Array], Iterator[None]],
) -> None:
    """visit(rows, logits, k, v), in stages, of what this step holds of every stream."""
    tile, step = pl.program_id(2), pl.program_id(3)
    first_query = tile * plan.queries

    def of_strip(stream: Stream, strip: Strip) -> Iterator[None]:
        name, (rows, columns, _) = stream.name, strip
        k, v = ref[f"{name}k"][0, 0, columns, :], ref[f"{name}v"][0, 0, columns, :]
        s = plan.product(ref["q"][0, 0, rows, :], k, 1, 1)

        def logits() -> Array:
            scaled, documents = s * plan.scale, None
            if stream.memory:
                row = lax.broadcasted_iota(jnp.int32, s.shape, 0) + rows.start
                age = first_query + row - ref["memory_tokens"][:, :]
                scaled = _in_chunk(scaled + ref["memory_bias"][0, 0], age, stream)
            if "query_documents" in ref:
                queries = _wide(ref["column_documents"][rows, :], s.shape[1])
                documents = queries, ref[f"{name}documents"][0, :, columns]
            return _masked(scaled, strip, documents)

        return visit(rows, logits, k, v)

    def of_stream(stream: Stream, strips: Iterable[Strip]) -> None:
        _in_stages([of_strip(stream, strip) for strip in strips])

    for stream in plan.streams:
        first, last = stream.key_tiles(tile, plan.queries)
        key_tile = first + step
        offset = first_query - key_tile * stream.keys
        _visit(stream, plan, key_tile <= last, offset, of_stream, by_keys=False)


def forward_kernel(*refs: Any, names: tuple[str, ...], plan: Plan) -> None:
    """o [1, 1, queries, K] and lse [1, 1, 1, queries] of a tile of queries."""
    ref = dict(zip(names, refs, strict=True))
    step = pl.program_id(3)

    @pl.when(step == 0)
    def _() -> None:
        ref["top"][:, :] = jnp.full(ref["top"].shape, LEAST, jnp.float32)
        ref["total"][:, :] = jnp.zeros(ref["total"].shape, jnp.float32)
        ref["sum"][:, :] = jnp.zeros(ref["sum"].shape, jnp.float32)
        if "query_documents" in ref:
            ref["column_documents"][:, :] = _column(ref["query_documents"][0])

    def visit(rows: slice, logits: Callable[[], Array], k: Array, v: Array) -> Iterator[None]:
        del k
        yield
        s = logits()
        top = ref["top"][rows, :]
        new_top = jnp.maximum(top, s.max(axis=1, keepdims=True))
        p, before = jnp.exp2(s - _wide(new_top, s.shape[1])), jnp.exp2(top - new_top)
        ref["top"][rows, :] = new_top
        ref["total"][rows, :] = ref["total"][rows, :] * before + _by_lane(p)
        yield
        part = plan.product(p.astype(v.dtype), v, 1, 0)
        ref["sum"][rows, :] = ref["sum"][rows, :] * _wide(before, v.shape[1]) + part

    _over_keys(ref, plan, visit)

    @pl.when(step == plan.steps - 1)
    def _() -> None:
        total = ref["total"][:, :].sum(axis=1, keepdims=True)
        ref["o"][0, 0] = (ref["sum"][:, :] / total).astype(ref["o"].dtype)
        ref["lse"][0, 0] = ((ref["top"][:, :] + jnp.log2(total)) * LN_2).T[:1]


def queries_kernel(*refs: Any, names: tuple[str, ...], plan: Plan) -> None:
    """dq of a tile of queries, from do, lse / log 2 and delta, the sums of o do less the gradient
    of lse.

    p = exp(l - lse), dl = p (do v - delta), dq = scale dl k."""
    ref = dict(zip(names, refs, strict=True))
    step = pl.program_id(3)

    @pl.when(step == 0)
    def _() -> None:
        ref["sum"][:, :] = jnp.zeros(ref["sum"].shape, jnp.float32)
        ref["column_lse"][:, :] = _column(ref["lse"][0, 0])
        ref["column_delta"][:, :] = _column(ref["delta"][0, 0])
        if "query_documents" in ref:
            ref["column_documents"][:, :] = _column(ref["query_documents"][0])

    def visit(rows: slice, logits: Callable[[], Array], k: Array, v: Array) -> Iterator[None]:
        dp = plan.product(ref["do"][0, 0, rows, :], v, 1, 1)
        yield
        s = logits()
        width = s.shape[1]
        p = jnp.exp2(s - _wide(ref["column_lse"][rows, :], width))
        dl = p * (dp - _wide(ref["column_delta"][rows, :], width))
        dl = dl.astype(k.dtype)
        yield
        ref["sum"][rows, :] += plan.product(dl, k, 1, 0)

    _over_keys(ref, plan, visit)

    @pl.when(step == plan.steps - 1)
    def _() -> None:
        dq = ref["sum"][:, :] * (plan.scale * LN_2)
        ref["dq"][0, 0] = dq.astype(ref["dq"].dtype)


def keys_kernel(*refs: Any, names: tuple[str, ...], plan: Plan) -> None:
    """dk, dv of a tile of keys of the one stream there is; of slots also dbias, if there is a ref.

    dv = p do, dk = scale dl q, summed over queries and the heads of a group; dbias is dl summed
    over queries. Last axis of the grid: the heads of the group, of each the tiles of queries."""
    ref = dict(zip(names, refs, strict=True))
    (stream,) = plan.streams
    tile, step = pl.program_id(2), pl.program_id(3)
    head = quotient(step, plan.steps)
    query_step = step - head * plan.steps

    @pl.when(step == 0)
    def _() -> None:
        ref["sum_k"][:, :] = jnp.zeros(ref["sum_k"].shape, jnp.float32)
        ref["sum_v"][:, :] = jnp.zeros(ref["sum_v"].shape, jnp.float32)
        if stream.memory:
            ref["column_tokens"][:, :] = _column(ref["memory_tokens"][:, :])
        if "query_documents" in ref:
            ref["column_documents"][:, :] = _column(ref[f"{stream.name}documents"][0])

    if stream.memory:

        @pl.when(query_step == 0)
        def _() -> None:
            ref["column_bias"][:, :] = _column(ref["memory_bias"][0, 0])
            if "dbias" in ref:
                ref["sum_bias"][:, :] = jnp.zeros(ref["sum_bias"].shape, jnp.float32)

    first, last = stream.query_tiles(tile, plan.queries, plan.tiles)
    query_tile = first + query_step
    first_query = query_tile * plan.queries

    def of_strip(stream: Stream, strip: Strip) -> Iterator[None]:
        name, (rows, columns, _) = stream.name, strip
        k, v = ref[f"{name}k"][0, 0, rows, :], ref[f"{name}v"][0, 0, rows, :]
        q, do = ref["q"][0, 0, columns, :], ref["do"][0, 0, columns, :]
        s, dp = plan.product(k, q, 1, 1), plan.product(v, do, 1, 1)
        yield
        width = s.shape[1]
        s, documents = s * plan.scale, None
        if stream.memory:
            query = first_query + lax.broadcasted_iota(jnp.int32, s.shape, 1)
            age = query - _wide(ref["column_tokens"][rows, :], width)
            s = _in_chunk(s + _wide(ref["column_bias"][rows, :], width), age, stream)
        if "query_documents" in ref:
            keys = _wide(ref["column_documents"][rows, :], width)
            documents = keys, ref["query_documents"][0, :, columns]
        p = jnp.exp2(_masked(s, strip, documents) - ref["lse"][0, 0, :, columns])
        dl = p * (dp - ref["delta"][0, 0, :, columns])
        if "dbias" in ref:
            ref["sum_bias"][rows, :] += _by_lane(dl)
        p, dl = p.astype(do.dtype), dl.astype(q.dtype)
        yield
        ref["sum_v"][rows, :] += plan.product(p, do, 1, 0)
        ref["sum_k"][rows, :] += plan.product(dl, q, 1, 0)

    def visit(stream: Stream, strips: Iterable[Strip]) -> None:
        _in_stages([of_strip(stream, strip) for strip in strips])

    offset = first_query - tile * stream.keys
    _visit(stream, plan, query_tile <= last, offset, visit, by_keys=True)

    if "dbias" in ref:

        @pl.when(query_step == plan.steps - 1)
        def _() -> None:
            ref["dbias"][0, 0] = ref["sum_bias"][:, :].T.sum(axis=0, keepdims=True)

    @pl.when(step == plan.group * plan.steps - 1)
    def _() -> None:
        dk = ref["sum_k"][:, :] * (plan.scale * LN_2)
        ref["dk"][0, 0] = dk.astype(ref["dk"].dtype)
        ref["dv"][0, 0] = ref["sum_v"][:, :].astype(ref["dv"].dtype)
