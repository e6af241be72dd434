"""Checkpoints of a run: state, place in the data, tokenizer and settings, together and atomic.

A checkpoint of step n is a folder `n` with the items

    state      any tree of arrays (parameters below its entry `params`, optimizer, step, random key)
    data       for every shard of the data, where its iterator stands (JSON)
    config     the settings of the run (JSON, readable without arrays)
    tokenizer  all of the tokenizer (JSON), so that nobody needs its file again
    metrics    the validation loss, if there was an evaluation at this step (JSON)

and a manifest, by which damage is found. Orbax writes it in the background, under another name
until it is complete; only then are older ones removed. So whatever happens to a save, what was
saved before stays. Arrays are stored in their dtype, bit for bit, and can be restored onto another
mesh.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import threading
from collections.abc import Callable
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp
from absl import logging

from bmojo_jax import manifest, model, paths, processes, sharding
from bmojo_jax.config import TrainConfig
from bmojo_jax.data import tokenizers
from bmojo_jax.data.tokenizers import Tokenizer
from bmojo_jax.inventory import LOSS, TEMPORARY, DamagedError, Inventory
from bmojo_jax.settings import from_dict

__all__ = ["Checkpoints", "DamagedError", "DataState", "SaveError", "Trained", "load"]

DataState = dict[str, Any]  # JSON-able


class SaveError(RuntimeError):
    """What should be in a checkpoint is in none; names the last one that is whole."""


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
        """Looks into a directory, which need not exist before the first save.

        Damaged checkpoints are reported and passed over. Nothing is changed before `restore`,
        `clean_up` or `save`.

        Args:
          mode: "read" leaves the directory as it is: a run may be saving there.
          keep_last: how many of the latest checkpoints stay.
          keep_best: how many of those with the lowest validation loss stay beside them.
        """
        self.directory = pathlib.Path(directory).absolute()
        self._keep_last, self._keep_best = keep_last, keep_best
        self._thread: threading.Thread | None = None  # completes the save that is under way
        self._saving: int | None = None
        self._failure: BaseException | None = None  # of the latest save
        self._checkpointer = self._make_checkpointer()
        self._inventory = Inventory(self.directory, mode)

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
        tokenizer: Tokenizer | None = None,
        validation_loss: float | None = None,
    ) -> bool:
        """Starts saving and returns once the state may be changed or donated.

        Every process calls it, each with the `shards` of its own in `data_state`, by their number.
        A save that fails, e.g. for a full
        disk, is reported and does not raise, since the next one may succeed; see `check_saved`.

        Returns:
          Whether anything is being saved: a second save of the latest step does nothing.

        Raises:
          ValueError: the directory holds a later step.
          SaveError: the save before has failed, of several processes. They cannot go on.
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
        loss = float(validation_loss) if finite else None
        items: dict[str, Any] = {
            "state": ocp.args.PyTreeSave(state),
            "data": ocp.args.JsonSave({"processes": processes.gather(json.dumps(data_state))}),
            "config": ocp.args.JsonSave(config),
            "metrics": ocp.args.JsonSave({LOSS: loss}),
        }
        if tokenizer is not None:
            items["tokenizer"] = ocp.args.JsonSave(tokenizer.to_dict())
        self._saving = step
        try:
            self.clean_up()
            self.directory.mkdir(parents=True, exist_ok=True)
            self._checkpointer.save(self._inventory.folder(step), args=ocp.args.Composite(**items))
        except (OSError, ValueError) as error:
            self._fail(step, error)
            return False
        self._thread = threading.Thread(target=self._complete, args=(step, loss), name="complete")
        self._thread.start()
        return True

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, DataState]:
        """The state and the place in the data, of `step` or the latest whole one.

        Args:
          abstract_state: the state as jax.ShapeDtypeStructs with shardings.

        Raises:
          FileNotFoundError: there is no such checkpoint.
          DamagedError: it is damaged, or all are.
          ValueError: the checkpoint holds other arrays.
        """

        def read(step: int) -> tuple[Any, DataState]:
            place = self.place(step)
            return self._read_arrays(step, abstract_state, partial=False), place

        return self.read_whole(read, step)

    def restore_params(self, abstract_params: Any, step: int | None = None) -> Any:
        """The parameters alone, of `step` or the latest whole one; errors as in `restore`."""
        return self.read_whole(lambda n: self.read_params(n, abstract_params), step)

    def read_params(self, step: int, abstract_params: Any) -> Any:
        """As `restore_params`, of a checkpoint that was looked at."""
        return self._read_arrays(step, {"params": abstract_params}, partial=True)["params"]

    def read_whole[T](self, read: Callable[[int], T], step: int | None = None) -> T:
        """`read(step)`, or of the latest step, if every byte of it is what was saved.

        Without `step`, damaged ones are reported, moved aside if this may write, and the one
        before is read.
        """
        given = step
        while True:
            step = self.check_step(given)
            try:
                problem = self._inventory.find_damage(step)
                if problem is None:
                    result = read(step)
                    self._inventory.move_damaged()
                    return result
            except _UnreadableError as error:
                problem = str(error)
            except FileNotFoundError:
                if given is None and self._inventory.look_again(step):
                    continue
                raise
            if given is None and self._inventory.look_again(step):
                continue
            if given is not None:
                raise self._inventory.damaged(step, problem)
            self._inventory.report(step, problem)

    def place(self, step: int | None = None) -> DataState:
        """What `save` was given as `data_state`, with the `shards` of all processes."""
        places = map(json.loads, self._read_json(self.check_step(step), "data")["processes"])
        place, *others = (
            # A process was a shard once.
            p if "shards" in p or "iterator" not in p else p | {"shards": {str(i): p["iterator"]}}
            for i, p in enumerate(places)
        )
        for other in others:
            place["shards"] |= other["shards"]
        return place

    def config(self, step: int | None = None) -> dict[str, Any]:
        """The config that was saved with `step` or the latest checkpoint."""
        return self._read_json(self.check_step(step), "config")

    def tokenizer(self, step: int | None = None) -> Tokenizer | None:
        """The tokenizer that was saved with `step` or the latest checkpoint; None: none was."""
        step = self.check_step(step)
        if not (self._inventory.folder(step) / "tokenizer").is_dir():
            return None
        return tokenizers.from_dict(self._read_json(step, "tokenizer"))

    def latest_step(self) -> int | None:
        """The latest step that is saved, after waiting for a save that is under way.

        Raises:
          DamagedError: there are checkpoints, and all of them are damaged.
        """
        self.wait()
        return self._inventory.latest()

    def best_step(self) -> int | None:
        """The step with the lowest validation loss; None if no checkpoint has one."""
        self.wait()
        return next(iter(self._inventory.best(1)), None)

    def check_step(self, step: int | None) -> int:
        """The step itself, or the latest one for None; FileNotFoundError if it is not there."""
        self.wait()
        return self._inventory.check(step)

    def last_good(self) -> str:
        """For messages: which checkpoint there is to continue from."""
        self.wait()
        return self._inventory.last_good()

    def wait(self) -> None:
        """Returns when nothing is being saved; raises SaveError as `save` does."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None and jax.process_count() > 1:
            raise SaveError(f"a save in {self.directory} has failed: {_told(self._failure)}")

    def check_saved(self, step: int) -> None:
        """Waits, and raises SaveError if there is no checkpoint of `step` then."""
        self.wait()
        if step in self._inventory.losses:
            return
        reason = "" if self._failure is None else f": {_told(self._failure)}"
        raise SaveError(
            f"step {step} could not be saved in {self.directory}{reason}. "
            f"{self._inventory.last_good()}. The same command continues from there"
        )

    def clean_up(self) -> None:
        """Moves damaged checkpoints aside, and removes what a killed run has left half saved."""
        self.wait()
        self._inventory.move_damaged()
        self._inventory.clean_up()

    def close(self) -> None:
        try:
            self.wait()
        finally:
            self._checkpointer.close()
            if self._failure is not None:  # writes that were under way may have come after it
                self._inventory.clean_up()

    def _make_checkpointer(self) -> ocp.AsyncCheckpointer:
        handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
        handlers.add("state", ocp.args.PyTreeSave, ocp.PyTreeCheckpointHandler())
        handlers.add("state", ocp.args.PyTreeRestore, ocp.PyTreeCheckpointHandler())
        for item in ("data", "config", "tokenizer", "metrics"):
            name = "metrics" if item == "metrics" else "metadata"
            handlers.add(item, ocp.args.JsonSave, ocp.JsonCheckpointHandler(name))
        return ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(handler_registry=handlers),
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._seal),
        )

    def _seal(self) -> None:
        """Called by orbax, in the first process, between the last file and the renaming."""
        manifest.write(self.directory / f"{self._saving}{TEMPORARY}")

    def _complete(self, step: int, loss: float | None) -> None:
        try:
            self._checkpointer.wait_until_finished()
            if jax.process_index() == 0:
                manifest.flush_name(self._inventory.folder(step))
        except BaseException as error:
            self._fail(step, error)
            return
        self._failure = None
        losses = self._inventory.losses
        losses[step] = loss
        kept = {*sorted(losses)[-self._keep_last :], *self._inventory.best(self._keep_best)}
        self._inventory.remove(set(losses) - kept)

    def _fail(self, step: int, error: BaseException) -> None:
        self._failure = error
        logging.error(
            "step %d could not be saved in %s: %s. %s. The next save is tried all the same",
            *(step, self.directory, _told(error), self._inventory.last_good()),
        )
        # Orbax would raise what remains of it at its next use.
        failed, self._checkpointer = self._checkpointer, self._make_checkpointer()
        with contextlib.suppress(Exception):
            failed.close()
        self._inventory.clean_up()

    def _read_json(self, step: int, item: str) -> Any:
        return json.loads((self._inventory.folder(step) / item / "metadata").read_text())

    def _read_arrays(self, step: int, abstract: Any, *, partial: bool) -> Any:
        folder = self._inventory.folder(step)
        arguments = ocp.args.PyTreeRestore(
            abstract,
            restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
            partial_restore=partial,
        )
        try:
            items: Any = self._checkpointer.metadata(folder).item_metadata
            saved = items["state"].tree
            _check_shapes(f"{self.directory}, {step=}", saved, abstract, partial=partial)
            return self._checkpointer.restore(folder, ocp.args.Composite(state=arguments)).state
        except (_OtherArraysError, MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:
            if manifest.is_in(folder):  # every byte is as it was saved: it is not the files
                raise
            raise _UnreadableError(f"state cannot be loaded: {_told(error)}") from error


class _OtherArraysError(ValueError):
    """A checkpoint is of another model."""


class _UnreadableError(Exception):
    """A checkpoint without a manifest cannot be loaded."""


def _check_shapes(where: str, saved: Any, abstract: Any, *, partial: bool) -> None:
    has = {path: leaf.shape for path, leaf in paths.flatten_paths(saved).items()}
    wanted = {path: leaf.shape for path, leaf in paths.flatten_paths(abstract).items()}
    for path, shape in wanted.items():
        if path not in has:
            raise _OtherArraysError(f"{where}: has no {path!r}, wanted with shape {shape}")
        if has[path] != shape:
            raise _OtherArraysError(f"{where}: {path!r} has shape {has[path]}, wanted {shape}")
    extra = [] if partial else [path for path in has if path not in wanted]
    if extra:
        raise _OtherArraysError(f"{where}: has {extra[0]!r}, which the state lacks")


def _told(error: BaseException) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


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
    """The model that a run has left in `workdir`, at `step` or the latest one that is whole.

    Args:
      mesh: where the parameters are placed, by the sharding rules; None: on one device.

    Raises:
      FileNotFoundError: there is no such checkpoint.
      DamagedError: it is damaged, or all are.
      ValueError: the run was a sweep (`bmojo_jax/sweep.py`), not a language model.
    """
    directory = pathlib.Path(workdir) / "checkpoints"
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} does not exist: no run has saved anything there")
    with Checkpoints(directory, keep_last=1, keep_best=0, mode="read") as checkpoints:

        def read(step: int) -> Trained:
            config = from_dict(TrainConfig, checkpoints.config(step))
            if config.task.name != "none":
                raise ValueError(
                    f"workdir={str(workdir)!r}: must be of a language model; it holds a sweep of "
                    f"task.name={config.task.name!r}, which eval.py --suite mqar and mad evaluate"
                )
            shapes = jax.eval_shape(lambda: model.init_params(config.model, jax.random.key(0)))
            if mesh is None:
                device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
                placement = jax.tree.map(lambda _: device, shapes)
            else:
                placement = sharding.param_shardings(mesh, shapes)
            abstract = jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, placement
            )
            params = checkpoints.read_params(step, abstract)
            tokenizer = checkpoints.tokenizer(step)
            if tokenizer is None:  # saved before tokenizers were
                tokenizer = tokenizers.make_tokenizer(config.data)
            return Trained(config, params, step, tokenizer)

        return checkpoints.read_whole(read, step)
