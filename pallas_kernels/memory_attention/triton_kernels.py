"""The bodies of the Triton kernels of the memory attention; `pallas_triton.py` calls them.

Both streams of token keys are bands: query i sees key j where near <= i - j <= far (`mask.py`):

    in-context   near = 0, far = W - 1          fading   near = W, far = W + F - 1

A program holds one tile of queries (or of keys) and walks over the tiles that it meets: first those
that the band cuts, masked, then those that lie inside, unmasked, then again cut ones. A tile of
memory slots is masked by its bias, which is `LEAST` where a slot is empty.

Logits are kept in units of log 2, so that exp2 is all there is. A row of a tile that sees no key
gathers weights relative to `LEAST`; the row's first real key, and every query has one, itself,
makes them vanish.

Source: FlashAttention-2 (arXiv 2307.08691) for the online softmax and for two backward kernels,
one by queries and one by keys; bands, memory and their common softmax are ours.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

Refs = Mapping[str, Any]
LN_2, LOG2_E = math.log(2), math.log2(math.e)
LEAST = -1e30


@dataclass(frozen=True)
class Plan:
    """Static sizes: L tokens; `group` query heads per key/value head, of width K; queries, keys and
    slots of a tile; M slots of a memory; tokens of a chunk; factor on the logits in units of
    log 2; near and far of each band, by the prefix of its arrays' names."""

    L: int
    group: int
    K: int
    queries: int
    keys: int
    slots: int
    M: int
    chunk: int
    scale: float
    bands: Mapping[str, tuple[int, int]]
    exact: bool

    def product(self, a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
        """float32, of two tiles over one axis of each."""
        return lax.dot_general(
            a,
            b,
            (((axis_a,), (axis_b,)), ((), ())),
            precision=lax.Precision.HIGHEST if self.exact else None,
            preferred_element_type=jnp.float32,
        )


class Tile:
    """`size` tokens from `first` on, of one row of the batch."""

    def __init__(self, plan: Plan, ref: Refs, row: Array, first: Array, size: int):
        self.plan, self.ref, self.row, self.first, self.size = plan, ref, row, first, size
        self.t = first + jnp.arange(size, dtype=jnp.int32)
        self.last = jnp.minimum(first + size, plan.L) - 1

    def heads(self, name: str, head: Array, *, whole: bool = False) -> Array:
        """[size, K] of [B, L, heads, K]; 0 beyond L, unless the tile is known to be `whole`."""
        return _load(self._at(name, head), *(() if whole else (self._there,)))

    def store(self, name: str, head: Array, value: Array) -> None:
        mask = jnp.broadcast_to(self._there, value.shape)
        plgpu.store(self._at(name, head), value.astype(self.ref[name].dtype), mask=mask)

    def numbers(self, name: str, *index: Array) -> Array:
        """[size] of [B, ..., L]."""
        return _load(self.ref[name].at[self.row, *index, self.t], self.t < self.plan.L)

    def store_numbers(self, name: str, head: Array, value: Array) -> None:
        at = self.ref[name].at[self.row, head, self.t]
        plgpu.store(at, value, mask=self.t < self.plan.L)

    @property
    def _there(self) -> Array:
        return (self.t < self.plan.L)[:, None]

    def _at(self, name: str, head: Array) -> Any:
        return self.ref[name].at[self.row, self.t[:, None], head, jnp.arange(self.plan.K)[None, :]]


class Slots:
    """`size` slots from `first` on, of the memory of one chunk of one row of the batch."""

    def __init__(self, plan: Plan, ref: Refs, row: Array, chunk: Array, first: Array):
        self.plan, self.ref, self.row, self.chunk = plan, ref, row, chunk
        self.slot = first + jnp.arange(plan.slots, dtype=jnp.int32)

    def heads(self, name: str, head: Array) -> Array:
        """[size, K] of [B, Z, M, heads, K]."""
        return _load(self._at(name, head), self._there)

    def store(self, name: str, head: Array, value: Array) -> None:
        mask = jnp.broadcast_to(self._there, value.shape)
        plgpu.store(self._at(name, head), value.astype(self.ref[name].dtype), mask=mask)

    def bias(self, head: Array) -> Array:
        """[size], in units of log 2; `LEAST` where there is nothing."""
        ref = self.ref["bias"]
        head = head if ref.shape[2] > 1 else head * 0
        mask = self.slot < self.plan.M
        return plgpu.load(ref.at[self.row, self.chunk, head, self.slot], mask=mask, other=LEAST)

    def store_bias(self, head: Array, value: Array) -> None:
        at = self.ref["dbias"].at[self.row, self.chunk, head, self.slot]
        plgpu.store(at, value, mask=self.slot < self.plan.M)

    @property
    def _there(self) -> Array:
        return (self.slot < self.plan.M)[:, None]

    def _at(self, name: str, head: Array) -> Any:
        width = jnp.arange(self.plan.K)[None, :]
        return self.ref[name].at[self.row, self.chunk, self.slot[:, None], head, width]


def _load(at: Any, mask: Array | None = None) -> Array:
    if mask is None:
        return plgpu.load(at)
    shape = at.transforms[-1].get_indexer_shape()
    return plgpu.load(at, mask=jnp.broadcast_to(mask, shape), other=0)


def over_tiles(
    first: Array,
    last: Array,
    inner: tuple[Array, Array],
    size: int,
    step: Callable[[Array, bool, Any], Any],
    carry: Any,
) -> Any:
    """carry after step(start, masked, carry) of every tile that meets positions first to last.

    Tiles within the positions inner[0] to inner[1] are not masked."""
    begin, end = first // size, last // size + 1
    inner_begin = jnp.clip((inner[0] + size - 1) // size, begin, end)
    inner_end = jnp.clip((inner[1] + 1) // size, inner_begin, end)

    def steps(begin: Array, end: Array, masked: bool, carry: Any) -> Any:
        return lax.fori_loop(begin, end, lambda i, carry: step(i * size, masked, carry), carry)

    carry = steps(begin, inner_begin, True, carry)
    carry = steps(inner_begin, inner_end, False, carry)
    return steps(inner_end, end, True, carry)


def over_keys(
    tile: Tile,
    q: Array,
    head: Array,
    visit: Callable[[Array, Array, Array, Any], Any],
    carry: Any,
) -> Any:
    """carry after visit(logits, k, v, carry) of every tile of keys that the tile's queries see."""
    documents = _documents(tile)
    for name, band in tile.plan.bands.items():
        carry = _over_band(tile, q, head, name, band, documents, visit, carry)
    return _over_memories(tile, q, head, documents, visit, carry) if tile.plan.M else carry


def _over_band(
    tile: Tile,
    q: Array,
    head: Array,
    name: str,
    band: tuple[int, int],
    documents: Array | None,
    visit: Callable[[Array, Array, Array, Any], Any],
    carry: Any,
) -> Any:
    plan, (near, far) = tile.plan, band
    key_head = head // plan.group

    def step(start: Array, masked: bool, carry: Any) -> Any:
        keys = Tile(plan, tile.ref, tile.row, start, plan.keys)
        k = keys.heads(f"{name}k", key_head, whole=not masked)
        v = keys.heads(f"{name}v", key_head, whole=not masked)
        s = plan.product(q, k, 1, 1) * plan.scale
        age = tile.t[:, None] - keys.t[None, :]
        seen = (age >= near) & (age <= far) if masked else None
        return visit(_masked(s, seen, documents, _documents(keys)), k, v, carry)

    return over_tiles(
        jnp.maximum(tile.first - far, 0),
        tile.last - near,
        (tile.last - far, tile.first - near),
        plan.keys,
        step,
        carry,
    )


def _over_memories(
    tile: Tile,
    q: Array,
    head: Array,
    documents: Array | None,
    visit: Callable[[Array, Array, Array, Any], Any],
    carry: Any,
) -> Any:
    plan, ref, row = tile.plan, tile.ref, tile.row
    key_head = head // plan.group
    per_chunk = -(-plan.M // plan.slots)

    def step(i: Array, carry: Any) -> Any:
        chunk = i // per_chunk
        slots = Slots(plan, ref, row, chunk, i % per_chunk * plan.slots)
        k, v = slots.heads("memory_k", key_head), slots.heads("memory_v", key_head)
        s = plan.product(q, k, 1, 1) * plan.scale + slots.bias(head)[None, :]
        seen = jnp.broadcast_to((tile.t // plan.chunk == chunk)[:, None], s.shape)
        s = _masked(s, seen, documents, _document_of_chunk(ref, row, chunk, plan))
        return visit(s, k, v, carry)

    begin, end = tile.first // plan.chunk, tile.last // plan.chunk + 1
    return lax.fori_loop(begin * per_chunk, end * per_chunk, step, carry)


def _documents(tile: Tile) -> Array | None:
    return tile.numbers("segments") if "segments" in tile.ref else None


def _document_of_chunk(ref: Refs, row: Array, chunk: Array, plan: Plan) -> Array | None:
    """[1]: that of the chunk's first token."""
    if "segments" not in ref:
        return None
    return plgpu.load(ref["segments"].at[row, chunk * plan.chunk + jnp.arange(1)])


def _masked(s: Array, seen: Array | None, queries: Array | None, keys: Array | None) -> Array:
    """Logits [queries, keys] with `LEAST` where not seen or of another document."""
    if queries is not None and keys is not None:
        same = queries[:, None] == keys[None, :]
        same = jnp.broadcast_to(same, s.shape)
        seen = same if seen is None else seen & same
    return s if seen is None else jnp.where(seen, s, LEAST)


def forward_kernel(*refs: Any, names: tuple[str, ...], plan: Plan) -> None:
    """o [B, L, H, K] and lse [B, H, L] of a tile of queries."""
    ref = dict(zip(names, refs, strict=True))
    head = pl.program_id(1)
    tile = Tile(plan, ref, pl.program_id(2), pl.program_id(0) * plan.queries, plan.queries)
    q = tile.heads("q", head)

    def visit(s: Array, k: Array, v: Array, carry: Any) -> Any:
        del k
        top, total, o = carry
        new_top = jnp.maximum(top, s.max(axis=1))
        p, before = jnp.exp2(s - new_top[:, None]), jnp.exp2(top - new_top)
        o = o * before[:, None] + plan.product(p.astype(v.dtype), v, 1, 0)
        return new_top, total * before + p.sum(axis=1), o

    start = (
        jnp.full((plan.queries,), LEAST, jnp.float32),
        jnp.zeros((plan.queries,), jnp.float32),
        jnp.zeros((plan.queries, plan.K), jnp.float32),
    )
    top, total, o = over_keys(tile, q, head, visit, start)
    tile.store("o", head, o / total[:, None])
    tile.store_numbers("lse", head, (top + jnp.log2(total)) * LN_2)


def queries_kernel(*refs: Any, names: tuple[str, ...], plan: Plan) -> None:
    """dq of a tile of queries, from do, lse and delta, the sums of o do less the gradient of lse.

    p = exp(l - lse), dl = p (do v - delta), dq = scale dl k."""
    ref = dict(zip(names, refs, strict=True))
    head = pl.program_id(1)
    tile = Tile(plan, ref, pl.program_id(2), pl.program_id(0) * plan.queries, plan.queries)
    q, do = tile.heads("q", head), tile.heads("do", head)
    lse, delta = tile.numbers("lse", head) * LOG2_E, tile.numbers("delta", head)

    def visit(s: Array, k: Array, v: Array, dq: Array) -> Array:
        p = jnp.exp2(s - lse[:, None])
        dl = p * (plan.product(do, v, 1, 1) - delta[:, None])
        return dq + plan.product(dl.astype(k.dtype), k, 1, 0)

    dq = over_keys(tile, q, head, visit, jnp.zeros((plan.queries, plan.K), jnp.float32))
    tile.store("dq", head, dq * (plan.scale * LN_2))


def keys_kernel(*refs: Any, names: tuple[str, ...], plan: Plan) -> None:
    """dk, dv of a tile of keys of the one band there is.

    dv = p do, dk = scale dl q, summed over queries and the heads of a group."""
    ref = dict(zip(names, refs, strict=True))
    key_head, row = pl.program_id(1), pl.program_id(2)
    ((near, far),) = plan.bands.values()
    keys = Tile(plan, ref, row, pl.program_id(0) * plan.keys, plan.keys)
    k, v, documents = keys.heads("k", key_head), keys.heads("v", key_head), _documents(keys)

    def of_head(i: Array, carry: Any) -> Any:
        head = key_head * plan.group + i

        def step(start: Array, masked: bool, carry: Any) -> Any:
            tile = Tile(plan, ref, row, start, plan.queries)
            s = _transposed_logits(tile, k, head, masked)
            age = tile.t[None, :] - keys.t[:, None]
            seen = (age >= near) & (age <= far) if masked else None
            s = _masked(s, seen, documents, _documents(tile))
            dk, dv, _ = _keys_backward(tile, s, v, head, masked)
            return carry[0] + dk, carry[1] + dv

        return over_tiles(
            keys.first + near,
            jnp.minimum(keys.last + far, plan.L - 1),
            (keys.last + near, jnp.minimum(keys.first + far, plan.L - 1)),
            plan.queries,
            step,
            carry,
        )

    nothing = jnp.zeros((plan.keys, plan.K), jnp.float32)
    dk, dv = lax.fori_loop(0, plan.group, of_head, (nothing, nothing))
    keys.store("dk", key_head, dk * (plan.scale * LN_2))
    keys.store("dv", key_head, dv)


def memory_kernel(*refs: Any, names: tuple[str, ...], plan: Plan) -> None:
    """The same of a tile of slots; and dbias, dl summed over queries."""
    ref = dict(zip(names, refs, strict=True))
    key_head, row = pl.program_id(1), pl.program_id(2)
    per_chunk = -(-plan.M // plan.slots)
    chunk = pl.program_id(0) // per_chunk
    slots = Slots(plan, ref, row, chunk, pl.program_id(0) % per_chunk * plan.slots)
    k, v = slots.heads("memory_k", key_head), slots.heads("memory_v", key_head)
    document = _document_of_chunk(ref, row, chunk, plan)
    first = chunk * plan.chunk
    last = jnp.minimum(first + plan.chunk, plan.L) - 1

    def of_head(i: Array, carry: Any) -> Any:
        head = key_head * plan.group + i
        bias = slots.bias(head)

        def step(start: Array, masked: bool, carry: Any) -> Any:
            tile = Tile(plan, ref, row, start, plan.queries)
            s = _transposed_logits(tile, k, head, masked) + bias[:, None]
            inside = (tile.t >= first) & (tile.t <= last)
            seen = jnp.broadcast_to(inside[None, :], s.shape) if masked else None
            s = _masked(s, seen, document, _documents(tile))
            dk, dv, dl = _keys_backward(tile, s, v, head, masked)
            return carry[0] + dk, carry[1] + dv, carry[2] + dl.sum(axis=1)

        nothing = jnp.zeros((plan.slots,), jnp.float32)
        dk, dv, dbias = over_tiles(
            first, last, (first, last), plan.queries, step, (*carry, nothing)
        )
        slots.store_bias(head, dbias)
        return dk, dv

    nothing = jnp.zeros((plan.slots, plan.K), jnp.float32)
    dk, dv = lax.fori_loop(0, plan.group, of_head, (nothing, nothing))
    slots.store("dk", key_head, dk * (plan.scale * LN_2))
    slots.store("dv", key_head, dv)


def _transposed_logits(tile: Tile, k: Array, head: Array, masked: bool) -> Array:
    q = tile.heads("q", head, whole=not masked)
    return tile.plan.product(k, q, 1, 1) * tile.plan.scale


def _keys_backward(
    tile: Tile, s: Array, v: Array, head: Array, masked: bool
) -> tuple[Array, Array, Array]:
    """dk / scale, dv and dl of one tile of queries; s, dl: [keys, queries]."""
    plan = tile.plan
    q, do = (tile.heads(name, head, whole=not masked) for name in ("q", "do"))
    lse, delta = tile.numbers("lse", head) * LOG2_E, tile.numbers("delta", head)
    p = jnp.exp2(s - lse[None, :])
    dv = plan.product(p.astype(do.dtype), do, 1, 0)
    dl = p * (plan.product(v, do, 1, 1) - delta[None, :])
    return plan.product(dl.astype(q.dtype), q, 1, 0), dv, dl
