"""Which checkpoints a directory holds: whole ones with their losses, damaged ones, leftovers.

    6/                           a checkpoint
    9.orbax-checkpoint-tmp/      one that is being saved, or was when its run was killed
    damaged-3/                   one that was found damaged, moved aside and never deleted
    removed-3/                   one that is being deleted

Every process of a run holds the same inventory; the first one alone looks, moves and deletes.
"""

import json
import math
import os
import pathlib
import shutil
from collections.abc import Iterable
from typing import Any, Literal

import jax
from absl import logging

from bmojo_jax import manifest, processes

LOSS = "validation_loss"
TEMPORARY = ".orbax-checkpoint-tmp"  # orbax's; ends the name of what is not complete


class DamagedError(ValueError):
    """A checkpoint is damaged, or all are; names the file of each."""


class Inventory:
    """The checkpoints of a directory, which need not exist; `mode` as for Checkpoints."""

    def __init__(self, directory: pathlib.Path, mode: Literal["write", "read"]) -> None:
        self.directory = directory
        self._mode = mode
        self._take_stock()

    def _take_stock(self) -> None:
        found = processes.first_says(self._look)
        self.losses: dict[int, float | None] = {int(step): x for step, x in found["whole"]}
        self._damaged: dict[int, str] = {}
        self._moved: list[str] = found["moved"]
        for step, problem in sorted(found["damaged"], reverse=True):
            self.report(step, problem)

    def folder(self, step: int) -> pathlib.Path:
        return self.directory / str(step)

    def latest(self) -> int | None:
        """The latest step; None if nothing was ever saved; DamagedError if nothing is whole."""
        if self.losses:
            return max(self.losses)
        if self._damaged or self._moved:
            which = [f"{step}: {problem}" for step, problem in sorted(self._damaged.items())]
            raise DamagedError(
                f"{self.directory}: must hold a checkpoint that is whole, and all are damaged "
                f"({'; '.join(which + self._moved)}). To start anew, take another work directory"
            )
        return None

    def best(self, count: int) -> set[int]:
        """The steps with the lowest validation losses, the later of equals."""
        ranked = [(loss, -step) for step, loss in self.losses.items() if loss is not None]
        return {-negative for _, negative in sorted(ranked)[:count]}

    def check(self, step: int | None) -> int:
        """The step itself, or the latest one for None.

        Raises:
          FileNotFoundError: it is not there.
          DamagedError: it is damaged, or all are.
        """
        if step in self._damaged:
            raise self.damaged(step, self._damaged[step])
        latest = self.latest()
        if latest is None:
            raise FileNotFoundError(f"no checkpoint in {self.directory}")
        if step is not None and step not in self.losses:
            raise FileNotFoundError(
                f"no checkpoint of {step=} in {self.directory}, which holds {sorted(self.losses)}"
            )
        return latest if step is None else step

    def find_damage(self, step: int) -> str | None:
        """What is wrong with a checkpoint whose every byte is looked at; None if nothing is."""
        return processes.first_says(lambda: manifest.find_damage(self.folder(step), "full"))

    def look_again(self, step: int) -> bool:
        """Looks anew if a run that is saving here has just removed a checkpoint that was read."""
        if self._mode == "write" or self.folder(step).is_dir():
            return False
        self._take_stock()
        return True

    def damaged(self, step: int, problem: str) -> DamagedError:
        return DamagedError(f"{self.directory}: the checkpoint of {step=} is damaged: {problem}")

    def report(self, step: int, problem: str) -> None:
        """Takes a damaged checkpoint out of those that can be used."""
        self._damaged[step] = problem
        self.losses.pop(step, None)
        if jax.process_index() == 0:
            before = [n for n in self.losses if n < step]
            rest = f"The one of step {max(before)} is used" if before else "None is before it"
            logging.error("%s. %s", self.damaged(step, problem), rest)

    def last_good(self) -> str:
        """For messages: what an error has left."""
        if not self.losses:
            return "No checkpoint had been saved"
        return f"The last good checkpoint, step {max(self.losses)}, is kept in {self.directory}"

    def move_damaged(self) -> None:
        """Moves damaged ones out of the way of what will be saved; they are not deleted."""
        if self._mode == "read":
            return
        for step in list(self._damaged):
            taken = [name for name in self._moved if f"{name}-".startswith(f"damaged-{step}-")]
            name = f"damaged-{step}-{len(taken) + 1}" if taken else f"damaged-{step}"
            if jax.process_index() == 0:
                os.rename(self.folder(step), self.directory / name)
                logging.error("%s: moved to %s", self.folder(step), name)
            self._moved.append(name)
        self._damaged = {}

    def clean_up(self) -> None:
        """Removes what is left of saving and deleting, unless `mode` is "read"."""
        if self._mode == "read" or jax.process_index() or not self.directory.is_dir():
            return
        for path in self.directory.iterdir():
            if TEMPORARY in path.name or path.name.startswith("removed-"):
                _delete(path)

    def remove(self, steps: Iterable[int]) -> None:
        """Deletes checkpoints, each at once, so that nobody finds a part of one."""
        for step in steps:
            del self.losses[step]
            if jax.process_index():
                continue
            removed = self.directory / f"removed-{step}"
            try:
                os.rename(self.folder(step), removed)
            except OSError as error:
                logging.warning("%s cannot be deleted: %s", self.folder(step), error)
            else:
                _delete(removed)

    def _look(self) -> dict[str, Any]:
        whole, damaged, moved = [], [], []
        for name in sorted(os.listdir(self.directory)) if self.directory.is_dir() else ():
            if name.startswith("damaged-"):
                moved.append(name)
            if not name.isdecimal():
                continue
            step, folder = int(name), self.directory / name
            problem, loss = None, None
            try:
                problem = manifest.find_damage(folder, "quick")
                loss = _validation_loss(folder) if problem is None else None
            except FileNotFoundError:
                if folder.is_dir():
                    raise
            if not folder.is_dir():  # a run that is saving here has just removed it
                continue
            if problem is None:
                whole.append((step, loss))
            else:
                damaged.append((step, problem))
        return {"whole": whole, "damaged": damaged, "moved": moved}


def _validation_loss(folder: pathlib.Path) -> float | None:
    path = folder / "metrics" / "metrics"
    loss = json.loads(path.read_text())[LOSS] if path.is_file() else None
    return None if loss is None or not math.isfinite(loss) else loss


def _delete(path: pathlib.Path) -> None:
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        logging.warning("%s cannot be deleted: %s", path, error)
