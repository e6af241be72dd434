"""Evaluates a trained model: `python eval.py --workdir DIR`.

Prints a table and writes DIR/eval/<suite>.json and .png. Suites:

    validation   loss on the held-out documents, by context length and by position
"""

import pathlib

import jax
from absl import app, flags

from bmojo_jax import evaluate

_WORKDIR = flags.DEFINE_string("workdir", None, "The work directory of a run.")
_SUITE = flags.DEFINE_enum("suite", "validation", ["validation"], "What to measure.")
_CONTEXTS = flags.DEFINE_list(
    "contexts", None, "Context lengths in tokens; default: 64 to 4 times the training length."
)
_STEP = flags.DEFINE_integer("step", None, "Of the checkpoint; default: the latest.")
_BATCHES = flags.DEFINE_integer(
    "batches", 0, "Validation batches for each context; 0: the whole split.", lower_bound=0
)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"not understood: {' '.join(argv[1:])}")
    contexts = None
    if _CONTEXTS.value is not None:
        try:
            contexts = tuple(int(context) for context in _CONTEXTS.value)
        except ValueError as error:
            raise app.UsageError(f"--contexts={_CONTEXTS.value}: must be integers") from error
    workdir = pathlib.Path(_WORKDIR.value)
    result = evaluate.validation_suite(
        workdir, contexts=contexts, step=_STEP.value, batches=_BATCHES.value
    )
    print(evaluate.table(result))
    evaluate.write(result, workdir / "eval")
    print(f"\nwritten to {workdir / 'eval'}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["workdir"])
    jax.config.config_with_absl()
    app.run(main)
