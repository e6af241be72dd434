"""The innovation for NVIDIA GPUs: Pallas lowered to Triton.

A program has all channels of a piece of a row and walks along it with the last 4 states in
registers, so that each state is read once, and 4 more before each piece. The floor is s, which is
read; on an H100 it takes 35 us for B, L, D = 8, 2048, 2048 in bfloat16, where the bytes take
23 at 2.9 TB/s, and XLA's fusion 78.

Arithmetic is float32, and every mean is summed anew, in the order of the definition. Where all 4
taps of a turn's tokens exist, nothing is masked.

Training asks for no gradient, as the choice of tokens carries none. Who asks (the gate of the
eidetic stream does) gets that of the definition in `xla.py`, made from s again.
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
from pallas_kernels.dispatch import Unsupported
from pallas_kernels.innovation import xla
from pallas_kernels.innovation.xla import TAPS

_DTYPES = (jnp.float32, jnp.bfloat16)
# Channels of a program at most, and of a thread as long as _MOST_WARPS allow it; tokens of a turn
# of its loop.
_MOST_CHANNELS, _PER_THREAD, _MOST_WARPS, _TURN = 8192, 8, 16, 4
# Tokens of a piece: the most that still make this many programs.
_PIECES, _PROGRAMS = (64, 32, 16, 8), 1024
_LARGEST_ROW = 2**31


@jax.custom_vjp
def _innovation(s_BLD: Array, positions_BL: Array) -> Array:
    B, L, D = s_BLD.shape
    channels = max(pl.next_power_of_2(D), 32)
    piece = _piece(B, L)
    call = pl.pallas_call(
        functools.partial(_kernel, channels=channels, piece=piece),
        out_shape=jax.ShapeDtypeStruct((B, L), jnp.float32),
        grid=(-(-L // piece), B),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * 2,
        out_specs=pl.BlockSpec(memory_space=pl.ANY),
        compiler_params=plgpu.CompilerParams(
            num_warps=min(max(channels // (32 * _PER_THREAD), 1), _MOST_WARPS), num_stages=1
        ),
        name="innovation_kernel",
        interpret=dispatch.interpreted("gpu"),
    )
    with jax.enable_x64(False):  # indices are 32 bit wide
        return call(s_BLD, positions_BL)


def _forward(s_BLD: Array, positions_BL: Array) -> tuple[Array, tuple[Array, Array]]:
    return _innovation(s_BLD, positions_BL), (s_BLD, positions_BL)


def _backward(saved: tuple[Array, Array], de_BL: Array) -> tuple[Array, Any]:
    s_BLD, positions_BL = saved
    _, pull_back = jax.vjp(lambda s_BLD: xla.innovation(s_BLD, positions_BL, None), s_BLD)
    return pull_back(de_BL)[0], np.zeros(positions_BL.shape, jax.dtypes.float0)


_innovation.defvjp(_forward, _backward)


def innovation(s_BLD: Array, positions_BL: Array, tail_BSD: Array | None) -> Array:
    if not dispatch.interpreted("gpu") and "NVIDIA" not in dispatch.device_kind():
        raise Unsupported(f"it is written for NVIDIA's GPUs, and this is {dispatch.device_kind()}")
    if tail_BSD is not None:
        raise Unsupported("it takes whole rows, and tail_BSD is what comes before this one")
    if not s_BLD.size:
        raise Unsupported(f"{s_BLD.shape=} must have elements")
    if s_BLD.dtype not in _DTYPES:
        raise Unsupported(f"s_BLD.dtype={s_BLD.dtype} must be float32 or bfloat16")
    _, L, D = s_BLD.shape
    if D > _MOST_CHANNELS:
        raise Unsupported(f"{D=} must be at most {_MOST_CHANNELS}: a program holds all channels")
    if L * D >= _LARGEST_ROW:
        raise Unsupported(f"{L=} times {D=} must be below 2^31: places in a row are 32 bit wide")
    return _innovation(s_BLD, positions_BL.astype(jnp.int32))


def _piece(B: int, L: int) -> int:
    fitting = (piece for piece in _PIECES if B * -(-L // piece) >= _PROGRAMS)
    return next(fitting, _PIECES[-1])


def _kernel(s_ref: Any, positions_ref: Any, e_ref: Any, *, channels: int, piece: int) -> None:
    _, L, D = s_ref.shape
    first, row = pl.program_id(0) * piece, pl.program_id(1)
    channel = jnp.arange(channels)
    there = channel < D
    interpret = dispatch.interpreted("gpu")

    def load(t: Array, mask: Array | None) -> Array:
        """[channels] of token t, the last one for those beyond the row."""
        at = s_ref.at[row, jnp.clip(t, 0, L - 1), channel]
        return plgpu.load(at, mask=mask, other=None if mask is None else 0)

    def error(states: list[Array], position: Array, *, masked: bool) -> Array:
        """Of states[0], from states[1:], the one before it first."""
        taps, weight = states[1:], jnp.float32(-1 / TAPS)
        if masked:
            taps = [jnp.where(position >= back, s, 0) for back, s in enumerate(taps, start=1)]
            weight = -1 / jnp.clip(position, 1, TAPS).astype(jnp.float32)
        off = ptx.fma(functools.reduce(jnp.add, taps), weight, states[0], interpret=interpret)
        return jnp.sum(jnp.square(off))

    def turn(i: Array, history: list[Array]) -> list[Array]:
        tokens = [first + i * _TURN + r for r in range(_TURN)]
        loaded = [load(t, None if channels == D else there) for t in tokens]
        positions = [plgpu.load(positions_ref.at[row, jnp.minimum(t, L - 1)]) for t in tokens]
        states = [*(s.astype(jnp.float32) for s in reversed(loaded)), *history]

        def errors(masked: bool) -> list[Array]:
            return [
                error(states[_TURN - 1 - r :][: TAPS + 1], position, masked=masked)
                for r, position in enumerate(positions)
            ]

        everything = functools.reduce(jnp.minimum, positions) >= TAPS
        found = lax.cond(everything, lambda: errors(False), lambda: errors(True))
        for t, e in zip(tokens, found, strict=True):
            plgpu.store(e_ref.at[row, jnp.minimum(t, L - 1)], e, mask=t < L)
        return states[:TAPS]

    before = [first - back for back in range(1, TAPS + 1)]
    history = [load(t, there & (t >= 0)).astype(jnp.float32) for t in before]
    lax.fori_loop(0, piece // _TURN, turn, history)
