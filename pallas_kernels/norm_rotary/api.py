"""What queries and keys go through before attention: the norm of each head, then its rotation.

    n = x / sqrt(mean x^2 + eps) * scale                            over the K channels of a head
    y_k         = n_k cos(a_k) - n_{k + K/2} sin(a_k)               a_k = position * theta^(-2k/K)
    y_{k + K/2} = n_{k + K/2} cos(a_k) + n_k sin(a_k)               k < K/2

(QK-norm, arXiv 2302.05442 section 2; RMS norm, arXiv 1910.07467; rotary positions, arXiv
2104.09864.)

Arithmetic is float32 or wider; y has x's dtype, every gradient that of its input.

Implementations: "xla" (the definition, differentiated by JAX) and "pallas_triton".
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.arguments import expect
from pallas_kernels.norm_rotary import pallas_triton, xla

__all__ = ["norm_rotary"]

IMPLEMENTATIONS = {"xla": xla.norm_rotary, "pallas_triton": pallas_triton.norm_rotary}


def norm_rotary(
    x_BLHK: Float[Array, "B L H K"],
    scale_K: Float[Array, " K"] | None,
    positions_BL: Int[Array, "B L"],
    *,
    theta: float,
    eps: float,
    implementation: str | None = None,
) -> Float[Array, "B L H K"]:
    """Norms and rotates every head.

    Args:
      scale_K: of the norm, the same for all heads; None: heads are rotated only.
      positions_BL: any integers.
      implementation: "xla", "pallas_triton", or None for the platform's best.

    Raises:
      ValueError: shapes or dtypes do not fit each other.
      Unsupported: the named implementation cannot take these inputs.
    """
    if x_BLHK.ndim != 4 or x_BLHK.shape[3] % 2:
        raise ValueError(f"{x_BLHK.shape=} must be [B, L, H, K] with an even K")
    B, L, _, K = x_BLHK.shape
    if scale_K is not None:
        expect("scale_K", scale_K, (K,), jnp.floating)
    expect("positions_BL", positions_BL, (B, L), jnp.integer)
    arguments = (x_BLHK, scale_K, positions_BL, theta, eps)
    return dispatch.run("norm_rotary", IMPLEMENTATIONS, implementation, *arguments)
