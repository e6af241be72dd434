"""Stateless bricks: RMS norm, SwiGLU MLP, causal convolution, linear maps, documents of a row.

Each brick is a pure function of arrays, and a thin NNX module where it has parameters.
Parameters are float32; matrix products run in the compute dtype; norms are float32. "float32" here
means at least that: float64 inputs stay.

Sources: RMSNorm arXiv 1910.07467; SwiGLU arXiv 2002.05202.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Int

import pallas_kernels
from pallas_kernels.rms_norm import rms_norm

# The name, for policies of `jax.checkpoint`, of products that take long for the bytes they fill.
PRODUCT = "product"


def at_least_float32(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """The dtype of accumulation: float32, or float64 for float64 inputs."""
    return jnp.promote_types(dtype, jnp.float32)


class Documents(NamedTuple):
    """How a row is cut into documents. Positions restart at 0 with each of them."""

    positions_BL: Int[Array, "B L"]
    # Equal within a document and different from its neighbours'; None: a row is one document,
    # which spares the kernels the masks.
    segment_ids_BL: Int[Array, "B L"] | None

    @property
    def reset_BL(self) -> Bool[Array, "B L"] | None:
        """Where recurrent state must be dropped; None: nowhere."""
        return None if self.segment_ids_BL is None else self.positions_BL == 0

    @property
    def start_BL(self) -> Int[Array, "B L"]:
        """Index in the row of the first token of each token's document."""
        return jnp.arange(self.positions_BL.shape[1])[None, :] - self.positions_BL


def one_document(batch: int, length: int) -> Documents:
    """Rows that are one document each."""
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None, :], (batch, length))
    return Documents(positions_BL=positions, segment_ids_BL=None)


def packed_documents(positions_BL: Int[Array, "B L"]) -> Documents:
    """Rows that hold several documents, each starting where the position is 0."""
    # Where a document starts tells it from the others, and needs no sum over the row.
    segment_ids_BL = jnp.arange(positions_BL.shape[1])[None, :] - positions_BL
    return Documents(positions_BL=positions_BL, segment_ids_BL=segment_ids_BL)


def lecun_normal(fan_in: int) -> nnx.Initializer:
    """Normal draws of variance 1 / fan_in, whatever the shape of the array."""
    return jax.nn.initializers.normal(stddev=fan_in**-0.5)


class RMSNorm(nnx.Module):
    """`rms_norm` with a weight of ones at the start."""

    def __init__(self, width: int, eps: float):
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        return rms_norm(x, self.scale[...], self.eps)


class Projection(nnx.Module):
    """A linear map without bias over the last axes: [..., *inputs] -> [..., *outputs].

    The kernel has shape [*inputs, *outputs]: heads keep an axis of their own, so that a mesh axis
    can cut them.
    """

    def __init__(
        self,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        *,
        rngs: nnx.Rngs,
        scale: float = 1.0,
    ):
        init = lecun_normal(math.prod(inputs))
        self.kernel = nnx.Param(scale * init(rngs.params(), (*inputs, *outputs), jnp.float32))
        self.contracted = len(inputs)

    def __call__(self, x: Array) -> Array:
        axes = tuple(range(-self.contracted, 0))
        y = jnp.tensordot(
            x, self.kernel[...].astype(x.dtype), axes=(axes, tuple(range(self.contracted)))
        )
        return checkpoint_name(y, PRODUCT)


class CausalConv(nnx.Module):
    """`pallas_kernels.causal_conv`, SiLU included, with its kernel [T, E] and bias [E], uniform
    within ±T^-0.5 as in Mamba-1."""

    def __init__(self, width: int, taps: int, *, rngs: nnx.Rngs):
        bound = taps**-0.5
        draw = jax.random.uniform
        self.kernel = nnx.Param(draw(rngs.params(), (taps, width), jnp.float32, -bound, bound))
        self.bias = nnx.Param(draw(rngs.params(), (width,), jnp.float32, -bound, bound))

    def __call__(self, x_BLE: Array, positions_BL: Array, tail_BSE: Array | None = None) -> Array:
        return pallas_kernels.causal_conv(x_BLE, *self.weights(), positions_BL, tail_BSE)

    def weights(self) -> tuple[Array, Array]:
        """kernel_TE, bias_E."""
        return self.kernel[...], self.bias[...]


class SwiGLU(nnx.Module):
    """down(SiLU(gate(x)) * up(x)), arXiv 2002.05202."""

    def __init__(self, width: int, hidden: int, *, output_scale: float, rngs: nnx.Rngs):
        self.gate_proj = Projection((width,), (hidden,), rngs=rngs)
        self.up_proj = Projection((width,), (hidden,), rngs=rngs)
        self.down_proj = Projection((hidden,), (width,), scale=output_scale, rngs=rngs)

    def __call__(self, x_BLD: Array) -> Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x_BLD)) * self.up_proj(x_BLD))
