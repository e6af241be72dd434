"""Which implementation of an operation runs: the only place that asks for the platform.

An operation's `api.py` hands over a table of its implementations, name to callable. A caller
names one (it runs or raises `Unsupported`) or passes None: then the platform's preference list
is walked, what refuses is passed over, and the choice is logged once with the reasons.

`Unsupported` is our own class on purpose. Pallas raises NotImplementedError for a kernel that
fails to lower, and a broken kernel must not be taken for an unsupported shape.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from absl import logging
from jax.sharding import AbstractDevice

# Fastest first. "reference" is never chosen by itself: it is the definition, not a way to run.
PREFERENCES: Mapping[str, tuple[str, ...]] = {
    "cpu": ("xla",),
    "gpu": ("pallas_mosaic_gpu", "pallas_triton", "xla"),
    "tpu": ("pallas_tpu", "xla"),
}


class Unsupported(ValueError):
    """An implementation cannot take these inputs; the message says which and why."""


def _target() -> AbstractDevice | None:
    """The device that the ambient mesh is made of, which may be one that is not here."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.abstract_device


def platform() -> str:
    """The platform that is traced for: "cpu", "gpu" or "tpu".

    The ambient mesh's (`jax.set_mesh`, `jax.sharding.use_abstract_mesh`), so that programs can be
    compiled for machines that are not here; without one that of the default devices.
    """
    target = _target()
    name = jax.default_backend() if target is None else target.platform
    return "gpu" if name in ("cuda", "rocm") else name


def device_kind() -> str:
    """The kind of that platform's devices, e.g. "NVIDIA H100 80GB HBM3"."""
    target = _target()
    return jax.devices()[0].device_kind if target is None else target.device_kind


def interpreted(wanted: str) -> bool:
    """Whether a kernel for platform `wanted` must run interpreted: on a CPU, for tests.

    Raises:
      Unsupported: traced for another accelerator.
    """
    here = platform()
    if here not in (wanted, "cpu"):
        raise Unsupported(f"its kernels are for {wanted}, and this is {here}")
    return here != wanted


@functools.cache
def _log_once(message: str) -> None:
    logging.info(message)


def preferred(implementations: Mapping[str, Any]) -> list[str]:
    """Those of an operation's implementations that are made for the platform, fastest first."""
    return [name for name in PREFERENCES.get(platform(), ("xla",)) if name in implementations]


def run(
    op: str,
    implementations: Mapping[str, Callable[..., Any]],
    implementation: str | None,
    /,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Calls the named implementation of `op`, or the first preferred one that takes the inputs.

    Raises:
      ValueError: the name is of no implementation.
      Unsupported: the named implementation, or every preferred one, refuses the inputs.
    """
    if implementation is not None:
        if implementation not in implementations:
            raise ValueError(
                f"{op}: {implementation=} is not one of {sorted(implementations)} (or None)"
            )
        return implementations[implementation](*args, **kwargs)
    refusals: list[str] = []
    for name in preferred(implementations):
        try:
            result = implementations[name](*args, **kwargs)
        except Unsupported as error:
            refusals.append(f"{name}: {error}")
            continue
        because = f" ({'; '.join(refusals)})" if refusals else ""
        _log_once(f"{op} runs as {name} on {platform()}{because}")
        return result
    raise Unsupported(f"{op}: nothing takes these inputs on {platform()}: {'; '.join(refusals)}")
