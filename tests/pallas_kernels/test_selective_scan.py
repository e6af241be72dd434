"""The selective scan: every implementation against the reference, and what must hold of all."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from pallas_kernels import ScanOutput, Unsupported, selective_scan
from pallas_kernels.shapes import SCAN_CASES, ScanShape
from tests.tolerances import TOLERANCE, relative_rms

# Kernels, which run interpreted here. They refuse float64.
KERNELS: Mapping[str, list[dict[str, int]]] = {
    "pallas_tpu": [{"chunk": 16}, {"chunk": 5}, {"chunk": 32}],
    "pallas_triton": [
        {"chunk": 8, "forward_groups": 2},
        {"chunk": 16, "forward_groups": 1},
        {"chunk": 32, "forward_groups": 8},
    ],
}
# Block sizes of every backend; the first entry cuts SHAPE into several chunks, unevenly.
BLOCKS: Mapping[str, list[dict[str, int]]] = {
    "xla": [{"chunk": 5}, {"chunk": 1}, {"chunk": 4}, {"chunk": 100}],
    **KERNELS,
}
BACKENDS = ("xla",)
# Interpreting a kernel takes seconds to compile.
ALL = [*BACKENDS, *(pytest.param(name, marks=pytest.mark.slow) for name in KERNELS)]
SMALL = [name for name in SCAN_CASES if not name.startswith("b")]
OPTIONAL = ("z_BLE", "dt_bias_E", "reset_BL", "h0_BEN")
SHAPE = ScanShape(B=2, L=21, E=4, N=3)

# What only kernels see: every number of states that they hold, channels beyond a tile. Not too few
# channels: the error of a sum that happens to be near 0 would be all there is of some gradients.
KERNEL_CASES: Mapping[str, ScanShape] = {
    "8_states": ScanShape(B=1, L=17, E=9, N=8),
    "16_states": ScanShape(B=2, L=40, E=1030, N=16),
    "32_states": ScanShape(B=1, L=18, E=9, N=20),
    "64_states": ScanShape(B=1, L=18, E=9, N=64),
}

Operands = dict[str, Any]


def draw(
    rng: np.random.Generator, shape: ScanShape, dtype: str = "float32", leave_out: tuple = ()
) -> Operands:
    """Random operands of ordinary size, all options on. Decay rates and `dt_bias_E`, as in
    models, are never below float32."""
    sizes = dataclasses.asdict(shape)

    def normal(letters: str, scale: float = 1.0) -> jax.Array:
        return jnp.asarray(scale * rng.standard_normal([sizes[n] for n in letters]), dtype)

    wide = jnp.promote_types(dtype, jnp.float32)
    operands = {
        "x_BLE": normal("BLE"),
        "dt_BLE": normal("BLE"),
        "a_EN": -jnp.exp(normal("EN").astype(wide)),
        "b_BLN": normal("BLN"),
        "c_BLN": normal("BLN"),
        "d_E": normal("E"),
        "z_BLE": normal("BLE"),
        "dt_bias_E": normal("E").astype(wide) - 1,
        "reset_BL": jnp.asarray(rng.random((shape.B, shape.L)) < 0.15),
        "h0_BEN": normal("BEN").astype(wide),
    }
    return {name: v for name, v in operands.items() if name not in leave_out}


def small_blocks(implementation: str) -> dict[str, int] | None:
    return BLOCKS[implementation][0] if implementation in BLOCKS else None


def precision(implementation: str) -> str:
    """The widest dtype that it takes."""
    return "float32" if implementation in KERNELS else "float64"


def run(operands: Mapping[str, Any], implementation: str) -> ScanOutput:
    blocks = small_blocks(implementation)
    return selective_scan(**operands, implementation=implementation, blocks=blocks)


# One program for all tests of a shape: compiling takes longer than running.
@functools.partial(jax.jit, static_argnames=("implementation", "blocks"))
def run_and_pull_back(
    floats: Operands, reset: Operands, implementation: str, blocks: tuple[tuple[str, int], ...]
) -> tuple[ScanOutput, Operands]:
    options = {"implementation": implementation, "blocks": dict(blocks) or None}
    out, pull_back = jax.vjp(lambda f: selective_scan(**f, **reset, **options), floats)
    rng = np.random.default_rng(1)
    cotangents = [jnp.asarray(rng.standard_normal(v.shape), v.dtype) for v in out]
    return out, pull_back(ScanOutput(*cotangents))[0]


def outputs_and_gradients(
    operands: Operands, implementation: str, blocks: Mapping[str, int] | None = None
) -> dict[str, ArrayLike]:
    """Both outputs, and the gradient of every float operand under random cotangents."""
    reset = {name: v for name, v in operands.items() if name == "reset_BL"}
    floats = {name: v for name, v in operands.items() if name != "reset_BL"}
    sizes = tuple((blocks or {}).items())
    out, gradients = run_and_pull_back(floats, reset, implementation, sizes)
    return out._asdict() | {f"d {name}": v for name, v in gradients.items()}


def expected(operands: Operands, backend: str) -> dict[str, ArrayLike]:
    """What the reference gives; of float32 operands of a kernel, in float64."""
    if backend not in KERNELS:
        return outputs_and_gradients(operands, "reference")
    with jax.enable_x64(True):
        wide = {
            name: v if v.dtype == jnp.bool_ else jnp.asarray(np.asarray(v), "float64")
            for name, v in operands.items()
        }
        return outputs_and_gradients(wide, "reference")


def assert_close(got: Mapping[str, ArrayLike], want: Mapping[str, ArrayLike], dtype: str) -> None:
    assert got.keys() == want.keys()
    errors = {name: relative_rms(got[name], want[name]) for name in want}
    assert all(error < TOLERANCE[dtype] for error in errors.values()), errors


@pytest.mark.slow
@pytest.mark.parametrize("case", [*SMALL, *KERNEL_CASES])
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_equals_float64(rng: np.random.Generator, kernel: str, case: str) -> None:
    operands = draw(rng, (SCAN_CASES | KERNEL_CASES)[case])
    got = outputs_and_gradients(operands, kernel, small_blocks(kernel))
    want = expected(operands, kernel)
    assert got.keys() == want.keys()
    errors = {name: relative_rms(got[name], want[name]) for name in want}
    assert all(error < 1e-6 for error in errors.values()), errors


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_refuse_what_they_cannot_take(rng: np.random.Generator, kernel: str) -> None:
    with jax.enable_x64(True):
        with pytest.raises(Unsupported, match=r"x_BLE\.dtype=float64 must be float32 or bfloat16"):
            run(draw(rng, SHAPE, "float64"), kernel)
    with pytest.raises(Unsupported, match="N=65"):
        run(draw(rng, dataclasses.replace(SHAPE, N=65)), kernel)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", SMALL)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_reference(rng: np.random.Generator, backend: str, case: str, dtype: str) -> None:
    with jax.enable_x64(dtype == "float64"):
        operands = draw(rng, SCAN_CASES[case], dtype)
        got = outputs_and_gradients(operands, backend)
        assert got["h_BEN"].dtype == dtype
        assert_close(got, outputs_and_gradients(operands, "reference"), dtype)


@pytest.mark.parametrize("backend", ALL)
def test_bfloat16_rounds_only_results(rng: np.random.Generator, backend: str) -> None:
    operands = draw(rng, SCAN_CASES["primes"], "bfloat16")
    got = outputs_and_gradients(operands, backend, small_blocks(backend))
    assert got["h_BEN"].dtype == jnp.float32
    assert got["y_BLE"].dtype == jnp.bfloat16
    for name, operand in operands.items():
        assert name == "reset_BL" or got[f"d {name}"].dtype == operand.dtype, name
    # The reference rounds y once too; its gradients pass through no other bfloat16 value.
    assert_close(got, outputs_and_gradients(operands, "reference"), "bfloat16")


@pytest.mark.parametrize("left_out", [*OPTIONAL, "all"])
@pytest.mark.parametrize("backend", ALL)
def test_options_may_be_left_out(rng: np.random.Generator, backend: str, left_out: str) -> None:
    operands = draw(rng, SHAPE, leave_out=OPTIONAL if left_out == "all" else (left_out,))
    got = outputs_and_gradients(operands, backend, small_blocks(backend))
    assert_close(got, expected(operands, backend), "float32")


def test_reference_is_the_definition(rng: np.random.Generator) -> None:
    with jax.enable_x64(True):
        operands = draw(rng, ScanShape(B=2, L=6, E=3, N=2), "float64")
        v = {name: np.asarray(array) for name, array in operands.items()}
        h_BEN, y = v["h0_BEN"], []
        for t in range(6):
            h_BEN = np.where(v["reset_BL"][:, t, None, None], 0, h_BEN)
            dt_BE = np.log1p(np.exp(v["dt_BLE"][:, t] + v["dt_bias_E"]))
            entering = np.einsum("BE,BN->BEN", dt_BE * v["x_BLE"][:, t], v["b_BLN"][:, t])
            h_BEN = np.exp(np.einsum("BE,EN->BEN", dt_BE, v["a_EN"])) * h_BEN + entering
            y_BE = np.einsum("BEN,BN->BE", h_BEN, v["c_BLN"][:, t]) + v["d_E"] * v["x_BLE"][:, t]
            y.append(y_BE * v["z_BLE"][:, t] / (1 + np.exp(-v["z_BLE"][:, t])))
        got = run(operands, "reference")
        assert_close(got._asdict(), {"y_BLE": np.stack(y, 1), "h_BEN": h_BEN}, "float64")


@pytest.mark.parametrize("raw_dt", [-15.0, 0.0, 10.0])
@pytest.mark.parametrize("rate", [-1e-3, -1.0, -64.0])
@pytest.mark.parametrize("backend", ALL)
def test_hard_decays(rng: np.random.Generator, backend: str, rate: float, raw_dt: float) -> None:
    """From a state that keeps all to one that keeps nothing, in exp and softplus alike."""
    operands = draw(rng, SHAPE, leave_out=("reset_BL", "dt_bias_E"))
    operands["a_EN"] = jnp.full_like(operands["a_EN"], rate)
    operands["dt_BLE"] = raw_dt + 0.1 * operands["dt_BLE"]
    got = outputs_and_gradients(operands, backend, small_blocks(backend))
    want = expected(operands, backend)
    if rate * raw_dt < -100:
        # The state forgets by exp(-640): zero gradients in both, or denormal dust in one.
        for name in ("d a_EN", "d h0_BEN"):
            assert np.abs(got.pop(name)).max() < 1e-30 and np.abs(want.pop(name)).max() < 1e-30
    assert_close(got, want, "float32")


@pytest.mark.parametrize("backend", ALL)
def test_block_sizes_change_nothing(rng: np.random.Generator, backend: str) -> None:
    dtype = precision(backend)
    with jax.enable_x64(dtype == "float64"):
        operands = draw(rng, SHAPE, dtype)
        want = expected(operands, backend)
        for blocks in BLOCKS[backend]:
            got = outputs_and_gradients(operands, backend, blocks)
            assert_close(got, want, dtype)


def split(operands: Operands, start: int, stop: int) -> Operands:
    timed = {name: v[:, start:stop] for name, v in operands.items() if "L" in name.split("_")[-1]}
    return operands | timed


@pytest.mark.parametrize("implementation", ["reference", *ALL])
def test_two_halves_make_a_whole(rng: np.random.Generator, implementation: str) -> None:
    dtype = precision(implementation)
    with jax.enable_x64(dtype == "float64"):
        operands = draw(rng, SHAPE, dtype)
        whole = run(operands, implementation)
        first = run(split(operands, 0, 6), implementation)
        second = run(split(operands, 6, SHAPE.L) | {"h0_BEN": first.h_BEN}, implementation)
        y_BLE = jnp.concatenate([first.y_BLE, second.y_BLE], 1)
        assert_close({"y": y_BLE, "h": second.h_BEN}, {"y": whole[0], "h": whole[1]}, dtype)


@pytest.mark.parametrize("implementation", ["reference", *ALL])
def test_documents_are_isolated(rng: np.random.Generator, implementation: str) -> None:
    """Documents packed in one row equal each scanned apart, from a zero state."""
    dtype = precision(implementation)
    with jax.enable_x64(dtype == "float64"):
        operands = draw(rng, SHAPE, dtype)
        starts = [0, 1, 7, 8]
        first_L = np.isin(np.arange(SHAPE.L), starts)
        operands["reset_BL"] = jnp.tile(first_L, (SHAPE.B, 1))
        packed = run(operands, implementation)
        apart = []
        for start, stop in zip(starts, [*starts[1:], SHAPE.L], strict=True):
            document = split(operands, start, stop)
            del document["reset_BL"], document["h0_BEN"]
            apart.append(run(document, implementation))
        y_BLE = jnp.concatenate([out.y_BLE for out in apart], 1)
        want = {"y_BLE": y_BLE, "h_BEN": apart[-1].h_BEN}
        assert_close(packed._asdict(), want, dtype)


@pytest.mark.parametrize("backend", ALL)
def test_reset_at_every_position(rng: np.random.Generator, backend: str) -> None:
    operands = draw(rng, SHAPE)
    operands["reset_BL"] = jnp.ones((SHAPE.B, SHAPE.L), bool)
    got = outputs_and_gradients(operands, backend, small_blocks(backend))
    # No decay is ever used, so nothing depends on its rates or on the first state.
    for name in ("d a_EN", "d h0_BEN"):
        assert not np.any(got[name]), name
    assert_close(got, expected(operands, backend), "float32")


@pytest.mark.parametrize("implementation", ["reference", *ALL])
def test_causal(rng: np.random.Generator, implementation: str) -> None:
    operands = draw(rng, SHAPE, leave_out=("reset_BL",))

    def output_at(t: jax.Array, timed: Operands) -> jax.Array:
        return run(operands | timed, implementation).y_BLE[:, t].sum()

    timed = {name: operands[name] for name in ("x_BLE", "dt_BLE", "b_BLN")}
    positions = jnp.arange(SHAPE.L)
    gradients = jax.jit(jax.vmap(jax.grad(output_at, 1), (0, None)))(positions, timed)
    for name, gradient in gradients.items():
        reaches_TL = np.abs(gradient).sum((1, 3)) > 0
        np.testing.assert_array_equal(reaches_TL, np.tri(SHAPE.L, dtype=bool), err_msg=name)


@pytest.mark.parametrize("implementation", ["reference", *ALL])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_neutral_steps_keep_the_state(
    rng: np.random.Generator, implementation: str, dtype: str
) -> None:
    operands = draw(rng, SHAPE, dtype, leave_out=("reset_BL",))
    operands["dt_BLE"] = jnp.full_like(operands["dt_BLE"], -1e4)
    h_BEN = run(operands, implementation).h_BEN
    np.testing.assert_array_equal(h_BEN, operands["h0_BEN"])


@pytest.mark.parametrize("implementation", ["reference", *ALL])
def test_vmap_equals_a_loop(rng: np.random.Generator, implementation: str) -> None:
    """Gradients too, under checkpoint as in a model, with operands that are not mapped."""
    models = [draw(np.random.default_rng(seed), SHAPE) for seed in (2, 3, 4)]
    mapped = ("x_BLE", "a_EN", "h0_BEN")
    shared = {name: v for name, v in models[0].items() if name not in mapped}

    def loss(own: Operands) -> jax.Array:
        out = jax.checkpoint(lambda own: run(own | shared, implementation))(own)
        return (out.y_BLE**2).sum() + (out.h_BEN**2).sum()

    each = [{name: model[name] for name in mapped} for model in models]
    loop_body = jax.jit(jax.value_and_grad(loss))
    looped = [loop_body(own) for own in each]
    stacked = jax.tree.map(lambda *v: jnp.stack(v), *each)
    value, gradients = jax.jit(jax.vmap(jax.value_and_grad(loss)))(stacked)
    want_value, want = jax.tree.map(lambda *v: jnp.stack(v), *looped)
    assert_close(gradients | {"loss": value}, want | {"loss": want_value}, "float32")


@pytest.mark.parametrize("backend", BACKENDS)
def test_sharded_batch_and_channels(rng: np.random.Generator, backend: str) -> None:
    operands = draw(rng, ScanShape(B=4, L=9, E=4, N=3))
    want = outputs_and_gradients(operands, backend, small_blocks(backend))
    mesh = jax.make_mesh((4, 2), ("B", "E"), axis_types=(AxisType.Auto,) * 2)
    sharded = {
        name: jax.device_put(
            v, NamedSharding(mesh, PartitionSpec(*(n if n in "BE" else None for n in letters)))
        )
        for name, v in operands.items()
        for letters in [name.split("_")[-1]]
    }
    got = outputs_and_gradients(sharded, backend, small_blocks(backend))
    assert got["y_BLE"].sharding.shard_shape(got["y_BLE"].shape) == (1, 9, 2)
    assert_close(got, want, "float32")


def backward_temporaries(backend: str, shape: ScanShape) -> int:
    """Bytes of temporary memory of value and gradients."""
    operands = jax.eval_shape(lambda: draw(np.random.default_rng(0), shape))
    reset_BL = operands.pop("reset_BL")

    def loss(floats: Operands, reset_BL: jax.Array) -> jax.Array:
        out = selective_scan(**floats, reset_BL=reset_BL, implementation=backend)
        return (out.y_BLE**2).sum() + out.h_BEN.sum()

    compiled = jax.jit(jax.value_and_grad(loss)).lower(operands, reset_BL).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_is_linear_and_small(backend: str) -> None:
    shape = ScanShape(B=2, L=512, E=32, N=16)
    once = backward_temporaries(backend, shape)
    twice = backward_temporaries(backend, dataclasses.replace(shape, L=2 * shape.L))
    assert twice <= 2.2 * once
    all_states = 4 * shape.B * shape.L * shape.E * shape.N
    assert once < 0.5 * all_states


@pytest.mark.usefixtures("annotations_off")
@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("x_BLE", (2, 21), r"x_BLE.shape=\(2, 21\)"),
        ("x_BLE", (2, 0, 4), r"L >= 1"),
        ("a_EN", (4,), r"a_EN.shape=\(4,\)"),
        ("a_EN", (5, 3), r"a_EN.shape=\(5, 3\) must be \(4, 3\)"),
        ("dt_BLE", (2, 20, 4), r"dt_BLE.shape=\(2, 20, 4\) must be \(2, 21, 4\)"),
        ("c_BLN", (2, 21, 4), r"c_BLN.shape=\(2, 21, 4\) must be \(2, 21, 3\)"),
        ("d_E", (3,), r"d_E.shape=\(3,\) must be \(4,\)"),
        ("h0_BEN", (2, 3, 4), r"h0_BEN.shape=\(2, 3, 4\) must be \(2, 4, 3\)"),
    ],
)
def test_wrong_shapes_are_named(
    rng: np.random.Generator, name: str, wrong: tuple[int, ...], message: str
) -> None:
    operands = draw(rng, SHAPE) | {name: jnp.ones(wrong)}
    with pytest.raises(ValueError, match=message):
        selective_scan(**operands)


@pytest.mark.usefixtures("annotations_off")
@pytest.mark.parametrize(("name", "wrong"), [("reset_BL", "int32"), ("b_BLN", "int32")])
def test_wrong_dtypes_are_named(rng: np.random.Generator, name: str, wrong: str) -> None:
    operands = draw(rng, SHAPE)
    operands[name] = operands[name].astype(wrong)
    with pytest.raises(ValueError, match=f"{name}.dtype={wrong}"):
        selective_scan(**operands)


def test_unknown_names_raise(rng: np.random.Generator) -> None:
    operands = draw(rng, SHAPE)
    with pytest.raises(ValueError, match="implementation='fast' is not one of"):
        selective_scan(**operands, implementation="fast")
    with pytest.raises(ValueError, match="blocks has 'rows'; it takes"):
        selective_scan(**operands, implementation="xla", blocks={"rows": 4})
    with pytest.raises(ValueError, match="the reference has no block sizes"):
        selective_scan(**operands, implementation="reference", blocks={"chunk": 5})
