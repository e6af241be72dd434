"""A small byte-level B'MOJO on text that every machine has: Python's standard library.

    make quickstart
    python train.py --config configs/quickstart.py --workdir runs/quickstart
    python train.py --config configs/quickstart.py --workdir runs/mine \\
        --config.data.path=DIR --config.data.include='**/*.txt'

Purpose: to see every part work within minutes on a CPU. Documents are files; whole files are held
out for validation. The folders of tests are left out: some machines lack them.
"""

import sysconfig

from bmojo_jax.config import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    to_config_dict,
)


def get_config():
    return to_config_dict(
        TrainConfig(
            model=ModelConfig(
                vocab_size=257,
                width=192,
                depth=4,
                pattern="bmojo",
                num_heads=4,
                num_kv_heads=4,
                head_width=48,
                window=64,
                eidetic_tokens=16,
                chunk=64,
            ),
            optim=OptimConfig(learning_rate=4e-3, warmup_steps=50),
            data=DataConfig(
                path=sysconfig.get_paths()["stdlib"],
                include="**/*.py",
                exclude=("site-packages", "dist-packages", "test", "tests", "idle_test"),
                validation_fraction=0.02,
                sequence_length=512,
                batch_size=8,
            ),
            steps=600,
            log_every=10,
            eval_every=200,
            eval_batches=0,
            checkpoint_every=200,
            sample_prompt="def ",
            sample_tokens=400,
            compare_with="zlib_and_bigram",
        )
    )
