"""Attention over three memories for NVIDIA's Hopper: Pallas lowered to Mosaic GPU (wgmma, TMA).

One pass over the keys that a tile of queries sees, in-context, fading and eidetic, under one online
softmax; backward two passes, one by queries (dq) and one by keys (dk and dv: both bands in one
kernel, the memories in another), which recompute the weights from lse. No atomics: results do not
depend on the order of blocks. Cost O(L (W + F + M)), memory O(L) beyond inputs and outputs. Nothing
is copied unless L is no multiple of 128 or M none of 64: then tokens or slots are padded.

Documents are told apart by comparing ids, of tiles that are not all of one document, of which the
least and the largest id are equal; a document's end skips none.

bfloat16 products with float32 accumulation; softmax, lse and sums in float32.

Reckoning, K = 128, W = F = 512, M = 64, on an H100 at 1.755 GHz (4096 operations a clock and
multiprocessor: 949 TFLOP/s). A warpgroup's tile is 64 x 64, so that a query's 1088 visible keys
cost 19 tiles, 1216 keys: 0.895 of the work is useful, backward 5/7 of that, since S and dP are
computed twice. Sums of dq over the blocks of keys instead would cost 10 float32 copies of dq
(0.45 ms at 8192 tokens, as long as everything else), or 2 of them with 8 blocks of keys walked by
one program, which leaves too few programs at 2048 tokens; gradients of logits in memory would take
0.35 GB at 8192 tokens.

Per tile of a warpgroup, of which two compute at a time and share the tensor cores:

|                          | forward | dq   | dk, dv |
|--------------------------|---------|------|--------|
| products                 | 2       | 3    | 4      |
| clocks of tensor cores   | 512     | 768  | 1024   |
| instructions issued      | 370     | 290  | 320    |
| of those exp2            | 33      | 32   | 32     |
| shared memory, KiB read  | 32      | 80   | 96     |
| accumulators, registers  | 64      | 64   | 128    |
| the block's memory, KiB  | 195     | 224  | 226    |

The two warpgroups' instructions, exponentials (8 clocks a warp) and reads (128 bytes a clock) each
take less than their products do, so the tensor cores are what binds, dq's reads (0.98 of their
time with the loads) next. If the tensor cores are busy for a share u of the time, that makes
849 u useful TFLOP/s forward and 607 u backward. At K = 64 clocks of tensor cores halve and those of
exponentials do not: forward they take as long as the products.

Measured on an H100 at B 1, H = G = 16, K 128, C 256, in one run beside the peers
(`results/kernels/attention.json`); runs differ by up to 5 %. ms, with useful TFLOP/s:

|                          | forward 8192 | 32,768      | backward 8192 | 32,768      |
|--------------------------|--------------|-------------|---------------|-------------|
| M 0                      | 0.170  (379) | 0.704 (384) | 0.557 (289)   | 2.269 (298) |
| M 64                     | 0.182  (377) | 0.683 (421) | 0.601 (286)   | 2.335 (308) |
| FlexAttention, M 0       | 0.278  (231) | 1.078 (251) | 0.766 (210)   | 3.147 (215) |
| cuDNN, two merged, M 0   | 0.332  (194) | 1.237 (219) | 0.967 (167)   | 3.735 (181) |
| cuDNN, one of W + F keys | 0.176  (366) | 0.647 (418) | 0.597 (270)   | 2.260 (299) |

K 64 in single runs of an earlier version, L 8192, M 0 and 64: forward 0.144 (224) and 0.165 (208),
backward 0.339 (237) and 0.375 (229).

The tensor cores were busy 42 % of the time forward, 47 % in the kernel by keys: a warpgroup waits
for its own softmax, whose instructions depend on each other, more than for anything else (stall
samples). What was found on the way:

* At K = 64, L 8192, M 0 a multiprocessor took some 880 clocks for a tile; its tensor cores need
  256 and its exponentials 264. The rest is waiting, which more warpgroups hide: with three to a
  block (`forward_workers`, 160 registers each, no spills) forward takes 0.112 instead of 0.131 ms,
  and 0.435 instead of 0.529 at 32,768 (311 instead of 256 useful TFLOP/s); at 2048 tokens the same
  (0.034), as blocks of 192 queries are too few. Not dq, which spills 112 bytes: backward 0.430
  instead of 0.334 at 8192, though 1.237 instead of 1.308 at 32,768. Longer rings or two slots make
  no difference. At K = 128 shared memory has no room for three.
* The last block of 192 queries reaches beyond the row, where copies of tiles load zeros and store
  nothing. Copies of contiguous numbers do: lse of a head's first 64 queries was at times what the
  head before had written there (seen at 2048 tokens), until each head's lse had room for that.
* One loop for each stream made the first tile of each a product that overlaps with nothing, and
  its code spilled registers with a memory: 0.217 ms forward at M = 64, 28 % above M = 0.
* Tiles of 128 keys spill registers: 0.33 ms forward.
* A ring of 3 tiles of queries for dk and dv is slower than one of 2: 0.41 against 0.35 ms.
* delta by XLA, transposed, took 0.045 ms backward (inferred from sums of parts), twice its bytes.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels import dispatch
from pallas_kernels.blocks import choose
from pallas_kernels.dispatch import Unsupported
from pallas_kernels.memory_attention.mosaic_kernels import forward_kernel, queries_kernel
from pallas_kernels.memory_attention.mosaic_keys import Keys, keys_kernel
from pallas_kernels.memory_attention.mosaic_tiles import (
    LEAST,
    LOG2_E,
    ROWS,
    WHOLE,
    Plan,
    Queries,
)
from pallas_kernels.memory_attention.operands import (
    AttentionOutput,
    Eidetic,
    Fading,
    Operands,
    Spec,
)
from pallas_kernels.memory_attention.triton_delta import delta

OP = "memory_attention/pallas_mosaic_gpu"
_WIDTHS = (64, 128)
_HOPPER = ("H100", "H200", "H800", "H20", "GH200")
# Multiprocessors of an H100 SXM or H200: as many blocks run at a time.
_PROCESSORS = 132
# Interpreted, fewer, so that each has several items.
_INTERPRETED_PROCESSORS = 2
# Of the forward pass, of dq and of dk and dv ("dkv"): warpgroups that compute in a block, keys of a
# tile, tiles in the ring of loads, and items whose own tiles are held at a time.
TUNABLE: Mapping[str, tuple[int, ...]] = {
    "forward_workers": (2, 3),
    "forward_keys": (64, 128),
    "forward_stages": (3, 4, 5, 6, 8),
    "forward_slots": (1, 2),
    "dq_workers": (2, 3),
    "dq_keys": (64, 128),
    "dq_stages": (3, 4, 6),
    "dq_slots": (1, 2),
    "dkv_stages": (2, 3, 4, 6),
    "dkv_slots": (1, 2),
}
_TRANSFORMS = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


def forward(operands: Operands, spec: Spec) -> AttentionOutput:
    x = operands
    _check(x, spec)
    sizes = _sizes(x, spec)
    plan = _plan(x, spec, sizes, "forward")
    inputs = _inputs(x, spec, plan)
    tile = _Tiles(plan, x.q_BLHK.dtype)
    scratch = {
        "q": tile(plan.slots, plan.block),
        "k": tile(plan.stages, plan.keys),
        "v": tile(plan.stages, plan.keys),
        "lse": plgpu.SMEM((plan.workers, ROWS), jnp.float32),
        "q_full": plgpu.Barrier(num_barriers=plan.slots),
        "k_full": plgpu.Barrier(num_barriers=plan.stages),
        "v_full": plgpu.Barrier(num_barriers=plan.stages),
        "q_free": plgpu.Barrier(num_barriers=plan.slots, num_arrivals=plan.workers),
        "k_free": plgpu.Barrier(num_barriers=plan.stages, num_arrivals=plan.workers),
        "v_free": plgpu.Barrier(num_barriers=plan.stages, num_arrivals=plan.workers),
    }
    outputs = {
        "o": _like(inputs["q"]),
        # Room for all of the last block: see `Queries.queries`.
        "lse": jax.ShapeDtypeStruct((plan.batch, plan.heads, plan.tiles * plan.block), jnp.float32),
    }
    out = _call(forward_kernel, inputs, outputs, scratch, plan, Queries.total(plan))
    L = plan.L
    return AttentionOutput(out["o"][:, :L], out["lse"][:, :, :L].swapaxes(1, 2))


def backward(
    operands: Operands, spec: Spec, out: AttentionOutput, d_out: AttentionOutput
) -> Operands:
    x = operands
    L = x.q_BLHK.shape[1]
    sizes = _sizes(x, spec)
    plan = _plan(x, spec, sizes, "dq")
    lse_BHL = out.lse_BLH.swapaxes(1, 2) * LOG2_E
    stats = jnp.stack([lse_BHL, delta(out.o_BLHK, d_out)], axis=2)
    inputs = _inputs(x, spec, plan) | {
        "do": _longer(d_out.o_BLHK.astype(x.q_BLHK.dtype), plan.length, axis=1),
        "stats": _longer(stats, plan.length, axis=3),
    }
    tile = _Tiles(plan, x.q_BLHK.dtype)
    scratch = {
        "q": tile(plan.slots, plan.block),
        "do": tile(plan.slots, plan.block),
        "k": tile(plan.stages, plan.keys),
        "v": tile(plan.stages, plan.keys),
        "q_full": plgpu.Barrier(num_barriers=plan.slots, num_arrivals=2),
        "k_full": plgpu.Barrier(num_barriers=plan.stages, num_arrivals=2),
        "q_free": plgpu.Barrier(num_barriers=plan.slots, num_arrivals=plan.workers),
        "k_free": plgpu.Barrier(num_barriers=plan.stages, num_arrivals=plan.workers),
    }
    outputs = {"dq": _like(inputs["q"])}
    d = _call(queries_kernel, inputs, outputs, scratch, plan, Queries.total(plan))

    by_keys = _plan(x, spec, sizes, "dkv")
    inputs |= _memories(x, spec, by_keys)
    d |= _by_keys(inputs, by_keys, memory=False)
    fading = eidetic = None
    if x.fading is not None:
        fading = Fading(d["dfading_k"][:, :L], d["dfading_v"][:, :L])
    if x.eidetic is not None:
        M, bias = x.eidetic.k_BZMGK.shape[2], x.eidetic.bias_BZHM
        d |= _by_keys(inputs, by_keys, memory=True)
        eidetic = Eidetic(
            d["dmemory_k"][:, :, :M],
            d["dmemory_v"][:, :, :M],
            cast(Array, None),
            None if bias is None else d["dbias"][..., :M].astype(bias.dtype),
        )
    return Operands(d["dq"][:, :L], d["dk"][:, :L], d["dv"][:, :L], fading, eidetic, None)


def _by_keys(inputs: Mapping[str, Array], plan: Plan, *, memory: bool) -> dict[str, Array]:
    """Gradients of the keys and values of the bands, or of the memories."""
    # A block of one warpgroup that computes where a memory is too small for two.
    if memory and plan.M % plan.block:
        plan = dataclasses.replace(plan, workers=1)
    if memory:  # dbias takes room, and a memory's queries are few
        plan = dataclasses.replace(plan, stages=min(plan.stages, 2))
    # The few memories of a short sequence are too little work for all: then by query heads.
    if memory and Keys.total(plan, memory=memory) < plan.processors:
        plan = dataclasses.replace(plan, summed=1)
    streams = [f"{s}{name}" for s in (["memory_"] if memory else plan.bands) for name in "kv"]
    told_by = "reads" if memory else "segments"
    read = ["q", "do", "stats", told_by, f"{told_by}_range", *streams, *["bias"] * memory]
    inputs = {name: v for name, v in inputs.items() if name in read}
    tile = _Tiles(plan, inputs["q"].dtype)
    scratch: dict[str, Any] = {
        "k": tile(plan.slots, plan.block),
        "v": tile(plan.slots, plan.block),
        "q": tile(plan.stages, ROWS),
        "do": tile(plan.stages, ROWS),
        "stats": plgpu.SMEM((plan.stages, 2, ROWS), jnp.float32),
        "k_full": plgpu.Barrier(num_barriers=plan.slots, num_arrivals=2),
        "q_full": plgpu.Barrier(num_barriers=plan.stages, num_arrivals=3),
        "k_free": plgpu.Barrier(num_barriers=plan.slots, num_arrivals=plan.workers),
        "q_free": plgpu.Barrier(num_barriers=plan.stages, num_arrivals=plan.workers),
    }
    outputs = {f"d{name}": _like(inputs[name]) for name in streams}
    if plan.summed < plan.group:
        outputs = {name: _of_heads(v, plan.heads) for name, v in outputs.items()}
    if memory:
        scratch["dbias"] = plgpu.SMEM((plan.workers, ROWS), jnp.float32)
        size = (plan.batch, plan.chunks, plan.heads, plan.M)
        outputs["dbias"] = jax.ShapeDtypeStruct(size, jnp.float32)
    total = Keys.total(plan, memory=memory)
    d = _call(keys_kernel, inputs, outputs, scratch, plan, total, memory=memory)
    if plan.summed < plan.group:
        for name in (f"d{name}" for name in streams):
            parts = d[name].reshape(*d[name].shape[:-2], -1, plan.group, plan.K)
            d[name] = parts.astype(jnp.float32).sum(-2).astype(parts.dtype)
    return d


def _check(x: Operands, spec: Spec) -> None:
    if not dispatch.interpreted("gpu"):
        kind = dispatch.device_kind()
        if not any(name in kind for name in _HOPPER):
            raise Unsupported(f"it is written for NVIDIA's Hopper, and this is {kind}")
    if x.q_BLHK.dtype != jnp.bfloat16:
        raise Unsupported(f"q.dtype={x.q_BLHK.dtype.name} must be bfloat16")
    K = x.q_BLHK.shape[3]
    if K not in _WIDTHS:
        raise Unsupported(f"{K=} must be one of {_WIDTHS}")
    if spec.scale <= 0:
        raise Unsupported(f"scale={spec.scale} must be positive")


def _sizes(x: Operands, spec: Spec) -> dict[str, int]:
    B, L, H, K = x.q_BLHK.shape
    M = 0 if x.eidetic is None else x.eidetic.k_BZMGK.shape[2]
    wide = K > 64
    # Three warpgroups hide more of what they wait for, where there are registers for them, queries
    # for many blocks, and no memories of other chunks in a warpgroup's way.
    three = not wide and L >= 1024 and (M == 0 or spec.chunk % ROWS == 0)
    sizes = choose(
        OP,
        shape={
            "B": B, "L": L, "H": H, "G": x.k_BLGK.shape[2], "K": K,
            "W": spec.window, "F": spec.fading_window, "M": M, "C": spec.chunk,
        },
        dtype=x.q_BLHK.dtype,
        heuristic={
            "forward_workers": 3 if three else 2,
            "forward_keys": 64,
            "forward_stages": 4 if wide else 6,
            "forward_slots": 2,
            "dq_workers": 2,
            "dq_keys": 64,
            "dq_stages": 4 if wide else 6,
            "dq_slots": 1 if wide else 2,
            "dkv_stages": 2 if wide else 4,
            "dkv_slots": 2,
        },
        override=dict(spec.blocks),
    )  # fmt: skip
    for name, size in sizes.items():
        if name.endswith(("keys", "workers")) and size not in TUNABLE[name]:
            raise ValueError(f"{OP}: blocks[{name!r}]={size} must be one of {TUNABLE[name]}")
    for part in ("forward", "dq"):
        # The ring holds the tile seen last, those that only other warpgroups see, and the next.
        name, least = f"{part}_stages", sizes[f"{part}_workers"] + 1
        if sizes[name] < least:
            raise ValueError(f"{OP}: blocks[{name!r}]={sizes[name]} must be at least {least}")
    return sizes


def _plan(x: Operands, spec: Spec, sizes: Mapping[str, int], part: str) -> Plan:
    B, L, H, K = x.q_BLHK.shape
    W, F = spec.window, spec.fading_window
    M = 0 if x.eidetic is None else x.eidetic.k_BZMGK.shape[2]
    keys = sizes.get(f"{part}_keys", ROWS)
    fading = {"fading_": (W, W + F - 1)} if x.fading is not None else {}
    return Plan(
        L=L,
        length=-(-L // WHOLE) * WHOLE,
        batch=B,
        heads=H,
        group=H // x.k_BLGK.shape[2],
        summed=H // x.k_BLGK.shape[2],
        K=K,
        workers=sizes.get(f"{part}_workers", 2),
        keys=keys,
        stages=sizes[f"{part}_stages"],
        slots=sizes[f"{part}_slots"],
        M=-(-M // keys) * keys,
        chunk=spec.chunk,
        chunks=-(-L // spec.chunk),
        scale=spec.scale * LOG2_E,
        bands=fading | {"": (0, W - 1)},
        processors=_INTERPRETED_PROCESSORS if dispatch.interpreted("gpu") else _PROCESSORS,
    )


def _inputs(x: Operands, spec: Spec, plan: Plan) -> dict[str, Array]:
    """What the kernels read, by name; tokens and slots padded to whole tiles."""
    inputs = {"q": x.q_BLHK, "k": x.k_BLGK, "v": x.v_BLGK}
    if x.fading is not None:
        inputs |= {"fading_k": x.fading.k_BLGK, "fading_v": x.fading.v_BLGK}
    if x.segment_ids_BL is not None:
        inputs["segments"] = x.segment_ids_BL.astype(jnp.int32)
        if x.eidetic is not None:
            first = jnp.arange(plan.L) // spec.chunk * spec.chunk
            owner = jnp.take(x.segment_ids_BL, first, axis=1)
            inputs["reads"] = (x.segment_ids_BL == owner).astype(jnp.int32)
    inputs = {name: _longer(v, plan.length, axis=1) for name, v in inputs.items()}
    for name in ("segments", "reads"):
        if name in inputs:
            tiles = inputs[name].reshape(-1, plan.length // ROWS, ROWS)
            inputs[f"{name}_range"] = jnp.stack([tiles.min(2), tiles.max(2)], axis=2)
    return inputs | _memories(x, spec, plan)


def _memories(x: Operands, spec: Spec, plan: Plan) -> dict[str, Array]:
    if x.eidetic is None:
        return {}
    bias_BZHM = x.eidetic.bias_BZHM
    bias = 0.0 if bias_BZHM is None else bias_BZHM.astype(jnp.float32) / spec.scale
    bias = jnp.where(x.eidetic.valid_BZM[:, :, None, :], bias, LEAST)
    return {
        "memory_k": _longer(x.eidetic.k_BZMGK, plan.M, axis=2),
        "memory_v": _longer(x.eidetic.v_BZMGK, plan.M, axis=2),
        "bias": _longer(bias, plan.M, axis=3, value=LEAST),
    }


def _longer(v: Array, size: int, *, axis: int, value: float = 0) -> Array:
    more = [(0, size - v.shape[axis] if i == axis else 0) for i in range(v.ndim)]
    return jnp.pad(v, more, constant_values=value) if size > v.shape[axis] else v


def _like(v: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(v.shape, v.dtype)


def _of_heads(v: jax.ShapeDtypeStruct, heads: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((*v.shape[:-2], heads, v.shape[-1]), v.dtype)


@dataclasses.dataclass(frozen=True)
class _Tiles:
    """Shared memory for tiles [rows, K], several of them, as the tensor cores read them."""

    plan: Plan
    dtype: Any

    def __call__(self, count: int, rows: int) -> Any:
        return plgpu.SMEM((count, rows, self.plan.K), self.dtype, transforms=_TRANSFORMS)


def _call(
    kernel: Any,
    inputs: Mapping[str, Array],
    outputs: Mapping[str, jax.ShapeDtypeStruct],
    scratch: dict[str, Any],
    plan: Plan,
    total: int,
    **options: bool,
) -> dict[str, Array]:
    interpret = None
    if dispatch.interpreted("gpu"):
        interpret = plgpu.InterpretGPUParams(detect_races=True)
        size = (plan.workers, ROWS, plan.keys)
        scratch["staging"] = plgpu.SMEM(size, inputs["q"].dtype, transforms=_TRANSFORMS)
    names = (*inputs, *outputs)

    def body(*refs: Any, **shared: Any) -> None:
        kernel(*refs, names=names, plan=plan, **options, **shared)

    call = plgpu.kernel(
        body,
        out_type=tuple(outputs.values()),
        scratch_types=scratch,
        grid=(min(plan.processors, total),),
        grid_names=("block",),
        num_threads=plan.workers + 1,
        thread_name="warpgroup",
        kernel_name=f"memory_attention_{kernel.__name__}",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )
    with jax.enable_x64(False):  # indices are 32 bit wide
        results = call(*inputs.values())
    return dict(zip(outputs, results, strict=True))
