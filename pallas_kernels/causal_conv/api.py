"""The short causal convolution of a Mamba layer, with the SiLU behind it, in one operation.

    y_t = SiLU(bias + sum_{k < T} kernel_{T-1-k} x_{t-k})

(Mamba, arXiv 2312.00752, section 3.4.) Taps that lie before the start of t's document, or before
the row, count as zero.

Sums and SiLU are at least float32, rounded once; y has x's dtype, every gradient that of its input.

Implementations: "xla" (the definition, differentiated by JAX) and "pallas_triton".
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.arguments import expect
from pallas_kernels.causal_conv import pallas_triton, xla
from pallas_kernels.causal_conv.operands import Operands

__all__ = ["causal_conv", "causal_convs"]

IMPLEMENTATIONS = {"xla": xla.conv, "pallas_triton": pallas_triton.conv}


def causal_conv(
    x_BLE: Float[Array, "B L E"],
    kernel_TE: Float[Array, "T E"],
    bias_E: Float[Array, " E"],
    positions_BL: Int[Array, "B L"],
    tail_BSE: Float[Array, "B S E"] | None = None,
    *,
    implementation: str | None = None,
) -> Float[Array, "B L E"]:
    """Convolves along L and applies SiLU.

    Args:
      kernel_TE: of T taps; the last one weighs the token itself.
      positions_BL: of each token in its document.
      tail_BSE: the S = T - 1 inputs before the row (decoding); None: there are none.
      implementation: "xla", "pallas_triton", or None for the platform's best.

    Raises:
      ValueError: shapes or dtypes do not fit each other.
      Unsupported: the named implementation cannot take these inputs.
    """
    arrays = (x_BLE, kernel_TE, bias_E, positions_BL, tail_BSE)
    return causal_convs(*arrays, uses=1, implementation=implementation)[0]


def causal_convs(
    x_BLE: Float[Array, "B L E"],
    kernel_TE: Float[Array, "T E"],
    bias_E: Float[Array, " E"],
    positions_BL: Int[Array, "B L"],
    tail_BSE: Float[Array, "B S E"] | None = None,
    *,
    uses: int,
    implementation: str | None = None,
) -> tuple[Float[Array, "B L E"], ...]:
    """`causal_conv`, as many times the same y_BLE as it has uses.

    Their gradients are summed in the kernel, in float32; elsewhere that sum is written and read.

    Raises:
      ValueError: `uses` is not positive; otherwise as `causal_conv`.
    """
    if x_BLE.ndim != 3 or kernel_TE.ndim != 2:
        raise ValueError(f"{x_BLE.shape=} must be [B, L, E] and {kernel_TE.shape=} [T, E]")
    B, L, E = x_BLE.shape
    T = kernel_TE.shape[0]
    expect("kernel_TE", kernel_TE, (T, E), jnp.floating)
    expect("bias_E", bias_E, (E,), jnp.floating)
    expect("positions_BL", positions_BL, (B, L), jnp.integer)
    if tail_BSE is not None:
        expect("tail_BSE", tail_BSE, (B, T - 1, E), jnp.floating)
    if uses < 1:
        raise ValueError(f"{uses=} must be positive")
    operands = Operands(x_BLE, kernel_TE, bias_E, positions_BL, tail_BSE)
    return dispatch.run("causal_conv", IMPLEMENTATIONS, implementation, operands, uses)
