"""Any preset on C4, cleaned English web pages (arXiv 1910.10683), from TensorFlow Datasets.

    tfds build c4/en --file_format=array_record --data_dir=DIR
    python train.py --config configs/c4.py:bmojo,130m --workdir runs/c4-130m \\
        --config.data.path=DIR --config.data.tokenizer=tokenizer.json

Purpose: language modelling of general text at scale. `:FAMILY,SIZE` names a preset of
`bmojo_jax/presets.py`. The tokenizer is any tokenizer.json or *.model of at most 32,768 words;
`python -m bmojo_jax.data.train_tokenizer` makes one of a folder of text.

Data: by TFDS's catalogue some 365 million documents to train on and 364,608 to validate on, 807 GiB
(c4/realnewslike, 37 GiB, is a smaller one: `--config.data.name=c4/realnewslike`). TFDS recommends
to run the first command, which needs TensorFlow, Apache Beam and the network, on a cluster. Whoever
has C4 in TFDS's older format converts it: `tfds convert_format --help`. Training needs none of
that. `python -m bmojo_jax.data.tokenize --config configs/c4.py:bmojo,130m ...` tokenizes it
beforehand, for runs that would be slowed down by it.

Hardware, time: as for `configs/lm.py`, from which rates and micro-batches are; a run is 1.3e9
tokens. Only the settings are tested: this has not been run on C4, and there is no result yet.
"""

from bmojo_jax.config import DataConfig
from bmojo_jax.settings import to_config_dict
from configs import lm


def get_config(preset: str = "bmojo,130m"):
    data = DataConfig(source="tfds", name="c4/en", sequence_length=2048, batch_size=64)
    return to_config_dict(lm.settings(preset, data, vocab_size=32_768))
