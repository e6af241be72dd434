"""One new token's attention to cached keys, for NVIDIA GPUs: Pallas lowered to Triton.

A first kernel goes over the keys: a program has all queries of one head of keys and some blocks of
one stream, rotates the keys as it reads them, and leaves the unnormalised output, the largest logit
and the sum of weights of its blocks (as FlashAttention's decoding does, arXiv 2205.14135). Blocks
of which the query sees nothing are not read: rings are longer than windows, and full attention's
cache is as long as the longest row. A second kernel joins the parts of every head.

The floor is the keys and values that are seen, read once; in jax.numpy XLA rotates, transposes and
joins all of the rings in memory, in some 20 kernels a layer. Products take operands of the keys'
dtype (float32 in full precision), everything else is float32. Angles are integers, 2^-32 of a turn,
until `cos.approx` and `sin.approx`. On an H100, for 64 rows with rings of 1024 and 1280 keys and 64
of the memory (16 heads, 4 of keys, K = 128): 91 us a call by the clock, XLA's 435; for one row both
take the host's time, 50.
"""

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

from pallas_kernels import dispatch, ptx
from pallas_kernels.dispatch import Unsupported
from pallas_kernels.rotary import fixed_frequencies

if TYPE_CHECKING:
    from pallas_kernels.cached_attention.api import KeyStream

# Keys of a block; a program takes more than one block where a stream would have more programs than
# this; parts that are joined at a time; rows of the smallest tile that tensor cores multiply.
_BLOCK, _PROGRAMS, _JOINED, _LEAST_ROWS = 64, 1024, 16, 16
_DTYPES = (jnp.float32, jnp.bfloat16)
_LEAST = -1e30  # a logit, in units of log 2, of what nobody sees
_NOWHERE = -(2**31)  # the position of a key that is not seen


def cached_attention(q_BLHK: Array, streams: "list[KeyStream]", theta: float) -> Array:
    if not dispatch.interpreted("gpu") and "NVIDIA" not in dispatch.device_kind():
        raise Unsupported(f"it is written for NVIDIA's GPUs, and this is {dispatch.device_kind()}")
    B, L, H, K = q_BLHK.shape
    if L != 1:
        raise Unsupported(f"{L=} new tokens must be 1")
    if K & (K - 1) or not 32 <= K <= 256:
        raise Unsupported(f"{K=} must be 32, 64, 128 or 256")
    for i, stream in enumerate(streams):
        if not stream.k_BSGK.size:
            raise Unsupported(f"streams[{i}].{stream.k_BSGK.shape=} must have elements")
        for name in ("k_BSGK", "v_BSGK"):
            dtype = getattr(stream, name).dtype
            if dtype != q_BLHK.dtype or dtype not in _DTYPES:
                raise Unsupported(
                    f"streams[{i}].{name}.dtype={dtype} must be that of q_BLHK={q_BLHK.dtype}, "
                    "float32 or bfloat16"
                )
    G = streams[0].k_BSGK.shape[2]
    arrays, starts, turns = [q_BLHK[:, 0], fixed_frequencies(K, theta)], [0], []
    for stream in streams:
        places_BS = jnp.where(stream.visible_BLS[:, 0], stream.positions_BS, _NOWHERE)
        arrays += [stream.k_BSGK, stream.v_BSGK, places_BS.astype(jnp.int32)]
        if stream.bias_BHS is not None:
            arrays.append(stream.bias_BHS.astype(jnp.float32))
        blocks = -(-stream.k_BSGK.shape[1] // _BLOCK)
        turns.append(-(-blocks * B * G // _PROGRAMS))
        starts.append(starts[-1] + -(-blocks // turns[-1]))
    whole = pl.BlockSpec(memory_space=pl.ANY)
    parts = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    options = {
        "compiler_params": plgpu.CompilerParams(num_warps=4, num_stages=1),
        "interpret": dispatch.interpreted("gpu"),
    }
    by_part = (B, G, H // G, starts[-1])
    by_parts = pl.pallas_call(
        functools.partial(
            _parts_kernel,
            biased=[stream.bias_BHS is not None for stream in streams],
            starts=starts,
            turns=turns,
        ),
        out_shape=[parts(by_part), parts(by_part), parts((*by_part, K))],
        grid=(starts[-1], G, B),
        in_specs=[whole] * len(arrays),
        out_specs=[whole] * 3,
        name="cached_attention_parts_kernel",
        **options,
    )
    joined = pl.pallas_call(
        functools.partial(_join_kernel, group=H // G),
        out_shape=jax.ShapeDtypeStruct((B, H, K), q_BLHK.dtype),
        grid=(H, B),
        in_specs=[whole] * 3,
        out_specs=whole,
        name="cached_attention_join_kernel",
        **options,
    )
    with jax.enable_x64(False):  # indices are 32 bit wide
        return joined(*by_parts(*arrays))[:, None]


def _rows(group: int) -> int:
    return max(pl.next_power_of_2(group), _LEAST_ROWS)


def _product(a: Array, b: Array, axis_b: int) -> Array:
    """float32, over the last axis of a and one of b."""
    return lax.dot_general(
        a,
        b,
        (((1,), (axis_b,)), ((), ())),
        precision=lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def _parts_kernel(
    q_ref: Any,
    frequency_ref: Any,
    *refs: Any,
    biased: list[bool],
    starts: list[int],
    turns: list[int],
) -> None:
    inputs, (most_ref, sum_ref, o_ref) = list(refs[:-3]), refs[-3:]
    part, g, b = (pl.program_id(axis) for axis in range(3))
    _, H, K = q_ref.shape
    interpret = dispatch.interpreted("gpu")
    column = jnp.arange(K // 2)
    frequency = plgpu.load(frequency_ref.at[column])

    streams: list[Any] = []
    for has_bias in biased:
        streams.append([inputs.pop(0) for _ in range(3)] + [inputs.pop(0) if has_bias else None])
    G = streams[0][0].shape[2]
    group = H // G
    rows = _rows(group)
    row = jnp.arange(rows)
    # Rows beyond the queries repeat the first one.
    head = g * group + jnp.where(row < group, row, 0)

    def queries(first: int) -> Array:
        return plgpu.load(q_ref.at[b, head[:, None], first + column[None]])

    halves = (queries(0), queries(K // 2))

    def go_over(i: int) -> tuple[Array, Array, Array]:
        """Largest logit, sum of weights and output of this program's blocks of stream i."""
        k_ref, v_ref, places_ref, bias_ref = streams[i]
        S = k_ref.shape[1]

        def block(turn: Array, before: Any) -> Any:
            key = ((part - starts[i]) * turns[i] + turn) * _BLOCK + jnp.arange(_BLOCK)
            there = key < S
            key = jnp.minimum(key, S - 1)
            place = plgpu.load(places_ref.at[b, key], mask=there, other=_NOWHERE)
            seen = place != _NOWHERE

            def add(before: Any) -> Any:
                most, total, o = before
                angle = jnp.where(seen, place, 0)[:, None] * frequency[None]
                cos, sin = ptx.cos_sin_of_turns(angle, interpret=interpret)
                first, second = (
                    plgpu.load(k_ref.at[b, key[:, None], g, start + column[None]]).astype(
                        jnp.float32
                    )
                    for start in (0, K // 2)
                )
                rotated = (first * cos - second * sin, second * cos + first * sin)
                logits = sum(
                    _product(q, k.astype(q.dtype), 1) for q, k in zip(halves, rotated, strict=True)
                )
                logits *= K**-0.5 * ptx.LOG2_E
                if bias_ref is not None:
                    bias = plgpu.load(bias_ref.at[b, head[:, None], key[None]])
                    logits += bias * ptx.LOG2_E
                logits = jnp.where(seen[None], logits, _LEAST)
                larger = jnp.maximum(most, jnp.max(logits, axis=1))
                weights = ptx.exp2(logits - larger[:, None], interpret=interpret)
                shrink = ptx.exp2(most - larger, interpret=interpret)
                v = plgpu.load(v_ref.at[b, key[:, None], g, jnp.arange(K)[None]])
                o = o * shrink[:, None] + _product(weights.astype(v.dtype), v, 0)
                return larger, total * shrink + jnp.sum(weights, axis=1), o

            return lax.cond(jnp.max(place) != _NOWHERE, add, lambda before: before, before)

        nothing = (
            jnp.full((rows,), _LEAST, jnp.float32),
            jnp.zeros((rows,), jnp.float32),
            jnp.zeros((rows, K), jnp.float32),
        )
        return lax.fori_loop(0, turns[i], block, nothing)

    def from_stream(i: int) -> tuple[Array, Array, Array]:
        if i == len(streams) - 1:
            return go_over(i)
        return lax.cond(part < starts[i + 1], lambda: go_over(i), lambda: from_stream(i + 1))

    most, total, o = from_stream(0)
    real = row < group
    plgpu.store(most_ref.at[b, g, row, part], most, mask=real)
    plgpu.store(sum_ref.at[b, g, row, part], total, mask=real)
    mask = jnp.broadcast_to(real[:, None], (rows, K))
    plgpu.store(o_ref.at[b, g, row[:, None], part, jnp.arange(K)[None]], o, mask=mask)


def _join_kernel(most_ref: Any, sum_ref: Any, parts_ref: Any, o_ref: Any, *, group: int) -> None:
    head, b = pl.program_id(0), pl.program_id(1)
    at = (b, head // group, head % group)
    *_, parts, K = parts_ref.shape
    interpret = dispatch.interpreted("gpu")
    column = jnp.arange(K)

    def step(i: Array, before: Any) -> Any:
        most, total, o = before
        part = i * _JOINED + jnp.arange(_JOINED)
        there = part < parts
        part = jnp.minimum(part, parts - 1)
        here = plgpu.load(most_ref.at[*at, part], mask=there, other=_LEAST)
        larger = jnp.maximum(most, jnp.max(here))
        share = ptx.exp2(here - larger, interpret=interpret)
        shrink = ptx.exp2(most - larger + jnp.zeros((K,)), interpret=interpret)
        sums = plgpu.load(sum_ref.at[*at, part], mask=there, other=0)
        mask = jnp.broadcast_to(there[:, None], (_JOINED, K))
        outputs = plgpu.load(parts_ref.at[*at, part[:, None], column[None]], mask=mask, other=0)
        total = total * shrink + jnp.sum(share * sums)
        return larger, total, o * shrink + jnp.sum(share[:, None] * outputs, axis=0)

    nothing = (jnp.float32(_LEAST), jnp.zeros((K,)), jnp.zeros((K,)))
    _, total, o = lax.fori_loop(0, -(-parts // _JOINED), step, nothing)
    o = jnp.where(total > 0, o / jnp.where(total > 0, total, 1), 0)
    plgpu.store(o_ref.at[b, head, column], o.astype(o_ref.dtype))
