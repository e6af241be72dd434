"""Tokens per second of the input pipeline alone: one process, no model, no device.

    python -m benchmarks.pipeline --output results/pipeline [--tokenizer tokenizer.json]

The text is the interpreter's standard library, as short documents (300 bytes, JSONL) and long ones
(files of 1 MiB), read as text and as token files that are made of it first. Rows of 2048 tokens,
batches of 64, windows of 1024 rows. For each case: tokens per second once batches come, seconds to
the first batch, and seconds to restore a state and have its batch, which is compared with the one
that came next before. `--goal` is what token files must reach with readers in threads.
"""

import dataclasses
import json
import os
import pathlib
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import tqdm
from absl import app, flags
from matplotlib.figure import Figure

from bmojo_jax.config import DataConfig
from bmojo_jax.data import pipeline, sources, tokenize, tokenizers
from configs import quickstart

_OUTPUT = flags.DEFINE_string("output", None, "Folder for the JSON and PNG.", required=True)
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "Also measured; a file as data.tokenizer.")
_MEGABYTES = flags.DEFINE_integer("megabytes", 24, "Of text.", lower_bound=2)
_SECONDS = flags.DEFINE_float("seconds", 4.0, "For which batches of a case are counted.")
_WORKERS = flags.DEFINE_multi_integer("workers", [0, 2], "Reader processes.")
_GOAL = flags.DEFINE_float("goal", 5e6, "Tokens per second of token files.")
_COMMIT = flags.DEFINE_string("commit", "", "Of the code that runs, for the record.")

_LENGTH, _BATCH, _WINDOW, _CHUNK = 2048, 64, 1024, 64
_SHORT, _LONG = 300, 2**20  # bytes of a document
# The time of a thread in a busy machine varies: the median of so many parts of the seconds.
_PARTS = 4


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    data: DataConfig


def write_text(folder: pathlib.Path, size: int) -> None:
    """`size` bytes of text as `short/documents.jsonl` and as files in `long`."""
    data = quickstart.settings().data
    text = "\n".join(
        document.decode("ascii", errors="ignore") for document in sources.read_split(data, "train")
    )
    text = (text * (size // len(text) + 1))[:size]
    for name in ("short", "long"):
        (folder / name).mkdir()
    with (folder / "short/documents.jsonl").open("w") as file:
        for first in range(0, size, _SHORT):
            file.write(json.dumps({"text": text[first : first + _SHORT]}) + "\n")
    for number, first in enumerate(range(0, size, _LONG)):
        (folder / f"long/{number:04}.txt").write_text(text[first : first + _LONG])


def cases(folder: pathlib.Path) -> Iterator[Case]:
    """Every case, its files made before."""
    names = {"bytes": "bytes"}
    if _TOKENIZER.value:
        names["BPE"] = _TOKENIZER.value
    common = DataConfig(sequence_length=_LENGTH, batch_size=_BATCH, shuffle_window=_WINDOW)
    for name, tokenizer in names.items():
        for size in ("short", "long"):
            text = dataclasses.replace(common, path=str(folder / size), tokenizer=tokenizer)
            written = folder / f"tokens-{name}-{size}"
            tokenize.tokenize(text, written, shards=4, processes=1)
            tokens = dataclasses.replace(
                common, source="tokens", path=str(written), tokenizer=tokenizer
            )
            for workers in _WORKERS.value:
                how = f"{workers} processes" if workers else "threads"
                for source, data in (("text", text), ("tokens", tokens)):
                    data = dataclasses.replace(data, workers=workers)
                    yield Case(f"{source}, {name}, {size}, {how}", data)
            if name == "bytes":
                at_chunks = dataclasses.replace(tokens, document_start="chunk")
                yield Case(f"tokens, {name}, {size}, threads, at chunks", at_chunks)
                in_order = dataclasses.replace(tokens, shuffle_window=1)
                yield Case(f"tokens, {name}, {size}, threads, window 1", in_order)


def measure(data: DataConfig) -> dict[str, Any]:
    tokenizer = tokenizers.make_tokenizer(data)
    source = sources.open_source(data, "train")

    def open_iterator() -> Any:
        return pipeline.train_iterator(source, data, _CHUNK, tokenizer, shard=0, shards=1)

    start = time.perf_counter()
    iterator = open_iterator()
    next(iterator)
    first = time.perf_counter() - start
    for _ in range(8):  # those that were made before
        next(iterator)
    rates = []
    for _ in range(_PARTS):
        tokens, start = 0, time.perf_counter()
        while time.perf_counter() - start < _SECONDS.value / _PARTS:
            tokens += int(np.count_nonzero(next(iterator)["weights"]))
        rates.append(tokens / (time.perf_counter() - start))
    state = json.loads(json.dumps(iterator.get_state()))
    following = next(iterator)
    iterator.close()
    start = time.perf_counter()
    restored = open_iterator()
    restored.set_state(state)
    batch = next(restored)
    restore = time.perf_counter() - start
    restored.close()
    if any((batch[name] != following[name]).any() for name in batch):
        raise SystemExit("a restored state gave another batch")
    return {
        "tokens_per_second": statistics.median(rates),
        "slowest": min(rates),
        "fastest": max(rates),
        "first_batch_seconds": first,
        "restore_seconds": restore,
    }


def draw(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    figure = Figure(figsize=(9, 0.3 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots()
    rates = [row["tokens_per_second"] / 1e6 for row in rows]
    spread = [
        [rate - row["slowest"] / 1e6 for rate, row in zip(rates, rows, strict=True)],
        [row["fastest"] / 1e6 - rate for rate, row in zip(rates, rows, strict=True)],
    ]
    axes.barh([row["case"] for row in rows], rates, xerr=spread, color="tab:blue", alpha=0.8)
    axes.axvline(_GOAL.value / 1e6, color="tab:red", linestyle=":", label="goal of token files")
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("million tokens per second, one process")
    axes.grid(axis="x", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)


def main(argv: list[str]) -> None:
    del argv
    output = pathlib.Path(_OUTPUT.value)
    output.mkdir(parents=True, exist_ok=True)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_text(folder, _MEGABYTES.value * 2**20)
        print(f"{'':>40} {'Mtokens/s':>10} {'slowest':>8} {'first batch':>12} {'restore':>8}")
        for case in tqdm.tqdm(list(cases(folder)), unit="case", disable=None):
            row: dict[str, Any] = {"case": case.name, **measure(case.data)}
            rows.append(row)
            tqdm.tqdm.write(
                f"{case.name:>40} {row['tokens_per_second'] / 1e6:>10.2f} "
                f"{row['slowest'] / 1e6:>8.2f} {row['first_batch_seconds']:>10.2f} s "
                f"{row['restore_seconds']:>6.2f} s"
            )
    result = {
        "command": " ".join(["python -m benchmarks.pipeline", *sys.argv[1:]]),
        "commit": _COMMIT.value,
        "machine": f"{platform.machine()}, {os.cpu_count()} processors",
        "length": _LENGTH,
        "batch": _BATCH,
        "window": _WINDOW,
        "cases": rows,
    }
    (output / "pipeline.json").write_text(json.dumps(result, indent=2) + "\n")
    draw(rows, output / "pipeline.png")
    missed = [
        row["case"]
        for row in rows
        if row["case"].startswith("tokens")
        and row["case"].endswith("threads")
        and row["tokens_per_second"] < _GOAL.value
    ]
    if missed:
        raise SystemExit(f"fewer than {_GOAL.value:,.0f} tokens/s: {missed}")


if __name__ == "__main__":
    app.run(main)
