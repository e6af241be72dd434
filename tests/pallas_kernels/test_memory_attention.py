"""Attention over three memories: implementations against the reference, and what must hold."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels import AttentionOutput, Unsupported, memory_attention
from pallas_kernels.shapes import ATTENTION_CASES, AttentionShape
from tests.tolerances import TOLERANCE, relative_rms

BACKENDS = ("xla",)
# Kernels, which run interpreted here, in small tiles. They refuse float64.
KERNELS = ("pallas_triton",)
BLOCKS: Mapping[str, dict[str, int]] = {
    "xla": {"queries": 8},
    "pallas_triton": {
        f"{part}_{what}": 16 for part in ("forward", "dq", "dkv") for what in ("queries", "keys")
    },
}
# Interpreting a kernel takes seconds to compile.
ALL = [*BACKENDS, *(pytest.param(name, marks=pytest.mark.slow) for name in KERNELS)]
EVERY = ["reference", *ALL]
# Those for TPUs, which have tests of their own, take heads of these widths only.
WITH_TPU = [*EVERY, pytest.param("pallas_tpu", marks=pytest.mark.slow)]
TPU_WIDTH = 32
SMALL = [name for name, shape in ATTENTION_CASES.items() if shape.L < 100]
# Every stream, a border of every kind crossed several times, heads shared.
SHAPE = AttentionShape(B=2, L=23, H=4, G=2, K=4, window=3, fading_window=4, eidetic=3, chunk=5)

Arrays = dict[str, Any]


def draw(
    rng: np.random.Generator, shape: AttentionShape, dtype: str = "float32", segments: bool = True
) -> tuple[Arrays, Arrays]:
    """Random operands: the float arrays, by name, and the other options."""
    B, L, H, G, K, M = shape.B, shape.L, shape.H, shape.G, shape.K, shape.eidetic
    Z = -(-L // shape.chunk)

    def normal(*sizes: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(sizes), dtype)

    floats = {"q_BLHK": normal(B, L, H, K), "k_BLGK": normal(B, L, G, K)}
    floats["v_BLGK"] = normal(B, L, G, K)
    options: Arrays = {"window": shape.window, "fading_window": shape.fading_window}
    if shape.fading_window:
        floats |= {"fading_k_BLGK": normal(B, L, G, K), "fading_v_BLGK": normal(B, L, G, K)}
    if M:
        floats |= {"eidetic_k_BZMGK": normal(B, Z, M, G, K)}
        floats |= {"eidetic_v_BZMGK": normal(B, Z, M, G, K)}
        floats |= {"eidetic_bias_BZHM": normal(B, Z, H, M)}
        options["eidetic_valid_BZM"] = jnp.asarray(rng.random((B, Z, M)) < 0.7)
        options["chunk"] = shape.chunk
    if segments:
        starts = rng.random((B, L)) < 0.1
        options["segment_ids_BL"] = jnp.asarray(np.cumsum(starts, axis=1), jnp.int32)
    return floats, options


def attend(floats: Arrays, options: Arrays, implementation: str, **more: Any) -> AttentionOutput:
    return jax.jit(
        lambda floats: memory_attention(**floats, **options, **more, implementation=implementation)
    )(floats)


def cotangents(floats: Arrays) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    shape = floats["q_BLHK"].shape
    return rng.standard_normal(shape), rng.standard_normal(shape[:3])


def outputs_and_gradients(
    floats: Arrays, options: Arrays, implementation: str, *, d_lse: bool = True, **more: Any
) -> dict[str, jax.Array]:
    """o, lse and the gradient of every float operand through both of them, or through o alone."""
    d_o, d_lse_BLH = cotangents(floats)
    d_lse_BLH *= d_lse

    @jax.jit
    def run(floats: Arrays) -> tuple[AttentionOutput, Arrays]:
        out, pull = jax.vjp(lambda x: attend(x, options, implementation, **more), floats)
        cotangent = AttentionOutput(
            jnp.asarray(d_o, out.o_BLHK.dtype), jnp.asarray(d_lse_BLH, out.lse_BLH.dtype)
        )
        return out, pull(cotangent)[0]

    out, gradients = run(floats)
    return {"o": out.o_BLHK, "lse": out.lse_BLH, **{f"d {n}": g for n, g in gradients.items()}}


def assert_close(got: dict[str, Any], want: dict[str, Any], dtype: str) -> None:
    assert got.keys() == want.keys()
    errors = {name: relative_rms(got[name], want[name]) for name in want}
    assert max(errors.values()) <= TOLERANCE[dtype], errors


@pytest.mark.parametrize(
    ("case", "segments"), [*((case, True) for case in SMALL), ("wide", False), ("full", False)]
)
@pytest.mark.parametrize("implementation", BACKENDS)
def test_equals_reference_in_float64(
    rng: np.random.Generator, implementation: str, case: str, segments: bool
) -> None:
    with jax.enable_x64(True):
        floats, options = draw(rng, ATTENTION_CASES[case], "float64", segments)
        want = outputs_and_gradients(floats, options, "reference")
        got = outputs_and_gradients(floats, options, implementation, blocks={"queries": 7})
        assert all(array.dtype == jnp.float64 for array in got.values())
        assert_close(got, want, "float64")


@pytest.mark.parametrize("case", ["one_token", "primes", "wide"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("implementation", ALL)
def test_equals_reference(
    rng: np.random.Generator, implementation: str, dtype: str, case: str
) -> None:
    floats, options = draw(rng, ATTENTION_CASES[case], dtype)
    want = outputs_and_gradients(floats, options, "reference")
    got = outputs_and_gradients(floats, options, implementation, blocks=BLOCKS[implementation])
    for name, array in got.items():
        assert array.dtype == (jnp.float32 if name == "lse" else dtype), name
    assert_close(got, want, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("case", SMALL)
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_equals_float64(rng: np.random.Generator, kernel: str, case: str) -> None:
    floats, options = draw(rng, ATTENTION_CASES[case])
    got = outputs_and_gradients(floats, options, kernel, blocks=BLOCKS[kernel])
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda v: jnp.asarray(np.asarray(v), "float64"), floats)
        want = outputs_and_gradients(wide, options, "reference")
    assert got.keys() == want.keys()
    # Relative to the rounding of their terms, gradients that should vanish do.
    errors = {n: np.linalg.norm(np.asarray(got[n]) - np.asarray(want[n])) for n in want}
    sizes = {n: max(1e-2, float(np.linalg.norm(np.asarray(want[n])))) for n in want}
    assert all(errors[n] < 2e-6 * sizes[n] for n in want), (errors, sizes)


@pytest.mark.parametrize("queries", [1, 5, 12, 64])
def test_does_not_depend_on_block_sizes(rng: np.random.Generator, queries: int) -> None:
    with jax.enable_x64(True):
        floats, options = draw(rng, SHAPE, "float64")
        want = outputs_and_gradients(floats, options, "xla")
        got = outputs_and_gradients(floats, options, "xla", blocks={"queries": queries})
        assert_close(got, want, "float64")


@pytest.mark.parametrize("implementation", BACKENDS)
def test_large_logits(rng: np.random.Generator, implementation: str) -> None:
    with jax.enable_x64(True):
        floats, options = draw(rng, SHAPE, "float64")
        want = outputs_and_gradients(floats, options, "reference", scale=1e3)
        got = outputs_and_gradients(floats, options, implementation, scale=1e3)
        assert_close(got, want, "float64")


def test_padding_is_not_nan(rng: np.random.Generator) -> None:
    """Three blocks of 10 queries for 23 tokens: the last rows see no key. Not under jit, where
    only what is returned would be looked at. A bias beyond the range of exp is no harm either."""
    floats, options = draw(rng, SHAPE)
    floats["eidetic_bias_BZHM"] *= 200
    options["eidetic_valid_BZM"] = options["eidetic_valid_BZM"].at[:, -1].set(False)

    def loss(floats: Arrays) -> jax.Array:
        out = memory_attention(**floats, **options, implementation="xla", blocks={"queries": 12})
        return out.o_BLHK.sum() + out.lse_BLH.sum()

    with jax.debug_nans(True):
        jax.grad(loss)(floats)


@pytest.mark.parametrize("implementation", EVERY)
def test_worked_example(rng: np.random.Generator, implementation: str) -> None:
    """W = F = 3: token 6 sees in-context {4, 5, 6} and fading {1, 2, 3}."""
    L = 8
    shape = AttentionShape(1, L, 1, 1, 2 * L, 3, 3, 0, 1)
    floats, options = draw(rng, shape, segments=False)
    one_hot = jnp.eye(2 * L)[None, :, None, :]
    floats |= {"v_BLGK": one_hot[:, :L], "fading_v_BLGK": one_hot[:, L:]}
    o = attend(floats, options, implementation).o_BLHK[0, :, 0]
    seen = [set(np.flatnonzero(row)) for row in np.asarray(o)]
    assert seen[6] == {4, 5, 6} | {L + 1, L + 2, L + 3}
    assert seen[3] == {1, 2, 3} | {L}
    assert seen[0] == {0}


@pytest.mark.parametrize("implementation", EVERY)
def test_first_token_sees_itself(rng: np.random.Generator, implementation: str) -> None:
    floats, options = draw(rng, SHAPE)
    # No memory is older than the first token.
    options["eidetic_valid_BZM"] = options["eidetic_valid_BZM"].at[:, 0].set(False)
    out = attend(floats, options, implementation)
    k_BHK, v_BHK = (jnp.repeat(floats[n][:, 0], 2, axis=1) for n in ("k_BLGK", "v_BLGK"))
    logit_BH = (floats["q_BLHK"][:, 0] * k_BHK).sum(-1) * SHAPE.K**-0.5
    np.testing.assert_allclose(out.o_BLHK[:, 0], v_BHK, rtol=1e-6)
    np.testing.assert_allclose(out.lse_BLH[:, 0], logit_BH, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", EVERY)
def test_gradients_reach_what_is_seen_and_nothing_else(
    rng: np.random.Generator, implementation: str
) -> None:
    shape = AttentionShape(1, 17, 2, 1, 4, 3, 4, 2, 5)
    floats, options = draw(rng, shape, segments=False)
    options["segment_ids_BL"] = jnp.asarray([[0] * 4 + [1] * 13])

    def reach(floats: Arrays) -> jax.Array:
        return attend(floats, options, implementation).o_BLHK.sum((0, 2, 3))

    jacobian = jax.jit(jax.jacrev(reach))(floats)
    touched = {
        name: np.asarray(jnp.abs(j).sum(range(3, j.ndim)) > 0)[:, 0] for name, j in jacobian.items()
    }
    i, j = np.arange(17)[:, None], np.arange(17)[None]
    document = (i < 4) == (j < 4)
    np.testing.assert_array_equal(touched["v_BLGK"], (j <= i) & (j > i - 3) & document)
    fading = (j <= i - 3) & (j > i - 7) & document
    np.testing.assert_array_equal(touched["fading_v_BLGK"], fading)
    # Only one key is seen by tokens 0 and 4: its weight is 1 whatever its logit.
    chunk = np.arange(4)[None]
    memory = (i // 5 == chunk) & ((i < 4) == (chunk == 0))
    memory &= np.asarray(options["eidetic_valid_BZM"])[0].any(-1)[None]
    np.testing.assert_array_equal(touched["eidetic_v_BZMGK"], memory)
    for kind in ("eidetic_k_BZMGK", "eidetic_bias_BZHM"):
        np.testing.assert_array_equal(touched[kind], memory)
    np.testing.assert_array_equal(touched["q_BLHK"].any(0), touched["q_BLHK"].diagonal())
    assert not (touched["q_BLHK"] & (i != j)).any()


def shape_for(implementation: str, shape: AttentionShape) -> AttentionShape:
    """A shape that the implementation takes."""
    return dataclasses.replace(shape, K=TPU_WIDTH) if implementation == "pallas_tpu" else shape


@pytest.mark.parametrize("implementation", WITH_TPU)
def test_fading_tokens_that_equal_the_tokens_widen_the_window(
    rng: np.random.Generator, implementation: str
) -> None:
    """The gradients of the two streams add up to those of the one."""
    floats, options = draw(rng, shape_for(implementation, SHAPE))
    wider = options | {"window": SHAPE.window + SHAPE.fading_window, "fading_window": 0}
    floats = {n: a for n, a in floats.items() if "fading" not in n}

    both = {"fading_k_BLGK": floats["k_BLGK"], "fading_v_BLGK": floats["v_BLGK"]}
    got = outputs_and_gradients(floats | both, options, implementation)
    for name in ("k_BLGK", "v_BLGK"):
        got[f"d {name}"] += got.pop(f"d fading_{name}")
    assert_close(got, outputs_and_gradients(floats, wider, implementation), "float32")


@pytest.mark.parametrize("window", [6, 23, 10**12], ids=["sliding", "full", "beyond"])
@pytest.mark.parametrize("implementation", WITH_TPU)
def test_equals_plain_attention(rng: np.random.Generator, implementation: str, window: int) -> None:
    shape = shape_for(implementation, AttentionShape(2, 23, 4, 2, 4, window, 0, 0, 1))
    floats, options = draw(rng, shape, segments=False)
    want = plain_attention(floats, None if window >= shape.L else window)
    got = outputs_and_gradients(floats, options, implementation, d_lse=False)
    del got["lse"]
    assert_close(got, want, "float32")


@pytest.mark.parametrize("implementation", WITH_TPU)
def test_a_window_of_everything_is_full_attention(
    rng: np.random.Generator, implementation: str
) -> None:
    """No token is old enough for the fading keys or for a memory, so neither is seen."""
    shape = dataclasses.replace(SHAPE, window=SHAPE.L)
    floats, options = draw(rng, shape_for(implementation, shape), segments=False)
    options["eidetic_valid_BZM"] = jnp.zeros_like(options["eidetic_valid_BZM"])
    got = outputs_and_gradients(floats, options, implementation, d_lse=False)
    del got["lse"]
    for name in [name for name in got if "fading" in name or "eidetic" in name]:
        np.testing.assert_array_equal(got.pop(name), 0, err_msg=name)
    assert_close(got, plain_attention(floats, None), "float32")


def plain_attention(floats: Arrays, window: int | None) -> dict[str, jax.Array]:
    """JAX's own attention over a sliding window, or over everything, and its gradients."""
    names = ("q_BLHK", "k_BLGK", "v_BLGK")
    local = None if window is None else (window - 1, 0)

    @jax.jit
    def run(qkv: list[jax.Array], d_o: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        o, pull = jax.vjp(
            lambda *qkv: jax.nn.dot_product_attention(
                *qkv, is_causal=True, local_window_size=local
            ),
            *qkv,
        )
        return o, pull(d_o)

    d_o, _ = cotangents(floats)
    o, gradients = run([floats[name] for name in names], jnp.asarray(d_o, jnp.float32))
    return {"o": o, **{f"d {n}": g for n, g in zip(names, gradients, strict=True)}}


@pytest.mark.parametrize("implementation", EVERY)
def test_memory_of_everything_is_full_attention_but_for_staleness(
    rng: np.random.Generator, implementation: str
) -> None:
    """All tokens up to s - W in chunk s / C's memory, slot t for token t; F = 0."""
    B, L, W, C = 2, 19, 3, 4
    floats, options = draw(rng, AttentionShape(B, L, 2, 2, 4, W, 0, 0, C), segments=False)
    q, k, v = (np.asarray(a, np.float64) for a in floats.values())
    starts_Z = np.arange(0, L, C)
    valid_ZM = np.arange(L)[None] <= starts_Z[:, None] - W
    for name in ("k", "v"):
        tokens = floats[f"{name}_BLGK"][:, None]
        floats[f"eidetic_{name}_BZMGK"] = jnp.repeat(tokens, len(starts_Z), axis=1)
    options["eidetic_valid_BZM"] = jnp.asarray(np.repeat(valid_ZM[None], B, axis=0))
    out = attend(floats, options, implementation, chunk=C)

    i, j = np.arange(L)[:, None], np.arange(L)[None]
    stale = (j > i // C * C - W) & (j <= i - W)
    logits = np.einsum("BLHK,BSHK->BHLS", q, k) / 2
    logits = np.where((j <= i) & ~stale, logits, -np.inf)
    weights = np.exp(logits)
    o = np.einsum("BHLS,BSHK->BLHK", weights / weights.sum(-1, keepdims=True), v)
    assert stale.any()
    assert relative_rms(out.o_BLHK, o) <= TOLERANCE["float32"]
    assert relative_rms(out.lse_BLH, np.log(weights.sum(-1)).swapaxes(1, 2)) <= TOLERANCE["float32"]


@pytest.mark.parametrize("implementation", EVERY)
def test_packed_documents_equal_documents_apart(
    rng: np.random.Generator, implementation: str
) -> None:
    """The second document starts at a multiple of C, so that its chunks are the same apart."""
    first, C = 10, SHAPE.chunk
    floats, options = draw(rng, SHAPE, segments=False)
    segments = options | {
        "segment_ids_BL": jnp.asarray([[7] * first + [3] * (SHAPE.L - first)] * 2)
    }
    packed = attend(floats, segments, implementation)
    parts = []
    for tokens, chunks in (
        (slice(first), slice(first // C)),
        (slice(first, None), slice(first // C, None)),
    ):
        cut = {n: a[:, chunks if "eidetic" in n else tokens] for n, a in floats.items()}
        valid = {"eidetic_valid_BZM": options["eidetic_valid_BZM"][:, chunks]}
        parts.append(attend(cut, options | valid, implementation))
    apart = AttentionOutput(*(jnp.concatenate(a, axis=1) for a in zip(*parts, strict=True)))
    assert_close(packed._asdict(), apart._asdict(), "float32")


@pytest.mark.parametrize("implementation", ALL)
def test_vmap_equals_a_loop(rng: np.random.Generator, implementation: str) -> None:
    floats, options = draw(rng, SHAPE)
    more, _ = draw(rng, SHAPE)
    stacked = jax.tree.map(lambda *a: jnp.stack(a), floats, more)

    def gradients(floats: Arrays) -> dict[str, jax.Array]:
        return outputs_and_gradients(floats, options, implementation, blocks=BLOCKS[implementation])

    assert_close(jax.vmap(gradients)(stacked), jax.lax.map(gradients, stacked), "float32")


@pytest.mark.parametrize("implementation", ALL)
def test_scanned_and_rematerialised_layers(rng: np.random.Generator, implementation: str) -> None:
    floats, options = draw(rng, SHAPE)

    def layer(q_BLHK: jax.Array, implementation: str) -> jax.Array:
        others = {**floats, "q_BLHK": q_BLHK}
        return attend(others, options, implementation).o_BLHK

    def scanned(q_BLHK: jax.Array) -> jax.Array:
        step = jax.checkpoint(lambda q, _: (layer(q, implementation), None))
        return jnp.square(jax.lax.scan(step, q_BLHK, length=3)[0]).sum()

    def looped(q_BLHK: jax.Array) -> jax.Array:
        for _ in range(3):
            q_BLHK = layer(q_BLHK, "reference")
        return jnp.square(q_BLHK).sum()

    got, want = (jax.jit(jax.grad(f))(floats["q_BLHK"]) for f in (scanned, looped))
    assert relative_rms(got, want) <= TOLERANCE["float32"]


@pytest.mark.parametrize("manual", [False, True], ids=["partitioner", "shard_map"])
@pytest.mark.parametrize("implementation", BACKENDS)
def test_sharded_batch_and_heads_need_no_communication(
    rng: np.random.Generator, implementation: str, manual: bool
) -> None:
    floats, options = draw(rng, SHAPE)
    axes = {"axis_types": (jax.sharding.AxisType.Auto,) * 2, "devices": jax.devices()[:4]}
    mesh = jax.make_mesh((2, 2), ("data", "model"), **axes)
    whole = {n: options.pop(n) for n in ("eidetic_valid_BZM", "segment_ids_BL")}
    # Heads are the last letter but one, or H of the bias.
    specs = {
        n: PartitionSpec("data", *(["model" if x in "GH" else None for x in n.split("_")[-1][1:]]))
        for n in floats
    } | {n: PartitionSpec("data") for n in whole}

    def loss(arrays: Arrays) -> jax.Array:
        out = attend(arrays, options, implementation)
        return jnp.square(out.o_BLHK).sum() + jnp.sin(out.lse_BLH).sum()

    def gradients(arrays: Arrays) -> Arrays:
        others = {n: arrays[n] for n in whole}
        return jax.grad(lambda floats: loss(floats | others))({n: arrays[n] for n in floats})

    want = jax.jit(gradients)(floats | whole)
    out_specs = {n: specs[n] for n in floats}
    if manual:
        gradients = jax.shard_map(gradients, mesh=mesh, in_specs=(specs,), out_specs=out_specs)
    shardings = {n: NamedSharding(mesh, spec) for n, spec in specs.items()}
    step = jax.jit(gradients, out_shardings={n: shardings[n] for n in floats})
    arrays = jax.device_put(floats | whole, shardings)
    text = step.lower(arrays).compile().as_text()
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert f"{collective}(" not in text
    assert_close(step(arrays), want, "float32")


@pytest.mark.parametrize("full", [False, True], ids=["windowed", "full"])
def test_memory_grows_linearly(full: bool) -> None:
    H, K, M, C = 4, 16, 16, 64

    def temporaries(L: int) -> int:
        def array(*sizes: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(sizes, jnp.float32)

        token, slot = array(1, L, H, K), array(1, L // C, M, H, K)
        valid = jax.ShapeDtypeStruct((1, L // C, M), jnp.bool_)

        def loss(q, k, v, fading_k, fading_v, eidetic_k, eidetic_v, valid):
            out = memory_attention(
                q,
                k,
                v,
                window=L if full else 64,
                fading_k_BLGK=fading_k,
                fading_v_BLGK=fading_v,
                fading_window=64,
                eidetic_k_BZMGK=eidetic_k,
                eidetic_v_BZMGK=eidetic_v,
                eidetic_valid_BZM=valid,
                chunk=C,
                implementation="xla",
            )
            return jnp.square(out.o_BLHK).sum()

        step = jax.jit(jax.grad(loss, argnums=range(7)))
        compiled = step.lower(*[token] * 5, slot, slot, valid).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    L = 2048
    once, twice = temporaries(L), temporaries(2 * L)
    assert twice <= 2.2 * once
    assert twice <= (2 * L) ** 2 * H * 4 / 10


BAD = {
    "window": ({"window": 0}, "window=0"),
    "fading_window": ({"fading_window": -2}, "fading_window=-2"),
    "chunk_missing": ({"chunk": None}, "chunk=None"),
    "chunk_zero": ({"chunk": 0}, "chunk=0"),
    "chunk_of_other_memories": ({"chunk": 6}, r"\(2, 5, 3, 2, 4\), expected \(2, 4, 3, 2, 4\)"),
    "axes": ({"q_BLHK": jnp.ones((2, 23, 4))}, r"\(2, 23, 4\)"),
    "empty": ({"q_BLHK": jnp.ones((2, 0, 4, 4))}, r"\(2, 0, 4, 4\)"),
    "heads": ({"q_BLHK": jnp.ones((2, 23, 5, 4))}, "G=2.*H=5"),
    "keys": ({"k_BLGK": jnp.ones((2, 22, 2, 4))}, r"k_BLGK.*\(2, 22, 2, 4\).*\(2, 23, 2, 4\)"),
    "values": ({"v_BLGK": jnp.ones((2, 23, 2, 8))}, r"v_BLGK.*\(2, 23, 2, 8\)"),
    "fading": ({"fading_k_BLGK": jnp.ones((2, 23, 1, 4))}, r"fading_k_BLGK.*\(2, 23, 1, 4\)"),
    "fading_alone": ({"fading_v_BLGK": None}, "fading_v_BLGK"),
    "eidetic_axes": ({"eidetic_k_BZMGK": jnp.ones((2, 5, 3, 8))}, r"\(2, 5, 3, 8\)"),
    "eidetic": ({"eidetic_v_BZMGK": jnp.ones((2, 5, 2, 2, 4))}, r"\(2, 5, 2, 2, 4\)"),
    "valid_missing": ({"eidetic_valid_BZM": None}, "eidetic_valid_BZM"),
    "valid": ({"eidetic_valid_BZM": jnp.ones((2, 5, 3))}, "float32, expected bool"),
    "bias": ({"eidetic_bias_BZHM": jnp.ones((2, 5, 2, 3))}, r"\(2, 5, 2, 3\)"),
    "segments": ({"segment_ids_BL": jnp.ones((2, 23))}, "float32, expected integer"),
    "dtypes": ({"v_BLGK": jnp.ones((2, 23, 2, 4), "bfloat16")}, "bfloat16, expected float32"),
    "integers": ({"q_BLHK": jnp.ones((2, 23, 4, 4), "int32")}, "int32, expected floating"),
    "blocks": ({"blocks": {"keys": 8}}, "keys"),
    "block_size": ({"blocks": {"queries": 0}}, "0"),
    "implementation": ({"implementation": "fastest"}, "fastest"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.usefixtures("annotations_off")
def test_errors_name_the_values(rng: np.random.Generator, case: str) -> None:
    change, message = BAD[case]
    floats, options = draw(rng, SHAPE)
    with pytest.raises(ValueError, match=message) as error:
        memory_attention(**{**floats, **options, **change})
    assert not isinstance(error.value, Unsupported)
