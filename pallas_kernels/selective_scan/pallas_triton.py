"""The selective scan for NVIDIA GPUs: Pallas lowered to Triton.

    dt_t = softplus(dt_raw_t + dt_bias)
    h_t  = exp(dt_t a) h_{t-1} + (dt_t x_t) b_t
    y_t  = (h_t c_t + d x_t) SiLU(z_t)

(Mamba, arXiv 2312.00752, section 3.) One kernel forward, one backward, everything in one pass over
memory; serial in time, parallel over the batch and channels. State, decays and sums are float32,
results are rounded once. With bfloat16 x the products with b and c cut their other factor to
tf32; with float32 x they are as exact as float32 (`triton_lanes.py`). Saved for the backward pass
beyond the inputs: the float32 states before chunks of 64 steps, one byte per element at N = 16.
Deterministic: the gradients of b and c are summed over the channels of a program in its kernel
and over programs by XLA, always in the same order.

What is padded: L to whole chunks (steps with dt = 0), E to the channels of a program, N to 16, 32
or 64 (states that stay 0).
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

from pallas_kernels import dispatch
from pallas_kernels.blocks import choose
from pallas_kernels.dispatch import Unsupported
from pallas_kernels.selective_scan.operands import NEUTRAL_DT, Operands, ScanOutput
from pallas_kernels.selective_scan.triton_kernels import Plan, backward_kernel, forward_kernel
from pallas_kernels.selective_scan.triton_lanes import (
    CHANNELS,
    LEAST_RATE,
    STATES,
    STEPS,
    Lanes,
    arrange_inner,
    arrange_outer,
)

OP = "selective_scan/pallas_triton"
# Warps of a program and groups of 4 steps of a trip, forward and backward; steps of a chunk.
TUNABLE: Mapping[str, tuple[int, ...]] = {
    "forward_warps": (1, 2, 4, 8),
    "forward_groups": (1, 2, 4, 8),
    "backward_warps": (1, 2, 4, 8),
    "backward_groups": (1, 2, 4),
    "chunk": (64, 128),
}
_LARGEST_N = 64
_DTYPES = (jnp.float32, jnp.bfloat16)


def forward(
    operands: Operands, blocks: Mapping[str, int], *, for_backward: bool
) -> tuple[ScanOutput, Any]:
    """Residuals: the operands and starts_BCEN, the states before chunks (C of padded L)."""
    interpret = dispatch.interpreted("gpu")
    _check(operands)
    _, L, E = operands.x_BLE.shape
    sizes = _sizes(operands, blocks)
    warps = _warps(E, sizes["forward_warps"])
    groups = _filled(L, STEPS * sizes["forward_groups"]) // STEPS
    chunk = _filled(L, sizes["chunk"]) if for_backward else None
    padded = _padded(operands, warps, chunk or STEPS * groups)
    plan = _plan(operands, padded, warps, groups, chunk, interpret)
    inputs = _inputs(padded) | {"bc": _arranged(padded.b_BLN, padded.c_BLN)}
    B, steps, channels = padded.x_BLE.shape
    states = padded.a_EN.shape[1]
    outputs = {
        "y_BLE": jax.ShapeDtypeStruct((B, steps, channels), operands.x_BLE.dtype),
        "h_BEN": jax.ShapeDtypeStruct((B, channels, states), jnp.float32),
    }
    if chunk:
        outputs["starts_BCEN"] = jax.ShapeDtypeStruct(
            (B, steps // chunk, channels, states), jnp.float32
        )
    out = _call(forward_kernel, inputs, outputs, plan, B)
    N = operands.a_EN.shape[1]
    y_BLE = out["y_BLE"][:, :L, :E]
    return ScanOutput(y_BLE, out["h_BEN"][:, :E, :N]), (operands, out.get("starts_BCEN"))


def backward(residuals: Any, d_out: ScanOutput, blocks: Mapping[str, int]) -> Operands:
    operands, starts_BCEN = residuals
    interpret = dispatch.interpreted("gpu")
    _, L, E = operands.x_BLE.shape
    N = operands.a_EN.shape[1]
    sizes = _sizes(operands, blocks)
    warps, chunk = _warps(E, sizes["backward_warps"]), _filled(L, sizes["chunk"])
    padded = _padded(operands, warps, chunk)
    groups = min(sizes["backward_groups"], chunk // STEPS)
    plan = _plan(operands, padded, warps, groups, chunk, interpret)
    B, steps, channels = padded.x_BLE.shape
    states = padded.a_EN.shape[1]
    inputs = _inputs(padded) | {
        "bc": _arranged(padded.b_BLN, padded.c_BLN),
        "cb": _arranged(padded.c_BLN, padded.b_BLN),
        "starts_BCEN": _pad(starts_BCEN[:, :, :channels], {2: channels}),
        "dy_BLE": _pad(d_out.y_BLE, {1: steps, 2: channels}),
        "dh_BEN": _pad(d_out.h_BEN.astype(jnp.float32), {1: channels, 2: states}),
    }
    del inputs["h0_BEN"]
    programs = channels // (CHANNELS * warps)
    f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    outputs = {
        "dx_BLE": jax.ShapeDtypeStruct((B, steps, channels), operands.x_BLE.dtype),
        "ddt_BLE": jax.ShapeDtypeStruct((B, steps, channels), operands.dt_BLE.dtype),
        "da_BEN": f32((B, channels, states)),
        "dbc": f32((programs, B, steps // STEPS, plan.sets, 32, 4)),
        "dd_BE4": f32((B, channels, 4)),
        "ddt_bias_BE4": f32((B, channels, 4)),
        "dh0_BEN": f32((B, channels, states)),
        "kept": f32((B, programs, chunk // (STEPS * groups), plan.sets, plan.lanes.width, 4)),
    }
    if operands.z_BLE is not None:
        outputs["dz_BLE"] = jax.ShapeDtypeStruct((B, steps, channels), operands.z_BLE.dtype)
    out = _call(backward_kernel, inputs, outputs, plan, B)
    db_BLN, dc_BLN = _sums_in_order(out["dbc"])
    gradients = Operands(
        x_BLE=out["dx_BLE"][:, :L, :E],
        dt_BLE=out["ddt_BLE"][:, :L, :E],
        a_EN=out["da_BEN"].sum(0)[:E, :N],
        b_BLN=db_BLN[:, :L, :N],
        c_BLN=dc_BLN[:, :L, :N],
        d_E=out["dd_BE4"].sum((0, 2))[:E],
        z_BLE=None if operands.z_BLE is None else out["dz_BLE"][:, :L, :E],
        dt_bias_E=out["ddt_bias_BE4"].sum((0, 2))[:E],
        reset_BL=None,
        h0_BEN=out["dh0_BEN"][:, :E, :N],
    )
    return jax.tree.map(
        lambda gradient, v: gradient.astype(v.dtype), gradients, operands._replace(reset_BL=None)
    )


def _check(operands: Operands) -> None:
    N = operands.a_EN.shape[1]
    if N > _LARGEST_N:
        raise Unsupported(f"{N=} states must be at most {_LARGEST_N}")
    for name, v in operands._asdict().items():
        if v is not None and name != "reset_BL" and v.dtype not in _DTYPES:
            raise Unsupported(f"{name}.dtype={v.dtype} must be float32 or bfloat16")


def _sizes(operands: Operands, blocks: Mapping[str, int]) -> dict[str, int]:
    B, L, E = operands.x_BLE.shape
    N = operands.a_EN.shape[1]
    sizes = choose(
        OP,
        shape={"B": B, "L": L, "E": E, "N": N},
        dtype=operands.x_BLE.dtype,
        heuristic={
            "forward_warps": 4,
            "forward_groups": 4,
            "backward_warps": 4,
            "backward_groups": 1,
            "chunk": 64,
        },
        override=blocks,
    )
    for name, size in sizes.items():
        if size & (size - 1):
            raise ValueError(f"{OP}: blocks[{name!r}]={size} must be a power of two")
    for name in ("forward_groups", "backward_groups"):
        if sizes["chunk"] < STEPS * sizes[name]:
            raise ValueError(
                f"{OP}: blocks['chunk']={sizes['chunk']} must be at least {STEPS} times "
                f"blocks[{name!r}]={sizes[name]}"
            )
    return sizes


def _filled(L: int, steps: int) -> int:
    """No more steps than L fills, in powers of two from one group on."""
    return min(steps, max(STEPS, 1 << (L - 1).bit_length()))


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


def _padded(o: Operands, warps: int, unit: int) -> Operands:
    """With steps, channels and states that change nothing."""
    steps, channels = _up(o.x_BLE.shape[1], unit), _up(o.x_BLE.shape[2], CHANNELS * warps)
    states = STATES * (1 << (_up(o.a_EN.shape[1], STATES) // STATES - 1).bit_length())
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
        reset_BL=None if o.reset_BL is None else _pad(o.reset_BL.astype(jnp.int8), {1: steps}),
        h0_BEN=_pad(o.h0_BEN.astype(f32), {1: channels, 2: states}),
    )


def _plan(
    operands: Operands,
    padded: Operands,
    warps: int,
    groups: int,
    chunk: int | None,
    interpret: bool,
) -> Plan:
    exact = any(v.dtype == jnp.float32 for v in (operands.x_BLE, operands.b_BLN, operands.c_BLN))
    return Plan(
        lanes=Lanes(warps=warps, exact=exact, interpret=interpret),
        L=padded.x_BLE.shape[1],
        sets=padded.a_EN.shape[1] // STATES,
        groups=groups,
        chunk=chunk,
    )


def _inputs(padded: Operands) -> dict[str, Array]:
    """What the kernels read as it is, by name; `one` is 1 (see `triton_kernels.py`)."""
    arrays = {n: v for n, v in padded._asdict().items() if v is not None}
    del arrays["b_BLN"], arrays["c_BLN"]
    return arrays | {"one": jnp.ones((1,), jnp.int32)}


def _arranged(outer_BLN: Array, inner_BLN: Array) -> Array:
    """[B, L / 4, N / 16, 32, 4]: what each lane needs of a group of 4 steps, in one load."""
    return jnp.concatenate([arrange_outer(outer_BLN), arrange_inner(inner_BLN)], axis=-1)


def _sums_in_order(dbc: Array) -> tuple[Array, Array]:
    """Both [B, L, N], float32, from the sums over channels of each program."""
    B, groups, sets = dbc.shape[1:4]
    # B, group, set, i, m, step, b or c, half: state 4 m + 2 half + i.
    v = dbc.sum(0).reshape(B, groups, sets, 2, 4, STEPS, 2, 2).transpose(6, 0, 1, 5, 2, 4, 7, 3)
    v_2BLN = v.reshape(2, B, groups * STEPS, sets * STATES)
    return v_2BLN[0], v_2BLN[1]


def _call(
    kernel: Any, inputs: dict[str, Array], outputs: dict[str, Any], plan: Plan, B: int
) -> dict[str, Array]:
    names = (*inputs, *outputs)
    programs = inputs["x_BLE"].shape[2] // (CHANNELS * plan.lanes.warps)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    results = pl.pallas_call(
        functools.partial(kernel, names=names, plan=plan),
        out_shape=tuple(outputs.values()),
        grid=(B, programs),
        in_specs=[anywhere] * len(inputs),
        out_specs=tuple([anywhere] * len(outputs)),
        compiler_params=plgpu.CompilerParams(num_warps=plan.lanes.warps, num_stages=1),
        name=f"selective_scan_{kernel.__name__}",
        interpret=plan.lanes.interpret,
    )(*inputs.values())
    return dict(zip(outputs, results, strict=True))
