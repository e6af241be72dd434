"""Needles in a haystack (`data/tasks/needles.py`): what is found again, by length, variant, depth.

Prompts have the given lengths in tokens, a boundary and the answer included. Haystacks of essays
are the held-out documents. A variant that does not fit into a length is left out there, and said to
be. For the measures see `answers.py`.
"""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from bmojo_jax.checkpoint import Trained
from bmojo_jax.config import DataConfig
from bmojo_jax.data import sources, text
from bmojo_jax.data.documents import Source
from bmojo_jax.data.tasks.needles import VARIANTS, Needles, parse_variants
from bmojo_jax.evaluate import answers
from bmojo_jax.evaluate.validation import title

_SEED = 1_000_003  # that training does not use
_DEPTHS = 5  # classes of equal size


def run(
    trained: Trained,
    *,
    lengths: tuple[int, ...] | None = None,
    items: int = 50,
    variants: str = "",
) -> dict[str, Any]:
    """Scores for every variant and length, and for single needles by depth.

    Args:
      lengths: tokens of a prompt with its answer; None: half to eight times the training length.
      items: prompts of each variant and length.
      variants: comma-separated; empty: all.
    """
    data = trained.config.data
    if lengths is None:
        lengths = answers.default_lengths(data.sequence_length)
    answers.check(lengths, items)
    names = parse_variants(variants, field="--variants")
    essays = None
    if any(VARIANTS[name].haystack == "essay" for name in names):
        # A run on needles alone has no documents but the essays that they were hidden in.
        on_needles = data.source == "needles"
        essays = None if on_needles and not data.path else _essays(data)
    generator = Needles(trained.tokenizer, seed=_SEED, essays=essays)
    rows, too_short = [], []
    by_depth: dict[tuple[int, int], list[answers.Answer]] = {}
    for length in sorted(set(lengths)):
        for name in names:
            try:
                prompts = [generator.prompt(name, i, length=length) for i in range(items)]
            except ValueError as error:
                too_short.append({"variant": name, "length": length, "reason": str(error)})
                continue
            found = answers.answers(trained, prompts, description=f"{name}, {length:,} tokens")
            rows.append({"variant": name, "length": length, **answers.summary(found)})
            if name.startswith("single"):
                for prompt, answer in zip(prompts, found, strict=True):
                    place = (length, int(prompt.depths[0] * _DEPTHS))
                    by_depth.setdefault(place, []).append(answer)
    if not rows:
        raise ValueError(f"{lengths=}: must be longer; {too_short[-1]['reason']}")
    return {
        "suite": "needles",
        "title": f"{title(trained)}; needles",
        "step": trained.step,
        "data": data.path,
        "training_length": data.sequence_length,
        "by_length": rows,
        "by_depth": [
            {
                "length": length,
                "first": depth / _DEPTHS,
                "last": (depth + 1) / _DEPTHS,
                **answers.summary(found),
            }
            for (length, depth), found in sorted(by_depth.items())
        ],
        "too_short": too_short,
    }


def _essays(data: DataConfig) -> Source:
    if data.source == "needles":
        return text.open_text(data, data, "validation")
    return sources.open_source(data, "validation")


def table(result: dict[str, Any]) -> list[str]:
    lines = [f"{'variant':>12} {'length':>8} {answers.HEADINGS}"]
    for row in result["by_length"]:
        lines.append(f"{row['variant']:>12} {row['length']:>8,} {answers.table_cells(row)}")
    if result["by_depth"]:
        lines += ["", "single needles, by depth: 0 is the start of the text"]
        lines.append(f"{'depth':>12} {'length':>8} {answers.HEADINGS}")
        for row in result["by_depth"]:
            depth = f"{row['first']:.1f}-{row['last']:.1f}"
            lines.append(f"{depth:>12} {row['length']:>8,} {answers.table_cells(row)}")
    if result["too_short"]:
        left_out = ", ".join(
            f"{row['variant']} at {row['length']:,}" for row in result["too_short"]
        )
        lines += ["", f"left out, since they do not fit: {left_out}"]
    return lines


def draw(result: dict[str, Any], figure: Figure) -> None:
    left, middle, right = figure.subplots(1, 3)
    rows = result["by_length"]
    for name in dict.fromkeys(row["variant"] for row in rows):
        chosen = [row for row in rows if row["variant"] == name]
        for axes, measure in ((left, "generated"), (middle, "exact")):
            draw_measure(axes, chosen, measure, label=name)
    for axes, heading in ((left, "found in the answer"), (middle, "teacher-forced, exact")):
        finish_axes(axes, result["training_length"], heading)
    left.legend(fontsize=7)
    for length in dict.fromkeys(row["length"] for row in result["by_depth"]):
        chosen = [row for row in result["by_depth"] if row["length"] == length]
        centres = [(row["first"] + row["last"]) / 2 for row in chosen]
        right.plot(centres, [row["exact"] for row in chosen], "o-", label=f"{length:,} tokens")
    if result["by_depth"]:
        right.legend(fontsize=7)
    right.set_xlabel("depth, single needles")
    right.set_title("teacher-forced, exact")
    right.set_xlim(0, 1)
    right.set_ylim(-0.05, 1.05)
    right.grid(alpha=0.3)


def draw_measure(axes: Any, rows: list[dict[str, Any]], measure: str, *, label: str) -> None:
    """A measure by length, with its intervals."""
    lengths, values = [row["length"] for row in rows], np.array([row[measure] for row in rows])
    ends = np.array([row[f"{measure}_interval"] for row in rows]).T
    errors = np.maximum(np.abs(ends - values[None, :]), 0)
    axes.errorbar(lengths, values, yerr=errors, fmt="o-", capsize=2, markersize=3, label=label)


def finish_axes(axes: Any, training_length: int, heading: str) -> None:
    axes.axvline(training_length, color="grey", linestyle=":")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("length, tokens (dotted: of training)")
    axes.set_title(heading)
    axes.set_ylim(-0.05, 1.05)
    axes.grid(alpha=0.3)
