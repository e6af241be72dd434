"""The selective scan on shapes, dtypes, options and values that hypothesis draws.

Each example is a program (shape, dtype, options that are given) and some sets of values for it:
outputs and gradients of an implementation against the definition in float64, on the same rounded
inputs. What is drawn includes one step, one channel, any number of states, steps that keep
everything and steps that forget everything, neutral steps, resets everywhere or nowhere, and every
option left out. Examples are the same in every run.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from benchmarks.scan_programs import Inputs, outputs_and_gradients
from pallas_kernels.selective_scan import api
from pallas_kernels.shapes import ScanShape

KERNELS = [name for name in api.IMPLEMENTATIONS if name not in ("reference", "xla")]
# So that a few steps cross the borders of chunks; kernels pad to a whole chunk in any case.
BLOCKS: Mapping[str, dict[str, int]] = {
    "xla": {"chunk": 3},
    "pallas_triton": {
        "chunk": 16,
        "forward_groups": 1,
        "forward_segments": 2,
        "backward_groups": 2,
        "backward_segments": 4,
    },
}
# Relative root mean square. float32: some roundings of 6e-8. bfloat16: that of the result, 2^-9.
TOLERANCE: Mapping[str, float] = {"float32": 5e-6, "bfloat16": 5e-3}
# Relative to what the tensor would be if nothing cancelled: where it has few elements, or many with
# one small factor in common, roundings of the terms of a sum are all that is left of it.
ROUNDING: Mapping[str, float] = {"float32": 1e-6, "bfloat16": 2**-9}
# Gradients that fade below this, like exp(-640), are zero or denormal dust.
DUST = 1e-30
NEUTRAL = -1e4
TIMED = ("x_BLE", "z_BLE", "b_BLN", "c_BLN")
OPTIONS = ("z_BLE", "dt_bias_E", "h0_BEN", "reset_BL")


@dataclasses.dataclass(frozen=True)
class Program:
    """What is compiled. `dtype` is that of what varies with time: weights and states are wide."""

    shape: ScanShape
    dtype: str
    options: frozenset[str]
    final_state: bool  # whether a gradient reaches it


@dataclasses.dataclass(frozen=True)
class Values:
    raw_dt: tuple[float, ...]  # every step of every channel is near one of them
    log_rates: tuple[float, float]  # least and largest decimal logarithm of -a
    reset_share: float
    seed: int


def draw_inputs(program: Program, values: Values) -> Inputs:
    rng = np.random.default_rng(values.seed)
    sizes = dataclasses.asdict(program.shape)

    def normal(letters: str, dtype: str = "float32") -> jax.Array:
        return jnp.asarray(rng.standard_normal([sizes[n] for n in letters]), dtype)

    B, L, E, N = (sizes[n] for n in "BLEN")
    dt_BLE = rng.choice(values.raw_dt, (B, L, E)) + 0.3 * rng.standard_normal((B, L, E))
    arrays = {name: normal(name.split("_")[1], program.dtype) for name in TIMED} | {
        "dt_BLE": jnp.asarray(dt_BLE, program.dtype),
        "a_EN": jnp.asarray(-(10 ** rng.uniform(*values.log_rates, (E, N))), "float32"),
        "d_E": normal("E"),
        "dt_bias_E": 0.1 * normal("E"),
        "h0_BEN": normal("BEN"),
        "reset_BL": jnp.asarray(rng.random((B, L)) < values.reset_share),
    }
    left_out = set(OPTIONS) - program.options
    d_out = {"y_BLE": normal("BLE", program.dtype)}
    if program.final_state:
        d_out["h_BEN"] = normal("BEN")
    return Inputs({name: v for name, v in arrays.items() if name not in left_out}, d_out)


def programs(longest: int) -> st.SearchStrategy[Program]:
    shapes = st.builds(
        ScanShape,
        B=st.integers(1, 3),
        L=st.integers(1, longest),
        E=st.integers(1, 9),
        N=st.integers(1, 17) | st.sampled_from([8, 16, 32, 64]),
    )
    return st.builds(
        Program,
        shape=shapes,
        dtype=st.sampled_from(["float32", "bfloat16"]),
        options=st.frozensets(st.sampled_from(OPTIONS)),
        final_state=st.booleans(),
    )


VALUES = st.builds(
    Values,
    raw_dt=st.sampled_from(
        [(-15.0,), (-3.0,), (0.0,), (10.0,), (-15.0, 0.0, 10.0), (NEUTRAL, 0.0)]
    ),
    log_rates=st.sampled_from([(-3.0, -2.0), (-1.0, 1.0), (1.5, 1.8), (-3.0, 1.8)]),
    reset_share=st.sampled_from([0.0, 0.1, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)


@jax.jit
def defined(inputs: Inputs) -> dict[str, jax.Array]:
    """Outputs and gradients by the definition, in float64 (under enable_x64)."""
    wide: Any = jax.tree.map(lambda v: v if v.dtype == jnp.bool_ else v.astype(jnp.float64), inputs)
    return outputs_and_gradients(wide, implementation="reference")


def without_signs(inputs: Inputs) -> Inputs:
    """The same without what makes sums cancel."""
    signed = ("a_EN", "dt_BLE", "dt_bias_E", "reset_BL")
    arrays = {n: v if n in signed else jnp.abs(v) for n, v in inputs.arrays.items()}
    return Inputs(arrays, jax.tree.map(jnp.abs, inputs.d_out))


def check(backend: str, *, count: int, longest: int) -> None:
    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        # Without shrinking: every smaller example would be compiled.
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(programs(longest), st.lists(VALUES, min_size=3, max_size=5))
    def run(program: Program, sets: list[Values]) -> None:
        blocks = BLOCKS.get(backend)
        compiled = jax.jit(
            lambda v: outputs_and_gradients(v, implementation=backend, blocks=blocks)
        )
        for values in sets:
            inputs = draw_inputs(program, values)
            got = compiled(inputs)
            with jax.enable_x64(True):
                want, whole = defined(inputs), defined(without_signs(inputs))
            assert got.keys() == want.keys()
            for name, value in got.items():
                exact = np.asarray(want[name])
                error = np.linalg.norm(np.asarray(value, np.float64) - exact)
                limit = TOLERANCE[program.dtype] * np.linalg.norm(exact) + DUST
                limit += ROUNDING[program.dtype] * np.linalg.norm(np.asarray(whole[name]))
                where = f"{name} of {backend}, {program}, {values}"
                assert error <= limit, f"{error=:.3g} {limit=:.3g}: {where}"

    run()


def test_examples() -> None:
    check("xla", count=6, longest=20)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["xla", *KERNELS])
def test_more_examples(backend: str) -> None:
    check(backend, count=40 if backend == "xla" else 5, longest=300)
