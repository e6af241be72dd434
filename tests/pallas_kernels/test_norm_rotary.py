"""Norm and rotation of heads, in every implementation, against their definition."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels import Unsupported, norm_rotary
from tests.tolerances import relative_rms

H100 = AbstractDevice("NVIDIA H100 80GB HBM3", None, platform="gpu")
MI300 = AbstractDevice("AMD Instinct MI300X", None, platform="rocm")
KERNEL = "__gpu$xla.gpu.triton"
THETA, EPS = 1e4, 1e-5
# B, L, H, K: one token, several programs of tokens, the last one not full; groups of heads.
SHAPES = [(1, 1, 1, 256), (2, 21, 3, 64), (1, 40, 8, 128), (2, 65, 2, 32)]


def by_definition(x_BLHK: np.ndarray, scale_K: Any, positions_BL: np.ndarray) -> np.ndarray:
    """In float64, pair by pair, as rotations of complex numbers."""
    K = x_BLHK.shape[-1]
    if scale_K is not None:
        mean = np.mean(x_BLHK**2, axis=-1, keepdims=True)
        x_BLHK = x_BLHK / np.sqrt(mean + EPS) * np.asarray(scale_K, np.float64)
    pairs = x_BLHK[..., : K // 2] + 1j * x_BLHK[..., K // 2 :]
    angle = positions_BL[:, :, None, None] * THETA ** (-2 * np.arange(K // 2) / K)
    turned = pairs * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def draw(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> tuple[Any, ...]:
    x_BLHK = jnp.asarray(rng.normal(size=shape), dtype)
    scale_K = jnp.asarray(1 + 0.3 * rng.normal(size=shape[3]), jnp.float32)
    positions_BL = jnp.asarray(rng.integers(-700, 700, shape[:2]), jnp.int32)
    return x_BLHK, scale_K, positions_BL


def run(*arguments: Any, implementation: str) -> jax.Array:
    return norm_rotary(*arguments, theta=THETA, eps=EPS, implementation=implementation)


def test_xla_in_float64_is_the_definition(rng: np.random.Generator) -> None:
    x_BLHK, scale_K, positions_BL = draw(rng, (2, 9, 3, 16), "float32")
    want = by_definition(np.asarray(x_BLHK, np.float64), scale_K, np.asarray(positions_BL))
    with jax.enable_x64(True):
        wide_BLHK = jnp.asarray(np.asarray(x_BLHK, np.float64))
        got = run(wide_BLHK, scale_K, positions_BL, implementation="xla")
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_equals_float64(
    rng: np.random.Generator, shape: tuple[int, ...], normed: bool, dtype: str
) -> None:
    """Forward, and the gradients of x and of the scale, in their dtypes."""
    x_BLHK, scale_K, positions_BL = draw(rng, shape, dtype)
    d_y = jnp.asarray(rng.normal(size=shape), dtype)

    def outputs(implementation: str, x_BLHK: Any, scale_K: Any, d_y: Any) -> dict[str, Any]:
        def forward(x_BLHK: Any, scale_K: Any) -> jax.Array:
            scale = scale_K if normed else None
            return run(x_BLHK, scale, positions_BL, implementation=implementation)

        y, pull_back = jax.vjp(forward, x_BLHK, scale_K)
        return dict(zip(("y", "dx", "d_scale"), (y, *pull_back(d_y)), strict=True))

    got = jax.jit(lambda *arrays: outputs("pallas_triton", *arrays))(x_BLHK, scale_K, d_y)
    assert (got["y"].dtype, got["dx"].dtype, got["d_scale"].dtype) == (dtype, dtype, "float32")
    with jax.enable_x64(True):
        wide = [np.asarray(v, np.float64) for v in (x_BLHK, scale_K, d_y)]
        want = jax.jit(lambda *arrays: outputs("xla", *arrays))(*wide)
    limits = {"y": 1e-6, "dx": 1e-6, "d_scale": 2e-6}
    if dtype == "bfloat16":
        limits |= {"y": 2e-3, "dx": 2e-3}  # rounded once: 2^-9 / sqrt(3) at most
    if not normed:
        assert not np.any(got.pop("d_scale"))
    for name, v in got.items():
        assert relative_rms(np.asarray(v, np.float64), want[name]) < limits[name], name


def test_far_positions_keep_their_angles(rng: np.random.Generator) -> None:
    """A float32 angle is off by up to 4e-3 at 131,072; an integer one by 2^-33 of a turn for each
    position."""
    x_BLHK, scale_K, _ = draw(rng, (1, 8, 2, 64), "float32")
    positions_BL = jnp.asarray(131_072 - np.arange(8)[None], jnp.int32)
    want = by_definition(np.asarray(x_BLHK, np.float64), scale_K, np.asarray(positions_BL))
    y_BLHK = run(x_BLHK, scale_K, positions_BL, implementation="pallas_triton")
    assert relative_rms(np.asarray(y_BLHK, np.float64), want) < 1e-4


def test_small_heads_are_not_lost(rng: np.random.Generator) -> None:
    """What is far below eps is not normed to 1; a head of zeros stays, with finite gradients."""
    x_BLHK, scale_K, positions_BL = draw(rng, (1, 16, 2, 32), "float32")
    x_BLHK = x_BLHK.at[0, :, 0].multiply(1e-6).at[0, 3].set(0)
    want = by_definition(np.asarray(x_BLHK, np.float64), scale_K, np.asarray(positions_BL))

    def total(x_BLHK: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = run(x_BLHK, scale_K, positions_BL, implementation="pallas_triton")
        return y.sum(), y

    d_x, y_BLHK = jax.jit(jax.grad(total, has_aux=True))(x_BLHK)
    for head in range(2):
        assert relative_rms(np.asarray(y_BLHK[:, :, head], np.float64), want[:, :, head]) < 2e-6
    assert np.isfinite(d_x).all() and not np.any(y_BLHK[0, 3])


def lowered(device: AbstractDevice, dtype: str = "bfloat16", K: int = 128) -> str:
    x_BLHK = jax.ShapeDtypeStruct((2, 2048, 4, K), dtype)
    positions_BL = jax.ShapeDtypeStruct((2, 2048), "int32")

    def loss(x_BLHK: jax.Array, scale_K: jax.Array, positions_BL: jax.Array) -> jax.Array:
        y = norm_rotary(x_BLHK, scale_K, positions_BL, theta=THETA, eps=EPS)
        return y.astype(jnp.float32).sum()

    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        gradient = jax.jit(jax.value_and_grad(loss, (0, 1)))
        traced = gradient.trace(x_BLHK, jax.ShapeDtypeStruct((K,), "float32"), positions_BL)
        platform = "rocm" if device is MI300 else "cuda"
        return traced.lower(lowering_platforms=(platform,)).as_text()


def test_where_it_runs() -> None:
    """Forward and backward are a kernel each; what it cannot take is left to XLA."""
    assert lowered(H100).count(f"@{KERNEL}") == 2
    assert KERNEL not in lowered(MI300)
    assert KERNEL not in lowered(H100, K=96)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float16"}, r"x_BLHK\.dtype=float16 must be float32 or bfloat16"),
        ({"shape": (1, 4, 2, 16)}, "K=16 must be 32, 64, 128 or 256"),
        ({"shape": (1, 0, 2, 32)}, "must have elements"),
    ],
)
def test_what_triton_refuses(
    rng: np.random.Generator, changes: dict[str, Any], message: str
) -> None:
    shape, dtype = changes.get("shape", (1, 4, 2, 32)), changes.get("dtype", "float32")
    with pytest.raises(Unsupported, match=message):
        run(*draw(rng, shape, dtype), implementation="pallas_triton")


@pytest.mark.usefixtures("annotations_off")
def test_what_does_not_fit_is_named(rng: np.random.Generator) -> None:
    x_BLHK, scale_K, positions_BL = draw(rng, (1, 4, 2, 32), "float32")
    for arguments, message in (
        ((x_BLHK[0], scale_K, positions_BL), r"x_BLHK\.shape=\(4, 2, 32\) must be \[B, L, H, K\]"),
        ((x_BLHK[..., :31], scale_K, positions_BL), "with an even K"),
        ((x_BLHK, scale_K[1:], positions_BL), r"scale_K has shape \(31,\), expected \(32,\)"),
        ((x_BLHK, scale_K, positions_BL[:, 1:]), r"positions_BL has shape \(1, 3\), expected"),
        ((x_BLHK, scale_K, positions_BL * 1.0), "positions_BL has dtype float32, expected integer"),
    ):
        with pytest.raises(ValueError, match=message):
            run(*arguments, implementation="xla")
