import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import pallas_kernels
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


def _mesh(data=2, fsdp=2, tensor=2):
    return sharding.make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor))


def test_mesh_fills_the_free_axis():
    assert dict(_mesh(data=-1, tensor=4, fsdp=1).shape) == {"data": 2, "fsdp": 1, "tensor": 4}
    devices = jax.devices()[:2]
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=-1), devices)
    assert dict(mesh.shape) == {"data": 1, "fsdp": 2, "tensor": 1}


@pytest.mark.parametrize("sizes", [(-1, 3, 1), (2, 2, 1), (16, 1, 1)])
def test_mesh_that_does_not_fit_the_devices(sizes):
    with pytest.raises(ValueError, match=rf"mesh\.data={sizes[0]}.* 8"):
        _mesh(*sizes)


def test_placement_of_parameters():
    shardings = paths.flatten_paths(sharding.param_shardings(_mesh(), _params()))
    expected = {
        "embedding/table": P("tensor", "fsdp"),
        "norm/scale": P(None),
        "head/kernel": P("fsdp", "tensor"),
        "groups/0/norm/scale": P(None, None),
        "groups/0/mixer/norm/scale": P(None, "tensor"),
        "groups/0/mixer/in_proj/kernel": P(None, "fsdp", None, "tensor"),
        "groups/2/mixer/ssm/x_proj/kernel": P(None, ("tensor", "fsdp"), None),
        "groups/2/mixer/ssm/norm/scale": P(None, "tensor"),
        "groups/2/mixer/fading_norm/scale": P(None, None),
        "groups/1/mixer/q_proj/kernel": P(None, "fsdp", "tensor", None),
        "groups/2/mixer/attention/o_proj/kernel": P(None, "tensor", None, "fsdp"),
        "groups/1/mlp/down_proj/kernel": P(None, "tensor", "fsdp"),
    }
    assert {path: shardings[path].spec for path in expected} == expected


def test_every_matrix_is_cut_over_fsdp_and_tensor():
    for path, placed in paths.flatten_paths(sharding.param_shardings(_mesh(), _params())).items():
        if re.fullmatch(r".*(proj/kernel|table)", path):
            axes = {name for entry in placed.spec if entry for name in np.ravel(entry)}
            assert axes == {"fsdp", "tensor"}, path


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


def _config(accumulate=1, batch_size=8, **model):
    return TrainConfig(
        model=ModelConfig(**({"width": 32, "pattern": "bmojo+mlp"} | model)),
        optim=OptimConfig(accumulate=accumulate),
        data=DataConfig(batch_size=batch_size),
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


def _scan_inputs(B, L=7, E=4, N=3):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {
        "x_BLE": normal(B, L, E),
        "dt_BLE": normal(B, L, E),
        "a_EN": -jnp.exp(normal(E, N)),
        "b_BLN": normal(B, L, N),
        "c_BLN": normal(B, L, N),
        "d_E": normal(E),
        "z_BLE": normal(B, L, E),
        "dt_bias_E": normal(E),
        "h0_BEN": normal(B, E, N),
    }, {"reset_BL": jnp.asarray(rng.uniform(size=(B, L)) < 0.2)}


def _attention_inputs(B, L=10, H=4, G=2, K=4, M=2, C=4):
    rng = np.random.default_rng(0)
    Z = -(-L // C)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {
        "q_BLHK": normal(B, L, H, K),
        "k_BLGK": normal(B, L, G, K),
        "v_BLGK": normal(B, L, G, K),
        "fading_k_BLGK": normal(B, L, G, K),
        "fading_v_BLGK": normal(B, L, G, K),
        "eidetic_k_BZMGK": normal(B, Z, M, G, K),
        "eidetic_v_BZMGK": normal(B, Z, M, G, K),
        "eidetic_bias_BZHM": normal(B, Z, H, M),
    }, {
        "eidetic_valid_BZM": jnp.asarray(rng.uniform(size=(B, Z, M)) < 0.7),
        "segment_ids_BL": jnp.asarray(np.sort(rng.integers(1, 3, (B, L)), axis=1), jnp.int32),
        "window": 3,
        "fading_window": 2,
        "chunk": C,
    }


OPERATIONS = {
    "selective_scan": (_scan_inputs, ("y_BLE", "h_BEN")),
    "memory_attention": (_attention_inputs, ("o_BLHK", "lse_BLH")),
}


def _results(operation, inputs, options):
    """Both outputs, and the gradient of every input from a loss that weighs them at random."""

    def loss(inputs):
        outputs = operation(**inputs, **options)
        rng = np.random.default_rng(1)
        total = sum((x * rng.normal(size=x.shape).astype(np.float32)).sum() for x in outputs)
        return total, outputs

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(inputs)


def _assert_close(got, wanted):
    for path, b in paths.flatten_paths(wanted).items():
        a = paths.flatten_paths(got)[path]
        error = np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2))
        assert error < 1e-5, (path, error)


# Three rows are not cut over data and fsdp; tensor = 4 does not cut two key heads.
@pytest.mark.parametrize(("mesh", "B"), [((2, 2, 2), 8), ((1, 2, 4), 8), ((2, 2, 2), 3)])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_on_a_mesh(name, mesh, B):
    inputs, options = OPERATIONS[name][0](B)
    wanted = _results(getattr(pallas_kernels, name), inputs, options)
    with jax.set_mesh(_mesh(*mesh)):
        got = _results(getattr(sharding, name), inputs, options)
    _assert_close(got, wanted)


@pytest.mark.parametrize("name", OPERATIONS)
def test_kernels_see_the_arrays_of_one_device(name, monkeypatch):
    seen = {}
    operation = getattr(pallas_kernels, name)

    def spy(**arguments):
        seen.update({key: x.shape for key, x in arguments.items() if hasattr(x, "shape")})
        return operation(**arguments)

    monkeypatch.setattr(pallas_kernels, name, spy)
    inputs, options = OPERATIONS[name][0](8)
    with jax.set_mesh(_mesh()):
        outputs = jax.jit(lambda inputs: getattr(sharding, name)(**inputs, **options))(inputs)
    cuts = {"B": 4, "E": 2, "H": 2, "G": 2}
    arrays = inputs | {key: x for key, x in options.items() if hasattr(x, "shape")}
    for key, array in arrays.items():
        letters = key.rsplit("_", 1)[1]
        wanted = tuple(
            n // cuts.get(letter, 1) for letter, n in zip(letters, array.shape, strict=True)
        )
        assert seen[key] == wanted, key
    for output, key in zip(outputs, OPERATIONS[name][1], strict=True):
        assert output.sharding.spec[0] == sharding.BATCH, key


def test_optional_inputs_may_be_missing():
    inputs, _ = _scan_inputs(4)
    inputs = {key: inputs[key] for key in ("x_BLE", "dt_BLE", "a_EN", "b_BLN", "c_BLN", "d_E")}
    wanted = _results(pallas_kernels.selective_scan, inputs, {})
    with jax.set_mesh(_mesh()):
        _assert_close(_results(sharding.selective_scan, inputs, {}), wanted)
