"""Small models that several test files build: every family, every border crossed at L = 40."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from bmojo_jax import model
from bmojo_jax.config import ModelConfig

SMALL = ModelConfig(
    vocab_size=31,
    width=16,
    depth=2,
    num_heads=2,
    num_kv_heads=1,
    head_width=8,
    window=5,
    fading_window=3,
    eidetic_tokens=4,
    chunk=4,
    ssm_state=4,
    mlp_width=32,
    compute_dtype="float64",
)

# Every mixer alone, and patterns that mix them, with and without MLP.
FAMILIES = {
    "transformer": {"pattern": "attention+mlp"},
    "sliding_window": {"pattern": "swa+mlp"},
    "mamba": {"pattern": "mamba"},
    "hybrid": {"pattern": "mamba,swa"},
    "bmojo_f": {"pattern": "bmojo_f"},
    "bmojo": {"pattern": "bmojo"},
    "bmojo_mlp_mamba": {"pattern": "bmojo+mlp,mamba"},
    "bmojo_gate": {"eidetic_gate": True},
    "bmojo_original": {"eidetic_positions": "original"},
    "bmojo_none": {"eidetic_positions": "none"},
    "bmojo_untied": {"fading_projections": "untied"},
    "bmojo_innovation_of_input": {"innovation_of": "input"},
    "bmojo_newest": {"eidetic_selection": "newest"},
    "bmojo_random_fading": {
        "eidetic_selection": "random",
        "eidetic_content": "fading",
        "fading_window": 1,
        "chunk": 9,
    },
    "bmojo_memory_of_fading_alone": {"eidetic_content": "fading", "fading_window": 0},
    "bmojo_no_fading": {"fading_window": 0},
    "bmojo_long_chunk": {"chunk": 9, "window": 3, "fading_window": 6, "eidetic_tokens": 2},
    "bmojo_paper": {
        "ssm_norm": False,
        "fading_norm": False,
        "qk_norm": False,
        "ssm_residual": False,
    },
}


def small_config(**changes) -> ModelConfig:
    return dataclasses.replace(SMALL, **changes)


# Of parameters that are not drawn around zero, by their last names.
CENTRES = {"scale": 1.0, "skip": 1.0, "a_log": 0.8, "dt_proj.bias": -4.5}


def float64_params(config: ModelConfig, seed: int = 0):
    """Parameters about as a model starts with, none of them a one, a zero or a small number.

    Made by numpy: to compile what `init_params` does takes longer than most tests.
    """
    rng = np.random.default_rng(seed)

    def drawn(path, leaf):
        names = [entry.key for entry in path]
        centre = CENTRES.get(names[-1], CENTRES.get(".".join(names[-2:]), 0.0))
        return jnp.asarray(centre + 0.4 * rng.standard_normal(leaf.shape), jnp.float64)

    shapes = jax.eval_shape(lambda: model.init_params(config, jax.random.key(0)))
    return jax.tree_util.tree_map_with_path(drawn, shapes)


def packed_positions(length: int, *rows: tuple[int, ...]) -> np.ndarray:
    """Positions [B, L] of rows whose documents start at 0 and at the given indices."""
    positions = np.empty((len(rows), length), np.int32)
    for row, starts in enumerate(rows):
        borders = [0, *starts, length]
        for first, last in itertools.pairwise(borders):
            positions[row, first:last] = np.arange(last - first)
    return positions
