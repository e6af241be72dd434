"""Evaluates a trained model: `python eval.py --workdir DIR`.

Prints a table and writes DIR/eval/<suite>.json and .png. Suites:

    validation   loss on the held-out documents, by context length and by position
    memory       for every layer: attention on window, fading and eidetic keys; what is remembered
    perplexity   loss of the same targets under longer and longer contexts, and in one long pass
    needles      what is found again that was hidden in a long text, by length, variant and depth
    phonebook    a number looked up in a phonebook, by its length
    mqar         recall of pairs, of every replica of a sweep (configs/mqar.py)
    mad          a task of MAD, of every replica of a sweep (configs/mad.py)
    harness      tasks of EleutherAI's lm-evaluation-harness (an extra: requirements-harness.txt)
"""

import dataclasses
import inspect
import pathlib
from collections.abc import Callable
from typing import Any

import jax
from absl import app, flags, logging

from bmojo_jax import checkpoint, console, evaluate, sharding
from bmojo_jax.config import DataConfig, MeshConfig
from bmojo_jax.evaluate import windows

_WORKDIR = flags.DEFINE_string("workdir", None, "The work directory of a run.", required=True)
_SUITE = flags.DEFINE_enum("suite", "validation", list(evaluate.SUITES), "What to measure.")
_STEP = flags.DEFINE_integer("step", None, "Of the checkpoint; default: the latest.")
_DATA_PATH = flags.DEFINE_string(
    "data_path", None, "Other documents, of which the run would hold out some; see --include."
)
_INCLUDE = flags.DEFINE_string(
    "include", None, "Glob below data_path of the documents to evaluate, all that match."
)
_OUTPUT = flags.DEFINE_string("output", None, "Where results go; default: WORKDIR/eval.")

# Options of suites, each a keyword of `run` of those that know it.
flags.DEFINE_list("contexts", None, "Context lengths in tokens.")
flags.DEFINE_integer("batches", None, "Batches; 0: the whole split.", lower_bound=0)
flags.DEFINE_integer("anchors", None, "Places of a document to predict at.", lower_bound=1)
flags.DEFINE_integer("suffix", None, "Targets before an anchor.", lower_bound=1)
flags.DEFINE_enum("form", None, windows.FORMS, "How documents are read: at once or in a stream.")
flags.DEFINE_integer("rows", None, "Rows of a device call.", lower_bound=1)
flags.DEFINE_list("lengths", None, "Lengths of prompts with their answers, in tokens.")
flags.DEFINE_integer(
    "items", None, "Prompts of each length; harness: of each task, 0: all.", lower_bound=0
)
flags.DEFINE_list("pairs", None, "mqar: numbers of pairs in a row.")
flags.DEFINE_string("variants", None, "Of needles, comma-separated.")
flags.DEFINE_list("tasks", None, "Names of tasks of the harness.")
flags.DEFINE_string("task_folder", None, "Task files of the harness; default: those that are here.")
flags.DEFINE_string("task_data", None, "Items of the tasks: what TASK_DATA in task files means.")
for _name in ("contexts", "lengths", "pairs"):
    flags.register_validator(
        _name,
        lambda texts: texts is None or all(x.isdecimal() and int(x) > 0 for x in texts),
        message="must be positive integers",
    )
_OPTIONS: dict[str, Callable[[Any], Any]] = {
    "contexts": lambda texts: tuple(map(int, texts)),
    "batches": int,
    "anchors": int,
    "suffix": int,
    "form": str,
    "rows": int,
    "lengths": lambda texts: tuple(map(int, texts)),
    "items": int,
    "pairs": lambda texts: tuple(map(int, texts)),
    "variants": str,
    "tasks": tuple,
    "task_folder": str,
    "task_data": str,
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


def _documents(data: DataConfig) -> DataConfig:
    """The run's documents, or those that flags name."""
    if _DATA_PATH.value is not None:
        data = dataclasses.replace(data, path=_DATA_PATH.value)
    if _INCLUDE.value is not None:
        data = dataclasses.replace(
            data, source="text", include="", exclude=(), validation_include=_INCLUDE.value
        )
    return data


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"not understood: {' '.join(argv[1:])}")
    console.show_messages(logging.WARNING)
    workdir = pathlib.Path(_WORKDIR.value)
    try:
        options = _options(_SUITE.value)
        mesh = sharding.make_mesh(MeshConfig())
        suite = evaluate.SUITES[_SUITE.value]
        if hasattr(suite, "load"):  # of a sweep: many models
            trained = suite.load(workdir, step=_STEP.value)
        else:
            trained = checkpoint.load(workdir, step=_STEP.value, mesh=mesh)
        data = _documents(trained.config.data)
        trained = dataclasses.replace(
            trained, config=dataclasses.replace(trained.config, data=data)
        )
        result = suite.run(trained, **options)
    except (FileNotFoundError, ValueError) as error:
        console.fail(error)
    print(evaluate.table(result))
    output = pathlib.Path(_OUTPUT.value) if _OUTPUT.value else workdir / "eval"
    evaluate.write(result, output)
    print(f"\nwritten to {output}")


if __name__ == "__main__":
    jax.config.config_with_absl()
    app.run(main)
