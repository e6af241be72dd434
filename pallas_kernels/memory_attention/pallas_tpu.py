"""Attention over three memories for TPUs: Pallas lowered to Mosaic.

    o_i = sum_s p_is v_s          p_is = exp(l_is - lse_i)          lse_i = log sum_s exp(l_is)
    dl_is = p_is (do_i v_s - delta_i)          delta_i = o_i do_i - dlse_i
    dq_i = scale sum_s dl_is k_s       dk_s = scale sum_i dl_is q_i       dv_s = sum_i p_is do_i

One pass over the keys that a tile of queries sees, in-context, fading and eidetic, under one online
softmax; backward one kernel by queries (dq) and one by keys (dk and dv) for each stream, which
recompute the weights from lse. No atomics: every bit is the same in every run. Cost
O(L (W + F + M)), memory O(L); saved for the backward pass are o and lse. `tpu_tiles.py` has how the
grids follow the bands, `tpu_kernels.py` the bodies of the kernels.

Layout: the kernels read and write [B, heads, L, K], tokens padded to whole tiles. The memory of all
chunks is one list of Z M slots. What XLA copies for it, compiled for v5e and v6e at L8192 H16 G16
with the projections of q, k, v, rotary, and the projection of o around it:
* of what belongs to tokens nothing, forward and backward, if the projections write heads first,
  `einsum("BLD,DHK->BHLK").swapaxes(1, 2)`: the transposes are folded into the matrix products.
* written as [B, L, H, K] (`tensordot`), nothing on a v5e at K = 128. A v6e writes what rotary
  follows with tokens in lanes, and copies it (q, k and fading k, 96 MiB of the 208 that the forward
  kernel reads and writes); at K = 64 both copy q and all k and v (80 MiB of 104), a v5e also all
  their gradients. Blocks out of [B, L, H K] would not help: what rotary writes is tiled by head.
* the memory once, 16 MiB of the 208, and its gradient once.

Matrix products in the inputs' dtype with float32 accumulation; softmax, lse and sums in float32.
float32 products are exact to float32.

Limits: K of 32, 64, 128 or 256, float32 or bfloat16. Tiles are multiples of 128: chunks shorter
than a tile of queries pay for the memories of the whole tile. Query heads of a group read their
keys and values each for itself, forward and for dq: a tile of keys stays in VMEM from one tile of
queries to the next, not from head to head. At K = 128 that is 576 KiB for a tile of 512 queries;
with q and o it takes, meanwhile, a third of the time of the tile's bundles on a v5e, a fifth on a
v6e (by what they can do on paper). Sharing it would take a step for a whole group, with scratch
and blocks of q for all its heads.

Bundles of instructions (cycles, but for waiting for memory) per useful tile of 512 x 512 logits,
beside those of JAX's splash attention with a window of 1024 and its best blocks, as counted by
`python -m benchmarks.tpu_cycles --op memory_attention`; B1 L8192 H16 G16 K128, bfloat16,
W = F = 512, C = 256, libtpu 0.0.48.1:

|               | v4          | v5e         | v5p         | v6e         |
| forward, M 64 | 3265 : 3642 | 2239 : 2439 | 2436 : 2609 | 2224 : 2102 |
| forward,  M 0 | 2916 : 3642 | 2020 : 2439 | 2151 : 2609 | 1971 : 2102 |
| dq,      M 64 | 3286 : 3789 | 2570 : 2879 | 2834 : 3081 | 2156 : 2415 |
| dq,       M 0 | 2956 : 3789 | 2384 : 2879 | 2564 : 3081 | 1919 : 2415 |
| dk, dv,  M 64 | 4092 : 4961 | 3361 : 3775 | 3716 : 3991 | 2641 : 2897 |
| dk, dv,   M 0 | 3701 : 4961 | 3120 : 3775 | 3409 : 3991 | 2373 : 2897 |

Tried, bundles of a tile that a border cuts in half, forward on a v5e: masked as a whole 1170; in
strips of 128 rows without what is not seen, one after the other, 1120; all strips' products, then
all exponentials, then all products 740; the same, each strip a stage behind the one before, 910; in
strips of 256 rows 835.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels import dispatch
from pallas_kernels.blocks import choose
from pallas_kernels.dispatch import Unsupported
from pallas_kernels.memory_attention import tpu_tiles
from pallas_kernels.memory_attention.operands import (
    AttentionOutput,
    Eidetic,
    Fading,
    Operands,
    Spec,
)
from pallas_kernels.memory_attention.tpu_kernels import (
    LEAST,
    LOG2_E,
    forward_kernel,
    keys_kernel,
    queries_kernel,
)
from pallas_kernels.memory_attention.tpu_tiles import LANES, Plan, Stream

OP = "memory_attention/pallas_tpu"
WIDTHS = (32, 64, 128, 256)
_DTYPES = (jnp.float32, jnp.bfloat16)
# Queries and keys of a tile, of the forward pass, of dq and of dk and dv ("dkv").
TUNABLE: Mapping[str, tuple[int, ...]] = {
    f"{part}_{name}": (128, 256, 512, 1024)
    for part in ("forward", "dq", "dkv")
    for name in ("queries", "keys")
}
# Tiles of logits that are in VMEM at once, float32.
_TILES_AT_ONCE = {"forward": 4, "dq": 6, "dkv": 6}
_SPILLS = 2 * 2**20
_SUBLANES = 8
# Blocks of one number per query or key, and columns of scratch, at most.
_ROWS_OF_NUMBERS, _COLUMNS = 5, 4


def forward(operands: Operands, spec: Spec) -> AttentionOutput:
    x = operands
    _check(x)
    B, L, H, K = x.q_BLHK.shape
    sizes = _sizes(x, spec)
    plan = _plan(x, spec, sizes, "forward")
    Q, padded = plan.queries, plan.queries * plan.tiles
    out = _call(
        forward_kernel,
        _rows(x, plan, {"q": x.q_BLHK}) | _keys(x, spec, plan),
        {
            "o": jax.ShapeDtypeStruct((B, H, padded, K), x.q_BLHK.dtype),
            "lse": jax.ShapeDtypeStruct((B, H, 1, padded), jnp.float32),
        },
        {"top": _floats(Q, LANES), "total": _floats(Q, LANES), "sum": _floats(Q, K)}
        | _column_documents(x, Q),
        plan,
        _vmem_bytes(x, sizes, "forward"),
    )
    return AttentionOutput(
        out["o"][:, :, :L].swapaxes(1, 2), out["lse"][:, :, 0, :L].swapaxes(1, 2)
    )


def backward(
    operands: Operands, spec: Spec, out: AttentionOutput, d_out: AttentionOutput
) -> Operands:
    x = operands
    _check(x)
    B, L, H, K = x.q_BLHK.shape
    sizes = _sizes(x, spec)
    o_BLHK, do_BLHK = out.o_BLHK.astype(jnp.float32), d_out.o_BLHK.astype(jnp.float32)
    rows = {
        "q": x.q_BLHK,
        "do": d_out.o_BLHK.astype(x.q_BLHK.dtype),
        "lse": out.lse_BLH * LOG2_E,
        "delta": (o_BLHK * do_BLHK).sum(-1) - d_out.lse_BLH,
    }
    plan = _plan(x, spec, sizes, "dq")
    Q, padded = plan.queries, plan.queries * plan.tiles
    dq_BHLK = _call(
        queries_kernel,
        _rows(x, plan, rows) | _keys(x, spec, plan),
        {"dq": jax.ShapeDtypeStruct((B, H, padded, K), x.q_BLHK.dtype)},
        {"sum": _floats(Q, K), "column_lse": _floats(Q, LANES), "column_delta": _floats(Q, LANES)}
        | _column_documents(x, Q),
        plan,
        _vmem_bytes(x, sizes, "dq"),
    )["dq"]

    plan = _plan(x, spec, sizes, "dkv")
    inputs, vmem_bytes = _rows(x, plan, rows), _vmem_bytes(x, sizes, "dkv")

    def of_stream(stream: Stream) -> dict[str, Array]:
        S, count = stream.keys, stream.keys * stream.tiles
        keys = _keys(x, spec, dataclasses.replace(plan, streams=(stream,)))
        k = keys[f"{stream.name}k"]
        outputs = {name: jax.ShapeDtypeStruct(k.shape, k.dtype) for name in ("dk", "dv")}
        scratch = {"sum_k": _floats(S, K), "sum_v": _floats(S, K)} | _column_documents(x, S)
        if stream.memory:
            scratch |= {"column_tokens": _integers(S, LANES), "column_bias": _floats(S, LANES)}
            if x.eidetic is not None and x.eidetic.bias_BZHM is not None:
                outputs["dbias"] = jax.ShapeDtypeStruct((B, H, 1, count), jnp.float32)
                scratch["sum_bias"] = _floats(S, LANES)
        tiles = np.arange(stream.tiles)
        first, last = stream.query_tiles(tiles, plan.queries, plan.tiles)
        steps = max(1, int((last - first).max()) + 1)
        of_one = dataclasses.replace(plan, streams=(stream,), steps=steps)
        return _call(keys_kernel, inputs | keys, outputs, scratch, of_one, vmem_bytes)

    gradients = {stream.name: of_stream(stream) for stream in plan.streams}

    def tokens(name: str) -> tuple[Array, Array]:
        d = gradients[name]
        return d["dk"][:, :, :L].swapaxes(1, 2), d["dv"][:, :, :L].swapaxes(1, 2)

    fading = None if x.fading is None else Fading(*tokens("fading_"))
    eidetic = None
    if x.eidetic is not None:
        d = gradients["memory_"]
        Z, M, G = x.eidetic.k_BZMGK.shape[1:4]

        def slots(v_BGSK: Array) -> Array:
            return v_BGSK[:, :, : Z * M].reshape(B, G, Z, M, K).transpose(0, 2, 3, 1, 4)

        d_bias, bias = None, x.eidetic.bias_BZHM
        if bias is not None:
            d_bias = d["dbias"][:, :, 0, : Z * M].reshape(B, H, Z, M).swapaxes(1, 2)
            d_bias = d_bias.astype(bias.dtype)
        eidetic = Eidetic(slots(d["dk"]), slots(d["dv"]), cast(Array, None), d_bias)
    return Operands(dq_BHLK[:, :, :L].swapaxes(1, 2), *tokens(""), fading, eidetic, None)


def _floats(*shape: int) -> Any:
    return pltpu.VMEM(shape, jnp.float32)


def _integers(*shape: int) -> Any:
    return pltpu.VMEM(shape, jnp.int32)


def _column_documents(x: Operands, size: int) -> dict[str, Any]:
    return {} if x.segment_ids_BL is None else {"column_documents": _integers(size, LANES)}


def _check(x: Operands) -> None:
    dispatch.interpreted("tpu")
    if x.q_BLHK.dtype not in _DTYPES:
        raise Unsupported(f"{x.q_BLHK.dtype=} must be float32 or bfloat16")
    K = x.q_BLHK.shape[3]
    if K not in WIDTHS:
        raise Unsupported(f"{K=} must be one of {WIDTHS}")


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _sizes(x: Operands, spec: Spec) -> dict[str, int]:
    B, L, H, K = x.q_BLHK.shape
    M = 0 if x.eidetic is None else x.eidetic.k_BZMGK.shape[2]
    # More does not fit in the 16 MiB of a v4.
    most = 512 if K * x.q_BLHK.dtype.itemsize <= 512 else 256
    tile = min(most, _up(L, LANES))
    sizes = choose(
        OP,
        shape={
            "B": B, "L": L, "H": H, "G": x.k_BLGK.shape[2], "K": K,
            "W": spec.window, "F": spec.fading_window, "M": M, "C": spec.chunk,
        },
        dtype=x.q_BLHK.dtype,
        heuristic=dict.fromkeys(TUNABLE, tile),
        override=dict(spec.blocks),
    )  # fmt: skip
    for name, size in sizes.items():
        if size % LANES:
            raise ValueError(f"{OP}: blocks[{name!r}]={size} must be a multiple of {LANES}")
    if not dispatch.interpreted("tpu"):
        _check_vmem(x, sizes)
    return sizes


def _check_vmem(x: Operands, sizes: Mapping[str, int]) -> None:
    """Of all kernels: what the backward pass cannot take, the forward pass refuses already."""
    try:
        most = pltpu.get_tpu_info().vmem_capacity_bytes
    except ValueError:  # a kind of TPU that JAX does not know yet
        return
    for part in _TILES_AT_ONCE:
        need = _vmem_bytes(x, sizes, part)
        if need > most:
            queries, keys = (f"{part}_{name}" for name in ("queries", "keys"))
            raise Unsupported(
                f"blocks {queries}={sizes[queries]} and {keys}={sizes[keys]} need "
                f"{need / 2**20:.0f} MiB of VMEM, which must be at most {most / 2**20:.0f}"
            )


def _plan(x: Operands, spec: Spec, sizes: Mapping[str, int], part: str) -> Plan:
    L, H = x.q_BLHK.shape[1:3]
    W, F, C = spec.window, spec.fading_window, spec.chunk
    Q, S = sizes[f"{part}_queries"], sizes[f"{part}_keys"]
    # A border that no query reaches is put where no tile reaches it.
    far, fading_far = (age if age < L else L + Q + S for age in (W, W + F))
    streams = [Stream("", 0, far - 1, -(-L // S), S)]
    if x.fading is not None:
        streams.append(Stream("fading_", W, fading_far - 1, -(-L // S), S))
    if x.eidetic is not None:
        Z, M = x.eidetic.k_BZMGK.shape[1:3]
        # The slots that a tile of queries sees, if there is room for them.
        seen = min(-(-Q // C), Z) * M
        slots = min(_up(seen, LANES), S)
        streams.append(Stream("memory_", 0, C - 1, -(-Z * M // slots), slots, per=M, step=C))
    tiles = np.arange(-(-L // Q))
    steps = 1
    for stream in streams:
        first, last = stream.key_tiles(tiles, Q)
        steps = max(steps, int((last - first).max()) + 1)
    return Plan(
        tiles=len(tiles),
        queries=Q,
        group=H // x.k_BLGK.shape[2],
        scale=spec.scale * LOG2_E,
        exact=x.q_BLHK.dtype == jnp.float32,
        steps=steps,
        streams=tuple(streams),
    )


def _pad(v: Array, axis: int, size: int, fill: float = 0) -> Array:
    widths = [(0, 0)] * v.ndim
    widths[axis] = (0, size - v.shape[axis])
    return jnp.pad(v, widths, constant_values=fill)


def _rows(x: Operands, plan: Plan, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """What belongs to queries, by name: [B, L, H, K] as [B, H, L, K], [B, L, H] as [B, H, 1, L]."""
    padded = plan.tiles * plan.queries
    rows = {}
    for name, v in arrays.items():
        # Padding weighs nothing: exp2(l - 1e30) = 0.
        v = _pad(v.swapaxes(1, 2), 2, padded, -LEAST if name == "lse" else 0)
        rows[name] = v[:, :, None] if v.ndim == 3 else v
    if x.segment_ids_BL is not None:
        rows["query_documents"] = _pad(x.segment_ids_BL.astype(jnp.int32)[:, None], 2, padded)
    return rows


def _keys(x: Operands, spec: Spec, plan: Plan) -> dict[str, Array]:
    """What belongs to the keys of the plan's streams, by name; S counts keys with padding."""
    token_arrays = {"": (x.k_BLGK, x.v_BLGK)}
    if x.fading is not None:
        token_arrays["fading_"] = x.fading
    keys = {}
    for stream in plan.streams:
        count = stream.tiles * stream.keys

        def whole(v: Array, count: int = count, fill: float = 0) -> Array:
            return _pad(v, 2, count, fill)

        name, documents = stream.name, x.segment_ids_BL
        if not stream.memory:
            for kind, v_BLGK in zip("kv", token_arrays[name], strict=True):
                keys[name + kind] = whole(v_BLGK.swapaxes(1, 2))
            if documents is not None:
                keys[f"{name}documents"] = whole(documents.astype(jnp.int32)[:, None])
        elif x.eidetic is not None:
            B, Z, M, G, K = x.eidetic.k_BZMGK.shape
            for kind, v_BZMGK in zip("kv", x.eidetic[:2], strict=True):
                v_BGSK = v_BZMGK.transpose(0, 3, 1, 2, 4).reshape(B, G, Z * M, K)
                keys[name + kind] = whole(v_BGSK)
            bias_BHZM = jnp.zeros((1, 1, 1, 1), jnp.float32)
            if x.eidetic.bias_BZHM is not None:
                bias_BHZM = x.eidetic.bias_BZHM.astype(jnp.float32).swapaxes(1, 2) * LOG2_E
            bias_BHZM = jnp.where(x.eidetic.valid_BZM[:, None], bias_BHZM, LEAST)
            bias_BHS = bias_BHZM.reshape(B, -1, Z * M)
            keys["memory_bias"] = whole(bias_BHS, fill=LEAST)[:, :, None]
            tokens_S = jnp.repeat(jnp.arange(Z, dtype=jnp.int32) * spec.chunk, M)
            keys["memory_tokens"] = _pad(tokens_S[None], 1, count)
            if documents is not None:
                documents_BS = jnp.repeat(documents[:, :: spec.chunk], M, axis=1)
                keys["memory_documents"] = whole(documents_BS.astype(jnp.int32)[:, None])
    return keys


def _vmem_bytes(x: Operands, sizes: Mapping[str, int], part: str) -> int:
    """Every block twice, as the next one is on its way; scratch, and the tiles of logits."""
    Q, S = sizes[f"{part}_queries"], sizes[f"{part}_keys"]
    width = _up(x.q_BLHK.shape[3], LANES)
    streams = 1 + (x.fading is not None) + (x.eidetic is not None)
    # q and o, or q, do and dq, or q and do; k and v of all streams, or k, v, dk and dv of one.
    rows, keys = {"forward": (2, 2 * streams), "dq": (3, 2 * streams), "dkv": (2, 4)}[part]
    blocks = (rows * Q + keys * S) * width * x.q_BLHK.dtype.itemsize
    numbers = _ROWS_OF_NUMBERS * _SUBLANES * (Q + S) * 4
    scratch = S * 2 * width if part == "dkv" else Q * width
    scratch += _COLUMNS * LANES * (S if part == "dkv" else Q)
    return 2 * (blocks + numbers) + (scratch + _TILES_AT_ONCE[part] * Q * S) * 4 + _SPILLS


def _call(
    kernel: Any,
    inputs: Mapping[str, Array],
    outputs: Mapping[str, Any],
    scratch: Mapping[str, Any],
    plan: Plan,
    vmem_bytes: int,
) -> dict[str, Array]:
    """The kernel's outputs by name."""
    names = (*inputs, *outputs, *scratch)
    arrays = {**inputs, **outputs}
    by_keys = kernel is keys_kernel
    specs = (tpu_tiles.by_keys if by_keys else tpu_tiles.by_queries)(arrays, plan)
    interpret = dispatch.interpreted("tpu")
    B, H = inputs["q"].shape[:2]
    grid = (B, H, plan.tiles, plan.steps)
    if by_keys:
        grid = (B, H // plan.group, plan.streams[0].tiles, plan.group * plan.steps)
    call = pl.pallas_call(
        functools.partial(kernel, names=names, plan=plan),
        out_shape=tuple(outputs.values()),
        grid=grid,
        in_specs=[specs[name] for name in inputs],
        out_specs=tuple(specs[name] for name in outputs),
        scratch_shapes=list(scratch.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=vmem_bytes,
        ),
        name=f"memory_attention_{kernel.__name__}",
        interpret=interpret,
    )
    with jax.enable_x64(False):  # indices are 32 bit wide
        results = call(*inputs.values())
    return dict(zip(outputs, results, strict=True))
