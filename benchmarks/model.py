"""Training steps of whole models, beside each other: speed, memory, and where the time goes.

    python -m benchmarks.model --output results/model/training.json
    python -m benchmarks.model --output results/model/training.json --draw

The step of `train.py` (loss, gradients, optimizer) with random tokens, each row one document, on
one device or, with `--mesh context=2`, on several; the transformer's attention by cuDNN on GPUs.
With `--packed` documents are told apart as in `train.py`, although there is one a row, and cuDNN
cannot be used. Tokens of a step stay the same while rows grow longer. Each case runs in a process
of its own, so that peaks of memory are its own and a case that does not fit costs the others
nothing; it says so in its row. A time counts only beside its losses: they are finite, and the same
batch's falls from step to step. With `--processes` cases compile side by side, for which
`XLA_PYTHON_CLIENT_PREALLOCATE=false` leaves memory; one at a time measures.

`parts`, on one device: seconds of its kernels in a step, by what they belong to. Matrix products
and kernels of scan and attention are told apart by the operations' names in the compiled program; a
fusion belongs to what its root is from. "idle" is the rest of the step.

`XLA_FLAGS=--xla_gpu_deterministic_ops=true`, as `train.py` sets it, shows what training pays.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import jax
import numpy as np
from absl import app, flags

from benchmarks import profiling, scan_accuracy, timing
from benchmarks.record import Record
from bmojo_jax import metrics, presets, sharding, trainer
from bmojo_jax.config import DataConfig, MeshConfig, OptimConfig, TrainConfig
from bmojo_jax.data.tokenizers import ByteTokenizer
from pallas_kernels import dispatch

_WARM_STEPS = 2

_OUTPUT = flags.DEFINE_string("output", None, "JSON to write, or to draw.")
_CASES = flags.DEFINE_list(
    "cases",
    [f"{f}:{L}" for L in (2048, 8192, 16384, 32768, 65536) for f in ("transformer", "bmojo")]
    + [f"{f}:{L}" for L in (2048, 16384) for f in ("mamba", "hybrid", "bmojo_f")],
    "family:L each.",
)
_SIZE = flags.DEFINE_enum("size", "1_4b", list(presets.SIZES), "Of the presets.")
_TOKENS = flags.DEFINE_integer("tokens", 65536, "Of a step; rows are as many as that makes.")
_WIDTH = flags.DEFINE_integer("head_width", 128, "K.")
_REMAT = flags.DEFINE_enum(
    "remat", "full", ["none", "kernels", "dots", "full", "nested"], "What is kept."
)
_ATTENTION = flags.DEFINE_string(
    "attention", None, "Implementation; by default the best, for transformers cuDNN on GPUs."
)
_MESH = flags.DEFINE_list("mesh", [], "AXIS=DEVICES each; by default one device.")
_PACKED = flags.DEFINE_bool("packed", False, "Tell documents apart.")
_SCAN = flags.DEFINE_string("scan", None, "Implementation; by default the best.")
_STEPS = flags.DEFINE_integer("steps", 5, "Timed, after two warm ones.", lower_bound=3)
_PROCESSES = flags.DEFINE_integer(
    "processes",
    1,
    "Cases that are under way together. The first runs alone: XLA tunes products while it compiles,"
    " which JAX_COMPILATION_CACHE_DIR keeps for others of the same sizes.",
    lower_bound=1,
)
_SECONDS = flags.DEFINE_float(
    "case_seconds", 300, "After which a case is given up, waiting for others included."
)
_COMMIT = flags.DEFINE_string("commit", "", "Of the code that runs, for the record.")
_ALONE = flags.DEFINE_bool("alone", False, "Measure the one case here and print its row.")
_DRAW = flags.DEFINE_bool("draw", False, "Make a figure, .svg and .png, beside the JSON.")


def settings(family: Any, length: int) -> TrainConfig:
    """The run of one case."""
    size: Any = _SIZE.value
    width: Any = _WIDTH.value
    remat: Any = _REMAT.value
    attention = _ATTENTION.value
    if attention is None and family == "transformer" and not _PACKED.value:
        attention = "cudnn" if "NVIDIA" in dispatch.device_kind() else None
    model = dataclasses.replace(
        presets.model(family, size, head_width=width),
        compute_dtype="bfloat16",
        remat=remat,
        attention_implementation=attention,
        scan_implementation=_SCAN.value,
    )
    rows = max(1, _TOKENS.value // length)
    data = DataConfig(sequence_length=length, batch_size=rows)
    return TrainConfig(model=model, data=data, optim=OptimConfig(learning_rate=1e-4))


def mesh_of(axes: Sequence[str]) -> jax.sharding.Mesh:
    """Of the first devices that there are."""
    sizes = {name: int(size) for name, size in (axis.split("=") for axis in axes)}
    devices = jax.devices()[: math.prod(sizes.values())]
    return sharding.make_mesh(MeshConfig(**{"data": 1, **sizes}), devices)


def random_batch(config: TrainConfig) -> dict[str, np.ndarray]:
    """Tokens that there are, each row one document, of which the model is told with `--packed`."""
    shape = (config.data.batch_size, config.data.sequence_length)
    tokens = np.random.default_rng(0).integers(0, 256, (shape[0], shape[1] + 1), np.int32)
    batch = {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": np.ones(shape, np.float32),
    }
    if _PACKED.value:
        batch["positions"] = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    return batch


def measure(config: TrainConfig, held: contextlib.ExitStack) -> dict[str, Any]:
    """Trains on one batch; compilation is timed apart.

    `held` gets the turn to measure: memory is free for others when this process has ended."""
    mesh = mesh_of(_MESH.value)
    devices = list(mesh.devices.flat)
    program = trainer.make_program(config, mesh, ByteTokenizer())
    batch = sharding.place_batch(random_batch(config), mesh)
    with jax.set_mesh(mesh):
        lowered = program.step.lower(program.abstract_state, batch)
        with timing.compiling(), ThreadPoolExecutor() as pool:
            profiling_one = len(devices) == 1 and pool.submit(_one_by_one, lowered, devices[0])
            start = time.perf_counter()
            compiled = lowered.compile()
            compile_seconds = time.perf_counter() - start
        held.enter_context(timing.turn())
        state = program.init()
        losses, seconds = [], []
        for _ in range(_WARM_STEPS + _STEPS.value):
            start = time.perf_counter()
            state, measured = compiled(state, batch)
            losses.append(float(measured["loss"]))
            seconds.append(time.perf_counter() - start)
        step = statistics.median(seconds[_WARM_STEPS:])
        stats = [device.memory_stats() for device in devices]
        profiled: dict[str, Any] = {"parts": {}}
        try:
            if profiling_one:
                one_by_one = profiling_one.result()
                state, _ = one_by_one(state, batch)
                kernels = profiling.kernels(lambda: one_by_one(state, batch))
                names = profiling.operation_names(one_by_one.as_text())
                profiled["parts"] = profiling.by_part(kernels, names, step)
                profiled["longest"] = profiling.longest(kernels, names)
        except Exception as error:  # the step has been timed all the same
            profiled["not_profiled"] = scan_accuracy.in_short(error)
    tokens = config.data.batch_size * config.data.sequence_length
    result = {
        "device": devices[0].device_kind,
        "rows": config.data.batch_size,
        "parameters": presets.model_parameters(config.model),
        "losses": losses,
        "compile_s": round(compile_seconds, 1),
        "step_s": step,
        "steps_s": seconds[_WARM_STEPS:],
        "tokens_per_s": tokens / step,
        "attention": config.model.attention_implementation or "the best",
        **profiled,
    }
    if all(stats):
        result["peak_bytes"] = max(of_device["peak_bytes_in_use"] for of_device in stats)
    if (peak := metrics.peak_flops(devices[0].device_kind)) is not None:
        flops = metrics.flops_per_token(config.model, config.data.sequence_length)
        result["mfu"] = flops * tokens / step / (peak * len(devices))
    if not (all(map(math.isfinite, losses)) and losses[-1] < losses[0]):
        result["wrong"] = f"the losses of one batch do not fall: {losses}"
    return result


def _one_by_one(lowered: Any, device: jax.Device) -> Any:
    """The program whose profile shows single kernels and not the command buffers that hold them."""
    if device.platform != "gpu":
        return lowered.compile()
    options = {"xla_gpu_enable_command_buffer": "", "xla_gpu_graph_min_graph_size": 2**30}
    return lowered.compile(compiler_options=options)


def rows_of(cases: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Cases and their rows, as they end."""
    yield cases[0], alone(cases[0])
    with ThreadPoolExecutor(_PROCESSES.value) as pool:
        running = {pool.submit(alone, case): case for case in cases[1:]}
        yield from ((running[done], done.result()) for done in as_completed(running))


def alone(case: str) -> dict[str, Any]:
    """The row of a case that runs in a process of its own."""
    # The last of a flag counts.
    arguments = [*sys.argv[1:], "--alone", f"--cases={case}"]
    command = [sys.executable, "-m", "benchmarks.model", *arguments]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS.value)
    except subprocess.TimeoutExpired:
        return {"wrong": f"took more than {_SECONDS.value:g} s"}
    if ran.returncode == 0:
        return json.loads(ran.stdout.splitlines()[-1])
    errors = re.findall(r"^[\w.]*(?:Error|Exception|Exit)\b.*", ran.stderr, re.MULTILINE)
    return {"wrong": (errors or [f"ended with status {ran.returncode}"])[-1][:500]}


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [f"{'L':>7} {'rows':>5} {'model':>12} {'ms':>9} {'tokens/s':>9} {'MFU':>6} {'GiB':>6}"]
    for row in rows:
        start = f"{row['L']:>7} {row.get('rows', ''):>5} {row['family']:>12}"
        if "step_s" not in row:
            lines.append(f"{start} {row['wrong']}")
            continue
        parts = ", ".join(f"{name} {1e3 * s:.0f}" for name, s in row["parts"].items())
        lines.append(
            f"{start} {1e3 * row['step_s']:>9.1f} {row['tokens_per_s']:>9,.0f} "
            f"{row.get('mfu', math.nan):>6.3f} {row.get('peak_bytes', math.nan) / 2**30:>6.1f}"
            f"   {parts}"
        )
    return lines


def draw(content: Mapping[str, Any], path: pathlib.Path) -> None:
    """Tokens per second over L, and the parts of a step."""
    from matplotlib.figure import Figure

    rows = [row for row in content["rows"] if "step_s" in row]
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    speed, shares = figure.subplots(1, 2, width_ratios=[1, 1.4])
    families = list(dict.fromkeys(row["family"] for row in rows))
    for number, family in enumerate(families):
        points = sorted((row["L"], row["tokens_per_s"]) for row in rows if row["family"] == family)
        speed.plot(*zip(*points, strict=True), "o-", color=f"C{number}", label=family)
    speed.set_xscale("log", base=2)
    speed.set_ylim(bottom=0)
    speed.set_xlabel("L")
    speed.set_ylabel("tokens/s")
    speed.grid(alpha=0.3)
    speed.legend()
    places = [f"{row['family']} {row['L']}" for row in rows]
    left = [0.0] * len(rows)
    for number, part in enumerate([*profiling.PARTS, profiling.REST, profiling.IDLE]):
        widths = [1e3 * row["parts"].get(part, 0.0) for row in rows]
        shares.barh(places, widths, left=left, color=f"C{number}", label=part)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    shares.invert_yaxis()
    shares.set_xlabel("ms of a step")
    shares.legend(fontsize="x-small")
    figure.suptitle(f"Training steps of {content['size']} models on {content['device']}")
    for suffix in (".svg", ".png"):
        figure.savefig(path.with_suffix(suffix), dpi=130)


def main(argv: list[str]) -> None:
    del argv
    if _ALONE.value:
        ((family, length),) = (case.split(":") for case in _CASES.value)
        held = contextlib.ExitStack()
        print(json.dumps(measure(settings(family, int(length)), held)))
        return
    if _OUTPUT.value is None:
        raise app.UsageError("--output: where the JSON is")
    output = pathlib.Path(_OUTPUT.value)
    if _DRAW.value:
        draw(json.loads(output.read_text()), output)
        return
    record = Record(
        output,
        "model",
        _COMMIT.value,
        device="",  # a case's process needs all of it
        size=_SIZE.value,
        tokens_per_step=_TOKENS.value,
        remat=_REMAT.value,
        packed=_PACKED.value,
        mesh=_MESH.value,
        xla_flags=os.environ.get("XLA_FLAGS", ""),
    )
    rows: list[dict[str, Any]] = []
    cases = _CASES.value
    for case, row in timing.progress(rows_of(cases), unit="case", total=len(cases)):
        family, length = case.split(":")
        row = {"family": family, "L": int(length), **row}
        record.content["device"] = row.pop("device", record.content["device"])
        rows.append(row)
        rows.sort(key=lambda row: cases.index(f"{row['family']}:{row['L']}"))
        record.add("rows", rows)
        timing.say("\n".join(table([row])))
    wrong = [row for row in rows if "wrong" in row]
    if wrong:
        raise SystemExit("\n".join(["wrong, or did not run:", *map(str, wrong)]))


if __name__ == "__main__":
    app.run(main)
