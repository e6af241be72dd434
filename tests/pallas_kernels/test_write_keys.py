"""Keys and values of new tokens into rings, in every implementation, against the definition."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels import KeyRing, Unsupported, write_keys
from pallas_kernels.write_keys import pallas_triton

H100 = AbstractDevice("NVIDIA H100 80GB HBM3", None, platform="gpu")
MI300 = AbstractDevice("AMD Instinct MI300X", None, platform="rocm")
EPS = 1e-3
IMPLEMENTATIONS = ["xla", "pallas_triton"]


def draw(
    rng: np.random.Generator, *, L: int = 1, K: int = 32, sizes: Any = (7, 9), dtype: str
) -> dict[str, Any]:
    """Four rows, of which one has nothing to write; in the first, time has gone round."""
    B, G = 4, 2

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), dtype)

    time_B = np.array([40, 0, 5, 6])
    length_B = np.array([L, L, 0, max(L - 1, 1)])
    return {
        "rings": [KeyRing(normal(B, R, G, K), normal(B, R, G, K)) for R in sizes],
        "keys_values": [(normal(B, L, G, K), normal(B, L, G, K)) for _ in sizes],
        "time_BL": jnp.asarray(time_B[:, None] + np.arange(L), jnp.int32),
        "real_BL": jnp.asarray(np.arange(L) < length_B[:, None]),
        "scale_K": jnp.asarray(rng.normal(size=K), jnp.float32),
    }


def by_definition(rings, keys_values, time_BL, real_BL, scale_K) -> list[list[np.ndarray]]:
    """In float64, token by token."""
    found = []
    for ring, new in zip(rings, keys_values, strict=True):
        k, v = (np.asarray(buffer, np.float64).copy() for buffer in ring)
        new_k, new_v = (np.asarray(values, np.float64) for values in new)
        if scale_K is not None:
            mean = np.square(new_k).mean(-1, keepdims=True)
            new_k = new_k / np.sqrt(mean + EPS) * np.asarray(scale_K, np.float64)
        for b, t in np.argwhere(real_BL):
            slot = int(time_BL[b, t]) % k.shape[1]
            k[b, slot], v[b, slot] = new_k[b, t], new_v[b, t]
        found.append([k, v])
    return found


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("normed", [True, False])
def test_equals_the_definition(rng, implementation, dtype, normed):
    inputs = draw(rng, dtype=dtype)
    if not normed:
        inputs["scale_K"] = None
    got = write_keys(**inputs, eps=EPS, implementation=implementation)
    tolerance = 1e-5 if dtype == "float32" else 2**-8
    for ring, want in zip(got, by_definition(**inputs), strict=True):
        assert ring.k_BRGK.dtype == ring.v_BRGK.dtype == dtype
        np.testing.assert_allclose(
            np.asarray(ring.k_BRGK, np.float64), want[0], rtol=tolerance, atol=1e-5
        )
        np.testing.assert_array_equal(np.asarray(ring.v_BRGK, np.float64), want[1])


def test_pieces_and_one_ring(rng):
    inputs = draw(rng, L=5, sizes=(6,), dtype="float32")
    got = write_keys(**inputs, eps=EPS, implementation="xla")
    np.testing.assert_allclose(got[0], by_definition(**inputs)[0], rtol=1e-5, atol=1e-5)


def test_rings_are_written_in_place(rng):
    inputs = draw(rng, dtype="bfloat16")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=H100)):
        step = jax.jit(lambda rings, rest: write_keys(rings, **rest, eps=EPS), donate_argnums=0)
        rest = {name: value for name, value in inputs.items() if name != "rings"}
        text = step.trace(inputs["rings"], rest).lower(lowering_platforms=("cuda",)).as_text()
    assert "write_keys_kernel" in text
    assert text.count("#stablehlo.output_operand_alias<") == len(jax.tree.leaves(inputs["rings"]))


def test_what_it_refuses(rng):
    inputs = draw(rng, L=2, dtype="float32")
    with pytest.raises(Unsupported, match="L=2 new tokens must be 1"):
        write_keys(**inputs, eps=EPS, implementation="pallas_triton")
    inputs = draw(rng, K=48, dtype="float32")
    with pytest.raises(Unsupported, match="K=48 must be 32, 64, 128 or 256"):
        write_keys(**inputs, eps=EPS, implementation="pallas_triton")
    inputs = draw(rng, dtype="float16")
    with pytest.raises(Unsupported, match="dtype float16 must be float32 or bfloat16"):
        write_keys(**inputs, eps=EPS, implementation="pallas_triton")
    pairs = [tuple(ring) for ring in inputs["rings"]]
    values = [inputs[name] for name in ("keys_values", "time_BL", "real_BL", "scale_K")]
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=MI300)):
        with pytest.raises(Unsupported, match="NVIDIA's GPUs, and this is AMD"):
            pallas_triton.write_keys(pairs, *values, EPS)


@pytest.mark.usefixtures("annotations_off")
def test_bad_arguments(rng):
    inputs = draw(rng, dtype="float32")
    with pytest.raises(ValueError, match="2 rings and 1 keys and values: must be equal"):
        write_keys(**inputs | {"keys_values": inputs["keys_values"][:1]}, eps=EPS)
    with pytest.raises(ValueError, match=r"scale_K has shape \(3,\), expected \(32,\)"):
        write_keys(**inputs | {"scale_K": jnp.ones(3)}, eps=EPS)
    with pytest.raises(ValueError, match="a piece of 9 tokens: the cache holds 7 of a row"):
        write_keys(**draw(rng, L=9, dtype="float32"), eps=EPS)
    k, v = inputs["keys_values"][0]
    with pytest.raises(ValueError, match=r"keys_values\[0\].v_BLGK has shape"):
        write_keys(**inputs | {"keys_values": [(k, v[:2]), (k, v)]}, eps=EPS)
