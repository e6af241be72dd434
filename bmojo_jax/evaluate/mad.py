"""A task of the MAD suite: macro-averaged and plain accuracy of every replica of a sweep.

Tasks are those of `bmojo_jax/data/tasks/mad.py`; scores are explained in
`bmojo_jax/evaluate/recall.py`. The best rate is the one with the best macro average, as published
numbers are.
"""

import dataclasses
from typing import Any

from bmojo_jax.evaluate import recall
from bmojo_jax.evaluate.recall import Sweep, draw, load, table

__all__ = ["draw", "load", "run", "table"]


def run(sweep: Sweep, *, items: int = 0) -> dict[str, Any]:
    """Every replica's accuracy on rows drawn for testing.

    Args:
      items: rows; 0: as many as were tested in training.

    Raises:
      ValueError: the sweep was trained on another task.
    """
    config = sweep.config
    name = config.task.name
    if name == "mqar":
        raise ValueError(f"task.name={name!r}: must be a task of MAD for this suite")
    if items:
        config = dataclasses.replace(
            config, task=dataclasses.replace(config.task, test_examples=items)
        )
    mesh = recall.replica_mesh(len(recall.replicas(config)))
    rows = recall.test_examples(config)
    answers = recall.Tester(config, mesh)(sweep.params, rows)
    return {
        "suite": "mad",
        "title": recall.title(sweep),
        "step": sweep.step,
        "task": name,
        "conditions": [recall.condition(config, rows, answers, measure="macro", name=name)],
    }
