"""What is checked before a run compiles or writes anything.

A dataclass of `config.py` checks itself when it is made; here is what needs more than the settings:
devices, tokenizer, files, the run that is continued. Each check raises a ValueError that names the
setting, its value and what would be valid.
"""

import contextlib
import os
import pathlib
from collections.abc import Generator
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from bmojo_jax.config import DataConfig, TrainConfig
from bmojo_jax.data import tokenizers
from bmojo_jax.data.tokenizers import Tokenizer
from bmojo_jax.settings import from_dict, to_dict
from pallas_kernels.memory_attention.api import IMPLEMENTATIONS as ATTENTION_IMPLEMENTATIONS
from pallas_kernels.selective_scan.api import IMPLEMENTATIONS as SCAN_IMPLEMENTATIONS

# What of these sections may differ between a run and its continuation: nothing that changes the
# parameters' shapes or which batch comes next (each of data.workers reads documents of its own).
_FREE_MODEL_FIELDS = {"compute_dtype", "remat", "scan_implementation", "attention_implementation"}
# Nor names of files, where the files can be compared: `choose_tokenizer`, `check_documents`.


class SettingsError(ValueError):
    """The settings do not fit together, or the devices, the data, or the run they continue."""


@contextlib.contextmanager
def settings_errors() -> Generator[None]:
    try:
        yield
    except ValueError as error:
        raise SettingsError(str(error)) from error


def check_vocabulary(config: TrainConfig, tokenizer: Tokenizer) -> None:
    """Raises ValueError if the model cannot tell all tokens apart."""
    needed = tokenizer.vocab_size
    if config.model.vocab_size < needed:
        raise ValueError(
            f"model.vocab_size={config.model.vocab_size}: must be at least {needed} for "
            f"data.tokenizer={config.data.tokenizer!r}"
        )


def check_precision(config: TrainConfig) -> None:
    """Raises ValueError if JAX would quietly compute in less than the settings say."""
    wanted = config.model.compute_dtype
    if jax.dtypes.canonicalize_dtype(wanted) != wanted:
        raise ValueError(
            f"model.compute_dtype={wanted!r}: must be 'float32' or 'bfloat16' unless JAX has "
            "64-bit types (JAX_ENABLE_X64=1)"
        )


def check_comparison(config: TrainConfig) -> None:
    """Raises ValueError if there are no bytes to compare the model with baselines on."""
    if config.compare_with != "nothing" and config.data.source == "tokens":
        raise ValueError(
            f"compare_with={config.compare_with!r}: must be 'nothing' with data.source='tokens', "
            "of which the bytes are not known"
        )


def check_workdir(workdir: pathlib.Path) -> None:
    """Raises ValueError if no directory can be there."""
    nearest = next(path for path in (workdir, *workdir.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ValueError(f"workdir={str(workdir)!r}: {nearest} must be a directory to write to")


def check_implementations(config: TrainConfig, program: Any) -> None:
    """Raises ValueError if an implementation that the settings name cannot run this model."""
    named = False
    for field, known in (
        ("scan_implementation", SCAN_IMPLEMENTATIONS),
        ("attention_implementation", ATTENTION_IMPLEMENTATIONS),
    ):
        name = getattr(config.model, field)
        if name is not None and name not in known:
            raise ValueError(f"model.{field}={name!r}: must be None or one of {sorted(known)}")
        named |= name is not None
    if named:  # else what cannot run is passed over
        shape = (config.data.batch_size, config.data.sequence_length)
        ints, floats = (jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.int32, jnp.float32))
        batch = {"inputs": ints, "targets": ints, "weights": floats, "positions": ints}
        with jax.set_mesh(program.mesh):
            jax.eval_shape(program.step, program.abstract_state, batch)


def check_continuation(
    before: dict[str, Any], step: int, now: TrainConfig, *, tokenizer: Tokenizer | None = None
) -> None:
    """Raises ValueError if `now` cannot continue a run that has made `step` steps with `before`.

    Args:
      tokenizer: that of the run, if it was saved: then its file may have another name now.
    """
    old = from_dict(TrainConfig, before)
    if now.steps < step:
        raise ValueError(
            f"steps={now.steps}: must be at least {step}, which the run in this work directory "
            "has made already (or choose another work directory)"
        )
    names = {"path", *(() if tokenizer is None else ("tokenizer",))}
    for section, free in (("model", _FREE_MODEL_FIELDS), ("data", names)):
        was, is_ = _without_paths(getattr(old, section)), _without_paths(getattr(now, section))
        for field, value in is_.items():
            if field not in free and was[field] != value:
                raise ValueError(
                    f"{section}.{field}={value!r}: must be {was[field]!r}, with which the run in "
                    "this work directory was started (or choose another work directory)"
                )


def _without_paths(section: Any) -> dict[str, Any]:
    """The settings of a section, without the paths of data.mixed_in."""
    values = to_dict(section)
    for source in values.get("mixed_in", ()):
        del source["path"]
    return values


def _paths(config: TrainConfig) -> list[str]:
    return [config.data.path, *(source.path for source in config.data.mixed_in)]


def check_documents(
    before: dict[str, Any], documents_before: str, documents: str, now: TrainConfig
) -> None:
    """Raises ValueError if folders were exchanged for others, and not merely moved.

    Args:
      documents_before: fingerprint of the documents with the settings `before`.
      documents: of those now.
    """
    old = from_dict(TrainConfig, before)
    if documents == documents_before or _paths(old) == _paths(now):
        return
    names = ["data.path", *(f"data.mixed_in[{i}].path" for i in range(len(now.data.mixed_in)))]
    for name, was, is_ in zip(names, _paths(old), _paths(now), strict=True):
        if was != is_:
            raise ValueError(
                f"{name}={is_!r}: must hold the same documents as {was!r}, with which the run in "
                "this work directory was started (or choose another work directory)"
            )


def choose_tokenizer(data: DataConfig, saved: Tokenizer | None) -> Tokenizer:
    """The tokenizer of a run: that of its checkpoint, or, at its start, the one that is named.

    Raises:
      ValueError: the settings name none, or another one than the checkpoint's.
    """
    if saved is None:
        return tokenizers.make_tokenizer(data)
    is_file = data.source != "tokens" and data.tokenizer != "bytes"
    if is_file and not pathlib.Path(data.tokenizer).exists():
        logging.info(
            "data.tokenizer=%r is gone; its copy in the checkpoint is used", data.tokenizer
        )
        return saved
    if tokenizers.make_tokenizer(data).fingerprint() != saved.fingerprint():
        raise ValueError(
            f"data.tokenizer={data.tokenizer!r}: must be the tokenizer with which the run in this "
            "work directory was started, and gives other ids (or choose another work directory)"
        )
    return saved
