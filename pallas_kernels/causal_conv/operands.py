"""What api.py hands to an implementation, checked."""

from typing import NamedTuple

import jax


class Operands(NamedTuple):
    """The arrays of one call."""

    x_BLE: jax.Array
    kernel_TE: jax.Array
    bias_E: jax.Array
    positions_BL: jax.Array
    tail_BSE: jax.Array | None
