"""The selective scan by its definition: one step of `lax.scan` per token, differentiated by JAX.

    dt_t = softplus(dt_raw_t + dt_bias)
    h_t  = exp(dt_t a) h_{t-1} + (dt_t x_t) b_t
    y_t  = (h_t c_t + d x_t) SiLU(z_t)

(Mamba, arXiv 2312.00752, section 3.) Everything runs in the inputs' common dtype, at least
float32; y is rounded once, to x's dtype. Slow and heavy: autodiff keeps [B, L, E, N] values.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels.selective_scan.operands import Operands, ScanOutput, state_dtype


def scan(operands: Operands) -> ScanOutput:
    wide = state_dtype(operands)
    x_BLE, dt_BLE, a_EN, b_BLN, c_BLN, d_E, z_BLE, dt_bias_E, reset_BL, h0_BEN = jax.tree.map(
        lambda v: v if v.dtype == jnp.bool_ else v.astype(wide), operands
    )
    if reset_BL is None:
        reset_BL = jnp.zeros(x_BLE.shape[:2], jnp.bool_)

    def step(h_BEN: Array, token: tuple[Array, ...]) -> tuple[Array, Array]:
        x_BE, dt_BE, b_BN, c_BN, reset_B = token
        dt_BE = jax.nn.softplus(dt_BE + dt_bias_E[None, :])
        h_BEN = jnp.where(reset_B[:, None, None], 0, h_BEN)
        h_BEN = jnp.exp(dt_BE[:, :, None] * a_EN[None]) * h_BEN
        h_BEN = h_BEN + (dt_BE * x_BE)[:, :, None] * b_BN[:, None, :]
        return h_BEN, (h_BEN * c_BN[:, None, :]).sum(-1) + d_E[None, :] * x_BE

    time_first = [v.swapaxes(0, 1) for v in (x_BLE, dt_BLE, b_BLN, c_BLN, reset_BL)]
    h_BEN, y_LBE = lax.scan(step, h0_BEN, tuple(time_first))
    y_BLE = y_LBE.swapaxes(0, 1)
    if z_BLE is not None:
        y_BLE = y_BLE * jax.nn.silu(z_BLE)
    return ScanOutput(y_BLE.astype(operands.x_BLE.dtype), h_BEN)
