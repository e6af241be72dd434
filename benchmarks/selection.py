"""What it costs to choose the eidetic memory, beside the whole attention of the layer.

    python -m benchmarks.selection --output results/kernels/selection.json

For every length, size of the memory M and chunk C: the innovation, the selection (the M largest of
every chunk's prefix) and the gathers of keys and values with their gradients, each a program of its
own, beside the attention mixer of the preset's M and C ("mixer": projections to output, without the
SSM), forward and forward with backward. `share` is what the three take of the mixer's time.

The selection is compared with its definition, one chunk after the other on the host, on innovations
with many ties: no index may differ. `parts.py` has how the others are checked. Mixers longer than
`--checked_length` are timed without their errors. The JSON is written after every length. The exit
status is 1 if anything was wrong.
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from absl import app, flags

from benchmarks import timing
from benchmarks.attention_parts import named, parts_of
from benchmarks.parts import KINDS, Speeds, measure, speeds
from benchmarks.record import Record
from bmojo_jax import presets
from bmojo_jax.config import ModelConfig

CHOOSING = ("innovation", "selection", "gathers")

_OUTPUT = flags.DEFINE_string("output", None, "JSON to write.", required=True)
_SIZE = flags.DEFINE_enum("size", "1_4b", list(presets.SIZES), "Of the presets.")
_HEAD_WIDTH = flags.DEFINE_integer("head_width", 128, "K.")
_KEY_HEADS = flags.DEFINE_integer("key_heads", 4, "G.")
_LENGTHS = flags.DEFINE_list("lengths", ["2048", "8192", "32768", "131072"], "L.")
_MEMORIES = flags.DEFINE_list("memories", ["16", "64", "256"], "M.")
_CHUNKS = flags.DEFINE_list("chunks", ["128", "256", "512"], "C.")
_CHECKED = flags.DEFINE_integer("checked_length", 32768, "Largest L of a mixer with errors.")
_SAMPLES = flags.DEFINE_integer("samples", 20, "Of each time.", lower_bound=2)
_PRODUCT = flags.DEFINE_integer("product", 8192, "Side of the product that gives the floor.")
_COMMIT = flags.DEFINE_string("commit", "", "Of the code that runs, for the record.")


def measure_length(length: int, speeds: Speeds) -> list[dict[str, Any]]:
    """Rows of the mixer and the innovation, then of selection and gathers for each M and C."""
    size: Any = _SIZE.value
    config = presets.model("bmojo", size)
    config = dataclasses.replace(
        config,
        num_heads=config.width // _HEAD_WIDTH.value,
        num_kv_heads=_KEY_HEADS.value,
        head_width=_HEAD_WIDTH.value,
    )

    def rows(config: ModelConfig, *names: str) -> list[dict[str, Any]]:
        parts = parts_of(config, batch=1, length=length)
        return [
            {**named(config, length), "part": name, **row}
            for name in names
            for row in measure(
                parts[name],
                implementation=None,
                samples=_SAMPLES.value,
                speeds=None if name == "mixer" else speeds,
                checked=name != "mixer" or length <= _CHECKED.value,
            )
        ]

    measured = rows(config, "mixer", "innovation")
    for M in map(int, _MEMORIES.value):
        for C in map(int, _CHUNKS.value):
            changed = dataclasses.replace(config, eidetic_tokens=M, chunk=C)
            measured += rows(changed, "selection", "gathers")
    return measured


def shares(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of the mixer's time at one length, for each M and C."""
    found = []
    mixer, innovation = (
        {row["kind"]: row for row in rows if row["part"] == name}
        for name in ("mixer", "innovation")
    )
    cases = dict.fromkeys((row["M"], row["C"]) for row in rows if row["part"] == "selection")
    for M, C in cases:
        of = {
            (row["part"], row["kind"]): row
            for row in rows
            if (row["M"], row["C"]) == (M, C) and row["part"] in CHOOSING
        }
        for kind in KINDS:
            parts = {
                "innovation": innovation["forward"],
                "selection": of["selection", "forward"],
                "gathers": of["gathers", kind],
            }
            if all("ms" in row for row in (mixer[kind], *parts.values())):
                times = {name: row["ms"] for name, row in parts.items()}
                share = sum(times.values()) / mixer[kind]["ms"]
                sizes = {"L": rows[0]["L"], "M": M, "C": C, "kind": kind}
                found.append({**sizes, **times, "mixer": mixer[kind]["ms"], "share": share})
    return found


def table(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Milliseconds, and per cent of the mixer."""
    columns = (*CHOOSING, "mixer")
    lines = [f"{'L, M, C':<20}{'':<18}" + "".join(f"{name:>12}" for name in columns) + "   share"]
    for row in found:
        case = f"{row['L']}, {row['M']}, {row['C']}"
        times = "".join(f"{row[name]:>12.4f}" for name in columns)
        lines.append(f"{case:<20}{row['kind']:<18}{times}{100 * row['share']:>7.1f}%")
    return lines


def main(argv: list[str]) -> None:
    del argv
    measured = speeds(_PRODUCT.value, _SAMPLES.value)
    record = Record(
        pathlib.Path(_OUTPUT.value),
        "selection",
        _COMMIT.value,
        copied_bytes_per_second=measured.copy,
        product_flops_per_second=measured.product,
        xla_flags=os.environ.get("XLA_FLAGS", ""),
    )
    rows: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for length in timing.progress(_LENGTHS.value, unit="length"):
        new = measure_length(int(length), measured)
        rows += new
        found += shares(new)
        record.add("rows", rows)
        record.add("shares", found)
        timing.say("\n".join(table(shares(new))))
    wrong = [row for row in rows if "wrong" in row]
    if wrong:
        raise SystemExit("\n".join(["wrong, and therefore not timed:", *map(str, wrong)]))


if __name__ == "__main__":
    app.run(main)
