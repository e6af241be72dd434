"""A trained BPE: of the right size, of the training documents alone, the same each time."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from bmojo_jax import closing, trainer
from bmojo_jax.config import DataConfig
from bmojo_jax.data import sources, tokenizers, train_tokenizer, word_tokenizers
from bmojo_jax.data.train_tokenizer import BOUNDARY
from tests.runs import WORDS, tiny_run

ROOT = pathlib.Path(__file__).parents[2]
SIZE = 300


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Documents of words; of those held out one word more."""
    folder = tmp_path_factory.mktemp("documents")
    rng = np.random.default_rng(0)
    for split, words in (("train", WORDS), ("held_out", (*WORDS, "quizzical"))):
        (folder / split).mkdir()
        for i in range(6):
            text = " ".join(rng.choice(words, size=200))
            (folder / split / f"{i}.txt").write_text(f"It's {i}{i}7 — {text}.\n\n    é\r\n")
    return DataConfig(path=str(folder), include="train/*", validation_include="held_out/*")


@pytest.fixture(scope="module")
def trained(data):
    return train_tokenizer.train(data, vocab_size=SIZE)


@pytest.fixture(scope="module")
def tokenizer(trained):
    return word_tokenizers.HuggingFaceTokenizer(json.loads(trained.to_str()))


def test_it_has_the_size_and_the_boundary(trained, tokenizer):
    assert tokenizer.vocab_size == SIZE == trained.get_vocab_size()
    assert tokenizer.boundary_id == trained.token_to_id(BOUNDARY)
    words = {tokenizer.decode([i]) for i in range(SIZE)}
    assert {" window", " surprises", "'s"} <= words


def test_held_out_documents_are_not_trained_on(data, trained, tokenizer):
    assert any("quizzical" in text.decode() for text in sources.read_split(data, "validation"))
    assert len(tokenizer.encode(" quizzical")) > 6
    moved = DataConfig(path=data.path, include="held_out/*", validation_include="train/*")
    other = train_tokenizer.train(moved, vocab_size=SIZE)
    assert other.token_to_id("Ġquizzical") and not trained.token_to_id("Ġquizzical")


def test_training_again_gives_the_same(monkeypatch, data, trained):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    assert train_tokenizer.train(data, vocab_size=SIZE).to_str() == trained.to_str()
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("Don't you  see?", ["Don", "'t", " you", " ", " see", "?"]),
        ("they’ll 'tis o'clock", ["they", "’ll", " '", "tis", " o", "'", "clock"]),  # noqa: RUF001
        ("in 1984, x=5", ["in", " ", "1", "9", "8", "4", ",", " x", "=", "5"]),
        ("a:\r\n\n    b\t\n", ["a", ":", "\r\n\n", "   ", " b", "\t", "\n"]),
        ("cafe\u0301 漢字…!?", ["cafe\u0301", " 漢字", "…!?"]),
    ],
)
def test_parts_of_a_text(trained, text, parts):
    found = trained.pre_tokenizer.pre_tokenize_str(text)
    assert [text[first:last] for _, (first, last) in found] == parts


def test_any_bytes_round_trip(rng, data, tokenizer):
    noise = rng.integers(0, 256, 2000, np.uint8).tobytes()
    for document in (*sources.read_split(data, "validation"), noise, BOUNDARY.encode()):
        ids_L = tokenizer.encode(document)
        assert tokenizer.decode_bytes(ids_L) == document
        assert tokenizer.boundary_id not in ids_L


@pytest.mark.parametrize("piece", [60, 101])
def test_a_long_document_has_the_ids_of_the_whole(monkeypatch, rng, tokenizer, piece):
    words = [*WORDS, "\n\n", "  ", "a's", "7,", "—", "\t", "\r\n ", "1", "e\u0301"]
    document = " window fades ".join(rng.choice(words) + " " * rng.integers(3) for _ in range(2000))
    whole = tokenizer._encode_piece(document)
    monkeypatch.setattr(word_tokenizers, "_PIECE", piece)
    np.testing.assert_array_equal(tokenizer.encode(document), whole)


def test_compression_counts_bytes_and_tokens(data, tokenizer):
    documents = sources.read_split(data, "validation")
    got = train_tokenizer.compression(tokenizer, data, "validation")
    tokens = sum(len(tokenizer.encode(document)) for document in documents)
    assert got == (len(documents), sum(map(len, documents)), tokens)
    assert str(got).startswith(f"{got.bytes / tokens:.3f} bytes per token")


def test_too_few_words_are_refused(data):
    with pytest.raises(ValueError, match="vocab_size=256: must be at least 257"):
        train_tokenizer.train(data, vocab_size=256)
    assert train_tokenizer.train(data, vocab_size=257).get_vocab_size() == 257


def test_files_are_written_whole_and_never_over_others(tmp_path):
    path = tmp_path / "tokenizer.json"
    train_tokenizer.write_new("first", path)
    with pytest.raises(FileExistsError):
        train_tokenizer.write_new("second", path)
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_the_command(tmp_path, data, trained):
    output = tmp_path / "tokenizer.json"
    command = [sys.executable, "-m", "bmojo_jax.data.train_tokenizer"]
    command += ["--path", data.path, "--include", data.include, "--output", str(output)]
    command += ["--validation_include", data.validation_include, "--vocab_size", str(SIZE)]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    words, training, held_out = first.stdout.splitlines()
    assert words.startswith(f"{output}: {SIZE} words in ")
    assert training.startswith("training: ") and held_out.startswith("held out: ")
    made = tokenizers.make_tokenizer(DataConfig(tokenizer=str(output)))
    assert made.to_dict()["definition"] == json.loads(trained.to_str())

    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 1
    assert again.stderr.strip().endswith(
        f"--output={str(output)!r}: must be a new file; this one exists"
    )


@pytest.mark.slow
def test_a_run_needs_its_tokenizer_only_at_its_start(tmp_path, capsys, data, trained, tokenizer):
    path, workdir = tmp_path / "tokenizer.json", tmp_path / "run"
    trained.save(str(path))
    config = tiny_run(tmp_path, model={"vocab_size": SIZE + 12})
    changes = {
        "tokenizer": str(path),
        **{name: getattr(data, name) for name in ("path", "include", "validation_include")},
    }
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, **changes),
        sample_prompt="the window",
        sample_tokens=30,
        compare_with="zlib_and_bigram",
    )
    outcome = trainer.train(config, workdir)
    held_out = sources.read_split(data, "validation")
    num_bytes = sum(map(len, held_out))
    assert outcome.validation.num_bytes == num_bytes
    tokens = sum(len(tokenizer.encode(document)) + 1 for document in held_out)
    assert outcome.validation.targets == tokens < num_bytes / 2

    path.unlink()
    closing.report(config, outcome, workdir)
    assert f"on the same {num_bytes:,} held-out bytes\n" in capsys.readouterr().out
    sample = (workdir / "sample.txt").read_text()
    assert sample.startswith("the window") and len(sample) > len("the window")
    command = [sys.executable, "-m", "bmojo_jax.generate", "--workdir", str(workdir)]
    command += ["--prompt", "the window", "--tokens", "30", "--seed", "1"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("the window") and len(process.stdout) > len("the window\n")
