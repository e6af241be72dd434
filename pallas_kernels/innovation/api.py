"""The innovation test: how badly the mean of the states before it predicts a state.

    e_t = || s_t - mean(s_{t-1}, ..., s_{t-4}) ||^2

(arXiv 2407.06324: a moving average of 4 taps that is not learned.) Taps that lie before the start
of t's document do not exist: the mean is of the others, and zero where there are none.

Arithmetic and e are float32 (float64 for float64 states).

Implementations: "xla" (the definition, differentiated by JAX) and "pallas_triton".
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.arguments import expect
from pallas_kernels.innovation import pallas_triton, xla
from pallas_kernels.innovation.xla import TAPS

__all__ = ["TAPS", "innovation"]

IMPLEMENTATIONS = {"xla": xla.innovation, "pallas_triton": pallas_triton.innovation}


def innovation(
    s_BLD: Float[Array, "B L D"],
    positions_BL: Int[Array, "B L"],
    tail_BSD: Float[Array, "B S D"] | None = None,
    *,
    implementation: str | None = None,
) -> Float[Array, "B L"]:
    """Squared error of predicting s_t by the mean of the up to 4 states before it.

    Args:
      positions_BL: of each token in its document.
      tail_BSD: the S = 4 states before the row (decoding); None: there are none.
      implementation: "xla", "pallas_triton", or None for the platform's best.

    Returns:
      e_BL >= 0; at the start of a document e = ||s||^2.

    Raises:
      ValueError: shapes or dtypes do not fit each other.
      Unsupported: the named implementation cannot take these inputs.
    """
    if s_BLD.ndim != 3:
        raise ValueError(f"{s_BLD.shape=} must be [B, L, D]")
    B, L, D = s_BLD.shape
    expect("s_BLD", s_BLD, (B, L, D), jnp.floating)
    expect("positions_BL", positions_BL, (B, L), jnp.integer)
    if tail_BSD is not None:
        expect("tail_BSD", tail_BSD, (B, TAPS, D), jnp.floating)
    return dispatch.run(
        "innovation", IMPLEMENTATIONS, implementation, s_BLD, positions_BL, tail_BSD
    )
