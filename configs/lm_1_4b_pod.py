"""B'MOJO of 1.4 billion parameters on a pod of TPUs, or a cluster of GPUs.

DOC
"""

import dataclasses

from bmojo_jax import presets
from bmojo_jax.config import DataConfig, MeshConfig, OptimConfig, TrainConfig
from bmojo_jax.settings import to_config_dict
from configs import lm


def get_config(family: str = "bmojo"):
    model = presets.model(family, "1_4b", head_width=128)  # pyrefly: ignore[bad-argument-type]
    return to_config_dict(
        TrainConfig(
            model=dataclasses.replace(model, compute_dtype="bfloat16", remat="dots"),
            optim=OptimConfig(learning_rate=lm.PEAK_RATES["1_4b"], warmup_steps=2000),
            data=DataConfig(
                source="tokens",
                sequence_length=2048,
                batch_size=1024,
                document_start="chunk",
                shards=64,
            ),
            mesh=MeshConfig(data=-1, fsdp=32),
            steps=50_000,
            eval_every=1000,
            eval_batches=8,
            checkpoint_every=500,
            keep_last=3,
        )
    )
