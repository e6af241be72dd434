import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bmojo_jax import layers
from pallas_kernels.rotary import rotary
from tests.models import packed_positions


def test_rotary_turns_pairs_by_their_angle(rng):
    x = rng.normal(size=(5, 1, 6))
    positions = np.array([0, 1, 7, -3, 100])
    with jax.enable_x64(True):
        got = rotary(jnp.asarray(x), jnp.asarray(positions), 100.0)
    frequency = 100.0 ** (-np.arange(3) / 3)
    turned = (x[..., :3] + 1j * x[..., 3:]) * np.exp(
        1j * positions[:, None, None] * frequency[None, None]
    )
    want = np.concatenate([turned.real, turned.imag], axis=-1)
    np.testing.assert_allclose(got, want, atol=1e-12)


@pytest.mark.parametrize("shift", [-11, 5, 1000])
def test_rotary_products_depend_on_distance_only(rng, shift):
    with jax.enable_x64(True):
        q, k = (jnp.asarray(rng.normal(size=(1, 8, 2, 4))) for _ in range(2))
        positions = jnp.arange(8)[None]

        def products(positions):
            rotate = lambda x: rotary(x, positions, 1e4)  # noqa: E731
            return jnp.einsum("BLHK,BSHK->BHLS", rotate(q), rotate(k))

        np.testing.assert_allclose(products(positions + shift), products(positions), atol=1e-11)


def test_rms_norm_in_bfloat16_is_computed_in_float32(rng):
    x = jnp.asarray(rng.normal(size=(4, 512)) * 30, jnp.bfloat16)
    scale = jnp.asarray(rng.normal(size=512), jnp.float32)
    wide = x.astype(jnp.float32)
    want = wide / jnp.sqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + 1e-5) * scale[None]
    got = layers.rms_norm(x, scale, 1e-5)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, want.astype(jnp.bfloat16))


def test_projection_maps_heads(rng):
    from flax import nnx

    out = layers.Projection((2, 3), (5,), rngs=nnx.Rngs(params=0))
    x = jnp.asarray(rng.normal(size=(4, 7, 2, 3)), jnp.float32)
    want = x.reshape(4, 7, 6) @ out.kernel[...].reshape(6, 5)
    np.testing.assert_allclose(out(x), want, rtol=1e-5, atol=1e-6)


def test_documents():
    documents = layers.packed_documents(jnp.asarray(packed_positions(6, (2, 3), ())))
    np.testing.assert_array_equal(documents.segment_ids_BL, [[0, 0, 2, 3, 3, 3], [0] * 6])
    np.testing.assert_array_equal(documents.start_BL, [[0, 0, 2, 3, 3, 3], [0] * 6])
    np.testing.assert_array_equal(documents.reset_BL[0], [True, False, True, True, False, False])
    assert layers.one_document(2, 3).reset_BL is None
