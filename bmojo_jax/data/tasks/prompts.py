"""Prompts with known answers, grown to a number of tokens.

A prompt asks for something that stands in its own text. The text is made of parts (sentences,
lines), and takes as many of them as fit: the parts are counted one by one, which is cheap but
ignores tokens that reach over a border, and the whole once they are chosen.
"""

import dataclasses
from collections.abc import Callable, Iterator

from bmojo_jax.data.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A question at the end of a text, and its answer."""

    prompt: str  # the text and the question
    answer_prefix: str  # how the answer starts; the model goes on from here
    references: tuple[str, ...]  # what the answer must hold, in order
    depths: tuple[float, ...]  # where each reference stands in the text: 0 its start, 1 its end
    end: str  # what ends the answer

    @property
    def question(self) -> str:
        """All that comes before what is asked for."""
        return self.prompt + self.answer_prefix

    @property
    def answer(self) -> str:
        """What is asked for; the question does not end with a space."""
        return " " + ", ".join(self.references)

    @property
    def text(self) -> str:
        """Question and answer: a document to train on."""
        return self.question + self.answer + self.end


def count(tokenizer: Tokenizer, text: str) -> int:
    """Tokens that are read of a document: a boundary and those of its text."""
    return 1 + len(tokenizer.encode(text))


def grow(
    make: Callable[[list[str]], Prompt],
    parts: Iterator[str],
    *,
    tokenizer: Tokenizer,
    separator: str,
    length: int,
    fewest: int,
    cost: Callable[[str], int] | None = None,
) -> Prompt:
    """The prompt of as many parts as fit into `length` tokens, its answer and a boundary included.

    Args:
      make: the prompt with these parts in its text.
      separator: what stands before each part.
      fewest: parts that it must have.
      cost: tokens of a separator and a part; None: the part is tokenized.

    Raises:
      ValueError: `length` is too small, or the parts run out.
    """
    if cost is None:
        cost = lambda part: len(tokenizer.encode(part))  # noqa: E731
    chosen = [next(parts) for _ in range(fewest)]
    prompt = make(chosen)
    spent = count(tokenizer, prompt.text)
    if spent > length:
        raise ValueError(f"{length=} tokens: must be at least {spent} for this prompt")
    following = _next(parts, length)
    price = cost(separator + following)
    while spent + price <= length:
        while spent + price <= length:
            chosen.append(following)
            spent += price
            following = _next(parts, length)
            price = cost(separator + following)
        prompt = make(chosen)
        spent = count(tokenizer, prompt.text)
    while spent > length:
        chosen.pop()
        prompt = make(chosen)
        spent = count(tokenizer, prompt.text)
    return prompt


def _next(parts: Iterator[str], length: int) -> str:
    for part in parts:
        return part
    raise ValueError(f"{length=} tokens: must be fewer; there are no more parts to fill them with")
