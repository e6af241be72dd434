"""Every clause of the tasks of MAD, on rows as the device makes them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bmojo_jax.config import DataConfig, ModelConfig, TaskConfig, TrainConfig
from bmojo_jax.data import tasks
from bmojo_jax.data.tasks import mad

# Words and tokens of a row, as the suite has them.
SIZES = {
    "in_context_recall": (16, 128),
    "noisy_recall": (32, 128),
    "fuzzy_recall": (16, 128),
    "selective_copying": (16, 256),
    "memorization": (256, 32),
}


@functools.cache
def program(name, split):
    """Compiled once for all seeds and indices."""
    words, length = SIZES[name]
    task = TaskConfig(name=name, vocab_size=words)
    return jax.jit(lambda seed, index_B: tasks.examples(task, length, split, seed, index_B))


def rows(name, split="test", *, index=range(300), seed=0):
    return jax.tree.map(np.asarray, program(name, split)(seed, jnp.asarray(index)))


@pytest.mark.parametrize("name", ["in_context_recall", "noisy_recall", "fuzzy_recall"])
def test_every_next_token_is_trained_on(name):
    got = rows(name, "train")
    assert got.trained.all()
    np.testing.assert_array_equal(got.labels, got.tokens[:, 1:])
    np.testing.assert_array_equal(got.asked, np.tile(np.arange(127), (300, 1)))
    assert 0 < got.scored.mean() < 0.5


@pytest.mark.parametrize("name", ["in_context_recall", "noisy_recall"])
def test_recall(name):
    got = rows(name)
    pairs = got.tokens.reshape(300, 64, 2)
    # The state before token i is asked for it: values stand at odd places.
    scored = np.concatenate([np.zeros((300, 1), bool), got.scored], axis=1).reshape(300, 64, 2)
    assert not scored[..., 0].any()
    noise_seen = new_seen = 0
    for row, marks in zip(pairs, scored[..., 1], strict=True):
        known = {}
        for i, (key, value) in enumerate(row):
            if key >= 16:  # noise
                assert value >= 16 and not marks[i] and i < 63
                noise_seen += 1
                continue
            assert 0 <= key < 8 <= value < 16
            assert known.setdefault(key, value) == value
            assert marks[i] == (key in row[:i, 0])
            new_seen += not marks[i]
        assert marks[63]  # the last pair asks for a key seen before
    share = noise_seen / (300 * 63)
    assert share == 0 if name == "in_context_recall" else abs(share - 0.2) < 0.02
    assert new_seen > 300 * 6


def test_noise_and_values_are_drawn_evenly():
    got = rows("noisy_recall")
    for words in (range(8), range(8, 16), range(16, 32)):
        counts = np.array([(got.tokens == word).sum() for word in words])
        np.testing.assert_allclose(counts / counts.mean(), 1, atol=0.25)
        # Four deviations for values, of which a row draws one for each key: about 300 of a word.


def motifs(row):
    """A row's pairs of key and value motifs: keys are words 0 .. 6, values 7 .. 14, 15 pads."""
    content = row[np.argmax(row != 15) :]
    assert 15 not in content and (row[: len(row) - len(content)] == 15).all()
    pairs, start = [], 0
    while start < len(content):
        middle = start + int(np.argmax(content[start:] >= 7))
        rest = content[middle:]
        end = middle + (int(np.argmax(rest < 7)) if (rest < 7).any() else len(rest))
        pairs.append((tuple(content[start:middle]), tuple(content[middle:end])))
        start = end
    return pairs


@pytest.mark.parametrize("split", ["train", "test"])
def test_fuzzy_recall(split):
    got = rows("fuzzy_recall", split)
    sizes, repeats, padding = set(), 0, []
    for row, marks in zip(got.tokens, got.scored, strict=True):
        pairs = motifs(row)
        padding.append((row == 15).sum())
        known, scored = {}, []
        for key, value in pairs:
            sizes.add((len(key), len(value)))
            assert len(set(key)) == len(key) and len(set(value)) == len(value)
            scored += [False] * len(key) + [key in known] * len(value)
            assert known.setdefault(key, value) == value
        assert pairs[-1][0] in [key for key, _ in pairs[:-1]]
        expected = [False] * (127 - len(scored)) + scored if len(scored) < 128 else scored[1:]
        np.testing.assert_array_equal(marks, expected)
        repeats += sum(scored)
    keys = {1, 2, 3} if split == "train" else {3}
    assert sizes == {(k, v) for k in keys for v in (1, 2, 3)}
    assert 0 <= min(padding) and max(padding) < 12  # no further pair would have fitted


def test_selective_copying():
    got = rows("selective_copying")
    assert (got.tokens[:, 239] == 15).all() and (got.tokens[:, 240:] == 14).all()
    before = got.tokens[:, :239]
    assert ((before != 14).sum(axis=1) == 16).all() and before.max() == 14
    np.testing.assert_array_equal(before[before != 14].reshape(300, 16), got.labels)
    np.testing.assert_array_equal(got.asked, np.tile(np.arange(240, 256), (300, 1)))
    assert got.scored.all() and got.trained.all()
    assert set(got.labels.flat) == set(range(14))
    places = np.nonzero(before != 14)[1].reshape(300, 16)
    np.testing.assert_array_equal(got.distance, got.asked - places)
    assert abs(places.mean() - 119) < 3  # anywhere


def test_memorization():
    known = {}
    for split in ("train", "test"):
        for seed in (0, 1):
            got = rows("memorization", split, seed=seed)
            assert (got.tokens[:, 1::2] == 255).all()
            np.testing.assert_array_equal(got.asked, np.tile(np.arange(1, 32, 2), (300, 1)))
            for key, value in zip(got.tokens[:, ::2].flat, got.labels.flat, strict=True):
                assert 0 <= key < 127 <= value < 254
                assert known.setdefault(key, value) == value
    assert len(known) == len(set(known.values())) == 127


@pytest.mark.parametrize("name", SIZES)
def test_examples_are_functions_of_seed_split_and_index(name):
    one = rows(name)
    np.testing.assert_array_equal(rows(name, index=range(299, -1, -1)).tokens, one.tokens[::-1])
    for other in (rows(name, "train"), rows(name, seed=1)):
        assert (other.tokens != one.tokens).any(axis=1).all()


@pytest.mark.parametrize(
    ("name", "words", "length", "message"),
    [
        ("noisy_recall", 30, 128, r"task\.vocab_size=30: must be a multiple of 4"),
        ("fuzzy_recall", 6, 128, r"task\.vocab_size=6: must be .* at least 7 with task\.name="),
        ("selective_copying", 16, 32, r"data\.sequence_length=32: must be even and at least 34"),
        ("in_context_recall", 16, 127, r"data\.sequence_length=127: must be even"),
    ],
)
def test_what_does_not_fit_is_named(name, words, length, message):
    config = TrainConfig(
        model=ModelConfig(vocab_size=256),
        data=DataConfig(sequence_length=length, batch_size=8),
        task=TaskConfig(name=name, vocab_size=words),
    )
    with pytest.raises(ValueError, match=message):
        tasks.check(config)


def test_sizes_of_the_suite_are_valid():
    for name, (words, length) in SIZES.items():
        mad.check(name, vocab_size=words, length=length)
