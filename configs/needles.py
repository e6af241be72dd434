"""A small language model on a folder of text, with needle prompts mixed in by weight.

    python train.py --config configs/needles.py:DIR --workdir runs/needles
    python eval.py --workdir runs/needles --suite needles --variants single_1,single_2,multikey_2

Purpose: small models do not follow instructions, so what they can find again shows only if they
have seen such prompts. A fifth of the rows are prompts with their answers, as long as a row; the
essays that needles are hidden in are documents of the training split. The suite asks at half to
eight times that length, in held-out documents. `:DIR,FAMILY` names another family of
`bmojo_jax/presets.py`.

Hardware: one accelerator; a CPU takes hours. Not measured.
"""

import dataclasses

from bmojo_jax import presets
from bmojo_jax.config import DataConfig, OptimConfig, SourceConfig, TrainConfig
from bmojo_jax.settings import to_config_dict


def get_config(folder_and_family: str = ""):
    folder, _, family = folder_and_family.partition(",")
    model = presets.model(family or "bmojo", "tiny", vocab_size=257)  # pyrefly: ignore
    return to_config_dict(
        TrainConfig(
            model=dataclasses.replace(model, compute_dtype="bfloat16"),
            optim=OptimConfig(learning_rate=2e-3, warmup_steps=200),
            data=DataConfig(
                path=folder,
                mixed_in=(SourceConfig(source="needles", path=folder, weight=0.25),),
                sequence_length=1024,
                batch_size=64,
            ),
            steps=10_000,
            eval_every=500,
            eval_batches=32,
            checkpoint_every=500,
        )
    )
