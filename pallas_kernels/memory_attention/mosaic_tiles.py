"""What the Mosaic GPU kernels of the memory attention share: tiles, who sees which, products.

A block is a warpgroup that loads and `Plan.workers` warpgroups that compute, each with `ROWS` rows
of its own (queries, or keys in `mosaic_keys.py`); tiles of the other side go through shared memory
in a ring that all of a block's warpgroups read. Blocks are persistent: each works on its share of
the items (a tile of one head), and loads run ahead into the next item.

Both streams of token keys are bands: query i sees key j where near <= i - j <= far (`mask.py`):

    in-context   near = 0, far = W - 1          fading   near = W, far = W + F - 1

Streams are walked one after the other, the memories first, then the fading keys, then the
in-context ones. A warpgroup skips what only its neighbour sees, and masks only the tiles that a
border cuts.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

Refs = Mapping[str, Any]
LN_2, LOG2_E = math.log(2), math.log2(math.e)
# Logits that are not seen, and the least that a row's maximum is taken to be. The difference is
# such that the former's weight is 0 even if the multiply-add that makes its exponent is fused.
LEAST, FLOOR = -1e30, -1e20
# Of a warpgroup's tile; and what tokens are padded to a multiple of.
ROWS, WHOLE = 64, 128
# Registers per thread of the warpgroup that loads and of those that compute, by how many the latter
# are: with 128 threads each, no more than the 65536 that there are.
REGISTERS: Mapping[int, tuple[int, int]] = {2: (40, 232), 3: (32, 160)}
LAYOUT = plgpu.Layout.WGMMA
BY_ROW, BY_COLUMN = LAYOUT.reduce(1), LAYOUT.reduce(0)


@dataclass(frozen=True)
class Plan:
    """Static sizes: L tokens, padded to `length`; rows of the batch; query heads of width K,
    `group` to a key/value head, `summed` of them in what one item makes of its gradient; warpgroups
    of a block that compute (`workers`); keys of a tile; tiles in a ring (`stages`); items whose own
    tiles are held at a time (`slots`); M slots of a memory, of one of `chunks` chunks of `chunk`
    tokens; factor on the logits in units of log 2; near and far of each band, by the prefix of its
    arrays' names; blocks that run at a time."""

    L: int
    length: int
    batch: int
    heads: int
    group: int
    summed: int
    K: int
    workers: int
    keys: int
    stages: int
    slots: int
    M: int
    chunk: int
    chunks: int
    scale: float
    bands: Mapping[str, tuple[int, int]]
    processors: int

    @property
    def block(self) -> int:
        """Rows of a block."""
        return ROWS * self.workers

    @property
    def tiles(self) -> int:
        """Blocks of a row of tokens; the last may reach beyond it."""
        return -(-self.length // self.block)

    @property
    def own_memory(self) -> bool:
        """Whether a warpgroup goes through the memory of its own chunk alone. Where a block has
        queries of several chunks, the ring must hold the tile that it saw last, the memories of
        others, which it skips, and the next tile."""
        skipped = (self.workers - 1) * self.M // self.keys
        whole = self.chunk % self.block == 0
        return whole or (self.chunk % ROWS == 0 and skipped + 2 <= self.stages)


def i32(x: int) -> Array:
    return jnp.int32(x)


def div(x: Array, n: int) -> Array:
    """x // n of no negative x."""
    return lax.div(x, i32(n))


def rem(x: Array, n: int) -> Array:
    return lax.rem(x, i32(n))


def iota(shape: tuple[int, ...], axis: int) -> Array:
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=LAYOUT)


def along(v: Array, shape: tuple[int, ...], axis: int) -> Array:
    """v, repeated over the other axis."""
    return lax.broadcast_in_dim(v, shape, [axis])


def within(first: Array, last: Array, axis: int, s: Array) -> Array:
    """s, or `LEAST` where first + the index of `axis` - that of the other is not in 0 to `last`."""
    place = iota(s.shape, axis) - iota(s.shape, 1 - axis) + first
    # One comparison for both ends.
    return jnp.where(place.astype(jnp.uint32) <= last.astype(jnp.uint32), s, LEAST)


def filled(value: float, *shape: int) -> Array:
    """A tile, or a number for each of its rows."""
    layout = BY_ROW if len(shape) == 1 else LAYOUT
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def vector(ref: Any, layout: Any) -> Array:
    """Of device memory."""
    return plgpu.load(ref, layout=layout, optimized=False)


def products(pairs: Sequence[tuple[Any, Any]]) -> list[Array]:
    """a b of each pair."""

    def body(*refs: Any) -> list[Array]:
        for ref, (a, b) in zip(refs, pairs, strict=True):
            plgpu.wgmma(ref, a, b)
        return [ref[...] for ref in refs]

    shapes = [plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32) for a, b in pairs]
    return pl.run_scoped(body, *shapes)


def multiply(
    fresh: Sequence[tuple[Any, Any]],
    pending: Sequence[tuple[Array, Array, Any]],
    update: Callable[[Sequence[Array], Sequence[Array]], Sequence[Array]],
    state: Sequence[Array],
    staging: Any,
) -> tuple[Sequence[Array], Sequence[Array]]:
    """(acc + a b of each of `pending`, update(a b of each of `fresh`, state)).

    `update` runs while the tensor cores are at work on `pending`. What it makes must be float32:
    were it to write registers that a later product reads as its left side, the compiler would
    serialise all products. `staging` is None, or, for an interpreter that multiplies only what is
    in shared memory, room for a left side."""
    if staging is not None:
        state = update(products(fresh) if fresh else [], state)
        return [acc + _staged(a, b, staging) for acc, a, b in pending], state

    def body(refs: Any) -> None:
        sums, results, kept = refs
        for ref, (a, b) in zip(results, fresh, strict=True):
            plgpu.wgmma(ref, a, b)
        for ref, (_, a, b) in zip(sums, pending, strict=True):
            plgpu.wgmma(ref, a, b)
        values = [plgpu.wgmma_accumulator_load(ref, wait_n=len(pending)) for ref in results]
        old = [ref[...] for ref in kept]
        for ref, value in zip(kept, update(values, old), strict=True):
            ref[...] = value

    zeros = [filled(0, a.shape[0], b.shape[1]) for a, b in fresh]
    init = (
        [plgpu.ACC.init(acc) for acc, _, _ in pending],
        [plgpu.ACC.init(zero) for zero in zeros],
        list(state),
    )
    sums, _, state = cast(Any, pl.run_state(body)(init))
    return sums, state


def _staged(a: Array, b: Any, staging: Any) -> Array:
    tile = staging.at[:, pl.ds(0, a.shape[1])]
    tile[...] = a
    plgpu.commit_smem()
    return products([(tile, b)])[0]


def accumulate(pending: Sequence[tuple[Array, Array, Any]], staging: Any) -> Sequence[Array]:
    """acc + a b of each."""
    return multiply([], pending, lambda values, state: state, [], staging)[0]


def roles(workers: int, load: Callable[[], None], compute: Callable[[Array], None]) -> None:
    """load() in one warpgroup, compute(which) in the others."""
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == workers)
    def _load() -> None:
        if workers in REGISTERS:
            plgpu.set_max_registers(REGISTERS[workers][0], action="decrease")
        load()

    @pl.when(warpgroup < workers)
    def _compute() -> None:
        if workers in REGISTERS:
            plgpu.set_max_registers(REGISTERS[workers][1], action="increase")
        compute(warpgroup)


def each_slot(act: Callable[[Any], None], sm: Refs, slots: Mapping[str, int]) -> None:
    """`act` on every barrier: to let go of all slots at first, to await that at the end."""
    for name, count in slots.items():
        for slot in range(count):
            act(sm[name].at[slot])


def over_items(plan: Plan, total: int, body: Callable[[Array, Array, Any], Any], carry: Any) -> Any:
    """carry after body(how many before it, item, carry) of each item of this block."""
    mine = lax.axis_index("block")
    count = div(total - mine + plan.processors - 1, plan.processors)
    return lax.fori_loop(
        0, count, lambda n, carry: body(n, mine + n * plan.processors, carry), carry
    )


def all_alike(ref: Refs, name: str, row: Array, tile: Array, value: Array, *, tiles: int) -> Array:
    """Whether segments, or reads, of `tiles` tiles of 64 tokens, the first one given, are all
    `value`: true where there are none at all, false beyond the row."""
    if f"{name}_range" not in ref:
        return jnp.bool_(True)
    ends = ref[f"{name}_range"]
    alike = tile + tiles <= ends.shape[1]
    for i in range(tiles):
        at = jnp.minimum(tile + i, ends.shape[1] - 1)
        for end in (0, 1):
            alike &= ends[row, at, end] == value
    return alike


class Queries:
    """What a block of a kernel by queries works on: a tile of queries of one head."""

    def __init__(self, plan: Plan, number: Array):
        self.plan = plan
        self.head = rem(number, plan.heads)
        rest = div(number, plan.heads)
        # Those at the start of a sequence see less: they come last and fill the gaps.
        self.first = (plan.tiles - 1 - rem(rest, plan.tiles)) * plan.block
        self.row = div(rest, plan.tiles)
        self.key_head = div(self.head, plan.group)

    def queries(self, worker: Array) -> tuple[Array, Any]:
        """The first query of a warpgroup, and the rows of its results.

        Beyond the row's end it computes what the last queries see. Copies of tiles to device memory
        leave out what lies outside a row; those of contiguous numbers, such as lse, only what lies
        outside the array, and would overwrite the next head's."""
        first = self.first + worker * ROWS
        return jnp.minimum(first, self.plan.length - ROWS), pl.ds(first, ROWS)

    @staticmethod
    def total(plan: Plan) -> int:
        return plan.tiles * plan.heads * plan.batch


class Span(NamedTuple):
    """Tiles of one stream that are seen, and those of them that no border cuts."""

    begin: Array
    inner_begin: Array
    inner_end: Array
    end: Array

    @property
    def size(self) -> Array:
        return self.end - self.begin


def spans(plan: Plan, first: Array, size: int) -> list[Span]:
    """Of each stream, what positions `first` to first + size - 1 see."""
    n, found = plan.keys, []
    last = jnp.minimum(first + size, plan.length) - 1
    if plan.M:
        per_chunk = plan.M // n
        z, z_last = (div(jnp.minimum(t, plan.L - 1), plan.chunk) for t in (first, last))
        begin, end = z * per_chunk, (z_last + 1) * per_chunk
        found.append(Span(begin, begin, begin, end))
    for near, far in plan.bands.values():
        begin = div(jnp.maximum(first - far, 0), n)
        end = jnp.where(last < near, begin, div(jnp.maximum(last - near, 0), n) + 1)
        inner = jnp.clip(div(jnp.maximum(last - far, 0) + n - 1, n), begin, end)
        inner_end = jnp.clip(div(jnp.maximum(first - near + 1, 0), n), inner, end)
        found.append(Span(begin, inner, inner_end, end))
    return found


def key_tiles(plan: Plan, ref: Refs, item: Queries) -> Sequence[Callable[[Array], tuple[Any, Any]]]:
    """Of each stream, keys and values of the tile of a given number."""
    n = plan.keys

    def memory(t: Array) -> tuple[Any, Any]:
        per_chunk = plan.M // n
        slots = pl.ds(rem(t, per_chunk) * n, n)
        at = (item.row, div(t, per_chunk), slots, item.key_head)
        return ref["memory_k"].at[at], ref["memory_v"].at[at]

    def band(name: str, t: Array) -> tuple[Any, Any]:
        at = (item.row, pl.ds(t * n, n), item.key_head)
        return ref[f"{name}k"].at[at], ref[f"{name}v"].at[at]

    return [memory] * bool(plan.M) + [functools.partial(band, name) for name in plan.bands]


class Tile(NamedTuple):
    """The tile of keys number `number` of a stream: which of the block's loads it is, whether all
    of it is seen by all; near and far of its band; whether it is of a memory."""

    number: Array
    step: Array
    whole: Array
    near: Array
    far: Array
    memory: Array


class Walk:
    """How a warpgroup's queries go through the tiles of keys that its block loads.

    They go through all streams in one loop, so that the tensor cores are at work on one tile's
    values while the next one's logits become weights, across streams too. Between two tiles that a
    warpgroup sees there are at most `workers` - 1 of the bands that only others of its block see:
    with the last tile and the next, a ring of `workers` + 1 holds them all. `Plan.own_memory` is
    of the memories."""

    def __init__(self, plan: Plan, ref: Refs, item: Queries, first: Array):
        self.plan, self.ref, self.item, self.first = plan, ref, item, first
        loaded, seen = spans(plan, item.first, plan.block), spans(plan, first, ROWS)
        bands = list(plan.bands.values())
        if plan.M:
            bands = [(0, 0), *bands]
            if not plan.own_memory:
                seen[0] = loaded[0]
        # Constants within a product's `update` do not lower: nothing that it reads is one.
        zero = 0 * first
        self.count = self.steps = zero
        # Of each stream: how many tiles are seen before it, and what its tiles have in common.
        # The document of the first query, and whether it is that of all.
        self._document, self._one_document = zero, jnp.bool_(True)
        if "segments_range" in ref:
            tile = div(first, ROWS)
            self._document = ref["segments_range"][item.row, tile, 0]
            self._one_document = self._document == ref["segments_range"][item.row, tile, 1]
        self._streams: list[tuple[Array, Any]] = []
        for i, (all_of_it, span, (near, far)) in enumerate(zip(loaded, seen, bands, strict=True)):
            number = span.begin - self.count
            step = self.steps + span.begin - all_of_it.begin - self.count
            memory = zero + (1 if plan.M and i == 0 else 0)
            found = (
                number,
                step,
                span.inner_begin,
                span.inner_end,
                zero + near,
                zero + far,
                memory,
            )
            self._streams.append((self.count, found))
            self.count, self.steps = self.count + span.size, self.steps + all_of_it.size
        # A single tile of slots is the first that is seen: its bias can be loaded ahead, and the
        # loop over all others knows no memory.
        alone = plan.M == plan.keys and plan.own_memory
        self._bias = self._load_bias(self.tile(i32(0)).number) if alone else None

    def tile(self, n: Array) -> Tile:
        """The n-th tile that is seen."""
        chosen = self._streams[0][1]
        for before, found in self._streams[1:]:
            later = n >= before
            chosen = jax.tree.map(
                lambda new, old, later=later: jnp.where(later, new, old), found, chosen
            )
        number, step, begin, end, near, far, memory = chosen
        t, tiles = n + number, self.plan.keys // ROWS
        whole = (t >= begin) & (t < end) & self._one_document
        whole &= all_alike(
            self.ref, "segments", self.item.row, t * tiles, self._document, tiles=tiles
        )
        return Tile(t, n + step, whole.astype(jnp.int32), near, far, memory)

    def masked(self, tile: Tile, s: Array, *, first: bool = False) -> Array:
        """Logits / scale [queries, keys of the tile] with `LEAST` where not seen. `first`: it is
        the first tile that is seen."""
        t = tile.number
        if first and self._bias is not None:
            return self._memory(t, self._bias, s)
        kinds = [lambda s: s, lambda s: self._documents(t, self._band(tile, s))]
        if self.plan.M and self._bias is None:
            kinds.append(lambda s: self._memory(t, self._load_bias(t), s))
        return lax.switch(jnp.where(tile.memory > 0, 2, 1 - tile.whole), kinds, s)

    def _documents(self, t: Array, s: Array) -> Array:
        if "segments" not in self.ref:
            return s
        n, segments = self.plan.keys, self.ref["segments"]
        mine = vector(segments.at[self.item.row, pl.ds(self.first, ROWS)], BY_ROW)
        theirs = vector(segments.at[self.item.row, pl.ds(t * n, n)], BY_COLUMN)
        same = along(mine, s.shape, 0) == along(theirs, s.shape, 1)
        return jnp.where(same, s, LEAST)

    def _band(self, tile: Tile, s: Array) -> Array:
        over = self.first - tile.number * self.plan.keys - tile.near
        return within(over, tile.far - tile.near, 0, s)

    def _load_bias(self, t: Array) -> Array:
        plan, bias = self.plan, self.ref["bias"]
        per_chunk = plan.M // plan.keys
        slots = pl.ds(rem(t, per_chunk) * plan.keys, plan.keys)
        head = self.item.head if bias.shape[2] > 1 else self.item.head * 0
        return vector(bias.at[self.item.row, div(t, per_chunk), head, slots], BY_COLUMN)

    def _memory(self, t: Array, bias: Array, s: Array) -> Array:
        plan, ref, item = self.plan, self.ref, self.item
        s = s + along(bias, s.shape, 1)
        if not plan.own_memory:
            z = div(t, plan.M // plan.keys)
            place = iota(s.shape, 0) + (self.first - z * plan.chunk)
            s = jnp.where((place >= 0) & (place < plan.chunk), s, LEAST)
        if "reads" not in ref:
            return s

        def readers(s: Array) -> Array:
            reads = vector(ref["reads"].at[item.row, pl.ds(self.first, ROWS)], BY_ROW)
            return jnp.where(along(reads, s.shape, 0) > 0, s, LEAST)

        all_read = all_alike(ref, "reads", item.row, div(self.first, ROWS), i32(1), tiles=1)
        return lax.cond(all_read, lambda s: s, readers, s)
