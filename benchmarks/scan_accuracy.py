"""How far a selective scan is from float64: every output and every gradient, one number each.

The measure is the relative root mean square error of one named tensor, |got - want| / |want|.
`want` is the "xla" implementation in float64 on the same rounded inputs; the tests hold it against
the definition. Rows of a batch are computed in groups that fit the device's memory, and gradients
of weights, which rows share, are summed over the groups.

Ordinary inputs are those of `scan_programs.draw`. Hard ones take step sizes to both ends of
softplus (3e-7 and 10), decay rates from -1e-3 to -64, resets at every step, one step, 100,003
steps, odd sizes, and every number of states.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from benchmarks.scan_programs import Arrays, Inputs, Kind, Programs, outputs_and_gradients
from pallas_kernels.shapes import ScanShape

# The largest error of a tensor with which a time is printed. float32: sums over time and channels
# in another order. bfloat16: results are rounded once (2^-9 at most, 1.7e-3 in the mean).
LIMITS: Mapping[str, float] = {"float32": 1e-5, "bfloat16": 5e-3}
# Values of a [B, L, E] array that are computed at once; in float64, with gradients and states
# before chunks, some 30 such arrays are alive.
_VALUES_AT_ONCE = 2**25


class HardCase(NamedTuple):
    """Sizes, and which of the hard values are drawn."""

    shape: ScanShape
    raw_dt: tuple[float, ...] = (-15.0, 0.0, 10.0)  # each step of each channel is near one of them
    reset_share: float = 0.01


_ODD = ScanShape(B=2, L=131, E=37, N=16)
HARD_CASES: Mapping[str, HardCase] = {
    "small_dt": HardCase(_ODD, raw_dt=(-15.0,)),
    "large_dt": HardCase(_ODD, raw_dt=(10.0,)),
    "mixed": HardCase(_ODD),
    "reset_everywhere": HardCase(_ODD, reset_share=1),
    "one_step": HardCase(ScanShape(B=3, L=1, E=37, N=16)),
    "n8": HardCase(ScanShape(B=2, L=67, E=19, N=8)),
    "n32": HardCase(ScanShape(B=1, L=67, E=19, N=32)),
    "n64": HardCase(ScanShape(B=1, L=67, E=19, N=64)),
    "long": HardCase(ScanShape(B=1, L=100_003, E=64, N=16), raw_dt=(-4.0, -2.0), reset_share=1e-4),
}


def draw_hard(case: HardCase, dtype: str, seed: int) -> Inputs:
    """All options on; decay rates log-uniform from -1e-3 to -64. Made by the host: no compiler."""
    rng = np.random.default_rng(seed)
    sizes = dataclasses.asdict(case.shape)

    def normal(letters: str, dtype: str = dtype) -> Array:
        return jnp.asarray(rng.standard_normal([sizes[n] for n in letters], np.float32), dtype)

    B, L, E, N = (sizes[n] for n in "BLEN")
    dt_BLE = rng.choice(np.array(case.raw_dt, np.float32), (B, L, E))
    dt_BLE += 0.1 * rng.standard_normal((B, L, E), np.float32)
    arrays = {
        "x_BLE": normal("BLE"),
        "dt_BLE": jnp.asarray(dt_BLE, dtype),
        "a_EN": jnp.asarray(-(10 ** rng.uniform(-3, math.log10(64), (E, N))), jnp.float32),
        "b_BLN": normal("BLN"),
        "c_BLN": normal("BLN"),
        "d_E": normal("E", "float32"),
        "z_BLE": normal("BLE"),
        "dt_bias_E": jnp.float32(0.1) * normal("E", "float32"),
        "h0_BEN": normal("BEN", "float32"),
        "reset_BL": jnp.asarray(rng.random((B, L)) < case.reset_share),
    }
    return Inputs(arrays, {"y_BLE": normal("BLE"), "h_BEN": normal("BEN", "float32")})


@functools.partial(jax.jit, static_argnames="rows")
def _exact_rows(inputs: Inputs, first: Array, *, rows: int) -> Arrays:
    def part(name: str, v: Array) -> Array:
        if _has_rows(name):
            v = jax.lax.dynamic_slice_in_dim(v, first, rows)
        return v if v.dtype == jnp.bool_ else v.astype(jnp.float64)

    wide = Inputs(*({name: part(name, v) for name, v in some.items()} for some in inputs))
    return outputs_and_gradients(wide, implementation="xla")


def lower_exact(inputs: Inputs) -> Any:
    """The program that `exact` runs, for a compiler that is to start early."""
    with jax.enable_x64(True):
        return _exact_rows.lower(inputs, jnp.int32(0), rows=_rows_at_once(inputs))


def exact(inputs: Inputs) -> Arrays:
    """Outputs and gradients in float64, by the names of `outputs_and_gradients`."""
    batch, rows = inputs.arrays["x_BLE"].shape[0], _rows_at_once(inputs)
    with jax.enable_x64(True):
        groups = [
            _exact_rows(inputs, jnp.int32(first), rows=rows) for first in range(0, batch, rows)
        ]
        if len(groups) == 1:
            return groups[0]
        joined: Arrays = {}
        for name in list(groups[0]):
            parts = [group.pop(name) for group in groups]
            joined[name] = jnp.concatenate(parts) if _has_rows(name) else jnp.stack(parts).sum(0)
        return joined


def _has_rows(name: str) -> bool:
    return "B" in name.rsplit("_", 1)[1]


def _rows_at_once(inputs: Inputs) -> int:
    """A divisor of the batch, so that one program serves all groups."""
    B, L, E = inputs.arrays["x_BLE"].shape
    fit = max(1, min(B, _VALUES_AT_ONCE // (L * E)))
    return max(rows for rows in range(1, fit + 1) if B % rows == 0)


def errors(got: Mapping[str, Array], want: Mapping[str, Array]) -> dict[str, float]:
    """The relative error of every tensor in `got`; of two zero tensors 0, infinite with a NaN."""
    with jax.enable_x64(True):
        squares = jax.device_get({name: _squares(v, want[name]) for name, v in got.items()})
    return {name: _relative(*map(float, pair)) for name, pair in squares.items()}


@jax.jit
def _squares(got: Array, want: Array) -> tuple[Array, Array]:
    got, want = got.astype(jnp.float64), want.astype(jnp.float64)
    return jnp.sum(jnp.square(got - want)), jnp.sum(jnp.square(want))


def _relative(error: float, size: float) -> float:
    if math.isnan(error) or math.isnan(size):
        return math.inf
    return math.sqrt(error / size) if size else (0.0 if error == 0 else math.inf)


def equal_bits(one: Mapping[str, Array], other: Mapping[str, Array]) -> bool:
    """Whether two results are the same bit for bit (NaNs and signs of zeros too)."""
    return all(bool(_same_bits(one[name], other[name])) for name in one)


@jax.jit
def _same_bits(a: Array, b: Array) -> Array:
    unsigned = {2: jnp.uint16, 4: jnp.uint32}[a.dtype.itemsize]
    a, b = (jax.lax.bitcast_convert_type(v, unsigned) for v in (a, b))
    return jnp.array_equal(a, b)


def judge(errors: Mapping[str, float], dtype: str) -> dict[str, Any]:
    """The errors, and what is wrong if one is too large."""
    limit = LIMITS[dtype]
    large = {name: f"{error:.1e}" for name, error in errors.items() if not error <= limit}
    wrong = {"wrong": f"errors above {limit}: {large}"} if large else {}
    return {"errors": dict(errors), **wrong}


def in_short(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip()[:500]}"


def check(
    programs: Programs,
    kind: Kind,
    inputs: Inputs,
    want: Mapping[str, Array],
    dtype: str,
) -> dict[str, Any]:
    """The errors of one program, and whether its results come again."""
    try:
        got = programs.results(kind, inputs)
        again = programs.results(kind, inputs)
        same = equal_bits(got, again)
        record = judge(errors(got, want), dtype) | {"same_bits_again": same}
        return record if same else {"wrong": "the same inputs gave other bits"} | record
    except Exception as error:
        return {"wrong": in_short(error)}
