"""The TPU kernels of the memory attention: interpreted, on a simulated memory, and compiled."""

import importlib.util
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, Mesh, NamedSharding, PartitionSpec

# Whether races were found is told nowhere else.
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as simulator  # isort: skip

from bmojo_jax import topologies
from pallas_kernels import Unsupported, dispatch, memory_attention
from pallas_kernels.memory_attention import pallas_tpu
from pallas_kernels.memory_attention.tpu_tiles import Stream, cut, whole
from pallas_kernels.rotary import rotary
from pallas_kernels.shapes import ATTENTION_CASES, AttentionShape
from tests.pallas_kernels.test_memory_attention import (
    Arrays,
    assert_close,
    attend,
    draw,
    outputs_and_gradients,
)
from tests.tolerances import relative_rms

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
V5E = AbstractDevice("TPU v5 lite", None, platform="tpu")

without_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, which compiles for TPUs, is not installed",
)

SIZES = [f"{part}_{what}" for part in ("forward", "dq", "dkv") for what in ("queries", "keys")]
LEAST_TILES = dict.fromkeys(SIZES, 128)
UNEQUAL_TILES = LEAST_TILES | {"forward_queries": 256, "dq_keys": 256, "dkv_queries": 256}

# All B, L, H, G, K, W, F, M, C. In turn: every size odd; borders within and at the borders of
# tiles; no multiple of anything, tiles inside the bands; full attention; no fading; no memory; more
# slots than keys; several memories in a tile; one token.
SHAPES = {
    "primes": AttentionShape(2, 29, 6, 2, 32, 5, 7, 3, 11),
    "aligned": AttentionShape(1, 512, 2, 1, 32, 128, 256, 64, 128),
    "inside": AttentionShape(1, 701, 2, 2, 32, 401, 283, 5, 100),
    "full": AttentionShape(1, 300, 4, 2, 32, 1000, 0, 5, 70),
    "no_fading": AttentionShape(2, 140, 2, 1, 64, 9, 0, 150, 130),
    "no_memory": AttentionShape(1, 270, 4, 4, 32, 70, 90, 0, 1),
    "window_only": AttentionShape(1, 270, 2, 1, 32, 1, 0, 0, 1),
    "least_chunks": AttentionShape(1, 131, 2, 2, 32, 3, 3, 2, 1),
    "one_token": AttentionShape(2, 1, 2, 1, 32, 1, 1, 2, 1),
}


def expected(floats: Arrays, options: Arrays, **more: Any) -> dict[str, Any]:
    """The reference in float64, of the same values."""
    with jax.enable_x64(True):
        floats = {name: array.astype("float64") for name, array in floats.items()}
        results = outputs_and_gradients(floats, options, "reference", **more)
        return {name: np.asarray(array) for name, array in results.items()}


def assert_equal(got: dict[str, Any], want: dict[str, Any]) -> None:
    assert got.keys() == want.keys()
    errors = {name: relative_rms(got[name], want[name]) for name in want}
    assert max(errors.values()) <= 1e-6, errors


def documents(shape: AttentionShape) -> jax.Array:
    """Long enough that some of them reach over every stream."""
    return jnp.asarray(np.arange(shape.L)[None] >= np.asarray([[shape.L // 5]] * shape.B), "int32")


def check(rng: np.random.Generator, name: str, tiles: dict[str, int], segments: bool) -> None:
    floats, options = draw(rng, SHAPES[name], segments=False)
    if segments:
        options["segment_ids_BL"] = documents(SHAPES[name])
    got = outputs_and_gradients(floats, options, "pallas_tpu", blocks=tiles)
    assert_equal(got, expected(floats, options))


def test_kernels_equal_float64(rng: np.random.Generator) -> None:
    check(rng, "primes", {}, segments=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tiles", "segments"),
    [({}, False), (LEAST_TILES, True), (UNEQUAL_TILES, False)],
    ids=["own_tiles", "least_tiles_documents", "unequal_tiles"],
)
@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_equals_float64(
    rng: np.random.Generator, name: str, tiles: dict[str, int], segments: bool
) -> None:
    check(rng, name, tiles, segments)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["primes", "inside"])
def test_bfloat16(rng: np.random.Generator, name: str) -> None:
    floats, options = draw(rng, SHAPES[name], "bfloat16", segments=False)
    got = outputs_and_gradients(floats, options, "pallas_tpu", blocks=LEAST_TILES)
    for array_name, array in got.items():
        assert array.dtype == (jnp.float32 if array_name == "lse" else jnp.bfloat16), array_name
    assert_close(got, outputs_and_gradients(floats, options, "reference"), "bfloat16")


@pytest.mark.slow
def test_no_bias_and_any_scale(rng: np.random.Generator) -> None:
    floats, options = draw(rng, SHAPES["primes"])
    del floats["eidetic_bias_BZHM"]
    for scale in (-0.5, 0.05):
        got = outputs_and_gradients(floats, options, "pallas_tpu", scale=scale)
        assert_equal(got, expected(floats, options, scale=scale))


@pytest.mark.slow
def test_padding_is_not_nan(rng: np.random.Generator) -> None:
    """Rows of padding have no lse of their own, and a bias beyond the range of exp."""
    floats, options = draw(rng, SHAPES["primes"])
    floats["eidetic_bias_BZHM"] = jnp.abs(floats["eidetic_bias_BZHM"]) * 200
    got = outputs_and_gradients(floats, options, "pallas_tpu")
    assert all(np.isfinite(np.asarray(array)).all() for array in got.values())
    errors = {n: relative_rms(got[n], a) for n, a in expected(floats, options).items()}
    assert errors["o"] <= 1e-4, errors


@pytest.mark.slow
def test_vmap_equals_a_loop(rng: np.random.Generator) -> None:
    floats, options = draw(rng, SHAPES["primes"])
    more, _ = draw(rng, SHAPES["primes"])
    stacked = jax.tree.map(lambda *a: jnp.stack(a), floats, more)

    def run(floats: Arrays) -> dict[str, jax.Array]:
        return outputs_and_gradients(floats, options, "pallas_tpu")

    assert_equal(jax.vmap(run)(stacked), jax.lax.map(run, stacked))


@pytest.mark.slow
def test_no_races(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing reads memory that was never written (it holds NaN), is out of bounds, or is on its
    way; the order of heads and tiles changes no bit."""
    shape = AttentionShape(2, 300, 2, 1, 32, 130, 100, 5, 100)
    floats, options = draw(rng, shape, segments=False)
    options["segment_ids_BL"] = documents(shape)
    want = expected(floats, options)
    monkeypatch.setattr(dispatch, "interpreted", lambda wanted: False)
    real, runs = pl.pallas_call, []
    for seed in (0, 1):
        settings = pltpu.InterpretParams(detect_races=True, random_seed=seed)

        def pallas_call(*args: Any, settings: Any = settings, **kwargs: Any) -> Any:
            return real(*args, **kwargs | {"interpret": settings})

        monkeypatch.setattr(pallas_tpu.pl, "pallas_call", pallas_call)
        jax.clear_caches()
        runs.append(outputs_and_gradients(floats, options, "pallas_tpu", blocks=LEAST_TILES))
        assert simulator.races is not None and not simulator.races.races_found
    assert_equal(runs[0], want)
    for name in want:
        np.testing.assert_array_equal(runs[0][name], runs[1][name], err_msg=name)


STREAMS = [(0, 0), (0, 127), (0, 128), (0, 300), (1, 1), (77, 500), (128, 255), (256, 639)]


@pytest.mark.parametrize(("queries", "keys"), [(128, 128), (256, 128), (128, 256), (384, 256)])
@pytest.mark.parametrize(("near", "far"), STREAMS)
def test_tiles_of_a_band(near: int, far: int, queries: int, keys: int) -> None:
    """Both ways over the tiles see every pair of the band once, and nothing else."""
    L = 768
    stream = Stream("", near, far, L // keys, keys)
    query, key = np.arange(L)[:, None], np.arange(L)[None]
    band = (query - key >= near) & (query - key <= far)

    def tile(i: int, j: int, by_keys: bool) -> np.ndarray:
        offset = i * queries - j * keys
        seen = np.zeros((keys, queries) if by_keys else (queries, keys), int)
        low, high = near - offset, far - offset
        if by_keys:
            low, high = -high, -low
        inside = stream.inside(offset, queries)
        assert not inside or stream.has_inside(queries)
        assert inside != (offset in stream.borders(queries, L // queries))
        for strip in (whole if inside else cut)(*seen.shape, *(() if inside else (low, high))):
            for begin, end, least, most in strip.pieces:
                difference = np.arange(L)[strip.rows, None] - np.arange(begin, end)[None]
                visible = np.ones(difference.shape, bool)
                visible &= True if least is None else difference >= least
                visible &= True if most is None else difference <= most
                assert visible.any() or queries != keys
                seen[strip.rows, begin:end] += visible
        return seen.T if by_keys else seen

    for by_keys in (False, True):
        total = np.zeros((L, L), int)
        outer = range(L // (keys if by_keys else queries))
        for one in outer:
            if by_keys:
                first, last = stream.query_tiles(np.asarray(one), queries, L // queries)
            else:
                first, last = stream.key_tiles(np.asarray(one), queries)
            for other in range(int(first), int(last) + 1):
                i, j = (other, one) if by_keys else (one, other)
                part = tile(i, j, by_keys)
                assert part.any()
                total[i * queries :, j * keys :][:queries, :keys] += part
        np.testing.assert_array_equal(total, band)


@pytest.mark.parametrize(
    ("M", "C", "L"), [(3, 11, 300), (64, 256, 700), (200, 7, 150), (1, 1, 256)]
)
def test_tiles_of_memories(M: int, C: int, L: int) -> None:
    Z = -(-L // C)
    Q = S = 128
    stream = Stream("memory_", 0, C - 1, -(-Z * M // S), S, per=M, step=C)
    sees = np.arange(L)[:, None] // C == np.arange(Z * M)[None] // M
    count = -(-L // Q)
    for i, j in itertools.product(range(count), range(stream.tiles)):
        any_seen = sees[i * Q : (i + 1) * Q, j * S : (j + 1) * S].any()
        first, last = stream.key_tiles(np.asarray(i), Q)
        # Padding of the last chunk's queries and slots counts as seen.
        assert (first <= j <= last) == any_seen or i == count - 1
        first, last = stream.query_tiles(np.asarray(j), Q, count)
        assert (first <= i <= last) == any_seen or j == stream.tiles - 1


def loss_and_arguments(shape: AttentionShape, sharding: Any = None, L: int | None = None) -> Any:
    L = shape.L if L is None else L
    B, H, G, K, M = shape.B, shape.H, shape.G, shape.K, shape.eidetic
    Z = -(-L // shape.chunk)

    def array(*sizes: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((B, *sizes), dtype, sharding=sharding)

    arrays = {"q_BLHK": array(L, H, K), "eidetic_bias_BZHM": array(Z, H, M, dtype=jnp.float32)}
    for name in ("k_BLGK", "v_BLGK", "fading_k_BLGK", "fading_v_BLGK"):
        arrays[name] = array(L, G, K)
    for name in ("eidetic_k_BZMGK", "eidetic_v_BZMGK"):
        arrays[name] = array(Z, M, G, K)
    others = {"eidetic_valid_BZM": array(Z, M, dtype=jnp.bool_)}
    others |= {"segment_ids_BL": array(L, dtype=jnp.int32)}

    def loss(arrays: Arrays, others: Arrays, **blocks: int) -> jax.Array:
        out = memory_attention(
            **arrays,
            **others,
            window=shape.window,
            fading_window=shape.fading_window,
            chunk=shape.chunk,
            implementation="pallas_tpu",
            blocks=blocks,
        )
        return out.o_BLHK.astype(jnp.float32).sum() + out.lse_BLH.sum()

    return loss, (arrays, others)


PRODUCTION = [f"b1_l8192_g{G}_k{K}" for G in (4, 16) for K in (64, 128)]


@pytest.mark.parametrize(
    ("case", "x64"), [*((case, False) for case in PRODUCTION), (PRODUCTION[0], True)]
)
def test_lowers(case: str, x64: bool) -> None:
    with (
        jax.enable_x64(x64),
        jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=V5E)),
    ):
        loss, arguments = loss_and_arguments(ATTENTION_CASES[case])
        forward, gradient = (
            jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",)).as_text()
            for function in (loss, jax.grad(loss))
        )
    assert forward.count("tpu_custom_call") == 1
    # Forward; by queries, and by keys of three streams.
    assert gradient.count("tpu_custom_call") == 5


@pytest.mark.slow
@without_libtpu
@pytest.mark.parametrize("case", PRODUCTION)
@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_compiles(chip: str, case: str) -> None:
    devices = topologies.devices(TOPOLOGIES[chip])[:1]
    sharding = NamedSharding(Mesh(np.array(devices), ("one",)), PartitionSpec())
    shape = ATTENTION_CASES[case]
    loss, arguments = loss_and_arguments(shape, sharding)
    with topologies.compiling_for(devices):
        traced = jax.jit(jax.grad(loss)).trace(*arguments)
    compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    # q, do, o, dq and their transposes; the logits alone would take 4 GiB.
    assert compiled.memory_analysis().temp_size_in_bytes < 2**29


@pytest.mark.slow
@without_libtpu
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_projections_write_what_the_kernels_read(chip: str) -> None:
    """No copy of queries, keys or values, if they are made heads first."""
    devices = topologies.devices(TOPOLOGIES[chip])[:1]
    sharding = NamedSharding(Mesh(np.array(devices), ("one",)), PartitionSpec())
    B, L, H, K, D = 1, 8192, 16, 64, 1024

    def array(*sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, jnp.bfloat16, sharding=sharding)

    def mixer(x_BLD: jax.Array, kernels: list[jax.Array], o_HKD: jax.Array) -> jax.Array:
        q, k, v, fading_k, fading_v = (
            jnp.einsum("BLD,DHK->BHLK", x_BLD, kernel).swapaxes(1, 2) for kernel in kernels
        )
        positions_BL = jnp.arange(L)[None]
        q, k, fading_k = (rotary(each, positions_BL, 1e4) for each in (q, k, fading_k))
        out = memory_attention(
            q,
            k,
            v,
            fading_k_BLGK=fading_k,
            fading_v_BLGK=fading_v,
            window=512,
            fading_window=512,
            implementation="pallas_tpu",
        )
        return jnp.einsum("BLHK,HKD->BLD", out.o_BLHK, o_HKD)

    with topologies.compiling_for(devices):
        traced = jax.jit(mixer).trace(array(B, L, D), [array(D, H, K)] * 5, array(H, K, D))
    text = traced.lower(lowering_platforms=("tpu",)).compile().as_text()
    assert "memory_attention_forward_kernel" in text
    copies = re.findall(rf"= (\w+\[[\d,]*\b{L}\b[\d,]*\])\S* copy\(", text)
    assert not [shape for shape in copies if f"{H},{K}" in shape], copies


def test_refusals(rng: np.random.Generator) -> None:
    floats, options = draw(rng, AttentionShape(1, 5, 1, 1, 48, 2, 0, 0, 1), segments=False)
    with pytest.raises(Unsupported, match=r"K=48 must be one of \(32, 64, 128, 256\)"):
        attend(floats, options, "pallas_tpu")
    floats, options = draw(rng, AttentionShape(1, 5, 1, 1, 32, 2, 0, 0, 1), "float16", False)
    with pytest.raises(Unsupported, match=r"float16.* must be float32 or bfloat16"):
        attend(floats, options, "pallas_tpu")
    floats = {name: array.astype("float32") for name, array in floats.items()}
    with pytest.raises(ValueError, match=r"dq_keys'\]=64 must be a multiple of 128"):
        attend(floats, options, "pallas_tpu", blocks={"dq_keys": 64})
    with pytest.raises(ValueError, match="'keys'; it takes"):
        attend(floats, options, "pallas_tpu", blocks={"keys": 128})


def test_too_large_tiles_are_refused() -> None:
    loss, arguments = loss_and_arguments(ATTENTION_CASES["b1_l8192_g4_k128"])
    with (
        jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=V5E)),
        pytest.raises(Unsupported, match=r"dkv_queries=2048 and dkv_keys=4096 need \d+ MiB"),
    ):
        jax.eval_shape(lambda *args: loss(*args, dkv_queries=2048, dkv_keys=4096), *arguments)
