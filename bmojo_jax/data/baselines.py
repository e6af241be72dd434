"""What needs no model: zlib and a byte bigram on the same held-out bytes, in bits per byte."""

import math
import zlib
from collections.abc import Sequence

import numpy as np

from bmojo_jax.data.tokenizers import ByteTokenizer

SMOOTHING = 0.1  # added to every count of the bigram, so that nothing has probability 0


def zlib_bits_per_byte(documents: Sequence[bytes]) -> float:
    """Level 9 over all documents in one stream."""
    text = b"".join(documents)
    return 8 * len(zlib.compress(text, level=9)) / len(text)


def bigram_bits_per_byte(training: Sequence[bytes], documents: Sequence[bytes]) -> float:
    """A bigram model of bytes and document boundaries, counted on `training`.

    Like the language model it pays for predicting each document's end.
    """
    tokenizer = ByteTokenizer()
    vocab = tokenizer.vocab_size
    boundary = np.array([tokenizer.boundary_id])

    def counts(texts: Sequence[bytes]) -> np.ndarray:
        total = np.zeros(vocab * vocab, np.int64)
        for text in texts:
            ids = np.concatenate([boundary, tokenizer.encode(text), boundary])
            total += np.bincount(ids[:-1] * vocab + ids[1:], minlength=vocab * vocab)
        return total.reshape(vocab, vocab)

    smoothed = counts(training) + SMOOTHING
    log_probability = np.log(smoothed / smoothed.sum(axis=1, keepdims=True))
    nll = -(counts(documents) * log_probability).sum()
    return nll / math.log(2) / sum(len(document) for document in documents)
