"""Keys and values into rings by jax.numpy: the definition."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from pallas_kernels.rms_norm import rms_norm

Pair = tuple[Array, Array]


def write_keys(
    rings: Sequence[Pair],
    keys_values: Sequence[Pair],
    time_BL: Array,
    real_BL: Array,
    scale_K: Array | None,
    eps: float,
) -> list[Pair]:
    written = []
    for (k_BRGK, v_BRGK), (k_BLGK, v_BLGK) in zip(rings, keys_values, strict=True):
        if scale_K is not None:
            k_BLGK = rms_norm(k_BLGK, scale_K, eps)
        ring = (
            write_ring(k_BRGK, k_BLGK, time_BL, real_BL),
            write_ring(v_BRGK, v_BLGK, time_BL, real_BL),
        )
        # Read where it was written: XLA would choose between old and new once more for every use,
        # and copy the ring.
        written.append(jax.lax.optimization_barrier(ring))
    return written


def write_ring(
    buffer_BR: Array, new_BL: Array, time_BL: Int[Array, "B L"], real_BL: Bool[Array, "B L"]
) -> Array:
    """Puts the real tokens of new_BL[B, L, ...] into their slots of a ring [B, R, ...], L <= R.

    What is not real writes what lies there. Dropping it as out of range is not safe: where scatters
    are to be deterministic XLA for GPUs takes the slot behind a row for the first of the next
    (JAX 0.11).
    """
    slot_BL = time_BL % buffer_BR.shape[1]
    real, slot = (v.reshape(*slot_BL.shape, *(1,) * (new_BL.ndim - 2)) for v in (real_BL, slot_BL))
    old_BL = jnp.take_along_axis(buffer_BR, slot, axis=1, mode="promise_in_bounds")
    new_BL = jnp.where(real, new_BL.astype(buffer_BR.dtype), old_BL)
    row_B1 = jnp.arange(buffer_BR.shape[0])[:, None]
    return buffer_BR.at[row_B1, slot_BL].set(new_BL, mode="promise_in_bounds", unique_indices=True)
