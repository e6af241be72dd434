"""What the programs say on the terminal: their own messages, and a user's errors in one line."""

import logging as python_logging
import pathlib
import sys
from typing import NoReturn

from absl import logging

_OURS = ("train.py", "eval.py", "bmojo_jax", "pallas_kernels")


def show_messages(level: int) -> None:
    """Shows messages of this project from `level` on; of the libraries, warnings or worse."""
    logging.set_verbosity(level)
    # Of what prints, not of a logger: jax logs by loggers of its own, orbax by that of absl.
    handler = logging.get_absl_handler().python_handler
    if _is_relevant not in handler.filters:
        handler.addFilter(_is_relevant)


def _is_relevant(record: python_logging.LogRecord) -> bool:
    path = pathlib.Path(record.pathname)
    if record.levelno >= python_logging.WARNING:
        # With tracebacks orbax tells, several times, what checkpoint.py says in a line.
        return not (record.exc_info and "orbax" in path.parts)
    return path.name in _OURS or any(folder in _OURS for folder in path.parts)


def fail(error: Exception) -> NoReturn:
    """Ends the program for what is the user's to correct.

    Only the last line of the message counts: ml_collections puts a traceback before.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    sys.exit(f"{pathlib.Path(sys.argv[0]).name}: {lines[-1].strip()}")
