"""Sets perplexities by context of several models side by side: one figure, one table.

    python -m benchmarks.length_generalisation --out results/length_generalisation \\
        --commit HASH --hardware 'one H100 80GB' \\
        bmojo=runs/bmojo/eval/perplexity.json mamba=runs/mamba/eval/perplexity.json

Reads what `eval.py --suite perplexity` has written for each model. Models are compared on the same
targets, which is checked: the first one's difference from each other has an interval of its own,
paired over documents.
"""

import json
import pathlib
import sys
from typing import Any

import numpy as np
from absl import app, flags
from matplotlib.figure import Figure

from bmojo_jax import console
from bmojo_jax.evaluate import perplexity
from bmojo_jax.evaluate.intervals import interval

# What must agree for targets and contexts to be the same.
_SAME = ("tokenizer", "contexts", "suffix")


def read(arguments: list[str]) -> dict[str, dict[str, Any]]:
    """The results by the names of their models, `NAME=PATH` each.

    Raises:
      ValueError: an argument of another form, a name twice, or other targets than in the first.
    """
    results: dict[str, dict[str, Any]] = {}
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if not (name and equals and path) or name in results:
            raise ValueError(f"{argument!r}: must be NAME=PATH with a name of its own")
        results[name] = json.loads(pathlib.Path(path).read_text())
        if results[name].get("suite") != "perplexity":
            raise ValueError(f"{path}: must be written by eval.py --suite perplexity")
    if not results:
        raise ValueError("no models: must be given as NAME=PATH, e.g. bmojo=eval/perplexity.json")
    first, *others = results
    for name in others:
        for field in _SAME:
            a, b = (results[model]["settings"][field] for model in (first, name))
            if a != b:
                raise ValueError(f"{name}: {field}={b!r} must be that of {first}, {a!r}")
        a, b = (_targets(results[model]) for model in (first, name))
        if a != b:
            raise ValueError(f"{name}: its documents and anchors must be those of {first}")
    return results


def _targets(result: dict[str, Any]) -> list[Any]:
    return [(document["tokens"], document["anchors"]) for document in result["per_document"]]


def differences(results: dict[str, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Loss of every other model less that of the first, by context, nats per token."""
    first, *others = results
    reference_DT = _nll(results[first])
    targets_D = np.array([document["targets"] for document in results[first]["per_document"]])
    contexts = results[first]["settings"]["contexts"]
    rows: dict[str, list[dict[str, Any]]] = {}
    for name in others:
        more_DT = _nll(results[name]) - reference_DT
        rows[name] = [
            {
                "context": context,
                "more": float(more_DT[:, t].sum() / targets_D.sum()),
                "interval": list(interval(more_DT[:, t], targets_D)),
            }
            for t, context in enumerate(contexts)
        ]
    return rows


def _nll(result: dict[str, Any]) -> np.ndarray:
    return np.array([document["nll_by_context"] for document in result["per_document"]])


def table(results: dict[str, dict[str, Any]]) -> list[str]:
    """Nats per token and half the width of the interval; below, what others have more."""
    first, *others = results
    lines = [f"{'context':>9}" + "".join(f" {name:>17}" for name in results)]
    for t, context in enumerate(results[first]["settings"]["contexts"]):
        rows = [result["by_context"][t] for result in results.values()]
        cells = (_cell(row["loss"], row["interval"]) for row in rows)
        lines.append(f"{context:>9,}" + "".join(f" {cell:>17}" for cell in cells))
    if others:
        rows_of = differences(results)
        lines += ["", f"more than {first}, paired"]
        lines.append(f"{'context':>9} {'':>17}" + "".join(f" {name:>17}" for name in others))
        for t, context in enumerate(results[first]["settings"]["contexts"]):
            rows = [rows_of[name][t] for name in others]
            cells = (_cell(row["more"], row["interval"], "+") for row in rows)
            lines.append(f"{context:>9,} {'':>17}" + "".join(f" {cell:>17}" for cell in cells))
    return lines


def _cell(value: float, ends: list[float], sign: str = "") -> str:
    return f"{value:{sign}.4f} ±{(ends[1] - ends[0]) / 2:.4f}"


def draw(results: dict[str, dict[str, Any]], figure: Figure) -> None:
    left, middle, right = figure.subplots(1, 3)
    right.sharey(left)
    first, *_ = results
    more = differences(results)
    contexts = results[first]["settings"]["contexts"]
    for name, result in results.items():
        perplexity.draw_contexts(left, result, label=name)
        perplexity.draw_positions(right, result, label=name)
        color = left.get_lines()[-1].get_color()
        rows = more.get(
            name, [{"context": c, "more": 0.0, "interval": (0.0, 0.0)} for c in contexts]
        )
        middle.plot(contexts, [row["more"] for row in rows], "o-", markersize=4, color=color)
        low, high = zip(*(row["interval"] for row in rows), strict=True)
        middle.fill_between(contexts, low, high, alpha=0.15, color=color, linewidth=0)
    middle.set_xscale("log", base=2)
    # Linear where models are close, so that one that fails does not hide the others' differences.
    middle.set_yscale("symlog", linthresh=0.1)
    middle.set_xlabel("context, tokens")
    middle.set_ylabel(f"nats per token more than {first}")
    middle.grid(alpha=0.3)
    lengths = sorted({result["training_length"] for result in results.values()})
    for axes in (left, middle, right):
        for length in lengths:
            axes.axvline(length, color="grey", linestyle=":")
    left.plot([], [], color="grey", linestyle=":", label="training length")
    # Of the first positions nothing is known but the words' frequencies: they would set the scale.
    rows = [row for result in results.values() for row in result["by_context"]]
    losses = [end for row in rows for end in row["interval"]]
    margin = 0.5 * (max(losses) - min(losses))
    left.set_ylim(min(losses) - margin, max(losses) + margin)
    left.legend()
    left.set_title("the same targets, by context")
    middle.set_title("paired difference")
    right.set_title("one pass, by position")


def main(argv: list[str]) -> None:
    values = flags.FLAGS
    try:
        results = read(argv[1:])
    except (OSError, ValueError) as error:
        console.fail(error)
    out = pathlib.Path(values.out)
    out.mkdir(parents=True, exist_ok=True)
    lines = table(results)
    print("\n".join(lines))
    record = {
        "command": " ".join(["python -m benchmarks.length_generalisation", *sys.argv[1:]]),
        "commit": values.commit,
        "hardware": values.hardware,
        "models": results,
        "more_than_the_first": differences(results),
    }
    (out / "length_generalisation.json").write_text(json.dumps(record, indent=1) + "\n")
    figure = Figure(figsize=(16, 4.5), layout="constrained")
    draw(results, figure)
    figure.savefig(out / "length_generalisation.png", dpi=120)


if __name__ == "__main__":
    flags.DEFINE_string("out", None, "Folder for the JSON and the figure.", required=True)
    flags.DEFINE_string("commit", "", "Of the code that ran, for the record.")
    flags.DEFINE_string("hardware", "", "What it ran on, for the record.")
    app.run(main)
