"""Trains a model: `python train.py --config configs/quickstart.py --workdir DIR`.

Any setting can be changed on the command line (`--config.model.window=128`). A work directory that
holds a checkpoint is continued. SIGTERM or Ctrl-C saves a checkpoint and exits cleanly.
"""

import pathlib

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from bmojo_jax import closing, config, trainer

_CONFIG = config_flags.DEFINE_config_file("config", None, "The settings of the run.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, logs and figures go.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"not understood: {' '.join(argv[1:])}")
    logging.set_verbosity(logging.INFO)
    try:
        settings = config.from_config_dict(_CONFIG.value)
    except ValueError as error:
        raise app.UsageError(str(error)) from error
    logging.info("%d %s device(s)", jax.device_count(), jax.devices()[0].device_kind)
    workdir = pathlib.Path(_WORKDIR.value)
    outcome = trainer.train(settings, workdir)
    closing.report(settings, outcome, workdir)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    jax.config.config_with_absl()
    app.run(main)
