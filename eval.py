"""Evaluates a trained model: `python eval.py --workdir DIR`.

Prints a table and writes DIR/eval/<suite>.json and .png. Suites:

    validation   loss on the held-out documents, by context length and by position
    memory       for every layer: attention on window, fading and eidetic keys; what is remembered
"""

import dataclasses
import inspect
import pathlib
from collections.abc import Callable
from typing import Any

import jax
from absl import app, flags, logging

from bmojo_jax import checkpoint, console, evaluate, sharding
from bmojo_jax.config import MeshConfig

_WORKDIR = flags.DEFINE_string("workdir", None, "The work directory of a run.", required=True)
_SUITE = flags.DEFINE_enum("suite", "validation", list(evaluate.SUITES), "What to measure.")
_STEP = flags.DEFINE_integer("step", None, "Of the checkpoint; default: the latest.")
_DATA_PATH = flags.DEFINE_string(
    "data_path", None, "Other documents to evaluate on; default: those of the run."
)
_OUTPUT = flags.DEFINE_string("output", None, "Where results go; default: WORKDIR/eval.")

# Options of suites, each a keyword of `run` of those that know it.
flags.DEFINE_list("contexts", None, "Context lengths in tokens.")
flags.DEFINE_integer("batches", None, "Batches; 0: the whole split.", lower_bound=0)
flags.register_validator(
    "contexts",
    lambda texts: texts is None or all(x.isdecimal() and int(x) > 0 for x in texts),
    message="must be positive integers",
)
_OPTIONS: dict[str, Callable[[Any], Any]] = {
    "contexts": lambda texts: tuple(map(int, texts)),
    "batches": int,
}


def _options(suite: str) -> dict[str, Any]:
    """The given options, of those that the suite has."""
    known = inspect.signature(evaluate.SUITES[suite].run).parameters
    given = {name: flags.FLAGS[name].value for name in _OPTIONS}
    given = {name: value for name, value in given.items() if value is not None}
    for name in given:
        if name not in known:
            valid = [f"--{option}" for option in _OPTIONS if option in known]
            raise ValueError(f"--{name}: must be one of the options of {suite}: {valid}")
    return {name: _OPTIONS[name](value) for name, value in given.items()}


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"not understood: {' '.join(argv[1:])}")
    console.show_messages(logging.WARNING)
    workdir = pathlib.Path(_WORKDIR.value)
    try:
        options = _options(_SUITE.value)
        mesh = sharding.make_mesh(MeshConfig())
        trained = checkpoint.load(workdir, step=_STEP.value, mesh=mesh)
        if _DATA_PATH.value is not None:
            data = dataclasses.replace(trained.config.data, path=_DATA_PATH.value)
            trained = dataclasses.replace(
                trained, config=dataclasses.replace(trained.config, data=data)
            )
        result = evaluate.SUITES[_SUITE.value].run(trained, **options)
    except (FileNotFoundError, ValueError) as error:
        console.fail(error)
    print(evaluate.table(result))
    output = pathlib.Path(_OUTPUT.value) if _OUTPUT.value else workdir / "eval"
    evaluate.write(result, output)
    print(f"\nwritten to {output}")


if __name__ == "__main__":
    jax.config.config_with_absl()
    app.run(main)
