"""Tokenizers: lossless, strict about ids, never cutting a character."""

import io
import json
import os
import pickle
import re

import numpy as np
import pytest
import sentencepiece
import tokenizers as huggingface
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from bmojo_jax.config import DataConfig
from bmojo_jax.data import pipeline, sources, tokenizers, word_tokenizers

BOUNDARY = "<|endoftext|>"
TEXT = (
    "The memory of a window fades, and what surprises stays.\n\n"
    "It's 12:34 — don't you remember?  They'll   remember 1,024 windows: naïve 漢字 🙂!\r\n"
    "\tdef remember(window, memory):\n        return [memory for memory in window]\n"
)
BYTE_LEVEL = {
    "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=True),  # the space is not to be added
    "digits": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                huggingface.Regex(
                    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
                ),
                "isolated",
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}


def byte_level_bpe(pre_tokenizer=BYTE_LEVEL["gpt2"], alphabet=None):
    tokenizer = huggingface.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=[BOUNDARY, "<|user|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if alphabet is None else alphabet,
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    return tokenizer


def bpe_with_spaces_marked():
    """As of Llama 2: a space is put before every text, unknown characters are bytes."""
    tokenizer = huggingface.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=330, show_progress=False, special_tokens=specials)
    tokenizer.train_from_iterator(["▁" + word for word in TEXT[:170].split(" ")] * 3, trainer)
    definition = json.loads(tokenizer.to_str())
    definition["added_tokens"] = definition["added_tokens"][:3]
    return huggingface.Tokenizer.from_str(json.dumps(definition))


def unigram():
    """As of T5: its vocabulary has the text of the boundary, with the best of scores."""
    tokenizer = huggingface.Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=90, show_progress=False, special_tokens=["<unk>", "</s>"], unk_token="<unk>"
    )
    tokenizer.train_from_iterator([TEXT + "</s>"] * 3, trainer)
    return tokenizer


def word_piece():
    tokenizer = huggingface.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(
        vocab_size=150, show_progress=False, special_tokens=["[UNK]", "[CLS]", "[SEP]"]
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    return tokenizer


def sentence_piece(**options):
    model = io.BytesIO()
    options = {"model_type": "bpe", "vocab_size": 380, "byte_fallback": True} | options
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(TEXT.split("\n") * 3), model_writer=model, minloglevel=2, **options
    )
    return model.getvalue()


LIBRARY = {
    "gpt2": byte_level_bpe,
    "digits": lambda: byte_level_bpe(BYTE_LEVEL["digits"]),
    "marked": bpe_with_spaces_marked,
    "unigram": unigram,
    "word_piece": word_piece,
}
LLAMA = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
PIECES = {
    "sentencepiece": lambda: sentence_piece(**LLAMA),
    "sentencepiece_unigram": lambda: sentence_piece(
        model_type="unigram", byte_fallback=False, vocab_size=60
    ),
    "sentencepiece_no_prefix": lambda: sentence_piece(add_dummy_prefix=False, **LLAMA),
}
EXACT = ["bytes", "gpt2", "digits"]  # any bytes there and back
ALL = ["bytes", *LIBRARY, *PIECES]


@pytest.fixture(scope="module")
def path_of(tmp_path_factory):
    """Writes the file of a kind of tokenizer, once."""
    folder = tmp_path_factory.mktemp("tokenizers")

    def path(kind):
        if kind == "bytes":
            return "bytes"
        file = folder / (f"{kind}.model" if kind in PIECES else f"{kind}.json")
        if not file.exists():
            if kind in PIECES:
                file.write_bytes(PIECES[kind]())
            else:
                LIBRARY[kind]().save(str(file))
        return str(file)

    return path


@pytest.fixture(scope="module")
def make(path_of):
    return lambda kind, **data: tokenizers.make_tokenizer(
        DataConfig(tokenizer=path_of(kind), **data)
    )


def test_bytes_are_their_own_ids(rng, make):
    document = rng.integers(0, 256, 1000, np.uint8).tobytes()
    tokenizer = make("bytes")
    np.testing.assert_array_equal(tokenizer.encode(document), list(document))
    assert tokenizer.decode_bytes([65, tokenizer.boundary_id, 66]) == b"AB"


@pytest.mark.parametrize("kind", EXACT)
def test_any_bytes_round_trip(rng, make, kind):
    tokenizer = make(kind)
    noise = rng.integers(0, 256, 1000, np.uint8).tobytes()
    for document in (b"", noise, b"word", TEXT.encode() + noise + TEXT.encode(), b" \n\n  \r\n\0"):
        ids_L = tokenizer.encode(document)
        assert ids_L.dtype == np.int32
        assert tokenizer.decode_bytes(ids_L) == document
        assert tokenizer.token_bytes_V()[ids_L].sum() == len(document)


def test_text_is_utf8_and_bad_bytes_are_replaced(make):
    tokenizer = make("bytes")
    assert tokenizer.encode("é\r\n").tolist() == [0xC3, 0xA9, 13, 10]
    assert tokenizer.decode(tokenizer.encode("naïve 漢字 🙂")) == "naïve 漢字 🙂"
    assert tokenizer.decode([65, 0xFF, 66]) == "A\ufffdB"
    assert tokenizer.decode([]) == ""


@pytest.mark.parametrize("kind", ["marked", "sentencepiece", "sentencepiece_no_prefix"])
def test_unknown_characters_are_kept_by_fallback_to_bytes(make, kind):
    tokenizer = make(kind)
    document = "a ☃ b".encode()
    assert tokenizer.decode_bytes(tokenizer.encode(document)) == document


@pytest.mark.parametrize("kind", ["marked", "sentencepiece_unigram", "word_piece"])
def test_bytes_that_are_no_text_are_replaced_where_it_takes_that(make, kind):
    ids_L = make(kind).encode(b"the\xffmemory")
    np.testing.assert_array_equal(ids_L, make(kind).encode("the\ufffdmemory"))


@pytest.mark.parametrize("kind", LIBRARY)
def test_ids_and_text_are_those_of_the_library(path_of, make, kind):
    library = huggingface.Tokenizer.from_file(path_of(kind))
    if kind == "gpt2":
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = make(kind)
    ids = library.encode(TEXT, add_special_tokens=False).ids
    assert tokenizer.encode(TEXT).tolist() == ids
    assert tokenizer.decode(ids) == library.decode(ids)
    assert tokenizer.vocab_size == library.get_vocab_size()


@pytest.mark.parametrize("kind", PIECES)
def test_ids_and_text_are_those_of_sentencepiece(path_of, make, kind):
    processor = sentencepiece.SentencePieceProcessor(model_file=path_of(kind))
    tokenizer = make(kind)
    ids = processor.EncodeAsIds(TEXT)
    assert tokenizer.encode(TEXT).tolist() == ids
    assert tokenizer.decode(ids) == processor.DecodeIds(ids)
    assert tokenizer.boundary_id == processor.eos_id()


@pytest.mark.parametrize("kind", ALL)
def test_token_bytes_count_what_ids_stand_for(make, kind):
    tokenizer = make(kind)
    counts_V = tokenizer.token_bytes_V()
    assert counts_V.shape == (tokenizer.vocab_size,)
    for i in range(tokenizer.vocab_size):
        assert counts_V[i] == len(tokenizer.decode_bytes([i], continued=True))
    assert counts_V[tokenizer.boundary_id] == 0 < counts_V.sum()
    ids_L = tokenizer.encode(TEXT)
    # All of the text as it is decoded, and the space before it where there is one.
    beyond = counts_V[ids_L].sum() - len(tokenizer.decode_bytes(ids_L))
    prefixed = kind not in (*EXACT, "sentencepiece_no_prefix")
    assert beyond == (1 if prefixed else 0)


def test_validation_batches_count_the_bytes_of_the_documents(tmp_path, make):
    tokenizer = make("digits")
    for i in range(5):
        (tmp_path / f"{i}.txt").write_text(TEXT[7 * i :] * (i + 1))
    data = DataConfig(path=str(tmp_path), sequence_length=16, batch_size=2, validation_fraction=0.9)
    batches = pipeline.validation_batches(
        sources.open_source(data, "validation"), data, 4, tokenizer,
        shard=0, shards=1, limit=0,
    )  # fmt: skip
    counts_V = tokenizer.token_bytes_V()
    counted = sum((counts_V[b["targets"]] * b["weights"]).sum() for b in batches)
    documents = sources.read_split(data, "validation")
    assert counted == sum(map(len, documents)) > 0


@pytest.mark.parametrize("kind", [kind for kind in ALL if kind != "bytes"])
def test_names_of_special_tokens_are_text(make, kind):
    tokenizer = make(kind)
    names = {"gpt2": [BOUNDARY, "<|user|>"], "digits": [BOUNDARY, "<|user|>"]}
    names = names.get(kind, ["</s>", "<s>", "[SEP]", "[CLS]"])
    document = f"the{''.join(names)} window {' '.join(names)}{names[0]}"
    ids_L = tokenizer.encode(document)
    assert tokenizer.boundary_id not in ids_L
    # No other token without text either.
    assert (tokenizer.token_bytes_V()[ids_L] > 0).all() or kind in ("unigram", "word_piece")
    if kind in (*EXACT, "marked", "sentencepiece"):
        assert tokenizer.decode(ids_L) == document


@pytest.mark.parametrize("piece", [60, 97])
@pytest.mark.parametrize("kind", [kind for kind in ALL if kind != "bytes"])
def test_a_long_document_has_the_ids_of_the_whole(monkeypatch, make, kind, piece):
    tokenizer = make(kind)
    document = TEXT * 9
    monkeypatch.setattr(word_tokenizers, "_PIECE", len(document))
    whole = tokenizer.encode(document)
    monkeypatch.setattr(word_tokenizers, "_PIECE", piece)
    np.testing.assert_array_equal(tokenizer.encode(document), whole)
    pieces = list(word_tokenizers.cut(document, 0))
    assert len(pieces) > len(document) / piece and max(map(len, pieces)) <= piece


def test_a_document_without_borders_is_cut_anywhere(make):
    document = "memory漢" * 20_000
    tokenizer = make("gpt2")
    assert tokenizer.decode(tokenizer.encode(document)) == document


@pytest.mark.parametrize("kind", ALL)
def test_tokenizers_are_saved_and_pickled(make, kind):
    tokenizer = make(kind)
    ids_L = tokenizer.encode(TEXT)
    saved = tokenizers.from_dict(json.loads(json.dumps(tokenizer.to_dict())))
    for other in (saved, pickle.loads(pickle.dumps(tokenizer))):
        assert type(other) is type(tokenizer)
        np.testing.assert_array_equal(other.encode(TEXT), ids_L)
        assert other.fingerprint() == tokenizer.fingerprint() == make(kind).fingerprint()
        assert (other.boundary_id, other.vocab_size) == (
            tokenizer.boundary_id,
            tokenizer.vocab_size,
        )


def test_fingerprints_tell_tokenizers_apart(make):
    made = [make(kind).fingerprint() for kind in ALL]
    assert len({*made, make("gpt2", boundary_token="<|user|>").fingerprint()}) == len(ALL) + 1


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="kind='words': must be"):
        tokenizers.from_dict({"kind": "words"})


@pytest.mark.parametrize("kind", ["bytes", "gpt2", "sentencepiece"])
def test_unknown_ids_are_refused(make, kind):
    tokenizer = make(kind)
    for bad in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=f"{bad}.*{tokenizer.vocab_size}"):
            tokenizer.decode([65, bad])


def test_the_boundary_is_the_usual_one_or_that_of_the_settings(make):
    wanted = {"gpt2": 0, "unigram": 1, "marked": 2, "word_piece": 2}
    assert {kind: make(kind).boundary_id for kind in wanted} == wanted
    assert make("gpt2", boundary_token="<|user|>").boundary_id == 1
    assert make("sentencepiece", boundary_token="<s>").boundary_id == 1


@pytest.mark.parametrize(
    ("kind", "token", "valid"),
    [
        ("gpt2", "</s>", "'<|endoftext|>'"),
        ("sentencepiece", "[END]", "'</s>'"),
        ("gpt2", "e", "stands for no text"),  # "e" is text
        ("bytes", "</s>", "must be empty"),
    ],
)
def test_wrong_boundaries_are_refused(make, kind, token, valid):
    with pytest.raises(ValueError, match=rf"data.boundary_token='{re.escape(token)}'.*") as info:
        make(kind, boundary_token=token)
    assert valid in str(info.value)


def test_a_tokenizer_without_a_boundary_asks_for_one(tmp_path):
    definition = json.loads(byte_level_bpe().to_str())
    text = json.dumps(definition).replace(BOUNDARY, "<|document|>")
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(ValueError, match=r"data.boundary_token=''.*<\|document\|>"):
        tokenizers.make_tokenizer(DataConfig(tokenizer=str(tmp_path / "t.json")))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("words", None, "No such file"),
        ("folder.json", "", "directory"),
        ("text.json", b"not JSON", "Expecting value"),
        ("binary.json", b"\xff\xfe\x00", "decode"),
        ("list.json", b"[1]", "no model"),
        ("other.json", b'{"model": {"type": "Strange"}}', "Strange|model|variant"),
        ("text.model", b"not a model", "pars|proto|model"),
    ],
)
def test_wrong_files_are_refused(tmp_path, name, content, reason):
    path = tmp_path / name
    if content == "":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    message = rf"data.tokenizer='{re.escape(str(path))}': must be \"bytes\", or the path.*{reason}"
    with pytest.raises(ValueError, match=rf"(?s){message}"):
        tokenizers.make_tokenizer(DataConfig(tokenizer=str(path)))


def test_byte_level_tokenizers_that_lose_bytes_are_refused(tmp_path):
    byte_level_bpe(alphabet=["a", "b"]).save(str(tmp_path / "t.json"))
    with pytest.raises(ValueError, match=r"data.tokenizer=.*of 256 bytes"):
        tokenizers.make_tokenizer(DataConfig(tokenizer=str(tmp_path / "t.json")))


def test_what_makes_encoding_random_or_short_is_left_out(tmp_path, make):
    library = byte_level_bpe()
    library.enable_truncation(3)
    library.enable_padding(length=500)
    definition = json.loads(library.to_str())
    definition["model"]["dropout"] = 0.5
    (tmp_path / "t.json").write_text(json.dumps(definition))
    tokenizer = tokenizers.make_tokenizer(DataConfig(tokenizer=str(tmp_path / "t.json")))
    np.testing.assert_array_equal(tokenizer.encode(TEXT), make("gpt2").encode(TEXT))


@pytest.mark.parametrize("step", [1, 2, 3, 7])
@pytest.mark.parametrize("kind", ALL)
def test_streaming_equals_decoding_at_once(rng, make, kind, step):
    tokenizer = make(kind)
    ids = [
        tokenizer.boundary_id,
        *tokenizer.encode("aé漢🙂 a window" * 5),
        tokenizer.boundary_id,
        *rng.integers(0, tokenizer.vocab_size, 200),
        *tokenizer.encode("漢")[:-1],
    ]
    decoder = tokenizers.StreamingDecoder(tokenizer)
    pieces = [decoder.push(ids[start : start + step]) for start in range(0, len(ids), step)]
    assert "".join(pieces) + decoder.finish() == tokenizer.decode(ids)


def test_streaming_holds_back_an_unfinished_character(make):
    decoder = tokenizers.StreamingDecoder(make("bytes"))
    assert [decoder.push([byte]) for byte in "漢!".encode()] == ["", "", "漢", "!"]
    assert decoder.push([0xE6]) == ""
    assert decoder.finish() == "\ufffd"


@pytest.mark.parametrize("kind", ALL)
def test_a_continued_prompt_keeps_its_space(make, kind):
    tokenizer = make(kind)
    ids = tokenizer.encode("the memory window").tolist()
    border = len(tokenizer.encode("the memory"))
    decoder = tokenizers.StreamingDecoder(tokenizer)
    before = decoder.push([tokenizer.boundary_id, *ids[:border]])
    assert (before, decoder.push(ids[border:])) == ("the memory", " window")


def test_forks_are_not_warned_of(monkeypatch, make):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    make("gpt2")
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"


def test_a_normaliser_makes_no_boundary_of_text(tmp_path):
    tokenizer = unigram()
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.save(str(tmp_path / "nfkc.json"))
    got = tokenizers.make_tokenizer(DataConfig(tokenizer=str(tmp_path / "nfkc.json")))
    wide = "a \uff1c/s\uff1e b"  # NFKC makes </s> of it
    assert got.boundary_id in tokenizer.encode(wide, add_special_tokens=False).ids
    ids = got.encode(wide)
    assert got.boundary_id not in ids and len(ids) > 2
