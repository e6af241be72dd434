"""Long-term eidetic memory: which past tokens are kept verbatim, in parallel and streaming form.

    innovation e_t: how badly the states before t predict that of t    `pallas_kernels.innovation`
    memory of chunk c, whose first token is s = c C:
        the M largest e_t among t <= s - W of the document that is open at s; ties: the earlier.

Source: arXiv 2407.06324 (innovation test); chunks, ties and documents are ours. All queries of a
chunk share a memory, and a token becomes a candidate when it has left the window of every query of
the chunk.

"The M largest of a prefix" obeys top(A u B) = top(top(A) u top(B)), so the training form and the
decoding form (`absorb`, once per chunk) are the same function. The training form (`select`) takes
the top M of the last few chunks' candidates before every chunk, then the top M of several such
lists, which together cover a multiple of the chunks, until a list covers the whole prefix: one to
three merges, each a `top_k` of about MERGED candidates for every chunk, O(L) work for fixed M, C.

`recall` gathers what is kept. On a GPU its gradient is gathers too, see `_sums_by_sort`.

Compiled for an H100, `select` is 5 kernels at L = 2048 and 11 at L = 131,072 (M = 64, C = 256; an
associative scan over the chunks: 25 and 88), which move 0.4 and 63 MB; `top_k` is one kernel that
sorts each row in shared memory (up to 4096 candidates; three kernels for 8192), for M <= 16 of at
least 1024 candidates XLA's own TopK kernel. The choice carries no gradient.

Example: W = 2, C = 2, M = 1 and e = [5, 1, 7, 7, 2, 0]: chunk 0 (s = 0) and chunk 1 (s = 2, one
candidate: t = 0) see {} and {0}; chunk 2 (s = 4, candidates 0, 1, 2) sees {2}.
"""

import functools
from collections.abc import Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from bmojo_jax.layers import at_least_float32

# The name, for policies of `jax.checkpoint`, of which tokens are kept: a few bytes, much work.
SAVED = "selection"
# Candidates that one merge looks at: fewer would take more merges, each a few kernels, more larger
# sorts for every chunk.
MERGED = 2048
STAY = 8  # gradients of a token that are added up at once


class Selection(NamedTuple):
    """The memory of every chunk, slots ordered by time, empty slots first."""

    index_BZM: Int[Array, "B Z M"]  # token in the row; 0 in an empty slot
    valid_BZM: Bool[Array, "B Z M"]


class Slots(NamedTuple):
    """The memory of one chunk while decoding, slots ordered by time, empty slots first."""

    innovation_BM: Float[Array, "B M"]  # -inf in an empty slot
    time_BM: Int[Array, "B M"]  # tokens since the start of the row; -1 in an empty slot


def order(
    positions_BL: Int[Array, "B L"], selection: Literal["random", "newest", "oldest"]
) -> Float[Array, "B L"]:
    """What stands for innovations where these do not choose: above 0, of positions alone, float32.

    "random" is one order of all positions, the same in every document, layer and run: seeds do not
    draw another one.
    """
    match selection:
        case "newest":
            return 1.0 + positions_BL.astype(jnp.float32)
        case "oldest":
            return 1.0 / (1.0 + positions_BL.astype(jnp.float32))
        case _:
            bits_BL = jax.vmap(jax.vmap(_scrambled))(positions_BL)
            return (1.0 + (bits_BL >> 8).astype(jnp.float32)) / 2.0**24


def _scrambled(position: Array) -> Array:
    return jax.random.bits(jax.random.fold_in(jax.random.key(0), position), dtype=jnp.uint32)


def keep_largest(
    e: Float[Array, "*batch S"], size: int
) -> tuple[Float[Array, "*batch M"], Int[Array, "*batch M"]]:
    """The `size` largest of candidates that are ordered by time; ties: the earlier stays.

    Args:
      e: candidates along the last axis, ordered by time; -inf: no candidate.

    Returns:
      Their values and their indices into the last axis, ordered by time, empty slots
      (value -inf, index -1) first.
    """
    missing = max(size - e.shape[-1], 0)
    e = jnp.pad(e, [(0, 0)] * (e.ndim - 1) + [(missing, 0)], constant_values=-jnp.inf)
    # top_k prefers the lower index among equals: the earlier token.
    value, index = jax.lax.top_k(e, size)
    index = jnp.sort(jnp.where(value > -jnp.inf, index, -1), axis=-1)
    kept = jnp.take_along_axis(e, jnp.maximum(index, 0), axis=-1)
    return (
        jnp.where(index >= 0, kept, -jnp.inf),
        jnp.where(index >= 0, index - missing, -1),
    )


def select(
    e_BL: Float[Array, "B L"],
    start_BL: Int[Array, "B L"],
    *,
    window: int,
    chunk: int,
    size: int,
) -> Selection:
    """The eidetic memory of every chunk of a row: the parallel form.

    Args:
      e_BL: innovations.
      start_BL: index of the first token of each token's document (zeros: one document).
      window: W, keys in the window, the query's own included.
      chunk: C. There are Z = ceil(L / C) chunks.
      size: M.
    """
    batch, length = e_BL.shape
    num_chunks = -(-length // chunk)
    e_BL = jax.lax.stop_gradient(e_BL)
    oldest_BZ = jnp.maximum(start_BL[:, ::chunk], 0)
    number_Z = jnp.arange(num_chunks, dtype=jnp.int32)

    def largest(value_BZS: Array, time_BZS: Array) -> tuple[Array, Array]:
        """The largest of each chunk's candidates, in which equals are ordered by time.

        A list of an earlier chunk holds tokens of the document that was open there. Where that is
        another one, all of them are older than the chunk's: none is kept.
        """
        is_open = time_BZS >= oldest_BZ[:, :, None]
        kept = min(size, value_BZS.shape[2])
        value, index = jax.lax.top_k(jnp.where(is_open, value_BZS, -jnp.inf), kept)
        time = jnp.take_along_axis(time_BZS, index, axis=2)
        return value, jnp.where(value > -jnp.inf, time, -1)

    # How many chunks' candidates the list of a chunk covers, its own the last of them.
    span = min(max(MERGED // chunk, 1), num_chunks)
    time_ZS = number_Z[:, None] * chunk - window + jnp.arange(1 - span * chunk, 1)[None, :]
    value_BZM, time_BZM = largest(
        jnp.take(e_BL, time_ZS, axis=1, mode="clip"),
        jnp.broadcast_to(time_ZS[None], (batch, *time_ZS.shape)),
    )
    while span < num_chunks:
        kept = value_BZM.shape[2]
        lists = min(max(MERGED // kept, 2), -(-num_chunks // span))
        # Older lists first: top_k prefers the lower index among equals. What lies before chunk 0 is
        # clipped to its list, which is empty.
        from_ZR = number_Z[:, None] + span * jnp.arange(1 - lists, 1)[None, :]
        value_BZRM = jnp.take(value_BZM, from_ZR, axis=1, mode="clip")
        time_BZRM = jnp.take(time_BZM, from_ZR, axis=1, mode="clip")
        merged = (batch, num_chunks, lists * kept)
        value_BZM, time_BZM = largest(value_BZRM.reshape(merged), time_BZRM.reshape(merged))
        span *= lists
    missing = size - time_BZM.shape[2]
    time_BZM = jnp.pad(
        jnp.sort(time_BZM, axis=2), ((0, 0), (0, 0), (missing, 0)), constant_values=-1
    )
    time_BZM = checkpoint_name(time_BZM, SAVED)
    return Selection(index_BZM=jnp.maximum(time_BZM, 0), valid_BZM=time_BZM >= 0)


def recall(tokens: Mapping[str, Array], chosen: Selection) -> dict[str, Array]:
    """What the chosen tokens hold: arrays [B, L, ...] by name to [B, Z, M, ...].

    An empty slot holds some token, and gives it no gradient.

    Args:
      chosen: of `select`; a chunk may choose a token once.
    """
    time_BZM = jnp.where(chosen.valid_BZM, chosen.index_BZM, -1)

    def taken(x: Array) -> Array:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return _rows(x, chosen.index_BZM)
        return _recall(x.shape[1], x, time_BZM)

    return {name: taken(x) for name, x in tokens.items()}


def _rows(x: Array, index: Array) -> Array:
    """Rows of [B, S, ...] at indices [B, *shape] into S; what is out of range is clipped."""
    take = functools.partial(jnp.take, axis=0, mode="clip")
    return jax.vmap(take)(x, index)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recall(length: int, x: Array, time_BZM: Array) -> Array:
    return _rows(x, time_BZM)


def _recall_forward(length: int, x: Array, time_BZM: Array) -> tuple[Array, Array]:
    return _rows(x, time_BZM), time_BZM


def _recall_backward(length: int, time_BZM: Array, d_kept: Array) -> tuple[Array, None]:
    """Of every token the sum over all chunks that keep it, in float32."""
    d_x = jax.lax.platform_dependent(
        time_BZM,
        d_kept,
        cuda=functools.partial(_sums_by_sort, length=length),
        default=functools.partial(_sums_by_scatter, length=length),
    )
    return d_x, None


_recall.defvjp(_recall_forward, _recall_backward)


def _sums_by_scatter(time_BZM: Array, d_kept: Array, *, length: int) -> Array:
    # Empty slots, whose time is -1, add nothing.
    some = (time_BZM >= 0).reshape(*time_BZM.shape, *(1,) * (d_kept.ndim - 3))
    wide = jnp.where(some, d_kept, 0).astype(at_least_float32(d_kept.dtype))
    flat = wide.reshape(wide.shape[0], -1, *wide.shape[3:])
    time = jnp.maximum(time_BZM, 0).reshape(flat.shape[:2])
    zeros = jnp.zeros((length, *flat.shape[2:]), wide.dtype)
    sums = jax.vmap(lambda time, d: zeros.at[time].add(d, mode="promise_in_bounds"))(time, flat)
    return sums.astype(d_kept.dtype)


def _sums_by_sort(time_BZM: Array, d_kept: Array, *, length: int) -> Array:
    """The same without a scatter, whose order of additions is not fixed on a GPU, or which sorts
    all that it adds where it must be.

    Slots are sorted by their token, so that a token's terms are neighbours: at most one a chunk.
    STAY neighbours are added at once, then STAY such sums, until a token's first slot has all of
    its terms; then tokens look there.
    """
    batch, num_chunks, size = time_BZM.shape
    wide = at_least_float32(d_kept.dtype)
    token_BS = jnp.where(time_BZM >= 0, time_BZM, length).reshape(batch, num_chunks * size)
    order_BS = jnp.argsort(token_BS, axis=1, stable=True)
    token_BS = jnp.take_along_axis(token_BS, order_BS, axis=1)
    sums = _rows(d_kept.reshape(*token_BS.shape, *d_kept.shape[3:]), order_BS)

    def where(there: Array, rows: Array) -> Array:
        return jnp.where(there.reshape(*there.shape, *(1,) * (rows.ndim - 2)), rows, 0)

    def later(v: Array, steps: int, fill: int) -> Array:
        after = jnp.full((batch, min(steps, v.shape[1]), *v.shape[2:]), fill, v.dtype)
        return jnp.concatenate([v[:, steps:], after], axis=1)

    reach = 1
    while reach < num_chunks:
        # Once in memory: a fusion would look up or add the same rows again for every term.
        total = sums = jax.lax.optimization_barrier(sums).astype(wide)
        for steps in range(reach, min(reach * STAY, num_chunks), reach):
            total += where(later(token_BS, steps, -1) == token_BS, later(sums, steps, 0))
        sums, reach = total, reach * STAY
    sums = jax.lax.optimization_barrier(sums)
    time_L = jnp.arange(length)
    search = functools.partial(jnp.searchsorted, v=time_L, method="scan_unrolled")
    first_BL = jax.vmap(search)(token_BS)
    found_BL = jnp.take_along_axis(token_BS, first_BL, axis=1, mode="clip") == time_L[None]
    d_x = where(found_BL, _rows(sums, first_BL)).astype(d_kept.dtype)
    return jax.lax.optimization_barrier(d_x)  # it is read several times


def empty_slots(batch: int, size: int, dtype: jax.typing.DTypeLike = jnp.float32) -> Slots:
    """A memory that holds nothing."""
    return Slots(
        innovation_BM=jnp.full((batch, size), -jnp.inf, dtype),
        time_BM=jnp.full((batch, size), -1, jnp.int32),
    )


def absorb(
    slots: Slots,
    e_BC: Float[Array, "B C"],
    time_BC: Int[Array, "B C"],
    start_B: Int[Array, " B"],
) -> tuple[Slots, Int[Array, "B M"]]:
    """The memory of the next chunk, whose first token is s: the streaming form.

    Args:
      slots: the memory of the chunk before.
      e_BC: innovations of the tokens s - W - C + 1 .. s - W, ordered by time.
      time_BC: their times; negative: there is no such token.
      start_B: time of the first token of the document that is open at s. What is older is dropped.

    Returns:
      The new slots, and for each where it comes from: i < M is slot i of the old memory,
      M + j is candidate j, -1 is an empty slot.
    """
    size = slots.time_BM.shape[1]
    e = jnp.concatenate([slots.innovation_BM, e_BC.astype(slots.innovation_BM.dtype)], axis=1)
    time = jnp.concatenate([slots.time_BM, time_BC.astype(slots.time_BM.dtype)], axis=1)
    open_ = time >= jnp.maximum(start_B, 0)[:, None]
    value_BM, source_BM = keep_largest(jnp.where(open_, e, -jnp.inf), size)
    kept_BM = jnp.take_along_axis(time, jnp.maximum(source_BM, 0), axis=1)
    time_BM = jnp.where(source_BM >= 0, kept_BM, -1)
    return Slots(innovation_BM=value_BM, time_BM=time_BM), source_BM


def slot_positions(
    chunk_position: Int[Array, "*shape"], *, window: int, fading_window: int, size: int
) -> Int[Array, "*shape M"]:
    """Virtual rotary positions of the slots: the newest at s - W - F, the others right behind it.

    Whatever the length of the sequence, the distance of a query of the chunk to a slot is then
    below W + F + C + M.

    Args:
      chunk_position: position of the chunk's first token s.
      fading_window: F.
      size: M.
    """
    newest = chunk_position[..., None] - (window + fading_window)
    offset = jnp.arange(1 - size, 1).reshape((1,) * chunk_position.ndim + (size,))
    return newest + offset
