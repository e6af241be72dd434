"""What `tpu_cycles` counts of the memory attention: bundles per useful tile of 512 x 512 logits,
beside those of JAX's own splash attention with a window of as many keys.

Counted is all that runs in a kernel for one step of its grid, what is conditional (a tile inside a
band, or cut by a border, the start and the end of a row of tiles) by the share of the steps where
it runs, which is found by going through the whole grid (`tpu_branches`). Times the steps, this is
what all kernels of a pass run; divided by the logits that are visible, it is comparable between
kernels that tile and mask differently. Visible are, besides the windows, all M memories of a
query's chunk, be they filled or not.

Not counted: waiting for memory, the one or two more passes of the loop over the grid in which the
first blocks come and the last ones go, and what XLA does around the kernels: transposes, padding,
delta = sum o do. A chip with two cores shares our grids between them, and not splash attention's
dk and dv: that is not in the counts either.

Splash attention: forward without the log-sum-exp that ours always writes; dq and dk, dv by a kernel
each; of every kernel the best blocks of `BLOCKS`. Its kernel for all three gradients goes through
all L^2 / 512^2 tiles, and takes more (v5e 8083 bundles for 6654). Its other layouts, with tokens in
lanes, take at most 6 % less, and transposes around it.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import tpu_bundles
from benchmarks.tpu_branches import Kernel, kernels, of_branches
from bmojo_jax import topologies
from pallas_kernels.memory_attention import pallas_tpu
from pallas_kernels.memory_attention.operands import (
    AttentionOutput,
    Eidetic,
    Fading,
    Operands,
    Spec,
)
from pallas_kernels.shapes import ATTENTION_CASES, AttentionShape

CHIPS = tuple(tpu_bundles.TOPOLOGIES)
Pass = Literal["forward", "dq", "dkv", "backward"]
PASSES: tuple[Pass, ...] = ("forward", "dq", "dkv", "backward")
# Bundles of ours to those of splash attention.
GOAL = 1.15
_TILE = 512 * 512
# Bundles after a branch that run even if it is taken.
_LATE = {"v4": 1, "v5e": 4, "v5p": 4, "v6e": 4}
_STREAMS = ("window", "fading", "memories")


def _cases() -> dict[str, AttentionShape]:
    names = ("b1_l8192_g16_k128", "b1_l8192_g16_k64", "b1_l8192_g4_k128")
    found = {name: ATTENTION_CASES[name] for name in names}
    without = {f"{name}_m0": dataclasses.replace(found[name], eidetic=0) for name in names[:2]}
    return found | without


CASES: Mapping[str, AttentionShape] = _cases()


class Blocks(NamedTuple):
    """Of splash attention: queries and keys of a block, and keys that are handled at once."""

    queries: int
    keys: int
    at_once: int


# Of all of 256, 512 and 1024, these are best for some pass on some chip.
BLOCKS = (
    Blocks(512, 512, 512),
    Blocks(512, 512, 256),
    Blocks(1024, 1024, 1024),
    Blocks(1024, 1024, 512),
)


class Count(NamedTuple):
    """Bundles per useful tile; of dk and dv also those of each stream's kernel."""

    ours: float
    splash: float
    ratio: float
    streams: dict[str, float]
    splash_blocks: Blocks | None


Counts = Mapping[str, Mapping[str, Mapping[Pass, Count]]]


def visible(shape: AttentionShape) -> int:
    """Logits of one head and row."""
    seen_L = np.minimum(np.arange(shape.L) + 1, shape.window + shape.fading_window) + shape.eidetic
    return int(seen_L.sum())


def per_step(text: str, chip: str, shares: Sequence[float]) -> float:
    """Of a `final_bundles.txt`, of whose conditions these shares hold: the bundles of a step.

    The one loop is over the grid. Conditional is what a branch forward can jump over. Outermost are
    the stages of the loop, which run for every step; in one of them are the kernel's conditions.
    """
    bundles, late = tpu_bundles.parse(text), _LATE[chip]
    starts = {region: i for i, bundle in enumerate(bundles) for region in bundle.regions}
    branches = [
        (i, starts[bundle.target])
        for i, bundle in enumerate(bundles)
        # The others are around the loop.
        if bundle.target in starts
    ]
    back = [(i, target) for i, target in branches if target <= i]
    if len(back) != 1:
        raise ValueError(f"{len(back)} loops, where there should be one, over the grid")
    ((end, begin),) = back
    weights = np.zeros(len(bundles))
    weights[begin : end + late + 1] = 1
    bodies = [range(i + late + 1, target) for i, target in branches if begin <= i < target]
    conditions = [
        body for body in bodies if any(body[0] in other for other in bodies if other is not body)
    ]
    for body, share in zip(conditions, of_branches(shares, len(conditions)), strict=True):
        weights[body.start : body.stop] = share
    return float(weights.sum())


def _compiled(kernel: Kernel, sharding: NamedSharding, dump: pathlib.Path) -> str:
    """The bundles of the kernel alone."""

    def row_major(v: Any) -> Format:
        return Format(Layout(tuple(range(v.aval.ndim))), sharding)

    def attention_kernel(*operands: Any) -> Any:
        return tuple(kernel.eqn.primitive.bind(*operands, **kernel.eqn.params))

    formats = [tuple(map(row_major, vs)) for vs in (kernel.eqn.invars, kernel.eqn.outvars)]
    traced = jax.jit(attention_kernel, in_shardings=formats[0], out_shardings=formats[1]).trace(
        *(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in kernel.eqn.invars)
    )
    return tpu_bundles.of_kernel(traced, "attention_kernel", dump)


def _array(*sizes: int, dtype: Any = jnp.bfloat16) -> Any:
    return jax.ShapeDtypeStruct(sizes, dtype)


def _ours(shape: AttentionShape) -> dict[Pass, list[Kernel]]:
    B, L, H, G, K = shape.B, shape.L, shape.H, shape.G, shape.K
    M, C = shape.eidetic, shape.chunk if shape.eidetic else shape.L
    Z = L // C
    k_BLGK = _array(B, L, G, K)
    k_BZMGK, eidetic = _array(B, Z, M, G, K), None
    if M:
        eidetic = Eidetic(k_BZMGK, k_BZMGK, _array(B, Z, M, dtype=jnp.bool_), None)
    operands = Operands(
        _array(B, L, H, K), k_BLGK, k_BLGK, Fading(k_BLGK, k_BLGK), eidetic, segment_ids_BL=None
    )
    spec = Spec(
        window=shape.window, fading_window=shape.fading_window, chunk=C, scale=1 / math.sqrt(K)
    )
    out = AttentionOutput(_array(B, L, H, K), _array(B, L, H, dtype=jnp.float32))

    def backward(operands: Operands, out: AttentionOutput, d_out: AttentionOutput) -> Operands:
        return pallas_tpu.backward(operands, spec, out, d_out)

    forward = kernels(lambda operands: pallas_tpu.forward(operands, spec), operands)
    dq, *dkv = kernels(backward, operands, out, out)
    return {"forward": forward, "dq": [dq], "dkv": dkv}


@functools.cache
def _splash(shape: AttentionShape, blocks: Blocks) -> dict[Pass, Kernel]:
    S = shape.window + shape.fading_window
    mask = splash_attention.LocalMask((shape.L, shape.L), (S - 1, 0), 0)
    attention = splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([mask] * shape.H),
        block_sizes=splash_attention.BlockSizes(*blocks, *blocks, *blocks[:2]),
        head_shards=1,
        q_seq_shards=1,
    )
    q_HLK = _array(shape.H, shape.L, shape.K)
    k_GLK = _array(shape.G, shape.L, shape.K)

    def backward(q_HLK: Any, k_GLK: Any, v_GLK: Any, do_HLK: Any) -> Any:
        return jax.vjp(attention, q_HLK, k_GLK, v_GLK)[1](do_HLK)

    (forward,) = kernels(attention, q_HLK, k_GLK, k_GLK)
    _, dkv, dq = kernels(backward, q_HLK, k_GLK, k_GLK, q_HLK)
    found: dict[Pass, Kernel] = {"forward": forward, "dkv": dkv}
    # All of a block's keys are handled at once.
    return found | {"dq": dq} if blocks.at_once == blocks.keys else found


def measure(chip: str, dump: pathlib.Path) -> dict[str, dict[Pass, Count]]:
    """Compiles everything for one chip: {case: {pass: count}}."""
    devices = topologies.devices(tpu_bundles.TOPOLOGIES[chip])[:1]
    sharding = NamedSharding(Mesh(np.array(devices), ("one",)), PartitionSpec())

    def cost(kernel: Kernel, shape: AttentionShape) -> float:
        steps = per_step(_compiled(kernel, sharding, dump), chip, kernel.shares)
        return steps * math.prod(kernel.grid) / (shape.B * shape.H * visible(shape) / _TILE)

    @functools.cache
    def of_splash(shape: AttentionShape) -> dict[Pass, tuple[float, Blocks]]:
        costs: dict[Pass, list[tuple[float, Blocks]]] = {}
        for blocks in BLOCKS:
            for name, kernel in _splash(shape, blocks).items():
                costs.setdefault(name, []).append((cost(kernel, shape), blocks))
        return {name: min(of_pass) for name, of_pass in costs.items()}

    def counts(shape: AttentionShape) -> dict[Pass, Count]:
        with topologies.compiling_for(devices):
            of_ours = _ours(shape)
        peers = of_splash(dataclasses.replace(shape, eidetic=0))
        found: dict[Pass, Count] = {}
        for name, of_pass in of_ours.items():
            parts = [cost(kernel, shape) for kernel in of_pass]
            ours, (splash, blocks) = sum(parts), peers[name]
            streams = dict(zip(_STREAMS, parts, strict=False)) if name == "dkv" else {}
            found[name] = Count(ours, splash, ours / splash, streams, blocks)
        ours = found["dq"].ours + found["dkv"].ours
        splash = found["dq"].splash + found["dkv"].splash
        return found | {"backward": Count(ours, splash, ours / splash, {}, None)}

    return {case: counts(shape) for case, shape in CASES.items()}


def table(counts: Counts) -> str:
    """Ours : splash attention's = ratio."""
    lines = [" " * 29 + "".join(f"{chip:^21}" for chip in counts)]
    for name in PASSES:
        for case in CASES:
            found = [chip[case][name] for chip in counts.values()]
            lines.append(
                f"{name:8} {case:20}"
                + "".join(f"{c.ours:6.0f} : {c.splash:4.0f} ={c.ratio:5.2f} " for c in found)
            )
    return "\n".join([*lines, f"goal: a ratio of {GOAL}"])


def record(counts: Counts) -> dict[str, Any]:
    return {
        "unit": "static bundles per useful tile of 512 x 512 logits; bfloat16",
        "shapes": {case: dataclasses.asdict(shape) for case, shape in CASES.items()},
        "goal": GOAL,
        "counts": {
            chip: {
                case: {name: c._asdict() for name, c in by_pass.items()}
                for case, by_pass in by_case.items()
            }
            for chip, by_case in counts.items()
        },
    }
