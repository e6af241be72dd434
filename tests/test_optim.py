import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bmojo_jax import optim as optim_lib
from bmojo_jax import paths
from bmojo_jax.config import OptimConfig

PARAMS = {
    "embedding": {"table": (5, 4)},
    "norm": {"scale": (4,)},
    "groups": {
        "0": {
            "norm": {"scale": (2, 4)},
            "mixer": {
                "ssm": {
                    "in_proj": {"kernel": (2, 4, 2, 8)},
                    "conv": {"kernel": (2, 4, 8), "bias": (2, 8)},
                    "dt_proj": {"kernel": (2, 1, 8), "bias": (2, 8)},
                    "a_log": (2, 8, 3),
                    "skip": (2, 8),
                },
                "attention": {"q_proj": {"kernel": (2, 4, 2, 2)}, "eidetic_gate": (2, 2)},
            },
        }
    },
}
DECAYING = {
    "embedding/table",
    "groups/0/mixer/ssm/in_proj/kernel",
    "groups/0/mixer/ssm/dt_proj/kernel",
    "groups/0/mixer/attention/q_proj/kernel",
}


def _params(seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
        PARAMS,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def test_paths_of_nested_containers():
    tree = {"groups": ({"kernel": 1}, {"kernel": 2}), "norm": 3}
    assert paths.flatten_paths(tree) == {
        "groups/0/kernel": 1,
        "groups/1/kernel": 2,
        "norm": 3,
    }


def test_only_match_refuses_none_and_several():
    rules = ((r"a/.*", 1), (r".*/b", 2))
    assert paths.only_match(rules, "a/c") == 1
    with pytest.raises(ValueError, match="'a/b' must match exactly one rule"):
        paths.only_match(rules, "a/b")
    with pytest.raises(ValueError, match="'c/d' must match exactly one rule"):
        paths.only_match(rules, "c/d")


def test_decay_only_of_matrices():
    mask = paths.flatten_paths(optim_lib.decay_mask(_params()))
    assert {path for path, decays in mask.items() if decays} == DECAYING


def test_unknown_parameter_is_an_error():
    with pytest.raises(ValueError, match="'groups/0/surprise'"):
        optim_lib.make_optimizer(OptimConfig(), 200, {"groups": {"0": {"surprise": jnp.ones(3)}}})


def _reference_update(p, g, m, v, n, rate, optim, decays, norm):
    g = g * min(1.0, optim.clip_norm / norm)
    m = optim.beta1 * m + (1 - optim.beta1) * g
    v = optim.beta2 * v + (1 - optim.beta2) * g * g
    step = m / (1 - optim.beta1**n) / (np.sqrt(v / (1 - optim.beta2**n)) + optim.eps)
    return p - rate * (step + optim.weight_decay * p * decays), m, v


def test_update_equals_the_formula():
    optim = OptimConfig(warmup_steps=2, clip_norm=0.5)
    params = _params()
    optimizer = optim_lib.make_optimizer(optim, 10, params)
    schedule = optim_lib.make_schedule(optim, 10)
    state = optimizer.init(params)
    expected = {path: np.asarray(p, np.float64) for path, p in paths.flatten_paths(params).items()}
    first = dict.fromkeys(expected, 0.0)
    second = dict.fromkeys(expected, 0.0)
    for n in range(1, 4):
        grads = _params(seed=n)
        flat = {path: np.asarray(g, np.float64) for path, g in paths.flatten_paths(grads).items()}
        norm = np.sqrt(sum((g * g).sum() for g in flat.values()))
        updates, state = jax.jit(optimizer.update)(grads, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        for path, g in flat.items():
            expected[path], first[path], second[path] = _reference_update(
                expected[path],
                g,
                first[path],
                second[path],
                n,
                float(schedule(n - 1)),
                optim,
                path in DECAYING,
                norm,
            )
    for path, p in paths.flatten_paths(params).items():
        error = np.sqrt(np.mean((p - expected[path]) ** 2) / np.mean(expected[path] ** 2))
        assert error < 1e-6, path


def test_updates_are_linear_in_the_rate():
    params, grads = _params(), _params(1)
    updates = []
    for rate in (1.0, 0.25):
        optimizer = optim_lib.make_optimizer(OptimConfig(learning_rate=rate), 200, params)
        updates.append(optimizer.update(grads, optimizer.init(params), params)[0])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(0.25 * a, b, rtol=1e-6), updates[0], updates[1]
    )


def _rates(optim, steps):
    schedule = optim_lib.make_schedule(optim, steps)
    return np.array([float(schedule(n)) for n in range(steps)])


def test_warmup_cosine():
    optim = OptimConfig(learning_rate=2.0, warmup_steps=4, final_fraction=0.1)
    rates = _rates(optim, 20)
    np.testing.assert_allclose(rates[:4], [0.5, 1.0, 1.5, 2.0], rtol=1e-6)
    share = np.arange(1, 17) / 16
    expected = 2.0 * (0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * share)))
    np.testing.assert_allclose(rates[4:], expected, rtol=1e-5)


def test_warmup_stable_decay():
    optim = OptimConfig(
        schedule="warmup_stable_decay",
        learning_rate=1.0,
        warmup_steps=2,
        decay_fraction=0.4,
        final_fraction=0.2,
    )
    expected = [0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]
    np.testing.assert_allclose(_rates(optim, 10), expected, rtol=1e-6)


@pytest.mark.parametrize("schedule", ["warmup_cosine", "warmup_stable_decay"])
@pytest.mark.parametrize("warmup", [0, 1, 8])
def test_schedules_at_their_borders(schedule, warmup):
    optim = OptimConfig(schedule=schedule, warmup_steps=warmup, decay_fraction=0.0)
    rates = _rates(optim, 8)
    assert np.all(rates > 0) and np.all(rates <= optim.learning_rate * (1 + 1e-6))


def test_decay_that_does_not_fit_names_the_field():
    optim = OptimConfig(schedule="warmup_stable_decay", warmup_steps=60, decay_fraction=0.5)
    with pytest.raises(ValueError, match=r"optim\.decay_fraction=0\.5 must be at most 0\.4"):
        optim_lib.make_schedule(optim, 100)
