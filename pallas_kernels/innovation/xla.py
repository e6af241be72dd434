"""The definition in jax.numpy: shifted copies of the row, which XLA fuses into one reduction.

It reads s in its own dtype, after a small kernel that makes the masks.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

TAPS = 4  # of the moving average


def innovation(s_BLD: Array, positions_BL: Array, tail_BSD: Array | None) -> Array:
    length = s_BLD.shape[1]
    zero = jnp.zeros((), jnp.promote_types(s_BLD.dtype, jnp.float32))
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
