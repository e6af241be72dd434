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

# Fastest first. "reference" is never chosen by itself: it is the definition, not a way to run.
PREFERENCES: Mapping[str, tuple[str, ...]] = {
    "cpu": ("xla",),
    "gpu": ("xla",),
    "tpu": ("xla",),
}


class Unsupported(ValueError):
    """An implementation cannot take these inputs; the message says which and why."""


def platform() -> str:
    """The platform that arrays live on by default: "cpu", "gpu" or "tpu"."""
    name = jax.default_backend()
    return "gpu" if name in ("cuda", "rocm") else name


def device_kind() -> str:
    """The default device's kind, e.g. "NVIDIA H100 80GB HBM3": the key of tuned block sizes."""
    return jax.devices()[0].device_kind


@functools.cache
def _log_once(message: str) -> None:
    logging.info(message)


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
    for name in PREFERENCES.get(platform(), ("xla",)):
        if name not in implementations:
            continue
        try:
            result = implementations[name](*args, **kwargs)
        except Unsupported as error:
            refusals.append(f"{name}: {error}")
            continue
        because = f" ({'; '.join(refusals)})" if refusals else ""
        _log_once(f"{op} runs as {name} on {platform()}{because}")
        return result
    raise Unsupported(f"{op}: nothing takes these inputs on {platform()}: {'; '.join(refusals)}")
