"""Compiles a run's training step for TPUs that are not here, and says what it would need there.

    python -m bmojo_jax.aot --topology v5e:16x16 --config configs/lm_1_4b_pod.py

It is the step that `train.py` runs, with the TPU kernels in it, on the mesh of the settings; libtpu
compiles it on any machine (`make install-aot`). Printed, and written as JSON with --output:

    memory        of a device: parameters, optimizer and batch (arguments), the rest (temporaries)
    FLOPs         as `metrics.flops_per_token` counts them
    scan          static bundles of the scan's kernels, a cycle each (`benchmarks/tpu_cycles.py`)
    collectives   bytes that a device receives, by kind
    memory's time what is written and read outside fusions (`hlo.traffic`): an upper estimate
    step time     between the longest of computing (matrix products and scan) and network, all else
                  beside it, and the sum of all: estimates from vendors' figures

The network's time takes half a device's bandwidth for what it receives, over all its links.
Nothing of it has been compared with a TPU.
"""

import dataclasses
import importlib.metadata
import json
import math
import pathlib
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import app, flags
from ml_collections import config_flags

from bmojo_jax import config as settings_module
from bmojo_jax import console, hlo, metrics, sharding, topologies, trainer
from bmojo_jax.config import TrainConfig
from bmojo_jax.data.tokenizers import ByteTokenizer
from bmojo_jax.settings import to_dict


class Chip(NamedTuple):
    """A device of a topology, by its vendor's figures."""

    peak: float  # FLOP/s of bfloat16 products
    memory: float  # bytes
    bandwidth: float  # of the memory, bytes/s
    network: float  # of all links to other chips, both ways, bytes/s
    clock: float  # Hz
    cores: int  # TensorCores


# https://cloud.google.com/tpu/docs, system architecture of each generation. The clock is the peak
# rate over the multiply-adds of the matrix units; a v4 of a topology is one of a chip's two cores.
CHIPS: dict[str, Chip] = {
    "TPU v4": Chip(137.5e12, 16 * 2**30, 0.6e12, 150e9, 1.05e9, 1),
    "TPU v5 lite": Chip(197e12, 16 * 2**30, 0.82e12, 200e9, 1.5e9, 1),
    "TPU v5": Chip(459e12, 95 * 2**30, 2.765e12, 600e9, 1.75e9, 2),
    "TPU v6 lite": Chip(918e12, 32 * 2**30, 1.64e12, 448e9, 1.75e9, 1),
}
# Bundles per time step of 512 channels, N = 16: results/kernels/tpu_bundles.json.
SCAN_BUNDLES = {"forward": 23.0, "backward": 71.0}


def compile_step(config: TrainConfig, topology: str) -> tuple[Any, trainer.Program]:
    """The compiled training step of the settings on the devices of a topology.

    Raises:
      ValueError: the topology is unknown, or the settings do not fit its devices.
      jax.errors.JaxRuntimeError: the compiler refuses, e.g. since memory does not suffice.
    """
    devices = topologies.devices(topology)
    mesh = sharding.make_mesh(config.mesh, devices)
    sharding.check_divisible(config, mesh)
    # Of a tokenizer the step has the lengths of its words alone.
    program = trainer.make_program(config, mesh, ByteTokenizer())
    shape = (config.data.batch_size, config.data.sequence_length)
    placement = sharding.batch_sharding(mesh)
    dtypes = {"inputs": jnp.int32, "targets": jnp.int32, "positions": jnp.int32}
    dtypes |= {"segment_ids": jnp.int32, "weights": jnp.float32}
    batch = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=placement)
        for name, dtype in dtypes.items()
    }
    with jax.set_mesh(mesh):
        traced = program.step.trace(program.abstract_state, batch)
        return traced.lower(lowering_platforms=("tpu",)).compile(), program


def report(config: TrainConfig, topology: str) -> dict[str, Any]:
    """What the step needs and about how long it takes; a tree of numbers and names.

    Raises as `compile_step` does, and ValueError for chips without figures in CHIPS.
    """
    if (kind := topologies.devices(topology)[0].device_kind) not in CHIPS:
        raise ValueError(f"{topology=} has chips of {kind}; it must be one of {', '.join(CHIPS)}")
    start = time.monotonic()
    compiled, program = compile_step(config, topology)
    seconds = time.monotonic() - start
    mesh = program.mesh
    chip = CHIPS[kind]
    text = compiled.as_text()
    stats = compiled.memory_analysis()
    arguments = stats.argument_size_in_bytes
    more = stats.temp_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    needed = arguments + more + stats.generated_code_size_in_bytes
    exchanged = {name: 0.0 for name in hlo.KINDS}
    for collective in hlo.collectives(text):
        exchanged[collective.kind] += collective.received * collective.runs
    tokens = config.data.batch_size * config.data.sequence_length
    flops = metrics.flops_per_token(config.model, config.data.sequence_length) * tokens / mesh.size
    times = {
        "matrix products": flops / chip.peak,
        "scan": _scan_cycles(config, tokens, mesh.shape["context"])
        / mesh.size
        / chip.cores
        / chip.clock,
        "memory": hlo.traffic(text) / chip.bandwidth,
        "network": sum(exchanged.values()) / (chip.network / 2),
    }
    computing = times["matrix products"] + times["scan"]
    least = max(computing, times["network"])
    most = computing + times["memory"] + times["network"]
    return {
        "topology": topology,
        "devices": mesh.size,
        "device": kind,
        "mesh": dict(mesh.shape),
        "batch": [config.data.batch_size, config.data.sequence_length],
        "parameters": sum(x.size for x in jax.tree.leaves(program.abstract_state.params)),
        "compile_s": round(seconds, 1),
        "memory": {
            "arguments": arguments,
            "rest": needed - arguments,
            "needed": needed,
            "capacity": chip.memory,
            "fits": needed <= chip.memory,
        },
        "flops": flops,
        "received": exchanged,
        "seconds": times,
        "step_s": [least, most],
        "tokens_per_s": [tokens / most, tokens / least],
        "mfu": [flops / chip.peak / most, flops / chip.peak / least],
    }


def _scan_cycles(config: TrainConfig, tokens: int, pieces: int) -> float:
    """Of all scans of a step, whatever the devices; what is recomputed counts."""
    model = config.model
    layers = model.num_groups * sum(
        block.mixer in ("mamba", "bmojo", "bmojo_f") for block in model.blocks
    )
    # A cut row takes two scans, of which "kernels" keeps one.
    passes = 1 if pieces == 1 else 2
    again = {"none": 0, "kernels": passes - 1, "nested": 2 * passes}.get(model.remat, passes)
    bundles = SCAN_BUNDLES["forward"] * (passes + again) + SCAN_BUNDLES["backward"] * passes
    return layers * tokens * model.ssm_inner / 512 * bundles


def table(result: dict[str, Any]) -> str:
    """The report for people."""
    memory, gib = result["memory"], 2**30
    rows, length = result["batch"]
    cuts = " ".join(f"{axis}={size}" for axis, size in result["mesh"].items() if size > 1)
    lines = [
        f"{result['topology']}: {result['devices']} x {result['device']}, mesh {cuts or 'of one'}",
        f"step of {rows} x {length:,} tokens, {result['parameters'] / 1e6:,.0f} M parameters; "
        f"compiled in {result['compile_s']:.0f} s",
        "",
        f"memory of a device  {memory['arguments'] / gib:8.2f} GiB parameters, optimizer, batch",
        f"                    {memory['rest'] / gib:8.2f} GiB activations, gradients, program",
        f"                    {memory['needed'] / gib:8.2f} of {memory['capacity'] / gib:.0f} GiB: "
        + ("fits" if memory["fits"] else "DOES NOT FIT"),
        f"FLOPs of a device   {result['flops'] / 1e12:8.2f} T",
    ]
    for kind, received in result["received"].items():
        if received:
            lines.append(f"received  {kind:18}{received / 2**20:10,.0f} MiB")
    lines.append("")
    for name, seconds in result["seconds"].items():
        lines.append(f"{name:18}{seconds * 1e3:10.1f} ms")
    least, most = result["step_s"]
    slow, fast = result["tokens_per_s"]
    lines.append(
        f"{'step':18}{least * 1e3:10.1f} to {most * 1e3:.1f} ms: {slow:,.0f} to {fast:,.0f} "
        f"tokens/s, MFU {100 * result['mfu'][0]:.0f} to {100 * result['mfu'][1]:.0f} %"
    )
    return "\n".join(lines)


def advice(config: TrainConfig, devices: int) -> list[str]:
    """What would take less memory, the cheapest first."""
    found = []
    sizes = dataclasses.asdict(config.mesh)
    free = devices // math.prod(size for size in sizes.values() if size != -1)
    sizes = {axis: free if size == -1 else size for axis, size in sizes.items()}
    rows = config.data.batch_size // config.optim.accumulate
    cut = sizes["data"] * sizes["fsdp"]
    if sizes["data"] > 1:
        found.append(f"mesh.data=1 mesh.fsdp={cut}: parameters and optimizer are cut over all")
    if rows > cut and rows % (2 * cut) == 0:
        found.append(f"optim.accumulate={2 * config.optim.accumulate}: half the rows at a time")
    if config.model.remat not in ("full", "nested"):
        found.append('model.remat="full": keeps little more than a layer\'s input')
    elif config.model.remat == "full":
        found.append('model.remat="nested": keeps fewer layers\' inputs, one more forward pass')
    pieces = 2 * sizes["context"]
    if config.data.sequence_length % (pieces * config.model.chunk) == 0:
        found.append(f"mesh.context={pieces}: half of a row's tokens on a device")
    if config.vocab_chunk > 2048:
        found.append("vocab_chunk=2048: fewer logits at a time")
    return [*found, "a larger topology"]


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"not understood: {' '.join(argv[1:])}")
    values = flags.FLAGS
    jax.config.update("jax_platforms", "cpu")
    try:
        config = settings_module.from_config_dict(values.config)
    except (OSError, ValueError) as error:
        console.fail(error)
    try:
        result = report(config, values.topology)
    except ValueError as error:
        console.fail(error)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needed = str(error).splitlines()[0]
        hints = "\n  ".join(advice(config, len(topologies.devices(values.topology))))
        sys.exit(f"aot.py: does not fit: {needed}\nwould take less:\n  {hints}")
    print(table(result))
    if not result["memory"]["fits"]:
        print("would take less:\n  " + "\n  ".join(advice(config, result["devices"])))
    if values.output:
        record = {
            "command": " ".join(["python -m bmojo_jax.aot", *sys.argv[1:]]),
            "commit": values.commit,
            "jax": jax.__version__,
            "libtpu": importlib.metadata.version("libtpu"),
            "settings": to_dict(config),
        }
        path = pathlib.Path(values.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record | result, indent=1) + "\n")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "The settings of the run.")
    flags.DEFINE_string("topology", None, "Such as v5e:16x16: generation, and chips by axis.")
    flags.DEFINE_string("output", None, "JSON to write.")
    flags.DEFINE_string("commit", "", "Of the code that runs, for the record.")
    flags.mark_flags_as_required(["config", "topology"])
    app.run(main, flags_parser=console.parse_config_flags)
