"""Every config file gives valid settings, for every preset that it takes."""

import importlib
import itertools
import pathlib

import pytest

from bmojo_jax import config, presets

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"


def settings(name, *arguments):
    module = importlib.import_module(f"configs.{name}")
    assert module.__doc__ and "python train.py" in module.__doc__
    return config.from_config_dict(module.get_config(*arguments))


@pytest.mark.parametrize(
    "name", [path.stem for path in CONFIGS.glob("*.py") if path.stem != "__init__"]
)
def test_config_is_valid(name):
    run = settings(name)
    words = 257 if run.task.name == "none" else run.task.vocab_size
    assert run.model.vocab_size >= words


@pytest.mark.parametrize(
    ("family", "size"), list(itertools.product(presets.PATTERNS, presets.SIZES))
)
def test_lm_takes_every_preset(family, size):
    got = settings("lm", f"{family},{size}").model
    want = presets.model(family, size, vocab_size=257)
    assert (got.pattern, got.depth, got.width) == (want.pattern, want.depth, want.width)


def test_quickstart_is_small_and_on_text_that_every_machine_has():
    quickstart = settings("quickstart")
    assert presets.model_parameters(quickstart.model) < 3e6
    folder = pathlib.Path(quickstart.data.path)
    assert (folder / "os.py").exists()
