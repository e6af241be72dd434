"""Sources of documents by the settings that name them: random access, split into two parts.

What a source yields is described in `documents.py`; each kind has a module of its own.
"""

import functools

from absl import logging

from bmojo_jax.config import DataConfig, SourceConfig
from bmojo_jax.data.documents import Source, Split


def open_source(data: DataConfig, split: Split) -> Source:
    """The documents of a split of the main source.

    Raises:
      ValueError: there are none, or too few that can be used; names the setting.
    """
    return _open(data, data, split)


def open_mixed_in(data: DataConfig) -> list[Source]:
    """The sources of `data.mixed_in`, for training."""
    return [_open(source, data, "train") for source in data.mixed_in]


def read_split(data: DataConfig, split: Split) -> list[bytes]:
    """All text of a split that can be used, e.g. for baselines on what a model is tested on.

    Raises:
      ValueError: there is none, e.g. as the documents are tokens.
    """
    source = open_source(data, split)
    documents = (source[index] for index in range(len(source)))
    texts = [document for document in documents if isinstance(document, bytes)]
    if not texts:
        raise ValueError(
            f"data.source={data.source!r}: must hold text for {split} that can be used"
        )
    return texts


def prefix(source: SourceConfig, data: DataConfig) -> str:
    """What the names of a source's settings begin with, for messages."""
    if isinstance(source, DataConfig):
        return "data."
    return f"data.mixed_in[{data.mixed_in.index(source)}]."


@functools.cache
def log_once(message: str) -> None:
    """A run opens its sources more than once."""
    logging.info(message)


def _open(source: SourceConfig, data: DataConfig, split: Split) -> Source:
    match source.source:
        case "text":
            from bmojo_jax.data import text

            return text.open_text(source, data, split)
        case "tfds":
            from bmojo_jax.data import tfds

            return tfds.open_tfds(source, data, split)
        case "tokens":
            from bmojo_jax.data import tokens

            return tokens.open_tokens(source, data, split)
        case "needles":
            from bmojo_jax.data.tasks import needles

            return needles.open_needles(source, data, split)
