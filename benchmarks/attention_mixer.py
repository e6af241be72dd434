"""What the attention of a B'MOJO layer costs, whole and in parts, beside their floors.

    python -m benchmarks.attention_mixer --output results/kernels/attention_mixer.json

Does everything around the attention cost no more than the bytes that it must move? `parts.py` has
how a part is checked and timed, `attention_parts.py` which parts there are. "mixer" is whole; its
floor is the sum of those of its parts. "around" is the mixer less projections, attention and
output: what is left for norms, rotary positions, innovation, selection and gathers, which XLA may
fuse with what is before and behind them.

`XLA_FLAGS=--xla_gpu_deterministic_ops=true`, as `train.py` sets it, shows what training pays.

Rows beyond `--checked_length` are timed without their errors: the same program in float32 would not
fit beside them. The JSON is written after every case. The exit status is 1 if anything was wrong.
"""

import dataclasses
import itertools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from absl import app, flags

from benchmarks import timing
from benchmarks.attention_parts import AROUND, INSIDE, named, parts_of
from benchmarks.parts import KINDS, Speeds, measure, speeds, table
from benchmarks.record import Record
from bmojo_jax import presets
from bmojo_jax.config import ModelConfig

_OUTPUT = flags.DEFINE_string("output", None, "JSON to write.", required=True)
_SIZE = flags.DEFINE_enum("size", "1_4b", list(presets.SIZES), "Of the presets.")
_HEAD_WIDTH = flags.DEFINE_integer("head_width", 128, "K.")
_LENGTHS = flags.DEFINE_list("lengths", ["2048", "8192", "32768"], "L.")
_KEY_HEADS = flags.DEFINE_list("key_heads", ["4", "16"], "G.")
_BATCH = flags.DEFINE_integer("batch", 1, "B.")
_EIDETIC = flags.DEFINE_integer("eidetic_tokens", None, "M; by default the preset's.")
_IMPLEMENTATION = flags.DEFINE_string("implementation", None, "Of the attention; or the best.")
_CHECKED = flags.DEFINE_integer("checked_length", 32768, "Largest L with errors.")
_SAMPLES = flags.DEFINE_integer("samples", 20, "Of each time.", lower_bound=2)
_PRODUCT = flags.DEFINE_integer("product", 8192, "Side of the product that gives the floor.")
_COMMIT = flags.DEFINE_string("commit", "", "Of the code that runs, for the record.")


def layer(key_heads: int) -> ModelConfig:
    """The preset's B'MOJO layer with these heads."""
    size: Any = _SIZE.value
    config = presets.model("bmojo", size)
    heads = config.width // _HEAD_WIDTH.value
    changes: dict[str, Any] = {"eidetic_tokens": _EIDETIC.value} if _EIDETIC.present else {}
    return dataclasses.replace(
        config,
        num_heads=heads,
        num_kv_heads=key_heads,
        head_width=_HEAD_WIDTH.value,
        **changes,
    )


def measure_case(config: ModelConfig, length: int, speeds: Speeds) -> list[dict[str, Any]]:
    """A row for each part and kind, and for what is around the attention."""
    rows = []
    for name, make in parts_of(config, batch=_BATCH.value, length=length).items():
        measured = measure(
            make,
            implementation=_IMPLEMENTATION.value,
            samples=_SAMPLES.value,
            speeds=None if name == "mixer" else speeds,
            checked=length <= _CHECKED.value,
        )
        rows += [{"part": name, **row} for row in measured]
    by = {(row["part"], row["kind"]): row for row in rows}

    def of(name: str, kind: str) -> Mapping[str, Any]:
        """Without a gradient it runs forward only."""
        return by.get((name, kind)) or by.get((name, "forward")) or {"ms": 0.0, "floor_ms": 0.0}

    for kind in KINDS:
        whole = by["mixer", kind]
        whole["floor_ms"] = sum(of(name, kind)["floor_ms"] for name in INSIDE)
        others = [of(name, kind) for name in INSIDE if name not in AROUND]
        if all("ms" in row for row in (whole, *others)):
            left = whole["ms"] - sum(row["ms"] for row in others)
            floor = sum(of(name, kind)["floor_ms"] for name in AROUND)
            around = {"part": "around", "kind": kind, "ms": left, "floor_ms": floor}
            rows.append(around | {"errors": whole.get("errors", {})})
    return rows


def summary(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = table(rows)
    for kind in KINDS:
        inside = [row for row in rows if row["part"] in INSIDE and row["kind"] == kind]
        if all("ms" in row for row in inside):
            lines.append(f"sum of parts, {kind}: {sum(row['ms'] for row in inside):.4f} ms")
    return lines


def main(argv: list[str]) -> None:
    del argv
    measured = speeds(_PRODUCT.value, _SAMPLES.value)
    record = Record(
        pathlib.Path(_OUTPUT.value),
        "attention_mixer",
        _COMMIT.value,
        copied_bytes_per_second=measured.copy,
        product_flops_per_second=measured.product,
        xla_flags=os.environ.get("XLA_FLAGS", ""),
    )
    timing.say(
        f"copy {measured.copy / 1e12:.2f} TB/s, product {measured.product / 1e12:.0f} TFLOP/s"
    )
    cases: list[dict[str, Any]] = []
    runs = list(itertools.product(_LENGTHS.value, _KEY_HEADS.value))
    for length, key_heads in timing.progress(runs, unit="case"):
        config = layer(int(key_heads))
        rows = measure_case(config, int(length), measured)
        sizes = named(config, int(length))
        cases.append({**sizes, "rows": rows})
        record.add("cases", cases)
        timing.say("\n".join([str(dict(sizes)), *summary(rows)]))
    wrong = [
        (case["L"], case["G"], row) for case in cases for row in case["rows"] if "wrong" in row
    ]
    if wrong:
        raise SystemExit("\n".join(["wrong, and therefore not timed:", *map(str, wrong)]))


if __name__ == "__main__":
    app.run(main)
