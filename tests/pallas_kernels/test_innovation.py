"""The innovation test, in every implementation, against its definition."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels import Unsupported, innovation
from pallas_kernels.innovation import pallas_triton
from pallas_kernels.innovation.api import TAPS
from tests.models import packed_positions
from tests.tolerances import relative_rms

H100 = AbstractDevice("NVIDIA H100 80GB HBM3", None, platform="gpu")
MI300 = AbstractDevice("AMD Instinct MI300X", None, platform="rocm")
KERNEL = "__gpu$xla.gpu.triton"
# B, L, D, tokens of a piece: one token; borders of turns and pieces inside and at the end.
SHAPES = [(2, 1, 8, 8), (3, 5, 48, 8), (2, 37, 128, 16), (1, 37, 5, 8), (2, 64, 33, 32)]


def positions_of(B: int, L: int) -> np.ndarray:
    """Rows of one document, of short and long ones, and of one that began before the row."""
    starts = [(), (1, 2, 5, 8, 12, 17, 31), (L // 2,)]
    positions = packed_positions(L, *([s for s in starts[b % 3] if s < L] for b in range(1, B + 1)))
    positions[-1] += 2 * (positions[-1] == np.arange(L))
    return positions.astype(np.int32)


def by_definition(s_BLD: np.ndarray, positions_BL: np.ndarray) -> np.ndarray:
    """In float64, token by token."""
    e_BL = np.zeros(positions_BL.shape)
    for b, t in np.ndindex(*e_BL.shape):
        position = positions_BL[b, t]
        taps = [s_BLD[b, t - k] for k in range(1, TAPS + 1) if k <= min(position, t)]
        predicted = np.sum(taps, axis=0) / min(position, TAPS) if taps else 0
        e_BL[b, t] = np.sum((s_BLD[b, t] - predicted) ** 2)
    return e_BL


def triton(s_BLD: jax.Array, positions_BL: Any) -> jax.Array:
    return innovation(s_BLD, jnp.asarray(positions_BL), implementation="pallas_triton")


def test_it_is_the_error_of_a_moving_average(rng: np.random.Generator) -> None:
    positions_BL = packed_positions(12, (5, 6))
    s_BLD = rng.normal(size=(1, 12, 3))
    with jax.enable_x64(True):
        e_BL = innovation(jnp.asarray(s_BLD), jnp.asarray(positions_BL))
    np.testing.assert_allclose(e_BL, by_definition(s_BLD, positions_BL), rtol=1e-13)


def test_it_streams(rng: np.random.Generator) -> None:
    positions_BL = jnp.asarray(packed_positions(20, (7,), (11, 12)))
    s_BLD = jnp.asarray(rng.normal(size=(2, 20, 8)), jnp.float32)
    whole = jax.jit(innovation)(s_BLD, positions_BL)
    tail = jnp.zeros((2, TAPS, 8))
    step = jax.jit(innovation)
    for t in range(20):
        e_B1 = step(s_BLD[:, t : t + 1], positions_BL[:, t : t + 1], tail)
        np.testing.assert_array_equal(e_B1[:, 0], whole[:, t])
        tail = jnp.concatenate([tail[:, 1:], s_BLD[:, t : t + 1]], axis=1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_equals_float64(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, shape: Any, dtype: str
) -> None:
    B, L, D, piece = shape
    monkeypatch.setattr(pallas_triton, "_PIECES", (piece,))
    s_BLD = jnp.asarray(rng.normal(size=(B, L, D)), dtype)
    positions_BL = positions_of(B, L)
    want = by_definition(np.asarray(s_BLD, np.float64), positions_BL)
    e_BL = triton(s_BLD, positions_BL)
    assert e_BL.dtype == jnp.float32
    np.testing.assert_allclose(e_BL, want, rtol=1e-6)


def test_triton_keeps_small_errors_of_large_states(rng: np.random.Generator) -> None:
    """A sum of taps that is carried along would keep the roundings of what has left it."""
    s_BLD = np.asarray(1 + 1e-3 * rng.normal(size=(1, 96, 32)), np.float32)
    s_BLD[:, 20:40] *= 1e6
    positions_BL = np.arange(96)[None]
    want = by_definition(s_BLD.astype(np.float64), positions_BL)
    e_BL = triton(jnp.asarray(s_BLD), positions_BL)
    np.testing.assert_allclose(e_BL[:, 44:], want[:, 44:], rtol=1e-4)


def test_what_is_in_another_document_does_not_matter(rng: np.random.Generator) -> None:
    positions_BL = packed_positions(24, (9,))
    s_BLD = rng.normal(size=(1, 24, 8)).astype(np.float32)
    e_BL = triton(jnp.asarray(s_BLD), positions_BL)
    s_BLD[:, :9] = np.nan
    np.testing.assert_array_equal(triton(jnp.asarray(s_BLD), positions_BL)[:, 9:], e_BL[:, 9:])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradient_is_that_of_the_definition(rng: np.random.Generator, dtype: str) -> None:
    s_BLD = jnp.asarray(rng.normal(size=(3, 21, 12)), dtype)
    positions_BL = positions_of(3, 21)
    weight_BL = jnp.asarray(rng.normal(size=(3, 21)), jnp.float32)

    def gradient(implementation: str) -> jax.Array:
        @jax.checkpoint
        def loss(s_BLD: jax.Array) -> jax.Array:
            e_BL = innovation(s_BLD, jnp.asarray(positions_BL), implementation=implementation)
            return (e_BL * weight_BL).sum()

        return jax.jit(jax.grad(loss))(s_BLD)

    got, want = gradient("pallas_triton"), gradient("xla")
    assert got.dtype == s_BLD.dtype
    assert relative_rms(got, want) < 1e-6


def lowered(shape: tuple[int, ...], dtype: str, device: AbstractDevice, *, tail: bool) -> str:
    B, L, D = shape
    s = jax.ShapeDtypeStruct(shape, dtype)
    positions = jax.ShapeDtypeStruct((B, L), "int32")
    tail_BSD = jax.ShapeDtypeStruct((B, TAPS, D), dtype) if tail else None
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        traced = jax.jit(innovation).trace(s, positions, tail_BSD)
        return traced.lower(lowering_platforms=(device.platform,)).as_text()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "shape", [(8, 2048, 2048), (1, 131_072, 2048), (2, 100, 8192), (1, 2048, 768), (1, 3, 5)]
)
def test_triton_lowers_and_is_preferred(shape: tuple[int, ...], dtype: str) -> None:
    cuda = AbstractDevice(H100.device_kind, None, platform="cuda")
    assert lowered(shape, dtype, cuda, tail=False).count(f"@{KERNEL}") == 1


def test_what_triton_does_not_take_runs_otherwise() -> None:
    cuda = AbstractDevice(H100.device_kind, None, platform="cuda")
    assert KERNEL not in lowered((2, 8, 16), "float32", cuda, tail=True)
    assert KERNEL not in lowered((2, 8, 8193), "float32", cuda, tail=False)
    assert KERNEL not in lowered((2, 8, 16), "float32", MI300, tail=False)


def test_what_cannot_run_is_refused() -> None:
    s, positions = jnp.zeros((1, 5, 3)), jnp.arange(5)[None]
    with pytest.raises(Unsupported, match="takes whole rows"):
        innovation(s, positions, s[:, :4], implementation="pallas_triton")
    with pytest.raises(Unsupported, match="float16 must be float32 or bfloat16"):
        triton(s.astype("float16"), positions)
    with jax.enable_x64(True), pytest.raises(Unsupported, match="float64 must be float32"):
        triton(s.astype("float64"), positions)
    with pytest.raises(Unsupported, match="must have elements"):
        triton(s[:, :0], positions[:, :0])
    with pytest.raises(Unsupported, match="D=8193 must be at most 8192"):
        triton(jnp.zeros((1, 5, 8193)), positions)
    with pytest.raises(Unsupported, match=r"must be below 2\^31"):
        huge = jax.ShapeDtypeStruct((1, 2**20, 2048), "bfloat16")
        jax.eval_shape(triton, huge, jax.ShapeDtypeStruct((1, 2**20), "int32"))


@pytest.mark.usefixtures("annotations_off")
def test_what_does_not_fit_is_named() -> None:
    s, positions = jnp.zeros((1, 5, 3)), jnp.arange(5)[None]
    with pytest.raises(ValueError, match=r"must be \[B, L, D\]"):
        innovation(s[0], positions)
    with pytest.raises(ValueError, match=r"positions_BL has shape \(1, 4\), expected \(1, 5\)"):
        innovation(s, positions[:, :4])
    with pytest.raises(ValueError, match="positions_BL has dtype float32, expected integer"):
        innovation(s, positions.astype("float32"))
    with pytest.raises(ValueError, match="s_BLD has dtype int32, expected floating"):
        innovation(s.astype("int32"), positions)
    with pytest.raises(ValueError, match=r"tail_BSD has shape \(1, 3, 3\), expected \(1, 4, 3\)"):
        innovation(s, positions, s[:, :3])
    with pytest.raises(ValueError, match="implementation='cudnn' is not one of"):
        innovation(s, positions, implementation="cudnn")
