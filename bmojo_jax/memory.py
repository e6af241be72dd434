"""Long-term eidetic memory: which past tokens are kept verbatim, in parallel and streaming form.

    innovation  e_t = || s_t - mean(s_{t-1}, ..., s_{t-4}) ||^2      taps of t's document only
    memory of chunk c, whose first token is s = c C:
        the M largest e_t among t <= s - W of the document that is open at s; ties: the earlier.

Source: arXiv 2407.06324 (innovation test with a non-learned moving average of 4 taps); chunks,
ties and documents are ours. All queries of a chunk share a memory, and a token becomes a candidate
when it has left the window of every query of the chunk.

"The M largest of a prefix" obeys top(A u B) = top(top(A) u B), so the training form (an associative
scan over chunks, O(L) work for fixed M / C) and the decoding form (`absorb`, once per chunk) are
the same function. Both call `keep_largest`, whose output is ordered by time with empty slots first.

Innovations are float32 (float64 for float64 inputs). The choice carries no gradient.

Example: W = 2, C = 2, M = 1 and e = [5, 1, 7, 7, 2, 0]: chunk 0 (s = 0) and chunk 1 (s = 2, one
candidate: t = 0) see {} and {0}; chunk 2 (s = 4, candidates 0, 1, 2) sees {2}.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from bmojo_jax.layers import at_least_float32

TAPS = 4  # of the moving average


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
    s_BLD = s_BLD.astype(at_least_float32(s_BLD.dtype))
    if tail_BSD is None:
        padded = jnp.pad(s_BLD, ((0, 0), (TAPS, 0), (0, 0)))
    else:
        padded = jnp.concatenate([tail_BSD.astype(s_BLD.dtype), s_BLD], axis=1)
    total_BLD = jnp.zeros_like(s_BLD)
    for back in range(1, TAPS + 1):
        exists_BL1 = (positions_BL >= back)[:, :, None]
        total_BLD += jnp.where(exists_BL1, padded[:, TAPS - back : TAPS - back + length], 0)
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
    # Chunk c adds the C tokens t = s - W - C + 1 .. s - W to its predecessor's candidates.
    lag = window + chunk - 1
    time_ZC = jnp.arange(num_chunks * chunk).reshape(num_chunks, chunk) - lag
    padded_BL = jnp.pad(e_BL, ((0, 0), (lag, 0)), constant_values=-jnp.inf)
    e_BZC = padded_BL[:, : num_chunks * chunk].reshape(batch, num_chunks, chunk)
    start_BZ = start_BL[:, ::chunk]
    open_BZC = time_ZC[None] >= jnp.maximum(start_BZ, 0)[:, :, None]
    value_BZM, index_BZM = keep_largest(jnp.where(open_BZC, e_BZC, -jnp.inf), size)
    first_Z1 = time_ZC[:, :1]
    time_BZM = jnp.where(index_BZM >= 0, index_BZM + first_Z1[None], -1)
    fresh_BZ = start_BZ != jnp.pad(start_BZ, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]

    def merge(before, after):
        fresh_before, value_before, time_before = before
        fresh_after, value_after, time_after = after
        value_before = jnp.where(fresh_after[..., None], -jnp.inf, value_before)
        value = jnp.concatenate([value_before, value_after], axis=-1)
        time = jnp.concatenate([time_before, time_after], axis=-1)
        value, index = keep_largest(value, size)
        kept = jnp.take_along_axis(time, jnp.maximum(index, 0), axis=-1)
        return fresh_before | fresh_after, value, jnp.where(index >= 0, kept, -1)

    _, _, time_BZM = jax.lax.associative_scan(merge, (fresh_BZ, value_BZM, time_BZM), axis=1)
    return Selection(index_BZM=jnp.maximum(time_BZM, 0), valid_BZM=time_BZM >= 0)


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
