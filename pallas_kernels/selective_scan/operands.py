"""What goes into a selective scan and what comes out, in the order of `api.selective_scan`."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# Raw step size of padding: softplus makes it exactly 0, and such a step leaves the state as it was.
NEUTRAL_DT = -1e4


class Operands(NamedTuple):
    """The inputs, or their gradients (None for reset_BL). Only z_BLE and reset_BL may be None."""

    x_BLE: Float[Array, "B L E"]
    dt_BLE: Float[Array, "B L E"]
    a_EN: Float[Array, "E N"]
    b_BLN: Float[Array, "B L N"]
    c_BLN: Float[Array, "B L N"]
    d_E: Float[Array, " E"]
    z_BLE: Float[Array, "B L E"] | None
    dt_bias_E: Float[Array, " E"]
    reset_BL: Bool[Array, "B L"] | None
    h0_BEN: Float[Array, "B E N"]


class ScanOutput(NamedTuple):
    """y_BLE: outputs in x's dtype. h_BEN: state after the last token, at least float32."""

    y_BLE: Float[Array, "B L E"]
    h_BEN: Float[Array, "B E N"]


def state_dtype(operands: Operands) -> Any:
    """The dtype of state, decays and sums: the inputs' common one, at least float32."""
    floats = [v.dtype for v in jax.tree.leaves(operands._replace(reset_BL=None))]
    return functools.reduce(jnp.promote_types, floats, jnp.dtype(jnp.float32))
