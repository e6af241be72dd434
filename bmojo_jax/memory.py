"""Long-term eidetic memory: which past tokens are kept verbatim, in parallel and streaming form.

    innovation  e_t = || s_t - mean(s_{t-1}, ..., s_{t-4}) ||^2      taps of t's document only
    memory of chunk c, whose first token is s = c C:
        the M largest e_t among t <= s - W of the document that is open at s; ties: the earlier.

Source: arXiv 2407.06324 (innovation test with a non-learned moving average of 4 taps); chunks,
ties and documents are ours. All queries of a chunk share a memory, and a token becomes a candidate
when it has left the window of every query of the chunk.

"The M largest of a prefix" obeys top(A u B) = top(top(A) u top(B)), so the training form and the
decoding form (`absorb`, once per chunk) are the same function. The training form (`select`) takes
the top M of the last few chunks' candidates before every chunk, then the top M of several such
lists, which together cover a multiple of the chunks, until a list covers the whole prefix: one to
three merges, each a `top_k` of about MERGED candidates for every chunk, O(L) work for fixed M, C.

`recall` gathers what is kept. On a GPU its gradient is gathers too, see `_sums_of_stays`.

Compiled for an H100, `select` is 5 kernels at L = 2048 and 11 at L = 131,072 (M = 64, C = 256; an
associative scan over the chunks: 25 and 88), which move 0.4 and 63 MB; `top_k` is one kernel that
sorts each row in shared memory (up to 4096 candidates; three kernels for 8192), for M <= 16 of at
least 1024 candidates XLA's own TopK kernel. `innovation` is one fused reduction that reads s in its
own dtype, after a small kernel that makes the masks.

Innovations are float32 (float64 for float64 inputs). The choice carries no gradient.

Example: W = 2, C = 2, M = 1 and e = [5, 1, 7, 7, 2, 0]: chunk 0 (s = 0) and chunk 1 (s = 2, one
candidate: t = 0) see {} and {0}; chunk 2 (s = 4, candidates 0, 1, 2) sees {2}.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from bmojo_jax.layers import at_least_float32

# The name, for policies of `jax.checkpoint`, of which tokens are kept: a few bytes, much work.
SAVED = "selection"
TAPS = 4  # of the moving average
# Candidates that one merge looks at: fewer would take more merges, each a few kernels, more larger
# sorts for every chunk.
MERGED = 2048
STAY = 8  # chunks whose gradients of a token are added up at once


class Selection(NamedTuple):
    """The memory of every chunk, slots ordered by time, empty slots first."""

    index_BZM: Int[Array, "B Z M"]  # token in the row; 0 in an empty slot
    valid_BZM: Bool[Array, "B Z M"]


class Slots(NamedTuple):
    """The memory of one chunk while decoding, slots ordered by time, empty slots first."""

    innovation_BM: Float[Array, "B M"]  # -inf in an empty slot
    time_BM: Int[Array, "B M"]  # tokens since the start of the row; -1 in an empty slot


def innovation(
    s_BLD: Float[Array, "B L D"],
    positions_BL: Int[Array, "B L"],
    tail_BSD: Float[Array, "B S D"] | None = None,
) -> Float[Array, "B L"]:
    """Squared error of predicting s_t by the mean of the up to 4 states before it.

    Args:
      positions_BL: of each token in its document; taps before the document do not exist.
      tail_BSD: the S = 4 states before the row (decoding); None: there are none.

    Returns:
      e_BL >= 0; at the start of a document e = ||s||^2.
    """
    length = s_BLD.shape[1]
    zero = jnp.zeros((), at_least_float32(s_BLD.dtype))
    # Behind the barrier masks and zeros are a layer's own: XLA would take them out of the loop over
    # layers, filled out to [B, L, D], and read them from memory in every layer.
    s_BLD, positions_BL, zero = jax.lax.optimization_barrier((s_BLD, positions_BL, zero))
    s_BLD = s_BLD.astype(zero.dtype)
    if tail_BSD is None:
        padded = jnp.pad(s_BLD, ((0, 0), (TAPS, 0), (0, 0)))
    else:
        padded = jnp.concatenate([tail_BSD.astype(s_BLD.dtype), s_BLD], axis=1)
    total_BLD = jnp.zeros_like(s_BLD)
    for back in range(1, TAPS + 1):
        exists_BL1 = (positions_BL >= back)[:, :, None]
        total_BLD += jnp.where(exists_BL1, padded[:, TAPS - back : TAPS - back + length], zero)
    count_BL = jnp.clip(positions_BL, 1, TAPS).astype(s_BLD.dtype)
    return jnp.sum(jnp.square(s_BLD - total_BLD / count_BL[:, :, None]), axis=-1)


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


def recall(
    tokens: Mapping[str, Array], chosen: Selection, *, window: int, chunk: int
) -> dict[str, Array]:
    """What the chosen tokens hold: arrays [B, L, ...] by name to [B, Z, M, ...].

    An empty slot holds some token, and gives it no gradient.

    Args:
      chosen: of `select` with these `window` and `chunk`.
    """
    time_BZM = jnp.where(chosen.valid_BZM, chosen.index_BZM, -1)

    def taken(x: Array) -> Array:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return _rows(x, chosen.index_BZM)
        return _recall(window, chunk, x.shape[1], x, time_BZM)

    return {name: taken(x) for name, x in tokens.items()}


def _rows(x: Array, index: Array) -> Array:
    """Rows of [B, S, ...] at indices [B, *shape] into S; what is out of range is clipped."""
    take = functools.partial(jnp.take, axis=0, mode="clip")
    return jax.vmap(take)(x, index)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _recall(window: int, chunk: int, length: int, x: Array, time_BZM: Array) -> Array:
    return _rows(x, time_BZM)


def _recall_forward(
    window: int, chunk: int, length: int, x: Array, time_BZM: Array
) -> tuple[Array, Array]:
    return _rows(x, time_BZM), time_BZM


def _recall_backward(
    window: int, chunk: int, length: int, time_BZM: Array, d_kept: Array
) -> tuple[Array, None]:
    """Of every token the sum over all chunks that keep it, in float32."""
    options = {"window": window, "chunk": chunk, "length": length}
    d_x = jax.lax.platform_dependent(
        time_BZM,
        d_kept,
        cuda=functools.partial(_sums_of_stays, **options),
        default=functools.partial(_sums_by_scatter, length=length),
    )
    return d_x, None


_recall.defvjp(_recall_forward, _recall_backward)


def _sums_by_scatter(time_BZM: Array, d_kept: Array, *, length: int) -> Array:
    wide = d_kept.astype(at_least_float32(d_kept.dtype))
    flat = wide.reshape(wide.shape[0], -1, *wide.shape[3:])
    # Empty slots are out of range, and left out.
    time = jnp.where(time_BZM >= 0, time_BZM, length).reshape(flat.shape[:2])
    zeros = jnp.zeros((length, *flat.shape[2:]), wide.dtype)
    sums = jax.vmap(lambda time, d: zeros.at[time].add(d, mode="drop"))(time, flat)
    return sums.astype(d_kept.dtype)


def _sums_of_stays(
    time_BZM: Array, d_kept: Array, *, window: int, chunk: int, length: int
) -> Array:
    """The same by gathers alone.

    On a GPU a scatter adds rows up in any order, or in several sorted passes where that is not
    allowed. But a token that is kept is so from the first chunk for which it is a candidate until
    it is dropped for good. So STAY terms of its sum are looked up and added at once, first those
    from every slot on, until STAY such sums are all of a token's. At L = 32,768, M = 64, C = 256
    the gradients of keys and values [L, 4, 128] move 0.3 GB so, 0.7 GB by scatters, 2.1 GB by
    sorted ones.
    """
    batch, num_chunks, size = time_BZM.shape

    def stays(time_BS: Array, chunk_S: Array, step: int) -> Array:
        """Where tokens are kept `step` chunks apart from these on: [B, S, STAY] flat, or -1.

        For an empty slot that is nonsense, and so is the sum, which no token looks up.
        """
        later_SR = chunk_S[:, None] + step * jnp.arange(STAY)[None, :]
        kept_BSRM = jnp.take(time_BZM, later_SR, axis=1, mode="clip")
        same = kept_BSRM == time_BS[:, :, None, None]
        same &= (later_SR < num_chunks)[None, :, :, None]
        number = later_SR[:, :, None] * size + jnp.arange(1, size + 1)[None, None, :]
        return jnp.sum(jnp.where(same, number[None], 0), axis=-1) - 1

    def added(sums: Array, from_BSR: Array) -> Array:
        total = jnp.zeros((batch, from_BSR.shape[1], *sums.shape[2:]), wide)
        for nth in range(STAY):
            index_BS = from_BSR[:, :, nth]
            there = (index_BS >= 0).reshape(*index_BS.shape, *(1,) * (sums.ndim - 2))
            total += jnp.where(there, _rows(sums, index_BS).astype(wide), 0)
        return total

    wide = at_least_float32(d_kept.dtype)
    sums = d_kept.reshape(batch, num_chunks * size, *d_kept.shape[3:])
    step = 1
    while step * STAY < num_chunks:
        chunk_S = jnp.repeat(jnp.arange(num_chunks), size)
        sums = added(sums, stays(time_BZM.reshape(batch, -1), chunk_S, step))
        step *= STAY
    time_L = jnp.arange(length)
    first_L = -(-(time_L + window) // chunk)
    time_BL = jnp.broadcast_to(time_L[None], (batch, length))
    return added(sums, stays(time_BL, first_L, step)).astype(d_kept.dtype)


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
