import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bmojo_jax import losses, sharding
from bmojo_jax.config import MeshConfig


def _inputs(B=3, L=5, D=7, V=23, dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    x_BLD = rng.normal(size=(B, L, D)).astype(dtype)
    w_VD = rng.normal(size=(V, D)).astype(dtype)
    targets_BL = rng.integers(0, V, (B, L)).astype(np.int32)
    x_BLD[0] += w_VD[targets_BL[0]]  # some targets are predicted
    weights_BL = (rng.uniform(size=(B, L)) * (rng.uniform(size=(B, L)) < 0.8)).astype(dtype)
    return x_BLD, w_VD, targets_BL, weights_BL


def _plain(x_BLD, w_VD, targets_BL, weights_BL, z_loss):
    logits_BLV = jnp.einsum("BLD,VD->BLV", x_BLD, w_VD, precision="highest")
    nll_BL = optax.softmax_cross_entropy_with_integer_labels(logits_BLV, targets_BL)
    lse_BL = jax.nn.logsumexp(logits_BLV, axis=-1)
    return losses.Loss(
        (weights_BL * nll_BL).sum(),
        z_loss * (weights_BL * lse_BL**2).sum(),
        weights_BL.sum(),
        (weights_BL * (logits_BLV.argmax(-1) == targets_BL)).sum(),
    )


def _total(loss):
    return (loss.nll + loss.z_loss) / loss.weight


def _error(got, wanted):
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    return np.sqrt(np.mean((got - wanted) ** 2) / np.mean(wanted**2))


# 23 words: one chunk, an exact number, uneven chunks, one word at a time.
@pytest.mark.parametrize(("V", "vocab_chunk"), [(23, 64), (24, 8), (23, 8), (23, 22), (23, 1)])
def test_loss_and_gradients_in_float64(V, vocab_chunk):
    with jax.enable_x64(True):
        x_BLD, w_VD, targets_BL, weights_BL = map(jnp.asarray, _inputs(V=V))

        def chunked(x_BLD, w_VD, weights_BL):
            loss = losses.cross_entropy(
                x_BLD, w_VD, targets_BL, weights_BL, vocab_chunk=vocab_chunk, z_loss=0.3
            )
            return _total(loss), loss

        def plain(x_BLD, w_VD, weights_BL):
            loss = _plain(x_BLD, w_VD, targets_BL, weights_BL, 0.3)
            return _total(loss), loss

        arguments = (x_BLD, w_VD, weights_BL)
        grads, got = jax.jit(jax.grad(chunked, (0, 1, 2), has_aux=True))(*arguments)
        wanted_grads, wanted = jax.grad(plain, (0, 1, 2), has_aux=True)(*arguments)
        for name in losses.Loss._fields:
            assert _error(getattr(got, name), getattr(wanted, name)) < 1e-12, name
        for name, a, b in zip(("x", "w", "weights"), grads, wanted_grads, strict=True):
            assert a.dtype == b.dtype and _error(a, b) < 1e-12, name


def test_per_token_nll():
    with jax.enable_x64(True):
        x_BLD, w_VD, targets_BL, _ = map(jnp.asarray, _inputs())
        got_BL = losses.per_token_nll(x_BLD, w_VD, targets_BL, vocab_chunk=8)
        logits_BLV = jnp.einsum("BLD,VD->BLV", x_BLD, w_VD)
        wanted_BL = optax.softmax_cross_entropy_with_integer_labels(logits_BLV, targets_BL)
        assert _error(got_BL, wanted_BL) < 1e-12


def test_large_logits_do_not_overflow():
    x_BLD, w_VD, targets_BL, _ = _inputs(dtype=np.float32)
    nll_BL = losses.per_token_nll(
        jnp.asarray(1e3 * x_BLD), jnp.asarray(w_VD), jnp.asarray(targets_BL), vocab_chunk=4
    )
    assert np.all(np.isfinite(nll_BL)) and np.max(nll_BL) > 100


def test_a_tie_is_not_correct():
    x_BLD = jnp.ones((1, 2, 3))
    w_VD = jnp.ones((6, 3)).at[4].set(2.0)
    loss = losses.cross_entropy(
        x_BLD, w_VD, jnp.array([[4, 1]]), jnp.ones((1, 2)), vocab_chunk=2, z_loss=0.0
    )
    assert loss.correct == 1


def test_bfloat16_is_as_good_as_its_products():
    # Products of bfloat16 are exact in float32, so only the gradient's dlogits are rounded.
    x_BLD, w_VD, targets_BL, weights_BL = map(jnp.asarray, _inputs(dtype=np.float32, D=64))
    x_BLD, w_VD = x_BLD.astype(jnp.bfloat16), w_VD.astype(jnp.bfloat16).astype(jnp.float32)

    def total(function, x_BLD, w_VD):
        return _total(function(x_BLD, w_VD, targets_BL, weights_BL))

    def chunked(*args):
        return losses.cross_entropy(*args, vocab_chunk=8, z_loss=0.1)

    def plain(x_BLD, *rest):
        return _plain(x_BLD.astype(jnp.float32), *rest, 0.1)

    got, grads = jax.value_and_grad(total, (1, 2))(chunked, x_BLD, w_VD)
    wanted, wanted_grads = jax.value_and_grad(total, (1, 2))(plain, x_BLD, w_VD)
    assert _error(got, wanted) < 1e-6
    assert grads[0].dtype == jnp.bfloat16 and grads[1].dtype == jnp.float32
    for a, b in zip(grads, wanted_grads, strict=True):
        assert _error(a, b) < 4e-3


@pytest.mark.parametrize(
    ("V", "vocab_chunk", "J"),
    [(257, 8192, 1), (50304, 8192, 8), (32000, 8192, 4), (50257, 8192, 7)],
)
def test_number_of_chunks(V, vocab_chunk, J):
    assert losses.num_chunks(V, vocab_chunk) == J


def _temp_bytes(V, vocab_chunk, B=4, L=64, D=8):
    def total(x_BLD, w_VD, targets_BL, weights_BL):
        return _total(
            losses.cross_entropy(
                x_BLD, w_VD, targets_BL, weights_BL, vocab_chunk=vocab_chunk, z_loss=0.1
            )
        )

    shapes = (
        jax.ShapeDtypeStruct((B, L, D), jnp.float32),
        jax.ShapeDtypeStruct((V, D), jnp.float32),
        jax.ShapeDtypeStruct((B, L), jnp.int32),
        jax.ShapeDtypeStruct((B, L), jnp.float32),
    )
    compiled = jax.jit(jax.value_and_grad(total, (0, 1))).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_grows_with_the_chunk_and_not_with_the_vocabulary():
    B, L, D = 4, 64, 8
    small, large = _temp_bytes(4096, 256), _temp_bytes(16384, 256)
    assert large < 0.2 * B * L * 16384 * 4
    # What may grow is the table's own gradient, twice at most.
    assert large - small <= 2 * (16384 - 4096) * D * 4
    assert _temp_bytes(16384, 16384) > B * L * 16384 * 4


# 24 words are cut over tensor = 2; 23 are not, and their table is replicated over that axis.
@pytest.mark.parametrize("V", [24, 23])
def test_on_a_mesh(V):
    x_BLD, w_VD, targets_BL, weights_BL = _inputs(B=4, D=8, V=V, dtype=np.float32)
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))

    def total(x_BLD, w_VD, targets_BL, weights_BL):
        return _total(
            losses.cross_entropy(x_BLD, w_VD, targets_BL, weights_BL, vocab_chunk=8, z_loss=0.3)
        )

    function = jax.value_and_grad(total, (0, 1))
    wanted, wanted_grads = jax.jit(function)(x_BLD, w_VD, targets_BL, weights_BL)
    batch = sharding.batch_sharding(mesh)
    table = sharding.param_shardings(mesh, {"embedding": {"table": w_VD}})["embedding"]["table"]
    assert table.spec == (P("tensor", "fsdp") if V == 24 else P(None, "fsdp"))
    with jax.set_mesh(mesh):
        got, grads = jax.jit(function, out_shardings=(NamedSharding(mesh, P()), (batch, table)))(
            jax.device_put(x_BLD, batch),
            jax.device_put(w_VD, table),
            jax.device_put(targets_BL, batch),
            jax.device_put(weights_BL, batch),
        )
    assert _error(got, wanted) < 1e-6
    for a, b in zip(grads, wanted_grads, strict=True):
        assert _error(a, b) < 1e-6
