"""The selective scan for NVIDIA GPUs: Pallas lowered to Triton.

    dt_t = softplus(dt_raw_t + dt_bias)
    h_t  = exp(dt_t a) h_{t-1} + (dt_t x_t) b_t
    y_t  = (h_t c_t + d x_t) SiLU(z_t)

(Mamba, arXiv 2312.00752, section 3.) One kernel forward, one backward, everything between inputs
and outputs in one pass; serial in time, parallel over the batch and channels. Where that leaves the
machine idle, L is cut into segments that run side by side: a first pass finds the state before each
segment (the gradient after it), as the decay of a segment is exp(a sum dt). That pass, which needs
fewer registers, cuts segments once more.

State, decays and sums are float32, results are rounded once. With bfloat16 x, b and c the products
with b and c cut their other factor to tf32, and the factors of the sums over channels, which are
the gradients of b and c, are rounded to bfloat16, and so is each program's sum (2^-9 of it at most,
at random over programs); otherwise products are as exact as float32 (`triton_lanes.py`). Saved for
the backward pass beyond the inputs: the float32 states before chunks of 64 steps, one byte per
element at N = 16. Deterministic: the gradients of b and c are summed over the channels of a program
in its kernel and over programs in float32 in another (`triton_sums.py`), always in the same order.

What is padded, and copied where it does not fit: L to whole chunks (steps with dt = 0), E to the
channels of a program, N to 16, 32 or 64 (states that stay 0).

Measured on an H100, bfloat16, N = 16, ps per element (`results/kernels/scan.json`); "resets" is
with document resets, an initial state and its gradient:

| B, L, E         | forward | resets | backward | resets | state-spaces/mamba's kernels |
|-----------------|---------|--------|----------|--------|------------------------------|
| 8, 2048, 4096   | 7.2     | 7.4    | 27.2     | 28.3   | 17.4 and 71.4                |
| 1, 2048, 4096   | 10.0    | 9.9    | 34.4     | 35.8   | 19.4 and 87.7                |
| 1, 16,384, 4096 | 9.3     | 9.3    | 31.8     | 33.1   | 22.5 and 81.6                |
| 8, 2048, 1536   | 8.4     | 8.5    | 29.9     | 30.6   | 18.0 and 73.4                |
| 64, 256, 1536   | 7.4     | 8.2    | 28.4     | 29.8   |                              |

One exponential a state takes 5.4 ps in either pass, the bytes 2.8 and 4.9. With B = 1 a warp has a
scheduler for itself forward, and waits: of the samples of a profile 38 % issued an instruction,
46 % waited for one of fixed latency, 4 % for memory.

Backward at B 1, L 2048, kernels in a profile: 33.5 ps, of which the main kernel takes 26.0, the
first pass 5.2; 1.6 and 0.7 were sums by XLA, one launch each, which are one kernel since then (the
whole by the clock 34.9 before, 34.4 with it). Programs of 8 warps take 35.9 (the main kernel 29.2),
of 2 warps 36.3, two groups a trip with two segments 34.2.

What did not help, B = 1: keeping registers of addresses alive until loads have read them (2 %
slower; backward 2 to 8 %), step sizes of a group ahead of time (no difference: ptxas orders them as
it likes), 16 groups a trip (5 % slower, and compiles for 3 minutes), two segments of L (6 %
slower). What did: flags as bfloat16 step sizes. As bytes they were widened, and therefore waited
for, as soon as they had been asked for, at every trip (13.2 ps instead of 18.8; with programs of 4
warps instead of one 9.8).

JAX deprecates its lowering of Pallas to Triton; jax-triton, which compiles Triton's own language,
is the way on. The kernels' bodies are written in what both have: vectors, loops, inline PTX.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

from pallas_kernels import dispatch
from pallas_kernels.blocks import choose
from pallas_kernels.dispatch import Unsupported
from pallas_kernels.selective_scan.operands import NEUTRAL_DT, Operands, ScanOutput
from pallas_kernels.selective_scan.triton_kernels import (
    adjoint_kernel,
    backward_kernel,
    forward_kernel,
)
from pallas_kernels.selective_scan.triton_lanes import (
    CHANNELS,
    LEAST_RATE,
    RESET_DT,
    STATES,
    STEPS,
    Lanes,
)
from pallas_kernels.selective_scan.triton_place import Plan
from pallas_kernels.selective_scan.triton_sums import Terms, sums

OP = "selective_scan/pallas_triton"
# Warps of a program, groups of 4 steps of a trip, segments of L; steps of a chunk.
TUNABLE: Mapping[str, tuple[int, ...]] = {
    "forward_warps": (1, 2, 4, 8),
    "forward_groups": (1, 2, 4, 8),
    "backward_warps": (1, 2, 4, 8),
    "backward_groups": (1, 2, 4),
    "forward_segments": (1, 2, 4, 8),
    "backward_segments": (1, 2, 4, 8),
    "chunk": (64, 128),
}
_LARGEST_N, _LARGEST_ROW = 64, 2**31
# A large GPU has some 500 warp schedulers. Forward one warp keeps one busy with long trips, and a
# first pass over segments costs more than it saves; backward it takes four.
_FORWARD_WARPS, _BACKWARD_WARPS = 500, 1056
# Segments are not shorter than these steps.
_SHORTEST_SEGMENT = 256
# Where only states are computed: warps for all processors, the shortest part of a segment, groups
# of a trip times sets of states.
_WARPS_ALONE, _SHORTEST_PART, _GROUPS_ALONE = 3000, 128, 4
_DTYPES = (jnp.float32, jnp.bfloat16)


def forward(
    operands: Operands, blocks: Mapping[str, int], *, for_backward: bool
) -> tuple[ScanOutput, Any]:
    """Residuals: the operands and starts_BCEN, the states before chunks (C of padded L)."""
    _check(operands)
    _, L, E = operands.x_BLE.shape
    N = operands.a_EN.shape[1]
    sizes = _sizes(operands, blocks)
    warps = _warps(E, sizes["forward_warps"])
    groups = _filled(L, STEPS * sizes["forward_groups"]) // STEPS
    chunk = _filled(L, sizes["chunk"]) if for_backward else None
    unit = chunk or STEPS * groups
    segments = _segments(L, unit, sizes["forward_segments"])
    padded = _padded(_with_flags(operands), warps, unit * segments)
    B, steps, channels = padded.x_BLE.shape
    plan = _plan(operands, padded, warps, groups, segments)
    inputs = _inputs(padded, segments)
    if segments > 1:
        inputs["h0_BEN"] = _states_at_borders(inputs, plan, B)
    n = inputs["h0_BEN"].shape
    outputs = {
        "y_BLE": jax.ShapeDtypeStruct(inputs["x_BLE"].shape, operands.x_BLE.dtype),
        "h_BEN": jax.ShapeDtypeStruct(n, jnp.float32),
    }
    if chunk:
        shape = (n[0], plan.L // chunk, *n[1:])
        outputs["starts_BCEN"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    out = _call(forward_kernel, inputs, outputs, dataclasses.replace(plan, chunk=chunk))
    y_BLE = out["y_BLE"].reshape(B, steps, channels)[:, :L, :E]
    h_BEN = _by_segment(out["h_BEN"], B)[:, -1, :E, :N]
    starts_BCEN = None
    if chunk:
        starts_BCEN = out["starts_BCEN"].reshape(B, steps // chunk, *n[1:])
    return ScanOutput(y_BLE, h_BEN), (operands, starts_BCEN)


def backward(residuals: Any, d_out: ScanOutput, blocks: Mapping[str, int]) -> Operands:
    operands, starts_BCEN = residuals
    _, L, E = operands.x_BLE.shape
    N = operands.a_EN.shape[1]
    sizes = _sizes(operands, blocks)
    warps, chunk = _warps(E, sizes["backward_warps"]), _filled(L, sizes["chunk"])
    segments = _segments(L, chunk, sizes["backward_segments"])
    padded = _padded(operands, warps, chunk * segments)
    B, steps, channels = padded.x_BLE.shape
    states = padded.a_EN.shape[1]
    plan = _plan(operands, padded, warps, min(sizes["backward_groups"], chunk // STEPS), segments)
    inputs = _inputs(padded, segments)
    del inputs["h0_BEN"]
    # As many chunks and channels as here: what the forward pass padded changes nothing.
    starts_BCEN = starts_BCEN[:, : steps // chunk, :channels]
    starts_BCEN = _pad(starts_BCEN, {1: steps // chunk, 2: channels})
    d_state = _pad(d_out.h_BEN.astype(jnp.float32), {1: channels, 2: states})
    inputs |= {
        "starts_BCEN": starts_BCEN.reshape(-1, plan.L // chunk, channels, states),
        "dy_BLE": _pad(d_out.y_BLE, {1: steps, 2: channels}).reshape(inputs["x_BLE"].shape),
        "dh_BEN": d_state,
    }
    if segments > 1:
        inputs["dh_BEN"] = _adjoints_at_borders(inputs, plan, B)
    rows = B * segments
    plan = dataclasses.replace(plan, chunk=chunk, rows=segments)
    programs = channels // (CHANNELS * warps)
    f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    outputs = {
        "dx_BLE": jax.ShapeDtypeStruct(inputs["x_BLE"].shape, operands.x_BLE.dtype),
        "ddt_BLE": jax.ShapeDtypeStruct(inputs["x_BLE"].shape, operands.dt_BLE.dtype),
        "da_BEN": f32((rows, channels, states)),
        "dd_BE": f32((rows, channels)),
        "ddt_bias_BE": f32((rows, channels)),
        # Of c and b; one group more, of which nothing is meant.
        "dbc": jax.ShapeDtypeStruct(
            (2, programs, rows, plan.L + STEPS, states),
            jnp.float32 if plan.lanes.exact else jnp.bfloat16,
        ),
        "shares": f32((rows, programs, 2, plan.sets, plan.lanes.warps, 128)),
        "dh0_BEN": f32((B, channels, states)),
        "kept": f32((rows, programs, chunk // STEPS, plan.sets, plan.lanes.width, 4)),
    }
    if operands.z_BLE is not None:
        outputs["dz_BLE"] = jax.ShapeDtypeStruct(inputs["x_BLE"].shape, operands.z_BLE.dtype)
    out = _call(backward_kernel, inputs, outputs, plan, grid=(B, segments))

    def whole(v: Array) -> Array:
        return v.reshape(B, steps, *v.shape[2:])[:, :L]

    # The kernel's results are read as they lie: slices of them would be copies.
    of_step = out["dbc"].reshape(2 * programs, rows, -1)
    total = sums(
        {
            "c": Terms(of_step, 0, programs, plan.L * states, operands.c_BLN.dtype),
            "b": Terms(of_step, programs, programs, plan.L * states, operands.b_BLN.dtype),
            "a": Terms(out["da_BEN"].reshape(rows, 1, -1), 0, rows, channels * states),
            "d": Terms(out["dd_BE"].reshape(rows, 1, -1), 0, rows, channels),
            "dt_bias": Terms(out["ddt_bias_BE"].reshape(rows, 1, -1), 0, rows, channels),
        },
        interpret=plan.lanes.interpret,
    )
    db_BLN, dc_BLN = (total[name].reshape(rows, plan.L, states) for name in "bc")
    gradients = Operands(
        x_BLE=whole(out["dx_BLE"])[:, :, :E],
        dt_BLE=whole(out["ddt_BLE"])[:, :, :E],
        a_EN=total["a"].reshape(channels, states)[:E, :N],
        b_BLN=whole(db_BLN)[:, :, :N],
        c_BLN=whole(dc_BLN)[:, :, :N],
        d_E=total["d"][0, :E],
        z_BLE=None if operands.z_BLE is None else whole(out["dz_BLE"])[:, :, :E],
        dt_bias_E=total["dt_bias"][0, :E],
        reset_BL=None,
        h0_BEN=out["dh0_BEN"][:, :E, :N],
    )
    return jax.tree.map(
        lambda gradient, v: gradient.astype(v.dtype), gradients, operands._replace(reset_BL=None)
    )


def _states_at_borders(inputs: dict[str, Array], plan: Plan, B: int) -> Array:
    """[B segments, E, N]: the state before each segment, from one pass over all but the last.

    A segment alone, from a zero state, ends in e; its decay is p = exp(a sum dt). Then
    h_{s+1} = p_s h_s + e_s."""
    h0_BEN = inputs["h0_BEN"]
    ends, decays = _alone(forward_kernel, inputs, "h_BEN", plan, B)
    h = [h0_BEN]
    for s in range(inputs["x_BLE"].shape[0] // B - 1):
        h.append(decays[:, s] * h[-1] + ends[:, s])
    return jnp.stack(h, 1).reshape(-1, *h0_BEN.shape[1:])


def _adjoints_at_borders(inputs: dict[str, Array], plan: Plan, B: int) -> Array:
    """[B segments, E, N]: the gradient of the state after each segment; `_states_at_borders`
    backwards, from one pass over all but the first."""
    dh_BEN = inputs["dh_BEN"]
    plan = dataclasses.replace(plan, first_row=1)
    firsts, decays = _alone(adjoint_kernel, inputs, "dh0_BEN", plan, B)
    dh = [dh_BEN]
    for s in reversed(range(1, inputs["dt_BLE"].shape[0] // B)):
        dh.append(decays[:, s] * dh[-1] + firsts[:, s])
    return jnp.stack(dh[::-1], 1).reshape(-1, *dh_BEN.shape[1:])


def _alone(
    kernel: Any, inputs: dict[str, Array], name: str, plan: Plan, B: int
) -> tuple[Array, Array]:
    """[B, segments, E, N] twice: the kernel's states, and the decays of segments. Of one segment
    of each row, the last one or that before `first_row`, there is nothing.

    Segments are cut once more, so that there is enough to do at the same time."""
    rows, _, channels = inputs["dt_BLE"].shape
    S = rows // B
    parts = _parts(plan.L, B * (S - 1) * channels // CHANNELS)
    wanted = ("x_BLE", "dt_BLE", "a_EN", "dt_bias_E", "reset_BL", "b_BLN", "c_BLN", "one")
    if kernel is adjoint_kernel:
        wanted = (*wanted[1:], "z_BLE", "dy_BLE")
    needed = {n: _cut(n, inputs[n], parts) for n in wanted if n in inputs}
    outputs = {
        name: jax.ShapeDtypeStruct((rows * parts, *inputs["a_EN"].shape), jnp.float32),
        "dt_BE": jax.ShapeDtypeStruct((rows * parts, channels), jnp.float32),
    }
    L = plan.L // parts
    plan = dataclasses.replace(
        plan,
        L=L,
        groups=math.gcd(L // STEPS, max(1, _GROUPS_ALONE // plan.sets)),
        rows=S * parts,
        first_row=plan.first_row * parts,
    )
    out = _call(kernel, needed, outputs, plan, grid=(B, (S - 1) * parts))
    # P parts, then P / 2 of twice the length, and so on.
    states_BSPEN, dt_BSPE = (v.reshape(B, S, parts, *v.shape[1:]) for v in out.values())

    def decays(dt_BSPE: Array) -> Array:
        return jnp.exp(dt_BSPE[..., None] * inputs["a_EN"][None, None, None])

    # Of two neighbours a state passes this one first.
    first = 1 if kernel is adjoint_kernel else 0
    for _ in range(parts.bit_length() - 1):
        entering, leaving = (states_BSPEN[:, :, i::2] for i in (first, 1 - first))
        states_BSPEN = decays(dt_BSPE[:, :, 1 - first :: 2]) * entering + leaving
        dt_BSPE = dt_BSPE[:, :, ::2] + dt_BSPE[:, :, 1::2]
    return states_BSPEN[:, :, 0], decays(dt_BSPE)[:, :, 0]


def _check(operands: Operands) -> None:
    if not operands.x_BLE.size:
        raise Unsupported(f"{operands.x_BLE.shape=} must have elements")
    if not dispatch.interpreted("gpu") and "NVIDIA" not in dispatch.device_kind():
        raise Unsupported(f"its instructions are NVIDIA's, and this is {dispatch.device_kind()}")
    _, L, E = operands.x_BLE.shape
    N = operands.a_EN.shape[1]
    if N > _LARGEST_N:
        raise Unsupported(f"{N=} states must be at most {_LARGEST_N}")
    if L * E >= _LARGEST_ROW:
        raise Unsupported(f"{L=} times {E=} must be below 2^31: places in a row are 32 bit wide")
    for name, v in operands._asdict().items():
        if v is not None and name != "reset_BL" and v.dtype not in _DTYPES:
            raise Unsupported(f"{name}.dtype={v.dtype} must be float32 or bfloat16")


def _sizes(operands: Operands, blocks: Mapping[str, int]) -> dict[str, int]:
    B, L, E = operands.x_BLE.shape
    N = operands.a_EN.shape[1]
    # As many instructions whatever N is: compilation takes minutes otherwise.
    groups = max(1, (8 if _few(B, L, E) else 4) // _sets(N))
    sizes = choose(
        OP,
        shape={"B": B, "L": L, "E": E, "N": N},
        dtype=operands.x_BLE.dtype,
        heuristic={
            "forward_warps": 4,
            "forward_groups": groups,
            "backward_warps": 4,
            "backward_groups": 1,
            "forward_segments": _enough(B, L, E, _FORWARD_WARPS),
            "backward_segments": _enough(B, L, E, _BACKWARD_WARPS),
            "chunk": 64,
        },
        override=blocks,
    )
    for name, size in sizes.items():
        if size & (size - 1):
            raise ValueError(f"{OP}: blocks[{name!r}]={size} must be a power of two")
    if sizes["chunk"] < STEPS * sizes["forward_groups"]:
        raise ValueError(
            f"{OP}: blocks['chunk']={sizes['chunk']} must be at least {STEPS} times "
            f"blocks['forward_groups']={sizes['forward_groups']}"
        )
    return sizes


def _few(B: int, L: int, E: int) -> bool:
    """Whether a warp has a scheduler for itself, or nearly so."""
    segments = _enough(B, L, E, _FORWARD_WARPS)
    return B * E // CHANNELS * segments < 2 * _FORWARD_WARPS


def _with_flags(operands: Operands) -> Operands:
    """Where nothing hides how ptxas orders instructions, its loop with reset flags takes 6 to 7 %
    less time, measured at B = 1: there are always some."""
    if operands.reset_BL is not None or not _few(*operands.x_BLE.shape):
        return operands
    return operands._replace(reset_BL=jnp.zeros(operands.x_BLE.shape[:2], jnp.bool_))


def _filled(L: int, steps: int) -> int:
    """No more steps than L fills, in powers of two from one group on."""
    return min(steps, max(STEPS, 1 << (L - 1).bit_length()))


def _enough(B: int, L: int, E: int, warps: int) -> int:
    """Segments of L for `warps` warps in all."""
    segments = 1
    while B * E // CHANNELS * segments < warps and L // (2 * segments) >= _SHORTEST_SEGMENT:
        segments *= 2
    return segments


def _segments(L: int, unit: int, wanted: int) -> int:
    """Fewer than wanted rather than a copy of the inputs, padded, that is not needed otherwise."""
    while wanted > 1 and L % unit == 0 and L // unit % wanted:
        wanted //= 2
    return wanted


def _parts(L: int, warps: int) -> int:
    """Of each segment, of L steps, where only states are computed, by `warps` warps otherwise."""
    parts = 1
    while (
        warps * parts < _WARPS_ALONE
        and L // (2 * parts) >= _SHORTEST_PART
        and L % (2 * parts * STEPS * _GROUPS_ALONE) == 0
    ):
        parts *= 2
    return parts


def _warps(E: int, wanted: int) -> int:
    """No more than E fills: padding costs more than small programs."""
    while wanted > 1 and E % (CHANNELS * wanted):
        wanted //= 2
    return wanted


def _pad(v: Array, sizes: Mapping[int, int], value: float = 0) -> Array:
    widths = [(0, sizes.get(axis, size) - size) for axis, size in enumerate(v.shape)]
    return jnp.pad(v, widths, constant_values=value) if any(w for _, w in widths) else v


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _sets(N: int) -> int:
    """Of 16 states, in powers of two."""
    return 1 << (_up(N, STATES) // STATES - 1).bit_length()


def _padded(o: Operands, warps: int, unit: int) -> Operands:
    """With steps, channels and states that change nothing."""
    steps, channels = _up(o.x_BLE.shape[1], unit), _up(o.x_BLE.shape[2], CHANNELS * warps)
    states = STATES * _sets(o.a_EN.shape[1])
    f32 = jnp.float32
    a_EN = o.a_EN.astype(f32)
    if o.reset_BL is not None:  # a rate of 0 would outlive a reset
        a_EN = jnp.where(jnp.abs(a_EN) < LEAST_RATE, -LEAST_RATE, a_EN)
    return Operands(
        x_BLE=_pad(o.x_BLE, {1: steps, 2: channels}),
        dt_BLE=_pad(o.dt_BLE, {1: steps, 2: channels}, NEUTRAL_DT),
        a_EN=_pad(a_EN, {0: channels, 1: states}),
        b_BLN=_pad(o.b_BLN, {1: steps, 2: states}),
        c_BLN=_pad(o.c_BLN, {1: steps, 2: states}),
        d_E=_pad(o.d_E.astype(f32), {0: channels}),
        z_BLE=None if o.z_BLE is None else _pad(o.z_BLE, {1: steps, 2: channels}),
        dt_bias_E=_pad(o.dt_bias_E.astype(f32), {0: channels}),
        reset_BL=None if o.reset_BL is None else _pad(_step_sizes(o.reset_BL), {1: steps}),
        h0_BEN=_pad(o.h0_BEN.astype(f32), {1: channels, 2: states}),
    )


def _step_sizes(reset_BL: Array) -> Array:
    """Below every step size, or that of a reset."""
    return jnp.where(reset_BL, RESET_DT, 0).astype(jnp.bfloat16)


def _cut(name: str, v: Array, segments: int) -> Array:
    """Segments of L, if it has that, as rows of the batch."""
    if not _has_steps(name):
        return v
    return v.reshape(v.shape[0] * segments, v.shape[1] // segments, *v.shape[2:])


def _has_steps(name: str) -> bool:
    return name.rsplit("_", 1)[-1].startswith("BL")


def _by_segment(v: Array, B: int) -> Array:
    return v.reshape(B, -1, *v.shape[1:])


def _plan(o: Operands, padded: Operands, warps: int, groups: int, segments: int) -> Plan:
    exact = any(v.dtype == jnp.float32 for v in (o.x_BLE, o.b_BLN, o.c_BLN))
    return Plan(
        lanes=Lanes(warps=warps, exact=exact, interpret=dispatch.interpreted("gpu")),
        L=padded.x_BLE.shape[1] // segments,
        sets=padded.a_EN.shape[1] // STATES,
        groups=groups,
    )


def _inputs(padded: Operands, segments: int) -> dict[str, Array]:
    """What the kernels read, by name; `one` is 1 (see `triton_kernels.py`)."""
    arrays = {n: _cut(n, v, segments) for n, v in padded._asdict().items() if v is not None}
    for name in ("b_BLN", "c_BLN"):
        arrays[name] = _in_pairs(arrays[name])
    return arrays | {"one": jnp.ones((1,), jnp.int32)}


def _in_pairs(v_BLN: Array) -> Array:
    """[B, L, N / 2] int32 of bfloat16; float32 as it is."""
    if v_BLN.dtype == jnp.float32:
        return v_BLN
    B, L, N = v_BLN.shape
    return lax.bitcast_convert_type(v_BLN.reshape(B, L, N // 2, 2), jnp.int32)


def _call(
    kernel: Any,
    inputs: dict[str, Array],
    outputs: dict[str, Any],
    plan: Plan,
    grid: tuple[int, int] | None = None,
) -> dict[str, Array]:
    """`grid`: rows and parts of rows, see `Plan`; by default every row of dt_BLE.

    The kernels see what has L as [B, L x size of a step]."""
    names = (*inputs, *outputs)
    timed = [_has_steps(n) for n in names]
    rows, _, channels = inputs["dt_BLE"].shape
    rows, parts = grid or (rows, 1)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    call = pl.pallas_call(
        functools.partial(kernel, names=names, plan=plan),
        out_shape=tuple(
            jax.ShapeDtypeStruct((v.shape[0], math.prod(v.shape[1:])), v.dtype) if flat else v
            for v, flat in zip(outputs.values(), timed[len(inputs) :], strict=True)
        ),
        grid=(rows, channels // (CHANNELS * plan.lanes.warps), parts),
        in_specs=[anywhere] * len(inputs),
        out_specs=tuple([anywhere] * len(outputs)),
        compiler_params=plgpu.CompilerParams(num_warps=plan.lanes.warps, num_stages=1),
        name=f"selective_scan_{kernel.__name__}",
        interpret=plan.lanes.interpret,
    )
    arrays = [
        v.reshape(v.shape[0], -1) if flat else v
        for v, flat in zip(inputs.values(), timed, strict=False)
    ]
    with jax.enable_x64(False):  # indices are 32 bit wide
        results = call(*arrays)
    return {n: v.reshape(outputs[n].shape) for n, v in zip(outputs, results, strict=True)}
