"""The JSON of a benchmark: its command, commit and device, and what it adds as it goes."""

import json
import os
import pathlib
import sys
from typing import Any

import jax

from pallas_kernels import dispatch


class Record:
    """The file, replaced as a whole whenever something is added: a run that is cut off loses none.

    Args:
      module: the command is `python -m benchmarks.MODULE` with the arguments of this process.
      device: its kind; by default that of this process, which takes hold of it.
    """

    def __init__(
        self,
        path: pathlib.Path,
        module: str,
        commit: str,
        *,
        device: str | None = None,
        **more: Any,
    ):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.content: dict[str, Any] = {
            "command": " ".join([f"python -m benchmarks.{module}", *sys.argv[1:]]),
            "commit": commit,
            "device": dispatch.device_kind() if device is None else device,
            "jax": jax.__version__,
            **more,
        }

    def add(self, name: str, value: Any) -> None:
        self.content[name] = value
        part = self.path.with_name(self.path.name + ".part")
        part.write_text(json.dumps(self.content, indent=1) + "\n")
        os.replace(part, self.path)
