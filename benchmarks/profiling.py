"""What ran on the device, from JAX's profiler: operations, their durations, what they belong to."""

import collections
import glob
import gzip
import json
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

# What is looked for in where an operation is from, and in its own name, in this order; the first
# that is there names the part.
PARTS: Mapping[str, Sequence[str]] = {
    "optimizer": ("optimizer",),
    "loss": ("cross_entropy",),
    "scan": ("selective_scan",),
    "attention": ("memory_attention", "dot_product_attention"),
    "selection": ("remember", "innovation"),
    "convolution": ("causal_conv",),
    "matrix products": ("dot", "gemm", "cublas", "custom-call"),
}
REST, IDLE = "norms and other elementwise", "idle"


def kernels(run: Callable[[], Any]) -> list[tuple[str, float]]:
    """Operation of the compiled program and seconds of everything that `run()` has the device do,
    in order.

    It returns what to wait for. Where the backend's trace has no such events: an empty list."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        (path,) = glob.glob(f"{folder}/**/*.trace.json.gz", recursive=True)
        with gzip.open(path) as file:
            events = json.load(file)["traceEvents"]
    events.sort(key=lambda event: event.get("ts", 0))
    return [
        (event["args"]["hlo_op"], event["dur"] / 1e6)
        for event in events
        if event.get("ph") == "X" and "hlo_op" in event.get("args", {})
    ]


def operation_names(text: str) -> dict[str, str]:
    """Of each instruction of a compiled program, where in the model it is from."""
    found = re.findall(r"%?([\w.-]+) = [^\n]*?metadata=\{[^}]*?op_name=\"([^\"]*)\"", text)
    return dict(found)


def by_part(
    kernels: Iterable[tuple[str, float]], names: Mapping[str, str], step: float
) -> dict[str, float]:
    """Seconds of a step by part, those beyond all kernels as `IDLE`."""
    seconds: dict[str, float] = collections.defaultdict(float)
    for operation, duration in kernels:
        name = f"{names.get(operation, '')} {operation}"
        part = next((p for p, marks in PARTS.items() if any(m in name for m in marks)), REST)
        seconds[part] += duration
    idle = step - sum(seconds.values())
    order = [*PARTS, REST]
    return {part: seconds[part] for part in order if part in seconds} | {IDLE: max(idle, 0.0)}


def longest(
    kernels: Iterable[tuple[str, float]], names: Mapping[str, str], count: int = 30
) -> list[list[Any]]:
    """Seconds of a step, operation, and where it is from, of those that take longest."""
    seconds: dict[str, float] = collections.defaultdict(float)
    for operation, duration in kernels:
        seconds[operation] += duration
    order = sorted(seconds, key=lambda operation: -seconds[operation])[:count]
    return [[seconds[operation], operation, names.get(operation, "")] for operation in order]
