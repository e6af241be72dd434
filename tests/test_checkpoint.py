from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bmojo_jax import optim, sharding
from bmojo_jax.checkpoint import Checkpoints
from bmojo_jax.config import MeshConfig, OptimConfig, TrainConfig
from bmojo_jax.data.tokenizers import ByteTokenizer
from bmojo_jax.settings import from_dict, to_dict


class State(NamedTuple):
    params: Any
    opt_state: Any
    step: Any
    key: Any


def _params(seed=0, width=8):
    rng = np.random.default_rng(seed)
    return {
        "embedding": {"table": jnp.asarray(rng.normal(size=(6, width)), jnp.float32)},
        "groups": {
            "0": {
                "mlp": {
                    "up_proj": {"kernel": jnp.asarray(rng.normal(size=(2, width, 4)), jnp.float32)}
                },
                "norm": {"scale": jnp.asarray(rng.normal(size=(2, width)), jnp.float32)},
            }
        },
    }


def _state(seed=0, width=8):
    params = _params(seed, width)
    optimizer = optim.make_optimizer(OptimConfig(), 200, params)
    _, opt_state = optimizer.update(_params(seed + 1, width), optimizer.init(params), params)
    return State(params, opt_state, jnp.int32(seed + 7), jax.random.key_data(jax.random.key(seed)))


def _abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def _assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def _open(directory, keep_last=2, keep_best=1):
    return Checkpoints(directory, keep_last=keep_last, keep_best=keep_best)


def test_round_trip_is_exact(tmp_path):
    state, config = _state(), to_dict(TrainConfig())
    data_state = {"epoch": 1, "readers": [3, 4]}
    with _open(tmp_path) as checkpoints:
        assert checkpoints.save(3, state, data_state, config)
    # As a process that starts anew sees it.
    with _open(tmp_path) as checkpoints:
        restored, place = checkpoints.restore(_abstract(state))
        assert checkpoints.latest_step() == 3
        assert checkpoints.config() == checkpoints.config(3)
        assert from_dict(TrainConfig, checkpoints.config()) == TrainConfig()
        _assert_same(checkpoints.restore_params(_abstract(state.params)), state.params)
    assert isinstance(restored, State) and place == data_state
    _assert_same(restored, state)


def test_last_and_best_are_kept(tmp_path):
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: float("nan"), 5: None, 6: 2.5}
    with _open(tmp_path) as checkpoints:
        for step, loss in losses.items():
            checkpoints.save(step, _state(step), {}, {}, validation_loss=loss)
        checkpoints.wait()
        assert checkpoints.best_step() == 2 and checkpoints.latest_step() == 6
    assert sorted(int(p.name) for p in tmp_path.iterdir() if p.name.isdigit()) == [2, 5, 6]
    with _open(tmp_path) as checkpoints:  # losses are remembered
        assert checkpoints.best_step() == 2
        checkpoints.save(7, _state(7), {}, {}, validation_loss=0.5)
        checkpoints.wait()
        assert checkpoints.best_step() == 7
        restored, _ = checkpoints.restore(_abstract(_state()), step=6)
        _assert_same(restored, _state(6))
    assert sorted(int(p.name) for p in tmp_path.iterdir() if p.name.isdigit()) == [6, 7]


def test_without_validation_loss_the_last_are_kept_and_none_is_best(tmp_path):
    with _open(tmp_path, keep_last=1, keep_best=2) as checkpoints:
        for step in (1, 2, 3, 4):
            checkpoints.save(step, _state(step), {}, {})
        checkpoints.wait()
        assert checkpoints.best_step() is None
    assert sorted(int(p.name) for p in tmp_path.iterdir() if p.name.isdigit()) == [4]


def test_state_may_be_donated_while_it_is_being_saved(tmp_path):
    state = {"params": {"w": jnp.arange(1 << 20, dtype=jnp.float32)}}
    saved, abstract = np.array(state["params"]["w"]), _abstract(state)
    advance = jax.jit(lambda state: jax.tree.map(lambda x: -x - 1, state), donate_argnums=0)
    with _open(tmp_path) as checkpoints:
        checkpoints.save(1, state, {}, {})
        for _ in range(3):
            state = advance(state)
        jax.block_until_ready(state)
        restored, _ = checkpoints.restore(abstract)
    np.testing.assert_array_equal(restored["params"]["w"], saved)


def _placed(state, sizes):
    """On a mesh of all devices, or, for None, on one device."""
    devices = jax.devices() if sizes else jax.devices()[3:4]
    mesh = sharding.make_mesh(MeshConfig(**(sizes or {})), devices)
    return jax.device_put(state, sharding.state_shardings(mesh, state["params"], state))


_MESHES = {
    "one": None,
    "data": {"data": 8},
    "fsdp": {"data": 1, "fsdp": 8},
    "data-fsdp": {"data": 2, "fsdp": 4},
    "fsdp-tensor": {"data": 1, "fsdp": 2, "tensor": 4},
    "all": {"data": 2, "fsdp": 2, "tensor": 2},
}


@pytest.mark.parametrize("saved", _MESHES)
def test_restore_onto_another_mesh(saved, tmp_path):
    """From each to each, bit for bit, with the optimizer's state."""
    state = _state()._asdict()
    with _open(tmp_path) as checkpoints:
        checkpoints.save(1, _placed(state, _MESHES[saved]), {}, {})
        for name, sizes in _MESHES.items():
            target = _placed(_state(5)._asdict(), sizes)
            restored, _ = checkpoints.restore(_abstract(target))
            _assert_same(restored, state)
            for x, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(target), strict=True):
                assert x.sharding == wanted.sharding, name
            kernel = restored["opt_state"][1].mu["groups"]["0"]["mlp"]["up_proj"]["kernel"]
            assert isinstance(kernel.sharding, NamedSharding)
            assert kernel.sharding.spec == P(None, ("fsdp", "context"), "tensor")
            shards = {"fsdp": 8, "data-fsdp": 4, "fsdp-tensor": 8, "all": 4}.get(name, 1)
            assert kernel.size == shards * kernel.addressable_shards[0].data.size
        single = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[3])
            ),
            state["params"],
        )
        params = checkpoints.restore_params(single)
    _assert_same(params, state["params"])
    assert params["embedding"]["table"].devices() == {jax.devices()[3]}


def test_the_tokenizer_travels_with_the_checkpoint(tmp_path):
    with _open(tmp_path) as checkpoints:
        checkpoints.save(1, _state(), {}, {})
        assert checkpoints.tokenizer() is None
        checkpoints.save(2, _state(), {}, {}, tokenizer=ByteTokenizer())
    with _open(tmp_path) as checkpoints:
        assert isinstance(checkpoints.tokenizer(), ByteTokenizer)
        assert checkpoints.tokenizer(1) is None


def test_saving_a_step_twice_is_harmless_and_an_earlier_one_is_refused(tmp_path):
    with _open(tmp_path) as checkpoints:
        assert checkpoints.save(4, _state(4), {}, {})
        assert not checkpoints.save(4, _state(5), {}, {})
        with pytest.raises(ValueError, match=r"step=3 must be after .*, 4"):
            checkpoints.save(3, _state(3), {}, {})
        restored, _ = checkpoints.restore(_abstract(_state()))
    _assert_same(restored, _state(4))


def test_missing_checkpoints(tmp_path):
    with _open(tmp_path / "run") as checkpoints:
        assert checkpoints.latest_step() is None and checkpoints.best_step() is None
        with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*/run"):
            checkpoints.restore(_abstract(_state()))
        with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*/run"):
            checkpoints.config()
        checkpoints.save(4, _state(), {}, {})
        with pytest.raises(FileNotFoundError, match=r"step=5 in .*/run, which holds \[4\]"):
            checkpoints.restore_params(_abstract(_params()), step=5)


def test_changed_model_names_the_first_parameter(tmp_path):
    with _open(tmp_path) as checkpoints:
        checkpoints.save(1, _state(), {}, {})
        message = r"'params/embedding/table' has shape \(6, 8\), wanted \(6, 10\)"
        with pytest.raises(ValueError, match=message):
            checkpoints.restore(_abstract(_state(width=10)))
        with pytest.raises(ValueError, match=message):
            checkpoints.restore_params(_abstract(_params(width=10)))
        more = _params() | {"head": {"kernel": jnp.ones((8, 6))}}
        with pytest.raises(ValueError, match=r"has no 'params/head/kernel'"):
            checkpoints.restore_params(_abstract(more))
        less = _state()._replace(params={"embedding": _params()["embedding"]})
        with pytest.raises(ValueError, match=r"has 'params/groups/0/.*', which the state lacks"):
            checkpoints.restore(_abstract(less))


def test_what_was_cut_short_is_not_a_checkpoint(tmp_path):
    with _open(tmp_path) as checkpoints:
        checkpoints.save(1, _state(), {}, {})
    (tmp_path / "2.orbax-checkpoint-tmp").mkdir()
    with _open(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 1
        checkpoints.save(2, _state(2), {}, {})
        checkpoints.wait()
        assert checkpoints.latest_step() == 2
