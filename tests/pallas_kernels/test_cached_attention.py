"""Attention of new tokens to cached keys, in every implementation, against its definition."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels import KeyStream, Unsupported, cached_attention
from pallas_kernels.cached_attention import pallas_triton
from tests.tolerances import relative_rms

H100 = AbstractDevice("NVIDIA H100 80GB HBM3", None, platform="gpu")
MI300 = AbstractDevice("AMD Instinct MI300X", None, platform="rocm")
THETA = 1e4
# B, H, G, K, keys of each stream, share that is seen: one key; one stream of a block and a bit;
# borders of blocks; many query heads; blocks, or rows, of which nothing is seen.
SHAPES = [
    (1, 1, 1, 32, (1,), 1.0),
    (2, 4, 1, 64, (65,), 0.5),
    (2, 4, 2, 32, (64, 130, 5), 0.3),
    (1, 40, 2, 32, (30, 200), 0.3),
    (3, 2, 2, 128, (300, 7), 0.004),
]


def draw(
    rng: np.random.Generator,
    shape: Any,
    dtype: str = "float32",
    *,
    length: int = 1,
    biased: bool = False,
) -> tuple[jax.Array, list[KeyStream]]:
    B, H, G, K, sizes, share = shape

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), dtype)

    streams = [
        KeyStream(
            normal(B, S, G, K),
            normal(B, S, G, K),
            jnp.asarray(rng.integers(-2 * S, 3, (B, S)), jnp.int32),
            jnp.asarray(rng.random((B, length, S)) <= share),
            normal(B, H, S) if biased else None,
        )
        for S in sizes
    ]
    return normal(B, length, H, K), streams


def by_definition(q_BLHK: Any, streams: list[KeyStream]) -> np.ndarray:
    """In float64, query by query."""
    q_BLHK = np.asarray(q_BLHK, np.float64)
    B, L, H, K = q_BLHK.shape
    o_BLHK = np.zeros(q_BLHK.shape)
    frequency = THETA ** (-2 * np.arange(K // 2) / K)
    for b, i, h in np.ndindex(B, L, H):
        logits, values = [], []
        for k_BSGK, v_BSGK, positions_BS, visible_BLS, bias_BHS in streams:
            g = h // (H // k_BSGK.shape[2])
            for s in np.flatnonzero(visible_BLS[b, i]):
                k = np.asarray(k_BSGK[b, s, g], np.float64)
                turned = (k[: K // 2] + 1j * k[K // 2 :]) * np.exp(
                    1j * float(positions_BS[b, s]) * frequency
                )
                logit = q_BLHK[b, i, h] @ np.concatenate([turned.real, turned.imag]) / K**0.5
                logits.append(logit + (0 if bias_BHS is None else float(bias_BHS[b, h, s])))
                values.append(np.asarray(v_BSGK[b, s, g], np.float64))
        if logits:
            weights = np.exp(np.array(logits) - max(logits))
            o_BLHK[b, i, h] = weights @ np.array(values) / weights.sum()
    return o_BLHK


def test_the_definition(rng: np.random.Generator) -> None:
    with jax.enable_x64(True):
        q, streams = draw(rng, (2, 4, 2, 8, (9, 5), 0.4), "float64", length=3, biased=True)
        o = cached_attention(q, streams, theta=THETA, implementation="xla")
        assert o.dtype == jnp.float64
        np.testing.assert_allclose(o, by_definition(q, streams), atol=1e-13)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_equals_float64(rng: np.random.Generator, shape: Any, biased: bool) -> None:
    q, streams = draw(rng, shape, biased=biased)
    o = cached_attention(q, streams, theta=THETA, implementation="pallas_triton")
    assert relative_rms(o, by_definition(q, streams)) < 1e-6


@pytest.mark.parametrize("shape", SHAPES[1:3])
def test_triton_in_bfloat16(rng: np.random.Generator, shape: Any) -> None:
    q, streams = draw(rng, shape, "bfloat16")
    o = cached_attention(q, streams, theta=THETA, implementation="pallas_triton")
    assert o.dtype == jnp.bfloat16
    assert relative_rms(o, by_definition(q, streams)) < 5e-3


def test_triton_goes_over_several_blocks(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More blocks than programs: a program takes some, the last one fewer."""
    monkeypatch.setattr(pallas_triton, "_PROGRAMS", 8)
    q, streams = draw(rng, (2, 4, 2, 32, (64 * 7, 30, 64 * 4), 0.2))
    o = cached_attention(q, streams, theta=THETA, implementation="pallas_triton")
    assert relative_rms(o, by_definition(q, streams)) < 1e-6


def test_triton_at_large_logits_and_far_positions(rng: np.random.Generator) -> None:
    """Of logits some hundred apart one weight is left; at 100,000 tokens xla's angles, which are
    float32, give errors of 2e-4 and more."""
    q, streams = draw(rng, (1, 2, 1, 32, (100, 50), 0.5))
    far = [s._replace(positions_BS=s.positions_BS - 100_000) for s in streams]
    for each, limit in (((40 * q, streams), 1e-4), ((q, far), 5e-5)):
        o = cached_attention(*each, theta=THETA, implementation="pallas_triton")
        assert relative_rms(o, by_definition(*each)) < limit


def test_nothing_seen_gives_zero(rng: np.random.Generator) -> None:
    q, streams = draw(rng, (2, 2, 1, 32, (10, 70), 0.5))
    blind = [s._replace(visible_BLS=s.visible_BLS.at[1].set(False)) for s in streams]
    for implementation in ("xla", "pallas_triton"):
        o = cached_attention(q, blind, theta=THETA, implementation=implementation)
        assert (o[1] == 0).all()
        assert (o[0] != 0).any()


def test_the_kernels_are_preferred_on_nvidia_gpus(rng: np.random.Generator) -> None:
    def kernels(
        device: AbstractDevice,
        length: int = 1,
        width: int = 128,
        dtype: str = "bfloat16",
        biased: bool = False,
    ) -> int:
        shape = (1, 16, 4, width, (1024, 1280, 64), 0.5)
        q, streams = draw(rng, shape, dtype, length=length, biased=biased)
        mesh = AbstractMesh((), (), abstract_device=device)
        with jax.sharding.use_abstract_mesh(mesh):
            traced = jax.jit(lambda *x: cached_attention(*x, theta=THETA)).trace(q, streams)
            platform = "cuda" if device is H100 else "rocm"
            return traced.lower(lowering_platforms=(platform,)).as_text().count("xla.gpu.triton")

    assert kernels(H100) == kernels(H100, width=256, dtype="float32", biased=True) == 2
    assert kernels(H100, length=2) == kernels(H100, width=48) == kernels(MI300) == 0


def test_what_does_not_fit_is_named(rng: np.random.Generator) -> None:
    q, streams = draw(rng, (1, 4, 2, 32, (8,), 0.5))
    with pytest.raises(ValueError, match="streams must not be empty"):
        cached_attention(q, [], theta=THETA)
    with pytest.raises(ValueError, match="H=3 query heads must be a multiple of G=2"):
        cached_attention(q[:, :, :3], streams, theta=THETA)
    short = [streams[0]._replace(v_BSGK=streams[0].v_BSGK[:, :7])]
    with pytest.raises(ValueError, match=r"streams\[0\].v_BSGK has shape"):
        cached_attention(q, short, theta=THETA)
    refused = [
        (draw(rng, (1, 4, 2, 32, (8,), 0.5), length=2), "L=2 new tokens must be 1"),
        (draw(rng, (1, 4, 2, 48, (8,), 0.5)), "K=48 must be"),
        (draw(rng, (1, 4, 2, 32, (8,), 0.5), "float16"), "dtype=float16 must be that of"),
    ]
    for arrays, message in refused:
        with pytest.raises(Unsupported, match=message):
            cached_attention(*arrays, theta=THETA, implementation="pallas_triton")
