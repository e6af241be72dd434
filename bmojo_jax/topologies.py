"""TPUs that are not here: libtpu describes them, so that programs can be compiled for them.

    devices = topologies.devices("v5e:16x16")        256 chips, 4 to a host
    with topologies.compiling_for(devices):
        jax.jit(f).trace(*abstract_arguments).lower(lowering_platforms=("tpu",)).compile()

libtpu needs no TPU for it (`make install-aot` installs it).
"""

import contextlib
import importlib.util
import os
from collections.abc import Iterator, Sequence

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh

_EXAMPLES = "v5e:2x2, v5e:16x16, v6e:8x8, v4:2x2x1 or v5p:4x4x4"


def devices(name: str) -> Sequence[jax.Device]:
    """The devices of a topology such as "v5e:16x16": generation and chips along each axis.

    Raises:
      ValueError: libtpu knows no such topology, or is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(f"topology={name!r} needs libtpu to be described: run `make install-aot`")
    # Nobody is asked which TPU this machine has, and several processes may compile at a time:
    # libtpu admits one alone unless told otherwise, for the sake of chips, which none touches.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        return topologies.get_topology_desc(name, platform="tpu").devices
    except jax.errors.JaxRuntimeError as error:
        if "INVALID_ARGUMENT" not in str(error):
            raise
        reason = str(error).splitlines()[0].removeprefix("INVALID_ARGUMENT: ")
        raise ValueError(f"topology={name!r} must be like {_EXAMPLES}: {reason}") from error


@contextlib.contextmanager
def compiling_for(devices: Sequence[jax.Device]) -> Iterator[None]:
    """What is traced inside chooses its kernels for these devices."""
    kind = AbstractDevice(devices[0].device_kind, None, platform="tpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=kind)):
        yield
