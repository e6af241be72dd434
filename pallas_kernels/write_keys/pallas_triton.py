"""One new token's keys and values into rings, for NVIDIA GPUs: Pallas lowered to Triton.

A decoding step is bound by the number of its kernels. XLA makes some nine of this in a layer with
two rings (a sum for each norm, what lies in the slots, a write for each array, by count in what it
compiles for an H100); here a program has one head of one row, in all rings, which are written in
place. Not measured yet.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

from pallas_kernels import dispatch
from pallas_kernels.dispatch import Unsupported

Pair = tuple[Array, Array]
_DTYPES = (jnp.float32, jnp.bfloat16)


def write_keys(
    rings: Sequence[Pair],
    keys_values: Sequence[Pair],
    time_BL: Array,
    real_BL: Array,
    scale_K: Array | None,
    eps: float,
) -> list[Pair]:
    if not dispatch.interpreted("gpu") and "NVIDIA" not in dispatch.device_kind():
        raise Unsupported(f"it is written for NVIDIA's GPUs, and this is {dispatch.device_kind()}")
    (B, L), (G, K) = time_BL.shape, rings[0][0].shape[2:]
    if L != 1:
        raise Unsupported(f"{L=} new tokens must be 1")
    if K & (K - 1) or not 32 <= K <= 256:
        raise Unsupported(f"{K=} must be 32, 64, 128 or 256")
    buffers = [buffer for ring in rings for buffer in ring]
    new = [values[:, 0] for pair in keys_values for values in pair]
    for array in (*buffers, *new):
        if array.dtype not in _DTYPES:
            raise Unsupported(f"dtype {array.dtype} must be float32 or bfloat16")
    scale = [] if scale_K is None else [scale_K]
    arrays = [time_BL[:, 0].astype(jnp.int32), real_BL[:, 0].astype(jnp.int32), *scale, *new]
    whole = pl.BlockSpec(memory_space=pl.ANY)
    call = pl.pallas_call(
        functools.partial(_kernel, count=len(new), normed=bool(scale), eps=eps),
        out_shape=[jax.ShapeDtypeStruct(buffer.shape, buffer.dtype) for buffer in buffers],
        grid=(G, B),
        in_specs=[whole] * (len(arrays) + len(buffers)),
        out_specs=[whole] * len(buffers),
        input_output_aliases={len(arrays) + i: i for i in range(len(buffers))},
        compiler_params=plgpu.CompilerParams(num_warps=1, num_stages=1),
        interpret=dispatch.interpreted("gpu"),
        name="write_keys_kernel",
    )
    with jax.enable_x64(False):  # indices are 32 bit wide
        written = call(*arrays, *buffers)
    return list(zip(written[::2], written[1::2], strict=True))


def _kernel(time_ref: Any, real_ref: Any, *refs: Any, count: int, normed: bool, eps: float) -> None:
    g, b = pl.program_id(0), pl.program_id(1)
    scale_ref, refs = (refs[0], refs[1:]) if normed else (None, refs)
    new_refs, ring_refs = refs[:count], refs[-count:]
    K = new_refs[0].shape[-1]
    column = jnp.arange(K)
    time = plgpu.load(time_ref.at[b])
    real = jnp.broadcast_to(plgpu.load(real_ref.at[b]) != 0, (K,))
    for i, (new_ref, ring_ref) in enumerate(zip(new_refs, ring_refs, strict=True)):
        values = plgpu.load(new_ref.at[b, g, column])
        if scale_ref is not None and i % 2 == 0:  # keys
            wide = values.astype(jnp.float32)
            inverse = lax.rsqrt(jnp.sum(wide * wide) / K + eps)
            scale = plgpu.load(scale_ref.at[column]).astype(jnp.float32)
            values = (wide * inverse * scale).astype(values.dtype)
        slot = lax.rem(time, jnp.int32(ring_ref.shape[1]))
        plgpu.store(ring_ref.at[b, slot, g, column], values.astype(ring_ref.dtype), mask=real)
