"""A small byte-level B'MOJO on text that every machine has: Python's standard library.

    make quickstart
    python train.py --config configs/quickstart.py --workdir runs/quickstart
    python train.py --config configs/quickstart.py --workdir runs/mine \\
        --config.data.path=DIR

Purpose: to see every part work within minutes on a CPU. Documents are files; whole files are held
out for validation. The folders of tests are left out: some machines lack them.
"""

import sysconfig

from bmojo_jax.config import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from bmojo_jax.settings import to_config_dict


def settings() -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(
            vocab_size=257,
            width=160,
            depth=4,
            pattern="bmojo",
            num_heads=4,
            num_kv_heads=4,
            head_width=40,
            window=48,
            eidetic_tokens=16,
            chunk=48,
        ),
        optim=OptimConfig(learning_rate=4e-3, warmup_steps=50),
        data=DataConfig(
            path=sysconfig.get_paths()["stdlib"],
            exclude=(
                *("site-packages", "dist-packages", "test", "tests", "idle_test"),
                *("__pycache__", "lib-dynload", ".git", ".venv", "node_modules"),
            ),
            validation_fraction=0.02,
            sequence_length=512,
            batch_size=4,
        ),
        steps=800,
        log_every=10,
        eval_every=200,
        eval_batches=0,
        checkpoint_every=200,
        sample_prompt="def ",
        sample_tokens=400,
        compare_with="zlib_and_bigram",
    )


def get_config():
    return to_config_dict(settings())
