"""Rows of the table by token, and what sums their gradients on a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractDevice, AbstractMesh

from bmojo_jax import embedding
from pallas_kernels import dispatch

H100 = AbstractDevice("NVIDIA H100 80GB HBM3", None, platform="gpu")


def exact(rows_TD, tokens_T, V):
    want_VD = np.zeros((V, rows_TD.shape[1]))
    np.add.at(want_VD, tokens_T, np.asarray(rows_TD, np.float64))
    return want_VD


# Fewer rows than a block has, whole blocks, a token that fills several, one token, many that are
# not there.
@settings(deadline=None, max_examples=15)
@given(
    T=st.sampled_from([1, 7, 128, 300, 640]),
    V=st.sampled_from([1, 3, 40, 1000]),
    skew=st.sampled_from([1, 4]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    seed=st.integers(0, 99),
)
def test_sums_equal_float64(T, V, skew, dtype, seed):
    rng = np.random.default_rng(seed)
    tokens_T = (V * rng.random(T) ** skew).astype(np.int32)
    rows_TD = jnp.asarray(rng.normal(size=(T, 5)), dtype)
    got_VD = embedding.sum_by_token(rows_TD, jnp.asarray(tokens_T), V)
    assert got_VD.dtype == jnp.float32
    np.testing.assert_allclose(got_VD, exact(rows_TD, tokens_T, V), rtol=1e-5, atol=1e-5)


def test_one_token_over_many_blocks_and_some_to_its_sides(rng):
    tokens_T = np.repeat([0, 1, 2, 4], [100, 700, 3, 250])
    order_T = rng.permutation(len(tokens_T))
    with jax.enable_x64(True):
        rows_TD = jnp.asarray(rng.normal(size=(len(tokens_T), 3)))
        got_VD = embedding.sum_by_token(rows_TD, jnp.asarray(tokens_T[order_T]), 5)
    assert got_VD.dtype == jnp.float64
    want_VD = exact(rows_TD, tokens_T[order_T], 5)
    assert not want_VD[3].any()
    np.testing.assert_allclose(got_VD, want_VD, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gradient_on_a_gpu_is_that_of_the_gather(rng, monkeypatch, dtype):
    """Of several tables at once, as in a sweep, too."""
    table_PVD = jnp.asarray(rng.normal(size=(2, 11, 4)), jnp.float32)
    tokens_PBL = jnp.asarray(rng.integers(0, 11, size=(2, 3, 50)))
    weight_PBLD = jnp.asarray(rng.normal(size=(2, 3, 50, 4)), dtype)

    def loss(table_VD, tokens_BL, weight_BLD):
        x_BLD = embedding.embed(table_VD, tokens_BL, dtype)
        assert x_BLD.dtype == dtype
        return (x_BLD * weight_BLD).sum(dtype=jnp.float32)

    gradient = jax.vmap(jax.value_and_grad(loss))
    want, want_PVD = gradient(table_PVD, tokens_PBL, weight_PBLD)
    monkeypatch.setattr(dispatch, "platform", lambda: "gpu")
    got, got_PVD = gradient(table_PVD, tokens_PBL, weight_PBLD)
    np.testing.assert_array_equal(got, want)
    assert got_PVD.dtype == table_PVD.dtype
    np.testing.assert_allclose(got_PVD, want_PVD, rtol=1e-5, atol=1e-5)


def test_no_scatter_on_a_gpu():
    shapes = (
        jax.ShapeDtypeStruct((300, 16), jnp.float32),
        jax.ShapeDtypeStruct((2, 500), jnp.int32),
    )
    gradient = jax.jit(jax.grad(lambda *x: embedding.embed(*x, jnp.bfloat16).sum(dtype=float)))

    def lowered(platform):
        return gradient.trace(*shapes).lower(lowering_platforms=(platform,)).as_text()

    assert "stablehlo.scatter" in lowered("cpu")
    jax.clear_caches()
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=H100)):
        assert "stablehlo.scatter" not in lowered("cuda")
