"""Attention over three memories for NVIDIA GPUs: Pallas lowered to Triton.

One pass over the keys that a tile of queries sees, in-context, fading and eidetic, under one online
softmax; backward two passes, one by queries (dq) and one by keys (dk and dv: the in-context keys,
the fading keys and the memories), which recompute the weights from lse. No atomics: results do not
depend on the order of programs. Cost O(L (W + F + M)), memory O(L) beyond inputs and outputs: lse
and delta. Arrays stay [B, L, heads, K]; nothing is copied, unless K is not 32, 64, 128 or 256: then
heads are padded to the next of these.

Matrix products in the inputs' dtype with float32 accumulation; softmax, lse and sums in float32.
float32 products are exact to float32, not TF32.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

from pallas_kernels import dispatch
from pallas_kernels.blocks import choose
from pallas_kernels.dispatch import Unsupported
from pallas_kernels.memory_attention.operands import (
    AttentionOutput,
    Eidetic,
    Fading,
    Operands,
    Spec,
)
from pallas_kernels.memory_attention.triton_delta import delta
from pallas_kernels.memory_attention.triton_kernels import (
    LEAST,
    LOG2_E,
    Plan,
    forward_kernel,
    keys_kernel,
    memory_kernel,
    queries_kernel,
)

OP = "memory_attention/pallas_triton"
_WIDTHS = (32, 64, 128, 256)
_DTYPES = (jnp.float32, jnp.bfloat16)
# Of the forward pass, of dq ("queries") and of dk and dv ("keys"): queries and keys of a tile,
# warps, and stages of the pipeline of loads.
TUNABLE: Mapping[str, tuple[int, ...]] = {
    f"{part}_{name}": sizes
    for part in ("forward", "dq", "dkv")
    for name, sizes in {
        "queries": (32, 64, 128),
        "keys": (32, 64, 128),
        "warps": (4, 8),
        "stages": (1, 2, 3, 4),
    }.items()
}
_LEAST_TILE = 16


def forward(operands: Operands, spec: Spec) -> AttentionOutput:
    _check(operands)
    x = _padded(operands)
    q, K = x.q_BLHK, operands.q_BLHK.shape[3]
    B, L, H, _ = q.shape
    sizes = _sizes(x, spec)
    plan, inputs = _plan(x, spec, sizes, "forward"), _inputs(x)
    outputs = {
        "o": jax.ShapeDtypeStruct(q.shape, q.dtype),
        "lse": jax.ShapeDtypeStruct((B, H, L), jnp.float32),
    }
    out = _call(forward_kernel, inputs, outputs, plan, sizes, "forward", -(-L // plan.queries), H)
    return AttentionOutput(out["o"][..., :K], out["lse"].swapaxes(1, 2))


def backward(
    operands: Operands, spec: Spec, out: AttentionOutput, d_out: AttentionOutput
) -> Operands:
    x = _padded(operands)
    L, H = x.q_BLHK.shape[1:3]
    G = x.k_BLGK.shape[2]
    sizes = _sizes(x, spec)
    rows = {
        "do": _wide(d_out.o_BLHK.astype(x.q_BLHK.dtype)),
        "lse": out.lse_BLH.swapaxes(1, 2),
        "delta": delta(out.o_BLHK, d_out),
    }
    inputs = _inputs(x) | rows
    plan = _plan(x, spec, sizes, "dq")
    dq = _call(
        queries_kernel,
        inputs,
        {"dq": jax.ShapeDtypeStruct(x.q_BLHK.shape, x.q_BLHK.dtype)},
        plan,
        sizes,
        "dq",
        -(-L // plan.queries),
        H,
    )["dq"]

    plan = _plan(x, spec, sizes, "dkv")
    shared = {n: v for n, v in inputs.items() if n in ("q", "segments", *rows)}

    def of_band(name: str, k: Array, v: Array) -> tuple[Array, Array]:
        band = dataclasses.replace(plan, bands={"": plan.bands[name]})
        d = _call(
            keys_kernel,
            shared | {"k": k, "v": v},
            {"dk": jax.ShapeDtypeStruct(k.shape, k.dtype), "dv": _like(v)},
            band,
            sizes,
            "dkv",
            -(-L // plan.keys),
            G,
        )
        return d["dk"], d["dv"]

    dk, dv = of_band("", x.k_BLGK, x.v_BLGK)
    fading = None if x.fading is None else Fading(*of_band("fading_", *x.fading))
    eidetic = None
    if x.eidetic is not None:
        B, Z, M, _, _ = x.eidetic.k_BZMGK.shape
        memory = {n: inputs[n] for n in ("memory_k", "memory_v", "bias")}
        d = _call(
            memory_kernel,
            shared | memory,
            {
                "dk": _like(x.eidetic.k_BZMGK),
                "dv": _like(x.eidetic.v_BZMGK),
                "dbias": jax.ShapeDtypeStruct((B, Z, H, M), jnp.float32),
            },
            plan,
            sizes,
            "dkv",
            Z * -(-M // plan.slots),
            G,
        )
        bias = x.eidetic.bias_BZHM
        d_bias = None if bias is None else d["dbias"].astype(bias.dtype)
        eidetic = Eidetic(d["dk"], d["dv"], cast(Array, None), d_bias)
    gradients = Operands(dq, dk, dv, fading, eidetic, None)
    K = operands.q_BLHK.shape[3]
    bias = None if eidetic is None else eidetic.bias_BZHM
    cut = jax.tree.map(lambda d: d[..., :K], gradients)
    return cut if bias is None else cut._replace(eidetic=cut.eidetic._replace(bias_BZHM=bias))


def _padded(x: Operands) -> Operands:
    """Heads as wide as the kernels take them."""
    fading = None if x.fading is None else Fading(*map(_wide, x.fading))
    eidetic = x.eidetic
    if eidetic is not None:
        wide = {n: _wide(getattr(eidetic, n)) for n in ("k_BZMGK", "v_BZMGK")}
        eidetic = eidetic._replace(**wide)
    return x._replace(
        q_BLHK=_wide(x.q_BLHK),
        k_BLGK=_wide(x.k_BLGK),
        v_BLGK=_wide(x.v_BLGK),
        fading=fading,
        eidetic=eidetic,
    )


def _wide(v: Array) -> Array:
    K = v.shape[-1]
    width = next(width for width in _WIDTHS if width >= K)
    return jnp.pad(v, [(0, 0)] * (v.ndim - 1) + [(0, width - K)]) if width > K else v


def _like(v: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(v.shape, v.dtype)


def _check(x: Operands) -> None:
    if not dispatch.interpreted("gpu") and "NVIDIA" not in dispatch.device_kind():
        raise Unsupported(f"it is written for NVIDIA's GPUs, and this is {dispatch.device_kind()}")
    if x.q_BLHK.dtype not in _DTYPES:
        raise Unsupported(f"q.dtype={x.q_BLHK.dtype.name} must be float32 or bfloat16")
    K = x.q_BLHK.shape[3]
    if K > _WIDTHS[-1]:
        raise Unsupported(f"{K=} must be at most {_WIDTHS[-1]}")


def _sizes(x: Operands, spec: Spec) -> dict[str, int]:
    B, L, H, K = x.q_BLHK.shape
    wide = K > 128
    M = 0 if x.eidetic is None else x.eidetic.k_BZMGK.shape[2]
    sizes = choose(
        OP,
        shape={
            "B": B, "L": L, "H": H, "G": x.k_BLGK.shape[2], "K": K,
            "W": spec.window, "F": spec.fading_window, "M": M, "C": spec.chunk,
        },
        dtype=x.q_BLHK.dtype,
        heuristic={
            "forward_queries": 64 if wide else 128,
            "forward_keys": 64,
            "forward_warps": 4 if wide else 8,
            "forward_stages": 2 if wide else 3,
            "dq_queries": 64 if wide else 128,
            "dq_keys": 32 if wide else 64,
            "dq_warps": 4 if wide else 8,
            "dq_stages": 2,
            "dkv_queries": 32 if wide else 64,
            "dkv_keys": 64 if wide else 128,
            "dkv_warps": 4 if wide else 8,
            "dkv_stages": 2,
        },
        override=dict(spec.blocks),
    )  # fmt: skip
    for name, size in sizes.items():
        tile = name.endswith(("queries", "keys"))
        if tile and (size < _LEAST_TILE or size & (size - 1)):
            raise ValueError(
                f"{OP}: blocks[{name!r}]={size} must be a power of two from {_LEAST_TILE} on"
            )
    return sizes


def _plan(x: Operands, spec: Spec, sizes: Mapping[str, int], part: str) -> Plan:
    L, H, K = x.q_BLHK.shape[1:]
    M = 0 if x.eidetic is None else x.eidetic.k_BZMGK.shape[2]
    W, F = spec.window, spec.fading_window
    keys = sizes[f"{part}_keys"]
    return Plan(
        L=L,
        group=H // x.k_BLGK.shape[2],
        K=K,
        queries=sizes[f"{part}_queries"],
        keys=keys,
        slots=max(_LEAST_TILE, min(keys, 1 << (M - 1).bit_length())) if M else 0,
        M=M,
        chunk=spec.chunk,
        scale=spec.scale * LOG2_E,
        bands={"": (0, W - 1)} | ({"fading_": (W, W + F - 1)} if x.fading is not None else {}),
        exact=x.q_BLHK.dtype == jnp.float32,
    )


def _inputs(x: Operands) -> dict[str, Array]:
    """What the kernels read, by name."""
    inputs = {"q": x.q_BLHK, "k": x.k_BLGK, "v": x.v_BLGK}
    if x.fading is not None:
        inputs |= {"fading_k": x.fading.k_BLGK, "fading_v": x.fading.v_BLGK}
    if x.eidetic is not None:
        bias_BZHM = x.eidetic.bias_BZHM
        valid = x.eidetic.valid_BZM[:, :, None, :]
        bias = 0.0 if bias_BZHM is None else bias_BZHM.astype(jnp.float32) * LOG2_E
        inputs |= {
            "memory_k": x.eidetic.k_BZMGK,
            "memory_v": x.eidetic.v_BZMGK,
            "bias": jnp.where(valid, bias, LEAST),
        }
    if x.segment_ids_BL is not None:
        inputs["segments"] = x.segment_ids_BL.astype(jnp.int32)
    return inputs


def _call(
    kernel: Any,
    inputs: Mapping[str, Array],
    outputs: Mapping[str, Any],
    plan: Plan,
    sizes: Mapping[str, int],
    part: str,
    tiles: int,
    heads: int,
) -> dict[str, Array]:
    names = (*inputs, *outputs)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    call = pl.pallas_call(
        functools.partial(kernel, names=names, plan=plan),
        out_shape=tuple(outputs.values()),
        grid=(tiles, heads, inputs["q"].shape[0]),
        in_specs=[anywhere] * len(inputs),
        out_specs=tuple([anywhere] * len(outputs)),
        compiler_params=plgpu.CompilerParams(
            num_warps=sizes[f"{part}_warps"], num_stages=sizes[f"{part}_stages"]
        ),
        name=f"memory_attention_{kernel.__name__}",
        interpret=dispatch.interpreted("gpu"),
    )
    with jax.enable_x64(False):  # indices are 32 bit wide
        results = call(*inputs.values())
    return dict(zip(outputs, results, strict=True))
