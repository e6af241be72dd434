"""Sums over what programs leave of the gradients of weights and of b and c, all in one kernel.

As many reductions by XLA are as many launches, each too small to fill a machine: at B 1, L 2048,
E 4096 on an H100 they and a slice took 17 us for 17 MB.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

# Of a program: values that it reads at once, no more of which than this are terms of one sum.
_VALUES, _TERMS, _WARPS = 8192, 128, 4


class Terms(NamedTuple):
    """Of values_RSC the `count` from `first` on are terms of S rows of sums; `columns` of C."""

    values_RSC: Any  # an array; in the kernel its shape
    first: int
    count: int
    columns: int
    dtype: Any = jnp.float32

    @property
    def tile(self) -> tuple[int, int]:
        """Terms and columns of a program at a time."""
        terms = min(_TERMS, _power_of_two(self.count))
        return terms, min(_VALUES // terms, _power_of_two(self.columns))

    @property
    def blocks(self) -> int:
        """Programs of a row."""
        return -(-self.columns // self.tile[1])

    @property
    def programs(self) -> int:
        return self.values_RSC.shape[1] * self.blocks


def sums(of: Mapping[str, Terms], *, interpret: bool) -> dict[str, Array]:
    """[S, columns] of each: its terms summed in float32, always in the same order."""
    call = pl.pallas_call(
        functools.partial(_kernel, of=tuple(map(_sizes, of.values()))),
        out_shape=[
            jax.ShapeDtypeStruct((v.values_RSC.shape[1], v.columns), v.dtype) for v in of.values()
        ],
        grid=(sum(v.programs for v in of.values()),),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * len(of),
        out_specs=[pl.BlockSpec(memory_space=pl.ANY)] * len(of),
        compiler_params=plgpu.CompilerParams(num_warps=_WARPS, num_stages=1),
        name="selective_scan_sums",
        interpret=interpret,
    )
    with jax.enable_x64(False):
        return dict(zip(of, call(*(v.values_RSC for v in of.values())), strict=True))


def _sizes(v: Terms) -> Terms:
    return v._replace(values_RSC=jax.ShapeDtypeStruct(v.values_RSC.shape, v.values_RSC.dtype))


def _kernel(*refs: Any, of: Sequence[Terms]) -> None:
    first = 0
    for one, values_RSC, out in zip(of, refs[: len(of)], refs[len(of) :], strict=True):
        number = pl.program_id(0) - first
        pl.when((number >= 0) & (number < one.programs))(
            functools.partial(_block, one, values_RSC, out, number)
        )
        first += one.programs


def _block(one: Terms, values_RSC: Any, out: Any, number: Array) -> None:
    """The sums of a block of columns."""
    rows, width = one.tile
    row = number // one.blocks
    column = number % one.blocks * width + jnp.arange(width, dtype=jnp.int32)
    term = lax.broadcasted_iota(jnp.int32, (rows, width), 0)
    columns = jnp.broadcast_to(column[None], term.shape)

    def add(i: Array, total: Array) -> Array:
        at = i * rows + term
        wanted = (at < one.count) & (columns < one.columns)
        values = plgpu.load(values_RSC.at[one.first + at, row, columns], mask=wanted, other=0)
        return total + values.astype(jnp.float32).sum(0)

    total = lax.fori_loop(0, math.ceil(one.count / rows), add, jnp.zeros((width,), jnp.float32))
    plgpu.store(out.at[row, column], total.astype(out.dtype), mask=column < one.columns)


def _power_of_two(size: int) -> int:
    """Not below size."""
    return 1 << (size - 1).bit_length()
