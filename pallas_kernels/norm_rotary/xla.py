"""The definition in jax.numpy. The norm is rounded to x's dtype before the rotation."""

from jaxtyping import Array

from pallas_kernels.rms_norm import rms_norm
from pallas_kernels.rotary import rotary


def norm_rotary(
    x_BLHK: Array, scale_K: Array | None, positions_BL: Array, theta: float, eps: float
) -> Array:
    if scale_K is not None:
        x_BLHK = rms_norm(x_BLHK, scale_K, eps)
    return rotary(x_BLHK, positions_BL, theta)
