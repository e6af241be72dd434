"""The selective scan in plain XLA: any platform, memory linear in L, gradient by hand.

`lax.scan` runs over chunks of time, the steps inside a chunk are unrolled, and only the state
before each chunk is kept. The backward pass takes the chunks in reverse, recomputes their states
and runs the adjoint, the same recurrence backwards in time (ours, from arXiv 2312.00752):

    l_t   = c_t dy_t + exp(dt_{t+1} a) l_{t+1}       gradient of the state after token t
    dx_t  = d dy_t + dt_t sum_n(l_t b_t)             p_t  = l_t exp(dt_t a) h_{t-1}
    ddt_t = x_t sum_n(l_t b_t) + sum_n(a p_t)        da   = sum_t(p_t dt_t)
    db_t  = sum_e(l_t dt_t x_t)                      dc_t = sum_e(h_t dy_t)

Nothing of [B, L, E, N] exists: the largest temporaries are the states before chunks, B L E N /
chunk values, and the gradients. The state lies as [B, N, E], so that the sum over N runs across
vector lanes and not along them. No axis but L is cut or merged: B and E may be sharded.

Dtypes: inputs are widened chunk by chunk to the state's dtype, gradients rounded once to their
input's.

Gradient (forward and backward) in ms, float32, N = 16, fastest of interleaved runs; the CPU was
shared with other work, so compare within a column. CPU: 2 cores with AVX-512, B8 L512. GPU: one
H200, B8 and B1 L2048 E4096, with its temporary memory at B8.

|                                     | CPU E256 | E512 | GPU B8 |   B1 | memory |
| chunk 4                             |       64 |  142 |     39 |   25 | 1.6 GB |
| chunk 8 (default)                   |       64 |  129 |     29 |   16 | 1.1 GB |
| chunk 16                            |       67 |  143 |     36 |   13 | 0.8 GB |
| chunk 32                            |       79 |  173 |     46 |    8 | 0.8 GB |
| autodiff of checkpointed chunks, 16 |       77 |  161 |     38 |   19 | 1.4 GB |
| the same with associative_scan      |      217 |  454 |     73 |   18 | 1.4 GB |
| decays of a chunk in one array, 8   |      116 |  265 |     31 |   15 | 1.1 GB |
| chunk 16, over_E as a reduction     |       77 |  161 |     44 |   26 | 0.8 GB |

Compile time doubles with the chunk (8: 1 s). Also slower: the N states as N separate [B, E]
arrays (forward on CPU four times, on GPU 1.4 to 2 times).
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels import blocks as block_sizes
from pallas_kernels.selective_scan.operands import NEUTRAL_DT, Operands, ScanOutput, state_dtype


class _Grid(NamedTuple):
    """How time is cut: `count` chunks of C steps, the last `padding` steps neutral."""

    C: int
    count: int
    padding: int
    wide: Any

    def pad(self, v: Array, fill: float = 0) -> Array:
        widths = ((0, 0), (0, self.padding), (0, 0))[: v.ndim]
        return jnp.pad(v, widths, constant_values=fill) if self.padding else v

    def cut(self, v: Array, index: Array) -> Array:
        piece = lax.dynamic_slice_in_dim(v, index * self.C, self.C, axis=1)
        return piece if piece.dtype == jnp.bool_ else piece.astype(self.wide)

    def put(self, whole: Array, piece: Array, index: Array) -> Array:
        piece = piece.astype(whole.dtype)
        return lax.dynamic_update_slice_in_dim(whole, piece, index * self.C, axis=1)


class _Streams(NamedTuple):
    """The operands that vary with time, whole or one chunk."""

    x_BLE: Array
    dt_BLE: Array
    b_BLN: Array
    c_BLN: Array
    z_BLE: Array | None
    reset_BL: Array | None


class _Weights(NamedTuple):
    """The operands that do not, in the state's layout and dtype."""

    a_NE: Array
    d_E: Array
    dt_bias_E: Array


class _Steps(NamedTuple):
    """A chunk, run. Lists hold one [B, N, E] per step."""

    dt_BCE: Array
    u_BCE: Array  # dt x, what enters the state
    y_BCE: Array  # before the gate
    before: list[Array]  # state that the step decays, after a reset
    decay: list[Array]
    after: list[Array]


def _prepare(operands: Operands, blocks: Mapping[str, int]) -> tuple[_Grid, _Streams, _Weights]:
    x_BLE, dt_BLE, a_EN, b_BLN, c_BLN, d_E, z_BLE, dt_bias_E, reset_BL, _ = operands
    (B, L, E), N = x_BLE.shape, a_EN.shape[1]
    chosen = block_sizes.choose(
        "selective_scan/xla",
        shape={"B": B, "L": L, "E": E, "N": N},
        dtype=x_BLE.dtype,
        heuristic={"chunk": 8},
        override=blocks,
    )
    # Equal chunks: 17 steps become 3 of 6 with one neutral step, not 3 of 8 with seven.
    count = -(-L // chosen["chunk"])
    C = -(-L // count)
    grid = _Grid(C, count, count * C - L, state_dtype(operands))
    streams = _Streams(
        grid.pad(x_BLE),
        grid.pad(dt_BLE, NEUTRAL_DT),
        grid.pad(b_BLN),
        grid.pad(c_BLN),
        None if z_BLE is None else grid.pad(z_BLE),
        None if reset_BL is None else grid.pad(reset_BL),
    )
    weights = _Weights(*(v.astype(grid.wide) for v in (a_EN.T, d_E, dt_bias_E)))
    return grid, streams, weights


def _run_chunk(streams: _Streams, weights: _Weights, h_BNE: Array) -> _Steps:
    x_BCE, dt_BCE, b_BCN, c_BCN, _, reset_BC = streams
    dt_BCE = jax.nn.softplus(dt_BCE + weights.dt_bias_E[None, None])
    u_BCE = dt_BCE * x_BCE
    before, decay, after, y = [], [], [], []
    for t in range(x_BCE.shape[1]):
        if reset_BC is not None:
            h_BNE = jnp.where(reset_BC[:, t, None, None], 0, h_BNE)
        before.append(h_BNE)
        decay.append(jnp.exp(dt_BCE[:, t, None, :] * weights.a_NE[None]))
        h_BNE = decay[t] * h_BNE + u_BCE[:, t, None, :] * b_BCN[:, t, :, None]
        after.append(h_BNE)
        y.append((h_BNE * c_BCN[:, t, :, None]).sum(1))
    y_BCE = jnp.stack(y, 1) + weights.d_E[None, None] * x_BCE
    return _Steps(dt_BCE, u_BCE, y_BCE, before, decay, after)


def forward(
    operands: Operands, blocks: Mapping[str, int], *, for_backward: bool
) -> tuple[ScanOutput, Any]:
    """The outputs, and for `backward` the operands and the state before every chunk."""
    del for_backward  # XLA drops states that nobody reads.
    grid, streams, weights = _prepare(operands, blocks)

    def chunk(carry: tuple[Array, Array], index: Array) -> tuple[tuple[Array, Array], Array]:
        h_BNE, y_BLE = carry
        part = jax.tree.map(lambda v: grid.cut(v, index), streams)
        steps = _run_chunk(part, weights, h_BNE)
        y_BCE = steps.y_BCE if part.z_BLE is None else steps.y_BCE * jax.nn.silu(part.z_BLE)
        return (steps.after[-1], grid.put(y_BLE, y_BCE, index)), h_BNE

    h0_BNE = operands.h0_BEN.astype(grid.wide).swapaxes(1, 2)
    start = (h0_BNE, jnp.zeros_like(streams.x_BLE))
    (h_BNE, y_BLE), first_ZBNE = lax.scan(chunk, start, jnp.arange(grid.count))
    out = ScanOutput(y_BLE[:, : operands.x_BLE.shape[1]], h_BNE.swapaxes(1, 2))
    return out, (operands, first_ZBNE)


def _gate_gradients(z_BCE: Array | None, y_BCE: Array, dy_BCE: Array) -> tuple[Array | None, Array]:
    """Gradients of the gate's input and of y before the gate."""
    if z_BCE is None:
        return None, dy_BCE
    sigmoid_BCE = jax.nn.sigmoid(z_BCE)
    slope_BCE = sigmoid_BCE * (1 + z_BCE * (1 - sigmoid_BCE))
    return dy_BCE * y_BCE * slope_BCE, dy_BCE * z_BCE * sigmoid_BCE


def backward(residuals: Any, d_out: ScanOutput, blocks: Mapping[str, int]) -> Operands:
    """The gradient of every float operand, in its dtype."""
    operands, first_ZBNE = residuals
    grid, streams, weights = _prepare(operands, blocks)
    dy_BLE = grid.pad(d_out.y_BLE)
    # As a matrix product this sum costs less than as a reduction along the vector lanes.
    # HIGHEST, since GPU and TPU would otherwise round its float32 factors.
    over_E = functools.partial(jnp.einsum, "BCNE,BCE->BCN", precision=lax.Precision.HIGHEST)

    def chunk(carry: Any, index_and_first: tuple[Array, Array]) -> tuple[Any, None]:
        l_BNE, da_BNE, dd_BE, ddt_bias_BE, gradients = carry
        index, first_BNE = index_and_first
        part = jax.tree.map(lambda v: grid.cut(v, index), streams)
        x_BCE, dt_raw_BCE, b_BCN, c_BCN, z_BCE, reset_BC = part
        steps = _run_chunk(part, weights, first_BNE)
        dz_BCE, dy_BCE = _gate_gradients(z_BCE, steps.y_BCE, grid.cut(dy_BLE, index))

        adjoint, du, ddt = [], [], []
        for t in reversed(range(grid.C)):
            l_BNE = l_BNE + dy_BCE[:, t, None, :] * c_BCN[:, t, :, None]
            adjoint.append(l_BNE)
            du.append((l_BNE * b_BCN[:, t, :, None]).sum(1))
            l_BNE = l_BNE * steps.decay[t]
            p_BNE = l_BNE * steps.before[t]
            ddt.append((p_BNE * weights.a_NE[None]).sum(1))
            da_BNE = da_BNE + p_BNE * steps.dt_BCE[:, t, None, :]
            if reset_BC is not None:
                l_BNE = jnp.where(reset_BC[:, t, None, None], 0, l_BNE)
        adjoint_BCNE, du_BCE, ddt_BCE = (jnp.stack(v[::-1], 1) for v in (adjoint, du, ddt))

        slope_BCE = jax.nn.sigmoid(dt_raw_BCE + weights.dt_bias_E[None, None])
        ddt_raw_BCE = (ddt_BCE + du_BCE * x_BCE) * slope_BCE
        pieces = _Streams(
            du_BCE * steps.dt_BCE + weights.d_E[None, None] * dy_BCE,
            ddt_raw_BCE,
            over_E(adjoint_BCNE, steps.u_BCE),
            over_E(jnp.stack(steps.after, 1), dy_BCE),
            dz_BCE,
            None,
        )
        gradients = jax.tree.map(lambda v, piece: grid.put(v, piece, index), gradients, pieces)
        dd_BE = dd_BE + (dy_BCE * x_BCE).sum(1)
        ddt_bias_BE = ddt_bias_BE + ddt_raw_BCE.sum(1)
        return (l_BNE, da_BNE, dd_BE, ddt_bias_BE, gradients), None

    # Sums over B wait until the end: then a sharded batch is reduced once, not once per chunk.
    zeros_BNE = jnp.zeros_like(first_ZBNE[0])
    zeros_BE = zeros_BNE[:, 0]
    gradients = jax.tree.map(jnp.zeros_like, streams._replace(reset_BL=None))
    start = (d_out.h_BEN.swapaxes(1, 2), zeros_BNE, zeros_BE, zeros_BE, gradients)
    chunks = (jnp.arange(grid.count), first_ZBNE)
    (l_BNE, da_BNE, dd_BE, ddt_bias_BE, gradients), _ = lax.scan(chunk, start, chunks, reverse=True)
    dx, ddt, db, dc, dz, _ = jax.tree.map(lambda v: v[:, : operands.x_BLE.shape[1]], gradients)
    return Operands(
        x_BLE=dx,
        dt_BLE=ddt,
        a_EN=da_BNE.sum(0).T.astype(operands.a_EN.dtype),
        b_BLN=db,
        c_BLN=dc,
        d_E=dd_BE.sum(0).astype(operands.d_E.dtype),
        z_BLE=dz,
        dt_bias_E=ddt_bias_BE.sum(0).astype(operands.dt_bias_E.dtype),
        reset_BL=None,
        h0_BEN=l_BNE.swapaxes(1, 2).astype(operands.h0_BEN.dtype),
    )
