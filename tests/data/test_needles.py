"""Needle prompts: wording, what is hidden, lengths, determinism, and their source."""

import dataclasses
import pickle
import re

import numpy as np
import pytest

from bmojo_jax.config import DataConfig, SourceConfig
from bmojo_jax.data import pipeline, sources
from bmojo_jax.data.documents import BadDocument
from bmojo_jax.data.tasks import needles, words
from bmojo_jax.data.tasks.needles import NOISE, VARIANTS, Needles
from bmojo_jax.data.tasks.prompts import count
from bmojo_jax.data.tokenizers import ByteTokenizer

TOKENIZER = ByteTokenizer()
NEEDLE = re.compile(r"One of the special magic (\w+) for (\S+) is: (\S+)\.")
SENTENCE = "This is sentence number {} of the essay, he said."


class Essays:
    """Documents whose sentences tell where they are from."""

    def __init__(self, documents):
        self.documents = documents

    def __len__(self):
        return len(self.documents)

    def __getitem__(self, index):
        return self.documents[index]

    def fingerprint(self):
        return str(len(self.documents))


ESSAYS = Essays(
    [" \n".join(SENTENCE.format(f"{d}.{i}") for i in range(60)).encode() for d in ("a", "b", "c")]
)


class QuarterTokenizer(ByteTokenizer):
    """One word for four bytes: parts have more tokens than the whole (first=0), or fewer (3)."""

    def __init__(self, first):
        self.first = first

    def encode(self, document):
        return super().encode(document)[self.first :: 4]


def generator(seed=0, essays=ESSAYS, tokenizer=TOKENIZER):
    return Needles(tokenizer, seed=seed, essays=essays)


def test_words_are_many_and_different():
    for group in (words.ADJECTIVES, words.NOUNS, words.FIRST_NAMES, words.LAST_NAMES):
        assert len(group) == len(set(group)) > 150
        assert all(word.isascii() and word.isalpha() for word in group)


def test_wording_of_one_needle():
    prompt = generator().prompt("single_1", 3, length=700)
    ((kind, key, value),) = NEEDLE.findall(prompt.prompt)
    assert kind == "numbers" and re.fullmatch(r"[1-9]\d{6}", value)
    assert re.fullmatch(r"[a-z]+-[a-z]+", key)
    head, *middle, question = prompt.prompt.split("\n")
    assert head == (
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards."
    )
    assert question == (
        f"What is the special magic number for {key} mentioned in the provided text?"
    )
    assert prompt.answer_prefix == (
        f" The special magic number for {key} mentioned in the provided text is"
    )
    assert prompt.text == prompt.prompt + prompt.answer_prefix + f" {value}."
    assert prompt.references == (value,)
    # Nothing else stands between them but noise, in its order.
    rest = NEEDLE.sub("", " ".join(middle)).split(". ")
    expected = [sentence.rstrip(".") for sentence in NOISE]
    rest = [sentence.strip().rstrip(".") for sentence in rest if sentence.strip()]
    assert rest == [expected[i % 5] for i in range(len(rest))] and len(rest) > 8


def test_wording_of_several_queries():
    prompt = generator().prompt("multiquery", 0, length=1500)
    found = {key: value for _, key, value in NEEDLE.findall(prompt.prompt)}
    assert len(found) == 4
    asked = re.search(r"numbers for (.*) mentioned in the provided text\?$", prompt.prompt)
    *first, last = asked.group(1).split(", ")
    keys = [*first, last.removeprefix("and ")]
    assert last.startswith("and ") and prompt.references == tuple(found[key] for key in keys)
    assert prompt.prompt.startswith("Some special magic numbers are hidden within")
    assert "\nWhat are all the special magic numbers for" in prompt.prompt
    assert prompt.answer_prefix.endswith("provided text are")
    assert prompt.text.endswith(" are " + ", ".join(prompt.references) + ".")


@pytest.mark.parametrize("variant", VARIANTS)
def test_needles_of_every_variant(variant):
    setting = VARIANTS[variant]
    number = re.compile(r"[1-9]\d{6}")
    uuid4 = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
    prompt = generator().prompt(variant, 1, length=2500)
    found = NEEDLE.findall(prompt.prompt)
    values = [value for _, _, value in found]
    assert len(set(values)) == len(values)
    form = number if setting.value == "number" else uuid4
    assert all(form.fullmatch(value) for value in values)
    assert {kind for kind, _, _ in found} == {f"{setting.value}s"}
    keys = [key for _, key, _ in found]
    if setting.haystack == "needles":
        assert len(set(keys)) == len(keys) > 10
    else:
        assert len(keys) == setting.keys * setting.values and len(set(keys)) == setting.keys
    asked = [key for key in dict.fromkeys(keys) if key in prompt.answer_prefix]
    assert len(asked) == setting.queries
    of_asked = [value for _, key, value in found if key in asked]
    assert sorted(prompt.references) == sorted(of_asked)
    assert len(of_asked) == setting.queries * setting.values == len(prompt.depths)
    if setting.values > 1:  # in the order of the text
        assert list(prompt.references) == of_asked and list(prompt.depths) == sorted(prompt.depths)
    essay = "sentence number" in prompt.prompt
    assert essay == (setting.haystack == "essay")
    assert (NOISE[0] in prompt.prompt) == (setting.haystack == "noise")


def test_essays_are_whole_sentences_that_follow_one_another():
    prompt = generator().prompt("single_2", 5, length=9000)  # longer than a document
    text = NEEDLE.sub("", prompt.prompt.split("\n")[1])
    got = re.findall(r"This is sentence number (\w)\.(\d+) of the essay, he said\.", text)
    assert " ".join(SENTENCE.format(f"{d}.{i}") for d, i in got) == " ".join(text.split())
    places = ["abc".index(d) * 60 + int(i) for d, i in got]
    assert (np.diff(places) % 180 == 1).all() and len(got) > 120
    starts = set()
    for index in range(8):
        starts.add(
            re.search(
                r"number (\w\.\d+)", generator().prompt("single_2", index, length=700).prompt
            )[1]
        )
    assert len(starts) > 5


def test_unusable_and_long_winded_essays():
    ids = np.array([256, *b"Of tokens we are made. We are many. So many.", 256], np.int32)
    prompt = generator(essays=Essays([BadDocument("x", "bad"), b" ", ids])).prompt(
        "single_2", 0, length=800
    )
    assert prompt.prompt.count("We are many.") > 5
    endless = [*needles.sentences_from("word " * 100, 0)]
    assert [len(sentence.split()) for sentence in endless] == [40, 40, 20]
    assert [*needles.sentences_from("One two. Three.", 2)] == ["Three."]
    with pytest.raises(ValueError, match="no more parts"):
        generator(essays=Essays([b" "])).prompt("single_2", 0, length=800)


@pytest.mark.parametrize("tokenizer", [TOKENIZER, QuarterTokenizer(0), QuarterTokenizer(3)])
@pytest.mark.parametrize("length", [512, 777, 4000])
@pytest.mark.parametrize("variant", ["single_1", "single_2", "multikey_2"])
def test_prompts_are_as_long_as_fits(variant, length, tokenizer):
    longest_step = {"single_1": 25, "single_2": 60, "multikey_2": 75}[variant]
    if tokenizer is not TOKENIZER:
        longest_step = longest_step // 4 + 1
    for index in range(5):
        prompt = generator(tokenizer=tokenizer).prompt(variant, index, length=length)
        tokens = count(tokenizer, prompt.text)
        assert length - longest_step < tokens <= length


def test_too_short_a_length_is_refused():
    with pytest.raises(ValueError, match=r"needles multiquery: length=400 .* at least \d{3,}"):
        generator().prompt("multiquery", 0, length=400)


def test_prompts_depend_on_seed_variant_and_index_alone():
    one, other = generator(seed=4), generator(seed=4)
    other.prompt("single_1", 0, length=600)
    assert one.prompt("multivalue", 9, length=900) == other.prompt("multivalue", 9, length=900)
    texts = {
        generator(seed=seed).prompt(variant, index, length=900).text
        for seed in (4, 5)
        for variant in ("single_1", "single_2")
        for index in (9, 10)
    }
    assert len(texts) == 8
    # A longer haystack leaves needles, order and question as they are.
    short, long = (one.prompt("multikey_1", 2, length=length) for length in (900, 3000))
    assert NEEDLE.findall(short.text) == NEEDLE.findall(long.text)
    assert (short.references, short.depths) == (long.references, long.depths)


def test_depths_are_uniform_and_true():
    prompts = [generator().prompt("single_1", i, length=2500) for i in range(300)]
    depths = np.array([prompt.depths[0] for prompt in prompts])
    counts, _ = np.histogram(depths, bins=5, range=(0, 1))
    assert counts.min() > 35
    for prompt in prompts[:50]:
        text = prompt.prompt.split("\n")[1]
        place = NEEDLE.search(text)
        rest = len(text) - len(place.group())
        assert abs(place.start() / rest - prompt.depths[0]) < 0.03


def test_needles_stand_in_every_gap_from_the_first_to_the_last():
    seen = set()
    for index in range(60):
        text = generator().prompt("single_1", index, length=460).prompt.split("\n")[1]
        before, after = (NEEDLE.sub("#", text).split("#")[i].count(".") for i in (0, 1))
        seen |= {("first", before == 0), ("last", after == 0), ("both", before * after > 0)}
    assert seen == {(place, is_there) for place in ("first", "last", "both") for is_there in (0, 1)}


def write_essays(folder):
    folder.mkdir()
    for i in range(4):
        (folder / f"{i}.txt").write_bytes(ESSAYS[i % 3])


def open_source(split="train", **changes):
    source = SourceConfig(source="needles", name=changes.pop("name", "single_2,multikey_2"))
    source = dataclasses.replace(source, path=changes.pop("path", ""))
    data = DataConfig(source="needles", sequence_length=1300, mixed_in=(source,))
    return needles.open_needles(source, dataclasses.replace(data, **changes), split)


def test_source_of_documents_to_train_on(tmp_path):
    write_essays(tmp_path / "essays")
    source = open_source(path=str(tmp_path / "essays"))
    assert len(source) >= 100_000
    documents = [source[i] for i in range(4)]
    for i, document in enumerate(documents):
        assert isinstance(document, bytes)
        assert 1300 - 80 < 1 + len(document) <= 1300  # fits a row with its boundary
        assert (b"sentence number" in document) == (i % 2 == 0)
        assert re.search(rb"provided text is \d{7}\.$", document)
    assert len(set(documents)) == 4
    copied = pickle.loads(pickle.dumps(source))
    assert [copied[i] for i in range(4)] == documents
    with pytest.raises(IndexError, match="index=-1"):
        source[-1]
    main = DataConfig(
        source="needles",
        path=str(tmp_path / "essays"),
        name="single_2",
        sequence_length=1300,
        validation_fraction=0.4,
    )
    assert b"sentence number" in needles.open_needles(main, main, "validation")[0]
    # Without a path essays are noise.
    assert NOISE[1].encode() in open_source()[0]


def test_source_differs_by_split_and_its_fingerprint_by_all_settings(tmp_path):
    write_essays(tmp_path / "essays")
    assert open_source()[0] != open_source("validation")[0]
    changes = [
        {},
        {"split": "validation"},
        {"seed": 1},
        {"sequence_length": 1301},
        {"name": "single_2"},
        {"path": str(tmp_path / "essays")},
    ]
    prints = [open_source(**change).fingerprint() for change in changes]
    assert len(set(prints)) == len(prints)
    assert open_source().fingerprint() == prints[0]


def test_source_refuses_what_cannot_be():
    with pytest.raises(
        ValueError, match=r"data.mixed_in\[0\].name=.*: 'single_9' must be .*'single_1'"
    ):
        open_source(name="single_1,single_9")
    with pytest.raises(ValueError, match=r"data.sequence_length=400: needles multikey_1: .*least"):
        open_source(name="multikey_1", sequence_length=400)
    assert needles.parse_variants("", field="name") == tuple(VARIANTS)


def test_a_row_of_training_holds_question_and_answer(tmp_path):
    write_essays(tmp_path / "essays")
    data = DataConfig(
        path=str(tmp_path / "essays"),
        validation_fraction=0.4,
        mixed_in=(SourceConfig(source="needles", name="single_1", weight=0.5),),
        sequence_length=512,
        batch_size=6,
        shuffle_window=4,
    )
    tokenizer = ByteTokenizer()
    source = sources.open_source(data, "train")
    batches = pipeline.train_iterator(source, data, 1, tokenizer, shard=0, shards=1)
    found = 0
    for _ in range(5):
        batch = next(batches)
        for targets_L, weights_L in zip(batch["targets"], batch["weights"], strict=True):
            text = tokenizer.decode(targets_L[weights_L > 0])
            if "magic number" in text:
                hidden, answer = re.findall(r"\d{7}", text)
                assert hidden == answer and text.startswith("A special magic number is hidden")
                found += 1
    batches.close()
    assert found == 10
