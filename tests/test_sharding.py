import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from bmojo_jax import optim, paths, sharding
from bmojo_jax.config import DataConfig, MeshConfig, ModelConfig, OptimConfig, TrainConfig

D, E, N, R, T, H, G, K, F, V, DEPTH = 8, 16, 3, 2, 4, 4, 2, 6, 12, 10, 3

SSM = {
    "in_proj/kernel": (D, 2, E),
    "conv/kernel": (T, E),
    "conv/bias": (E,),
    "x_proj/kernel": (E, R + 2 * N),
    "dt_proj/kernel": (R, E),
    "dt_proj/bias": (E,),
    "a_log": (E, N),
    "skip": (E,),
    "norm/scale": (E,),
    "out_proj/kernel": (E, D),
}
ATTENTION = {
    "q_proj/kernel": (D, H, K),
    "k_proj/kernel": (D, G, K),
    "v_proj/kernel": (D, G, K),
    "fading_k_proj/kernel": (D, G, K),
    "fading_v_proj/kernel": (D, G, K),
    "o_proj/kernel": (H, K, D),
    "q_norm/scale": (K,),
    "k_norm/scale": (K,),
    "eidetic_gate": (H,),
}
BLOCK = {
    "norm/scale": (D,),
    "mlp_norm/scale": (D,),
    "mlp/gate_proj/kernel": (D, F),
    "mlp/up_proj/kernel": (D, F),
    "mlp/down_proj/kernel": (F, D),
}
TOP = {"embedding/table": (V, D), "norm/scale": (D,), "head/kernel": (D, V)}


def _nested(shapes):
    tree = {}
    for path, shape in shapes.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return tree


def _params():
    """Every parameter that a model can have: a mamba, an attention and a B'MOJO block."""
    shapes = dict(TOP)
    mixers = [
        SSM,
        ATTENTION,
        {f"ssm/{path}": shape for path, shape in SSM.items()}
        | {f"attention/{path}": shape for path, shape in ATTENTION.items()}
        | {"fading_norm/scale": (D,)},
    ]
    for index, mixer in enumerate(mixers):
        for path, shape in (BLOCK | {f"mixer/{p}": s for p, s in mixer.items()}).items():
            shapes[f"groups/{index}/{path}"] = (DEPTH, *shape)
    return _nested(shapes)


def _mesh(data=2, fsdp=2, tensor=2, context=1):
    sizes = MeshConfig(data=data, fsdp=fsdp, context=context, tensor=tensor)
    return sharding.make_mesh(sizes)


def test_mesh_fills_the_free_axis():
    assert dict(_mesh(data=-1, tensor=4, fsdp=1).shape) == {
        "data": 2,
        "fsdp": 1,
        "context": 1,
        "tensor": 4,
    }
    devices = jax.devices()[:2]
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=-1), devices)
    assert dict(mesh.shape) == {"data": 1, "fsdp": 2, "context": 1, "tensor": 1}


@pytest.mark.parametrize("sizes", [(-1, 3, 1), (2, 2, 1), (16, 1, 1)])
def test_mesh_that_does_not_fit_the_devices(sizes):
    with pytest.raises(ValueError, match=rf"mesh\.data={sizes[0]}.* 8"):
        _mesh(*sizes)


def _fake_mesh(data, fsdp, context, tensor, processes):
    """Devices in their order, as many to each process."""
    sizes = {"data": data, "fsdp": fsdp, "context": context, "tensor": tensor}
    count = math.prod(sizes.values())
    devices = [types.SimpleNamespace(process_index=i * processes // count) for i in range(count)]
    return types.SimpleNamespace(
        shape=sizes, devices=np.array(devices).reshape(tuple(sizes.values()))
    )


@pytest.mark.parametrize(
    ("sizes", "wanted"),
    [
        ((8, 1, 1, 1, 1), (0, 1)),
        ((4, 2, 1, 1, 4), (2, 4)),
        ((2, 1, 4, 1, 4), (1, 2)),  # two processes share a row
        ((1, 2, 1, 4, 8), (0, 2)),  # four do
        ((1, 1, 4, 2, 4), (0, 1)),
    ],
)
def test_readers(sizes, wanted, monkeypatch, annotations_off):
    monkeypatch.setattr(jax, "process_index", lambda: 2 if sizes[-1] > 1 else 0)
    assert sharding.readers(_fake_mesh(*sizes)) == sharding.Readers(*wanted)


def test_rows_that_cannot_be_read(annotations_off):
    with pytest.raises(ValueError, match=r"mesh\.context=3.* mesh\.context \* mesh\.tensor must"):
        sharding.readers(_fake_mesh(2, 1, 3, 1, 3))


@pytest.mark.parametrize("sizes", [(2, 2, 1, 2), (1, 2, 4, 1), (1, 1, 8, 1)])
def test_a_batch_is_placed_by_row_and_token(sizes):
    data, fsdp, context, tensor = sizes
    mesh = _mesh(data, fsdp, tensor, context)
    batch = {"inputs": np.arange(8 * 16).reshape(8, 16)}
    placed = sharding.place_batch(batch, mesh)["inputs"]
    assert (np.asarray(placed) == batch["inputs"]).all()
    assert placed.addressable_shards[0].data.shape == (8 // (data * fsdp), 16 // context)


def test_placement_of_parameters():
    shardings = paths.flatten_paths(sharding.param_shardings(_mesh(), _params()))
    cut = ("fsdp", "context")
    expected = {
        "embedding/table": P("tensor", "fsdp"),
        "norm/scale": P(None),
        "head/kernel": P(cut, "tensor"),
        "groups/0/norm/scale": P(None, None),
        "groups/0/mixer/norm/scale": P(None, "tensor"),
        "groups/0/mixer/in_proj/kernel": P(None, cut, None, "tensor"),
        "groups/2/mixer/ssm/x_proj/kernel": P(None, ("tensor", *cut), None),
        "groups/2/mixer/ssm/norm/scale": P(None, "tensor"),
        "groups/2/mixer/fading_norm/scale": P(None, None),
        "groups/1/mixer/q_proj/kernel": P(None, cut, "tensor", None),
        "groups/2/mixer/attention/o_proj/kernel": P(None, "tensor", None, cut),
        "groups/1/mlp/down_proj/kernel": P(None, "tensor", cut),
    }
    assert {path: shardings[path].spec for path in expected} == expected


def test_every_matrix_is_cut_over_all_axes_but_data():
    for path, placed in paths.flatten_paths(sharding.param_shardings(_mesh(), _params())).items():
        if re.fullmatch(r".*(proj/kernel|table)", path):
            axes = {name for entry in placed.spec if entry for name in np.ravel(entry)}
            whole = {"context"} if path == "embedding/table" else set()
            assert axes == {"fsdp", "context", "tensor"} - whole, path


def test_an_axis_that_does_not_divide_is_left_out():
    table = {"embedding": {"table": jax.ShapeDtypeStruct((257, D), jnp.float32)}}
    placed = sharding.param_shardings(_mesh(), table)
    assert placed["embedding"]["table"].spec == P(None, "fsdp")
    # E = 4 is cut by tensor = 4, and fsdp = 2 on top does not divide it.
    kernel = _nested({"groups/0/mixer/x_proj/kernel": (DEPTH, 4, 5)})
    placed = sharding.param_shardings(_mesh(data=1, tensor=4), kernel)
    assert paths.flatten_paths(placed)["groups/0/mixer/x_proj/kernel"].spec == P(
        None, "tensor", None
    )


@pytest.mark.parametrize(
    ("path", "shape", "message"),
    [
        ("groups/0/mixer/surprise/kernel", (DEPTH, D, E), "must match exactly one rule"),
        ("groups/0/mixer/a_log", (E, N), "is for 3 axes"),
    ],
)
def test_unknown_or_misshapen_parameter(path, shape, message):
    with pytest.raises(ValueError, match=f"'{path}'.*{message}"):
        sharding.param_shardings(_mesh(), _nested({path: shape}))


def test_slots_follow_their_parameter():
    mesh, params = _mesh(), _params()
    optimizer = optim.make_optimizer(OptimConfig(), 200, params)
    state = {
        "params": params,
        "opt_state": jax.eval_shape(optimizer.init, params),
        "step": jax.ShapeDtypeStruct((), jnp.int32),
        "key": jax.eval_shape(lambda: jax.random.key(0)),
    }
    flat = paths.flatten_paths(sharding.state_shardings(mesh, params, state))
    wanted = paths.flatten_paths(sharding.param_shardings(mesh, params))
    for slot in ("params", "opt_state/1/mu", "opt_state/1/nu"):
        assert {path: flat.pop(f"{slot}/{path}") for path in wanted} == wanted
    assert set(flat) == {"opt_state/1/count", "opt_state/3/count", "step", "key"}
    assert all(placed.spec == P() for placed in flat.values())


def test_state_that_belongs_to_no_parameter():
    state = {"cache": jax.ShapeDtypeStruct((D, D), jnp.float32)}
    with pytest.raises(ValueError, match="'cache' of shape"):
        sharding.state_shardings(_mesh(), _params(), state)


def _config(accumulate=1, batch_size=8, sequence_length=1024, **model):
    return TrainConfig(
        model=ModelConfig(**({"width": 32, "pattern": "bmojo+mlp"} | model)),
        optim=OptimConfig(accumulate=accumulate),
        data=DataConfig(batch_size=batch_size, sequence_length=sequence_length),
    )


@pytest.mark.parametrize(
    ("config", "mesh", "message"),
    [
        ({"num_heads": 6, "num_kv_heads": 2}, (1, 2, 4), r"model\.num_heads=6 .*mesh\.tensor=4"),
        ({"num_kv_heads": 2}, (1, 2, 4), r"model\.num_kv_heads=2 .*mesh\.tensor=4"),
        ({"mlp_width": 6}, (1, 2, 4), r"model\.mlp_width=6 .*mesh\.tensor=4"),
        (
            {"width": 33, "ssm_expand": 1, "pattern": "mamba"},
            (4, 1, 2),
            r"model\.ssm_expand \* model\.width=33 .*mesh\.tensor=2",
        ),
        ({"width": 36}, (1, 8, 1), r"model\.width=36 .*mesh\.fsdp=8"),
        ({"accumulate": 2}, (4, 2, 1), r"data\.batch_size .*=4 .*mesh\.data \* mesh\.fsdp=8"),
        (
            {"chunk": 160},
            (1, 1, 1, 8),
            r"data\.sequence_length=1024 .*mesh\.context \* model\.chunk",
        ),
        ({"pattern": "mamba", "sequence_length": 1020}, (1, 1, 1, 8), r"=1020 .*mesh\.context=8"),
    ],
)
def test_sizes_that_the_mesh_does_not_divide(config, mesh, message):
    with pytest.raises(ValueError, match=message):
        sharding.check_divisible(_config(**config), _mesh(*mesh))


@pytest.mark.parametrize("mesh", [(8, 1, 1), (1, 8, 1), (2, 1, 4)])
def test_sizes_that_fit(mesh):
    sharding.check_divisible(_config(), _mesh(*mesh))
    # What a pattern does not use does not matter.
    sharding.check_divisible(
        _config(pattern="mamba", num_heads=3, num_kv_heads=1, mlp_width=5), _mesh(*mesh)
    )


def test_constrain():
    x_BL = jnp.ones((4, 3))
    assert sharding.constrain(x_BL, sharding.BATCH, "tensor") is x_BL
    with jax.set_mesh(_mesh()):
        placed = jax.jit(lambda x_BL: sharding.constrain(2 * x_BL, sharding.BATCH, "tensor"))(x_BL)
    assert placed.sharding.spec == P(sharding.BATCH)
