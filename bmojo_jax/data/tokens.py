"""Token files: documents tokenized beforehand, in ArrayRecord files.

`python -m bmojo_jax.data.tokenize` writes a folder:

    tokens.json                               what is in it, and the tokenizer
    train-00000-of-00016.array_record ...     records of the training split
    validation-00000-of-00001.array_record

A record is an array of ids, little-endian uint16 where the vocabulary fits and otherwise uint32:
whole documents between boundaries, | d0..d(n-1) | e0..e(m-1) |, up to `RECORD_TOKENS` of them
together, or one longer document. So a record of short documents is read at once, at the cost of one
document, and each record can be read by itself. Training documents were put in a random order
before they were put together, so that neighbours in a record are no neighbours in the source.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, SupportsIndex

import grain
import numpy as np
from jaxtyping import Int

from bmojo_jax.config import DataConfig, SourceConfig
from bmojo_jax.data import sources, tokenizers
from bmojo_jax.data.documents import Split
from bmojo_jax.data.tokenizers import Tokenizer

DESCRIPTION = "tokens.json"
UNFINISHED = "unfinished.json"
FORMAT = 1
# 16 rows of 2048: a record costs what a document costs, and is nothing beside its tokens; a small
# data set still has many records to shuffle.
RECORD_TOKENS = 32_768


def dtype_of(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


class TokenFiles:
    """The records of a split: a `grain.sources.RandomAccessDataSource` of framed ids."""

    def __init__(self, folder: Path, split: str, description: dict[str, Any]) -> None:
        shards = description["splits"][split]["shards"]
        self._name = f"TokenFiles({str(folder)!r}, {split!r})"
        self._dtype = np.dtype(description["dtype"])
        # With the records of each, so that not every file is opened to count them.
        self._records = grain.sources.ArrayRecordDataSource(
            [f"{folder / shard['name']}[0:{shard['records']}]" for shard in shards]
        )
        identity = {name: value for name, value in description.items() if name != "tokenizer"}
        self._fingerprint = hashlib.sha256(json.dumps([split, identity]).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: SupportsIndex) -> Int[np.ndarray, " L"]:
        return np.frombuffer(self._records[index], self._dtype).astype(np.int32)

    def fingerprint(self) -> str:
        """Changes when the records do: with the documents, settings and tokenizer they are of."""
        return self._fingerprint

    def __repr__(self) -> str:
        return self._name


def open_tokens(source: SourceConfig, data: DataConfig, split: Split) -> TokenFiles:
    """The records of a split of `source`, which is `data` itself or one of `data.mixed_in`.

    Raises:
      ValueError: the folder is not finished, lacks the split, or is of another tokenizer.
    """
    field = sources.prefix(source, data)
    folder = Path(source.path)
    description = read_description(source.path, field=f"{field}path")
    name, setting = source.split, f"{field}split"
    if split == "validation":
        name, setting = data.validation_split, "data.validation_split"
    elif data.source == "tokens" and name == data.validation_split:
        if Path(source.path).resolve() == Path(data.path).resolve():
            raise ValueError(
                f"{setting}={name!r}: must be another split than data.validation_split={name!r} of "
                "the same folder, which is held out"
            )
    splits = description["splits"]
    if name not in splits:
        raise ValueError(f"{setting}={name!r}: must be one of {tuple(splits)}, in {source.path!r}")
    tokenizer = tokenizers.make_tokenizer(data)
    if tokenizer.fingerprint() != description["tokenizer_fingerprint"]:
        raise ValueError(
            f"{field}path={source.path!r}: must have been tokenized by the tokenizer of the run, "
            f"data.tokenizer={data.tokenizer!r} with {tokenizer.vocab_size} words; it was by "
            f"another one, with {description['vocab_size']}"
        )
    for shard in splits[name]["shards"]:
        path = folder / shard["name"]
        size = path.stat().st_size if path.is_file() else None
        if size != shard["bytes"]:
            raise ValueError(
                f"{field}path={source.path!r}: must be complete; {shard['name']} has {size} bytes "
                f"instead of {shard['bytes']}"
            )
    return TokenFiles(folder, name, description)


def tokenizer_of(data: DataConfig) -> Tokenizer:
    """The tokenizer of the token files `data.path`.

    Raises:
      ValueError: as `read_description`, or `data.tokenizer` names another one.
    """
    tokenizer = tokenizers.from_dict(read_description(data.path, field="data.path")["tokenizer"])
    if data.tokenizer != DataConfig.tokenizer or data.boundary_token:
        named = tokenizers.make_tokenizer(dataclasses.replace(data, source="text"))
        if named.fingerprint() != tokenizer.fingerprint():
            raise ValueError(
                f"data.tokenizer={data.tokenizer!r}: must be left out, or be the tokenizer of "
                f"data.path={data.path!r}, whose vocabulary has {tokenizer.vocab_size} words"
            )
    return tokenizer


def read_description(path: str, *, field: str) -> dict[str, Any]:
    """What is in a folder of token files; `field` is the setting that names it.

    Raises:
      ValueError: it is no such folder, or it is not finished.
    """
    file = Path(path) / DESCRIPTION
    if not path or not file.is_file():
        hint = ""
        if path and (Path(path) / UNFINISHED).exists():
            hint = "; this one is not finished: give the same command again"
        raise ValueError(
            f"{field}={path!r}: must be a folder that python -m bmojo_jax.data.tokenize has "
            f"written, with {DESCRIPTION}{hint}"
        )
    description = json.loads(file.read_text(encoding="utf-8"))
    if description.get("format") != FORMAT:
        raise ValueError(
            f"{field}={path!r}: must be of format {FORMAT}; {DESCRIPTION} says "
            f"{description.get('format')!r}"
        )
    return description
