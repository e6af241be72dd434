"""What the processes of a run tell each other, and what happens when one of them is gone."""

import contextlib
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Generator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

# After that long without a sign of life JAX ends all the others, wherever they wait.
_SILENCE_S = 30
_SHUTDOWN_S = 30  # after that long JAX no longer waits for the others at the end
_GONE = re.compile(
    r"^(UNAVAILABLE|DEADLINE_EXCEEDED): |heartbeat timeout|connection (closed|reset)|"
    r"(gloo|nccl)\b.*\bfailed\b.*(peer|timeout|socket|remote)|another task died",
    re.I | re.M,
)
_OURS = re.compile(r"RESOURCE_EXHAUSTED|out of memory|CpuCallback", re.I)


def connect(coordinator: str | None, count: int | None, index: int | None) -> None:
    """Makes this process one of a run; what is None JAX finds out (TPU pods, SLURM, Kubernetes).

    Raises:
      ValueError: it cannot be found out, or does not fit.
    """
    jax.distributed.initialize(
        coordinator,
        count,
        index,
        heartbeat_timeout_seconds=_SILENCE_S,
        shutdown_timeout_seconds=_SHUTDOWN_S,
    )


@contextlib.contextmanager
def end_with_the_others(advice: str) -> Generator[None]:
    """Ends this process, with a message, if inside it turns out that another one has ended.

    At once: whatever would be closed or saved on the way out might wait for the other for ever.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:  # JAX raises one or the other
        if jax.process_count() == 1 or _OURS.search(str(error)) or not _GONE.search(str(error)):
            raise
        print(
            f"\nanother process of this run seems to have ended, so process {jax.process_index()} "
            f"of {jax.process_count()} ends too; what the other has printed says why. {advice}\n"
            f"({error})",
            file=sys.stderr,
            flush=True,
        )
        _end()


@contextlib.contextmanager
def ending_the_others() -> Generator[None]:
    """Ends this process at once if an error leaves the block.

    The usual way out waits for the others, which meanwhile wait for this one.
    """
    try:
        yield
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        if isinstance(error, SystemExit):
            print(error.code, file=sys.stderr)
        else:
            traceback.print_exc()
        _end()


def _end() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
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
