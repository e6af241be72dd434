"""The bodies of the Triton kernels of the selective scan; `pallas_triton.py` calls them.

Every program advances 8 W channels of one row of the batch from one end of L to the other, in the
layout of `triton_lanes.py`. Time is cut into groups of 4 steps and trips of several groups.

Loads of the next trip are issued before the present one is computed. Left alone, compilers undo
that, and every trip waits for memory, a third to a half of its time (stall samples of the H100):
they move loads down to where their values are used, or compute first what was written after the
loads. So `in_trips` puts each trip into a branch that is always taken but not known to be: its
condition has a factor that is loaded from memory.

What was loaded is turned into float32 at the end of the branch, not at the start of the next one,
because a wait for one load may be a wait for those just issued as well: a warp has six counters for
all its outstanding operations. Nor before the end: zeros that are made from the trip's last state,
and not known to be zeros, take part in the conversion. Address arithmetic waits in the same way
when it overwrites registers of loads that are under way, so there is as little of it as possible:
b and c come in packed registers, and `bounded` lets differences of addresses go into instructions.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from pallas_kernels.selective_scan.triton_lanes import (
    LN_2,
    RESET_DT,
    STEPS,
    Lanes,
    Parts,
    unzipped,
    zipped,
)
from pallas_kernels.selective_scan.triton_place import Group, Place, Plan, bounded

# What drives the states.
_DRIVE = ("x_BLE", "dt_BLE")
# Groups of a trip in which the backward pass computes states again, times sets of states.
_AGAIN = 4


def in_trips(
    place: Place,
    trips: int,
    fetch: Callable[[Array], Any],
    compute: Callable[[Array, Any, Any], tuple[Any, Array]],
    carry: Any,
    first: Any = None,
) -> Any:
    """The carry after compute(trip, arrived, carry) of every trip, which gives the next one and
    some float32 value that is known late; `arrived` is what fetch(trip) loaded, see `_arrived`.

    `first`: fetch(0) if it was called before."""

    def convert(loaded: Any, zeros: Array) -> Any:
        return jax.tree.map(lambda v: _arrived(v, zeros), loaded)

    def turn(trip: Array, state: Any) -> Any:
        carry, ready = state
        loaded = fetch(jnp.minimum(trip + 1, trips - 1))

        def taken(carry: Any, ready: Any) -> Any:
            carry, late = compute(trip, ready, carry)
            return carry, convert(loaded, place.zeros_after(late))

        # Its use of what was loaded keeps the loads before the branch. It has nothing in common
        # with the other branch, or that would move before the branch, too.
        def never_taken(carry: Any, ready: Any) -> Any:
            return carry, jax.tree.map(_otherwise, loaded)

        return lax.cond(trip < trips * place.one, taken, never_taken, carry, ready)

    at_once = jnp.zeros((place.plan.lanes.width,), jnp.int32)
    ready = convert(fetch(jnp.int32(0)) if first is None else first, at_once)
    if trips == 1:
        return compute(jnp.int32(0), ready, carry)[0]
    return lax.fori_loop(0, trips, turn, (carry, ready))[0]


def _held(v: Array, zeros: Array) -> Array:
    """v, when `zeros` is known."""
    return lax.bitcast_convert_type(lax.bitcast_convert_type(v, jnp.int32) | zeros, jnp.float32)


def _arrived(v: Array, zeros: Array) -> Array:
    """What was loaded when `zeros` is known, as float32; a pair stays packed, for the registers."""
    if v.ndim == 2:
        zeros = jnp.broadcast_to(zeros[:, None], v.shape)
    if v.dtype == jnp.bfloat16:
        bits = lax.bitcast_convert_type(v, jnp.uint16).astype(jnp.int32)
        return lax.bitcast_convert_type(bits << (16 | zeros), jnp.float32)
    if v.dtype == jnp.int32:
        return v | zeros
    return _held(v, zeros)


def _otherwise(v: Array) -> Array:
    """Values of the same kind that depend on v and are not what it arrives as."""
    if v.dtype == jnp.int32:
        return 3 * v
    bits = {2: jnp.int16, 4: jnp.int32}[v.dtype.itemsize]
    return (3 * lax.bitcast_convert_type(v, bits).astype(jnp.int32)).astype(jnp.float32)


class Prepared(NamedTuple):
    """Elements of a group: dt, its derivative, and what it is for decays; the input and dt x."""

    dt: Array
    slope: Array
    decay_dt: Array
    x: Array
    u: Array


def prepare(place: Place, loaded: Mapping[str, Array]) -> Prepared:
    dt, slope = place.plan.lanes.softplus(loaded["dt_BLE"] + place.dt_bias)
    decay_dt = dt
    if "reset_BL" in loaded:
        decay_dt = jnp.maximum(dt, loaded["reset_BL"])
    x = loaded.get("x_BLE", dt)
    return Prepared(dt, slope, decay_dt, x, dt * x)


def groups_of(first: Array, count: int) -> list[Group]:
    return [Group(first, later) for later in range(count)]


def parts(lanes: Lanes, pairs: list[Any]) -> list[Parts]:
    """Of each set of states what products take of arrived pairs."""

    def unpacked(pair: Any) -> Any:
        if isinstance(pair, tuple):
            return pair
        return tuple(
            lax.bitcast_convert_type(v, jnp.float32) for v in (pair << 16, pair & -(2**16))
        )

    return [lanes.split(zipped(*pair, *pair)) for pair in map(unpacked, pairs)]


def _inner(lanes: Lanes, p: list[Array], q: list[Array]) -> Array:
    """[T]: the sum of p q over the states of a lane."""
    factors = [
        pair for s in range(len(p)) for pair in zip(unzipped(p[s]), unzipped(q[s]), strict=True)
    ]
    total = factors[0][0] * factors[0][1]
    for v, w in factors[1:]:
        total = lanes.fma(v, w, total)
    return total


def _first(tiles: list[Array]) -> Array:
    """[T], one value of [T, 4]."""
    return unzipped(tiles[0])[0]


def _added(dt_sum: Array, decay_dt: Array) -> Array:
    """However many resets there are, the sum stays finite."""
    return jnp.minimum(dt_sum + decay_dt, RESET_DT)


def forward_kernel(*refs: Any, names: tuple[str, ...], plan: Plan) -> None:
    """h_BEN, the states after the last step, and what else there is room for: y_BLE; with chunks
    the states before each, starts_BCEN; dt_BE, the sums of what decays see of dt. Without h0_BEN
    from zero states."""
    ref = dict(zip(names, refs, strict=True))
    place, lanes, sets = Place(ref, plan), plan.lanes, range(plan.sets)
    zero_4 = jnp.zeros((lanes.width, 4), jnp.float32)
    d = place.d
    inputs = _DRIVE + tuple(n for n in ("z_BLE",) if n in ref)

    def fetch(trip: Array) -> Any:
        groups = groups_of(trip * plan.groups, plan.groups)
        return [
            (
                place.elements(inputs, g),
                place.outer("b_BLN", g),
                place.inner("c_BLN", g) if d is not None else [],
            )
            for g in groups
        ]

    def compute(trip: Array, loaded: Any, carry: Any) -> Any:
        h, dt_sum = list(carry[0]), carry[1]
        if plan.chunk:
            per_chunk = plan.chunk // (STEPS * plan.groups)

            @pl.when((trip & (per_chunk - 1)) == 0)
            def _save() -> None:
                place.store_states("starts_BCEN", h, trip >> (per_chunk.bit_length() - 1))

        for i, (elements, b, c) in enumerate(loaded):
            now = prepare(place, elements)
            b, c = parts(lanes, b), parts(lanes, c)
            u = lanes.split_rounded(now.u)
            entering = [lanes.outer(u, b[s]) for s in sets]
            y = jnp.zeros((lanes.width,), jnp.float32)
            for j in range(STEPS):
                dt = lanes.of_step(now.decay_dt, j)[:, None]
                for s in sets:
                    decay = lanes.exp2(dt * place.a[s])
                    h[s] = lanes.fma(decay, h[s], entering[s][j])
                if d is not None:
                    y = lanes.over_states(y, h, c, j)
            if d is not None:
                out = lanes.fma(d, now.x, y)
                if "z_BLE" in elements:
                    z = elements["z_BLE"]
                    out = out * (z * lanes.sigmoid(z))
                place.put("y_BLE", Group(trip * plan.groups, i), out)
            if dt_sum is not None:
                dt_sum = _added(dt_sum, now.decay_dt)
        return (h, dt_sum), _first(h)

    dt_sum = jnp.zeros((lanes.width,), jnp.float32) if "dt_BE" in ref else None
    trips = plan.L // (STEPS * plan.groups)
    start = (place.load_states("h0_BEN") if "h0_BEN" in ref else [zero_4 for _ in sets], dt_sum)
    h, dt_sum = in_trips(place, trips, fetch, compute, start)
    place.store_states("h_BEN", h)
    if dt_sum is not None:
        place.put_sum("dt_BE", dt_sum)


def adjoint_kernel(*refs: Any, names: tuple[str, ...], plan: Plan) -> None:
    """dh0_BEN, the gradient of the first state from those of the outputs, dy_BLE; and dt_BE as
    in `forward_kernel`."""
    ref = dict(zip(names, refs, strict=True))
    place, lanes, sets = Place(ref, plan), plan.lanes, range(plan.sets)
    inputs = ("dt_BLE", *(n for n in ("z_BLE", "dy_BLE") if n in ref))
    trips = plan.L // (STEPS * plan.groups)

    def fetch(i: Array) -> Any:
        groups = groups_of(bounded(trips - 1 - i, trips) * plan.groups, plan.groups)
        return [(place.elements(inputs, g), place.outer("c_BLN", g)) for g in groups]

    def compute(i: Array, loaded: Any, carry: Any) -> Any:
        state, dt_sum = list(carry[0]), carry[1]
        for elements, c in reversed(loaded):
            now = prepare(place, elements)
            dyg = elements["dy_BLE"]
            if "z_BLE" in elements:
                z = elements["z_BLE"]
                dyg = dyg * (z * lanes.sigmoid(z))
            dyg, c = lanes.split_rounded(dyg), parts(lanes, c)
            entering = [lanes.outer(dyg, c[s]) for s in sets]
            for j in reversed(range(STEPS)):
                dt = lanes.of_step(now.decay_dt, j)[:, None]
                for s in sets:
                    decay = lanes.exp2(dt * place.a[s])
                    state[s] = decay * (state[s] + entering[s][j])
            dt_sum = _added(dt_sum, now.decay_dt)
        return (state, dt_sum), _first(state)

    zero_4 = jnp.zeros((lanes.width, 4), jnp.float32)
    start = ([zero_4 for _ in sets], jnp.zeros((lanes.width,), jnp.float32))
    state, dt_sum = in_trips(place, trips, fetch, compute, start)
    place.store_states("dh0_BEN", state)
    place.put_sum("dt_BE", dt_sum)


def backward_kernel(*refs: Any, names: tuple[str, ...], plan: Plan) -> None:
    """All gradients; those of c and b as sums over a program's channels, those of weights as sums
    over a row, dh0_BEN only of the first of `rows`.

    Per chunk, from the last to the first: first the states before each trip, from the saved state
    before the chunk; then trip by trip backwards the states within, kept, and with them

        lambda_t = c_t dyg_t + exp(dt_{t+1} a) lambda_{t+1}     dyg = dy SiLU(z)
        db_t = sum_e lambda_t u_t           u = dt x
        dc_t = sum_e h_t dyg_t
        du_t = sum_n lambda_t b_t
        da = sum_t dt_t p_t                 p_t = lambda_t exp(dt_t a) h_{t-1}
        ddt_t = x_t du_t + sum_n a p_t
    """
    ref = dict(zip(names, refs, strict=True))
    place, lanes, sets = Place(ref, plan), plan.lanes, range(plan.sets)
    assert plan.chunk
    chunks, in_chunk = plan.L // plan.chunk, plan.chunk // STEPS
    inputs = _DRIVE + tuple(n for n in ("z_BLE", "dy_BLE") if n in ref)

    def chunk_backward(chunk: Array, carry: Any) -> Any:
        first = bounded(chunks - 1 - chunk, chunks) * in_chunk
        trips = in_chunk // plan.groups

        def groups_from_end(i: Array) -> list[Group]:
            number = (chunks - 1 - chunk) * trips + bounded(trips - 1 - i, trips)
            return groups_of(bounded(number, chunks * trips) * plan.groups, plan.groups)

        def kept(i: Array) -> list[list[Array]]:
            last = bounded(trips - 1 - i, trips) * plan.groups
            return [place.load_kept(last + g) for g in range(plan.groups)]

        def fetch_inputs(i: Array) -> Any:
            return [
                (
                    place.elements(inputs, g),
                    (place.outer("b_BLN", g), place.inner("c_BLN", g)),
                    (place.outer("c_BLN", g), place.inner("b_BLN", g)),
                )
                for g in groups_from_end(i)
            ]

        def fetch(i: Array) -> Any:
            return fetch_inputs(i), kept(i)

        def compute(i: Array, loaded: Any, carry: Any) -> Any:
            for group, of_inputs, h in reversed([*zip(groups_from_end(i), *loaded, strict=True)]):
                shares = place.load_shares(group.number + 1)
                carry, tiles = _group_backward(place, group, of_inputs, h, carry)
                # Of the group before, which is the next one in time.
                place.store_sums(shares, group.number + 1)
                for s in sets:
                    place.store_share(tiles[s], group.number, s)
                lanes.barrier()
            return carry, _first(carry[0])

        ahead = fetch_inputs(jnp.int32(0))
        _keep_states(place, first)
        return in_trips(place, trips, fetch, compute, carry, (ahead, kept(jnp.int32(0))))

    nothing = jnp.zeros((lanes.width,), jnp.float32)
    da = [jnp.zeros((lanes.width, 4), jnp.float32) for _ in sets]
    start = (place.load_states("dh_BEN"), da, nothing, nothing)
    dh, da, dd, dbias = lax.fori_loop(0, chunks, chunk_backward, start)
    place.store_sums(place.load_shares(jnp.int32(0)), jnp.int32(0))
    place.store_states("da_BEN", da)
    place.put_sum("dd_BE", dd)
    place.put_sum("ddt_bias_BE", dbias)
    first_row = pl.program_id(0)

    @pl.when(pl.program_id(2) == 0)
    def _first_row() -> None:
        place.store_states("dh0_BEN", dh, row=first_row)


def _keep_states(place: Place, first: Array) -> None:
    """Keeps the states before each group of a chunk, whose first group is `first`."""
    plan, lanes, sets = place.plan, place.plan.lanes, range(place.plan.sets)
    assert plan.chunk
    in_chunk = plan.chunk // STEPS
    in_trip = min(max(1, _AGAIN // plan.sets), in_chunk)

    chunk = first >> (in_chunk.bit_length() - 1)

    def fetch(trip: Array) -> Any:
        number = bounded(chunk * (in_chunk // in_trip) + trip, plan.L // (STEPS * in_trip))
        groups = groups_of(number * in_trip, in_trip)
        return [(place.elements(_DRIVE, g), place.outer("b_BLN", g)) for g in groups]

    def compute(trip: Array, loaded: Any, h: Any) -> Any:
        h = list(h)
        for g, (elements, b) in enumerate(loaded):
            place.store_kept(h, trip * in_trip + g)
            now, b = prepare(place, elements), parts(lanes, b)
            u = lanes.split_rounded(now.u)
            entering = [lanes.outer(u, b[s]) for s in sets]
            for j in range(STEPS):
                dt = lanes.of_step(now.decay_dt, j)[:, None]
                for s in sets:
                    decay = lanes.exp2(dt * place.a[s])
                    h[s] = lanes.fma(decay, h[s], entering[s][j])
        return h, _first(h)

    in_trips(place, in_chunk // in_trip, fetch, compute, place.load_states("starts_BCEN", chunk))


def _group_backward(
    place: Place, group: Group, inputs: Any, h: list[Array], carry: Any
) -> tuple[Any, list[Array]]:
    """carry: gradient of the state after the group, and the sums so far of a's, d's, dt_bias's.

    And per set of states the [T, 4] shares of the gradients of b and c."""
    elements, bc, cb = inputs
    lanes, sets = place.plan.lanes, range(place.plan.sets)
    nothing = jnp.zeros((lanes.width,), jnp.float32)
    zero_4 = jnp.zeros((lanes.width, 4), jnp.float32)
    d, (state, da, dd, dbias) = place.d, carry
    assert d is not None
    h, state, da = list(h), list(state), list(da)
    now = prepare(place, elements)
    (b_outer, c_inner), (c_outer, b_inner) = (
        [parts(lanes, v) for v in pairs] for pairs in (bc, cb)
    )
    dy = dyg = elements["dy_BLE"]
    through_gate = None
    if "z_BLE" in elements:
        z = elements["z_BLE"]
        sigmoid = lanes.sigmoid(z)
        dyg = dy * (z * sigmoid)
        through_gate = dy * (sigmoid * lanes.fma(z, 1 - sigmoid, jnp.ones_like(z)))
    u, across = lanes.split_rounded(now.u), lanes.across(dyg, now.u)
    entering = [lanes.outer(u, b_outer[s]) for s in sets]
    y, decays, before = nothing, [], []
    tiles: list[list[Any]] = [[None] * STEPS for _ in sets]
    dbc = [zero_4 for _ in sets]
    for j in range(STEPS):
        dt = lanes.of_step(now.decay_dt, j)[:, None]
        decays.append([lanes.exp2(dt * place.a[s]) for s in sets])
        before.append(list(h))
        for s in sets:
            h[s] = lanes.fma(decays[j][s], h[s], entering[s][j])
            tiles[s][j] = h[s]
        y = lanes.over_states(y, h, c_inner, j)
        if j % 2:
            for s in sets:
                dbc[s] = lanes.over_channels(dbc[s], tiles[s][j - 1 : j + 1], across, j - 1, 0)
    if through_gate is not None:
        out = lanes.fma(d, now.x, y)
        place.put("dz_BLE", group, through_gate * out)
    dd = lanes.fma(dyg, now.x, dd)

    # Not before the states are known: overlapping both halves takes more than 128 registers, and
    # then there is room for 3 programs of 4 warps instead of 4.
    dyg = _held(dyg, place.zeros_after(_first(h)))
    dyg_parts = lanes.split_rounded(dyg)
    entering = [lanes.outer(dyg_parts, c_outer[s]) for s in sets]
    du, through_decay = nothing, [nothing] * STEPS
    for j in reversed(range(STEPS)):
        dt = lanes.of_step(now.decay_dt, j)[:, None]
        for s in sets:
            state[s] = state[s] + entering[s][j]
            tiles[s][j] = state[s]
        du = lanes.over_states(du, state, b_inner, j)
        if j % 2 == 0:
            for s in sets:
                dbc[s] = lanes.over_channels(dbc[s], tiles[s][j : j + 2], across, j, 1)
        p = []
        for s in sets:
            state[s] = decays[j][s] * state[s]
            p.append(state[s] * before[j][s])
            da[s] = lanes.fma(dt, p[s], da[s])
        through_decay[j] = _inner(lanes, p, place.a)
    ddt = lanes.fma(du, now.x, lanes.over_lanes(through_decay) * LN_2) * now.slope
    dbias = dbias + ddt
    place.put("dx_BLE", group, lanes.fma(du, now.dt, d * dyg))
    place.put("ddt_BLE", group, ddt)
    return (state, da, dd, dbias), dbc
