"""Single steps of training: batches of packed documents, programs on meshes."""

import jax
import numpy as np

from bmojo_jax import sharding, trainer
from bmojo_jax.config import MeshConfig
from bmojo_jax.data.tokenizers import ByteTokenizer
from tests.models import packed_positions

FAMILIES = {
    "transformer": "attention+mlp",
    "mamba": "mamba",
    "hybrid": "mamba,swa",
    "bmojo_f": "bmojo_f",
    "bmojo": "bmojo",
}


def packed_batch(rows=8, length=12, seed=0):
    """Packed documents; rows have from none to all of their targets."""
    rng = np.random.default_rng(seed)
    starts = [tuple(np.sort(rng.choice(np.arange(1, length), i % 3, False))) for i in range(rows)]
    weights_BL = (np.arange(length)[None] < rng.integers(0, length + 1, (rows, 1))).astype("f")
    return {
        "inputs": rng.integers(0, 257, (rows, length)).astype(np.int32),
        "targets": rng.integers(0, 257, (rows, length)).astype(np.int32),
        "weights": weights_BL,
        "positions": packed_positions(length, *starts),
    }


def on_mesh(config, **mesh):
    devices = None if mesh else jax.devices()[:1]
    return trainer.make_program(
        config, sharding.make_mesh(MeshConfig(**mesh), devices), ByteTokenizer()
    )


def take_step(program, state, batch):
    with jax.set_mesh(program.mesh):
        state = jax.device_put(state, program.state_shardings)
        return program.step(state, sharding.place_batch(batch, program.mesh))


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)
