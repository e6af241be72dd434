"""Checkpoints of a run: train state, place in the data, and config, together and atomic.

A checkpoint of step n is a folder `n` with the items

    state   any tree of arrays (parameters below its entry `params`, optimizer, step, random key)
    data    for every process, where its data iterator stands (JSON)
    config  the settings of the run (JSON, readable without arrays)

written by orbax in the background and renamed into place when complete: what is there is whole.
Arrays are stored in their dtype, bit for bit, and can be restored onto another mesh.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from bmojo_jax import model, paths, sharding
from bmojo_jax.config import TrainConfig
from bmojo_jax.data import tokenizers
from bmojo_jax.data.tokenizers import Tokenizer
from bmojo_jax.settings import from_dict

DataState = dict[str, Any]  # JSON-able
_LOSS = "validation_loss"


def _quality(metrics: Mapping[str, Any] | None) -> float:
    """Orders checkpoints, best last; one without a validation loss is the worst."""
    loss = None if metrics is None else metrics[_LOSS]
    return -math.inf if loss is None else -loss


@dataclasses.dataclass(frozen=True)
class _LastAndBest:
    """Orbax's LatestN or BestN would keep n checkpoints of any quality where there are only n."""

    keep_last: int
    keep_best: int

    def should_preserve(
        self,
        checkpoints: Sequence[Any],  # with `step`, `time` and `metrics`
        *,
        context: checkpoint_managers.PreservationContext,
    ) -> Sequence[bool]:
        del context
        qualities = [_quality(checkpoint.metrics) for checkpoint in checkpoints]
        ranked = sorted(range(len(qualities)), key=lambda i: (qualities[i], i), reverse=True)
        best = [i for i in ranked[: self.keep_best] if qualities[i] > -math.inf]
        last = len(checkpoints) - self.keep_last
        return [i >= last or i in best for i in range(len(checkpoints))]


def _gather(text: str) -> list[str]:
    """The texts of all processes, in their order."""
    if jax.process_count() == 1:
        return [text]
    mine = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(mine.size))
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: mine.size] = mine
    rows = multihost_utils.process_allgather(padded)
    return [row[:n].tobytes().decode() for row, n in zip(rows, lengths, strict=True)]


class Checkpoints:
    """The checkpoints of one directory; the last and the best are kept.

    Close it, or leave its `with` block, to wait for a save that is under way.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep_last: int,
        keep_best: int,
        mode: Literal["write", "read"] = "write",
    ) -> None:
        """Opens a directory, which need not exist before the first save.

        Args:
          mode: "read" leaves the directory as it is: a run may be saving there. "write" drops
            what a run that was killed has left half saved.
          keep_last: how many of the latest checkpoints stay.
          keep_best: how many of those with the lowest validation loss stay beside them.
        """
        self.directory = pathlib.Path(directory).absolute()
        handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
        handlers.add("state", ocp.args.PyTreeSave, ocp.PyTreeCheckpointHandler())
        handlers.add("state", ocp.args.PyTreeRestore, ocp.PyTreeCheckpointHandler())
        for item in ("data", "config"):
            handler = ocp.JsonCheckpointHandler()
            handlers.add(item, ocp.args.JsonSave, handler)
            handlers.add(item, ocp.args.JsonRestore, handler)
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=_LastAndBest(keep_last, keep_best),
                best_fn=_quality,
                create=mode == "write",
                cleanup_tmp_directories=mode == "write",
                read_only=mode == "read",
                save_interval_steps=int(mode == "write"),
            ),
            handler_registry=handlers,
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def save(
        self,
        step: int,
        state: Any,
        data_state: DataState,
        config: dict[str, Any],
        *,
        validation_loss: float | None = None,
    ) -> bool:
        """Starts saving and returns once the state may be changed or donated.

        Every process calls it, each with its own `data_state`.

        Returns:
          Whether anything is saved: a second save of the latest step does nothing.

        Raises:
          ValueError: the directory holds a later step.
        """
        latest = self.latest_step()
        if latest == step:
            logging.info("step %d is saved already", step)
            return False
        if latest is not None and latest > step:
            raise ValueError(
                f"{step=} must be after the latest checkpoint in {self.directory}, {latest}"
            )
        finite = validation_loss is not None and math.isfinite(validation_loss)
        return self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(state),
                data=ocp.args.JsonSave({"processes": _gather(json.dumps(data_state))}),
                config=ocp.args.JsonSave(config),
            ),
            metrics={_LOSS: float(validation_loss) if finite else None},
        )

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, DataState]:
        """The state and this process's place in the data, of `step` or the latest one.

        Args:
          abstract_state: the state as jax.ShapeDtypeStructs with shardings.

        Raises:
          FileNotFoundError: there is no such checkpoint.
          ValueError: the checkpoint holds other arrays, or was saved by another number of
            processes.
        """
        step = self.check_step(step)
        processes = self._restore(step, data=ocp.args.JsonRestore()).data["processes"]
        if len(processes) != jax.process_count():
            raise ValueError(
                f"{self.directory}, {step=}: saved by {len(processes)} processes, whose places in "
                f"the data cannot be shared out among {jax.process_count()}"
            )
        state = self._restore_arrays(step, abstract_state, partial=False)
        return state, json.loads(processes[jax.process_index()])

    def restore_params(self, abstract_params: Any, step: int | None = None) -> Any:
        """The parameters alone, of `step` or the latest one; errors as in `restore`."""
        tree = {"params": abstract_params}
        return self._restore_arrays(self.check_step(step), tree, partial=True)["params"]

    def config(self, step: int | None = None) -> dict[str, Any]:
        """The config that was saved with `step` or the latest checkpoint."""
        return self._restore(self.check_step(step), config=ocp.args.JsonRestore()).config

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """The step with the lowest validation loss; None if no checkpoint has one."""
        self.wait()
        step = self._manager.best_step()
        if step is None or _quality(self._manager.metrics(step)) == -math.inf:
            return None
        return step

    def wait(self) -> None:
        """Returns when nothing is being saved; raises what a save raised."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()

    def check_step(self, step: int | None) -> int:
        """The step itself, or the latest one for None; FileNotFoundError if it is not there."""
        steps = self._manager.all_steps()
        if not steps:
            raise FileNotFoundError(f"no checkpoint in {self.directory}")
        if step is not None and step not in steps:
            raise FileNotFoundError(
                f"no checkpoint of {step=} in {self.directory}, which holds {sorted(steps)}"
            )
        return max(steps) if step is None else step

    def _restore(self, step: int, **items: Any) -> Any:
        self.wait()  # the step may be the one that is being saved
        return self._manager.restore(step, args=ocp.args.Composite(**items))

    def _restore_arrays(self, step: int, abstract: Any, *, partial: bool) -> Any:
        self.wait()
        self._check_shapes(step, abstract, partial=partial)
        arguments = ocp.args.PyTreeRestore(
            abstract,
            restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
            partial_restore=partial,
        )
        return self._restore(step, state=arguments).state

    def _check_shapes(self, step: int, abstract: Any, *, partial: bool) -> None:
        metadata = self._manager.item_metadata(step)["state"]
        saved = {path: leaf.shape for path, leaf in paths.flatten_paths(metadata.tree).items()}
        wanted = {path: leaf.shape for path, leaf in paths.flatten_paths(abstract).items()}
        where = f"{self.directory}, {step=}"
        for path, shape in wanted.items():
            if path not in saved:
                raise ValueError(f"{where}: has no {path!r}, wanted with shape {shape}")
            if saved[path] != shape:
                raise ValueError(f"{where}: {path!r} has shape {saved[path]}, wanted {shape}")
        extra = [] if partial else [path for path in saved if path not in wanted]
        if extra:
            raise ValueError(f"{where}: has {extra[0]!r}, which the state lacks")


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model out of a work directory."""

    config: TrainConfig
    params: model.Params
    step: int
    tokenizer: Tokenizer


def load(
    workdir: str | os.PathLike[str],
    *,
    step: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Trained:
    """The model that a run has left in `workdir`, at `step` or the latest one.

    Args:
      mesh: where the parameters are placed, by the sharding rules; None: on one device.

    Raises:
      FileNotFoundError: there is no such checkpoint.
    """
    directory = pathlib.Path(workdir) / "checkpoints"
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} does not exist: no run has saved anything there")
    with Checkpoints(directory, keep_last=1, keep_best=0, mode="read") as checkpoints:
        step = checkpoints.check_step(step)
        config = from_dict(TrainConfig, checkpoints.config(step))
        shapes = jax.eval_shape(lambda: model.init_params(config.model, jax.random.key(0)))
        if mesh is None:
            device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            placement = jax.tree.map(lambda _: device, shapes)
        else:
            placement = sharding.param_shardings(mesh, shapes)
        abstract = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, placement
        )
        params = checkpoints.restore_params(abstract, step)
        return Trained(config, params, step, tokenizers.make_tokenizer(config.data))
