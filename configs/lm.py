"""Any preset as a byte-level language model on a folder of text.

    python train.py --config configs/lm.py:bmojo,130m --workdir runs/bmojo-130m \\
        --config.data.path=DIR

Purpose: comparisons at equal size. `:FAMILY,SIZE` names a preset of `bmojo_jax/presets.py`; the
vocabulary is that of bytes, so a model has fewer parameters than the size's name says. Peak rates
by size are those of GPT-3 (arXiv 2005.14165, table 2.1).

Hardware: one accelerator of 80 GB, by an estimate of what a micro-batch keeps for its backward
pass; not measured above 130m. All devices are used, batch and parameters cut over them by
`--config.mesh.*`. Time: `results/train_steps` has tokens/s by size; a run is 1.3e9 tokens.
"""

import dataclasses

from bmojo_jax import presets
from bmojo_jax.config import DataConfig, OptimConfig, TrainConfig
from bmojo_jax.settings import to_config_dict

# Micro-batches of a batch of 131,072 tokens.
ACCUMULATE = {"370m": 4, "790m": 8, "1_4b": 16, "3b": 32}
PEAK_RATES = {
    "tiny": 2e-3,
    "30m": 1e-3,
    "130m": 6e-4,
    "370m": 3e-4,
    "790m": 2.5e-4,
    "1_4b": 2e-4,
    "3b": 1.6e-4,
}


def settings(preset: str, data: DataConfig, *, vocab_size: int) -> TrainConfig:
    """The recipe of every run on text: 10,000 batches of 131,072 tokens."""
    family, _, size = preset.partition(",")
    model = presets.model(family, size, vocab_size=vocab_size)  # pyrefly: ignore[bad-argument-type]
    return TrainConfig(
        model=dataclasses.replace(model, compute_dtype="bfloat16", remat="dots"),
        optim=OptimConfig(
            learning_rate=PEAK_RATES[size],
            warmup_steps=500,
            accumulate=min(ACCUMULATE.get(size, 1), data.batch_size),
        ),
        data=data,
        steps=10_000,
        eval_every=500,
        eval_batches=32,
        checkpoint_every=500,
    )


def get_config(preset: str = "bmojo,130m"):
    run = settings(preset, DataConfig(sequence_length=2048, batch_size=64), vocab_size=257)
    return to_config_dict(dataclasses.replace(run, sample_tokens=400))
