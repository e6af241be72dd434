"""Takes real training steps with every family at every size up to 130m, and shows what they cost.

    python -m benchmarks.train_steps --out results/train_steps

Text is the interpreter's standard library, bytes as tokens, the vocabulary that of the presets.
Each model trains for a few steps from scratch through the same program as `train.py`. A time counts
only beside its loss, which must fall: the losses before and after stand in the same row.
"""

import dataclasses
import json
import pathlib
import statistics
import sys
import time
from typing import Any

import jax
import numpy as np
import tqdm
from absl import app, flags

from bmojo_jax import metrics, presets, sharding, trainer
from bmojo_jax.config import MeshConfig, OptimConfig, TrainConfig
from bmojo_jax.data import pipeline, sources
from bmojo_jax.data.tokenizers import ByteTokenizer
from configs import quickstart

_OUT = flags.DEFINE_string("out", None, "Folder for train_steps.json.", required=True)
_SIZES = flags.DEFINE_list("sizes", ["tiny", "30m", "130m"], "Sizes of the presets.")
_FAMILIES = flags.DEFINE_list("families", list(presets.PATTERNS), "Families of the presets.")
_STEPS = flags.DEFINE_integer("steps", 20, "Updates of each model.", lower_bound=3)
_LENGTH = flags.DEFINE_integer("length", 1024, "Tokens of a row.")
_BATCH = flags.DEFINE_integer("batch", 8, "Rows of a batch.")
_COMMIT = flags.DEFINE_string("commit", "", "Of the code that runs, for the record.")
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Compute dtype.")


def settings(family: Any, size: Any) -> TrainConfig:
    """The run of one model."""
    dtype: Any = _DTYPE.value
    model = dataclasses.replace(presets.model(family, size), compute_dtype=dtype)
    data = quickstart.settings().data
    data = dataclasses.replace(data, sequence_length=_LENGTH.value, batch_size=_BATCH.value)
    optim = OptimConfig(learning_rate=1e-3, warmup_steps=_STEPS.value // 2)
    return TrainConfig(model=model, data=data, optim=optim, steps=_STEPS.value)


def measure(config: TrainConfig) -> dict[str, Any]:
    """Trains; the first step compiles and is timed apart."""
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    program = trainer.make_program(config, mesh, ByteTokenizer())
    batches = pipeline.train_iterator(
        sources.open_source(config.data, "train"),
        config.data,
        config.model.chunk,
        ByteTokenizer(),
        shard=0,
        shards=1,
    )
    losses, seconds = [], []
    with jax.set_mesh(mesh):
        state = program.init()
        for _ in range(config.steps):
            batch = sharding.place_batch(next(batches), mesh)
            start = time.perf_counter()
            state, measured = program.step(state, batch)
            losses.append(float(measured["loss"]))
            seconds.append(time.perf_counter() - start)
    batches.close()
    step = statistics.median(seconds[2:])
    tokens = config.data.batch_size * config.data.sequence_length
    result = {
        "parameters": presets.model_parameters(config.model),
        "first_loss": losses[0],
        "last_loss": float(np.mean(losses[-3:])),
        "compile_seconds": seconds[0],
        "step_seconds": step,
        "tokens_per_second": tokens / step,
    }
    peak = metrics.peak_flops(jax.devices()[0].device_kind)
    if peak is not None:
        flops = metrics.flops_per_token(config.model, config.data.sequence_length)
        result["mfu"] = flops * tokens / step / peak
    return result


def main(argv: list[str]) -> None:
    del argv
    rows = []
    cases = [(family, size) for size in _SIZES.value for family in _FAMILIES.value]
    out = pathlib.Path(_OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    print(
        f"{'model':>18} {'parameters':>12} {'loss':>16} {'ms/step':>8} {'tokens/s':>9} {'MFU':>6}"
    )
    for family, size in tqdm.tqdm(cases, unit="model", disable=None):
        row: dict[str, Any] = {"family": family, "size": size, **measure(settings(family, size))}
        rows.append(row)
        print(
            f"{family + ' ' + size:>18} {row['parameters']:>12,} "
            f"{row['first_loss']:>7.3f} > {row['last_loss']:.3f} "
            f"{1e3 * row['step_seconds']:>8.1f} {row['tokens_per_second']:>9,.0f} "
            f"{row.get('mfu', float('nan')):>6.3f}",
            flush=True,
        )
        result = {
            "command": " ".join(["python -m benchmarks.train_steps", *sys.argv[1:]]),
            "commit": _COMMIT.value,
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "dtype": _DTYPE.value,
            "batch": _BATCH.value,
            "length": _LENGTH.value,
            "steps": _STEPS.value,
            "models": rows,
        }
        (out / "train_steps.json").write_text(json.dumps(result, indent=2) + "\n")
    worse = [row for row in rows if not row["last_loss"] < row["first_loss"]]
    if worse:
        raise SystemExit(f"the loss did not fall: {worse}")


if __name__ == "__main__":
    app.run(main)
