"""Trains a model: `python train.py --config configs/quickstart.py --workdir DIR`.

Any setting can be changed (`--config.model.window=128`). A work directory that holds a checkpoint
is continued; SIGTERM or Ctrl-C saves one and exits. `--distributed` on each host makes one run.
"""

import pathlib

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from bmojo_jax import checkpoint, checks, closing, config, console, processes, sweep, trainer
from bmojo_jax.data import pipeline

_CONFIG = config_flags.DEFINE_config_file("config", None, "The settings of the run.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where everything is written.", required=True)
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "This is one of the processes of a run.")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT, if JAX knows no such cluster.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many there are.", lower_bound=1)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which this one is.", lower_bound=0)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"not understood: {' '.join(argv[1:])}")
    trainer.make_deterministic()
    console.show_messages(logging.INFO)
    process = (_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    try:
        settings = config.from_config_dict(_CONFIG.value)
        if _DISTRIBUTED.value:  # before anything asks for devices
            processes.connect(*process)
        elif process != (None, None, None):
            raise ValueError("--coordinator, --num_processes and --process_id need --distributed")
    except (OSError, ValueError) as error:
        console.fail(error)
    with processes.ending_the_others():
        run(settings)


def run(settings: config.TrainConfig) -> None:
    """Trains; what is the user's to correct ends the program with a line."""
    logging.info("%d %s device(s)", jax.device_count(), jax.devices()[0].device_kind)
    try:
        if settings.task.name != "none":
            return sweep.train(settings, _WORKDIR.value)
        outcome = trainer.train(settings, _WORKDIR.value)
    except (
        *(checks.SettingsError, trainer.NonFiniteError, checkpoint.SaveError),
        pipeline.ReaderError,
    ) as error:
        console.fail(error)
    closing.report(settings, outcome, pathlib.Path(_WORKDIR.value))


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    jax.config.config_with_absl()
    app.run(main, flags_parser=console.parse_config_flags)
