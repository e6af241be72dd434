"""The attention over three memories on shapes, masks, dtypes and values that hypothesis draws.

Each example is a program (shape, dtype, options that are given) and some sets of values for it:
outputs and all gradients of an implementation against the definition in float64, on the same
rounded inputs. What is drawn includes one token, windows of one token and beyond the sequence,
chunks of one token and longer than the sequence, streams that are off, one document or one for
every token, memories that are empty or full, flat and sharp weights. Examples are the same in every
run.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from pallas_kernels import AttentionOutput, memory_attention
from pallas_kernels.shapes import AttentionShape
from tests.tolerances import TOLERANCE

TILES = [f"{part}_{what}" for part in ("forward", "dq", "dkv") for what in ("queries", "keys")]
# Small, so that a few tokens cross the borders of tiles.
BLOCKS: Mapping[str, dict[str, int]] = {
    "xla": {"queries": 6},
    "pallas_triton": dict.fromkeys(TILES, 16),
    "pallas_tpu": dict.fromkeys(TILES, 128),
}
# Widths of heads: kernels for GPUs pad to 32 at least, those for TPUs refuse others.
WIDTHS: Mapping[str, tuple[int, ...]] = {
    "xla": (1, 2, 3, 8, 32),
    "pallas_triton": (5, 32, 64),
    "pallas_tpu": (32, 64),
}
# What a gradient may be wrong by where it cancels: roundings of its terms, which are of size 1
# (times that of the queries, for keys) whatever is left of their sum.
ROUNDING: Mapping[str, float] = {"float32": 2**-21, "bfloat16": 2**-9}
OPTIONS = ("segment_ids_BL", "eidetic_bias_BZHM", "scale")
BEYOND = 10**9  # a window that no sequence fills


@dataclasses.dataclass(frozen=True)
class Program:
    """What is compiled."""

    shape: AttentionShape
    dtype: str = "float32"
    options: frozenset[str] = frozenset(OPTIONS)
    lse_gradient: bool = True


@dataclasses.dataclass(frozen=True)
class Values:
    sharpness: float = 1.0  # size of the queries
    valid_share: float = 0.6  # of the slots
    start_share: float = 0.1  # of the tokens, that start a document
    seed: int = 0


def draw_arrays(program: Program, values: Values) -> dict[str, jax.Array]:
    """The arrays of a call, and the gradients of its outputs."""
    rng = np.random.default_rng(values.seed)
    s = program.shape
    Z = -(-s.L // s.chunk)

    def normal(*sizes: int, dtype: str = program.dtype) -> jax.Array:
        return jnp.asarray(rng.standard_normal(sizes), dtype)

    arrays = {"q_BLHK": values.sharpness * normal(s.B, s.L, s.H, s.K)}
    arrays |= {name: normal(s.B, s.L, s.G, s.K) for name in ("k_BLGK", "v_BLGK")}
    if s.fading_window:
        fading = ("fading_k_BLGK", "fading_v_BLGK")
        arrays |= {name: normal(s.B, s.L, s.G, s.K) for name in fading}
    if s.eidetic:
        memory = ("eidetic_k_BZMGK", "eidetic_v_BZMGK")
        arrays |= {name: normal(s.B, Z, s.eidetic, s.G, s.K) for name in memory}
        valid = rng.random((s.B, Z, s.eidetic)) < values.valid_share
        arrays["eidetic_valid_BZM"] = jnp.asarray(valid)
        if "eidetic_bias_BZHM" in program.options:
            arrays["eidetic_bias_BZHM"] = normal(s.B, Z, s.H, s.eidetic, dtype="float32")
    if "segment_ids_BL" in program.options:
        starts = rng.random((s.B, s.L)) < values.start_share
        arrays["segment_ids_BL"] = jnp.asarray(np.cumsum(starts, axis=1), "int32")
    d_lse = normal(s.B, s.L, s.H, dtype="float32")
    arrays["d_o"] = normal(s.B, s.L, s.H, s.K)
    arrays["d_lse"] = d_lse if program.lse_gradient else jnp.zeros_like(d_lse)
    return arrays


def outputs_and_gradients(
    arrays: Mapping[str, jax.Array], program: Program, implementation: str, **more: Any
) -> dict[str, jax.Array]:
    """o, lse and the gradient of every float operand."""
    shape = program.shape
    options = {"window": shape.window, "fading_window": shape.fading_window, **more}
    if shape.eidetic:
        options["chunk"] = shape.chunk
    if "scale" in program.options:
        options["scale"] = -1.4 * shape.K**-0.5
    cotangents = {"d_o", "d_lse"}
    floats = {
        name: v
        for name, v in arrays.items()
        if name not in cotangents and jnp.issubdtype(v.dtype, jnp.floating)
    }
    rest = {n: v for n, v in arrays.items() if n not in floats and n not in cotangents}
    out, pull = jax.vjp(
        lambda x: memory_attention(**x, **rest, **options, implementation=implementation), floats
    )
    d_out = AttentionOutput(
        arrays["d_o"].astype(out.o_BLHK.dtype), arrays["d_lse"].astype(out.lse_BLH.dtype)
    )
    (gradients,) = pull(d_out)
    return {"o": out.o_BLHK, "lse": out.lse_BLH, **{f"d {n}": g for n, g in gradients.items()}}


# B, L, H, G, K, W, F, M, C: one token; a plain sliding window; full attention; a memory alone; all
# streams, and no multiple of anything.
CORNERS = [
    Program(AttentionShape(1, 1, 1, 1, 1, 1, 1, 1, 1)),
    Program(AttentionShape(2, 19, 2, 1, 1, 5, 0, 0, 1), "bfloat16", options=frozenset()),
    Program(AttentionShape(1, 17, 2, 2, 1, 17, 3, 2, 4)),
    Program(AttentionShape(1, 18, 3, 1, 1, 1, 0, 7, 4), lse_gradient=False),
    Program(AttentionShape(2, 23, 4, 2, 1, 5, 7, 3, 9)),
]


def programs(longest: int, widths: tuple[int, ...]) -> st.SearchStrategy[Program]:
    @st.composite
    def shapes(draw: st.DrawFn) -> AttentionShape:
        L, G = draw(st.integers(1, longest)), draw(st.integers(1, 2))
        sizes = st.integers(1, L + 2)
        return AttentionShape(
            B=draw(st.integers(1, 2)),
            L=L,
            H=G * draw(st.integers(1, 3)),
            G=G,
            K=draw(st.sampled_from(widths)),
            window=draw(sizes | st.just(BEYOND)),
            fading_window=draw(st.just(0) | sizes | st.just(BEYOND)),
            eidetic=draw(st.just(0) | st.integers(1, 9) | st.just(33)),
            chunk=draw(sizes | st.just(BEYOND)),
        )

    return st.builds(
        Program,
        shape=shapes(),
        dtype=st.sampled_from(list(ROUNDING)),
        options=st.frozensets(st.sampled_from(OPTIONS)),
        lse_gradient=st.booleans(),
    )


VALUES = st.builds(
    Values,
    sharpness=st.sampled_from([0.1, 1.0, 8.0]),
    valid_share=st.sampled_from([0.0, 0.6, 1.0]),
    start_share=st.sampled_from([0.0, 0.1, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)


def wide(v: jax.Array) -> jax.Array:
    return v.astype(jnp.float64) if jnp.issubdtype(v.dtype, jnp.floating) else v


def check(implementation: str, *, count: int, longest: int) -> None:
    def run(program: Program, sets: list[Values]) -> None:
        blocks = BLOCKS[implementation]
        compiled = jax.jit(
            lambda v: outputs_and_gradients(v, program, implementation, blocks=blocks)
        )
        defined = jax.jit(lambda v: outputs_and_gradients(v, program, "reference"))
        for values in sets:
            arrays = draw_arrays(program, values)
            got = compiled(arrays)
            with jax.enable_x64(True):
                want = defined(jax.tree.map(wide, arrays))
            assert got.keys() == want.keys()
            for name, value in got.items():
                where = f"{name} of {implementation}, {program}, {values}"
                in_float32 = name in ("lse", "d eidetic_bias_BZHM")
                assert value.dtype == ("float32" if in_float32 else program.dtype), where
                exact = np.asarray(want[name])
                error = np.linalg.norm(np.asarray(value, np.float64) - exact)
                limit = TOLERANCE[program.dtype] * np.linalg.norm(exact)
                limit += ROUNDING[program.dtype] * max(values.sharpness, 1) * exact.size**0.5
                assert error <= limit, f"{error=:.3g} {limit=:.3g}: {where}"

    drawn = given(
        programs(longest, WIDTHS[implementation]), st.lists(VALUES, min_size=2, max_size=4)
    )(run)
    for program in CORNERS:
        shape = dataclasses.replace(program.shape, K=WIDTHS[implementation][-1])
        corner = dataclasses.replace(program, shape=shape)
        drawn = example(corner, [Values(), Values(valid_share=0, seed=1)])(drawn)
    settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        # Without shrinking: every smaller example would be compiled.
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )(drawn)()


def test_examples() -> None:
    check("xla", count=3, longest=24)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("implementation", "count", "longest"),
    [("xla", 20, 100), ("pallas_triton", 6, 60), ("pallas_tpu", 6, 300)],
)
def test_more_examples(implementation: str, count: int, longest: int) -> None:
    check(implementation, count=count, longest=longest)
