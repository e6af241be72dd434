"""Synthetic tasks of the MAD suite (arXiv 2403.17844; the protocol of athms/mad-lab).

    in_context_recall   key value key value ...: keys 0 .. V/2 - 1, values the rest. A key's value
                        is drawn where the key first comes and then fixed; the last pair repeats a
                        key. Trained on every next token, scored on values of keys seen before.
    noisy_recall        likewise with half of the words, and each pair with probability 0.2 two of
                        the other half, the noise, instead; one pair at least is none.
    fuzzy_recall        keys and values are motifs of one to three different words, padded on the
                        left with word V - 1; the last pair, the probe, repeats one. In a test every
                        key has three words. Trained and scored as above.
    selective_copying   16 words scattered among blanks (word V - 2), a copy token (V - 1) and 16
                        more blanks, at which the words are to be named in order. Trained and scored
                        on these.
    memorization        key, insert token (V - 1), ...: at the insert token the key's value, the
                        same in all rows. Trained and scored on these.

`compression`, the sixth of the suite, needs a decoder of its own and is not here.

An example is a pure function of a random key and sizes, without loops over tokens: what depends on
the pairs before is found by comparing all pairs with all.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from bmojo_jax.data.tasks.example import Example
from bmojo_jax.settings import require

NOISE = 0.2  # probability that a pair of noisy_recall is noise
MOTIF = 3  # words of the longest motif of fuzzy_recall
COPIED = 16  # words that selective_copying asks for

# Of each task: words are a multiple of, the fewest words, the fewest tokens.
_SIZES = {
    "in_context_recall": (2, 2, 4),
    "noisy_recall": (4, 4, 4),
    "fuzzy_recall": (1, 2 * MOTIF + 1, 4 * MOTIF),
    "selective_copying": (1, 3, 2 * COPIED + 2),
    "memorization": (1, 3, 2),
}


def check(name: str, *, vocab_size: int, length: int) -> None:
    """Raises ValueError if there are too few words or tokens."""
    multiple, words, tokens = _SIZES[name]
    what = f"with task.name={name!r}"
    require(
        vocab_size >= words and vocab_size % multiple == 0,
        "task.vocab_size",
        vocab_size,
        f"a multiple of {multiple} and at least {words} {what}",
    )
    require(
        length >= tokens and length % 2 == 0,
        "data.sequence_length",
        length,
        f"even and at least {tokens} {what}",
    )


def _first_equal(same_PP: Bool[Array, "P P"]) -> Int[Array, " P"]:
    """For every pair the first one that has the same key: itself, if it is new."""
    return jnp.argmax(same_PP, axis=1)


def _next_token(tokens_L: Array, scored_L: Array, distance_L: Array | None = None) -> Example:
    """Every next token is trained on; those that are marked are scored."""
    length = tokens_L.shape[0]
    return Example(
        tokens=tokens_L,
        asked=jnp.arange(length - 1),
        labels=tokens_L[1:],
        trained=jnp.ones((length - 1,), bool),
        scored=scored_L[1:],
        distance=None if distance_L is None else distance_L[1:],
    )


def recall(key: Array, *, vocab_size: int, length: int, noise: float) -> Example:
    """in_context_recall with noise 0, else noisy_recall."""
    count = length // 2
    split = jax.random.split(key, 6)
    words = vocab_size // 2 if noise else vocab_size
    keys_P = jax.random.randint(split[0], (count,), 0, words // 2)
    values_P = jax.random.randint(split[1], (count,), words // 2, words)
    pair_P = jnp.arange(count)
    noisy_P = jax.random.uniform(split[2], (count,)) < noise
    real = jax.random.randint(split[3], (), 0, count - 1)  # at least this one
    noisy_P &= (pair_P != real) & (pair_P != count - 1)
    # The last pair asks for a key among those seen, each equally likely however often it came.
    ids = jnp.arange(words // 2)
    seen = jnp.any(
        (keys_P[None, :-1] == ids[:, None]) & ~noisy_P[None, :-1],
        axis=1,
    )
    last = jax.random.categorical(split[4], jnp.where(seen, 0.0, -jnp.inf))
    keys_P = keys_P.at[-1].set(last)
    same_PP = (keys_P[:, None] == keys_P[None, :]) & ~noisy_P[None, :]
    first_P = _first_equal(same_PP)
    values_P = values_P[first_P]
    noise_P2 = jax.random.randint(split[5], (count, 2), words, vocab_size) if noise else 0
    pairs_P2 = jnp.stack([keys_P, values_P], axis=1)
    tokens_L = jnp.where(noisy_P[:, None], noise_P2, pairs_P2).reshape(-1)
    repeats_P = ~noisy_P & (first_P < pair_P)
    scored_L = jnp.stack([jnp.zeros_like(repeats_P), repeats_P], axis=1).reshape(-1)
    return _next_token(tokens_L, scored_L)


def _motifs(key: Array, count: int, first: int, end: int) -> Int[Array, "P 3"]:
    """Rows of three different words of first .. end - 1."""
    bits = jax.random.bits(key, (count, end - first))
    return first + jax.lax.top_k(bits, MOTIF)[1]


def fuzzy(key: Array, *, vocab_size: int, length: int, shortest_key: int) -> Example:
    """fuzzy_recall; keys have `shortest_key` .. 3 words."""
    words = vocab_size - 1
    pad = words
    count = length // 2  # no more pairs can fit
    split = jax.random.split(key, 5)
    place_3 = jnp.arange(MOTIF)
    key_size_P = jax.random.randint(split[0], (count,), shortest_key, MOTIF + 1)
    keys_P3 = _motifs(split[1], count, 0, words // 2)
    value_size_P = jax.random.randint(split[2], (count,), 1, MOTIF + 1)
    values_P3 = _motifs(split[3], count, words // 2, words)

    # Equal keys have equal words as far as they go, and are equally long.
    shown_P3 = jnp.where(place_3[None, :] < key_size_P[:, None], keys_P3, pad)
    same_PP = jnp.all(shown_P3[:, None, :] == shown_P3[None, :, :], axis=-1)
    first_P = _first_equal(same_PP)
    values_P3, value_size_P = values_P3[first_P], value_size_P[first_P]

    # As many pairs as leave room for the longest probe; then the probe, one of them.
    size_P = key_size_P + value_size_P
    end_P = jnp.cumsum(size_P)
    fits_P = end_P <= length - 2 * MOTIF
    probe = jax.random.categorical(split[4], jnp.where(fits_P, 0.0, -jnp.inf))
    number = jnp.sum(fits_P)
    pair_P = jnp.arange(count)
    source_P = jnp.where(pair_P == number, probe, pair_P)
    there_P = pair_P <= number
    seen_P = (first_P[source_P] < pair_P) & there_P
    key_size_P, value_size_P = key_size_P[source_P], value_size_P[source_P]
    size_P = jnp.where(there_P, key_size_P + value_size_P, 0)
    end_P = jnp.cumsum(size_P)
    start_P = length - end_P[-1] + end_P - size_P

    # Of every place the pair that is there, and how far it is in it; before the first one nothing.
    place_L = jnp.arange(length)
    pair_L = jnp.searchsorted(start_P, place_L, side="right", method="compare_all") - 1
    inside_L = place_L - start_P[pair_L]
    in_value_L = inside_L - key_size_P[pair_L]
    key_L = keys_P3[source_P[pair_L], jnp.minimum(inside_L, MOTIF - 1)]
    value_L = values_P3[source_P[pair_L], jnp.clip(in_value_L, 0, MOTIF - 1)]
    tokens_L = jnp.where(pair_L < 0, pad, jnp.where(in_value_L < 0, key_L, value_L))
    scored_L = (pair_L >= 0) & (in_value_L >= 0) & seen_P[pair_L]
    return _next_token(tokens_L, scored_L)


def selective_copying(key: Array, *, vocab_size: int, length: int) -> Example:
    key_words, key_places = jax.random.split(key)
    blank, copy = vocab_size - 2, vocab_size - 1
    words_A = jax.random.randint(key_words, (COPIED,), 0, blank)
    before = length - COPIED - 1
    bits = jax.random.bits(key_places, (before,))
    places_A = jnp.sort(jax.lax.top_k(bits, COPIED)[1])
    tokens_L = jnp.full((length,), blank).at[places_A].set(words_A).at[before].set(copy)
    asked_A = before + 1 + jnp.arange(COPIED)
    counts_A = jnp.ones((COPIED,), bool)
    return Example(tokens_L, asked_A, words_A, counts_A, counts_A, asked_A - places_A)


def memorization(key: Array, map_key: Array, *, vocab_size: int, length: int) -> Example:
    """`map_key` makes the values of the keys: it is the same for all rows."""
    insert = vocab_size - 1
    keys = insert // 2
    values = jax.random.permutation(map_key, jnp.arange(keys, 2 * keys))
    keys_A = jax.random.randint(key, (length // 2,), 0, keys)
    tokens_L = jnp.stack([keys_A, jnp.full_like(keys_A, insert)], axis=1).reshape(-1)
    counts_A = jnp.ones(keys_A.shape, bool)
    asked_A = 2 * jnp.arange(length // 2) + 1
    return Example(tokens_L, asked_A, values[keys_A], counts_A, counts_A)
