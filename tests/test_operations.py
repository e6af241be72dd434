"""Operations on meshes equal those on one device, outputs and gradients."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from bmojo_jax import context, hlo, layers, model, operations, paths, sharding
from bmojo_jax.config import MeshConfig
from pallas_kernels.innovation.api import TAPS
from tests.models import small_config


def _mesh(data=2, fsdp=2, context=1, tensor=2):
    count = data * fsdp * context * tensor
    sizes = MeshConfig(data=data, fsdp=fsdp, context=context, tensor=tensor)
    return sharding.make_mesh(sizes, jax.devices()[:count])


def _normal(*shape):
    return jnp.asarray(np.random.default_rng(shape).normal(size=shape), jnp.float32)


def _positions(B, L):
    """Some rows of one document, some of several; one starts with a token of its own."""
    starts = np.random.default_rng(0).uniform(size=(B, L)) < 0.1
    starts[::2] = False
    starts[:, 0] = True
    starts[-1, 1] = True
    first = np.maximum.accumulate(np.where(starts, np.arange(L)[None, :], 0), axis=1)
    return jnp.asarray(np.arange(L)[None, :] - first, jnp.int32)


def _scan(B, L, E=4, N=3, *, state):
    inputs = {
        "x_BLE": _normal(B, L, E),
        "dt_BLE": _normal(1, B, L, E)[0],
        "a_EN": -jnp.exp(_normal(E, N)),
        "b_BLN": _normal(B, L, N),
        "c_BLN": _normal(1, B, L, N)[0],
        "d_E": _normal(E),
        "z_BLE": _normal(2, B, L, E)[0],
        "dt_bias_E": _normal(1, E)[0] - 2,
    }
    reset_BL = _positions(B, L) == 0
    if state:
        inputs["h0_BEN"] = _normal(B, E, N)
        reset_BL = reset_BL.at[:, 0].set(False)
    return inputs, {"reset_BL": reset_BL}


def _attention(B, L, H=4, G=2, K=4, M=2, *, window, fading_window=0, chunk=None, packed=True):
    keys = ["k_BLGK", "v_BLGK", *(["fading_k_BLGK", "fading_v_BLGK"] if fading_window else [])]
    inputs = {name: _normal(i + 1, B, L, G, K)[i] for i, name in enumerate(keys)}
    inputs["q_BLHK"] = _normal(B, L, H, K)
    options = {"window": window, "fading_window": fading_window}
    if chunk:
        Z = -(-L // chunk)
        inputs["eidetic_k_BZMGK"] = _normal(B, Z, M, G, K)
        inputs["eidetic_v_BZMGK"] = _normal(1, B, Z, M, G, K)[0]
        inputs["eidetic_bias_BZHM"] = _normal(B, Z, H, M)
        valid = np.random.default_rng(0).uniform(size=(B, Z, M)) < 0.7
        options |= {"eidetic_valid_BZM": jnp.asarray(valid), "chunk": chunk}
    if packed:
        options["segment_ids_BL"] = layers.packed_documents(_positions(B, L)).segment_ids_BL
    return inputs, options


def _conv(B, L, E=4, T=4):
    inputs = {"x_BLE": _normal(B, L, E), "kernel_TE": _normal(T, E), "bias_E": _normal(E)}
    return inputs, {"positions_BL": _positions(B, L)}


def _innovation(B, L, D=3):
    return {"s_BLD": _normal(B, L, D)}, {"positions_BL": _positions(B, L)}


def _heads(B, L, H=4, K=6, *, normed=True):
    inputs = {"x_BLHK": _normal(B, L, H, K)}
    options = {"positions_BL": _positions(B, L), "theta": 10.0, "eps": 1e-3}
    scale = {"scale_K": _normal(K) if normed else None}
    return (inputs | scale, options) if normed else (inputs, options | scale)


def _remember(B, L, *, size=3, window=3, chunk=3):
    inputs = {"e_BL": jnp.square(_normal(B, L)), "k_BLGK": _normal(B, L, 2, 2)}
    options = {"window": window, "chunk": chunk, "size": size}
    return inputs, options | {"start_BL": layers.packed_documents(_positions(B, L)).start_BL}


def _remembered(e_BL, k_BLGK, start_BL, **options):
    tokens = {"e_BL": e_BL, "k_BLGK": k_BLGK}
    kept = operations.remember(e_BL, start_BL, tokens, **options)
    k_BZMGK = jnp.where(kept.valid_BZM[..., None, None], kept.tokens["k_BLGK"], 0)
    e_BZM = jnp.where(kept.valid_BZM, kept.tokens["e_BL"], 0)
    return k_BZMGK, e_BZM, kept.index_BZM, kept.valid_BZM.astype(jnp.int32)


ALONE = {
    "remember": _remembered,
    "scan": pallas_kernels.selective_scan,
    "attention": pallas_kernels.memory_attention,
    "conv": functools.partial(pallas_kernels.causal_convs, uses=2),
    "innovation": pallas_kernels.innovation,
    "heads": pallas_kernels.norm_rotary,
}
ON_MESH = {
    "remember": _remembered,
    "scan": operations.selective_scan,
    "attention": operations.memory_attention,
    "conv": functools.partial(operations.causal_convs, uses=2),
    "innovation": operations.innovation,
    "heads": operations.norm_rotary,
}
CASES = {
    "scan": lambda B, L: _scan(B, L, state=False),
    "scan from a state": lambda B, L: _scan(B, L, state=True),
    "conv": _conv,
    "innovation": _innovation,
    "heads": _heads,
    "heads, not normed": lambda B, L: _heads(B, L, normed=False),
    "remember": _remember,
    "remember, a long window": lambda B, L: _remember(B, L, window=8),
    "remember, many": lambda B, L: _remember(B, L, window=1, size=20),
    "remember, single tokens": lambda B, L: _remember(B, L, window=2, size=2, chunk=1),
    "attention": lambda B, L: _attention(B, L, window=3, fading_window=2, chunk=3),
    "attention in a window": lambda B, L: _attention(B, L, window=5, packed=False),
    "attention to all": lambda B, L: _attention(B, L, window=L),
    "attention to all, remembering": lambda B, L: _attention(B, L, window=L, chunk=3),
    "attention, one document": lambda B, L: _attention(
        B, L, window=2, fading_window=9, chunk=3, packed=False
    ),
}


def _results(operation, inputs, options):
    """All outputs, and the gradient of every input from a loss that weighs them at random."""

    def loss(inputs):
        outputs = operation(**inputs, **options)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
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
UNCUT = [((2, 2, 1, 2), 8, 10), ((1, 2, 1, 4), 8, 10), ((2, 2, 1, 2), 3, 10)]
# Pieces of 6 tokens are longer than what some tokens see, those of 3 shorter; 13 are not cut.
CUT = [((2, 1, 4, 1), 2, 24), ((1, 1, 8, 1), 2, 24), ((1, 2, 2, 2), 2, 24), ((1, 1, 4, 2), 2, 13)]


# The others differ from one of these in sizes only.
MAIN = ("scan", "conv", "innovation", "heads", "remember", "attention", "attention to all")


def _cases():
    for case in CASES:
        if case in ("scan from a state", "attention"):
            yield from (pytest.param(case, *mesh) for mesh in UNCUT)
        marks = [] if case in MAIN else [pytest.mark.slow]
        yield pytest.param(case, *CUT[0], marks=marks)
        yield pytest.param(case, *CUT[1], marks=pytest.mark.slow)
        if case in ("scan", "attention", "heads", "remember"):
            yield from (pytest.param(case, *mesh, marks=pytest.mark.slow) for mesh in CUT[2:])


@pytest.mark.parametrize(("case", "mesh", "B", "L"), list(_cases()))
def test_operations_on_a_mesh(case, mesh, B, L):
    name = re.split("[ ,]", case)[0]
    inputs, options = CASES[case](B, L)
    wanted = _results(ALONE[name], inputs, options)
    with jax.set_mesh(_mesh(*mesh)):
        got = _results(ON_MESH[name], inputs, options)
    _assert_close(got, wanted)


@pytest.mark.parametrize("case", ["scan from a state", "scan", "attention"])
@pytest.mark.parametrize("pieces", [1, 2])
def test_kernels_see_the_arrays_of_one_device(case, pieces, monkeypatch):
    seen = {}
    name = {"scan": "selective_scan", "attention": "memory_attention"}[case.split()[0]]
    operation = getattr(pallas_kernels, name)

    def spy(**arguments):
        seen.update({key: x.shape for key, x in arguments.items() if hasattr(x, "shape")})
        return operation(**arguments)

    monkeypatch.setattr(pallas_kernels, name, spy)
    inputs, options = CASES[case](8, 12)
    with jax.set_mesh(_mesh(fsdp=2 // pieces, context=pieces)):
        outputs = jax.jit(lambda inputs: ON_MESH[case.split()[0]](**inputs, **options))(inputs)
    cuts = {"B": 4 // pieces, "E": 2, "H": 2, "G": 2}
    lengths = {"L": 12, "Z": 4}
    if case != "scan from a state":  # attention has 4 tokens before a piece, made 2 chunks
        more = {"scan": 0, "attention": 6}[case] if pieces > 1 else 0
        lengths = {"L": 12 // pieces + more, "Z": (12 // pieces + more) // 3}
    arrays = inputs | {key: x for key, x in options.items() if hasattr(x, "shape")}
    for key, array in arrays.items():
        letters = key.rsplit("_", 1)[1]
        wanted = tuple(
            lengths.get(letter, n // cuts.get(letter, 1))
            for letter, n in zip(letters, array.shape, strict=True)
        )
        assert seen[key] == wanted, key
    for output in outputs:
        assert output.sharding.spec[0] == (sharding.BATCH if pieces == 1 else "data")


def test_optional_inputs_may_be_missing():
    inputs, _ = _scan(4, 8, state=False)
    inputs = {key: inputs[key] for key in ("x_BLE", "dt_BLE", "a_EN", "b_BLN", "c_BLN", "d_E")}
    wanted = _results(pallas_kernels.selective_scan, inputs, {})
    for mesh in (_mesh(), _mesh(fsdp=1, context=2)):
        with jax.set_mesh(mesh):
            _assert_close(_results(operations.selective_scan, inputs, {}), wanted)


def _received(function, *arguments):
    """Bytes that a device receives, by kind of collective, each counted once."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    total = {}
    for kind, received, _ in hlo.collectives(text):
        total[kind] = total.get(kind, 0) + received
    return total


PIECES, ROWS = 4, 2
# What the docstring of context.py says, for float32 and the sizes of CASES.
FORMULAS = {
    "conv": {"collective-permute": 4 * ROWS * (4 - 1) * 4},
    "innovation": {"collective-permute": 4 * ROWS * TAPS * 3},
    "scan": {"all-gather": 4 * (PIECES - 1) * ROWS * 4 * (3 + 1)},
    "attention": {
        "collective-permute": 4 * ROWS * (2 * (3 - 1) + 2 * (3 + 2 - 1)) * 2 * 4 + 4 * ROWS * 4
    },
    "remember": {  # keys of 2 x 2 alone
        "collective-permute": 4 * ROWS * (5 * (2 * 2 + 1) + 6),
        "all-gather": 4 * (PIECES - 1) * ROWS * 3 * (2 * 2 + 3),
    },
}


@pytest.mark.parametrize("case", FORMULAS)
def test_what_is_exchanged_is_what_the_formula_says(case):
    mesh = _mesh(data=1, fsdp=1, context=PIECES, tensor=1)
    for L in (36, 72):
        inputs, options = CASES[case](ROWS, L)
        numbers = {name: x for name, x in options.items() if isinstance(x, int)}
        inputs |= {name: x for name, x in options.items() if name not in numbers}
        placed = {}
        for name, x in inputs.items():
            letters = name.rsplit("_", 1)[1]
            spec = [sharding.CONTEXT if letter in "LZ" else None for letter in letters]
            placed[name] = jax.device_put(x, jax.NamedSharding(mesh, jax.P(*spec)))

        def run(inputs, numbers=numbers):
            out = ON_MESH[case](**inputs, **numbers)
            return out.y_BLE if case == "scan" else out

        with jax.set_mesh(mesh):
            assert _received(run, placed) == FORMULAS[case], L


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["bmojo+mlp", "mamba", "swa"])
def test_the_gradient_of_a_layer_exchanges_no_more_for_longer_rows(pattern):
    config = small_config(pattern=pattern, depth=1, compute_dtype="float32")
    params = model.init_params(config, jax.random.key(0))["groups"]["0"]
    params = jax.tree.map(lambda x: x[0], params)

    def loss(params, x_BLD, positions_BL):
        block = model.bind_block(config, 0, params)
        out_BLD, _ = block(x_BLD, layers.packed_documents(positions_BL), statistics=False)
        return jnp.square(out_BLD).sum()

    mesh = _mesh(data=1, fsdp=1, context=PIECES, tensor=1)
    by_token = jax.NamedSharding(mesh, jax.P(None, sharding.CONTEXT))
    measured = []
    with jax.set_mesh(mesh):
        for L in (64, 128):
            x_BLD = jax.device_put(_normal(ROWS, L, config.width), by_token)
            positions_BL = jax.device_put(_positions(ROWS, L), by_token)
            gradient = jax.value_and_grad(loss, argnums=(0, 1))
            measured.append(_received(gradient, params, x_BLD, positions_BL))
    assert measured[0] == measured[1]
    assert measured[0]["collective-permute"] > 0


def test_halo_crosses_several_pieces():
    x_BL = jnp.arange(1, 17)[None, :]
    mesh = _mesh(data=1, fsdp=1, context=8, tensor=1)
    with jax.set_mesh(mesh):
        halos = jax.jit(
            jax.shard_map(
                lambda x: context.halo(x, 5),
                in_specs=jax.P(None, "context"),
                out_specs=jax.P(None, "context"),
                check_vma=False,
            )
        )(x_BL)
    wanted = [[max(2 * i - 4 + j, 0) for j in range(5)] for i in range(8)]
    assert np.asarray(halos).reshape(8, 5).tolist() == wanted
