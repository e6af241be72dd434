"""The selective scan for TPUs: Pallas lowered to Mosaic, everything between x and y in one pass.

    dt_t = softplus(dt_raw_t + dt_bias)
    h_t  = exp2(dt_t a') h_{t-1} + (dt_t x_t) b_t        a' = a log2(e)
    y_t  = (h_t c_t + d x_t) SiLU(z_t)

and its gradient (equations in `xla.py`; arXiv 2312.00752, section 3; the mapping is ours). The
bodies of the kernels are in `pallas_tpu_kernels.py`; here is what surrounds them.

Grid: (row of the batch, chunk of time, tile of 1024 channels), tiles fastest. The states of all
tiles stay in VMEM from chunk to chunk. b and c are spread over lanes once per chunk and serve all
tiles; the sums over channels in db and dc grow in VMEM over the tiles and leave it once per chunk,
in a fixed order: no atomics, every bit is the same in every run. The forward pass saves the state
before each chunk (of 128 steps with N = 16: half a byte per element) and nothing if no backward
pass follows. The backward pass runs each chunk forward again, keeps its states in VMEM,
and goes back through them.

Dtypes: float32 and bfloat16 in any mixture; everything inside is float32, results are rounded
once. Any B, L, E and N <= 64: what lies past the last step or channel is made neutral in the
kernel, states are padded to 8, 16, 32 or 64. E that is no multiple of 1024 pays for the next one. A
reset sets dt to 1e33 in the decay alone, which is then exactly 0: with resets, rates must not be
positive.

Bundles of instructions (cycles, but for waiting for memory) per time step of 512 channels, all
that runs counted, by `benchmarks/tpu_cycles.py`; B8 L2048 E4096 N16, bfloat16, libtpu 0.0.48.1:

|                             | v5e  | v5p  | v6e  | VMEM    |
| forward                     | 22.7 | 23.5 | 23.0 | 7.5 MiB |
| forward, with resets        | 23.3 | 24.1 | 23.6 |         |
| forward, saving             | 22.8 | 23.6 | 23.2 | 7.7 MiB |
| forward, saving, resets     | 23.5 | 24.3 | 23.8 |         |
| backward                    | 70.1 | 71.7 | 68.8 | 37 MiB  |
| backward, with resets       | 70.6 | 72.4 | 69.6 |         |

What bounds it: 4 vector instructions a bundle, and an exp2 takes one of them. Per step, state and
register of channels the forward pass has 7, i.e. 14 bundles, of which it takes 14.5; the backward
pass 5 and 17.8, i.e. 45.6, in 49.9. The rest is softplus, gate, skip and the sums.

Tried, bundles of the loop on a v5e before and after:
* States along sublanes, 4 registers of channels (as scans are often laid out): a step of the
  forward recurrence 22.4, as sums over states are rolls and selects; channels on sublanes: 15.0.
* The forward loop with two blocks of 8 steps a trip instead of one: 15.0 > 14.5. Backward, blocks
  of 4: 40.5 > 39.3.
* Backward, db and dc read, added to and written one by one in the loop: 74.5; all read before and
  written behind the steps of a state: 40.5.
* A second loop for the first tile, which writes db and dc without reading: spills, 49.
* Keeping decays instead of computing them again: the store slot (one on v5e and v5p) becomes the
  bound, nothing gained by reckoning.
* Reciprocals of 1 + exp2(-|z|) with a choice of sign: 3.2; of 1 + exp2(-max(z, -80)): 3.0.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels import blocks as block_sizes
from pallas_kernels import dispatch
from pallas_kernels.dispatch import Unsupported
from pallas_kernels.selective_scan import pallas_tpu_kernels as kernels
from pallas_kernels.selective_scan.operands import Operands, ScanOutput
from pallas_kernels.selective_scan.pallas_tpu_kernels import LANES, LOG2E, PACK, SUBLANES, TILE

_STATES = (8, 16, 32, 64)
_DTYPES = (jnp.float32, jnp.bfloat16)
# The least rate with resets: FORGET_DT times it must underflow in exp2.
_LEAST_RATE = 1e-30


# A v5p has 64 MiB of VMEM, v5e and v6e 128 MiB, older ones less; some is left to the compiler.
_MOST_VMEM = 62 * 2**20
# What the compiler adds on its own.
_SPILLS = 2**20


class _Grid(NamedTuple):
    """B rows, Z chunks of C steps, K tiles of channels; N states, padded."""

    B: int
    Z: int
    C: int
    K: int
    N: int
    L: int
    E: int
    interpret: bool

    def pad_channels(self, v: Array, axis: int) -> Array:
        widths = [(0, 0)] * v.ndim
        widths[axis] = (0, self.K * TILE - self.E)
        return jnp.pad(v, widths)

    def time(self, v: Array) -> Array:
        """[B, L, E], at least as large as a block. Blocks may reach past its end."""
        widths = ((0, 0), (0, max(self.C - self.L, 0)), (0, max(TILE - self.E, 0)))
        return jnp.pad(v, widths)

    @property
    def lanes(self) -> int:
        """The steps of a chunk along the lanes, in whole registers."""
        return -(-self.C // LANES) * LANES

    def chunks(self, v_BLM: Array) -> Array:
        """[B, L, M] to [B, Z, M, lanes] in float32."""
        widths = ((0, 0), (0, self.Z * self.C - self.L), (0, 0))
        v = jnp.pad(v_BLM.astype(jnp.float32), widths)
        v = v.reshape(self.B, self.Z, self.C, -1).swapaxes(2, 3)
        return jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, self.lanes - self.C)))

    def unchunk(self, v: Array, N: int) -> Array:
        v = v[..., : self.C].swapaxes(2, 3).reshape(self.B, -1, self.N)
        return v[:, : self.L, :N]

    def state(self, v: Array) -> Array:
        """[..., E, N] to [..., N, 8 K, 128] in float32."""
        v = self.pad_channels(v.astype(jnp.float32).swapaxes(-1, -2), -1)
        widths = [(0, 0)] * (v.ndim - 2) + [(0, self.N - v.shape[-2]), (0, 0)]
        return jnp.pad(v, widths).reshape(*v.shape[:-2], self.N, -1, LANES)

    def unstate(self, v: Array, N: int) -> Array:
        v = v.reshape(*v.shape[:-2], -1)[..., :N, : self.E]
        return v.swapaxes(-1, -2)

    def row(self, v_E: Array) -> Array:
        return self.pad_channels(v_E.astype(jnp.float32)[None], 1)


def default_chunk(N: int) -> int:
    """Steps of a chunk: the backward pass keeps 12 N KiB of each in VMEM."""
    return min(128, 2048 // _padded(N))


def _padded(N: int) -> int:
    return next(size for size in _STATES if size >= N)


def _prepare(operands: Operands, blocks: Mapping[str, int]) -> tuple[_Grid, kernels.Inputs]:
    x_BLE, dt_BLE, a_EN, b_BLN, c_BLN, d_E, z_BLE, dt_bias_E, reset_BL, _ = operands
    interpret = dispatch.interpreted("tpu")
    (B, L, E), N = x_BLE.shape, a_EN.shape[1]
    if N > _STATES[-1]:
        raise Unsupported(f"{N=} states must be at most {_STATES[-1]}")
    for name, array in operands._replace(reset_BL=None)._asdict().items():
        if array is not None and array.dtype not in _DTYPES:
            raise Unsupported(f"{name}.dtype={array.dtype} must be float32 or bfloat16")
    padded_N = _padded(N)
    chosen = block_sizes.choose(
        "selective_scan/pallas_tpu",
        shape={"B": B, "L": L, "E": E, "N": N},
        dtype=x_BLE.dtype,
        heuristic={"chunk": default_chunk(N)},
        override=blocks,
    )
    # Equal chunks, of whole registers.
    Z = -(-L // chosen["chunk"])
    C = -(-L // (Z * PACK)) * PACK
    Z = -(-L // C)
    grid = _Grid(B, Z, C, -(-E // TILE), padded_N, L, E, interpret)
    a_NGJ = grid.state(a_EN * jnp.float32(LOG2E))
    reset_BZ1C = None
    if reset_BL is not None:
        reset_BZ1C = grid.chunks(reset_BL[:, :, None])
        a_NGJ = jnp.where(jnp.abs(a_NGJ) < _LEAST_RATE, -_LEAST_RATE, a_NGJ)

    def states(v_BLN: Array) -> Array:
        return grid.chunks(jnp.pad(v_BLN, ((0, 0), (0, 0), (0, padded_N - N))))

    inputs = kernels.Inputs(
        grid.time(x_BLE),
        grid.time(dt_BLE),
        None if z_BLE is None else grid.time(z_BLE),
        states(b_BLN),
        states(c_BLN),
        reset_BZ1C,
        a_NGJ,
        grid.row(d_E),
        grid.row(dt_bias_E),
    )
    return grid, inputs


class _Specs(NamedTuple):
    """Blocks of one grid step (batch row, chunk in the order of the pass, tile of channels)."""

    time: pl.BlockSpec  # [B, L, E] arrays
    states: pl.BlockSpec  # [B, Z, N, C]
    reset: pl.BlockSpec
    rates: pl.BlockSpec
    row: pl.BlockSpec
    start: pl.BlockSpec  # [B, N, 8 K, 128], read in the first chunk of the pass
    end: pl.BlockSpec  # the same, written in the last
    first: pl.BlockSpec  # [B, Z, N, 8 K, 128]

    def inputs(self, ins: kernels.Inputs) -> kernels.Inputs:
        specs = kernels.Inputs(
            x=self.time,
            dt=self.time,
            z=self.time,
            b=self.states,
            c=self.states,
            reset=self.reset,
            a=self.rates,
            d=self.row,
            dt_bias=self.row,
        )
        return kernels.Inputs(
            *(s if v is not None else None for s, v in zip(specs, ins, strict=True))
        )


def _specs(grid: _Grid, chunk_of: Callable[[Any], Any]) -> _Specs:
    _, Z, C, K, N, *_ = grid
    state = (1, N, SUBLANES, LANES)
    # Only one chunk of the pass needs each tile's state: elsewhere the index stands still, and
    # a block whose index stands still is not moved.
    return _Specs(
        time=pl.BlockSpec((1, C, TILE), lambda b, z, k: (b, chunk_of(z), k)),
        states=pl.BlockSpec((1, 1, N, grid.lanes), lambda b, z, k: (b, chunk_of(z), 0, 0)),
        reset=pl.BlockSpec((1, 1, 1, grid.lanes), lambda b, z, k: (b, chunk_of(z), 0, 0)),
        rates=pl.BlockSpec((N, K * SUBLANES, LANES), lambda b, z, k: (0, 0, 0)),
        row=pl.BlockSpec((1, K * TILE), lambda b, z, k: (0, 0)),
        start=pl.BlockSpec(state, lambda b, z, k: (b, 0, jnp.where(z == 0, k, K - 1), 0)),
        end=pl.BlockSpec(state, lambda b, z, k: (b, 0, jnp.where(z == Z - 1, k, 0), 0)),
        first=pl.BlockSpec((1, *state), lambda b, z, k: (b, chunk_of(z), 0, k, 0)),
    )


def _vmem_bytes(specs: Any, arrays: Any, scratch: Any) -> int:
    """What a kernel takes: its scratch, and every block twice, as the next one is on its way."""

    def size(shape: tuple[int, ...], dtype: Any) -> int:
        # Registers are 32 bit wide: of a narrower dtype they hold more rows.
        itemsize = jnp.dtype(dtype).itemsize
        rows, lanes = SUBLANES * 4 // itemsize, LANES
        *outer, height, width = shape
        padded = -(-height // rows) * rows * -(-width // lanes) * lanes
        return math.prod(outer) * padded * itemsize

    blocks = zip(jax.tree.leaves(specs), jax.tree.leaves(arrays), strict=True)
    moving = sum(size(spec.block_shape, array.dtype) for spec, array in blocks)
    return 2 * moving + sum(size(v.shape, v.dtype) for v in jax.tree.leaves(scratch))


def _kernel(
    grid: _Grid,
    body: Callable[..., None],
    name: str,
    *,
    inputs: tuple[Any, ...],
    in_specs: tuple[Any, ...],
    out_shape: Any,
    out_specs: Any,
    scratch: Any,
) -> Callable[..., Any]:
    """The call for inputs of these shapes; it returns a list of one, the outputs.

    Raises:
      Unsupported: it would not fit in VMEM.
    """
    need = _vmem_bytes((in_specs, out_specs), (inputs, out_shape), scratch)
    most = _MOST_VMEM
    if not grid.interpret:
        with contextlib.suppress(ValueError):  # a kind of TPU that JAX does not know yet
            most = min(most, pltpu.get_tpu_info().vmem_capacity_bytes * 31 // 32)
    if need > most:
        raise Unsupported(
            f"blocks of C={grid.C} steps of N={grid.N} states and E={grid.E} channels need "
            f"{need / 2**20:.0f} MiB of VMEM, which must be at most {most / 2**20:.0f}"
        )
    call = pl.pallas_call(
        functools.partial(body, L=grid.L, E=grid.E, unroll=not grid.interpret),
        grid=(grid.B, grid.Z, grid.K),
        in_specs=in_specs,
        out_shape=[out_shape],
        out_specs=[out_specs],
        scratch_shapes=[scratch],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=need + _SPILLS,
        ),
        interpret=grid.interpret,
        name=name,
    )

    def run(*arrays: Any) -> Any:
        with jax.enable_x64(False):  # indices are 32 bit wide
            return call(*arrays)

    return run


def _like(v: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(v.shape, v.dtype)


def _wide(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _dense(steps: int) -> Any:
    return pltpu.VMEM((steps * SUBLANES, LANES), jnp.float32)


def forward(
    operands: Operands, blocks: Mapping[str, int], *, for_backward: bool
) -> tuple[ScanOutput, Any]:
    """The outputs, and for `backward` the operands and the state before every chunk."""
    grid, ins = _prepare(operands, blocks)
    B, Z, C, K, N, L, E, _ = grid
    specs = _specs(grid, lambda z: z)
    states = (N, K * SUBLANES, LANES)
    spread = pltpu.VMEM((C * N, LANES), jnp.float32)
    inputs = ins, grid.state(operands.h0_BEN)
    kernel = _kernel(
        grid,
        kernels.forward,
        "selective_scan_saving" if for_backward else "selective_scan",
        inputs=inputs,
        in_specs=(specs.inputs(ins), specs.start),
        out_shape=kernels.ForwardOutputs(
            y=_like(ins.x),
            last=_wide(B, *states),
            first=_wide(B, Z, *states) if for_backward else None,
        ),
        out_specs=kernels.ForwardOutputs(
            specs.time, specs.end, specs.first if for_backward else None
        ),
        scratch=kernels.ForwardScratch(
            h=_dense(N * K),
            dt=_dense(C),
            u=_dense(C),
            b=spread,
            c=spread,
            reset=None if ins.reset is None else pltpu.VMEM((C, LANES), jnp.float32),
        ),
    )
    (result,) = kernel(*inputs)
    if for_backward:
        # What the backward pass cannot take is refused here, where another backend can step in.
        _backward_kernel(grid, ins)
    out = ScanOutput(result.y[:, :L, :E], grid.unstate(result.last, operands.a_EN.shape[1]))
    return out, (operands, result.first) if for_backward else None


def _backward_kernel(grid: _Grid, ins: kernels.Inputs) -> Callable[..., Any]:
    B, Z, C, K, N, *_ = grid
    specs = _specs(grid, lambda z: Z - 1 - z)
    states = (N, K * SUBLANES, LANES)
    spread, natural = pltpu.VMEM((C * N, LANES), jnp.float32), pltpu.VMEM((C, TILE), jnp.float32)
    sums = pl.BlockSpec((1, SUBLANES, K * TILE), lambda b, z, k: (b, 0, 0))

    return _kernel(
        grid,
        kernels.backward,
        "selective_scan_backward",
        inputs=(ins, _wide(B, Z, *states), _like(ins.x), _wide(B, *states)),
        in_specs=(specs.inputs(ins), specs.first, specs.time, specs.start),
        out_shape=kernels.Gradients(
            x=_like(ins.x),
            dt=_like(ins.dt),
            z=None if ins.z is None else _like(ins.z),
            b=_wide(B, Z, N, grid.lanes),
            c=_wide(B, Z, N, grid.lanes),
            a=_wide(B, *states),
            d=_wide(B, SUBLANES, K * TILE),
            dt_bias=_wide(B, SUBLANES, K * TILE),
            h0=_wide(B, *states),
        ),
        out_specs=kernels.Gradients(
            x=specs.time,
            dt=specs.time,
            z=None if ins.z is None else specs.time,
            b=specs.states,
            c=specs.states,
            a=pl.BlockSpec((1, *states), lambda b, z, k: (b, 0, 0, 0)),
            d=sums,
            dt_bias=sums,
            h0=specs.end,
        ),
        scratch=kernels.BackwardScratch(
            adjoint=_dense(N * K),
            dt=_dense(C),
            u=_dense(C),
            dy=_dense(C),
            b=spread,
            c=spread,
            reset=None if ins.reset is None else pltpu.VMEM((C, LANES), jnp.float32),
            h=_dense(N * (C + 1)),
            db=_dense(N * C),
            dc=_dense(N * C),
            true_dt=natural,
            slope=natural,
            gated=natural,
            gate_slope=None if ins.z is None else natural,
        ),
    )


def backward(residuals: Any, d_out: ScanOutput, blocks: Mapping[str, int]) -> Operands:
    """The gradient of every float operand, in its dtype."""
    operands, first_BZNGJ = residuals
    grid, ins = _prepare(operands, blocks)
    L, E = grid.L, grid.E
    inputs = ins, first_BZNGJ, grid.time(d_out.y_BLE), grid.state(d_out.h_BEN)
    (gradients,) = _backward_kernel(grid, ins)(*inputs)
    n = operands.a_EN.shape[1]
    result = Operands(
        x_BLE=gradients.x[:, :L, :E],
        dt_BLE=gradients.dt[:, :L, :E],
        a_EN=grid.unstate(gradients.a.sum(0), n),
        b_BLN=grid.unchunk(gradients.b, n),
        c_BLN=grid.unchunk(gradients.c, n),
        d_E=gradients.d.sum((0, 1))[:E],
        z_BLE=None if gradients.z is None else gradients.z[:, :L, :E],
        dt_bias_E=gradients.dt_bias.sum((0, 1))[:E],
        reset_BL=None,
        h0_BEN=grid.unstate(gradients.h0, n),
    )
    return jax.tree.map(lambda g, v: g.astype(v.dtype), result, operands._replace(reset_BL=None))
