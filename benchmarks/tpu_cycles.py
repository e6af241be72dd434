"""Compiles the TPU kernels of the selective scan for chips that are not here and counts bundles.

    python -m benchmarks.tpu_cycles --output results/kernels/tpu_bundles.json

Needs libtpu of the version that belongs to jax (`make install-aot`), not a TPU. What is counted,
and why, is in `tpu_bundles`. Three programs, each in two variants: "plain" without resets, "full"
with resets. An initial state and a gradient of the final state are part of both.
"""

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import sys
import tempfile

import jax
from absl import app, flags

from benchmarks.tpu_bundles import GOALS, measure, table
from pallas_kernels.shapes import SCAN_CASES

_OUTPUT = flags.DEFINE_string("output", None, "JSON to write.")
_CHIPS = flags.DEFINE_list("chips", ["v5e", "v5p", "v6e"], "To compile for.")
_CASE = flags.DEFINE_string("case", "b8_l2048_e4096", f"Of {list(SCAN_CASES)}.")
_COMMIT = flags.DEFINE_string("commit", "", "Of the code that runs, for the record.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}")
    shape = SCAN_CASES[_CASE.value]
    with tempfile.TemporaryDirectory() as folder:
        # libtpu reads it once, when it is loaded.
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        jax.config.update("jax_platforms", "cpu")
        counts = {chip: measure(chip, shape, pathlib.Path(folder)) for chip in _CHIPS.value}
    print(table(counts))
    if _OUTPUT.value is None:
        return
    record = {
        "command": " ".join(["python -m benchmarks.tpu_cycles", *sys.argv[1:]]),
        "commit": _COMMIT.value,
        "jax": jax.__version__,
        "libtpu": importlib.metadata.version("libtpu"),
        "unit": "static bundles per time step of 512 channels; bfloat16 in and out",
        "shape": dataclasses.asdict(shape),
        "goals": {program: goal._asdict() for program, goal in GOALS.items()},
        "counts": {
            chip: {
                variant: {program: c._asdict() for program, c in by_program.items()}
                for variant, by_program in by_variant.items()
            }
            for chip, by_variant in counts.items()
        },
    }
    rounded = json.loads(json.dumps(record), parse_float=lambda text: round(float(text), 2))
    path = pathlib.Path(_OUTPUT.value)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rounded, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
