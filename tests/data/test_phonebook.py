"""Phonebook prompts: what is asked for stands in the book, once."""

import re

import numpy as np
import pytest

from bmojo_jax.data.tasks.phonebook import Phonebook, number_of_lines
from bmojo_jax.data.tasks.prompts import count
from bmojo_jax.data.tokenizers import ByteTokenizer

TOKENIZER = ByteTokenizer()


def prompt_of(index, length, seed=0):
    return Phonebook(TOKENIZER, seed=seed).prompt(index, length=length)


@pytest.mark.parametrize("length", [200, 512, 5000])
def test_two_lookups_and_a_question(length):
    for index in range(5):
        prompt = prompt_of(index, length)
        book, lookups = prompt.prompt.split("\n\n")
        lines = book.split("\n")
        assert all(re.fullmatch(r"[A-Z]\w+ [A-Z]\w+: \d{10}", line) for line in lines)
        entries = dict(line.split(": ") for line in lines)
        assert len(entries) == len(lines) == number_of_lines(prompt)
        *examples, nothing = lookups.split("\n")
        assert len(examples) == 2 and nothing == ""
        asked = prompt.answer_prefix.removesuffix(":")
        assert prompt.references == (entries[asked],) and prompt.answer == f" {entries[asked]}"
        names = [example.split(": ")[0] for example in examples] + [asked]
        assert len(set(names)) == 3 and set(examples) <= set(lines)
        assert prompt.text.endswith(f"\n{asked}: {entries[asked]}\n")
        assert prompt.depths[0] == list(entries).index(asked) / (len(lines) - 1)
        assert length - 60 < count(TOKENIZER, prompt.text) <= length


def test_every_line_is_asked_for():
    depths = np.array([prompt_of(i, 800).depths[0] for i in range(200)])
    counts, _ = np.histogram(depths, bins=4, range=(0, 1))
    assert counts.min() > 25


def test_prompts_are_deterministic_and_differ():
    assert prompt_of(3, 500) == prompt_of(3, 500)
    texts = {prompt_of(index, 500, seed=seed).text for index in (3, 4) for seed in (0, 1)}
    assert len(texts) == 4


def test_lengths_that_cannot_be():
    with pytest.raises(ValueError, match=r"phonebook: length=50 .* at least"):
        prompt_of(0, 50)
    with pytest.raises(ValueError, match=r"length=2000000 tokens: must be fewer"):
        prompt_of(0, 2_000_000)
