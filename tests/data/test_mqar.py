"""Every clause of the protocol of MQAR, on rows as the device makes them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bmojo_jax.config import DataConfig, ModelConfig, TaskConfig, TrainConfig
from bmojo_jax.data import tasks
from bmojo_jax.data.tasks import mqar

SMALL = TaskConfig(name="mqar", vocab_size=64, pairs=(8,))


@functools.cache
def program(task, length, split):
    """Compiled once for all seeds and indices of a shape."""
    return jax.jit(lambda seed, index_B: tasks.examples(task, length, split, seed, index_B))


def rows(task=SMALL, *, length=48, index=range(400), split="test", seed=0):
    made = program(task, length, split)(seed, jnp.asarray(index))
    return jax.tree.map(np.asarray, made)


def test_the_context_is_different_keys_with_different_values():
    got = rows()
    context = got.tokens[:, :16].reshape(-1, 8, 2)
    keys, values = context[..., 0], context[..., 1]
    assert keys.min() == 1 and keys.max() == 31
    assert values.min() == 32 and values.max() == 63
    for words in (keys, values):
        assert all(len(set(row)) == 8 for row in words)
    np.testing.assert_array_equal(got.labels, values)


def test_words_are_drawn_evenly():
    parts = [rows(index=range(i, i + 400)) for i in range(0, 4000, 400)]
    tokens, labels = (
        np.concatenate([getattr(x, name) for x in parts]) for name in ("tokens", "labels")
    )
    for words, number in ((tokens[:, :16:2], 31), (labels, 32)):
        counts = np.unique_counts(words).counts
        assert len(counts) == number
        expected = words.size / number
        # Within five standard deviations of a binomial count, on either side.
        assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)


def test_a_query_is_its_key_and_its_label_stands_there():
    got = rows()
    assert got.scored.all() and got.trained.all()
    asked = np.take_along_axis(got.tokens, got.asked, axis=1)
    np.testing.assert_array_equal(asked, got.tokens[:, :16:2])
    assert got.asked.min() >= 16 and got.asked.max() <= 46 and (got.asked % 2 == 0).all()
    assert all(len(set(row)) == 8 for row in got.asked)
    np.testing.assert_array_equal(got.distance, got.asked - (2 * np.arange(8) + 1)[None])


def is_filler(got, length):
    queries = np.zeros((len(got.tokens), length), bool)
    np.put_along_axis(queries, got.asked, True, axis=1)
    queries[:, :16] = True
    return ~queries


def test_filler_is_any_word_or_zero():
    got = rows()
    filler = got.tokens[is_filler(got, 48)]
    assert set(filler) == set(range(64))
    zero = rows(TaskConfig(name="mqar", vocab_size=64, pairs=(8,), filler="zero"))
    inside = is_filler(zero, 48)
    assert (zero.tokens[inside] == 0).all() and (zero.tokens[~inside] != 0).all()


def test_slots_are_drawn_one_after_the_other_without_replacement():
    """Against numpy: the first slot, every pair of slots, and which slots are taken at all."""
    length, k, draws = 20, 3, 40_000
    count = (length - 2 * k) // 2
    p = (np.arange(count) + 1.0) ** (mqar.POWER - 1)
    p /= p.sum()
    keys = jax.random.split(jax.random.key(1), draws)
    got = np.asarray(jax.jit(jax.vmap(lambda key: mqar.slots(key, k, length=length)[:k]))(keys))
    rng = np.random.default_rng(0)
    want = np.stack([rng.choice(count, k, replace=False, p=p) for _ in range(draws)])

    def assert_close(got, want):
        """Within five deviations of the difference of two shares of so many draws."""
        deviation = np.sqrt(2 * np.maximum(want, 1 / draws) / draws)
        np.testing.assert_array_less(np.abs(got - want), 5 * deviation)

    pairs = [np.histogram2d(x[:, 0], x[:, 1], bins=count)[0] / draws for x in (got, want)]
    assert_close(*pairs)
    lasts = [np.bincount(x[:, 2], minlength=count) / draws for x in (got, want)]
    assert_close(*lasts)
    assert_close(np.bincount(got[:, 0], minlength=count) / draws, p)


@pytest.mark.parametrize(
    ("k", "facts"),
    [(8, (0.50, 0.66, 0.84)), (16, (0.32, 0.59, 0.82)), (32, (0.06, 0.35, 0.76)),
     (64, (0.0, 0.02, 0.56))],
)  # fmt: skip
def test_share_of_answers_by_distance_at_256_tokens(k, facts):
    got = rows(TaskConfig(name="mqar", vocab_size=256, pairs=(k,)), length=256, index=range(2000))
    shares = [(got.distance <= reach).mean() for reach in (31, 62, 127)]
    np.testing.assert_allclose(shares, facts, atol=0.012)


def test_rows_of_several_numbers_of_pairs_take_turns():
    several = rows(TaskConfig(name="mqar", vocab_size=64, pairs=(8, 3)))
    for i, k in enumerate([8, 3] * 200):
        np.testing.assert_array_equal(several.scored[i], np.arange(8) < k)
        tokens, asked = several.tokens[i], several.asked[i, :k]
        np.testing.assert_array_equal(tokens[asked], tokens[: 2 * k : 2])
        np.testing.assert_array_equal(several.labels[i, :k], tokens[1 : 2 * k : 2])
        assert asked.min() >= 2 * k and len(set(asked)) == k
    # An example does not depend on how many are made, nor one number of pairs on the other.
    np.testing.assert_array_equal(several.tokens[::2], rows().tokens[::2])


def test_examples_are_functions_of_seed_split_and_index():
    one = rows()
    backwards = rows(index=range(399, -1, -1))
    for got, want in zip(backwards, one, strict=True):
        np.testing.assert_array_equal(got, want[::-1])
    for other in (rows(split="train"), rows(seed=1)):
        assert (other.tokens[:, :16] != one.tokens[:, :16]).mean() > 0.9
    assert len(np.unique(one.tokens, axis=0)) == 400


def indices(task, batch_size, seed, steps):
    make = jax.jit(lambda step: tasks.train_indices(task, batch_size, seed, step))
    return np.stack([np.asarray(make(step)) for step in range(steps)])


def test_fresh_examples_never_come_twice():
    np.testing.assert_array_equal(indices(SMALL, 4, 0, 5).reshape(-1), np.arange(20))


def test_a_fixed_set_is_shuffled_in_every_epoch():
    task = TaskConfig(name="mqar", vocab_size=64, pairs=(8,), train_examples=12)
    got = indices(task, 4, 0, 9).reshape(3, 12)
    np.testing.assert_array_equal(np.sort(got, axis=1), np.tile(np.arange(12), (3, 1)))
    assert len(np.unique(got, axis=0)) == 3
    assert not np.array_equal(indices(task, 4, 1, 3).reshape(-1), got[0])
    uneven = indices(task, 5, 0, 4).reshape(2, 10)
    assert all(len(set(epoch)) == 10 for epoch in uneven)


@pytest.mark.parametrize(
    ("task", "length", "message"),
    [
        ({"pairs": (8, 16)}, 48, r"task\.pairs=\(8, 16\): must be at most a quarter of data\.seq"),
        ({"pairs": (4,)}, 47, r"data\.sequence_length=47: must be even"),
        ({"pairs": (8,), "vocab_size": 16}, 48, r"task\.vocab_size=16: must be even and at least"),
        ({"vocab_size": 128, "pairs": (4,)}, 48, r"model\.vocab_size=64: must be at least task\."),
        (
            {"pairs": (4,), "train_examples": 3},
            48,
            r"task\.train_examples=3: must be 0 or at least data\.batch_size=8",
        ),
    ],
)
def test_what_does_not_fit_is_named(task, length, message):
    config = TrainConfig(
        model=ModelConfig(vocab_size=64),
        data=DataConfig(sequence_length=length, batch_size=8),
        task=TaskConfig(**({"name": "mqar", "vocab_size": 64} | task)),
    )
    with pytest.raises(ValueError, match=message):
        tasks.check(config)
