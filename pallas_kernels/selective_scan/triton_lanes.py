"""Where the values of a selective scan lie in the lanes of a GPU's warps, and what lanes exchange.

A warp covers 8 channels and advances them by 4 steps at a time; a program of W warps works on
vectors of T = 32 W values, value i in lane i % 32 of warp i // 32. Lane l = 4 channel + quad:

    elements   [T]      channel l >> 2 at step l & 3: inputs and outputs, one element a lane, so
                        that softplus and gate are computed once per element
    states     [T, 4]   channel l >> 2, a set of 16 states: register 2 half + p has
                        state 4 (l & 3) + 2 p + half

This is the layout of accumulators of the tensor cores' product of 16 x 8 by 8 x 8 values
(PTX ISA 8.8, section 9.7.14.5, mma.m16n8k8 with tf32; rows r and r + 8 of the hardware are one
channel here). With it these need neither shuffles nor loads of one value into many lanes:

    outer           u_et b_tn of one step t, a tile of states: of rank one, other steps masked
    over_states     sum_n h_etn c_tn, four steps of which are a vector of elements
    over_lanes      sums over the lanes of a channel, likewise
    over_channels   sum_e h_etn v_et over a warp's channels, for the gradients of b and c

For `over_channels` values change places first, two of bfloat16 at once (movmatrix), so that a lane
has neighbouring channels of a state instead of neighbouring states of a channel.

The products cut their factors to tf32 (11 bits) where the inputs are bfloat16 (8 bits); with
`exact` every factor is split into two such parts, and three products give what float32 would.

Special functions and fused multiply-adds are those of `pallas_kernels/ptx.py`; lg2 is approximate
like them. Interpreted on a CPU, every operation has its meaning in jax.numpy.

All this rests on Triton's giving row i of [T] and of [T, 4] to thread i, which it does because
nothing here asks for another layout. A compiler that chose otherwise would be found by the check
against float64 that comes before every measurement (`benchmarks/selective_scan.py`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

from pallas_kernels import ptx
from pallas_kernels.ptx import LOG2_E

LN_2 = math.log(2)
CHANNELS, STEPS, STATES = 8, 4, 16

# The step size of a reset, in decays. exp2 of it is 0 with every rate from the least one on, and
# no product with a constant overflows.
RESET_DT, LEAST_RATE = 1e33, 1e-30

# A factor of a product: itself, or its leading bits and the rest.
Parts = tuple[Array, ...]


@dataclass(frozen=True)
class Lanes:
    """The layout of a program of `warps` warps, and its arithmetic."""

    warps: int
    exact: bool
    interpret: bool

    @property
    def width(self) -> int:
        """T, values of a vector."""
        return 32 * self.warps

    def lane(self) -> Array:
        """[T], 0 to 31."""
        return jnp.arange(self.width, dtype=jnp.int32) & 31

    def channel(self) -> Array:
        """[T], the lane's channel among the program's 8 W."""
        return jnp.arange(self.width, dtype=jnp.int32) >> 2

    def step(self) -> Array:
        """[T], the lane's step of four, for elements."""
        return self.lane() & 3

    def states(self) -> Array:
        """[T, 4], the lane's states of 16 in order; see `swapped`."""
        return (4 * self.step())[:, None] + lax.broadcasted_iota(jnp.int32, (self.width, 4), 1)

    def barrier(self) -> None:
        """What any lane of the program stored before is seen by all loads after."""
        if not self.interpret:
            plgpu.debug_barrier()

    def fma(self, a: Array, b: Array, c: Array) -> Array:
        """a b + c, rounded once."""
        return ptx.fma(a, b, c, interpret=self.interpret)

    def exp2(self, v: Array) -> Array:
        return ptx.exp2(v, interpret=self.interpret)

    def sigmoid(self, v: Array) -> Array:
        return ptx.sigmoid(v, interpret=self.interpret)

    def softplus(self, v: Array) -> tuple[Array, Array]:
        """log(1 + exp(v)), and its derivative; exactly 0 far below 0, and relatively exact on the
        way there."""
        e = self.exp2(jnp.abs(v) * -LOG2_E)
        positive = jnp.maximum(v, 0)
        if self.interpret:
            return positive + jnp.log1p(e), jax.nn.sigmoid(v)
        slope = jnp.where(v < 0, e, 1.0) * ptx.reciprocal(1 + e, interpret=False)
        large = ptx.ptx("lg2.approx.ftz.f32 $0, $1;", "=f,f", 1 + e)
        # log(1 + e) loses what 1 + e rounds away: below 1/32 its series, to 2^-25.
        small = self.fma(e, jnp.full_like(e, -1 / 4), jnp.full_like(e, 1 / 3))
        small = self.fma(-e, small, jnp.full_like(e, 1 / 2))
        small = self.fma(-e, small, jnp.ones_like(e))
        near = e < 1 / 32
        softplus = self.fma(
            jnp.where(near, e, large), jnp.where(near, small, jnp.full_like(e, LN_2)), positive
        )
        return softplus, slope

    def of_step(self, v: Array, step: int) -> Array:
        """[T] elements to [T]: in every lane its channel's element of one step."""
        if self.interpret:
            v_C4 = v.reshape(-1, 4)
            return jnp.broadcast_to(v_C4[:, step : step + 1], v_C4.shape).reshape(-1)
        return ptx.ptx(f"shfl.sync.idx.b32 $0, $1, {step}, 0x1c1f, 0xffffffff;", "=f,f", v)

    def rounded(self, v: Array) -> Array:
        """Half a unit of tf32 more, so that a product, which cuts v, rounds it. NaN stays NaN."""
        if self.interpret:
            return v
        return jnp.where(jnp.isnan(v), v, _bits(_bits(v, jnp.int32) + 2**12, jnp.float32))

    def split(self, v: Array) -> Parts:
        """What products take for v. With `exact` v rounded to tf32 and the rest, else v as it is,
        to be cut: rounding would cost one instruction a value."""
        if not self.exact:
            return (v,)
        leading = _bits((_bits(v, jnp.int32) + 2**12) & -(2**13), jnp.float32)
        return leading, v - leading  # the rest is NaN where v is

    def split_rounded(self, v: Array) -> Parts:
        """`split` for elements, where the instruction is cheap."""
        return self.split(v) if self.exact else (self.rounded(v),)

    def outer(self, u: Parts, b: Parts) -> list[Array]:
        """u b of each of 4 steps, [T, 4]; u elements, from `split_rounded`.

        Registers of b: lane 4 n + step has states 2 n and 2 n + 1."""
        nothing = jnp.zeros((self.width, 4), jnp.float32)
        halves_of_b = list(zip(*(unzipped(v)[:2] for v in b), strict=True))
        results = []
        for step in (0, 2):
            # One product serves two steps, its rows r and r + 8; others are masked.
            masked = [[_chosen(v, self.step() == step + i) for i in range(2)] for v in u]
            rows = [zipped(*pair, *pair) for pair in masked]
            products = [
                unzipped(self._products(nothing, rows, [self._tile(v) for v in half], k=4))
                for half in halves_of_b
            ]
            for i in (0, 2):
                results.append(zipped(*(v for p in products for v in p[i : i + 2])))
        return results

    def over_states(self, into: Array, h: Sequence[Array], c: Sequence[Parts], step: int) -> Array:
        """into, [T], with sum_n h c of one step in that step's lanes, from all sets of states.

        Registers of c: lane 8 step + 4 i + m has states 4 m + 2 i and the next."""
        total = jnp.zeros((self.width, 4), jnp.float32)
        for tile, factor in zip(h, c, strict=True):
            total = self._products(total, self.split(tile), factor)
        # Two parts of a sum lie in rows r and r + 8.
        first, _, _, last = unzipped(total)
        return jnp.where(self.step() == step, first + last, into)

    def over_lanes(self, v: Sequence[Array]) -> Array:
        """[T], elements: for each of 4 steps, the sums over a channel's 4 lanes of [T]."""
        total = jnp.zeros((self.width, 4), jnp.float32)
        for step in (0, 2):
            # Rows r have one step, rows r + 8 the next; each pair has half of the columns.
            rows = zipped(v[step], v[step + 1], v[step], v[step + 1])
            ones = self._tile(jnp.where(self.lane() >> 4 == step // 2, 1.0, 0.0))
            total = self._products(total, self.split(rows), (ones,), k=4)
        first, _, second, _ = unzipped(total)
        return jnp.where((self.step() & 1) != 0, second, first)

    def across(self, even: Array, odd: Array) -> Parts:
        """Two vectors of elements as `over_channels` takes them.

        Lane 4 (2 step + p) + k has channels 2 k and 2 k + 1 of the p-th vector: as a pair of
        bfloat16, or with `exact` each by itself."""
        if not self.exact:
            return (self._transposed(self._pair(even, odd)),)
        return self._transposed_exactly(even, odd)

    def over_channels(self, total: Array, h: Sequence[Array], v: Parts, step: int, p: int) -> Array:
        """total, [T, 4], and the sums of h v over the warp's channels: of the states h of two
        steps from `step` on, and the p-th vector in v, from `across`.

        Register 2 half + p of lane 4 i + step has state 2 i + half. Factors are rounded to
        bfloat16, unless `exact`."""
        masks = [self.lane() >> 2 == 2 * (step + i) + p for i in range(2)]
        if self.exact:
            for tile, mask in zip(h, masks, strict=True):
                h0, h1, h2, h3 = unzipped(tile)
                first, later = zip(
                    self._transposed_exactly(h0, h1), self._transposed_exactly(h2, h3), strict=True
                )
                v0, v1 = (_chosen(w, mask) for w in v)
                total = self._products(
                    total, self.split(zipped(*first, *later)), self.split(zipped(v0, v1, v0, v1))
                )
            return total
        registers = []
        for tile in h:
            h0, h1, h2, h3 = unzipped(tile)
            registers += [self._transposed(self._pair(*pair)) for pair in ((h0, h1), (h2, h3))]
        v0, v1 = (jnp.where(mask, v[0], 0) for mask in masks)
        return self._product_of_pairs(total, zipped(*registers), zipped(v0, v1, v0, v1))

    def _pair(self, low: Array, high: Array) -> Array:
        """[T] int32 of two values rounded to bfloat16."""
        if self.interpret:
            low, high = (_bits(v.astype(jnp.bfloat16), jnp.uint16) for v in (low, high))
            return _joined(low, high)
        return ptx.ptx("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", low, high, dtype=jnp.int32)

    def _transposed(self, pairs: Array) -> Array:
        """[T] pairs of 16 bits. Lane 4 i + k has columns 2 k and 2 k + 1 of row i of a square of
        8 x 8, and gets those of column i."""
        if self.interpret:
            square = jnp.stack(_parted(pairs), axis=-1).reshape(-1, 8, 8).swapaxes(1, 2)
            return _joined(*jnp.unstack(square.reshape(-1, 2), axis=1))
        code = "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;"
        return ptx.ptx(code, "=r,r", pairs, dtype=jnp.int32)

    def _transposed_exactly(self, low: Array, high: Array) -> tuple[Array, Array]:
        """The same of pairs of float32, in two halves."""
        (l0, l1), (h0, h1) = (_parted(_bits(v, jnp.int32)) for v in (low, high))
        lower, upper = (self._transposed(_joined(*v)) for v in ((l0, h0), (l1, h1)))
        halves = zip(_parted(lower), _parted(upper), strict=True)
        first, second = (_bits(_joined(*v), jnp.float32) for v in halves)
        return first, second

    def _tile(self, v: Array) -> Array:
        return jnp.broadcast_to(v[:, None], (self.width, 4))

    def _products(
        self, total: Array, rows: Sequence[Array], columns: Sequence[Array], k: int = 8
    ) -> Array:
        """Of all parts but of two rests, which is below the last bit."""
        for i, row_part in enumerate(rows):
            for j, column_part in enumerate(columns):
                if i + j < 2:
                    total = self._product(total, row_part, column_part, k=k)
        return total

    def _product(self, total: Array, rows: Array, columns: Array, *, k: int = 8) -> Array:
        """total + rows columns on the tensor cores, for every warp; all three are [T, 4].

        rows: 16 x k. Register r of lane 4 i + j is at row i + 8 (r & 1), column j + 4 (r >> 1).
        columns: k x 8. Register r of lane 4 i + j is at row j + 4 r, column i.
        total: 16 x 8. Register r of lane 4 i + j is at row i + 8 (r >> 1), column 2 j + (r & 1).
        The first k / 2 registers of `rows` and k / 4 of `columns` count.
        """
        if self.interpret:
            a = jnp.concatenate(
                [
                    jnp.concatenate(
                        [rows[:, r + i].reshape(-1, 8, 4) for r in range(0, k // 2, 2)], 2
                    )
                    for i in range(2)
                ],
                axis=1,
            )
            b = jnp.concatenate([columns[:, r].reshape(-1, 8, 4) for r in range(k // 4)], axis=2)
            return _added_product(total, a, b)
        kind = f"m16n8k{k}.row.col.f32.tf32.tf32.f32"
        return self._mma(kind, k // 4, total, _bits(rows, jnp.int32), _bits(columns, jnp.int32))

    def _product_of_pairs(self, total: Array, rows: Array, columns: Array) -> Array:
        """`_product` of bfloat16 in pairs, k = 16.

        rows: register r of lane 4 i + j is at row i + 8 (r & 1), columns 2 j + 8 (r >> 1) and next.
        columns: register r of lane 4 i + j is at rows 2 j + 8 r and next, column i."""
        if self.interpret:

            def of(v: Array, r: int) -> Array:
                parts = [_bits(w, jnp.bfloat16).astype(jnp.float32) for w in _parted(v[:, r])]
                return jnp.stack(parts, axis=-1).reshape(-1, 8, 8)

            a = jnp.concatenate(
                [jnp.concatenate([of(rows, i), of(rows, 2 + i)], axis=2) for i in range(2)], axis=1
            )
            b = jnp.concatenate([of(columns, r) for r in range(2)], axis=2)
            return _added_product(total, a, b)
        return self._mma("m16n8k16.row.col.f32.bf16.bf16.f32", 2, total, rows, columns)

    def _mma(self, kind: str, count: int, total: Array, rows: Array, columns: Array) -> Array:
        """`count` registers of columns and twice as many of rows count."""
        a = ",".join(f"${8 + r}" for r in range(2 * count))
        b = ",".join(f"${12 + r}" for r in range(count))
        code = f"mma.sync.aligned.{kind} {{$0,$1,$2,$3}}, {{{a}}}, {{{b}}}, {{$4,$5,$6,$7}};"
        constraints = "=f,=f,=f,=f,f,f,f,f,r,r,r,r,r,r,r,r"
        return ptx.ptx(code, constraints, total, rows, columns, pack=4)


def _bits(v: Array, dtype: Any) -> Array:
    return lax.bitcast_convert_type(v, dtype)


def _parted(pairs: Array) -> tuple[Array, Array]:
    """The 16 bits below and above."""
    v = _bits(pairs, jnp.uint32)
    return (v & 0xFFFF).astype(jnp.uint16), (v >> 16).astype(jnp.uint16)


def _joined(low: Array, high: Array) -> Array:
    return _bits(low.astype(jnp.uint32) | high.astype(jnp.uint32) << 16, jnp.int32)


def _added_product(total: Array, a: Array, b: Array) -> Array:
    """Of [warps, 16, k] and [warps, 8, k], in the registers of `total`."""
    d = jnp.einsum("wik,wjk->wij", a, b, precision="highest").reshape(-1, 2, 8, 4, 2)
    return total + d.transpose(0, 2, 3, 1, 4).reshape(-1, 4)


def _chosen(v: Array, mask: Array) -> Array:
    """v where mask, else 0."""
    return jnp.where(mask, v, 0.0)


def unzipped(tile: Array) -> tuple[Array, Array, Array, Array]:
    """The columns of [T, 4]. In registers: nothing moves."""
    even, odd = jnp.unstack(tile.reshape(-1, 2, 2), axis=-1)
    (v0, v2), (v1, v3) = jnp.unstack(even, axis=-1), jnp.unstack(odd, axis=-1)
    return v0, v1, v2, v3


def zipped(v0: Array, v1: Array, v2: Array, v3: Array) -> Array:
    """[T, 4] of columns."""
    even, odd = jnp.stack([v0, v2], axis=-1), jnp.stack([v1, v3], axis=-1)
    return jnp.stack([even, odd], axis=-1).reshape(-1, 4)


def swapped(tile: Array) -> Array:
    """States in their order to states in the order of registers, and back."""
    v0, v1, v2, v3 = unzipped(tile)
    return zipped(v0, v2, v1, v3)
