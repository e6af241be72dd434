"""Bodies of the Mosaic TPU kernels of the selective scan: one chunk of time x one tile of channels.

A tile has 1024 channels. For the recurrence they fill a vector register, 8 sublanes x 128 lanes,
so each state n of a step is one register, sums over n are plain additions and b_t[n], c_t[n] are
registers of one value. Inputs come with time along the sublanes: a strided store or load (row
stride 8) on a float32 scratch of rows (step, sublane group) is the whole change of layout.

Scratch rows: `dense` arrays have row 8 step + group; `spread` ones row N step + state, that
state's value in all lanes. Sizes: C steps of a chunk, N states, K tiles of channels.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.selective_scan.operands import NEUTRAL_DT

SUBLANES, LANES = 8, 128
TILE = SUBLANES * LANES
LOG2E = 1.4426950408889634
# Steps that are prepared at once: the rows of one bfloat16 register.
PACK = 16
# In place of dt at a reset: with any a <= -1e-30 the decay exp2(dt a) is exactly 0, and times the
# zero gradient behind it this stays 0. Cheaper than a factor or a choice per state.
FORGET_DT = 1e33
# Steps of time that are unrolled in a recurrence, forward and backward, and elsewhere.
FORWARD_STEPS, BACKWARD_STEPS, PARALLEL_STEPS = 8, 4, 2 * PACK
# Such blocks of steps in one trip of a loop.
TOGETHER = 2
# States whose steps are unrolled together; more run in a loop.
_STATES = 16


class Inputs(NamedTuple):
    """What both kernels read. x, dt, z: [1, C, TILE]; b, c: [1, 1, N, C]; reset: [1, 1, 1, C];
    a (times log2 e): [N, 8 K, 128]; d, dt_bias: [1, TILE K]."""

    x: Any
    dt: Any
    z: Any | None
    b: Any
    c: Any
    reset: Any | None
    a: Any
    d: Any
    dt_bias: Any


class ForwardOutputs(NamedTuple):
    """y: as x. last: [1, N, 8, 128]. first, the state before the chunk: [1, 1, N, 8, 128]."""

    y: Any
    last: Any
    first: Any | None


class ForwardScratch(NamedTuple):
    h: Any  # [8 N K, 128]
    dt: Any  # dense
    u: Any  # dense: dt x, then y
    b: Any  # spread
    c: Any
    reset: Any | None  # [C, 128]


class Gradients(NamedTuple):
    """Of x, dt, z as these; db, dc: [1, 1, N, C]; da: [1, N, 8 K, 128]; dd, ddt_bias:
    [1, 8, TILE K] with the sum over sublanes left; dh0: [1, N, 8, 128]."""

    x: Any
    dt: Any
    z: Any
    b: Any
    c: Any
    a: Any
    d: Any
    dt_bias: Any
    h0: Any


class BackwardScratch(NamedTuple):
    adjoint: Any  # [8 N K, 128]: gradient of the state
    dt: Any  # dense; then ddt
    u: Any  # dense; then du
    dy: Any  # dense; then y
    b: Any  # spread
    c: Any
    reset: Any | None
    h: Any  # [8 N (C + 1), 128]: the chunk's states, row 8 (N step + state)
    db: Any  # [8 N C, 128]: the sum over tiles of channels
    dc: Any
    true_dt: Any  # [C, TILE], as are the next three
    slope: Any  # of softplus
    gated: Any  # gradient of y before the gate
    gate_slope: Any  # dy times the gate's slope; None without a gate


def softplus(raw: Array) -> tuple[Array, Array]:
    """log(1 + exp(raw)) and its slope, to a relative error of about 1e-7 everywhere."""
    e = jnp.exp2(-LOG2E * jnp.abs(raw))
    u = 1 + e
    # log(u) alone loses what 1 + e rounds off; near u = 1 the hardware's logarithm is not trusted.
    log1p = jnp.where(e < 2**-8, e * (1 + e * (e * (1 / 3) - 0.5)), jnp.log(u) + (e - (u - 1)))
    r = pltpu.reciprocal(u, full_range=False)
    return jnp.maximum(raw, 0) + log1p, jnp.where(raw > 0, r, e * r)


def sigmoid(v: Array) -> Array:
    # Below -80 it is less than 2e-35, and exp2 would leave the reciprocal's range.
    return pltpu.reciprocal(1 + jnp.exp2(-LOG2E * jnp.maximum(v, -80)), full_range=False)


def _rows(start: Any, size: int) -> Any:
    return pl.ds(pl.multiple_of(start, size), size)


def _natural(step: Any, group: Any) -> Any:
    """The dense rows of SUBLANES steps of one group of 128 channels."""
    return pl.ds(step * SUBLANES + group, SUBLANES, stride=SUBLANES)


def _load_natural(ref: Any, step: Any, group: Any) -> Array:
    halves = [ref[_natural(step + half, group), :] for half in range(0, PACK, SUBLANES)]
    return jnp.concatenate(halves, 0)


def _store_natural(ref: Any, step: Any, group: Any, value: Array) -> None:
    for half in range(0, PACK, SUBLANES):
        ref[_natural(step + half, group), :] = value[half : half + SUBLANES]


def _for_natural_tiles(
    C: int,
    body: Callable[[Any, Any, Any, Any], None],
    unroll: bool,
    most_steps: int = PARALLEL_STEPS,
) -> None:
    """Calls body(first step, group, rows, columns) for every [PACK, 128] of a [C, TILE] block."""
    packs = most_steps // PACK if unroll and C % most_steps == 0 else 1

    def steps(i: Any, _: None) -> None:
        for pack in range(packs):
            step = pl.multiple_of((i * packs + pack) * PACK, PACK)

            def one_group(group: Any, _: None, step: Any = step) -> None:
                body(step, group, pl.ds(step, PACK), _rows(group * LANES, LANES))

            lax.fori_loop(0, SUBLANES, one_group, None, unroll=unroll)

    lax.fori_loop(0, C // (packs * PACK), steps, None)


def _inside(
    L: int, E: int, C: int, chunk: Any, tile: Any
) -> Callable[[Array, float, Any, Any], Array]:
    """keep(v, fill, step, group): v, and `fill` past the last step or channel, where blocks of
    [B, L, E] arrays hold what happens to lie in memory."""
    step_of = lax.broadcasted_iota(jnp.int32, (PACK, LANES), 0)
    lane = lax.broadcasted_iota(jnp.int32, (PACK, LANES), 1)

    def keep(v: Array, fill: float, step: Any, group: Any) -> Array:
        if L % C:
            v = jnp.where(step_of < L - chunk * C - step, v, fill)
        if E % TILE:
            v = jnp.where(lane < E - tile * TILE - group * LANES, v, fill)
        return v

    return keep


def _for_blocks(count: int, body: Callable[[Any], None], unroll: bool) -> None:
    """Calls body(i) for i < count. Two in one trip, so that the second begins as the first ends."""
    together = TOGETHER if unroll else 1

    def blocks(i: Any, _: None) -> None:
        for k in range(together):
            body(i * together + k)

    lax.fori_loop(0, count // together, blocks, None)


def _for_states(N: int, body: Callable[[Any, Any], Any], carry: Any, unroll: bool) -> Any:
    """carry = body(n, carry) for every state."""
    group = min(N, _STATES)

    def states(i: Any, carry: Any) -> Any:
        one_state = lambda n, carry: body(i * group + n, carry)  # noqa: E731
        return lax.fori_loop(0, group, one_state, carry, unroll=unroll)

    return states(0, carry) if group == N else lax.fori_loop(0, N // group, states, carry)


def _spread(ins: Inputs, scratch: Any, wanted: Array) -> None:
    """b, c and reset with the value of each step in all lanes, for all tiles of channels."""
    N, width = ins.b.shape[2:]
    C = scratch.b.shape[0] // N

    def steps(i: Any, _: None) -> None:
        first = pl.multiple_of(i * PACK, PACK)
        # The step wanted comes to lane 0: lanes are cheap to read at a static index only.
        shift = jnp.where(first == 0, 0, width - first)
        for ref, rows in ((ins.b, scratch.b), (ins.c, scratch.c)):
            v = pltpu.roll(ref[0, 0], shift, 1)
            for j in range(PACK):
                row = _rows((first + j) * N, N)
                rows[row, :] = jnp.broadcast_to(v[:, j : j + 1], (N, LANES))
        if ins.reset is not None:
            v = pltpu.roll(jnp.broadcast_to(ins.reset[0, 0], (SUBLANES, width)), shift, 1)
            for j in range(PACK):
                column = jnp.broadcast_to(v[:, j : j + 1], (SUBLANES, LANES))
                scratch.reset[pl.ds(first + j, 1), :] = column[:1]

    lax.fori_loop(0, jnp.where(wanted, C // PACK, 0), steps, None)


def _with_resets(dt: Array, reset_ref: Any, rows: Any) -> Array:
    return dt if reset_ref is None else jnp.where(reset_ref[rows, :] > 0, FORGET_DT, dt)


def _columns(ref: Any, tile: Any, group: Any) -> Array:
    """[1, 128] of a row of all channels."""
    return ref[:, _rows(tile * TILE + group * LANES, LANES)]


def forward(
    ins: Inputs,
    h0: Any,
    out: ForwardOutputs,
    scratch: ForwardScratch,
    *,
    L: int,
    E: int,
    unroll: bool,
) -> None:
    """Grid (batch, chunk, tile of channels)."""
    U = FORWARD_STEPS if unroll else 1
    chunk, tile = pl.program_id(1), pl.program_id(2)
    N, C = ins.b.shape[2], ins.x.shape[1]
    tile_rows = _rows(tile * SUBLANES, SUBLANES)
    keep = _inside(L, E, C, chunk, tile)

    def state(n: Any) -> Any:
        return _rows((tile * N + n) * SUBLANES, SUBLANES)

    _spread(ins, scratch, tile == 0)

    @pl.when(chunk == 0)
    def _() -> None:
        for n in range(N):
            scratch.h[state(n), :] = h0[0, n]

    if out.first is not None:
        for n in range(N):
            out.first[0, 0, n] = scratch.h[state(n), :]

    def prepare(step: Any, group: Any, rows: Any, columns: Any) -> None:
        raw = ins.dt[0, rows, columns].astype(jnp.float32) + _columns(ins.dt_bias, tile, group)
        x = ins.x[0, rows, columns].astype(jnp.float32)
        dt, _ = softplus(keep(raw, NEUTRAL_DT, step, group))
        _store_natural(scratch.u, step, group, dt * keep(x, 0, step, group))
        _store_natural(scratch.dt, step, group, _with_resets(dt, scratch.reset, rows))

    _for_natural_tiles(C, prepare, unroll)

    def steps(i: Any) -> None:
        times = [i * U + j for j in range(U)]
        dt = [scratch.dt[_rows(t * SUBLANES, SUBLANES), :] for t in times]
        u = [scratch.u[_rows(t * SUBLANES, SUBLANES), :] for t in times]

        def one_state(n: Any, y: tuple[Array, ...]) -> tuple[Array, ...]:
            a, h, sums = ins.a[n, tile_rows, :], scratch.h[state(n), :], []
            for j, t in enumerate(times):
                row = pl.ds(t * N + n, 1)
                h = jnp.exp2(dt[j] * a) * h + u[j] * scratch.b[row, :]
                term = h * scratch.c[row, :]
                sums.append(y[j] + term)
            scratch.h[state(n), :] = h
            return tuple(sums)

        y = _for_states(N, one_state, tuple(jnp.zeros_like(v) for v in dt), unroll)
        for j, t in enumerate(times):
            scratch.u[_rows(t * SUBLANES, SUBLANES), :] = y[j]

    _for_blocks(C // U, steps, unroll)

    def finish(step: Any, group: Any, rows: Any, columns: Any) -> None:
        y = _load_natural(scratch.u, step, group)
        y = y + _columns(ins.d, tile, group) * ins.x[0, rows, columns].astype(jnp.float32)
        if ins.z is not None:
            z = ins.z[0, rows, columns].astype(jnp.float32)
            y = y * (z * sigmoid(z))
        out.y[0, rows, columns] = y.astype(out.y.dtype)

    _for_natural_tiles(C, finish, unroll)

    @pl.when(chunk == pl.num_programs(1) - 1)
    def _() -> None:
        for n in range(N):
            out.last[0, n] = scratch.h[state(n), :]


def backward(
    ins: Inputs,
    first: Any,
    dy: Any,
    dlast: Any,
    out: Gradients,
    scratch: BackwardScratch,
    *,
    L: int,
    E: int,
    unroll: bool,
) -> None:
    """Grid (batch, chunk from the last, tile of channels).

    first: [1, 1, N, 8, 128]; dy: as x; dlast: [1, N, 8, 128].
    """
    U, V = (FORWARD_STEPS, BACKWARD_STEPS) if unroll else (1, 1)
    chunk, tile = pl.program_id(1), pl.program_id(2)
    chunks, tiles = pl.num_programs(1), pl.num_programs(2)
    N, C = ins.b.shape[2], ins.x.shape[1]
    tile_rows = _rows(tile * SUBLANES, SUBLANES)
    keep = _inside(L, E, C, chunks - 1 - chunk, tile)

    def state(n: Any) -> Any:
        return _rows((tile * N + n) * SUBLANES, SUBLANES)

    def at(t: Any, n: Any) -> Any:
        return _rows((t * N + n) * SUBLANES, SUBLANES)

    _spread(ins, scratch, tile == 0)

    def clear(i: Any, _: None) -> None:
        rows = _rows(i * N * SUBLANES, N * SUBLANES)
        for ref in (scratch.db, scratch.dc):
            ref[rows, :] = jnp.zeros((N * SUBLANES, LANES), jnp.float32)

    # Once per row of the batch: after each chunk `_sum_channels` leaves zeros.
    lax.fori_loop(0, jnp.where((chunk == 0) & (tile == 0), C, 0), clear, None)

    @pl.when(chunk == 0)
    def _() -> None:
        for n in range(N):
            scratch.adjoint[state(n), :] = dlast[0, n]
            out.a[0, n, tile_rows, :] = jnp.zeros((SUBLANES, LANES), jnp.float32)
        columns = _rows(tile * TILE, TILE)
        out.d[0, :, columns] = jnp.zeros((SUBLANES, TILE), jnp.float32)
        out.dt_bias[0, :, columns] = jnp.zeros((SUBLANES, TILE), jnp.float32)

    def prepare(step: Any, group: Any, rows: Any, columns: Any) -> None:
        raw = ins.dt[0, rows, columns].astype(jnp.float32) + _columns(ins.dt_bias, tile, group)
        x = ins.x[0, rows, columns].astype(jnp.float32)
        dt, slope = softplus(keep(raw, NEUTRAL_DT, step, group))
        scratch.true_dt[rows, columns], scratch.slope[rows, columns] = dt, slope
        _store_natural(scratch.u, step, group, dt * keep(x, 0, step, group))
        _store_natural(scratch.dt, step, group, _with_resets(dt, scratch.reset, rows))
        dy_now = dy[0, rows, columns].astype(jnp.float32)
        if ins.z is not None:
            z = ins.z[0, rows, columns].astype(jnp.float32)
            s = sigmoid(z)
            gate = z * s
            scratch.gate_slope[rows, columns] = dy_now * (s + gate * (1 - s))
            dy_now = dy_now * gate
        dy_now = keep(dy_now, 0, step, group)
        scratch.gated[rows, columns] = dy_now
        _store_natural(scratch.dy, step, group, dy_now)

    # More at once spills.
    _for_natural_tiles(C, prepare, unroll, PACK)

    for n in range(N):
        scratch.h[at(0, n), :] = first[0, 0, n]

    def recompute(i: Any) -> None:
        times = [i * U + j for j in range(U)]
        dt = [scratch.dt[_rows(t * SUBLANES, SUBLANES), :] for t in times]
        u = [scratch.u[_rows(t * SUBLANES, SUBLANES), :] for t in times]

        def one_state(n: Any, _: None) -> None:
            a, h = ins.a[n, tile_rows, :], scratch.h[at(times[0], n), :]
            for j, t in enumerate(times):
                h = jnp.exp2(dt[j] * a) * h + u[j] * scratch.b[pl.ds(t * N + n, 1), :]
                scratch.h[at(t + 1, n), :] = h

        _for_states(N, one_state, None, unroll)

    _for_blocks(C // U, recompute, unroll)

    def steps(i: Any) -> None:
        times = [C - (i + 1) * V + j for j in range(V)]
        dt, u, dy_now = (
            [ref[_rows(t * SUBLANES, SUBLANES), :] for t in times]
            for ref in (scratch.dt, scratch.u, scratch.dy)
        )

        def one_state(n: Any, sums: tuple[list[Array], ...]) -> tuple[list[Array], ...]:
            y, du, ddt = (list(v) for v in sums)
            a, g, da = (
                ins.a[n, tile_rows, :],
                scratch.adjoint[state(n), :],
                out.a[0, n, tile_rows, :],
            )
            h = [scratch.h[at(times[0] + j, n), :] for j in range(V + 1)]
            b, c = ([ref[pl.ds(t * N + n, 1), :] for t in times] for ref in (scratch.b, scratch.c))
            db, dc = ([ref[at(t, n), :] for t in times] for ref in (scratch.db, scratch.dc))
            for j in reversed(range(V)):
                g = g + dy_now[j] * c[j]
                y[j] = y[j] + h[j + 1] * c[j]
                dc[j] = dc[j] + h[j + 1] * dy_now[j]
                db[j] = db[j] + g * u[j]
                du[j] = du[j] + g * b[j]
                g = g * jnp.exp2(dt[j] * a)
                p = g * h[j]
                ddt[j] = ddt[j] + p * a
                da = da + p * dt[j]
            scratch.adjoint[state(n), :] = g
            out.a[0, n, tile_rows, :] = da
            for j, t in enumerate(times):
                scratch.db[at(t, n), :] = db[j]
                scratch.dc[at(t, n), :] = dc[j]
            return y, du, ddt

        zeros = [jnp.zeros((SUBLANES, LANES), jnp.float32)] * V
        y, du, ddt = _for_states(N, one_state, (zeros, zeros, zeros), unroll)
        for j, t in enumerate(times):
            rows = _rows(t * SUBLANES, SUBLANES)
            scratch.dy[rows, :], scratch.u[rows, :], scratch.dt[rows, :] = y[j], du[j], ddt[j]

    _for_blocks(C // V, steps, unroll)

    def finish(step: Any, group: Any, rows: Any, columns: Any) -> None:
        x = keep(ins.x[0, rows, columns].astype(jnp.float32), 0, step, group)
        d = _columns(ins.d, tile, group)
        dy_now, du = scratch.gated[rows, columns], _load_natural(scratch.u, step, group)
        dx = du * scratch.true_dt[rows, columns] + d * dy_now
        out.x[0, rows, columns] = dx.astype(out.x.dtype)
        # a holds log2 e times the rates.
        ddt = _load_natural(scratch.dt, step, group) * (1 / LOG2E) + du * x
        ddt = ddt * scratch.slope[rows, columns]
        out.dt[0, rows, columns] = ddt.astype(out.dt.dtype)
        if ins.z is not None:
            y = _load_natural(scratch.dy, step, group) + d * x
            dz = y * scratch.gate_slope[rows, columns]
            out.z[0, rows, columns] = dz.astype(out.z.dtype)
        all_columns = _rows(tile * TILE + group * LANES, LANES)
        dd = dy_now * x
        out.d[0, :, all_columns] += dd[:SUBLANES] + dd[SUBLANES:]
        out.dt_bias[0, :, all_columns] += ddt[:SUBLANES] + ddt[SUBLANES:]

    _for_natural_tiles(C, finish, unroll)

    _sum_channels(((scratch.db, out.b), (scratch.dc, out.c)), C, tile == tiles - 1)

    @pl.when(chunk == chunks - 1)
    def _() -> None:
        for n in range(N):
            out.h0[0, n] = scratch.adjoint[state(n), :]


def _sum_channels(pairs: Sequence[tuple[Any, Any]], C: int, wanted: Array) -> None:
    """For (ref, out) out[0, 0, n, t] = sum of the register at row 8 (N t + n), and ref = 0."""
    N, width = pairs[0][1].shape[2:]
    lane = lax.broadcasted_iota(jnp.int32, (SUBLANES, width), 1)
    states = range(0, N, SUBLANES)

    def steps(i: Any, _: None) -> None:
        sums = [[out[0, 0, n : n + SUBLANES, :] for n in states] for _, out in pairs]
        for j in range(SUBLANES):
            t = i * SUBLANES + j
            # Taking turns, one array is cleared while the other is read.
            for k, (ref, _) in enumerate(pairs):
                for s, n in enumerate(states):
                    first = (t * N + n) * SUBLANES
                    parts = [
                        ref[pl.ds(first + group, SUBLANES, stride=SUBLANES), :]
                        for group in range(SUBLANES)
                    ]
                    total = functools.reduce(jnp.add, parts).sum(1, keepdims=True)
                    sums[k][s] = jnp.where(lane == t, total, sums[k][s])
                zeros = jnp.zeros((N * SUBLANES, LANES), jnp.float32)
                ref[_rows(t * N * SUBLANES, N * SUBLANES), :] = zeros
        for k, (_, out) in enumerate(pairs):
            for s, n in enumerate(states):
                out[0, 0, n : n + SUBLANES, :] = sums[k][s]

    lax.fori_loop(0, jnp.where(wanted, C // SUBLANES, 0), steps, None)
