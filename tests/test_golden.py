"""The first losses of a tiny run from numpy-seeded data, as text: nothing drifts unnoticed.

A change that is meant to move them rewrites the file: python -m tests.test_golden
"""

import json
import pathlib

import jax
import numpy as np

from bmojo_jax import sharding, trainer
from bmojo_jax.config import DataConfig, MeshConfig, ModelConfig, OptimConfig, TrainConfig
from bmojo_jax.data.tokenizers import ByteTokenizer

FILE = pathlib.Path(__file__).parent / "golden" / "first_losses.json"
STEPS = 6


def first_losses() -> list[float]:
    config = TrainConfig(
        model=ModelConfig(
            vocab_size=257,
            width=32,
            depth=2,
            num_heads=2,
            num_kv_heads=1,
            head_width=16,
            window=8,
            eidetic_tokens=4,
            chunk=8,
            ssm_state=4,
        ),
        optim=OptimConfig(learning_rate=1e-2, warmup_steps=2),
        data=DataConfig(sequence_length=64, batch_size=2),
        steps=STEPS,
    )
    rng = np.random.default_rng(0)
    inputs = rng.integers(0, 16, size=(2, 64), dtype=np.int32)
    batch = {
        "inputs": inputs,
        "targets": np.roll(inputs, -1, axis=1),
        "weights": np.ones((2, 64), np.float32),
        "segment_ids": np.repeat([[1, 2], [1, 2]], 32, axis=1).astype(np.int32),
        "positions": np.tile(np.arange(32, dtype=np.int32), (2, 2)),
    }
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    program = trainer.make_program(config, mesh, ByteTokenizer())
    losses = []
    with jax.set_mesh(mesh):
        state = program.init()
        for _ in range(STEPS):
            state, measured = program.step(state, sharding.place_batch(batch, mesh))
            losses.append(float(measured["loss"]))
    return losses


def test_first_losses_are_golden():
    losses = first_losses()
    # Rounding differs between processors; a different computation differs by far more.
    np.testing.assert_allclose(losses, json.loads(FILE.read_text()), rtol=1e-3)
    assert losses[-1] < losses[0] - 0.5


if __name__ == "__main__":
    FILE.write_text(json.dumps(first_losses(), indent=2) + "\n")
