"""Block sizes of an implementation: argument, else tuned for the device, else a heuristic.

`tuned.json` holds measured choices: {device kind: {"op/implementation": {case: {name: size}}}},
where a case is the text that `case_key` makes of shapes and dtype. Results never depend on block
sizes, only the time does.
"""

import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from pallas_kernels import dispatch

TUNED_FILE = pathlib.Path(__file__).with_name("tuned.json")


@functools.cache
def _tuned() -> Mapping[str, Any]:
    return json.loads(TUNED_FILE.read_text())


def case_key(shape: Mapping[str, int], dtype: Any) -> str:
    """The key of one case in tuned.json, e.g. "B8 E4096 L2048 bfloat16"."""
    dims = " ".join(f"{letter}{size}" for letter, size in sorted(shape.items()))
    return f"{dims} {dtype}"


def choose(
    op: str,
    *,
    shape: Mapping[str, int],
    dtype: Any,
    heuristic: Mapping[str, int],
    override: Mapping[str, int] | None,
) -> dict[str, int]:
    """Block sizes for `op` ("operation/implementation").

    Args:
      shape: dimension letter to size, as in the dimension key.
      heuristic: every block size that the implementation has, by name, with its default.
      override: sizes that the caller insists on; the rest is filled in.

    Raises:
      ValueError: `override` names a block size that the implementation does not have, or a size
        that is not a positive integer.
    """
    override = dict(override or {})
    for name, size in override.items():
        if name not in heuristic:
            raise ValueError(f"{op}: blocks has {name!r}; it takes {sorted(heuristic)}")
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{op}: blocks[{name!r}]={size!r} must be a positive integer")
    tuned = _tuned().get(dispatch.device_kind(), {}).get(op, {}).get(case_key(shape, dtype), {})
    return {**heuristic, **tuned, **override}
