"""Multi-query associative recall of a sweep: by number of pairs, row length and distance.

Rows are those of `bmojo_jax/data/tasks/mqar.py`, drawn for testing alone; scores are explained in
`bmojo_jax/evaluate/recall.py`.
"""

import dataclasses
from typing import Any

import tqdm

from bmojo_jax.data import tasks
from bmojo_jax.evaluate import recall
from bmojo_jax.evaluate.recall import Sweep, draw, load, table

__all__ = ["draw", "load", "run", "table"]


def run(
    sweep: Sweep,
    *,
    pairs: tuple[int, ...] | None = None,
    lengths: tuple[int, ...] | None = None,
    items: int = 0,
) -> dict[str, Any]:
    """Every replica's accuracy, for every number of pairs at every length.

    Args:
      pairs: k; None: those that it was trained on. Those that a length has no room for are left
        out.
      lengths: tokens of a row; None: as in training.
      items: rows of each kind; 0: as many as were tested in training.

    Raises:
      ValueError: the sweep was trained on another task, or no row can be made.
    """
    config = sweep.config
    if config.task.name != "mqar":
        raise ValueError(f"task.name={config.task.name!r}: must be 'mqar' for this suite")
    pairs = config.task.pairs if pairs is None else tuple(sorted(set(pairs)))
    lengths = (config.data.sequence_length,) if lengths is None else tuple(sorted(set(lengths)))
    kinds = [(length, k) for length in lengths for k in pairs if 4 * k <= length]
    if not kinds:
        raise ValueError(f"{pairs=}: must be at most a quarter of {lengths=}")
    mesh = recall.replica_mesh(len(recall.replicas(config)))
    conditions = []
    for length, k in tqdm.tqdm(kinds, desc="pairs", unit="kind", leave=False, disable=None):
        task = dataclasses.replace(
            config.task, pairs=(k,), test_examples=items or config.task.test_examples
        )
        data = dataclasses.replace(config.data, sequence_length=length)
        changed = dataclasses.replace(config, task=task, data=data)
        tasks.check(changed)
        rows = recall.test_examples(changed)
        answers = recall.Tester(changed, mesh)(sweep.params, rows)
        name = f"{k} pairs in {length:,} tokens"
        entry = recall.condition(changed, rows, answers, measure="accuracy", name=name)
        conditions.append({"length": length, "pairs": k, **entry})
    return {
        "suite": "mqar",
        "title": f"{recall.title(sweep)}, filler {config.task.filler}",
        "step": sweep.step,
        "filler": config.task.filler,
        "conditions": conditions,
    }
