"""What a trained model can do: suites that `eval.py` runs, one module each.

A suite is a module with

    run(trained, **options) -> dict   what is written to JSON; every option has a default
    table(result) -> list of str      its lines as text
    draw(result, figure)              its picture, on an empty figure
    load(workdir, *, step)            what `run` takes, where that is not one model (optional)

A result says how many items it is over (`targets`, `items`) and how they spread. It has `suite`,
its name, and `title`: what was measured on what.
"""

import json
import pathlib
from types import ModuleType
from typing import Any

from matplotlib.figure import Figure

from bmojo_jax.evaluate import (
    harness,
    mad,
    memory,
    mqar,
    needles,
    perplexity,
    phonebook,
    validation,
)

SUITES: dict[str, ModuleType] = {
    "validation": validation,
    "memory": memory,
    "perplexity": perplexity,
    "needles": needles,
    "phonebook": phonebook,
    "harness": harness,
    "mqar": mqar,
    "mad": mad,
}


def table(result: dict[str, Any]) -> str:
    """The result of a suite as text."""
    return "\n".join([result["title"], "", *SUITES[result["suite"]].table(result)])


def write(result: dict[str, Any], directory: pathlib.Path) -> None:
    """Leaves `<suite>.json` and `<suite>.png` in `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    name = result["suite"]
    (directory / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    figure = Figure(figsize=(10, 4), layout="constrained")
    SUITES[name].draw(result, figure)
    figure.savefig(directory / f"{name}.png", dpi=120)
