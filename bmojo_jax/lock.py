"""One run at a time in a work directory.

The file `lock` is locked with flock, which the system gives up with the process, however that
ends; the file itself means nothing. It holds who has it, for the message to the one who has not.
"""

import contextlib
import fcntl
import os
import pathlib
import socket
from collections.abc import Generator

import jax

from bmojo_jax import processes

_NAME = "lock"


@contextlib.contextmanager
def hold(workdir: pathlib.Path) -> Generator[None]:
    """Holds the lock of a directory, which must exist; of several processes, the first does.

    Raises:
      ValueError: another run has it.
    """
    path = workdir / _NAME
    descriptor, problem = None, None
    if jax.process_index() == 0:
        try:
            descriptor = _take(path)
        except ValueError as error:
            problem = str(error)
    if problem := processes.first_says(lambda: problem):
        raise ValueError(problem)
    try:
        yield
    finally:
        if descriptor is not None:
            # Removed while it is still held, so that nobody else's is.
            with contextlib.suppress(OSError):
                path.unlink()
            os.close(descriptor)


def _take(path: pathlib.Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(descriptor, 200).decode(errors="replace").strip()
            os.close(descriptor)
            raise ValueError(
                f"workdir={str(path.parent)!r}: must not be in use by another run "
                f"({holder or 'one that is starting'} writes there)"
            ) from error
        except BaseException:
            os.close(descriptor)
            raise
        # Whoever had it may have removed the name between opening and locking.
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(descriptor).st_ino == path.stat().st_ino:
                with contextlib.suppress(OSError):  # a full disk: then nobody is named
                    os.ftruncate(descriptor, 0)
                    os.write(
                        descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode()
                    )
                return descriptor
        os.close(descriptor)
