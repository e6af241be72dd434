"""Needles in a haystack: sentences to be remembered, hidden in a text and asked for at its end.

    A special magic number is hidden within the following text. Make sure to memorize it. I will
    quiz you about the number afterwards.
    The grass is green. One of the special magic numbers for tall-lamp is: 4087213. The sky is blue.
    What is the special magic number for tall-lamp mentioned in the provided text?
    The special magic number for tall-lamp mentioned in the provided text is 4087213.

The variants and the wording are those of RULER (arXiv 2404.06654, section 3 and appendix B),
written afresh. Haystacks: `noise`, five sentences repeated; `essay`, sentences of real documents;
`needles`, needles for other keys. Every needle stands in a gap between two sentences that is drawn
uniformly, so steps are small and prompts of 512 tokens work. A prompt depends on the seed, the
variant, its index, the length, the tokenizer and the essays alone.
"""

import dataclasses
import hashlib
import itertools
import json
import re
import uuid
from collections.abc import Iterator
from typing import Literal, SupportsIndex

import numpy as np

from bmojo_jax.config import DataConfig, SourceConfig
from bmojo_jax.data import sources, tokenizers
from bmojo_jax.data.documents import BadDocument, Document, Source, Split
from bmojo_jax.data.tasks.prompts import Prompt, grow
from bmojo_jax.data.tasks.words import ADJECTIVES, NOUNS
from bmojo_jax.data.text import open_text
from bmojo_jax.data.tokenizers import Tokenizer

Kind = Literal["words", "number", "uuid"]


@dataclasses.dataclass(frozen=True)
class Variant:
    haystack: Literal["noise", "essay", "needles"]
    key: Kind = "words"  # an adjective and a noun
    value: Kind = "number"  # of seven digits
    keys: int = 1  # that have needles of their own
    values: int = 1  # needles for each key
    queries: int = 1  # keys that are asked for


VARIANTS: dict[str, Variant] = {
    "single_1": Variant("noise"),
    "single_2": Variant("essay"),
    "single_3": Variant("essay", value="uuid"),
    "multikey_1": Variant("essay", keys=4),
    "multikey_2": Variant("needles"),
    "multikey_3": Variant("needles", key="uuid", value="uuid"),
    "multivalue": Variant("essay", values=4),
    "multiquery": Variant("essay", keys=4, queries=4),
}
NOISE = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
_WORD = re.compile(r"\S+")
_SENTENCE_END = re.compile(r"""[.!?]["'\u2019\u201d)\]]*$""")
_LONGEST_SENTENCE = 40  # words; a longer one is cut, so that steps stay small
_EMPTY_ESSAYS = 1000  # in a row, before there is taken to be no text at all


def parse_variants(names: str, *, field: str) -> tuple[str, ...]:
    """Comma-separated names of variants; none: all of them. `field` is where they come from.

    Raises:
      ValueError: a name is unknown.
    """
    chosen = tuple(name.strip() for name in names.split(",") if name.strip())
    for name in chosen:
        if name not in VARIANTS:
            raise ValueError(f"{field}={names!r}: {name!r} must be one of {tuple(VARIANTS)}")
    return chosen or tuple(VARIANTS)


class Needles:
    """Prompts of every variant. It can be pickled."""

    def __init__(self, tokenizer: Tokenizer, *, seed: int, essays: Source | None) -> None:
        """Makes a generator.

        Args:
          essays: documents for the haystacks of variants with essays; None: they get noise.
        """
        self._tokenizer = tokenizer
        self._seed = seed
        self._essays = essays
        self._costs: dict[str, int] = {}  # tokens of the sentences of noise

    def prompt(self, variant: str, index: int, *, length: int) -> Prompt:
        """Prompt `index` of a variant, the longest that fits.

        Args:
          length: tokens of the whole document: a boundary, prompt and answer.

        Raises:
          ValueError: `length` is too small for the needles and the question.
        """
        setting = VARIANTS[variant]
        place = [self._seed, list(VARIANTS).index(variant), index]
        # Streams of their own: a longer haystack leaves the rest of the prompt as it is.
        rng_keys, rng_values, rng_depths, rng_hay = (
            np.random.default_rng([*place, stream]) for stream in range(4)
        )
        all_keys, all_values = _draw(setting.key, rng_keys), _draw(setting.value, rng_values)
        keys = list(itertools.islice(all_keys, setting.keys))
        pairs = [(key, next(all_values)) for key in keys for _ in range(setting.values)]
        depths = rng_depths.random(len(pairs))
        queried = keys[: setting.queries]
        # Values of one key are asked for in the order of the text, keys in that of the question.
        order = sorted(
            (i for i, (key, _) in enumerate(pairs) if key in queried),
            key=lambda i: (queried.index(pairs[i][0]), depths[i]),
        )
        references = tuple(pairs[i][1] for i in order)
        needles = [_needle(setting, *pairs[i]) for i in np.argsort(depths)]
        sorted_depths = np.sort(depths)

        def make(sentences: list[str]) -> Prompt:
            gaps = (sorted_depths * (len(sentences) + 1)).astype(int)
            text, done = [], 0
            for gap, needle in zip(gaps, needles, strict=True):
                text += [*sentences[done:gap], needle]
                done = gap
            text += sentences[done:]
            prompt, prefix = _wording(setting, " ".join(text), queried)
            places = tuple(float(depths[i]) for i in order)
            return Prompt(prompt, prefix, references, places, end=".")

        cost = None
        if setting.haystack == "needles":
            hay = (
                _needle(setting, key, value)
                for key, value in zip(all_keys, all_values, strict=False)
            )
        elif setting.haystack == "noise" or self._essays is None:
            hay, cost = itertools.cycle(NOISE), self._cost_of_noise
        else:
            hay = self._sentences(self._essays, rng_hay)
        try:
            return grow(
                make,
                hay,
                tokenizer=self._tokenizer,
                separator=" ",
                length=length,
                fewest=0,
                cost=cost,
            )
        except ValueError as error:
            raise ValueError(f"needles {variant}: {error}") from error

    def _cost_of_noise(self, sentence: str) -> int:
        if sentence not in self._costs:
            self._costs[sentence] = len(self._tokenizer.encode(sentence))
        return self._costs[sentence]

    def _sentences(self, essays: Source, rng: np.random.Generator) -> Iterator[str]:
        """From a random place in a random document on; other documents follow in their order."""
        number = int(rng.integers(len(essays)))
        start = rng.random()
        empty = 0
        while empty < _EMPTY_ESSAYS:
            text = essay_text(essays[number], self._tokenizer)
            empty += 1
            for sentence in sentences_from(text, int(start * len(text))):
                yield sentence
                empty = 0
            number, start = (number + 1) % len(essays), 0.0


def essay_text(document: Document, tokenizer: Tokenizer) -> str:
    """The text of a document; none of one that cannot be used."""
    if isinstance(document, BadDocument):
        return ""
    if isinstance(document, np.ndarray):
        document = tokenizer.decode_bytes(document)
    return document.decode("utf-8", errors="replace")


def sentences_from(text: str, start: int) -> Iterator[str]:
    """Sentences, with single spaces, from the first that begins behind `start` (or at 0)."""
    words: list[str] = []
    partial = start > 0
    for match in _WORD.finditer(text, start):
        words.append(match.group())
        if _SENTENCE_END.search(words[-1]) or len(words) == _LONGEST_SENTENCE:
            if not partial:
                yield " ".join(words)
            words, partial = [], False
    if words and not partial:
        yield " ".join(words)


def _draw(kind: Kind, rng: np.random.Generator) -> Iterator[str]:
    """Keys or values, all different."""
    if kind == "words":
        for number in rng.permutation(len(ADJECTIVES) * len(NOUNS)):
            yield f"{ADJECTIVES[number // len(NOUNS)]}-{NOUNS[number % len(NOUNS)]}"
        return
    seen = set()
    while True:
        if kind == "number":
            value = str(rng.integers(10**6, 10**7))
        else:
            value = str(uuid.UUID(bytes=rng.bytes(16), version=4))
        if value not in seen:
            seen.add(value)
            yield value


def _needle(setting: Variant, key: str, value: str) -> str:
    return f"One of the special magic {setting.value}s for {key} is: {value}."


def _wording(setting: Variant, text: str, queried: list[str]) -> tuple[str, str]:
    """The prompt and how its answer starts."""
    if setting.queries * setting.values == 1:
        some, hidden, ask, kind, are = "A", "is", "What is the", setting.value, "is"
    else:
        some, hidden, ask = "Some", "are", "What are all the"
        kind, are = f"{setting.value}s", "are"
    query = queried[0]
    if len(queried) > 1:
        query = f"{', '.join(queried[:-1])}, and {queried[-1]}"
    prompt = (
        f"{some} special magic {kind} {hidden} hidden within the following text. "
        f"Make sure to memorize it. I will quiz you about the {kind} afterwards.\n{text}\n"
        f"{ask} special magic {kind} for {query} mentioned in the provided text?"
    )
    return prompt, f" The special magic {kind} for {query} mentioned in the provided text {are}"


class NeedleDocuments:
    """Prompts with their answers as documents of about a row, the variants in turn: a `Source`."""

    def __init__(
        self,
        needles: Needles,
        *,
        variants: tuple[str, ...],
        length: int,
        settings: dict[str, str | int],
    ) -> None:
        """Makes the source; `settings` is what else the documents depend on."""
        self._needles = needles
        self._variants = variants
        self._length = length
        self._settings = settings

    def __len__(self) -> int:
        return 1_000_000  # as many as an epoch is to have; they are made when they are read

    def __getitem__(self, index: SupportsIndex) -> Document:
        number = index.__index__()
        if not 0 <= number < len(self):
            raise IndexError(f"index={number}: must be in [0, {len(self)})")
        variant = self._variants[number % len(self._variants)]
        try:
            prompt = self._needles.prompt(variant, number, length=self._length)
        except ValueError:
            return BadDocument(f"needles {variant} {number}", "longer than a row")
        return prompt.text.encode()

    def fingerprint(self) -> str:
        settings = {**self._settings, "variants": self._variants, "length": self._length}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    def __repr__(self) -> str:
        return f"NeedleDocuments(variants={self._variants}, length={self._length})"


def open_needles(source: SourceConfig, data: DataConfig, split: Split) -> NeedleDocuments:
    """Prompts to train on, each as long as a row of `data`.

    Args:
      source: `name` says which variants; essays are the documents of `path`, or noise.
      data: row length, tokenizer, seed, and how documents are split.

    Raises:
      ValueError: a variant is unknown or does not fit into a row.
    """
    tokenizer = tokenizers.make_tokenizer(data)
    variants = parse_variants(source.name, field=f"{sources.prefix(source, data)}name")
    essays = open_text(source, data, split) if source.path else None
    seed = 2 * data.seed + (split == "validation")
    needles = Needles(tokenizer, seed=seed, essays=essays)
    for i, variant in enumerate(variants):
        try:
            needles.prompt(variant, i, length=data.sequence_length)
        except ValueError as error:
            raise ValueError(f"data.sequence_length={data.sequence_length}: {error}") from error
    settings: dict[str, str | int] = {
        "seed": seed,
        "tokenizer": tokenizer.fingerprint(),
        "essays": "" if essays is None else essays.fingerprint(),
    }
    return NeedleDocuments(
        needles, variants=variants, length=data.sequence_length, settings=settings
    )
