"""What a model answers to prompts whose answers are known (`data/tasks/prompts.py`).

    generated      share of the references that its greedy answer holds, in any case
    exact          share of prompts with every token of the right answer the most likely one after
                   the right tokens before it (teacher-forced)
    accuracy       share of such tokens
    nats           mean nll of the tokens of the right answer

A greedy answer has as many tokens as the longest right one of its batch, and one more. Intervals
are 95 %: Wilson's for shares of prompts, which says something even if all are right or wrong; the
bootstrap over prompts for nats.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from bmojo_jax.checkpoint import Trained
from bmojo_jax.data.tasks.prompts import Prompt
from bmojo_jax.evaluate import scoring
from bmojo_jax.evaluate.intervals import interval, share_interval


class Answer(NamedTuple):
    text: str  # the greedy one
    score: scoring.Score  # of the right one
    found: float  # share of the references in `text`


def answers(trained: Trained, prompts: Sequence[Prompt], *, description: str) -> list[Answer]:
    """What a model makes of prompts, teacher-forced and by itself."""
    requests = [
        scoring.split(trained.tokenizer, prompt.question, prompt.question + prompt.answer)
        for prompt in prompts
    ]
    scores = scoring.log_likelihoods(trained, requests, description=f"{description}, scores")
    texts = scoring.greedy(
        trained,
        [request.context for request in requests],
        max_tokens=max(len(request.continuation) for request in requests) + 1,
        description=f"{description}, answers",
    )
    return [
        Answer(text, score, found_share(prompt.references, text))
        for prompt, text, score in zip(prompts, texts, scores, strict=True)
    ]


def found_share(references: Sequence[str], text: str) -> float:
    """Share of the references that are in `text`, whatever their case."""
    text = text.lower()
    return sum(reference.lower() in text for reference in references) / len(references)


def summary(found: Sequence[Answer]) -> dict[str, Any]:
    """The measures over prompts, with intervals."""
    items = len(found)
    tokens = [len(answer.score.log_p_L) for answer in found]
    nll = [-answer.score.log_p for answer in found]
    generated = sum(answer.found for answer in found) / items
    exact = sum(answer.score.is_greedy for answer in found) / items
    return {
        "items": items,
        "generated": generated,
        "generated_interval": share_interval(generated, items),
        "exact": exact,
        "exact_interval": share_interval(exact, items),
        "accuracy": sum(int(answer.score.greedy_L.sum()) for answer in found) / sum(tokens),
        "nats": sum(nll) / sum(tokens),
        "nats_interval": interval(nll, tokens),
        "targets": sum(tokens),
    }


def default_lengths(training_length: int) -> tuple[int, ...]:
    """Half the training length to eight times it, in powers of two."""
    return tuple(max(training_length * 2**k // 2, 1) for k in range(5))


def check(lengths: Sequence[int], items: int) -> None:
    """Raises ValueError unless there is something to measure."""
    if not lengths or min(lengths) < 1:
        raise ValueError(f"{lengths=}: must be positive numbers of tokens")
    if items < 1:
        raise ValueError(f"{items=}: must be at least 1")


def table_cells(row: dict[str, Any]) -> str:
    """The measures of a `summary` as columns; their headings are `HEADINGS`."""
    cells = [f"{row['items']:>6}"]
    for name in ("generated", "exact"):
        low, high = row[f"{name}_interval"]
        cells.append(f"{row[name]:>8.1%} [{low:>6.1%}, {high:>6.1%}]")
    return " ".join([*cells, f"{row['accuracy']:>9.1%}", f"{row['nats']:>9.4f}"])


HEADINGS = (
    f"{'items':>6} {'generated':^25} {'teacher-forced':^25} {'per token':>9} {'nats/token':>9}"
)
