"""Datasets of TensorFlow Datasets as documents, without TensorFlow.

A dataset is read as by `tfds.data_source`, from what was prepared on disk in the format
array_record, and from that alone: the code that made it is not needed, and nothing is downloaded.
Splits are in TFDS's own syntax, e.g. "train[:90%]". Documents are not cut, however long.
"""

import hashlib
import json
import os
from typing import Any, SupportsIndex

import numpy as np
import tensorflow_datasets as tfds

from bmojo_jax.config import DataConfig, SourceConfig
from bmojo_jax.data import sources
from bmojo_jax.data.documents import BadDocument, Split
from bmojo_jax.data.text import checked

# Of a split: file, number of its first record, number behind its last.
_Ranges = list[tuple[str, int, int]]


class TfdsDocuments:
    """A text feature of a split: a `documents.Source` of bytes and BadDocuments."""

    def __init__(self, builder: Any, split: str, *, text_field: str, not_utf8: str) -> None:
        self._records = builder.as_data_source(
            split=split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
        )
        # Of all features only this one is decoded.
        self._features: Any = tfds.features.FeaturesDict(
            {text_field: builder.info.features[text_field]}
        )
        self._text_field = text_field
        self._not_utf8 = not_utf8
        self._name = f"{builder.info.full_name}/{split}"
        self._ranges = [
            (os.path.basename(file), *place) for file, *place in _ranges(builder, split)
        ]
        self._sizes = {name: info.num_bytes for name, info in sorted(builder.info.splits.items())}

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: SupportsIndex) -> bytes | BadDocument:
        try:
            record = self._records[index]
        except (OSError, RuntimeError):  # the latter is array_record's
            return BadDocument(self.name(index), "unreadable")
        document = self._features.deserialize_example_np(record)[self._text_field]
        return checked(document, self.name(index), self._not_utf8)

    def name(self, index: SupportsIndex) -> str:
        return f"{self._name}#{index.__index__()}"

    def fingerprint(self) -> str:
        """Changes with the dataset, its version and size, and the split; not with its folder."""
        identity = [self._name, self._text_field, self._ranges, self._sizes]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def __repr__(self) -> str:
        return f"TfdsDocuments({self._name!r}, documents={len(self)})"


def open_tfds(source: SourceConfig, data: DataConfig, split: Split) -> TfdsDocuments:
    """The documents of a split, which is `source.split` or `data.validation_split`.

    Raises:
      ValueError: the dataset is not prepared, or lacks the split or the field; the splits overlap.
    """
    field = sources.prefix(source, data)
    builder = _builder(source, field)
    trained = _checked_ranges(builder, f"{field}split", source.split)
    if data.source == "tfds":
        main = builder if isinstance(source, DataConfig) else _builder(data, "data.")
        held = _checked_ranges(main, "data.validation_split", data.validation_split)
        if any(a == b and i < m and k < j for a, i, j in trained for b, k, m in held):
            raise ValueError(
                f"{field}split={source.split!r}: must share no documents with "
                f"data.validation_split={data.validation_split!r}, as 'train[5%:]' and 'train[:5%]'"
            )
    if source.text_field not in builder.info.features:
        raise ValueError(
            f"{field}text_field={source.text_field!r}: must be one of "
            f"{tuple(builder.info.features)}, the features of {builder.info.full_name}"
        )
    feature = builder.info.features[source.text_field]
    if feature.shape != () or feature.np_dtype != np.object_:
        raise ValueError(
            f"{field}text_field={source.text_field!r}: must be a feature of text; of "
            f"{builder.info.full_name} it is {feature}"
        )
    documents = TfdsDocuments(
        builder,
        source.split if split == "train" else data.validation_split,
        text_field=source.text_field,
        not_utf8=data.not_utf8,
    )
    sources.log_once(f"{field}name={source.name!r}: {len(documents)} documents for {split}")
    return documents


def _builder(source: SourceConfig, field: str) -> Any:
    """The dataset as it lies on disk."""
    place = f"{field}path={source.path!r}" if source.path else "TFDS's own folder"
    how = (
        f"prepare it with tfds.builder({source.name!r}, file_format='array_record'"
        f"{f', data_dir={source.path!r}' if source.path else ''}).download_and_prepare(), or with "
        "tfds build --file_format=array_record"
    )
    if not source.name:
        raise ValueError(f"{field}name='': must be NAME, NAME/CONFIG or NAME/CONFIG:VERSION")
    try:
        builder: Any = tfds.core.read_only_builder.builder_from_files(
            source.name, data_dir=os.path.expanduser(source.path) or None
        )
    except (tfds.core.DatasetNotFoundError, FileNotFoundError) as error:
        raise ValueError(
            f"{field}name={source.name!r}: must be a dataset that is in {place}; {how}"
        ) from error
    available = {item.value for item in builder.info.available_file_formats()}
    if "array_record" not in available:
        raise ValueError(
            f"{field}name={source.name!r}: must be in the format array_record, it is in "
            f"{sorted(available)}; {how}"
        )
    return builder


def _checked_ranges(builder: Any, field: str, split: str) -> _Ranges:
    try:
        ranges = _ranges(builder, split)
    except ValueError as error:
        raise ValueError(
            f"{field}={split!r}: must be of {tuple(builder.info.splits)}, the splits of "
            f"{builder.info.full_name}, or part of one, e.g. 'train[:90%]'"
        ) from error
    if not ranges:
        raise ValueError(f"{field}={split!r}: must hold documents of {builder.info.full_name}")
    missing = [file for file, *_ in ranges if not os.path.isfile(file)]
    if missing:
        raise ValueError(
            f"{field}={split!r}: must be complete; {len(missing)} of {len(ranges)} files are "
            f"missing, e.g. {missing[0]!r}"
        )
    return ranges


def _ranges(builder: Any, split: str) -> _Ranges:
    result = []
    for item in builder.info.splits[split].file_instructions:
        end = item.examples_in_shard if item.take < 0 else item.skip + item.take
        result.append((item.filename, item.skip, end))
    return result
