"""The Mosaic GPU kernel of the memory attention's backward pass by keys: dk and dv.

A warpgroup holds 64 keys of one stream, or 64 slots of a memory, and their gradients in registers;
tiles of 64 queries go by. Both products of a tile run while the other warpgroup makes gradients of
logits of its own.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.memory_attention.mosaic_tiles import (
    BY_COLUMN,
    BY_ROW,
    LEAST,
    LN_2,
    ROWS,
    Plan,
    Refs,
    Span,
    accumulate,
    all_alike,
    along,
    div,
    each_slot,
    filled,
    i32,
    iota,
    over_items,
    products,
    rem,
    roles,
    vector,
    within,
)


class Keys:
    """What a block works on: a tile of keys of one stream, or of one memory, of one key head."""

    def __init__(self, plan: Plan, ref: Refs, number: Array, *, memory: bool):
        self.plan, self.ref, self.memory = plan, ref, memory
        heads = plan.heads // plan.summed
        self.head, number = rem(number, heads), div(number, heads)
        tiles = (plan.M if memory else plan.length) // plan.block
        self.first = rem(number, tiles) * plan.block
        number = div(number, tiles)
        sources = plan.chunks if memory else len(plan.bands)
        self.source, self.row = rem(number, sources), div(number, sources)
        self.near = self.far = i32(0)
        if not memory:
            for i, (near, far) in enumerate(plan.bands.values()):
                self.near = jnp.where(self.source == i, i32(near), self.near)
                self.far = jnp.where(self.source == i, i32(far), self.far)

    @staticmethod
    def total(plan: Plan, *, memory: bool) -> int:
        keys = plan.chunks * plan.M if memory else len(plan.bands) * plan.length
        return plan.batch * (plan.heads // plan.summed) * (keys // plan.block)

    def with_arrays(self, form: str, body: Callable[[Any, Any], None]) -> None:
        """body of the two arrays of this item's stream: `form` is what surrounds its name."""
        if self.memory:
            body(*(self.ref[form.format(f"memory_{name}")] for name in "kv"))
            return
        for i, stream in enumerate(self.plan.bands):

            @pl.when(self.source == i)
            def _(stream: str = stream) -> None:
                body(*(self.ref[form.format(f"{stream}{name}")] for name in "kv"))

    def at(self, offset: Array, size: int, head: Array) -> tuple[Any, ...]:
        rows = pl.ds(self.first + offset, size)
        source = (self.source,) if self.memory else ()
        return (self.row, *source, rows, head)

    def queries(self, offset: Array, size: int) -> Span:
        """Tiles of queries that see keys first + offset to first + offset + size - 1."""
        plan = self.plan
        if self.memory:
            first = self.source * plan.chunk
            last = jnp.minimum(first + plan.chunk, plan.L) - 1
            inner, inner_end = first, last + 1
        else:
            key, key_last = self.first + offset, self.first + offset + size - 1
            first, last = key + self.near, jnp.minimum(key_last + self.far, plan.L - 1)
            inner, inner_end = key_last + self.near, key + self.far + 1
        begin = div(first, ROWS)
        end = jnp.where(last < first, begin, div(jnp.maximum(last, 0), ROWS) + 1)
        inner = jnp.clip(div(inner + ROWS - 1, ROWS), begin, end)
        return Span(begin, inner, jnp.clip(div(inner_end, ROWS), inner, end), end)


def keys_kernel(*refs: Any, names: tuple[str, ...], plan: Plan, memory: bool, **sm: Any) -> None:
    """dk, dv of every band, or of the memories with dbias.

    dv = p do, dk = scale dl q, summed over queries and `summed` heads of a group; dbias is dl
    summed over queries."""
    ref = dict(zip(names, refs, strict=True))
    slots = {"k_free": plan.slots, "q_free": plan.stages}
    total = Keys.total(plan, memory=memory)

    def load() -> None:
        over_items(plan, total, of_item, i32(0))
        each_slot(plgpu.barrier_wait, sm, slots)

    def of_item(n: Array, number: Array, step: Array) -> Array:
        item, at = Keys(plan, ref, number, memory=memory), rem(n, plan.slots)
        plgpu.barrier_wait(sm["k_free"].at[at])

        def of_stream(k: Any, v: Any) -> None:
            for name, source in (("k", k), ("v", v)):
                key_head = div(item.head * plan.summed, plan.group)
                tile = source.at[item.at(i32(0), plan.block, key_head)]
                plgpu.copy_gmem_to_smem(tile, sm[name].at[at], sm["k_full"].at[at])

        item.with_arrays("{}", of_stream)
        span = item.queries(i32(0), plan.block)

        def of_head(i: Array, step: Array) -> Array:
            head = item.head * plan.summed + i

            def of_tile(t: Array, step: Array) -> Array:
                slot, rows = rem(step, plan.stages), pl.ds(t * ROWS, ROWS)
                plgpu.barrier_wait(sm["q_free"].at[slot])
                sources = {name: ref[name].at[item.row, rows, head] for name in ("q", "do")}
                sources["stats"] = ref["stats"].at[item.row, head, :, rows]
                for name, source in sources.items():
                    plgpu.copy_gmem_to_smem(source, sm[name].at[slot], sm["q_full"].at[slot])
                return step + 1

            return lax.fori_loop(span.begin, span.end, of_tile, step)

        return lax.fori_loop(0, plan.summed, of_head, step)

    def compute(worker: Array) -> None:
        each_slot(plgpu.barrier_arrive, sm, slots)

        def of_item(n: Array, number: Array, before: Array) -> Array:
            item = Keys(plan, ref, number, memory=memory)
            return _keys(ref, sm, plan, item, rem(n, plan.slots), worker, before)

        over_items(plan, total, of_item, i32(0))
        plgpu.wait_smem_to_gmem(0)

    roles(plan.workers, load, compute)


def _keys(
    ref: Refs, sm: Refs, plan: Plan, item: Keys, at: Array, worker: Array, before: Array
) -> Array:
    """How many steps there were, after those of one item."""
    dtype, staging = ref["q"].dtype, sm["staging"].at[worker] if "staging" in sm else None
    offset = worker * ROWS
    first = item.first + offset
    rows = pl.ds(first, ROWS)
    loaded, seen = item.queries(i32(0), plan.block), item.queries(offset, ROWS)
    # What tells a query's document from another: its id, or for a memory whether it reads it.
    told_by = "reads" if item.memory else "segments"
    documents, document, one_document = None, i32(1), jnp.bool_(True)
    if told_by in ref and not item.memory:
        documents = vector(ref["segments"].at[item.row, rows], BY_ROW)
        ends = ref["segments_range"]
        document = ends[item.row, div(first, ROWS), 0]
        one_document = document == ends[item.row, div(first, ROWS), 1]
    plgpu.barrier_wait(sm["k_full"].at[at])
    k, v = (sm[name].at[at, pl.ds(offset, ROWS)] for name in ("k", "v"))

    def of_head(i: Array, carry: Any) -> Any:
        head, (step, dk, dv) = item.head * plan.summed + i, carry
        bias = None
        if item.memory:
            bias_head = head if ref["bias"].shape[2] > 1 else head * 0
            bias = vector(ref["bias"].at[item.row, item.source, bias_head, rows], BY_ROW)

        def slot_of(t: Array) -> Array:
            return rem(step + t - loaded.begin, plan.stages)

        def skip(t: Array, _: None) -> None:
            plgpu.barrier_wait(sm["q_full"].at[slot_of(t)])
            plgpu.barrier_arrive(sm["q_free"].at[slot_of(t)])

        def masked(s: Array, t: Array, cut: bool) -> Array:
            """Logits / scale [keys, queries] with `LEAST` where not seen."""
            if bias is not None:
                s = s + along(bias, s.shape, 0)
                if cut and plan.chunk % ROWS:
                    place = iota(s.shape, 1) + (t * ROWS - item.source * plan.chunk)
                    s = jnp.where((place >= 0) & (place < plan.chunk), s, LEAST)
            elif cut:
                s = within(t * ROWS - first - item.near, item.far - item.near, 1, s)
            return s

        def of_others(s: Array, t: Array) -> Array:
            """`LEAST` where query and key, or memory, are of different documents."""
            theirs = vector(ref[told_by].at[item.row, pl.ds(t * ROWS, ROWS)], BY_COLUMN)
            mine = filled(1, ROWS).astype(jnp.int32) if documents is None else documents
            return jnp.where(along(mine, s.shape, 0) == along(theirs, s.shape, 1), s, LEAST)

        def visit(cut: bool, t: Array, carry: Any) -> Any:
            dk, dv, *dbias = carry
            slot = slot_of(t)
            alike = one_document & all_alike(ref, told_by, item.row, t, document, tiles=1)
            q, do = sm["q"].at[slot], sm["do"].at[slot]
            plgpu.barrier_wait(sm["q_full"].at[slot])
            s, dp = products([(k, q.transpose((1, 0))), (v, do.transpose((1, 0)))])
            lse, delta = (plgpu.load(sm["stats"].at[slot, i], layout=BY_COLUMN) for i in (0, 1))
            s = masked(s, t, cut)
            if told_by in ref:
                s = lax.cond(alike, lambda s: s, lambda s: of_others(s, t), s)
            p = jnp.exp2(s * plan.scale - along(lse, s.shape, 1))
            dl = p * (dp - along(delta, s.shape, 1))
            dv, dk = accumulate([(dv, p.astype(dtype), do), (dk, dl.astype(dtype), q)], staging)
            plgpu.barrier_arrive(sm["q_free"].at[slot])
            return dk, dv, *(b + dl.sum(axis=1) for b in dbias)

        def visits(begin: Array, end: Array, cut: bool, carry: Any) -> Any:
            return lax.fori_loop(begin, end, lambda t, carry: visit(cut, t, carry), carry)

        lax.fori_loop(loaded.begin, jnp.minimum(seen.begin, loaded.end), skip, None)
        carry = (dk, dv, *([filled(0, ROWS)] if item.memory else []))
        carry = visits(seen.begin, seen.inner_begin, True, carry)
        carry = visits(seen.inner_begin, seen.inner_end, False, carry)
        carry = visits(seen.inner_end, seen.end, True, carry)
        lax.fori_loop(jnp.maximum(seen.end, loaded.begin), loaded.end, skip, None)
        dk, dv, *dbias = carry
        _store_bias(ref, sm, dbias, (item.row, item.source, head, rows), worker)
        return step + loaded.size, dk, dv

    nothing = filled(0, ROWS, plan.K)
    step, dk, dv = lax.fori_loop(0, plan.summed, of_head, (before, nothing, nothing))
    k[...] = (dk * (plan.scale * LN_2)).astype(dtype)
    v[...] = dv.astype(dtype)
    plgpu.commit_smem()

    def store(to_k: Any, to_v: Any) -> None:
        for tile, to in ((k, to_k), (v, to_v)):
            plgpu.copy_smem_to_gmem(tile, to.at[item.at(offset, ROWS, item.head)])

    item.with_arrays("d{}", store)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.barrier_arrive(sm["k_free"].at[at])
    return step


def _store_bias(
    ref: Refs, sm: Refs, dbias: Sequence[Array], at: tuple[Any, ...], worker: Array
) -> None:
    for value in dbias:
        tile = sm["dbias"].at[worker]
        tile[...] = value
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(tile, ref["dbias"].at[at])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
