import dataclasses
import math
import zlib

import numpy as np
import pytest

from bmojo_jax import checks
from bmojo_jax.config import DataConfig, TrainConfig
from bmojo_jax.data import baselines


def test_zlib_counts_the_compressed_bytes_of_one_stream():
    documents = [b"abc" * 50, b"abc" * 50]
    # The second document repeats the first: one stream costs less than two.
    assert baselines.zlib_bits_per_byte(documents) == 8 * len(zlib.compress(b"abc" * 100, 9)) / 300
    apart = sum(len(zlib.compress(document, 9)) for document in documents)
    assert baselines.zlib_bits_per_byte(documents) < 8 * apart / 300


def test_zlib_of_noise_is_eight_bits():
    noise = np.random.default_rng(0).integers(0, 256, 20_000).astype(np.uint8).tobytes()
    assert baselines.zlib_bits_per_byte([noise]) == pytest.approx(8, rel=2e-3)


def test_bigram_by_hand():
    # Pairs of the training documents "aab" and "b", | being the boundary: |a aa ab b| |b b|.
    # Of |, a once and b once; of a, a once and b once; of b, | twice. Each count has 0.1 more,
    # over 257 ids.
    after_boundary_a = 1.1 / 27.7
    after_a_b = 1.1 / 27.7
    after_b_boundary = 2.1 / 27.7
    nats = -math.log(after_boundary_a * after_a_b * after_b_boundary)
    got = baselines.bigram_bits_per_byte([b"aab", b"b"], [b"ab"])
    assert got == pytest.approx(nats / math.log(2) / 2, rel=1e-12)


def test_bigram_of_what_was_never_seen_is_uniform():
    # |z, zz, z|: of z nothing was counted, so all 257 ids are equally likely; |z has 0.1 of 26.7.
    nats = -math.log(0.1 / 26.7) + 2 * math.log(257)
    got = baselines.bigram_bits_per_byte([b"a"], [b"zz"])
    assert got == pytest.approx(nats / math.log(2) / 2, rel=1e-12)


def test_bigram_adds_documents_up():
    training = [b"banana", b"bandana"]
    one, two = (baselines.bigram_bits_per_byte(training, [text]) for text in (b"ban", b"anna"))
    both = baselines.bigram_bits_per_byte(training, [b"ban", b"anna"])
    assert both == pytest.approx((3 * one + 4 * two) / 7, rel=1e-12)


def test_nothing_is_compared_where_bytes_are_unknown():
    config = TrainConfig(
        data=DataConfig(source="tokens"), eval_batches=0, compare_with="zlib_and_bigram"
    )
    with pytest.raises(ValueError, match=r"compare_with='zlib_and_bigram'.*data.source='tokens'"):
        checks.check_comparison(config)
    checks.check_comparison(dataclasses.replace(config, compare_with="nothing"))
    text = dataclasses.replace(config.data, source="text")
    checks.check_comparison(dataclasses.replace(config, data=text))
