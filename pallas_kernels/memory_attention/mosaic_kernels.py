"""The Mosaic GPU kernels of the memory attention by queries: forward, and backward for dq.

A warpgroup holds 64 queries. Of each tile of keys it starts the logits' product, then the product
of the tile before's weights with its values (or keys), and turns the logits into weights while the
tensor cores are at work on the latter: FlashAttention-3's order (arXiv 2407.08608), here over
bands, memories and their common softmax.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.memory_attention.mosaic_tiles import (
    BY_ROW,
    FLOOR,
    LAYOUT,
    LN_2,
    LOG2_E,
    ROWS,
    Plan,
    Queries,
    Refs,
    Tile,
    Walk,
    accumulate,
    along,
    each_slot,
    filled,
    i32,
    key_tiles,
    multiply,
    over_items,
    products,
    rem,
    roles,
    spans,
    vector,
)

# Left sides of products that stay in registers where a tile has 64 keys; wider tiles leave no room,
# nor do the two products of dq. Read from shared memory for every tile, a left side takes as much
# of its bandwidth as a right side of 64 keys does, and both take all there is.
HELD: Mapping[str, tuple[str, ...]] = {"forward": ("q",), "dq": ()}


def forward_kernel(*refs: Any, names: tuple[str, ...], plan: Plan, **sm: Any) -> None:
    """o [B, L, H, K] and lse [B, H, L]."""
    ref = dict(zip(names, refs, strict=True))
    slots = {"q_free": plan.slots, "k_free": plan.stages, "v_free": plan.stages}

    def load() -> None:
        over_items(plan, Queries.total(plan), of_item, i32(0))
        each_slot(plgpu.barrier_wait, sm, slots)

    def of_item(n: Array, number: Array, step: Array) -> Array:
        item, at = Queries(plan, number), rem(n, plan.slots)
        plgpu.barrier_wait(sm["q_free"].at[at])
        q = ref["q"].at[item.row, pl.ds(item.first, plan.block), item.head]
        plgpu.copy_gmem_to_smem(q, sm["q"].at[at], sm["q_full"].at[at])
        tiles = key_tiles(plan, ref, item)
        for span, tile in zip(spans(plan, item.first, plan.block), tiles, strict=True):

            def of_tile(t: Array, step: Array, tile: Any = tile) -> Array:
                slot = rem(step, plan.stages)
                for name, source in zip(("k", "v"), tile(t), strict=True):
                    plgpu.barrier_wait(sm[f"{name}_free"].at[slot])
                    full = sm[f"{name}_full"].at[slot]
                    plgpu.copy_gmem_to_smem(source, sm[name].at[slot], full)
                return step + 1

            step = lax.fori_loop(span.begin, span.end, of_tile, step)
        return step

    def compute(worker: Array) -> None:
        each_slot(plgpu.barrier_arrive, sm, slots)

        def of_item(n: Array, number: Array, before: Array) -> Array:
            return _forward(
                ref, sm, plan, Queries(plan, number), rem(n, plan.slots), worker, before
            )

        over_items(plan, Queries.total(plan), of_item, i32(0))
        plgpu.wait_smem_to_gmem(0)

    roles(plan.workers, load, compute)


def _forward(
    ref: Refs, sm: Refs, plan: Plan, item: Queries, at: Array, worker: Array, before: Array
) -> Array:
    """How many steps there were, after those of one item."""
    dtype, staging = ref["q"].dtype, sm["staging"].at[worker] if "staging" in sm else None
    first, rows = item.queries(worker)
    walk = Walk(plan, ref, item, first)
    tile = sm["q"].at[at, pl.ds(worker * ROWS, ROWS)]
    plgpu.barrier_wait(sm["q_full"].at[at])
    (q,) = _held("forward", plan, staging, {"q": tile})

    def slot_of(step: Array) -> Array:
        return rem(before + step, plan.stages)

    def skip(begin: Array, end: Array) -> None:
        def one(step: Array, _: None) -> None:
            for name in ("k", "v"):
                plgpu.barrier_wait(sm[f"{name}_full"].at[slot_of(step)])
                plgpu.barrier_arrive(sm[f"{name}_free"].at[slot_of(step)])

        lax.fori_loop(begin, end, one, None)

    def weigh(
        seen: Tile, pending: Sequence[Any], state: Sequence[Array], *, first: bool = False
    ) -> Any:
        slot = slot_of(seen.step)
        plgpu.barrier_wait(sm["k_full"].at[slot])

        def update(values: Sequence[Array], state: Sequence[Array]) -> list[Array]:
            plgpu.barrier_arrive(sm["k_free"].at[slot])
            top, total = state[0], state[1]
            s = walk.masked(seen, values[0], first=first)
            new_top = jnp.maximum(top, s.max(axis=1) * plan.scale)
            shrink = jnp.exp2(top - new_top)
            p = jnp.exp2(s * plan.scale - along(new_top, s.shape, 0))
            total = total * shrink + p.sum(axis=1)
            new = lax.optimization_barrier((new_top, total, shrink, p))
            # Awaiting memory here also keeps the compiler from awaiting the tensor cores before
            # all this.
            plgpu.barrier_wait(sm["v_full"].at[slot])
            return list(new)

        k = sm["k"].at[slot].transpose((1, 0))
        return multiply([(q, k)], pending, update, state, staging)

    def pending(step: Array, o: Array, p: Array) -> list[Any]:
        return [(o, p.astype(dtype), sm["v"].at[slot_of(step)])]

    def let_go(step: Array) -> None:
        plgpu.barrier_arrive(sm["v_free"].at[slot_of(step)])

    def later(n: Array, carry: Any) -> Any:
        o, state, last = carry
        seen = walk.tile(n)
        skip(last + 1, seen.step)
        (o,), state = weigh(seen, pending(last, o, state[3]), state)
        let_go(last)
        return o * along(state[2], o.shape, 0), state, seen.step

    seen = walk.tile(i32(0))
    skip(i32(0), seen.step)
    nothing = filled(0, ROWS)
    state = [filled(FLOOR, ROWS), nothing, nothing, filled(0, ROWS, plan.keys)]
    _, state = weigh(seen, [], state, first=True)
    carry = filled(0, ROWS, plan.K), state, seen.step
    o, state, last = lax.fori_loop(1, walk.count, later, carry)
    (o,) = accumulate(pending(last, o, state[3]), staging)
    let_go(last)
    skip(last + 1, walk.steps)
    top, total = state[0], state[1]
    tile[...] = (o * along(1 / total, o.shape, 0)).astype(dtype)
    lse = sm["lse"].at[worker]
    lse[...] = (top + jnp.log(total) * LOG2_E) * LN_2
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(tile, ref["o"].at[item.row, rows, item.head])
    plgpu.copy_smem_to_gmem(lse, ref["lse"].at[item.row, item.head, rows])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.barrier_arrive(sm["q_free"].at[at])
    return before + walk.steps


def queries_kernel(*refs: Any, names: tuple[str, ...], plan: Plan, **sm: Any) -> None:
    """dq [B, L, H, K], from do and stats, lse / log 2 and delta, the sums of o do less the gradient
    of lse.

    p = exp(l - lse), dl = p (do v - delta), dq = scale dl k."""
    ref = dict(zip(names, refs, strict=True))
    slots = {"q_free": plan.slots, "k_free": plan.stages}

    def load() -> None:
        over_items(plan, Queries.total(plan), of_item, i32(0))
        each_slot(plgpu.barrier_wait, sm, slots)

    def of_item(n: Array, number: Array, step: Array) -> Array:
        item, at = Queries(plan, number), rem(n, plan.slots)
        plgpu.barrier_wait(sm["q_free"].at[at])
        for name in ("q", "do"):
            source = ref[name].at[item.row, pl.ds(item.first, plan.block), item.head]
            plgpu.copy_gmem_to_smem(source, sm[name].at[at], sm["q_full"].at[at])
        tiles = key_tiles(plan, ref, item)
        for span, tile in zip(spans(plan, item.first, plan.block), tiles, strict=True):

            def of_tile(t: Array, step: Array, tile: Any = tile) -> Array:
                slot = rem(step, plan.stages)
                plgpu.barrier_wait(sm["k_free"].at[slot])
                for name, source in zip(("k", "v"), tile(t), strict=True):
                    plgpu.copy_gmem_to_smem(source, sm[name].at[slot], sm["k_full"].at[slot])
                return step + 1

            step = lax.fori_loop(span.begin, span.end, of_tile, step)
        return step

    def compute(worker: Array) -> None:
        each_slot(plgpu.barrier_arrive, sm, slots)

        def of_item(n: Array, number: Array, before: Array) -> Array:
            return _queries(
                ref, sm, plan, Queries(plan, number), rem(n, plan.slots), worker, before
            )

        over_items(plan, Queries.total(plan), of_item, i32(0))
        plgpu.wait_smem_to_gmem(0)

    roles(plan.workers, load, compute)


def _queries(
    ref: Refs, sm: Refs, plan: Plan, item: Queries, at: Array, worker: Array, before: Array
) -> Array:
    """How many steps there were, after those of one item."""
    dtype, staging = ref["q"].dtype, sm["staging"].at[worker] if "staging" in sm else None
    first, rows = item.queries(worker)
    walk = Walk(plan, ref, item, first)
    stats = ref["stats"].at[item.row, item.head, :, pl.ds(first, ROWS)]
    lse, delta = (vector(stats.at[i], BY_ROW) for i in (0, 1))
    plgpu.barrier_wait(sm["q_full"].at[at])
    own = {name: sm[name].at[at, pl.ds(worker * ROWS, ROWS)] for name in ("q", "do")}
    q, do = _held("dq", plan, staging, own)

    def slot_of(step: Array) -> Array:
        return rem(before + step, plan.stages)

    def skip(begin: Array, end: Array) -> None:
        def one(step: Array, _: None) -> None:
            plgpu.barrier_wait(sm["k_full"].at[slot_of(step)])
            plgpu.barrier_arrive(sm["k_free"].at[slot_of(step)])

        lax.fori_loop(begin, end, one, None)

    def gradient(seen: Tile, ahead: Array, s: Array, dp: Array, *, first: bool = False) -> Array:
        logits = walk.masked(seen, s, first=first) * plan.scale
        p = jnp.exp2(logits - along(lse, s.shape, 0))
        dl = lax.optimization_barrier(p * (dp - along(delta, s.shape, 0)))

        # Awaiting memory here also keeps the compiler from awaiting the tensor cores before all
        # this.
        @pl.when(ahead > 0)
        def _next() -> None:
            plgpu.barrier_wait(sm["k_full"].at[slot_of(seen.step + 1)])

        return dl

    def pairs(step: Array) -> list[tuple[Any, Any]]:
        transposed = [sm[name].at[slot_of(step)].transpose((1, 0)) for name in ("k", "v")]
        return list(zip((q, do), transposed, strict=True))

    def pending(step: Array, dq: Array, dl: Array) -> list[Any]:
        return [(dq, dl.astype(dtype), sm["k"].at[slot_of(step)])]

    def let_go(step: Array) -> None:
        plgpu.barrier_arrive(sm["k_free"].at[slot_of(step)])

    def await_(step: Array, awaited: Array) -> None:
        @pl.when(awaited == 0)
        def _() -> None:
            plgpu.barrier_wait(sm["k_full"].at[slot_of(step)])

    def awaits_next(n: Array, last: Array, step: Array) -> Array:
        """Whether tile n + 1 may be awaited while tile n and `last` are held: with a skipped tile
        among them a ring of three has no room."""
        following = walk.tile(n + 1).step
        return ((n + 1 < walk.count) & (following == last + 2) & (step == last + 1)).astype(
            jnp.int32
        )

    def later(n: Array, carry: Any) -> Any:
        dq, dl, last, awaited = carry
        seen = walk.tile(n)
        skip(last + 1, seen.step)
        await_(seen.step, awaited)
        ahead = awaits_next(n, last, seen.step)

        def update(values: Sequence[Array], _: Sequence[Array]) -> list[Array]:
            return [gradient(seen, ahead, *values)]

        (dq,), (dl,) = multiply(pairs(seen.step), pending(last, dq, dl), update, [dl], staging)
        let_go(last)
        return dq, dl, seen.step, ahead

    seen = walk.tile(i32(0))
    skip(i32(0), seen.step)
    plgpu.barrier_wait(sm["k_full"].at[slot_of(seen.step)])
    ahead = awaits_next(i32(0), seen.step - 1, seen.step)
    dl = gradient(seen, ahead, *products(pairs(seen.step)), first=True)
    carry = filled(0, ROWS, plan.K), dl, seen.step, ahead
    dq, dl, last, _ = lax.fori_loop(1, walk.count, later, carry)
    (dq,) = accumulate(pending(last, dq, dl), staging)
    let_go(last)
    skip(last + 1, walk.steps)
    own["q"][...] = (dq * (plan.scale * LN_2)).astype(dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(own["q"], ref["dq"].at[item.row, rows, item.head])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.barrier_arrive(sm["q_free"].at[at])
    return before + walk.steps


def _held(part: str, plan: Plan, staging: Any, tiles: Mapping[str, Any]) -> list[Any]:
    """The tiles, or what is in them."""
    names = HELD[part] if staging is None and plan.keys == ROWS else ()
    return [
        plgpu.load(tile, layout=LAYOUT) if name in names else tile for name, tile in tiles.items()
    ]
