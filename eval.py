"""Evaluates a trained model: `python eval.py --workdir DIR`.

Prints a table and writes DIR/eval/<suite>.json and .png. Suites:

    validation   loss on the held-out documents, by context length and by position
    memory       for every layer: attention on window, fading and eidetic keys; what is remembered
"""

import dataclasses
import pathlib

import jax
from absl import app, flags, logging

from bmojo_jax import checkpoint, console, evaluate, sharding
from bmojo_jax.config import MeshConfig
from bmojo_jax.data import sources

_WORKDIR = flags.DEFINE_string("workdir", None, "The work directory of a run.", required=True)
_SUITE = flags.DEFINE_enum("suite", "validation", ["validation", "memory"], "What to measure.")
_CONTEXTS = flags.DEFINE_list(
    "contexts", None, "Context lengths in tokens; default: 64 to 4 times the training length."
)
_STEP = flags.DEFINE_integer("step", None, "Of the checkpoint; default: the latest.")
_DATA_PATH = flags.DEFINE_string(
    "data_path", None, "Another folder to evaluate on; default: that of the run."
)
_BATCHES = flags.DEFINE_integer(
    "batches", None, "Validation batches; 0: the whole split.", lower_bound=0
)
flags.register_validator(
    "contexts",
    lambda texts: texts is None or all(x.isdecimal() and int(x) > 0 for x in texts),
    message="must be positive integers",
)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"not understood: {' '.join(argv[1:])}")
    console.show_messages(logging.WARNING)
    workdir = pathlib.Path(_WORKDIR.value)
    try:
        mesh = sharding.make_mesh(MeshConfig())
        trained = checkpoint.load(workdir, step=_STEP.value, mesh=mesh)
        if _DATA_PATH.value is not None:
            data = dataclasses.replace(trained.config.data, path=_DATA_PATH.value)
            trained = dataclasses.replace(
                trained, config=dataclasses.replace(trained.config, data=data)
            )
        sources.open_source(trained.config.data, "validation")
    except (FileNotFoundError, ValueError) as error:
        console.fail(error)
    options = {} if _BATCHES.value is None else {"batches": _BATCHES.value}
    if _SUITE.value == "memory":
        result = evaluate.memory_suite(trained, **options)
    else:
        contexts = None if _CONTEXTS.value is None else tuple(map(int, _CONTEXTS.value))
        result = evaluate.validation_suite(trained, contexts=contexts, **options)
    print(evaluate.table(result))
    evaluate.write(result, workdir / "eval")
    print(f"\nwritten to {workdir / 'eval'}")


if __name__ == "__main__":
    jax.config.config_with_absl()
    app.run(main)
