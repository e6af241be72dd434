"""What the programs say on the terminal: their own messages, and a user's errors in one line."""

import logging as python_logging
import pathlib
import re
import sys
from typing import NoReturn

from absl import flags, logging

from bmojo_jax import config

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
        # With tracebacks orbax, and asyncio for the writes that it gave up, tell many times what
        # checkpoint.py says in a line.
        repeated = "orbax" in path.parts or record.name == "asyncio"
        return not (record.exc_info and repeated)
    return path.name in _OURS or any(folder in _OURS for folder in path.parts)


def parse_config_flags(arguments: list[str]) -> list[str]:
    """For absl's `app.run`: parses --config and its overrides; ends the program if one is wrong."""
    overrides = [re.match(r"--?config\.([^=]*)", argument) for argument in arguments[1:]]
    given = [override[1] for override in overrides if override]
    try:
        for name in given:
            config.check_name(name)
        return flags.FLAGS(arguments)
    except IndexError:
        places = [name for name in given if "[" in name]
        fail(ValueError(f"{', '.join(places)}: must be places that the config file has filled"))
    except (flags.Error, OSError, ValueError) as error:
        fail(error)


def fail(error: Exception) -> NoReturn:
    """Ends the program for what is the user's to correct.

    Only the last line of the message counts: ml_collections puts a traceback before.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    sys.exit(f"{pathlib.Path(sys.argv[0]).name}: {lines[-1].strip()}")
