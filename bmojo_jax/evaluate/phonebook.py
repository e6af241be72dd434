"""Looking a number up in a phonebook (`data/tasks/phonebook.py`), by the length of the book.

Prompts have the given lengths in tokens, a boundary and the answer included, and as many lines as
fit; lengths in which no book fits are left out, and said to be. For the measures see `answers.py`;
exact means all ten digits.
"""

from typing import Any

from matplotlib.figure import Figure

from bmojo_jax.checkpoint import Trained
from bmojo_jax.data.tasks.phonebook import Phonebook, number_of_lines
from bmojo_jax.evaluate import answers
from bmojo_jax.evaluate.needles import draw_measure, finish_axes
from bmojo_jax.evaluate.validation import title

_SEED = 1_000_003


def run(
    trained: Trained, *, lengths: tuple[int, ...] | None = None, items: int = 50
) -> dict[str, Any]:
    """Scores by length.

    Args:
      lengths: tokens of a prompt with its answer; None: half to eight times the training length.
      items: prompts of each length.
    """
    data = trained.config.data
    if lengths is None:
        lengths = answers.default_lengths(data.sequence_length)
    answers.check(lengths, items)
    generator = Phonebook(trained.tokenizer, seed=_SEED)
    rows, too_short = [], []
    for length in sorted(set(lengths)):
        try:
            prompts = [generator.prompt(i, length=length) for i in range(items)]
        except ValueError as error:
            too_short.append({"length": length, "reason": str(error)})
            continue
        found = answers.answers(trained, prompts, description=f"{length:,} tokens")
        lines = sum(map(number_of_lines, prompts)) / items
        rows.append({"length": length, "lines": lines, **answers.summary(found)})
    if not rows:
        raise ValueError(f"{lengths=}: must be longer; {too_short[-1]['reason']}")
    return {
        "suite": "phonebook",
        "title": f"{title(trained)}; phonebook",
        "step": trained.step,
        "data": data.path,
        "training_length": data.sequence_length,
        "by_length": rows,
        "too_short": too_short,
    }


def table(result: dict[str, Any]) -> list[str]:
    lines = [f"{'lines':>8} {'length':>8} {answers.HEADINGS}"]
    for row in result["by_length"]:
        lines.append(f"{row['lines']:>8,.1f} {row['length']:>8,} {answers.table_cells(row)}")
    if result["too_short"]:
        lengths = ", ".join(f"{row['length']:,}" for row in result["too_short"])
        lines += ["", f"left out, since a book does not fit: {lengths}"]
    return lines


def draw(result: dict[str, Any], figure: Figure) -> None:
    left, right = figure.subplots(1, 2)
    rows = result["by_length"]
    for measure, label in (("generated", "generated"), ("exact", "teacher-forced")):
        draw_measure(left, rows, measure, label=label)
    finish_axes(left, result["training_length"], "all ten digits")
    left.legend()
    right.plot([row["length"] for row in rows], [row["accuracy"] for row in rows], "o-")
    finish_axes(right, result["training_length"], "tokens of the answer, teacher-forced")
