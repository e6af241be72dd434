"""What the processes of a run tell each other, and what happens when one of them is gone."""

import contextlib
import json
import os
import re
import sys
from collections.abc import Callable, Generator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

# After that long without a sign of life JAX ends all the others, wherever they wait.
_SILENCE_S = 30
_GONE = re.compile(
    r"gloo|nccl|heartbeat|coordination|connection|UNAVAILABLE|DEADLINE_EXCEEDED", re.I
)


def connect(coordinator: str | None, count: int | None, index: int | None) -> None:
    """Makes this process one of a run; what is None JAX finds out (TPU pods, SLURM, Kubernetes).

    Raises:
      ValueError: it cannot be found out, or does not fit.
    """
    jax.distributed.initialize(coordinator, count, index, heartbeat_timeout_seconds=_SILENCE_S)


@contextlib.contextmanager
def end_with_the_others(advice: str) -> Generator[None]:
    """Ends this process, with a message, if inside it turns out that another one has ended.

    At once: whatever would be closed or saved on the way out might wait for the other for ever.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1 or not _GONE.search(str(error)):
            raise
        reason = str(error).splitlines()[0]
        print(
            f"\nanother process of this run has ended or cannot be reached, so process "
            f"{jax.process_index()} of {jax.process_count()} ends too; what the other has printed "
            f"says why. {advice}\n({reason})",
            file=sys.stderr,
            flush=True,
        )
        sys.stdout.flush()
        os._exit(1)


def gather(text: str) -> list[str]:
    """The texts of all processes, in their order; all of them must call it together."""
    if jax.process_count() == 1:
        return [text]
    mine = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(mine.size))
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: mine.size] = mine
    rows = multihost_utils.process_allgather(padded)
    return [row[:n].tobytes().decode() for row, n in zip(rows, lengths, strict=True)]


def first_says(value: Callable[[], Any]) -> Any:
    """What the first process finds, as JSON: of what all see, e.g. a directory, at one time.

    All of them must call it together.
    """
    return json.loads(gather(json.dumps(value() if jax.process_index() == 0 else None))[0])
