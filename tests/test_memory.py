import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from bmojo_jax import memory
from tests.models import packed_positions

# (L, W, C, M): every order of the four, primes, a chunk of one, more slots than tokens.
SHAPES = [
    (40, 5, 4, 3),
    (37, 1, 1, 2),
    (29, 7, 11, 5),
    (23, 30, 4, 3),
    (23, 4, 30, 3),
    (31, 3, 2, 64),
    (64, 8, 16, 1),
    (1, 4, 4, 2),
]
STARTS = [((),), ((7, 19),), ((1, 2, 3, 20),), (tuple(range(1, 23)),)]


def by_definition(e_L, start_L, window, chunk, size):
    """Spec section 3 word for word: a list of token indices for each chunk."""
    chosen = []
    for s in range(0, len(e_L), chunk):
        candidates = [t for t in range(len(e_L)) if start_L[s] <= t <= s - window]
        best = sorted(candidates, key=lambda t: (-e_L[t], t))[:size]
        chosen.append(sorted(best))
    return chosen


def draw(rng, shape, ties):
    e = rng.exponential(size=shape).astype(np.float32)
    return np.round(e * 2) if ties else e


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("starts", STARTS)
@pytest.mark.parametrize(("length", "window", "chunk", "size"), SHAPES)
def test_parallel_form_is_the_definition(rng, length, window, chunk, size, starts, ties):
    rows = [tuple(s for s in row if s < length) for row in starts]
    positions_BL = packed_positions(length, *rows)
    start_BL = np.arange(length)[None] - positions_BL
    e_BL = draw(rng, positions_BL.shape, ties)
    got = jax.jit(memory.select, static_argnames=("window", "chunk", "size"))(
        e_BL, start_BL, window=window, chunk=chunk, size=size
    )
    want = by_definition(e_BL[0], start_BL[0], window, chunk, size)
    assert got.index_BZM.shape == (1, len(want), size)
    for z, tokens in enumerate(want):
        valid = np.asarray(got.valid_BZM[0, z])
        assert list(np.asarray(got.index_BZM[0, z])[valid]) == tokens
        # Right-aligned: the newest token is in the last slot.
        assert not valid[: size - len(tokens)].any()


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("starts", STARTS)
@pytest.mark.parametrize(("length", "window", "chunk", "size"), SHAPES)
def test_streaming_form_equals_parallel_form_exactly(
    rng, length, window, chunk, size, starts, ties
):
    rows = [tuple(s for s in row if s < length) for row in starts]
    positions_BL = packed_positions(length, *rows)
    start_BL = np.arange(length)[None] - positions_BL
    e_BL = draw(rng, positions_BL.shape, ties)
    parallel = memory.select(
        jnp.asarray(e_BL), jnp.asarray(start_BL), window=window, chunk=chunk, size=size
    )
    slots = memory.empty_slots(1, size)
    for z, s in enumerate(range(0, length, chunk)):
        time_BC = np.arange(s - chunk - window + 1, s - window + 1)[None]
        e_BC = np.where(time_BC >= 0, e_BL[0][np.maximum(time_BC, 0)], np.nan)
        before = slots
        slots, source_BM = memory.absorb(
            slots, jnp.asarray(e_BC), jnp.asarray(time_BC), jnp.asarray(start_BL[:, s])
        )
        want = np.where(parallel.valid_BZM[0, z], parallel.index_BZM[0, z], -1)
        np.testing.assert_array_equal(slots.time_BM[0], want)
        # The source tells where keys and values are to be taken from.
        pool = np.concatenate([before.time_BM[0], time_BC[0]])
        filled = np.asarray(source_BM[0]) >= 0
        np.testing.assert_array_equal(pool[np.asarray(source_BM[0])[filled]], want[filled])
        np.testing.assert_array_equal(filled, want >= 0)


@pytest.mark.parametrize(
    ("merged", "chunk", "size"),
    [(1, 1, 2), (1, 2, 3), (7, 1, 2), (12, 4, 5), (12, 3, 12), (40, 7, 1), (40, 2, 3)],
)
def test_choice_does_not_depend_on_how_lists_are_merged(rng, monkeypatch, merged, chunk, size):
    """Two to seven merges; rows of one document and of several."""
    length, window = 67, 3
    positions_BL = packed_positions(length, (), (31, 33, 60))
    start_BL = np.arange(length)[None] - positions_BL
    e_BL = draw(rng, positions_BL.shape, ties=True)
    monkeypatch.setattr(memory, "MERGED", merged)
    select = functools.partial(memory.select, window=window, chunk=chunk, size=size)
    got = jax.jit(select)(e_BL, start_BL)
    for row in range(2):
        want = by_definition(e_BL[row], start_BL[row], window, chunk, size)
        chosen = np.where(got.valid_BZM[row], got.index_BZM[row], -1)
        empty = [[-1] * (size - len(tokens)) for tokens in want]
        np.testing.assert_array_equal(chosen, [a + b for a, b in zip(empty, want, strict=True)])


@pytest.mark.parametrize(
    ("length", "chunk", "size", "merges"),
    [(2048, 256, 64, 1), (8192, 256, 64, 2), (131_072, 256, 64, 3), (131_072, 128, 256, 3)],
)
def test_selection_is_a_few_merges(length, chunk, size, merges):
    """Launches of kernels, not their work, are what a short row's selection costs."""
    e_BL = jax.ShapeDtypeStruct((1, length), jnp.float32)
    start_BL = jax.ShapeDtypeStruct((1, length), jnp.int32)
    run = jax.jit(lambda e, s: memory.select(e, s, window=512, chunk=chunk, size=size))
    text = run.lower(e_BL, start_BL).as_text()
    assert text.count("top_k") == merges and text.count("stablehlo.sort") == 1


def test_selection_depends_on_a_documents_offset_only_modulo_the_chunk(rng):
    """Spec section 3: equal offsets modulo C give equal memories, relative to the document."""
    chunk, window, size, length = 4, 5, 3, 24
    e_L = draw(rng, length, ties=True)

    def memories(offset):
        total = offset + length
        e_BL = np.concatenate([draw(rng, offset, ties=False), e_L])[None]
        start_BL = np.concatenate([np.zeros(offset, int), np.full(length, offset)])[None]
        chosen = memory.select(
            jnp.asarray(e_BL), jnp.asarray(start_BL), window=window, chunk=chunk, size=size
        )
        index = np.where(chosen.valid_BZM[0], chosen.index_BZM[0] - offset, -1)
        first = -(-offset // chunk)
        return index[first : first + (total - offset) // chunk - 1]

    np.testing.assert_array_equal(memories(6), memories(10))
    np.testing.assert_array_equal(memories(0), memories(8))
    assert not np.array_equal(memories(0), memories(2))


def test_selection_is_linear_in_the_length():
    """Temporary memory of the compiled selection, chunk and size fixed: O(L), no L x L."""

    def temporary(length):
        shape = jax.ShapeDtypeStruct((1, length), jnp.float32)
        starts = jax.ShapeDtypeStruct((1, length), jnp.int32)
        run = jax.jit(lambda e, s: memory.select(e, s, window=512, chunk=256, size=64))
        return run.lower(shape, starts).compile().memory_analysis().temp_size_in_bytes

    short, long = temporary(16_384), temporary(32_768)
    assert long <= 2.2 * short
    assert long < 32_768 * 4 * 16


def test_no_gradient_flows_through_the_choice(rng):
    e_BL = jnp.asarray(draw(rng, (1, 24), ties=False))
    start_BL = jnp.zeros((1, 24), jnp.int32)

    def kept(e_BL):
        chosen = memory.select(e_BL, start_BL, window=3, chunk=4, size=2)
        return jnp.sum(jnp.where(chosen.valid_BZM, chosen.index_BZM, 0).astype(jnp.float32))

    np.testing.assert_array_equal(jax.grad(kept)(e_BL), 0)


@pytest.mark.parametrize("stay", [2, 8])
@pytest.mark.parametrize("starts", STARTS[1:3])
@pytest.mark.parametrize(("length", "window", "chunk", "size"), SHAPES)
def test_gradients_of_what_is_recalled(rng, monkeypatch, length, window, chunk, size, starts, stay):
    """Both ways of summing them up, against a plain gather; chunks beyond STAY and STAY^2."""
    monkeypatch.setattr(memory, "STAY", stay)
    rows = [tuple(s for s in row if s < length) for row in ((), (7, 19), (1, 2, 3, 20))]
    positions_BL = packed_positions(length, *rows)
    start_BL = np.arange(length)[None] - positions_BL
    options = {"window": window, "chunk": chunk}
    with jax.enable_x64(True):
        e_BL = jnp.asarray(draw(rng, positions_BL.shape, ties=True))
        chosen = memory.select(e_BL, jnp.asarray(start_BL), **options, size=size)
        tokens = {"k_BLGK": jnp.asarray(rng.normal(size=(3, length, 3, 2)))}
        d_kept = jnp.asarray(rng.normal(size=(*chosen.index_BZM.shape, 3, 2)))
        d_kept = d_kept * chosen.valid_BZM[..., None, None]

        def plain(x_BLGK):
            kept = [x[index] for x, index in zip(x_BLGK, chosen.index_BZM, strict=True)]
            return jnp.stack(kept)

        def recalled(x_BLGK):
            return memory.recall({"k_BLGK": x_BLGK}, chosen)["k_BLGK"]

        kept, pull = jax.vjp(recalled, tokens["k_BLGK"])
        want, pull_plain = jax.vjp(plain, tokens["k_BLGK"])
        valid = np.asarray(chosen.valid_BZM)
        np.testing.assert_array_equal(np.asarray(kept)[valid], np.asarray(want)[valid])
        (d_want,) = pull_plain(d_kept)
        np.testing.assert_allclose(pull(d_kept)[0], d_want, atol=1e-12)
        time_BZM = jnp.where(chosen.valid_BZM, chosen.index_BZM, -1)
        sums = memory._sums_by_sort(time_BZM, d_kept, length=length)
        np.testing.assert_allclose(sums, d_want, atol=1e-12)


def test_gradients_on_a_gpu_have_no_scatter():
    """Whose order of additions would not be fixed, and which would be sorted to fix it."""
    h100 = AbstractDevice("NVIDIA H100 80GB HBM3", None, platform="gpu")
    k_BLGK = jax.ShapeDtypeStruct((1, 2048, 2, 8), jnp.bfloat16)
    index_BZM = jax.ShapeDtypeStruct((1, 64, 4), jnp.int32)
    valid_BZM = jax.ShapeDtypeStruct((1, 64, 4), jnp.bool_)

    def loss(k_BLGK, *chosen):
        kept = memory.recall({"k": k_BLGK}, memory.Selection(*chosen))
        return jnp.square(kept["k"]).astype(jnp.float32).sum()

    for platform, scatters in (("cuda", False), ("cpu", True)):
        mesh = AbstractMesh((), (), abstract_device=h100 if platform == "cuda" else None)
        with jax.sharding.use_abstract_mesh(mesh):
            traced = jax.jit(jax.grad(loss)).trace(k_BLGK, index_BZM, valid_BZM)
            text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("stablehlo.scatter" in text) == scatters


def test_recalled_integers_and_bfloat16(rng):
    """Positions have no gradient; sums of bfloat16 gradients are rounded once."""
    length, chunk = 1024, 2
    e_BL = jnp.zeros((1, length)).at[0, 3].set(9)
    start_BL = jnp.zeros((1, length), jnp.int32)
    chosen = memory.select(e_BL, start_BL, window=2, chunk=chunk, size=1)
    x_BLD = jnp.asarray(rng.normal(size=(1, length, 5)), jnp.bfloat16)
    tokens = {"x_BLD": x_BLD, "positions_BL": jnp.arange(length)[None]}

    def total(x_BLD):
        kept = memory.recall(tokens | {"x_BLD": x_BLD}, chosen)
        np.testing.assert_array_equal(kept["positions_BL"], chosen.index_BZM)
        return kept["x_BLD"].astype(jnp.float32).sum()

    times = int((np.asarray(chosen.index_BZM) == 3).sum())
    assert times > 500
    rounded = float(jnp.asarray(times, jnp.bfloat16))
    np.testing.assert_array_equal(jax.grad(total)(x_BLD)[0, 3], rounded)
    d_kept = jnp.ones((1, length // chunk, 1, 5), jnp.bfloat16)
    time_BZM = jnp.where(chosen.valid_BZM, chosen.index_BZM, -1)
    sums = memory._sums_by_sort(time_BZM, d_kept, length=length)
    np.testing.assert_array_equal(sums[0, 3], rounded)


@pytest.mark.parametrize(
    ("selection", "kept"), [("newest", [32, 33, 34, 35]), ("oldest", [0, 1, 2, 3])]
)
def test_orders_of_positions(selection, kept):
    """The last chunk starts at 40; its candidates are 0 to 35."""
    positions_BL = jnp.arange(44)[None]
    e_BL = memory.order(positions_BL, selection)
    options = {"window": 5, "chunk": 8, "size": 4}
    chosen = memory.select(e_BL, jnp.zeros((1, 44), jnp.int32), **options)
    assert chosen.index_BZM[0, 5].tolist() == kept


def test_random_order_is_even_and_of_positions_alone():
    positions_BL = jnp.stack([jnp.arange(4096), jnp.arange(4096)[::-1]])
    e_BL = np.asarray(memory.order(positions_BL, "random"))
    with jax.enable_x64(True):
        np.testing.assert_array_equal(memory.order(positions_BL, "random"), e_BL)
    np.testing.assert_array_equal(e_BL[0], e_BL[1, ::-1])
    assert e_BL.min() > 0
    assert len(np.unique(e_BL)) > 4000
    # Of 4096 even draws: the shares of 8 parts, and neighbours do not go together.
    shares = np.histogram(e_BL[0], bins=8, range=(0, 1))[0] / 4096
    np.testing.assert_allclose(shares, 1 / 8, atol=0.03)
    assert abs(np.corrcoef(e_BL[0, 1:], e_BL[0, :-1])[0, 1]) < 0.1


def test_slot_positions_follow_the_window():
    slots = memory.slot_positions(jnp.array([[20]]), window=3, fading_window=4, size=3)
    np.testing.assert_array_equal(slots, [[[11, 12, 13]]])
