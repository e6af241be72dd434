"""One step of training: on one device, on many, in pieces."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bmojo_jax import paths, presets, sharding, trainer
from bmojo_jax.data.tokenizers import ByteTokenizer
from tests.models import float64_params
from tests.runs import TINY, first_batches, tiny_run, write_documents
from tests.steps import FAMILIES, assert_same, on_mesh, packed_batch, take_step
from tests.tolerances import TOLERANCE, relative_rms

BYTES_V = jnp.asarray(ByteTokenizer().token_bytes_V())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("documents")
    write_documents(path)
    return path


def test_without_positions_every_row_is_one_document(folder):
    with jax.enable_x64(True):
        model = dataclasses.replace(TINY, pattern="mamba,swa", depth=2, compute_dtype="float64")
        config, params = tiny_run(folder, model=model), float64_params(model)
        packed = jax.tree.map(jnp.asarray, packed_batch())
        rows = packed | {"positions": jnp.broadcast_to(jnp.arange(12, dtype=jnp.int32), (8, 12))}
        bare = {name: v for name, v in packed.items() if name != "positions"}
        loss = jax.jit(lambda batch: trainer.loss_sums(config, params, batch)[0])
        told_apart, told, untold = (float(loss(batch)) for batch in (packed, rows, bare))
    assert untold == pytest.approx(told, rel=1e-12)
    assert abs(untold - told_apart) > 1e-6


def test_accumulation_equals_one_big_batch(folder):
    with jax.enable_x64(True):
        model = dataclasses.replace(TINY, pattern="swa", compute_dtype="float64")
        params = float64_params(model)
        batch = jax.tree.map(jnp.asarray, packed_batch())
        weight_B = np.asarray(batch["weights"]).sum(axis=1)
        assert len(set(weight_B.reshape(2, 4).sum(axis=0))) > 1  # else a mean of means would do
        results = {}
        for pieces in (1, 4):
            config = tiny_run(folder, model=model, optim={"accumulate": pieces}, z_loss=0.1)
            # The new parameters are the old ones minus the gradient.
            state = _state(params, optax.sgd(1.0))
            step = jax.jit(
                lambda s, b, c=config: trainer.train_step(c, optax.sgd(1.0), s, b, BYTES_V)
            )
            results[pieces] = step(state, batch)
    (one, measured), (four, measured_4) = results[1], results[4]
    for path, x in paths.flatten_paths(one.params).items():
        assert x.dtype == np.float64
        y = paths.flatten_paths(four.params)[path]
        before = paths.flatten_paths(params)[path]
        assert relative_rms(y - before, x - before) < TOLERANCE["float64"], path
    for name in measured:
        np.testing.assert_allclose(measured_4[name], measured[name], rtol=1e-6, err_msg=name)


def _state(params, optimizer):
    return trainer.TrainState(
        step=jnp.int32(0),
        skipped=jnp.int32(0),
        params=params,
        opt_state=optimizer.init(params),
        key=jax.random.key_data(jax.random.key(0)),
    )


# A large eps makes an update proportional to the gradient, so that it is no less exact.
_SMOOTH = {"learning_rate": 1.0, "warmup_steps": 0, "eps": 1.0}
_MESHES = (
    {"data": 8},
    {"data": 1, "fsdp": 8},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"data": 2, "context": 4},  # pieces of one chunk, shorter than what a token sees
    {"data": 1, "fsdp": 2, "context": 2, "tensor": 2},
)


@functools.cache
def _on_one_device(config):
    program = on_mesh(config)
    state = jax.device_get(program.init())
    return state, *jax.device_get(take_step(program, state, packed_batch(length=16)))


def _cases():
    for family in FAMILIES:
        for sizes in _MESHES:
            # What is quick covers every mesh, every axis for every mixer.
            quick = family == "bmojo" or (family in ("mamba", "transformer") and len(sizes) >= 3)
            marks = () if quick else pytest.mark.slow
            name = "-".join(f"{axis}{size}" for axis, size in sizes.items())
            yield pytest.param(family, sizes, marks=marks, id=f"{family}-{name}")


@pytest.mark.parametrize(("family", "sizes"), list(_cases()))
def test_eight_devices_equal_one(family, sizes, folder):
    pattern = FAMILIES[family]
    depth = len(pattern.split(","))
    config = tiny_run(folder, model={"pattern": pattern, "depth": depth}, optim=_SMOOTH)
    before, after, measured = _on_one_device(config)
    on_eight = take_step(on_mesh(config, **sizes), before, packed_batch(length=16))
    after_8, measured_8 = jax.device_get(on_eight)
    np.testing.assert_allclose(measured_8["loss"], measured["loss"], rtol=1e-6)
    for name in measured:
        np.testing.assert_allclose(measured_8[name], measured[name], rtol=1e-5, err_msg=name)
    # The first moment is the gradient; of parameters, sums near 1 would hide most of its digits.
    one, eight = (paths.flatten_paths(x.opt_state[1].mu) for x in (after, after_8))
    for path, wanted in one.items():
        error = relative_rms(eight[path], wanted)
        assert error < 2 * TOLERANCE["float32"], (path, error)
    before, after, after_8 = (paths.flatten_paths(x.params) for x in (before, after, after_8))
    for path in after:
        assert not np.array_equal(after[path], before[path]), path
        np.testing.assert_allclose(after_8[path], after[path], rtol=1e-5, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("sizes", _MESHES[1:3])
def test_state_is_born_sharded_and_donated(sizes, folder):
    config = tiny_run(folder)
    program = on_mesh(config, **sizes)
    with jax.set_mesh(program.mesh):
        state = program.init()
    assert_same(jax.device_get(state), jax.device_get(on_mesh(config).init()))
    cut = 0
    for path, leaf in paths.flatten_paths(state).items():
        assert leaf.sharding == paths.flatten_paths(program.state_shardings)[path]
        if leaf.ndim > 2 and "proj" in path:
            cut += 1
            assert leaf.addressable_shards[0].data.size < leaf.size, path
    assert cut >= 3 * 8  # parameters and both moments
    # What the program returns on a device is that device's shards.
    with jax.set_mesh(program.mesh):
        memory = program.init.lower().compile().memory_analysis()
        whole = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        assert memory.output_size_in_bytes < 0.6 * whole
        state = program.init()  # one that nothing else refers to
        after, _ = program.step(state, sharding.place_batch(packed_batch(), program.mesh))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert_same(
        jax.tree.map(lambda x: x.sharding, after),
        jax.tree.map(lambda x: x, program.state_shardings),
    )


def test_metrics_of_a_step(folder):
    config = tiny_run(folder, steps=50, optim={"warmup_steps": 10})
    program = on_mesh(config)
    batch = packed_batch()
    before = jax.device_get(program.init())
    after, measured = jax.device_get(take_step(program, before, batch))
    assert measured["targets"] == batch["weights"].sum()
    num_bytes = (batch["weights"] * (batch["targets"] != 256)).sum()
    nats = measured["loss"] * measured["targets"]
    assert measured["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
    assert measured["learning_rate"] == pytest.approx(config.optim.learning_rate / 10)
    update = jax.tree.map(np.subtract, after.params, before.params)
    assert measured["update_norm"] == pytest.approx(float(optax.tree.norm(update)), rel=1e-3)
    assert measured["param_norm"] == pytest.approx(float(optax.tree.norm(before.params)), rel=1e-5)
    sums = jax.jit(jax.value_and_grad(lambda p, b: trainer.loss_sums(config, p, b), has_aux=True))
    (loss, _), grads = sums(before.params, batch)
    assert measured["loss"] == pytest.approx(float(loss) / measured["targets"], rel=1e-5)
    grad_norm = float(optax.tree.norm(grads)) / measured["targets"]
    assert measured["grad_norm"] == pytest.approx(grad_norm, rel=1e-4)
    assert (measured["finite"], measured["skipped"]) == (1, 0)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_tiny_preset_learns(family, folder):
    model = presets.model(family, "tiny", vocab_size=257)
    config = tiny_run(
        folder,
        model=model,
        data={"sequence_length": 160, "batch_size": 2},
        optim={"learning_rate": 3e-3, "warmup_steps": 0},
    )
    program = on_mesh(config)
    batch = next(first_batches(config.data, 1))
    state, losses = jax.device_get(program.init()), []
    for _ in range(3):
        state, measured = take_step(program, state, batch)
        losses.append(float(measured["loss"]))
        assert measured["finite"]
    # A fresh model knows nothing; the same batch again is learned.
    assert abs(losses[0] - math.log(257)) < 0.5
    assert losses[2] < losses[1] < losses[0] - 0.05
