"""The convolution in jax.numpy: shifted copies of the row, which XLA fuses."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.causal_conv.operands import Operands


def conv(operands: Operands, uses: int) -> tuple[Array, ...]:
    x_BLE, kernel_TE, bias_E, positions_BL, tail_BSE = operands
    taps = kernel_TE.shape[0]
    length = x_BLE.shape[1]
    if tail_BSE is None:
        padded = jnp.pad(x_BLE, ((0, 0), (taps - 1, 0), (0, 0)))
    else:
        padded = jnp.concatenate([tail_BSE.astype(x_BLE.dtype), x_BLE], axis=1)
    wide = jnp.promote_types(x_BLE.dtype, jnp.float32)
    y_BLE = jnp.broadcast_to(bias_E[None, None, :], x_BLE.shape).astype(wide)
    for back in range(taps):
        first = taps - 1 - back
        shifted = padded[:, first : first + length].astype(wide)
        if back:
            shifted = jnp.where((positions_BL >= back)[:, :, None], shifted, 0)
        y_BLE = y_BLE + kernel_TE[first][None, None, :] * shifted
    return (jax.nn.silu(y_BLE).astype(x_BLE.dtype),) * uses
