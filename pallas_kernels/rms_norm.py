"""RMS norm (arXiv 1910.07467)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(
    x: Float[Array, "*shape D"], scale_D: Float[Array, " D"], eps: float
) -> Float[Array, "*shape D"]:
    """x / sqrt(mean x^2 + eps) * scale over the last axis, in x's dtype; float32 inside."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    scale = scale_D.reshape((1,) * (x.ndim - 1) + scale_D.shape)
    return (wide * inverse * scale).astype(x.dtype)
