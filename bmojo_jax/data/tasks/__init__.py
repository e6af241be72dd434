"""Generated tasks: example i of a split is a pure function of (seed, split, i), on the device.

Tasks on tokens (`mqar`, `mad`), for `bmojo_jax.sweep`, are made inside the compiled step and never
on the host: what a step trains on follows from its number. Tasks in text (`needles`, `phonebook`)
are documents like any others.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from bmojo_jax.config import TaskConfig, TrainConfig
from bmojo_jax.data.tasks import mad, mqar
from bmojo_jax.data.tasks.example import Example
from bmojo_jax.settings import require

Split = Literal["train", "test"]


def check(config: TrainConfig) -> None:
    """Raises ValueError if the task does not fit the rows, the batch or the model."""
    task, length = config.task, config.data.sequence_length
    if task.name == "mqar":
        mqar.check(vocab_size=task.vocab_size, length=length, pairs=task.pairs)
    elif task.name != "none":
        mad.check(task.name, vocab_size=task.vocab_size, length=length)
    require(
        config.model.vocab_size >= task.vocab_size,
        "model.vocab_size",
        config.model.vocab_size,
        f"at least task.vocab_size={task.vocab_size}",
    )
    require(
        task.train_examples == 0 or task.train_examples >= config.data.batch_size,
        "task.train_examples",
        task.train_examples,
        f"0 or at least data.batch_size={config.data.batch_size}",
    )


def pairs_of(task: TaskConfig, index: Int[Array, "..."]) -> Int[Array, "..."]:
    """k of the examples with these indices: the task's numbers of pairs in turn."""
    return jnp.asarray(task.pairs)[index % len(task.pairs)]


def examples(
    task: TaskConfig,
    length: int,
    split: Split,
    seed: Int[Array, ""] | int,
    index_B: Int[Array, " B"],
) -> Example:
    """The examples of a split with these indices.

    Args:
      length: tokens of a row.
    """
    root = jax.random.key(seed)
    split_key = jax.random.fold_in(root, ("train", "test").index(split))
    sizes = {"vocab_size": task.vocab_size, "length": length}

    def one(i: Array) -> Example:
        key = jax.random.fold_in(split_key, i)
        match task.name:
            case "mqar":
                most = max(task.pairs)
                return mqar.example(key, pairs_of(task, i), **sizes, most=most, filler=task.filler)
            case "in_context_recall":
                return mad.recall(key, **sizes, noise=0.0)
            case "noisy_recall":
                return mad.recall(key, **sizes, noise=mad.NOISE)
            case "fuzzy_recall":
                shortest = 1 if split == "train" else mad.MOTIF
                return mad.fuzzy(key, **sizes, shortest_key=shortest)
            case "selective_copying":
                return mad.selective_copying(key, **sizes)
            case "memorization":
                # What is to be known by heart is no matter of the seed.
                return mad.memorization(key, jax.random.key(0), **sizes)
        raise ValueError(f"task.name={task.name!r}: has no examples")

    return jax.vmap(one)(index_B)


def train_indices(
    task: TaskConfig, batch_size: int, seed: Int[Array, ""] | int, step: Int[Array, ""]
) -> Int[Array, " B"]:
    """Which examples update `step` (counted from 0) is made from.

    A fixed set is shuffled anew in every epoch; what does not fill a batch is left out of it.
    """
    row_B = jnp.arange(batch_size)
    if not task.train_examples:
        return step * batch_size + row_B
    batches = task.train_examples // batch_size
    key = jax.random.fold_in(jax.random.key(seed), 2 + step // batches)
    order = jnp.argsort(jax.random.bits(key, (task.train_examples,)))
    return jax.lax.dynamic_slice(order, (step % batches * batch_size,), (batch_size,))
