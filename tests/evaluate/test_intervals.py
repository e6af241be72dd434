import numpy as np
import pytest

from bmojo_jax.evaluate.intervals import interval


def test_interval_of_a_mean_is_that_of_the_normal_distribution(rng):
    values = rng.normal(3, 2, size=400)
    error = values.std() / 20
    low, high = interval(values)
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)


def test_interval_is_of_a_ratio_of_sums(rng):
    weights = rng.integers(1, 100, size=50)
    assert interval(1.5 * weights, weights) == pytest.approx((1.5, 1.5))
    values = weights * rng.normal(3, 2, size=50)
    low, high = interval(values, weights)
    assert low < values.sum() / weights.sum() < high
    assert interval(7 * values, 7 * weights) == pytest.approx((low, high))
    assert interval(values) != pytest.approx((low, high), rel=0.1)


def test_groups_without_weight_do_not_count(rng):
    values, weights = rng.normal(size=9), rng.uniform(1, 2, size=9)
    padded = interval(np.pad(values, 3), np.pad(weights, 3))
    assert padded == interval(values, weights)


def test_seeds():
    values = [1.0, 2.0, 4.0, 3.0, 9.0]
    assert interval(values, seed=1) == interval(values, seed=1) != interval(values, seed=2)
    assert interval([2.5]) == (2.5, 2.5)


@pytest.mark.parametrize(
    ("values", "weights", "message"),
    [
        ([], None, r"shape \(0,\).* at least one group"),
        ([1.0, 2.0], [1.0], r"values of shape \(2,\), weights of shape \(1,\): must be one"),
        ([1.0, 2.0], [1.0, -1.0], r"weights from -1.0 to 1.0: must be >= 0"),
        ([1.0, 2.0], [0.0, 0.0], "and one above"),
    ],
)
def test_wrong_groups(values, weights, message):
    with pytest.raises(ValueError, match=message):
        interval(values, weights)
