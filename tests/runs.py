"""A run that takes seconds: a folder of text, and settings that fit 1 and 8 devices."""

import dataclasses
import json
import pathlib
from typing import Any

import grain
import numpy as np

from bmojo_jax.config import DataConfig, ModelConfig, OptimConfig, TrainConfig
from bmojo_jax.data import pipeline, sources
from bmojo_jax.data.tokenizers import ByteTokenizer

TINY = ModelConfig(
    vocab_size=257,
    width=16,
    depth=1,
    num_heads=2,
    num_kv_heads=2,
    head_width=8,
    window=5,
    fading_window=3,
    eidetic_tokens=4,
    chunk=4,
    ssm_state=4,
    mlp_width=32,
)
WORDS = ("the", "memory", "of", "a", "window", "fades", "and", "what", "surprises", "stays")


def write_documents(folder: pathlib.Path, count: int = 12) -> None:
    """Documents of different lengths, among them some shorter than a row."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        words = rng.choice(WORDS, size=rng.integers(2, 90))
        (folder / f"{i}.txt").write_text(" ".join(words) + "\n")


def tiny_run(folder: pathlib.Path, **changes: Any) -> TrainConfig:
    """A run with `changed` settings."""
    config = TrainConfig(
        model=TINY,
        optim=OptimConfig(warmup_steps=2),
        data=DataConfig(
            path=str(folder),
            validation_fraction=0.3,
            sequence_length=16,
            batch_size=8,
            shuffle_window=4,
        ),
        steps=6,
        log_every=1,
        eval_every=3,
        eval_batches=0,
        checkpoint_every=3,
    )
    return changed(config, **changes)


def first_batches(data: DataConfig, chunk: int) -> grain.DatasetIterator:
    """The batches of a run of one process, from its beginning."""
    source = sources.open_source(data, "train")
    return pipeline.train_iterator(source, data, chunk, ByteTokenizer(), shard=0, shards=1)


def changed(config: TrainConfig, **changes: Any) -> TrainConfig:
    """Changes are fields of TrainConfig, or dicts with fields of a section: optim={"eps": 1.0}."""
    values = {
        name: dataclasses.replace(getattr(config, name), **value)
        if isinstance(value, dict)
        else value
        for name, value in changes.items()
    }
    return dataclasses.replace(config, **values)


def records(workdir: pathlib.Path, split: str = "train") -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what depends on the machine's speed."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("tokens_per_second", None)
        line.pop("data_wait", None)
    return [line for line in lines if line["split"] == split]
