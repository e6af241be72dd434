"""Tokenizers: lossless, strict about ids, never cutting a character."""

import numpy as np
import pytest

from bmojo_jax.config import DataConfig
from bmojo_jax.data import tokenizers


def test_bytes_round_trip(rng):
    document = rng.integers(0, 256, 1000, np.uint8).tobytes()
    tokenizer = tokenizers.make_tokenizer(DataConfig())
    ids_L = tokenizer.encode(document)
    assert ids_L.dtype == np.int32
    np.testing.assert_array_equal(ids_L, list(document))
    assert tokenizer.decode_bytes(ids_L) == document
    assert tokenizer.decode_bytes([65, tokenizer.boundary_id, 66]) == b"AB"


def test_text_is_utf8_and_bad_bytes_are_replaced():
    tokenizer = tokenizers.make_tokenizer(DataConfig())
    assert tokenizer.encode("é\r\n").tolist() == [0xC3, 0xA9, 13, 10]
    assert tokenizer.decode(tokenizer.encode("naïve 漢字 🙂")) == "naïve 漢字 🙂"
    assert tokenizer.decode([65, 0xFF, 66]) == "A\ufffdB"
    assert tokenizer.decode([]) == ""


def test_token_bytes_count_what_ids_stand_for():
    tokenizer = tokenizers.make_tokenizer(DataConfig())
    counts_V = tokenizer.token_bytes_V()
    assert counts_V.shape == (tokenizer.vocab_size,)
    for index in (0, 17, 255, tokenizer.boundary_id):
        assert counts_V[index] == len(tokenizer.decode_bytes([index]))


@pytest.mark.parametrize("bad", [-1, 257])
def test_unknown_ids_are_refused(bad):
    with pytest.raises(ValueError, match=f"{bad}.*257"):
        tokenizers.make_tokenizer(DataConfig()).decode([65, bad])


def test_unknown_tokenizer_is_refused():
    with pytest.raises(ValueError, match=r"data.tokenizer='words'.*bytes"):
        tokenizers.make_tokenizer(DataConfig(tokenizer="words"))


@pytest.mark.parametrize("step", [1, 2, 3, 7])
def test_streaming_equals_decoding_at_once(rng, step):
    tokenizer = tokenizers.make_tokenizer(DataConfig())
    text = "aé漢🙂" * 5
    ids = [*tokenizer.encode(text), 256, *rng.integers(0, 257, 200), 0xE6, 0xBC]
    decoder = tokenizers.StreamingDecoder(tokenizer)
    pieces = [decoder.push(ids[start : start + step]) for start in range(0, len(ids), step)]
    assert "".join(pieces) + decoder.finish() == tokenizer.decode(ids)


def test_streaming_holds_back_an_unfinished_character():
    tokenizer = tokenizers.make_tokenizer(DataConfig())
    decoder = tokenizers.StreamingDecoder(tokenizer)
    assert [decoder.push([byte]) for byte in "漢!".encode()] == ["", "", "漢", "!"]
    assert decoder.push([0xE6]) == ""
    assert decoder.finish() == "\ufffd"
