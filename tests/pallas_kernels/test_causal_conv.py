"""The short convolution with SiLU, in every implementation, against its definition."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels import Unsupported, causal_conv, causal_convs
from pallas_kernels.causal_conv import pallas_triton
from tests.models import packed_positions
from tests.tolerances import TOLERANCE, relative_rms

H100 = AbstractDevice("NVIDIA H100 80GB HBM3", None, platform="gpu")
KERNEL = "__gpu$xla.gpu.triton"
# B, L, E, T: borders of pieces and blocks of channels inside; one token; one tap; many.
SHAPES = [(2, 70, 20, 4), (1, 33, 513, 4), (1, 1, 5, 4), (1, 40, 8, 1), (1, 67, 8, 8)]


def positions_of(B: int, L: int) -> np.ndarray:
    """Documents that start anywhere, one of them with a single token."""
    lengths = (L // 3, 1, L - 1 - L // 3) if L > 3 else (L,)
    return np.broadcast_to(packed_positions(L, lengths), (B, L)).astype(np.int32)


def both(implementation: str, arrays: Any, positions: np.ndarray, dy: Any) -> list[jax.Array]:
    """y, and the gradients of x, kernel and bias."""

    def conv(*arrays: jax.Array) -> jax.Array:
        return causal_conv(*arrays, jnp.asarray(positions), implementation=implementation)

    y, pull = jax.vjp(conv, *arrays)
    return [y, *pull(dy)]


def test_it_is_the_sum_over_taps(rng: np.random.Generator) -> None:
    positions = packed_positions(11, (4, 6))
    x_BLE = rng.normal(size=(1, 11, 3))
    kernel_TE, bias_E = rng.normal(size=(4, 3)), rng.normal(size=3)
    with jax.enable_x64(True):
        y_BLE = causal_conv(*map(jnp.asarray, (x_BLE, kernel_TE, bias_E, positions)))
    for t in range(11):
        taps = [kernel_TE[3 - k] * x_BLE[0, t - k] for k in range(4) if k <= positions[0, t]]
        v = bias_E + sum(taps)
        np.testing.assert_allclose(y_BLE[0, t], v / (1 + np.exp(-v)), rtol=1e-12)


def test_it_continues_from_a_tail(rng: np.random.Generator) -> None:
    positions = jnp.asarray(packed_positions(12, (5,), (2, 9)))
    x_BLE = jnp.asarray(rng.normal(size=(2, 12, 3)), jnp.float32)
    kernel_TE, bias_E = jnp.ones((4, 3)) * jnp.arange(1.0, 5)[:, None], jnp.ones(3)
    whole = causal_conv(x_BLE, kernel_TE, bias_E, positions)
    first = causal_conv(x_BLE[:, :7], kernel_TE, bias_E, positions[:, :7])
    second = causal_conv(x_BLE[:, 7:], kernel_TE, bias_E, positions[:, 7:], x_BLE[:, 4:7])
    np.testing.assert_allclose(jnp.concatenate([first, second], axis=1), whole, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_equals_float64(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, shape: Any, dtype: str
) -> None:
    monkeypatch.setattr(pallas_triton, "_PIECES", (64, 32))
    monkeypatch.setattr(pallas_triton, "_PROGRAMS", 3)
    B, L, E, T = shape
    sizes = [(B, L, E), (T, E), (E,), (B, L, E)]
    rounded = [jnp.asarray(rng.normal(size=size), dtype) for size in sizes]
    positions = positions_of(B, L)
    with jax.enable_x64(True):
        *arrays, dy = (jnp.asarray(np.asarray(v, np.float64)) for v in rounded)
        want = both("xla", arrays, positions, dy)
    *arrays, dy = rounded
    got = both("pallas_triton", arrays, positions, dy)
    errors = [relative_rms(v, w) for v, w in zip(got, want, strict=True)]
    assert max(errors) <= TOLERANCE[dtype], errors


def test_gradients_of_several_uses_are_summed_before_they_are_rounded(
    rng: np.random.Generator,
) -> None:
    x, kernel, bias = (
        jnp.asarray(rng.normal(size=size), "bfloat16") for size in ((1, 37, 5), (4, 5), (5,))
    )
    positions = jnp.asarray(positions_of(1, 37))
    gradients = tuple(jnp.asarray(rng.normal(size=x.shape), "bfloat16") for _ in range(3))

    def triton(x: jax.Array) -> Any:
        return causal_convs(x, kernel, bias, positions, uses=3, implementation="pallas_triton")

    ys, pull = jax.vjp(triton, x)
    assert len(ys) == 3
    for y in ys:
        np.testing.assert_array_equal(y, ys[0])
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(v, np.float64)) for v in (x, kernel, bias, *gradients)]
        total = wide[3] + wide[4] + wide[5]
        _, d_want, *_ = both("xla", wide[:3], np.asarray(positions), total)
    assert relative_rms(pull(gradients)[0], d_want) < 2**-9
    for y, one in zip(causal_convs(x, kernel, bias, positions, uses=2), ys, strict=False):
        assert relative_rms(y, one) < 2**-9


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_triton_lowers_and_is_preferred(dtype: str) -> None:
    """A kernel each way."""
    x = jax.ShapeDtypeStruct((8, 2048, 4096), dtype)
    kernel, bias = (jax.ShapeDtypeStruct(size, "float32") for size in ((4, 4096), (4096,)))
    positions = jax.ShapeDtypeStruct((8, 2048), "int32")

    def loss(x: Any, kernel: Any, bias: Any, positions: Any) -> jax.Array:
        return causal_conv(x, kernel, bias, positions).astype(jnp.float32).sum()

    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=H100)):
        traced = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).trace(x, kernel, bias, positions)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count(f"@{KERNEL}") == 2


def test_what_cannot_run_is_refused() -> None:
    x, kernel, bias = jnp.zeros((1, 5, 3)), jnp.zeros((4, 3)), jnp.zeros(3)
    positions = jnp.arange(5)[None]
    with pytest.raises(Unsupported, match="takes whole rows"):
        causal_conv(x, kernel, bias, positions, x[:, :3], implementation="pallas_triton")
    with pytest.raises(Unsupported, match="float16 must be float32 or bfloat16"):
        causal_conv(x.astype("float16"), kernel, bias, positions, implementation="pallas_triton")
    with pytest.raises(Unsupported, match="T=9 taps must be at most 8"):
        causal_conv(x, jnp.zeros((9, 3)), bias, positions, implementation="pallas_triton")


@pytest.mark.usefixtures("annotations_off")
def test_what_does_not_fit_is_named() -> None:
    x, kernel, bias = jnp.zeros((1, 5, 3)), jnp.zeros((4, 3)), jnp.zeros(3)
    positions = jnp.arange(5)[None]
    with pytest.raises(ValueError, match=r"bias_E has shape \(4,\), expected \(3,\)"):
        causal_conv(x, kernel, jnp.zeros(4), positions)
    with pytest.raises(ValueError, match="uses=0 must be positive"):
        causal_convs(x, kernel, bias, positions, uses=0)
    with pytest.raises(ValueError, match="positions_BL has dtype float32, expected integer"):
        causal_conv(x, kernel, bias, positions.astype("float32"))
    with pytest.raises(ValueError, match=r"tail_BSE has shape \(1, 2, 3\), expected \(1, 3, 3\)"):
        causal_conv(x, kernel, bias, positions, x[:, :2])
