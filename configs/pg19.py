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

from bmojo_jax.config import DataConfig
from bmojo_jax.settings import to_config_dict
from configs import lm


def get_config(preset: str = "bmojo,130m"):
    data = DataConfig(
        source="tfds",
        name="pg19",
        text_field="book_text",
        sequence_length=8192,
        batch_size=16,
    )
    return to_config_dict(lm.settings(preset, data, vocab_size=32_768))
