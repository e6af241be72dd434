"""Files to which a run appends its records, and which outlive a crash and a full disk.

What the disk refuses is reported once and kept in memory until there is room; the run goes on.
"""

import json
import os
import pathlib
import struct
import time
from typing import Any

from absl import logging
from tensorboardX import summary
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c


class _File:
    """Appends whole records, each handed to the system at once: a killed process loses none."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self._descriptor: int | None = None
        self._size = path.stat().st_size if path.exists() else 0
        self._waiting: list[bytes] = []
        self._reported = False

    def append(self, record: bytes) -> None:
        self._waiting.append(record)
        content = b"".join(self._waiting)
        try:
            if self._descriptor is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
                self._descriptor = os.open(self.path, flags, 0o644)
            written = os.write(self._descriptor, content)
            if written != len(content):
                raise OSError(f"no room for {len(content) - written} of {len(content)} bytes")
        except OSError as error:
            if self._descriptor is not None:
                os.ftruncate(self._descriptor, self._size)
            if not self._reported:
                logging.error(
                    "%s cannot be written: %s. Records are kept until they can", self.path, error
                )
            self._reported = True
            return
        if self._reported:
            logging.info("%s can be written again", self.path)
        self._size += len(content)
        self._waiting, self._reported = [], False

    def close(self) -> None:
        if self._waiting:
            self.append(b"")
        if self._waiting:
            logging.error("%s lacks the last %d records", self.path, len(self._waiting) - 1)
        if self._descriptor is not None:
            os.close(self._descriptor)


class JsonLines(_File):
    """One JSON object a line, each with its "step"."""

    def __init__(self, path: pathlib.Path, *, start_step: int) -> None:
        """Drops records beyond `start_step`, which will be made again, and what is no record.

        A process that was killed may have left a part of a line.
        """
        content = path.read_bytes() if path.exists() else b""
        lines = [line for line in content.split(b"\n") if _is_record(line, start_step)]
        kept = b"".join(line + b"\n" for line in lines)
        if content.startswith(kept):  # needs no room on the disk
            if kept != content:
                os.truncate(path, len(kept))
        else:
            part = path.with_suffix(".part")
            part.write_bytes(kept)
            os.replace(part, path)
        super().__init__(path)

    def add(self, record: dict[str, Any]) -> None:
        self.append(json.dumps(record).encode() + b"\n")


def _is_record(line: bytes, last_step: int) -> bool:
    try:
        return json.loads(line)["step"] <= last_step
    except (ValueError, LookupError, TypeError):
        return False


class EventFile(_File):
    """Scalars for TensorBoard.

    tensorboardX's own writer keeps them in a thread for up to two minutes, which a killed process
    loses; and a full disk ends that thread, after which its queue fills and stops the run.
    """

    def __init__(self, directory: pathlib.Path, *, start_step: int) -> None:
        """A new file, which hides what lies beyond `start_step` in earlier ones."""
        super().__init__(directory / f"events.out.tfevents.{time.time_ns()}")
        self._append(file_version="brain.Event:2")
        log = event_pb2.SessionLog  # pyrefly: ignore
        start = log(status=log.START)
        self._append(step=start_step + 1, session_log=start)

    def add(self, step: int, values: dict[str, float]) -> None:
        """Scalars of a step by their names."""
        parts = [summary.scalar(name, value) for name, value in values.items()]
        whole = type(parts[0])(value=[value for part in parts for value in part.value])
        self._append(step=step, summary=whole)

    def _append(self, **fields: Any) -> None:
        event = event_pb2.Event(wall_time=time.time(), **fields)  # pyrefly: ignore
        data = event.SerializeToString()
        header = struct.pack("<Q", len(data))
        checks = [struct.pack("<I", masked_crc32c(x)) for x in (header, data)]
        self.append(header + checks[0] + data + checks[1])
