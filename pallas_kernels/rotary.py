"""Rotary positions (arXiv 2104.09864)."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def rotary(
    x: Float[Array, "*shape H K"], positions: Int[Array, "*shape"], theta: float
) -> Float[Array, "*shape H K"]:
    """Rotates the pairs (x_k, x_{k + K/2}) of each head by position * theta^(-2k/K).

    Positions may be negative (slots of the eidetic memory). Angles are float32.
    """
    half = x.shape[-1] // 2
    wide = jnp.promote_types(x.dtype, jnp.float32)
    frequency = jnp.exp(jnp.arange(half, dtype=wide) * (-math.log(theta) / half))
    angle = positions.astype(wide)[..., None, None] * frequency.reshape(
        (1,) * (positions.ndim + 1) + (half,)
    )
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = x[..., :half].astype(wide), x[..., half:].astype(wide)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def fixed_frequencies(K: int, theta: float) -> Int[Array, " K2"]:
    """[K / 2]: theta^(-2k/K) per position in 2^-32 of a turn, rounded, for kernels.

    Products with positions are exact but for whole turns, which overflow."""
    per_position = theta ** (-2 * np.arange(K // 2) / K) / (2 * math.pi)
    return jnp.asarray(np.round(per_position * 2**32).astype(np.int64).astype(np.int32))
