"""Where a program of the Triton kernels of the selective scan reads and writes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

from pallas_kernels.ptx import LOG2_E
from pallas_kernels.selective_scan.triton_lanes import (
    CHANNELS,
    STATES,
    STEPS,
    Lanes,
    swapped,
)

Refs = Mapping[str, Any]


@dataclass(frozen=True)
class Plan:
    """Static sizes: L tokens, sets of 16 states, groups of 4 steps in a trip, and a chunk, the
    steps between saved states (None: none are saved). Program (i, j, k) of the grid works on row
    `rows` i + k + `first_row`."""

    lanes: Lanes
    L: int
    sets: int
    groups: int
    chunk: int | None = None
    rows: int = 1
    first_row: int = 0


class Group(NamedTuple):
    """4 steps: the group `later` groups after `first`.

    Kept apart, so that what differs between groups of a trip goes into instructions as it is."""

    first: Array
    later: int

    @property
    def number(self) -> Array:
        return self.first + self.later


class Place:
    """Where a program reads and writes, and the weights of its channels."""

    def __init__(self, ref: Refs, plan: Plan):
        self.ref, self.plan = ref, plan
        lanes = plan.lanes
        row = pl.program_id(0) * plan.rows + pl.program_id(2) + plan.first_row
        channels = ref["a_EN"].shape[0]
        self.row = bounded(row, ref["dt_BLE"].shape[0])
        self.block = bounded(pl.program_id(1), channels // (CHANNELS * lanes.warps))
        self.channel = self.block * (CHANNELS * lanes.warps) + lanes.channel()
        self.step = lanes.step()
        self.channels = jnp.broadcast_to(self.channel[:, None], (lanes.width, 4))
        self.lane = lanes.lane()
        self.four = lax.broadcasted_iota(jnp.int32, (lanes.width, 4), 1)
        self.states = [STATES * s + lanes.states() for s in range(plan.sets)]
        # Rates for exp2, per set of states.
        self.a = [
            swapped(plgpu.load(ref["a_EN"].at[self.channels, n]) * LOG2_E) for n in self.states
        ]
        self.dt_bias = plgpu.load(ref["dt_bias_E"].at[self.channel])
        self.d = plgpu.load(ref["d_E"].at[self.channel]) if "d_E" in ref else None
        # 1, which the compiler does not know: see `triton_kernels.py`.
        self.one = plgpu.load(ref["one"].at[self.row * 0])

    def _at(self, name: str, group: Group, step: Array, place: Array) -> Any:
        """A place in a step of a group, of [B, L x size of a step]."""
        ref = self.ref[name]
        size = ref.shape[1] // self.plan.L
        first = group.first * (STEPS * size) + (step * size + place)
        return ref.at[self.row, first + group.later * STEPS * size]

    def elements(self, names: tuple[str, ...], group: Group) -> dict[str, Array]:
        """[T] of each [B, L, E] input, and the reset flags if there are any."""
        loaded = {n: plgpu.load(self._at(n, group, self.step, self.channel)) for n in names}
        if "reset_BL" in self.ref and "dt_BLE" in names:
            flags = self._at("reset_BL", group, self.step, jnp.int32(0))
            loaded["reset_BL"] = plgpu.load(flags)
        return loaded

    def outer(self, name: str, group: Group) -> list[Any]:
        """Of each set of states what `Lanes.outer` takes of b or c: pairs of neighbouring states,
        [T] int32 of two bfloat16 or [T] float32 twice."""
        return self._pairs(name, group, self.step, self.lane >> 2)

    def inner(self, name: str, group: Group) -> list[Any]:
        """The same for `Lanes.over_states`."""
        pair = 2 * (self.lane & 3) + (self.lane >> 2 & 1)
        return self._pairs(name, group, self.lane >> 3, pair)

    def _pairs(self, name: str, group: Group, step: Array, pair: Array) -> list[Any]:
        pairs = [pair + STATES // 2 * s for s in range(self.plan.sets)]
        if self.ref[name].dtype == jnp.int32:
            return [plgpu.load(self._at(name, group, step, at)) for at in pairs]
        step_2 = jnp.broadcast_to(step[:, None], (self.plan.lanes.width, 2))
        two = lax.broadcasted_iota(jnp.int32, step_2.shape, 1)
        loads = [self._at(name, group, step_2, 2 * at[:, None] + two) for at in pairs]
        return [tuple(jnp.unstack(plgpu.load(at), axis=1)) for at in loads]

    def put(self, name: str, group: Group, value: Array) -> None:
        """Writes [T] elements of a group."""
        at = self._at(name, group, self.step, self.channel)
        plgpu.store(at, value.astype(self.ref[name].dtype))

    def zeros_after(self, v: Array) -> Array:
        """[T] int32: zeros, of which the compiler knows nothing before it has v."""
        return lax.bitcast_convert_type(v, jnp.int32) & (self.one - 1)

    def put_sum(self, name: str, value: Array) -> None:
        """Writes the sums over all steps of [T] sums over groups; all lanes of a channel do."""
        of_step = [self.plan.lanes.of_step(value, step) for step in range(STEPS)]
        total = (of_step[0] + of_step[1]) + (of_step[2] + of_step[3])
        plgpu.store(self.ref[name].at[self.row, self.channel], total)

    def load_states(self, name: str, *index: Array) -> list[Array]:
        """[T, 4] of each set, of [B, ..., E, N]."""
        ref = self.ref[name]
        loads = [ref.at[self.row, *index, self.channels, n] for n in self.states]
        return [swapped(plgpu.load(at)) for at in loads]

    def store_states(
        self, name: str, tiles: list[Array], *index: Array, row: Array | None = None
    ) -> None:
        ref, row = self.ref[name], self.row if row is None else row
        for n, tile in zip(self.states, tiles, strict=True):
            plgpu.store(ref.at[row, *index, self.channels, n], swapped(tile))

    def _kept(self, group: Array) -> list[Any]:
        thread = jnp.broadcast_to(
            jnp.arange(self.plan.lanes.width)[:, None], (self.plan.lanes.width, 4)
        )
        index = (self.row, self.block, group)
        return [self.ref["kept"].at[*index, s, thread, self.four] for s in range(self.plan.sets)]

    def store_kept(self, tiles: list[Array], group: Array) -> None:
        """Keeps the state before a group of the chunk, to be read by the same lanes."""
        for at, tile in zip(self._kept(group), tiles, strict=True):
            plgpu.store(at, tile)

    def load_kept(self, group: Array) -> list[Array]:
        return [plgpu.load(at) for at in self._kept(group)]

    def store_share(self, tile: Array, group: Array, s: int) -> None:
        """The warps' shares of a group's gradients of b and c, to be summed after a barrier."""
        lanes = self.plan.lanes
        warp = jnp.broadcast_to((jnp.arange(lanes.width) >> 5)[:, None], tile.shape)
        lane = jnp.broadcast_to(self.lane[:, None], tile.shape)
        index = (self.row, self.block, group & 1, s, warp)
        plgpu.store(self.ref["shares"].at[*index, 4 * lane + self.four], tile)

    def load_shares(self, group: Array) -> list[list[Array]]:
        """What `store_sums` takes: [T] of each warp and set, or twice as many for few lanes."""
        warps = self.plan.lanes.warps
        return [
            [
                plgpu.load(self.ref["shares"].at[self.row, self.block, group & 1, s, w, value])
                for w in range(warps)
            ]
            for s in range(self.plan.sets)
            for value in self._values()
        ]

    def store_sums(self, shares: list[list[Array]], group: Array) -> None:
        """The program's gradients of b and c in a group: shares summed over its warps."""
        ref, values = self.ref["dbc"], self._values()
        for i, share in enumerate(shares):
            total = share[0]
            for v in share[1:]:
                total = total + v
            # Value 4 lane + register, see `Lanes.over_channels`.
            s, value = i // len(values), values[i % len(values)]
            c_or_b, half, step, lane_4 = value & 1, value >> 1 & 1, value >> 2 & 3, value >> 4
            state = STATES * s + 2 * lane_4 + half
            at = ref.at[c_or_b, self.block, self.row, STEPS * group + step, state]
            plgpu.store(at, total.astype(ref.dtype))

    def _values(self) -> list[Array]:
        """Which of a tile's 128 values a lane sums; with many warps several sum the same."""
        lanes = self.plan.lanes
        thread = jnp.arange(lanes.width, dtype=jnp.int32)
        return [(thread + i) & 127 for i in range(0, 128, lanes.width)]


def bounded(index: Array, size: int) -> Array:
    """An index below size, which the compiler learns (it knows of bits, not of bounds).

    It can then put differences of addresses, which cannot overflow, into the instructions."""
    return index & ((1 << (size - 1).bit_length()) - 1)
