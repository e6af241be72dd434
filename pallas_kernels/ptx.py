"""Arithmetic of NVIDIA GPUs that Pallas kernels lowered to Triton write as PTX.

Special functions in their approximate forms (ex2, rcp: relative error 2^-22 or less, denormals
flushed), because the library's are several times longer, and fused multiply-adds, because XLA
contracts nothing by itself. Interpreted on a CPU, every operation has its meaning in jax.numpy.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

LOG2_E = math.log2(math.e)


def ptx(
    code: str, constraints: str, *args: Array, pack: int = 1, dtype: Any = jnp.float32
) -> Array:
    """An array like the first argument, from inline code on its elements, `pack` at a time."""
    shape = jax.ShapeDtypeStruct(args[0].shape, dtype)
    return plgpu.elementwise_inline_asm(
        code, args=args, constraints=constraints, pack=pack, result_shape_dtypes=[shape]
    )[0]


def fma(a: Array, b: Array, c: Array, *, interpret: bool) -> Array:
    """a b + c, rounded once."""
    if interpret:
        return a * b + c
    a, b, c = jnp.broadcast_arrays(a, b, c)
    return ptx("fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", a, b, c)


def exp2(v: Array, *, interpret: bool) -> Array:
    return jnp.exp2(v) if interpret else ptx("ex2.approx.ftz.f32 $0, $1;", "=f,f", v)


def reciprocal(v: Array, *, interpret: bool) -> Array:
    return 1 / v if interpret else ptx("rcp.approx.ftz.f32 $0, $1;", "=f,f", v)


def cos_sin_of_turns(angle: Array, *, interpret: bool) -> tuple[Array, Array]:
    """Of int32 angles in 2^-32 of a turn, half a turn at most: absolute error 2^-20 or less."""
    v = angle.astype(jnp.float32) * (2 * math.pi / 2**32)
    if interpret:
        return jnp.cos(v), jnp.sin(v)
    names = ("cos", "sin")
    cos, sin = (ptx(f"{name}.approx.ftz.f32 $0, $1;", "=f,f", v) for name in names)
    return cos, sin


def sigmoid(v: Array, *, interpret: bool) -> Array:
    if interpret:
        return jax.nn.sigmoid(v)
    return reciprocal(1 + exp2(v * -LOG2_E, interpret=False), interpret=False)
