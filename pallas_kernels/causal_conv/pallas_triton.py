"""The convolution with SiLU for NVIDIA GPUs: Pallas lowered to Triton.

A program walks along a piece of a row with the last T - 1 inputs of its channels in registers, so
that each input is read once; backward it walks the other way, with the gradients before SiLU of the
T - 1 tokens behind it, which it computes again. What it moves is what must be moved: 2 arrays
[B, L, E] forward (x, y), 3 backward (x, dy, dx; one more for every further use of y), and T - 1
rows more of each piece. XLA, which differentiates the sum of shifted copies, makes some 15 passes
over such arrays backward, counted in what it compiles for an H100. Measured there (bfloat16, one
use, kernels in a profile), in us, with the bytes at 3 TB/s:

| B, L, E         | forward | XLA | floor | backward | XLA  | floor |
|-----------------|---------|-----|-------|----------|------|-------|
| 8, 2048, 4096   | 100     | 193 | 89    | 180      | 653  | 134   |
| 1, 2048, 4096   | 12      | 22  | 11    | 28       | 239  | 17    |
| 1, 32,768, 4096 | 208     | 357 | 179   | 341      | 1380 | 268   |

Sums are float32. Gradients of kernel and bias are summed over a piece in the kernel and over pieces
by XLA, always in the same order.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

from pallas_kernels import dispatch, ptx
from pallas_kernels.causal_conv.operands import Operands
from pallas_kernels.dispatch import Unsupported

_DTYPES = (jnp.float32, jnp.bfloat16)
_MOST_TAPS = 8
# Channels of a program, 4 of each of its 128 threads; tokens of a turn of its loop.
_CHANNELS, _WARPS, _TURN = 512, 4, 4
# Tokens of a piece: the most that still make this many programs.
_PIECES, _PROGRAMS = (256, 128, 64, 32), 1056
_LARGEST_ROW = 2**31


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _conv(
    uses: int, x_BLE: Array, kernel_TE: Array, bias_E: Array, positions_BL: Array
) -> tuple[Array, ...]:
    inputs = {"x": x_BLE, "kernel": kernel_TE, "bias": bias_E, "positions": positions_BL}
    y = jax.ShapeDtypeStruct(x_BLE.shape, x_BLE.dtype)
    return (_call(_forward_kernel, inputs, {"y": y})["y"],) * uses


def _conv_forward(uses: int, *inputs: Array) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    return _conv(uses, *inputs), inputs


def _conv_backward(
    uses: int, saved: tuple[Array, ...], gradients: tuple[Array, ...]
) -> tuple[Any, ...]:
    x_BLE, kernel_TE, bias_E, positions_BL = saved
    B, L, E = x_BLE.shape
    inputs = {"x": x_BLE, "kernel": kernel_TE, "bias": bias_E, "positions": positions_BL}
    sums = (B, -(-L // _piece(x_BLE.shape)), kernel_TE.shape[0] + 1, E)
    outputs = {
        "dx": jax.ShapeDtypeStruct(x_BLE.shape, x_BLE.dtype),
        "sums": jax.ShapeDtypeStruct(sums, jnp.float32),
    }
    inputs |= {f"dy{use}": dy_BLE for use, dy_BLE in enumerate(gradients)}
    out = _call(_backward_kernel, inputs, outputs)
    sums_TE = out["sums"].sum((0, 1))
    d_kernel_TE, d_bias_E = sums_TE[:-1].astype(kernel_TE.dtype), sums_TE[-1].astype(bias_E.dtype)
    nothing = np.zeros(positions_BL.shape, jax.dtypes.float0)
    return out["dx"], d_kernel_TE, d_bias_E, nothing


_conv.defvjp(_conv_forward, _conv_backward)


def conv(operands: Operands, uses: int) -> tuple[Array, ...]:
    x_BLE, kernel_TE, bias_E, positions_BL, tail_BSE = operands
    if not dispatch.interpreted("gpu") and "NVIDIA" not in dispatch.device_kind():
        raise Unsupported(f"it is written for NVIDIA's GPUs, and this is {dispatch.device_kind()}")
    if tail_BSE is not None:
        raise Unsupported("it takes whole rows, and tail_BSE is what comes before this one")
    if not x_BLE.size:
        raise Unsupported(f"{x_BLE.shape=} must have elements")
    for name, v in (("x_BLE", x_BLE), ("kernel_TE", kernel_TE), ("bias_E", bias_E)):
        if v.dtype not in _DTYPES:
            raise Unsupported(f"{name}.dtype={v.dtype} must be float32 or bfloat16")
    taps = kernel_TE.shape[0]
    if taps > _MOST_TAPS:
        raise Unsupported(f"T={taps} taps must be at most {_MOST_TAPS}")
    L, E = x_BLE.shape[1:]
    if L * E >= _LARGEST_ROW:
        raise Unsupported(f"{L=} times {E=} must be below 2^31: places in a row are 32 bit wide")
    return _conv(uses, x_BLE, kernel_TE, bias_E, positions_BL.astype(jnp.int32))


def _piece(shape: tuple[int, ...]) -> int:
    B, L, E = shape
    blocks = B * -(-E // _CHANNELS)
    fitting = (piece for piece in _PIECES if blocks * -(-L // piece) >= _PROGRAMS)
    return next(fitting, _PIECES[-1])


def _call(
    kernel: Any, inputs: dict[str, Array], outputs: dict[str, jax.ShapeDtypeStruct]
) -> dict[str, Array]:
    B, L, E = inputs["x"].shape
    piece, names = _piece((B, L, E)), (*inputs, *outputs)
    call = pl.pallas_call(
        functools.partial(kernel, names=names, piece=piece),
        out_shape=tuple(outputs.values()),
        grid=(-(-L // piece), -(-E // _CHANNELS), B),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * len(inputs),
        out_specs=tuple([pl.BlockSpec(memory_space=pl.ANY)] * len(outputs)),
        compiler_params=plgpu.CompilerParams(num_warps=_WARPS, num_stages=1),
        name=f"causal_conv{kernel.__name__}",
        interpret=dispatch.interpreted("gpu"),
    )
    with jax.enable_x64(False):  # indices are 32 bit wide
        return dict(zip(outputs, call(*inputs.values()), strict=True))


class _Strip:
    """The channels of a program, and its piece of a row: tokens `first` to `end` - 1."""

    def __init__(self, refs: tuple[Any, ...], names: tuple[str, ...], piece: int):
        self.ref = dict(zip(names, refs, strict=True))
        _, self.L, E = self.ref["x"].shape
        self.number, block, self.row = (pl.program_id(axis) for axis in range(3))
        self.channel = block * _CHANNELS + jnp.arange(_CHANNELS)
        self.there = self.channel < E
        self.first = self.number * piece
        self.taps = self.ref["kernel"].shape[0]
        self.kernel = [self.weight("kernel", jnp.int32(t)) for t in range(self.taps)]
        self.bias = self.weight("bias")
        self.interpret = dispatch.interpreted("gpu")

    def weight(self, name: str, *index: Array) -> Array:
        at = self.ref[name].at[*index, self.channel]
        return plgpu.load(at, mask=self.there, other=0).astype(jnp.float32)

    def inside(self, t: Array) -> Array:
        return (t >= 0) & (t < self.L)

    def load(self, name: str, t: Array) -> Array:
        """[channels] of token t; zeros where there is none."""
        at = self.ref[name].at[self.row, jnp.clip(t, 0, self.L - 1), self.channel]
        return plgpu.load(at, mask=self.there & self.inside(t), other=0)

    def load_all(self, name: str, t: Array) -> list[Array]:
        """Of all arrays with this name and a number."""
        return [
            self.load(n, t) for n in self.ref if n.startswith(name) and n[len(name) :].isdigit()
        ]

    def gradient(self, loaded: list[Array]) -> Array:
        """The sum of the gradients of all uses."""
        return functools.reduce(jnp.add, _wide(loaded))

    def store(self, name: str, t: Array, value: Array) -> None:
        at = self.ref[name].at[self.row, jnp.minimum(t, self.L - 1), self.channel]
        value = value.astype(self.ref[name].dtype)
        plgpu.store(at, value, mask=self.there & self.inside(t))

    def position(self, t: Array) -> Array:
        """Of token t; beyond the row -1, which sees nothing."""
        loaded = plgpu.load(self.ref["positions"].at[self.row, jnp.clip(t, 0, self.L - 1)])
        return jnp.where(self.inside(t), loaded, -1)

    def before_silu(self, x: list[Array], position: Array) -> Array:
        """Of a token; x: what was read at it, one token before, two before, ..."""
        total = self.fma(self.kernel[-1], x[0], self.bias)
        for back in range(1, self.taps):
            seen = jnp.where(position >= back, x[back], 0.0)
            total = self.fma(self.kernel[-1 - back], seen, total)
        return total

    def fma(self, a: Array, b: Array, c: Array) -> Array:
        return ptx.fma(a, b, c, interpret=self.interpret)

    def sigmoid(self, v: Array) -> Array:
        return ptx.sigmoid(v, interpret=self.interpret)


def _wide(values: list[Array]) -> list[Array]:
    return [v.astype(jnp.float32) for v in values]


def _forward_kernel(*refs: Any, names: tuple[str, ...], piece: int) -> None:
    strip = _Strip(refs, names, piece)
    history = _wide([strip.load("x", strip.first - back) for back in range(1, strip.taps)])

    def turn(i: Array, history: list[Array]) -> list[Array]:
        tokens = [strip.first + i * _TURN + r for r in range(_TURN)]
        loaded = [strip.load("x", t) for t in tokens]
        positions = [strip.position(t) for t in tokens]
        for t, x, position in zip(tokens, _wide(loaded), positions, strict=True):
            v = strip.before_silu([x, *history], position)
            strip.store("y", t, v * strip.sigmoid(v))
            history = [x, *history][: strip.taps - 1]
        return history

    lax.fori_loop(0, piece // _TURN, turn, history)


def _backward_kernel(*refs: Any, names: tuple[str, ...], piece: int) -> None:
    """dx, and the sums of a piece: the gradients of the T rows of the kernel, and of the bias."""
    strip = _Strip(refs, names, piece)
    taps, more = strip.taps, strip.taps - 1
    end = strip.first + piece

    def gradient(t: Array, x: list[Array], position: Array, dy: Array) -> Array:
        """Of what is before SiLU; 0 beyond the row, where dy is."""
        v = strip.before_silu(x, position)
        sigmoid = strip.sigmoid(v)
        return dy * sigmoid * strip.fma(v, 1 - sigmoid, jnp.ones_like(v))

    # x of the tokens from t - 1 down to t - taps + 1, with t the last one that was gone through;
    # gradients and positions of the `more` tokens from t on.
    later_x = _wide([strip.load("x", end + more - 1 - i) for i in range(2 * more)])
    gradients, positions = [], []
    for i in range(more):
        t = end + more - 1 - i
        position = strip.position(t)
        dy = strip.gradient(strip.load_all("dy", t))
        gradients.insert(0, gradient(t, later_x[i : i + taps], position, dy))
        positions.insert(0, position)

    def turn(i: Array, carry: Any) -> Any:
        x, gradients, positions, sums = carry
        tokens = [end - 1 - i * _TURN - r for r in range(_TURN)]
        loaded = [strip.load("x", t - more) for t in tokens]
        loaded_dy = [strip.load_all("dy", t) for t in tokens]
        own_positions = [strip.position(t) for t in tokens]
        for t, oldest, dy, position in zip(
            tokens, _wide(loaded), map(strip.gradient, loaded_dy), own_positions, strict=True
        ):
            x = [*x, oldest]  # of t, t - 1, ..., t - more
            d = gradient(t, x, position, dy)
            seen = [d, *(jnp.where(position >= back, d, 0.0) for back in range(1, taps))]
            *of_taps, of_bias = sums
            of_taps = [strip.fma(v, w, s) for v, w, s in zip(seen, x, of_taps, strict=True)]
            sums = [*of_taps, of_bias + d]
            dx = strip.kernel[-1] * d
            for back, (late, at) in enumerate(zip(gradients, positions, strict=True), start=1):
                late = jnp.where(at >= back, late, 0.0)
                dx = strip.fma(strip.kernel[-1 - back], late, dx)
            strip.store("dx", t, dx)
            x = x[1:]
            gradients = [d, *gradients][:more]
            positions = [position, *positions][:more]
        return x, gradients, positions, sums

    nothing = jnp.zeros((_CHANNELS,), jnp.float32)
    carry = later_x[more:], gradients, positions, [nothing] * (taps + 1)
    *_, sums = lax.fori_loop(0, piece // _TURN, turn, carry)
    # sums[back] is of the tap `back` tokens ago.
    for i, total in enumerate([*reversed(sums[:-1]), sums[-1]]):
        at = strip.ref["sums"].at[strip.row, strip.number, i, strip.channel]
        plgpu.store(at, total, mask=strip.there)
