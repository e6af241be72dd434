"""A phonebook to look a number up in: many facts, all alike, of which one is asked for.

    Vera Long: 4710203344
    Hugh Marsh: 2085517390
    ...

    Hugh Marsh: 2085517390
    Emma Cole: 9331048275
    Vera Long: 4710203344

Two lookups show what is asked for; the number of the third name is the answer. After "Repeat After
Me" (arXiv 2402.01032, section 4). A prompt depends on the seed, its index, the length and the
tokenizer alone.
"""

from collections.abc import Iterator

import numpy as np

from bmojo_jax.data.tasks.prompts import Prompt, grow
from bmojo_jax.data.tasks.words import FIRST_NAMES, LAST_NAMES
from bmojo_jax.data.tokenizers import Tokenizer

_EXAMPLES = 2


class Phonebook:
    """Prompts with a phonebook."""

    def __init__(self, tokenizer: Tokenizer, *, seed: int) -> None:
        self._tokenizer = tokenizer
        self._seed = seed

    def prompt(self, index: int, *, length: int) -> Prompt:
        """Prompt `index`, with as many lines as fit.

        Args:
          length: tokens of the whole document: a boundary, prompt and answer.

        Raises:
          ValueError: `length` is too small for three lines, or too large for the names there are.
        """
        rng_lines, rng_places = (
            np.random.default_rng([self._seed, index, stream]) for stream in range(2)
        )
        places = rng_places.random(_EXAMPLES + 1)

        def make(lines: list[str]) -> Prompt:
            chosen = _different(places, len(lines))
            name, number = lines[chosen[-1]].split(":")
            examples = [lines[i] for i in chosen[:-1]]
            prompt = "\n".join([*lines, "", *examples, ""])
            depth = chosen[-1] / (len(lines) - 1)
            return Prompt(prompt, f"{name}:", (number.strip(),), (depth,), end="\n")

        try:
            return grow(
                make,
                _lines(rng_lines),
                tokenizer=self._tokenizer,
                separator="\n",
                length=length,
                fewest=_EXAMPLES + 1,
            )
        except ValueError as error:
            raise ValueError(f"phonebook: {error}") from error


def _lines(rng: np.random.Generator) -> Iterator[str]:
    for number in rng.permutation(len(FIRST_NAMES) * len(LAST_NAMES)):
        name = f"{FIRST_NAMES[number // len(LAST_NAMES)]} {LAST_NAMES[number % len(LAST_NAMES)]}"
        yield f"{name}: {rng.integers(10**10):010d}"


def _different(places: np.ndarray, count: int) -> list[int]:
    """For each place in [0, 1) one of `count` numbers, none twice, all equally likely."""
    free = list(range(count))
    return [free.pop(int(place * len(free))) for place in places]


def number_of_lines(prompt: Prompt) -> int:
    """How many lines the phonebook of a prompt has."""
    return prompt.prompt.split("\n\n")[0].count("\n") + 1
