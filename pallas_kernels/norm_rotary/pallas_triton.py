"""Norm and rotation of heads for NVIDIA GPUs: Pallas lowered to Triton.

A program has a few heads of some tokens in registers, and makes the angles of its tokens once for
all of them, as integers, 2^-32 of a turn: at position 131,072 they are off by 1e-4 at most, where
float32 angles are by 4e-3. The floor is what must move: x and y forward; x, dy and dx backward,
where the norm is made again. For 16 heads of queries and twice 4 of keys, of 8192 tokens with K =
128, on an H100, this takes 40 us forward and 124 with gradients, 1.13 and 1.41 times what the bytes
take; XLA's fusions took 73 and 211 (`results/kernels/attention_mixer.json`).

Everything is float32 between reading and writing; the scale's gradient is summed over a program in
the kernel and over programs by XLA, always in the same order.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

from pallas_kernels import dispatch, ptx
from pallas_kernels.dispatch import Unsupported
from pallas_kernels.rotary import fixed_frequencies

_DTYPES = (jnp.float32, jnp.bfloat16)
# Of a program: pairs of channels of a head, 8 of each of its 128 threads; heads at most, all of
# which it reads at once: backward twice as much, and more registers.
_PAIRS, _WARPS, _HEADS, _HEADS_BACKWARD = 1024, 4, 4, 2
_LARGEST_ROW = 2**31


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _norm_rotary(
    theta: float, eps: float, x_BLHK: Array, scale_K: Array | None, positions_BL: Array
) -> Array:
    inputs = {"x": x_BLHK, "scale": scale_K, "positions": positions_BL}
    outputs = {"y": jax.ShapeDtypeStruct(x_BLHK.shape, x_BLHK.dtype)}
    heads = math.gcd(x_BLHK.shape[2], _HEADS)
    return _call(_forward_kernel, inputs, outputs, heads, theta, eps)["y"]


def _forward(theta: float, eps: float, *inputs: Any) -> tuple[Array, Any]:
    x_BLHK, scale_K, positions_BL = inputs
    # Without a norm the gradient knows nothing of x.
    return _norm_rotary(theta, eps, *inputs), (
        None if scale_K is None else x_BLHK,
        scale_K,
        positions_BL,
    )


def _backward(theta: float, eps: float, saved: Any, dy_BLHK: Array) -> tuple[Any, ...]:
    x_BLHK, scale_K, positions_BL = saved
    inputs = {"dy": dy_BLHK, "x": x_BLHK, "scale": scale_K, "positions": positions_BL}
    outputs = {"dx": jax.ShapeDtypeStruct(dy_BLHK.shape, dy_BLHK.dtype)}
    heads = math.gcd(dy_BLHK.shape[2], _HEADS_BACKWARD)
    if scale_K is not None:
        sums = (*_programs(dy_BLHK.shape, heads), scale_K.shape[0])
        outputs["d_scale"] = jax.ShapeDtypeStruct(sums, jnp.float32)
    out = _call(_backward_kernel, inputs, outputs, heads, theta, eps)
    d_scale_K = None
    if scale_K is not None:
        d_scale_K = out["d_scale"].sum((0, 1, 2)).astype(scale_K.dtype)
    return out["dx"], d_scale_K, np.zeros(positions_BL.shape, jax.dtypes.float0)


_norm_rotary.defvjp(_forward, _backward)


def norm_rotary(
    x_BLHK: Array, scale_K: Array | None, positions_BL: Array, theta: float, eps: float
) -> Array:
    if not dispatch.interpreted("gpu") and "NVIDIA" not in dispatch.device_kind():
        raise Unsupported(f"it is written for NVIDIA's GPUs, and this is {dispatch.device_kind()}")
    _, L, H, K = x_BLHK.shape
    if not x_BLHK.size:
        raise Unsupported(f"{x_BLHK.shape=} must have elements")
    if K & (K - 1) or not 32 <= K <= 256:
        raise Unsupported(f"{K=} must be 32, 64, 128 or 256")
    for name, v in (("x_BLHK", x_BLHK), ("scale_K", scale_K)):
        if v is not None and v.dtype not in _DTYPES:
            raise Unsupported(f"{name}.dtype={v.dtype} must be float32 or bfloat16")
    if L * H * K >= _LARGEST_ROW:
        raise Unsupported(f"{L=} times {H=} times {K=} must be below 2^31: places are 32 bit wide")
    return _norm_rotary(theta, eps, x_BLHK, scale_K, positions_BL.astype(jnp.int32))


def _tokens(K: int) -> int:
    """Of a program."""
    return _PAIRS // (K // 2)


def _programs(shape: tuple[int, ...], heads: int) -> tuple[int, int, int]:
    """By tokens, heads and rows."""
    B, L, H, K = shape
    return -(-L // _tokens(K)), H // heads, B


def _call(
    kernel: Any,
    inputs: dict[str, Array | None],
    outputs: dict[str, jax.ShapeDtypeStruct],
    heads: int,
    theta: float,
    eps: float,
) -> dict[str, Array]:
    arrays = {name: v for name, v in inputs.items() if v is not None}
    shape = next(iter(outputs.values())).shape
    arrays["frequencies"] = fixed_frequencies(shape[3], theta)
    call = pl.pallas_call(
        functools.partial(kernel, names=(*arrays, *outputs), heads=heads, eps=eps),
        out_shape=tuple(outputs.values()),
        grid=_programs(shape, heads),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * len(arrays),
        out_specs=tuple([pl.BlockSpec(memory_space=pl.ANY)] * len(outputs)),
        compiler_params=plgpu.CompilerParams(num_warps=_WARPS, num_stages=1),
        name=f"norm_rotary{kernel.__name__}",
        interpret=dispatch.interpreted("gpu"),
    )
    with jax.enable_x64(False):  # indices are 32 bit wide
        return dict(zip(outputs, call(*arrays.values()), strict=True))


# Both halves of a head: of the pairs that are rotated the first and the second element.
Halves = tuple[Array, Array]


class _Block:
    """The tokens and heads of a program."""

    def __init__(self, ref: dict[str, Any], shape: tuple[int, ...], heads: int):
        self.ref = ref
        _, L, _, self.K = shape
        block, first_head, self.row = (pl.program_id(axis) for axis in range(3))
        self.heads = [first_head * heads + h for h in range(heads)]
        self.token = block * _tokens(self.K) + jnp.arange(_tokens(self.K))
        self.there = self.token < L
        self.column = jnp.arange(self.K // 2)
        position = plgpu.load(self.ref["positions"].at[self.row, jnp.minimum(self.token, L - 1)])
        frequency = plgpu.load(self.ref["frequencies"].at[self.column])
        self.interpret = dispatch.interpreted("gpu")
        # Whole turns overflow.
        angle = position[:, None] * frequency[None, :]
        self.cos, self.sin = ptx.cos_sin_of_turns(angle, interpret=self.interpret)
        self.scale = None
        if "scale" in self.ref:
            first, second = (
                plgpu.load(self.ref["scale"].at[start + self.column])[None].astype(jnp.float32)
                for start in self._starts
            )
            self.scale = first, second

    def _at(self, name: str, head: Any, first: int) -> Any:
        return self.ref[name].at[self.row, self.token[:, None], head, first + self.column[None, :]]

    def load(self, name: str) -> list[Halves]:
        """[tokens, K / 2] twice of each head, all asked for before any is used."""
        mask = jnp.broadcast_to(self.there[:, None], self.cos.shape)
        loaded = [
            [plgpu.load(self._at(name, head, first), mask=mask, other=0) for first in self._starts]
            for head in self.heads
        ]
        return [(a.astype(jnp.float32), b.astype(jnp.float32)) for a, b in loaded]

    @property
    def _starts(self) -> tuple[int, int]:
        return 0, self.K // 2

    def store(self, name: str, head: Any, halves: Halves) -> None:
        mask = jnp.broadcast_to(self.there[:, None], self.cos.shape)
        for first, half in zip(self._starts, halves, strict=True):
            value = half.astype(self.ref[name].dtype)
            plgpu.store(self._at(name, head, first), value, mask=mask)

    def rotated(self, halves: Halves, *, back: bool = False) -> Halves:
        a, b = halves
        sin = -self.sin if back else self.sin
        return a * self.cos - b * sin, b * self.cos + a * sin

    def mean(self, v: Halves, w: Halves) -> Array:
        """[tokens, 1]: the mean of their products over a head."""
        products = v[0] * w[0] + v[1] * w[1]
        return (jnp.sum(products, axis=1) / self.K)[:, None]


def _scaled(halves: Halves, scale: Halves) -> Halves:
    return halves[0] * scale[0], halves[1] * scale[1]


def _forward_kernel(*refs: Any, names: tuple[str, ...], heads: int, eps: float) -> None:
    ref = dict(zip(names, refs, strict=True))
    block = _Block(ref, ref["y"].shape, heads)
    for head, x in zip(block.heads, block.load("x"), strict=True):
        if block.scale is not None:
            inverse = jax.lax.rsqrt(block.mean(x, x) + eps)
            x = _scaled((x[0] * inverse, x[1] * inverse), block.scale)
        block.store("y", head, block.rotated(x))


def _backward_kernel(*refs: Any, names: tuple[str, ...], heads: int, eps: float) -> None:
    """With n = x r, r = 1 / sqrt(mean x^2 + eps), and g the gradient of n:

    dx = r (g - n mean(g n))
    """
    ref = dict(zip(names, refs, strict=True))
    block = _Block(ref, ref["dy"].shape, heads)
    gradients = block.load("dy")
    if block.scale is None:
        for head, dy in zip(block.heads, gradients, strict=True):
            block.store("dx", head, block.rotated(dy, back=True))
        return
    sums = [jnp.zeros((block.K // 2,), jnp.float32) for _ in range(2)]
    for head, x, dy in zip(block.heads, block.load("x"), gradients, strict=True):
        inverse = jax.lax.rsqrt(block.mean(x, x) + eps)
        n = (x[0] * inverse, x[1] * inverse)
        d_scaled = block.rotated(dy, back=True)
        g = _scaled(d_scaled, block.scale)
        along = block.mean(g, n)
        dx = (inverse * (g[0] - n[0] * along), inverse * (g[1] - n[1] * along))
        block.store("dx", head, dx)
        sums = [
            total + jnp.sum(a * b, axis=0) for total, a, b in zip(sums, d_scaled, n, strict=True)
        ]
    place = tuple(pl.program_id(axis) for axis in range(3))
    for first, total in zip((0, block.K // 2), sums, strict=True):
        plgpu.store(block.ref["d_scale"].at[*place, first + block.column], total)
