"""Compiles the TPU kernels of one operation for chips that are not here and counts bundles.

    python -m benchmarks.tpu_cycles --output results/kernels/tpu_bundles.json
    python -m benchmarks.tpu_cycles --op memory_attention \
        --output results/kernels/tpu_attention_bundles.json

Needs libtpu of the version that belongs to jax (`make install-aot`), not a TPU. What is counted,
and why, is in `tpu_bundles`, and of each operation in `tpu_scan_bundles` and
`tpu_attention_bundles`.
"""

import importlib.metadata
import json
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import jax
from absl import app, flags

from benchmarks import tpu_attention_bundles, tpu_bundles, tpu_scan_bundles

OPS: Mapping[str, Any] = {
    "selective_scan": tpu_scan_bundles,
    "memory_attention": tpu_attention_bundles,
}

_OP = flags.DEFINE_enum("op", "selective_scan", list(OPS), "Whose kernels.")
_OUTPUT = flags.DEFINE_string("output", None, "JSON to write.")
_CHIPS = flags.DEFINE_list("chips", None, f"To compile for, of {list(tpu_bundles.TOPOLOGIES)}.")
_COMMIT = flags.DEFINE_string("commit", "", "Of the code that runs, for the record.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}")
    op = OPS[_OP.value]
    chips = op.CHIPS if _CHIPS.value is None else _CHIPS.value
    jax.config.update("jax_platforms", "cpu")
    with tpu_bundles.dumping() as dump:
        counts = {chip: op.measure(chip, dump) for chip in chips}
    print(op.table(counts))
    if _OUTPUT.value is None:
        return
    record = {
        "command": " ".join(["python -m benchmarks.tpu_cycles", *sys.argv[1:]]),
        "commit": _COMMIT.value,
        "jax": jax.__version__,
        "libtpu": importlib.metadata.version("libtpu"),
        **op.record(counts),
    }
    rounded = json.loads(json.dumps(record), parse_float=lambda text: round(float(text), 2))
    path = pathlib.Path(_OUTPUT.value)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rounded, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
