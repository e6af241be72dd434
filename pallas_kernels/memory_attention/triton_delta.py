"""delta_ih = sum_k o_ihk do_ihk - dlse_ih, which the backward passes on NVIDIA GPUs start from.

One pass over o and do, Pallas lowered to Triton. XLA took twice the time of these bytes (H100, 8192
tokens, 16 heads, K = 128: 0.045 ms), since what the kernels read is transposed, and six times
(0.133 ms) where its fusion puts the sum into the transposing loop.
Source: FlashAttention-2 (arXiv 2307.08691), algorithm 2; the gradient of lse is ours.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

from pallas_kernels import dispatch
from pallas_kernels.memory_attention.operands import AttentionOutput

# Values of a tile of o: 4 warps hold 32 of them, and of do, in each lane.
_TILE = 4096


def delta(o_BLHK: Array, d_out: AttentionOutput) -> Array:
    """[B, H, L], float32."""
    B, L, H, K = o_BLHK.shape
    width = 1 << (K - 1).bit_length()
    rows = max(1, _TILE // width)
    call = pl.pallas_call(
        functools.partial(_kernel, rows=rows, width=width),
        out_shape=jax.ShapeDtypeStruct((B, H, L), jnp.float32),
        grid=(-(-L // rows), H, B),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * 3,
        out_specs=pl.BlockSpec(memory_space=pl.ANY),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        name="memory_attention_delta_kernel",
        interpret=dispatch.interpreted("gpu"),
    )
    with jax.enable_x64(False):  # indices are 32 bit wide
        return call(o_BLHK, d_out.o_BLHK, d_out.lse_BLH.astype(jnp.float32))


def _kernel(o: Any, do: Any, dlse: Any, delta: Any, *, rows: int, width: int) -> None:
    _, L, _, K = o.shape
    head, row = pl.program_id(1), pl.program_id(2)
    t, k = pl.program_id(0) * rows + jnp.arange(rows), jnp.arange(width)
    inside = t < L
    there = inside[:, None] & (k < K)[None, :]

    def tile(ref: Any) -> Array:
        at = ref.at[row, t[:, None], head, k[None, :]]
        return plgpu.load(at, mask=there, other=0).astype(jnp.float32)

    total = (tile(o) * tile(do)).sum(axis=1)
    total -= plgpu.load(dlse.at[row, t, head], mask=inside, other=0)
    plgpu.store(delta.at[row, head, t], total, mask=inside)
