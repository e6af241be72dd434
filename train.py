"""Trains a model: `python train.py --config configs/quickstart.py --workdir DIR`.

Any setting can be changed on the command line (`--config.model.window=128`). A work directory that
holds a checkpoint is continued. SIGTERM or Ctrl-C saves a checkpoint and exits cleanly.
"""

import logging as python_logging
import pathlib
import re
import sys
from typing import NoReturn

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from bmojo_jax import closing, config, trainer

_CONFIG = config_flags.DEFINE_config_file("config", None, "The settings of the run.")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where checkpoints, logs and figures go.", required=True
)


def _is_ours(record: python_logging.LogRecord) -> bool:
    """Libraries log through absl too; their warnings stay."""
    ours = ("train.py", "bmojo_jax", "pallas_kernels")
    return record.levelno >= python_logging.WARNING or any(x in record.pathname for x in ours)


def _exit(error: Exception) -> NoReturn:
    """What is the user's to correct is said in one line; ml_collections puts a traceback before."""
    sys.exit(f"train.py: {str(error).strip().splitlines()[-1].strip()}")


def _parse_flags(arguments: list[str]) -> list[str]:
    try:
        for argument in arguments[1:]:
            if override := re.match(r"--?config\.([^=]*)", argument):
                config.check_name(override[1])
        return flags.FLAGS(arguments)
    except (flags.Error, OSError, ValueError) as error:
        _exit(error)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"not understood: {' '.join(argv[1:])}")
    logging.set_verbosity(logging.INFO)
    logging.get_absl_logger().addFilter(_is_ours)
    workdir = pathlib.Path(_WORKDIR.value)
    try:
        settings = config.from_config_dict(_CONFIG.value)
    except (OSError, ValueError) as error:
        _exit(error)
    logging.info("%d %s device(s)", jax.device_count(), jax.devices()[0].device_kind)
    try:
        outcome = trainer.train(settings, workdir)
    except (trainer.SettingsError, trainer.NonFiniteError) as error:
        _exit(error)
    closing.report(settings, outcome, workdir)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    jax.config.config_with_absl()
    app.run(main, flags_parser=_parse_flags)
