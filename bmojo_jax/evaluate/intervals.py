"""Confidence intervals of 95 %.

By the bootstrap, groups, e.g. documents, are drawn again with replacement:

    estimate    sum_g values_g / sum_g weights_g        with weights 1: the mean
    interval    the 2.5 % and 97.5 % quantiles of that ratio over draws of as many groups

Groups are what is independent: tokens of one document are not. A difference of two measurements
on the same groups is paired: the interval of its values, not of two intervals.

Where all items are right, or all wrong, draws of them say nothing: for shares there is Wilson's.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

_DRAWS = 2000
_QUANTILES = (0.025, 0.975)
_Z = 1.96  # as many deviations of a normal distribution as hold 95 % of it


def interval(
    values: ArrayLike | Sequence[float], weights: ArrayLike | None = None, seed: int = 0
) -> tuple[float, float]:
    """The 95 % interval of sum(values) / sum(weights) over groups.

    Args:
      values: of each group, e.g. the summed nll of a document.
      weights: of each group, e.g. its targets; None: 1 each.

    Returns:
      The lower and the upper end. They coincide for a single group, which says nothing of the
      spread: give the number of groups beside them.

    Raises:
      ValueError: no groups, not one weight for each value, a weight below 0 or none above.
    """
    values_G = np.asarray(values, np.float64)
    weights_G = np.ones_like(values_G) if weights is None else np.asarray(weights, np.float64)
    if values_G.ndim != 1 or values_G.size == 0 or weights_G.shape != values_G.shape:
        raise ValueError(
            f"values of shape {values_G.shape}, weights of shape {weights_G.shape}: must be one "
            "number of each for every group, and at least one group"
        )
    if weights_G.min() < 0 or weights_G.max() == 0:
        raise ValueError(
            f"weights from {weights_G.min()} to {weights_G.max()}: must be >= 0, and one above"
        )
    # Groups without weight have nothing to say, and a draw of only such would be 0 / 0.
    values_G, weights_G = values_G[weights_G > 0], weights_G[weights_G > 0]
    random = np.random.default_rng(seed)
    # One draw at a time: items may be thousands.
    ratios = np.empty(_DRAWS)
    for i in range(_DRAWS):
        chosen = random.integers(len(values_G), size=len(values_G))
        ratios[i] = values_G[chosen].sum() / weights_G[chosen].sum()
    low, high = np.quantile(ratios, _QUANTILES)
    return float(low), float(high)


def share_interval(mean: float, items: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of independent items.

    For scores between 0 and 1 that are not all one or the other it is wider than need be.
    """
    spread = _Z**2 / items
    centre = (mean + spread / 2) / (1 + spread)
    half = math.sqrt(spread * (mean * (1 - mean) + spread / 4)) / (1 + spread)
    return max(centre - half, 0.0), min(centre + half, 1.0)
