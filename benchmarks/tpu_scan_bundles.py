"""What `tpu_cycles` counts of the selective scan: bundles per time step of 512 channels.

Counted is everything that runs for a chunk of one tile of channels: every loop by its trips, and
all that stands outside loops, conditional code included, once. Loops that run once per chunk, for
all tiles of channels, count by their share. Not counted are empty bundles, of which the dump does
not say in which loop they are: 0.4 % at most.

Three programs, each in two variants: "plain" without resets, "full" with resets. An initial state
and a gradient of the final state are part of both.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import tpu_bundles
from bmojo_jax import topologies
from pallas_kernels.selective_scan import pallas_tpu
from pallas_kernels.selective_scan import pallas_tpu_kernels as kernels
from pallas_kernels.selective_scan.operands import Operands, ScanOutput
from pallas_kernels.shapes import SCAN_CASES, ScanShape

CHIPS = ("v5e", "v5p", "v6e")
SHAPE = SCAN_CASES["b8_l2048_e4096"]
Program = Literal["forward", "forward_saving", "backward"]
PROGRAMS: tuple[Program, ...] = ("forward", "forward_saving", "backward")
VARIANTS = ("plain", "full")


class Goal(NamedTuple):
    """Bundles per time step of 512 channels, N = 16, bfloat16."""

    must: float
    aim: float


GOALS: Mapping[Program, Goal] = {
    "forward": Goal(30, 24),
    "forward_saving": Goal(30, 24),
    "backward": Goal(110, 80),
}
# Resets may cost this much more.
FULL_GOAL = 1.10


class Loop(NamedTuple):
    """A loop of a kernel, in program order: steps of time in one trip, and how often it runs."""

    name: str
    steps: int
    runs: Literal["tile", "chunk", "row"]


_SPREAD = Loop("spread", kernels.PACK, "chunk")
_FINISH = Loop("finish", kernels.PARALLEL_STEPS, "tile")
_FORWARD = (
    _SPREAD,
    Loop("prepare", kernels.PARALLEL_STEPS, "tile"),
    Loop("scan", kernels.TOGETHER * kernels.FORWARD_STEPS, "tile"),
    _FINISH,
)
LOOPS: Mapping[Program, tuple[Loop, ...]] = {
    "forward": _FORWARD,
    "forward_saving": _FORWARD,
    "backward": (
        _SPREAD,
        Loop("clear", 1, "row"),
        Loop("prepare", kernels.PACK, "tile"),
        Loop("recompute", kernels.TOGETHER * kernels.FORWARD_STEPS, "tile"),
        Loop("adjoint", kernels.TOGETHER * kernels.BACKWARD_STEPS, "tile"),
        _FINISH,
        Loop("sum_channels", kernels.SUBLANES, "chunk"),
    ),
}


class Count(NamedTuple):
    """All in bundles per time step of 512 channels, but vmem_mib."""

    total: float
    loops: dict[str, float]
    outside: float
    vmem_mib: float


Counts = Mapping[str, Mapping[str, Mapping[Program, Count]]]


def count(text: str, program: Program, *, C: int, Z: int, K: int, vmem_mib: float) -> Count:
    """Counts a `final_bundles.txt` of chunks of C steps, Z of them, and K tiles of channels.

    Depth 1 is the loop over the grid; what is around it runs once per call and is left out.
    """
    outside, inner = 0, []
    for bundle in tpu_bundles.parse(text):
        if bundle.depth == 1:
            outside += 1
        elif bundle.depth == 2:
            inner += [0] if bundle.starts else []
            inner[-1] += 1
        elif bundle.depth > 2:
            raise ValueError(f"{program}: a loop of {bundle.depth=}, which the count does not know")
    loops = LOOPS[program]
    if len(inner) != len(loops):
        names = [loop.name for loop in loops]
        raise ValueError(f"{program}: {len(inner)} loops where there should be {names}")
    units = kernels.TILE / 512
    share = {"tile": 1, "chunk": 1 / K, "row": 1 / (K * Z)}
    per_loop = {
        loop.name: bundles / loop.steps * share[loop.runs] / units
        for loop, bundles in zip(loops, inner, strict=True)
    }
    rest = outside / C / units
    return Count(sum(per_loop.values()) + rest, per_loop, rest, vmem_mib)


def _vmem_mib(jaxpr: Any) -> float:
    """The most that a kernel in it is allowed to take; compilation fails if it takes more."""
    limits = [
        eqn.params["compiler_params"].vmem_limit_bytes
        for eqn in jaxpr.eqns
        if eqn.primitive.name == "pallas_call"
    ]
    return max(limits) / 2**20


def programs(
    shape: ScanShape, variant: str, sharding: NamedSharding
) -> dict[Program, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Each program and its abstract arguments."""
    sizes = dataclasses.asdict(shape)

    def array(letters: str, dtype: Any = jnp.bfloat16) -> Any:
        dims = tuple(sizes[letter] for letter in letters)
        return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)

    operands = Operands(
        x_BLE=array("BLE"),
        dt_BLE=array("BLE"),
        a_EN=array("EN", jnp.float32),
        b_BLN=array("BLN"),
        c_BLN=array("BLN"),
        d_E=array("E", jnp.float32),
        z_BLE=array("BLE"),
        dt_bias_E=array("E", jnp.float32),
        reset_BL=array("BL", jnp.bool_) if variant == "full" else None,
        h0_BEN=array("BEN", jnp.float32),
    )
    d_out = ScanOutput(array("BLE"), array("BEN", jnp.float32))

    def forward(operands: Operands) -> Any:
        return pallas_tpu.forward(operands, {}, for_backward=False)[0]

    def forward_saving(operands: Operands) -> Any:
        out, residuals = pallas_tpu.forward(operands, {}, for_backward=True)
        return out, residuals[1]

    def backward(operands: Operands, first: Any, d_out: ScanOutput) -> Any:
        return pallas_tpu.backward((operands, first), d_out, {})

    saved = jax.eval_shape(forward_saving, operands)[1]
    first = jax.ShapeDtypeStruct(saved.shape, saved.dtype, sharding=sharding)
    return {
        "forward": (forward, (operands,)),
        "forward_saving": (forward_saving, (operands,)),
        "backward": (backward, (operands, first, d_out)),
    }


def measure(chip: str, dump: pathlib.Path) -> dict[str, dict[Program, Count]]:
    """Compiles everything for one chip: {variant: {program: count}}."""
    devices = topologies.devices(tpu_bundles.TOPOLOGIES[chip])[:1]
    mesh = Mesh(np.array(devices), ("one",))
    counts: dict[str, dict[Program, Count]] = {}
    for variant in VARIANTS:
        counts[variant] = {}
        with topologies.compiling_for(devices):
            todo = programs(SHAPE, variant, NamedSharding(mesh, PartitionSpec()))
        for name, (function, arguments) in todo.items():
            with topologies.compiling_for(devices):
                traced = jax.jit(function).trace(*arguments)
            C = pallas_tpu.default_chunk(SHAPE.N)
            counts[variant][name] = count(
                tpu_bundles.of_kernel(traced, "selective_scan", dump),
                name,
                C=C,
                Z=-(-SHAPE.L // C),
                K=-(-SHAPE.E // kernels.TILE),
                vmem_mib=_vmem_mib(traced.jaxpr),
            )
    return counts


def table(counts: Counts) -> str:
    lines = ["program         variant" + "".join(f"{chip:>8}" for chip in counts) + "   must / aim"]
    for program in PROGRAMS:
        for variant in VARIANTS:
            totals = [chip[variant][program].total for chip in counts.values()]
            goal = GOALS[program]
            more = FULL_GOAL if variant == "full" else 1
            lines.append(
                f"{program:15} {variant:7}"
                + "".join(f"{total:8.1f}" for total in totals)
                + f"   {goal.must * more:.4g} / {goal.aim * more:.4g}"
            )
    return "\n".join(lines)


def record(counts: Counts) -> dict[str, Any]:
    return {
        "unit": "static bundles per time step of 512 channels; bfloat16 in and out",
        "shape": dataclasses.asdict(SHAPE),
        "goals": {program: goal._asdict() for program, goal in GOALS.items()},
        "counts": {
            chip: {
                variant: {program: c._asdict() for program, c in by_program.items()}
                for variant, by_program in by_variant.items()
            }
            for chip, by_variant in counts.items()
        },
    }
