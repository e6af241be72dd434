import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from bmojo_jax import cache, generate, model, operations
from bmojo_jax.generate import Sampling
from tests.models import FAMILIES, float64_params, small_config

GREEDY = Sampling(temperature=0)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def build(family):
    config = small_config(**FAMILIES[family])
    return config, float64_params(config)


def greedy_by_whole_passes(config, params, prompt, count):
    """The definition: the whole sequence again for every token (one shape: causal padding)."""
    length = len(prompt) + count
    run = jax.jit(lambda t: model.bind(config, params)(t))
    ids = list(prompt)
    for _ in range(count):
        padded = np.zeros((1, length), np.int32)
        padded[0, : len(ids)] = ids
        ids.append(int(np.argmax(run(jnp.asarray(padded))[0, len(ids) - 1])))
    return ids[len(prompt) :]


@pytest.mark.parametrize("family", ["transformer", "mamba", "hybrid", "bmojo_f", "bmojo"])
def test_greedy_generation_of_rows_of_different_lengths(rng, family):
    """Far beyond W + F + C; every row as if it were alone and without a cache."""
    config, params = build(family)
    prompts = [rng.integers(0, 31, size=n).tolist() for n in (1, 9, 22)]
    rows = generate.generate(config, params, prompts, max_tokens=20, sampling=GREEDY)
    for prompt, row in zip(prompts, rows, strict=True):
        assert row == greedy_by_whole_passes(config, params, prompt, 20)


@pytest.mark.parametrize("piece", [1, 3, 4])
def test_prefill_does_not_depend_on_its_pieces(rng, piece):
    config, params = build("bmojo")
    prompts = [rng.integers(0, 31, size=n).tolist() for n in (23, 5)]
    logits_BV, state = generate.prefill(
        config, params, cache.empty_cache(config, 2, max_length=23), prompts, piece=piece
    )
    np.testing.assert_array_equal(state.time_B, [23, 5])
    whole = model.bind(config, params)
    for row, prompt in enumerate(prompts):
        want = whole(jnp.asarray([prompt]))[0, -1]
        np.testing.assert_allclose(logits_BV[row], want, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "positions"),
    [(family, "slot") for family in ("transformer", "mamba", "hybrid", "bmojo_f", "bmojo")]
    + [("bmojo", "original"), ("bmojo", "none")],
)
def test_one_pass_leaves_what_pieces_leave(rng, family, positions):
    """Rows of one token, within the window, at a chunk's border, and longer than every ring."""
    config = small_config(**FAMILIES[family], eidetic_positions=positions, eidetic_gate=True)
    params = float64_params(config)
    prompts = [rng.integers(0, 31, size=n).tolist() for n in (1, 3, 16, 17, 45)]
    empty = cache.empty_cache(config, len(prompts), max_length=60)
    logits_BV, state = generate.begin(config, params, prompts, max_length=60)
    want_BV, want = generate.prefill(config, params, empty, prompts)
    np.testing.assert_allclose(logits_BV, want_BV, atol=1e-5)
    np.testing.assert_array_equal(state.time_B, want.time_B)
    for _ in range(12):  # across the next chunks' borders
        parts = rng.integers(0, 31, size=(len(prompts), 1)).tolist()
        logits_BV, state = generate.prefill(config, params, state, parts)
        want_BV, want = generate.prefill(config, params, want, parts)
        np.testing.assert_allclose(logits_BV, want_BV, atol=1e-5)


@pytest.mark.parametrize("family", ["transformer", "mamba", "bmojo"])
def test_one_pass_of_rows_without_padding(rng, family):
    """The program that masks nothing, as no row is shorter than what it is compiled for; and
    parameters that were not made for decoding."""
    config = small_config(**FAMILIES[family])
    params = float64_params(config)
    prompts = rng.integers(0, 31, size=(2, 48)).tolist()
    empty = cache.empty_cache(config, 2, max_length=50)
    want_BV, want = generate.prefill(config, params, empty, prompts)
    for given in (params, model.for_inference(config, params)):
        got_BV, state = generate.begin(config, given, prompts, max_length=50)
        np.testing.assert_allclose(got_BV, want_BV, atol=1e-5)
    part = rng.integers(0, 31, size=(2, 2)).tolist()
    got_BV, _ = generate.prefill(config, params, state, part)
    want_BV, _ = generate.prefill(config, params, want, part)
    np.testing.assert_allclose(got_BV, want_BV, atol=1e-5)


@pytest.mark.parametrize("family", ["transformer", "bmojo", "bmojo_gate"])
def test_kernels_decode_what_a_whole_pass_gives(rng, monkeypatch, family):
    """Token by token, across borders of chunks and rings; the kernels interpreted."""
    kernels = functools.partial(pallas_kernels.cached_attention, implementation="pallas_triton")
    monkeypatch.setattr(
        operations,
        "cached_attention",
        lambda q, streams, *, theta: kernels(q, streams, theta=theta),
    )
    write_keys = functools.partial(pallas_kernels.write_keys, implementation="pallas_triton")
    monkeypatch.setattr(operations, "write_keys", write_keys)
    changes = FAMILIES[family] | {"head_width": 32, "compute_dtype": "float32"}
    config = small_config(**changes)
    params = jax.tree.map(lambda p: p.astype(jnp.float32), float64_params(config))
    tokens_BL = jnp.asarray(rng.integers(0, 31, size=(2, 30)))
    step = jax.jit(lambda *x: model.bind(config, params).extend(*x))
    state = cache.empty_cache(config, 2, max_length=30)
    rows = []
    for t in range(30):
        x_BLD, state = step(tokens_BL[:, t : t + 1], state, jnp.ones(2, jnp.int32))
        rows.append(x_BLD)
    want = model.bind(config, params).hidden_states(tokens_BL)[0]
    np.testing.assert_allclose(jnp.concatenate(rows, 1), want, atol=1e-4)


def test_one_branch_or_none_gives_what_branches_of_layers_give(rng, monkeypatch):
    """Rows that cross a chunk's border together, apart, or not, and one that has stopped.

    A step has a branch in every layer, one of its own, or none where the caller counts."""
    config, params = build("bmojo_gate")
    prompts = [rng.integers(0, 31, size=n).tolist() for n in (9, 11, 13)]
    tokens = rng.integers(0, 31, size=(9, 3, 1))

    def decode(branches):
        extend = lambda *x: model.bind(config, params).extend(*x[:3], crosses=x[3])  # noqa: E731
        step = jax.jit(extend, static_argnums=3)
        _, state = generate.begin(config, params, prompts, max_length=30)
        time_B, rows = np.array([9, 11, 13]), []
        for t in range(9):
            lengths_B = np.array([1, 1, int(t < 3)])  # the third stops at a border, 16
            crosses_B = (time_B % config.chunk == 0) & (lengths_B > 0)
            crosses = None if branches else bool(crosses_B.any())
            arguments = jnp.asarray(tokens[t]), state, jnp.asarray(lengths_B), crosses
            assert str(step.trace(*arguments).jaxpr).count(" cond[") == branches
            x_BLD, state = step(*arguments)
            time_B += lengths_B
            rows.append(jnp.where(lengths_B[:, None, None] > 0, x_BLD, 0))
        return rows, state

    want = decode(config.depth)
    monkeypatch.setattr(operations, "waits_at_branches", lambda: True)
    for branches in (1, 0):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12),
            decode(branches),
            want,
        )


def test_who_counts_waits_for_no_answer(rng, monkeypatch):
    """Generation tells every step whether a row starts a chunk."""
    config, params = build("bmojo")
    told, extended = [], generate._extended

    def watched(*arguments):
        told.append((arguments[4].shape[1], arguments[6]))  # as a program is made
        return extended(*arguments)

    monkeypatch.setattr(generate, "_extended", watched)
    generate._extend.cache_clear()
    prompts = [[1] * n for n in (config.chunk - 1, config.chunk + 1)]
    generate.generate(config, params, prompts, max_tokens=4, sampling=GREEDY)
    generate._extend.cache_clear()
    assert {crosses for length, crosses in told if length == 1} == {False, True}


def test_a_conversation_continues_where_it_stopped(rng):
    """A prompt in two prefills with a decoding step between them is one prompt."""
    config, params = build("bmojo")
    prompt = rng.integers(0, 31, size=30).tolist()
    state = cache.empty_cache(config, 1, max_length=30)
    for part in (prompt[:11], prompt[11:12], prompt[12:]):
        logits_BV, state = generate.prefill(config, params, state, [part])
    want = model.bind(config, params)(jnp.asarray([prompt]))[0, -1]
    np.testing.assert_allclose(logits_BV[0], want, atol=1e-5)


def test_rows_stop_at_stop_ids_and_the_others_go_on(rng):
    config, params = build("bmojo")
    prompts = [rng.integers(0, 31, size=n).tolist() for n in (6, 9)]
    free = generate.generate(config, params, prompts, max_tokens=12, sampling=GREEDY)
    stop = next(token for token in free[0] if token not in free[1])
    rows = generate.generate(
        config, params, prompts, max_tokens=12, sampling=GREEDY, stop_ids=[stop]
    )
    assert rows[0] == free[0][: free[0].index(stop) + 1]
    assert rows[1] == free[1]


def test_stream_yields_what_generate_collects(rng):
    config, params = build("mamba")
    prompts = [rng.integers(0, 31, size=n).tolist() for n in (2, 4)]
    arguments = {"max_tokens": 5, "sampling": Sampling(1.0), "seed": 3}
    steps = list(generate.stream(config, params, prompts, **arguments))
    rows = generate.generate(config, params, prompts, **arguments)
    assert [list(row) for row in zip(*steps, strict=True)] == rows
    other = generate.generate(config, params, prompts, **{**arguments, "seed": 4})
    assert other != rows


def frequencies(logits, sampling, count=4000):
    keys = jax.random.split(jax.random.key(0), count)
    logits_BV = jnp.asarray([logits])
    draws = jax.vmap(lambda key: generate.sample(logits_BV, key, sampling)[0])(keys)
    return np.bincount(draws, minlength=len(logits)) / count


def test_sampling_follows_the_distribution():
    p = np.array([0.5, 0.3, 0.15, 0.05])
    near = {"atol": 0.03}
    logits = np.log(p)
    np.testing.assert_allclose(frequencies(logits, Sampling()), p, **near)
    hot = p**0.5 / (p**0.5).sum()
    np.testing.assert_allclose(frequencies(logits, Sampling(temperature=2.0)), hot, **near)
    top_2 = np.array([0.5, 0.3, 0, 0]) / 0.8
    np.testing.assert_allclose(frequencies(logits, Sampling(top_k=2)), top_2, **near)
    # The smallest set that reaches 0.81 has three tokens, that which reaches 0.79 two.
    top_3 = np.array([0.5, 0.3, 0.15, 0]) / 0.95
    np.testing.assert_allclose(frequencies(logits, Sampling(top_p=0.81)), top_3, **near)
    np.testing.assert_allclose(frequencies(logits, Sampling(top_p=0.79)), top_2, **near)
    np.testing.assert_allclose(frequencies(logits, Sampling(top_p=0.01)), [1, 0, 0, 0])
    np.testing.assert_allclose(frequencies(logits, Sampling(top_k=9)), p, **near)
    np.testing.assert_allclose(frequencies(logits, GREEDY), [1, 0, 0, 0])


def test_padding_of_the_vocabulary_is_never_drawn():
    logits = np.log(np.array([0.1, 0.2, 0.1, 0.6]))
    drawn = frequencies(logits, Sampling(num_words=3))
    np.testing.assert_allclose(drawn, [0.25, 0.5, 0.25, 0], atol=0.03)
    assert frequencies(logits, Sampling(temperature=0, num_words=3), 1).argmax() == 1


def test_full_attention_refuses_what_it_has_no_room_for():
    config, params = build("transformer")
    state = cache.empty_cache(config, 2, max_length=8)
    _, state = generate.prefill(config, params, state, [[1, 2, 3], [4] * 5])
    with pytest.raises(ValueError, match=r"a row of 9 tokens: .*max_length=8"):
        generate.prefill(config, params, state, [[1], [2] * 4])
    with pytest.raises(ValueError, match=r"a row of 9 tokens: .*max_length=8"):
        generate.begin(config, params, [[1] * 9], max_length=8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda *_: Sampling(temperature=-1), "temperature=-1"),
        (lambda *_: Sampling(top_p=0), r"top_p=0: must be in \(0, 1\]"),
        (lambda *_: Sampling(top_k=-1), "top_k=-1"),
        (
            lambda c, p: generate.generate(c, p, [[1], []], max_tokens=1, sampling=GREEDY),
            "at least one token",
        ),
        (
            lambda c, p: generate.generate(c, p, [[31]], max_tokens=1, sampling=GREEDY),
            r"token ids in \[31, 31\]: must be in \[0, 31\)",
        ),
        (
            lambda c, p: generate.generate(c, p, [[1]], max_tokens=0, sampling=GREEDY),
            "max_tokens=0",
        ),
        (
            lambda c, p: generate.prefill(
                c, p, cache.empty_cache(c, 1, max_length=8), [[1]], piece=5
            ),
            r"piece=5: must be in \[1, 4\]",
        ),
    ],
)
def test_errors_name_the_value(call, message):
    config, params = build("mamba")
    with pytest.raises(ValueError, match=message):
        call(config, params)
