"""How far an implementation may be from the reference, one number per dtype."""

from collections.abc import Mapping
from typing import Any

import numpy as np

# Relative root mean square error of one named tensor.
TOLERANCE: Mapping[str, float] = {
    # Sums of up to thousands of terms in another order: some 1e3 roundings of 1e-16.
    "float64": 1e-11,
    # The same in float32 (rounding 6e-8), and exponentials that differ in their last bits
    # between libraries, raised along the sequence.
    "float32": 1e-5,
    # Compared with the reference on the same bfloat16 values computed in float32: what remains
    # is the rounding of the result (2^-9 at most, 1.7e-3 rms) and, where an operand of a matrix
    # product is rounded on the way, a few more of the same size.
    "bfloat16": 6e-3,
}


def relative_rms(got: Any, want: Any) -> float:
    """|got - want| / |want| in the Euclidean norm; of two zero tensors 0."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if got.shape != want.shape:
        raise ValueError(f"{got.shape=} differs from {want.shape=}")
    error, size = float(np.linalg.norm(got - want)), float(np.linalg.norm(want))
    return error / size if size else (0.0 if error == 0 else float("inf"))
