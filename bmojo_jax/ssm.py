"""The fading memory: a Mamba-1 mixer (arXiv 2312.00752, section 3) over a selective scan.

    x, z = W_in u ;  x = SiLU(conv(x)) ;  dt_low, b, c = W_x x ;  dt = softplus(W_dt dt_low + bias)
    h_t = exp(dt_t a) h_{t-1} + (dt_t x_t) b_t ;  y_t = (h_t c_t + d x_t) SiLU(z_t) ;  out = W_out y

with a = -exp(a_log). `ssm_norm` (ours; Mamba-2 has it too) puts an RMS norm on y before W_out.
Matrix products run in the compute dtype; state, decay and accumulation are float32. At a document's
start the state and the convolution are reset.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from bmojo_jax import operations
from bmojo_jax.cache import Piece, SsmCache, last, shift
from bmojo_jax.config import ModelConfig
from bmojo_jax.layers import PRODUCT, CausalConv, Documents, Projection, RMSNorm, one_document

DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 1e-1, 1e-4  # of the initial step sizes
# Added to dt before softplus, makes dt exactly 0: a step that leaves the state as it was.
NEUTRAL_DT = -1e4


def initial_dt_bias(key: Array, width: int) -> Float[Array, " E"]:
    """Inverse softplus of step sizes drawn log-uniformly from [DT_MIN, DT_MAX]."""
    uniform = jax.random.uniform(key, (width,), jnp.float32)
    dt = jnp.exp(uniform * (math.log(DT_MAX) - math.log(DT_MIN)) + math.log(DT_MIN))
    dt = jnp.maximum(dt, DT_FLOOR)
    return dt + jnp.log(-jnp.expm1(-dt))


class Mamba(nnx.Module):
    """Selective SSM mixer: u [B, L, D] -> f [B, L, D]."""

    def __init__(self, config: ModelConfig, *, output_scale: float, rngs: nnx.Rngs):
        width, inner, state, rank = (
            config.width,
            config.ssm_inner,
            config.ssm_state,
            config.dt_rank,
        )
        self.config = config
        self.in_proj = Projection((width,), (2, inner), rngs=rngs)
        self.conv = CausalConv(inner, config.conv_taps, rngs=rngs)
        self.x_proj = Projection((inner,), (rank + 2 * state,), rngs=rngs)
        self.dt_proj = StepSize(rank, inner, rngs=rngs)
        self.a_log = nnx.Param(
            jnp.broadcast_to(
                jnp.log(jnp.arange(1, state + 1, dtype=jnp.float32))[None, :], (inner, state)
            )
        )
        self.skip = nnx.Param(jnp.ones((inner,), jnp.float32))
        if config.ssm_norm:
            self.norm = RMSNorm(inner, config.norm_eps)
        self.out_proj = Projection((inner,), (width,), scale=output_scale, rngs=rngs)

    def __call__(self, u_BLD: Float[Array, "B L D"], documents: Documents) -> Array:
        """The whole pass: rows start with an empty state."""
        return self._whole(u_BLD, documents, None)[0]

    def prefill(
        self,
        u_BLD: Float[Array, "B L D"],
        length_B: Int[Array, " B"],
        empty: SsmCache,
        *,
        padded: bool,
    ) -> tuple[Float[Array, "B L D"], SsmCache]:
        """The whole pass of new rows, one document each, of length_B tokens, and their cache.

        Only `padded` rows may have fewer than L tokens: their step sizes are masked, an extra pass
        over [B, L, E]."""
        documents = one_document(*u_BLD.shape[:2])
        out_BLD, x_BLE, h_BEN = self._whole(u_BLD, documents, length_B if padded else None)
        tail_BTE = last(x_BLE, length_B, empty.tail_BTE)
        return out_BLD, SsmCache(tail_BTE, h_BEN.astype(empty.h_BEN.dtype))

    def _whole(self, u_BLD, documents: Documents, length_B):
        """Its output, the convolution's input and the state after length_B tokens (None: all)."""
        in_BLE, z_BLE = self._inputs(u_BLD)
        x_BLE, also_x_BLE = operations.causal_convs(
            in_BLE, *self.conv.weights(), documents.positions_BL, uses=2
        )
        dt_BLE, b_BLN, c_BLN = self._selection(also_x_BLE)
        if length_B is not None:
            real_BL = documents.positions_BL < length_B[:, None]
            dt_BLE = jnp.where(real_BL[:, :, None], dt_BLE, NEUTRAL_DT)
        y_BLE, h_BEN = self._scan(x_BLE, dt_BLE, b_BLN, c_BLN, z_BLE, documents.reset_BL, None)
        return self._output(y_BLE), in_BLE, h_BEN

    def extend(
        self,
        u_BLD: Float[Array, "B L D"],
        cache: SsmCache,
        piece: Piece,
    ) -> tuple[Float[Array, "B L D"], SsmCache]:
        """Continues every row by a piece; what lies beyond a row's length is ignored."""
        x_BLE, z_BLE = self._inputs(u_BLD)
        tail_BTE = shift(cache.tail_BTE, x_BLE, piece.length_B)
        x_BLE = self.conv(x_BLE, piece.positions_BL, cache.tail_BTE)
        dt_BLE, b_BLN, c_BLN = self._selection(x_BLE)
        dt_BLE = jnp.where(piece.real_BL[:, :, None], dt_BLE, NEUTRAL_DT)
        reset_BL = (piece.positions_BL == 0) & piece.real_BL
        y_BLE, h_BEN = self._scan(x_BLE, dt_BLE, b_BLN, c_BLN, z_BLE, reset_BL, cache.h_BEN)
        return self._output(y_BLE), SsmCache(tail_BTE=tail_BTE, h_BEN=h_BEN)

    def _inputs(self, u_BLD):
        kernel_D2E = self.in_proj.kernel[...].astype(u_BLD.dtype)
        if u_BLD.shape[1] == 1:  # products with halves of the weights would copy the halves
            return jnp.unstack(jnp.tensordot(u_BLD, kernel_D2E, 1), axis=2)
        # Of one product the kernels, which take x and z whole, would need copies of both halves.
        return tuple(checkpoint_name(u_BLD @ kernel_D2E[:, i], PRODUCT) for i in range(2))

    def _selection(self, x_BLE):
        rank, state = self.config.dt_rank, self.config.ssm_state
        low = self.x_proj(x_BLE)
        dt_BLE = self.dt_proj(low[..., :rank])
        return dt_BLE, low[..., rank : rank + state], low[..., rank + state :]

    def _scan(self, x_BLE, dt_BLE, b_BLN, c_BLN, z_BLE, reset_BL, h0_BEN):
        implementation = self.config.scan_implementation
        if x_BLE.shape[1] == 1:  # nothing to do one after the other: XLA fuses the definition
            implementation = "reference"
        return operations.selective_scan(
            x_BLE,
            dt_BLE,
            -jnp.exp(self.a_log[...]),
            b_BLN,
            c_BLN,
            self.skip[...],
            z_BLE=z_BLE,
            dt_bias_E=self.dt_proj.bias[...],
            reset_BL=reset_BL,
            h0_BEN=h0_BEN,
            implementation=implementation,
        )

    def _output(self, y_BLE):
        return self.out_proj(self.norm(y_BLE) if self.config.ssm_norm else y_BLE)


class StepSize(nnx.Module):
    """dt before bias and softplus: [B, L, R] -> [B, L, E]. The scan adds the bias."""

    def __init__(self, rank: int, inner: int, *, rngs: nnx.Rngs):
        bound = rank**-0.5
        draw = jax.random.uniform(rngs.params(), (rank, inner), jnp.float32, -bound, bound)
        self.kernel = nnx.Param(draw)
        self.bias = nnx.Param(initial_dt_bias(rngs.params(), inner))

    def __call__(self, low_BLR: Array) -> Array:
        return low_BLR @ self.kernel[...].astype(low_BLR.dtype)
