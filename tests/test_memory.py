import jax
import jax.numpy as jnp
import numpy as np
import pytest

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


def test_innovation_is_the_error_of_a_moving_average(rng):
    positions_BL = packed_positions(12, (5, 6))
    s_BLD = rng.normal(size=(1, 12, 3))
    with jax.enable_x64(True):
        e_BL = memory.innovation(jnp.asarray(s_BLD), jnp.asarray(positions_BL))
    for t in range(12):
        taps = [s_BLD[0, t - k] for k in range(1, 5) if k <= positions_BL[0, t]]
        predicted = np.mean(taps, axis=0) if taps else np.zeros(3)
        want = np.sum((s_BLD[0, t] - predicted) ** 2)
        np.testing.assert_allclose(e_BL[0, t], want, rtol=1e-13)


def test_innovation_streams(rng):
    positions_BL = packed_positions(20, (7,), (11, 12))
    s_BLD = rng.normal(size=(2, 20, 8)).astype(np.float32)
    whole = jax.jit(memory.innovation)(jnp.asarray(s_BLD), positions_BL)
    tail = jnp.zeros((2, memory.TAPS, 8))
    step = jax.jit(memory.innovation)
    for t in range(20):
        e_B1 = step(jnp.asarray(s_BLD[:, t : t + 1]), positions_BL[:, t : t + 1], tail)
        np.testing.assert_array_equal(e_B1[:, 0], whole[:, t])
        tail = jnp.concatenate([tail[:, 1:], s_BLD[:, t : t + 1]], axis=1)


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


def test_slot_positions_follow_the_window():
    slots = memory.slot_positions(jnp.array([[20]]), window=3, fading_window=4, size=3)
    np.testing.assert_array_equal(slots, [[[11, 12, 13]]])
