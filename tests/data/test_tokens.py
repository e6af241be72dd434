"""Token files: the same batches as the text they are of; what does not fit is refused."""

import dataclasses
import json
import pickle

import numpy as np
import pytest

from bmojo_jax.config import DataConfig, SourceConfig
from bmojo_jax.data import pipeline, sources, tokenize, tokenizers, tokens
from bmojo_jax.data.tokenizers import ByteTokenizer


@pytest.fixture
def text(tmp_path, rng):
    """40 short files and one that is longer than a record."""
    folder = tmp_path / "text"
    folder.mkdir()
    for n in range(40):
        size = 50_000 if n == 11 else rng.integers(1, 3000)
        (folder / f"{n}.txt").write_bytes(rng.integers(64, 127, size, np.uint8).tobytes())
    return DataConfig(path=str(folder), validation_fraction=0.3, sequence_length=64, batch_size=4)


@pytest.fixture
def written(text, tmp_path):
    tokenize.tokenize(text, tmp_path / "tokens", shards=3, processes=1)
    return dataclasses.replace(text, source="tokens", path=str(tmp_path / "tokens"))


def edit(data, **changes):
    path = f"{data.path}/{tokens.DESCRIPTION}"
    with open(path) as file:
        description = json.load(file)
    with open(path, "w") as file:
        json.dump(description | changes, file)


def documents(source):
    """All documents of framed ids, as bytes."""
    ids = np.concatenate([source[index] for index in range(len(source))])
    parts = np.split(ids, np.flatnonzero(ids == 256))
    return [bytes(part[1:].tolist()) for part in parts if len(part) > 1]


def validation(data):
    source = sources.open_source(data, "validation")
    return list(
        pipeline.validation_batches(source, data, 4, ByteTokenizer(), shard=0, shards=1, limit=0)
    )


def test_records_hold_all_documents_whole(text, written):
    source = tokens.open_tokens(written, written, "train")
    sizes = [len(source[index]) for index in range(len(source))]
    for index, size in enumerate(sizes):
        record = source[index]
        assert record.dtype == np.int32
        assert record[0] == record[-1] == 256
        assert size <= tokens.RECORD_TOKENS + 1 or np.count_nonzero(record == 256) == 2
    assert sum(size > tokens.RECORD_TOKENS for size in sizes) == 1
    assert len(source) < 8  # and not one record for each document
    read = sources.read_split(text, "train")
    assert sorted(documents(source)) == sorted(read)
    assert documents(source) != read


def test_validation_is_bit_for_bit_that_of_the_text(text, written):
    for batch, wanted in zip(validation(written), validation(text), strict=True):
        for name in wanted:
            np.testing.assert_array_equal(batch[name], wanted[name])


def test_a_source_goes_through_pickling(written):
    source = sources.open_source(written, "train")
    source[0]
    copy = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(copy[1], source[1])
    assert copy.fingerprint() == source.fingerprint()
    assert source.fingerprint() != tokens.open_tokens(written, written, "validation").fingerprint()


def test_training_resumes_within_a_record(written):
    written = dataclasses.replace(written, shuffle_window=3, document_start="chunk")
    source = sources.open_source(written, "train")

    def train():
        return pipeline.train_iterator(source, written, 16, ByteTokenizer(), shard=0, shards=1)

    iterator = train()
    for _ in range(31):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    assert state["parent"]["done"] > 0
    expected = [next(iterator) for _ in range(3)]
    iterator.close()
    resumed = train()
    resumed.set_state(state)
    for wanted in expected:
        batch = next(resumed)
        assert all((batch[name] == wanted[name]).all() for name in wanted)
    resumed.close()


def test_the_tokenizer_is_that_of_the_files(written):
    assert isinstance(tokenizers.make_tokenizer(written), ByteTokenizer)
    edit(written, tokenizer_fingerprint="another")
    with pytest.raises(ValueError, match=r"data\.path=.* must have been tokenized by the tokenize"):
        tokens.open_tokens(written, written, "train")
    mixed_in = SourceConfig(source="tokens", path=written.path)
    main = DataConfig(path="text", mixed_in=(SourceConfig(path="x"), mixed_in))
    with pytest.raises(ValueError, match=r"data\.mixed_in\[1\]\.path=.* 257 words; it was by"):
        tokens.open_tokens(mixed_in, main, "train")


@pytest.mark.parametrize("vocab_size, dtype", [(257, "<u2"), (65_536, "<u2"), (65_537, "<u4")])
def test_ids_take_two_bytes_where_they_fit(vocab_size, dtype):
    assert tokens.dtype_of(vocab_size) == np.dtype(dtype)
    assert vocab_size - 1 <= np.iinfo(tokens.dtype_of(vocab_size)).max


def test_what_is_no_finished_folder_is_refused(written, tmp_path):
    for path in ("", str(tmp_path / "nothing"), str(tmp_path / "text")):
        data = dataclasses.replace(written, path=path)
        with pytest.raises(ValueError, match=r"data\.path=.*must be a folder that python -m bmoj"):
            tokenizers.make_tokenizer(data)
    with pytest.raises(ValueError, match=r"data\.split='tests': must be one of \('train', 'vali"):
        tokens.open_tokens(dataclasses.replace(written, split="tests"), written, "train")
    name = "train-00001-of-00003.array_record"
    path = tmp_path / "tokens" / name
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=rf"must be complete; {name} has {len(content) - 1} bytes"):
        tokens.open_tokens(written, written, "train")
    path.unlink()
    with pytest.raises(ValueError, match=rf"must be complete; {name} has None bytes"):
        tokens.open_tokens(written, written, "train")
    edit(written, format=2)
    with pytest.raises(ValueError, match=r"must be of format 1; tokens\.json says 2"):
        tokens.open_tokens(written, written, "train")


def test_what_is_held_out_is_not_trained_on(written):
    with pytest.raises(ValueError, match=r"data\.split='validation': must be another split"):
        sources.open_source(dataclasses.replace(written, split="validation"), "train")
    held_out = SourceConfig(source="tokens", path=f"{written.path}/.", split="validation")
    mixed = dataclasses.replace(written, mixed_in=(held_out,))
    with pytest.raises(
        ValueError, match=r"data\.mixed_in\[0\]\.split='validation': must be another"
    ):
        sources.open_mixed_in(mixed)
