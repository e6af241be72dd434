"""What every operation asks of the arrays that it is given."""

from typing import Any

import jax
import jax.numpy as jnp


def expect(name: str, array: jax.Array, shape: tuple[int, ...], kind: Any) -> None:
    """Raises ValueError, which names the array, if its shape or kind of dtype is another one."""
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}, expected {shape}")
    if not jnp.issubdtype(array.dtype, kind):
        raise ValueError(f"{name} has dtype {array.dtype}, expected {kind.__name__}")
