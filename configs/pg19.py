"""Any preset on PG-19, books published before 1919 (arXiv 1911.05507), from TensorFlow Datasets.

    tfds build pg19 --file_format=array_record --data_dir=DIR
    python train.py --config configs/pg19.py:bmojo,130m --workdir runs/pg19-130m \\
        --config.data.path=DIR --config.data.tokenizer=tokenizer.json

Purpose: language modelling of long documents, whole books in rows of 8,192 tokens. `:FAMILY,SIZE`
names a preset of `bmojo_jax/presets.py`. The tokenizer is any tokenizer.json or *.model of at most
32,768 words, or "bytes"; `python -m bmojo_jax.data.train_tokenizer` makes one of a folder of text.

Data: by TFDS's catalogue 28,602 books to train on, 50 to validate on and 100 to test on, 10.94 GiB.
The first command is TFDS's own; it needs TensorFlow and the network, on any machine, and DIR can
then be copied. Training needs neither.

Hardware, time: as for `configs/lm.py`, from which rates and micro-batches are; a run is 1.3e9
tokens. Only the settings are tested: this has not been run on PG-19, and there is no result yet.
"""

import dataclasses

from bmojo_jax import presets
from bmojo_jax.config import DataConfig, OptimConfig, TrainConfig
from bmojo_jax.settings import to_config_dict
from configs.lm import ACCUMULATE, PEAK_RATES

ROWS = 16  # of a batch of 131,072 tokens


def get_config(preset: str = "bmojo,130m"):
    family, _, size = preset.partition(",")
    model = presets.model(family, size, vocab_size=32_768)  # pyrefly: ignore[bad-argument-type]
    return to_config_dict(
        TrainConfig(
            model=dataclasses.replace(model, compute_dtype="bfloat16", remat="dots"),
            optim=OptimConfig(
                learning_rate=PEAK_RATES[size],
                warmup_steps=500,
                accumulate=min(ACCUMULATE.get(size, 1), ROWS),
            ),
            data=DataConfig(
                source="tfds",
                name="pg19",
                text_field="book_text",
                sequence_length=8192,
                batch_size=ROWS,
            ),
            steps=10_000,
            eval_every=500,
            eval_batches=32,
            checkpoint_every=500,
        )
    )
