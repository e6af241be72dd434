"""Rows cut over devices along their tokens: what the devices of a row tell each other.

Device i of the n of mesh axis `context` holds the P = L / n tokens from i P on: a *piece*. The
functions here are called inside a shard_map and see one piece. None of them moves more when a row
is longer on as many devices; bytes that a device receives in a forward pass, for its B rows and
its E channels or G key/value heads, I bytes to a number of the inputs (the backward pass moves the
same again, the other way):

    convolution     B (T - 1) E I                                   halo
    selective scan  4 (n - 1) B E (N + 1)   backward 4 (n - 1) B E N     all-gather of summaries
    innovation      4 B D I                                         halo
    in-context      2 B (W - 1) G K I                               halo of keys and values
    fading          2 B (W + F - 1) G K I  and  4 B (W + F - 1)     likewise; documents
    eidetic         B (W + C - 1) (2 G K I + 8)                     halo; innovations, documents
                    (n - 1) B M (2 G K I + 8)                       all-gather; with times

A *halo* is the tokens before a piece, sent by the device (or, where pieces are shorter, the
devices) before it. Full attention alone sends every key to every later device, B L G K.

The state of the scan at the start of piece i is a fold over the pieces before, which every device
makes for itself out of all the summaries:

    h_i = sum_{j<i} exp(a sum_{j<k<i} dt_k) s_j        s_j: end state of piece j from a zero state

and so is, the other way round, the gradient of the state at its end. That takes a second scan
before the one that counts, forward and backward. A reset inside a piece makes its sum of dt
infinite. Ours; the idea of combining summaries is that of the associative scan (arXiv 2312.00752).
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from bmojo_jax import memory
from pallas_kernels import AttentionOutput, ScanOutput

AXIS = "context"
# Of a token that does not exist; any other number may be a document.
NO_DOCUMENT = -(2**31)
_KEYS = 512  # of full attention whose logits are held at a time


def halo(x: jax.Array, size: int) -> jax.Array:
    """The `size` tokens before this piece: [B, P, ...] -> [B, size, ...], zeros before the row."""
    pieces, length = lax.axis_size(AXIS), x.shape[1]
    parts: list[jax.Array] = []
    for hop in range(1, pieces):
        taken = min(size - (hop - 1) * length, length)
        if taken <= 0:
            break
        pairs = [(i, i + hop) for i in range(pieces - hop)]
        parts.insert(0, lax.ppermute(x[:, length - taken :], AXIS, pairs))
    missing = size - sum(part.shape[1] for part in parts)
    if missing:  # XLA's partitioner crashes on an empty array in the gradient of a loop
        parts.insert(0, jnp.zeros((x.shape[0], missing, *x.shape[2:]), x.dtype))
    return jnp.concatenate(parts, axis=1)


def first_token(length: int) -> jax.Array:
    """Where in its row a piece of `length` tokens starts."""
    return lax.axis_index(AXIS) * length


# --- selective scan ---


def selective_scan(
    scan: Callable[..., ScanOutput], arrays: Mapping[str, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """y of this piece, and the state at the end of the row.

    Args:
      scan: `pallas_kernels.selective_scan`; `arrays`: its arrays, without a state.
    """
    floats = dict(arrays)
    reset_BL = floats.pop("reset_BL", None)
    y_BLE, h_BEN = _scan(scan, floats, reset_BL)
    last = lax.axis_index(AXIS) == lax.axis_size(AXIS) - 1
    return y_BLE, lax.psum(jnp.where(last, h_BEN, 0), AXIS)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(
    scan: Callable[..., ScanOutput], floats: dict[str, jax.Array], reset_BL: jax.Array | None
) -> ScanOutput:
    return _scan_forward(scan, floats, reset_BL)[0]


def _scan_forward(
    scan: Callable[..., ScanOutput], floats: dict[str, jax.Array], reset_BL: jax.Array | None
) -> tuple[ScanOutput, Any]:
    a_EN = floats["a_EN"].astype(jnp.promote_types(floats["a_EN"].dtype, jnp.float32))
    ungated = {name: x for name, x in floats.items() if name != "z_BLE"}  # the state needs no gate
    end_BEN = scan(**ungated, reset_BL=reset_BL).h_BEN
    dt_BE = _total_dt(floats["dt_BLE"], floats.get("dt_bias_E"), reset_BL).astype(end_BEN.dtype)
    summaries = lax.all_gather(jnp.concatenate([end_BEN, dt_BE[:, :, None]], axis=2), AXIS)
    ends_XBEN, dts_XBE = summaries[..., :-1], summaries[..., -1]
    h0_BEN = _fold(a_EN, dts_XBE, ends_XBEN, reverse=False)
    out, pull = jax.vjp(
        lambda floats, h0_BEN: scan(**floats, reset_BL=reset_BL, h0_BEN=h0_BEN), floats, h0_BEN
    )
    return out, (pull, a_EN, dts_XBE)


def _scan_backward(scan: Callable[..., ScanOutput], residuals: Any, d_out: ScanOutput) -> Any:
    pull, a_EN, dts_XBE = residuals
    d_before_XBEN = lax.all_gather(pull(d_out)[1], AXIS)
    d_after_BEN = _fold(a_EN, dts_XBE, d_before_XBEN, reverse=True)
    d_floats, _ = pull(d_out._replace(h_BEN=d_out.h_BEN + d_after_BEN.astype(d_out.h_BEN.dtype)))
    return d_floats, None


_scan.defvjp(_scan_forward, _scan_backward)


def _total_dt(
    dt_BLE: jax.Array, dt_bias_E: jax.Array | None, reset_BL: jax.Array | None
) -> jax.Array:
    """The sum of the step sizes of a piece; infinite if a document starts in it."""
    wide = dt_BLE.astype(jnp.promote_types(dt_BLE.dtype, jnp.float32))
    if dt_bias_E is not None:
        wide = wide + dt_bias_E[None, None, :]
    dt_BE = jnp.sum(jax.nn.softplus(wide), axis=1)
    if reset_BL is not None:
        dt_BE = jnp.where(jnp.any(reset_BL, axis=1)[:, None], jnp.inf, dt_BE)
    return dt_BE


def _fold(a_EN: jax.Array, dts_XBE: jax.Array, states: jax.Array, *, reverse: bool) -> jax.Array:
    """The state before this piece, from those that the pieces before add; reverse: after it."""
    mine = lax.axis_index(AXIS)

    def step(h_BEN: jax.Array, piece: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        index, dt_BE, add_BEN = piece
        dt_BE1 = dt_BE[:, :, None]
        decay_BEN = jnp.where(jnp.isinf(dt_BE1), 0, jnp.exp(a_EN[None] * dt_BE1))
        counts = index > mine if reverse else index < mine
        return jnp.where(counts, decay_BEN * h_BEN + add_BEN, h_BEN), None

    pieces = (jnp.arange(states.shape[0]), dts_XBE, states)
    return lax.scan(step, jnp.zeros_like(states[0]), pieces, reverse=reverse)[0]


# --- memory ---


def remember(
    e_BL: jax.Array,
    start_BL: jax.Array,
    tokens: Mapping[str, jax.Array],
    *,
    window: int,
    chunk: int,
    size: int,
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """As `operations.remember`, of the chunks of this piece; `chunk` divides it.

    A chunk may remember tokens of this piece, of the W + C - 1 before it, and of what each earlier
    device has to offer: the M largest innovations among its own tokens and those before, shifted
    by W + C - 1 so that everything in there has left every window of this piece. Only tokens of
    the document that is open at the end of the offer can be of use to anybody. From these `select`
    chooses as from a row [M best of all offers | W + C - 1 tokens | this piece].
    """
    batch, length = e_BL.shape
    lag = window + chunk - 1
    first = first_token(length)
    time_S = first - lag + jnp.arange(lag + length)
    start_BS = jnp.concatenate([halo(start_BL, lag + 1), start_BL], axis=1)
    open_before_B, start_BS = start_BS[:, 0], start_BS[:, 1:]
    nearby = {
        name: jnp.concatenate([halo(x, lag), x], axis=1)
        for name, x in {"e": lax.stop_gradient(e_BL), **tokens}.items()
    }
    nearby["time"] = jnp.broadcast_to(time_S[None, :], (batch, lag + length))

    def best(rows: dict[str, jax.Array], open_BS: jax.Array) -> dict[str, jax.Array]:
        """The M of them with the largest innovations, in order of time, empty slots first."""
        value_BM, index_BM = memory.keep_largest(jnp.where(open_BS, rows["e"], -jnp.inf), size)
        return take(rows, jnp.maximum(index_BM, 0)) | {"e": value_BM}

    since_B1 = jnp.maximum(start_BS[:, length - 1], 0)[:, None]
    mine = {name: x[:, :length] for name, x in nearby.items()}
    offer = best(mine, mine["time"] >= since_B1)
    offers = {name: lax.all_gather(x, AXIS, axis=1) for name, x in offer.items()}
    before_BX1 = (jnp.arange(lax.axis_size(AXIS)) < lax.axis_index(AXIS))[None, :, None]
    since_B11 = jnp.maximum(open_before_B, 0)[:, None, None]
    of_use_BXM = before_BX1 & (offers["time"] >= since_B11) & (offers["e"] > -jnp.inf)
    flat = {name: x.reshape(batch, -1, *x.shape[3:]) for name, x in offers.items()}
    earlier = best(flat, of_use_BXM.reshape(batch, -1))

    row = {name: jnp.concatenate([earlier[name], x], axis=1) for name, x in nearby.items()}
    added = -(size + lag) % chunk  # so that chunks start where they did
    skipped = added + size + lag
    exists_S = jnp.arange(size + lag + length) - size - lag + first >= 0
    exists_S = exists_S | (jnp.arange(size + lag + length) < size)
    e_BS = jnp.where(exists_S[None, :], row["e"], -jnp.inf)
    e_BS = jnp.pad(e_BS, ((0, 0), (added, 0)), constant_values=-jnp.inf)
    # All earlier tokens are of the document that is open behind them.
    start_BL = jnp.where(start_BL >= first - lag, start_BL - first + skipped, added)
    start_BS = jnp.pad(start_BL, ((0, 0), (skipped, 0)), mode="edge")
    selection = memory.select(e_BS, start_BS, window=window, chunk=chunk, size=size)
    index_BZM, valid_BZM = (x[:, skipped // chunk :] for x in selection)
    index_BZM = jnp.maximum(index_BZM - added, 0)
    kept = take({name: row[name] for name in ("time", *tokens)}, index_BZM)
    return jnp.where(valid_BZM, kept.pop("time"), 0), valid_BZM, kept


def take(rows: Mapping[str, jax.Array], index: jax.Array) -> dict[str, jax.Array]:
    """Arrays [B, S, ...] at indices [B, *shape] into S: [B, *shape, ...]."""
    flat = index.reshape(index.shape[0], -1)

    def taken(x: jax.Array) -> jax.Array:
        dtype = x.dtype
        if jnp.issubdtype(dtype, jnp.floating):
            # The gradient sums over every chunk that keeps the token.
            x = x.astype(jnp.promote_types(dtype, jnp.float32))
        ones = (1,) * (x.ndim - 2)
        taken = jnp.take_along_axis(x, flat.reshape(*flat.shape, *ones), axis=1)
        return taken.reshape(*index.shape, *x.shape[2:]).astype(dtype)

    return {name: taken(x) for name, x in rows.items()}


# --- attention ---


def memory_attention(
    attend: Callable[..., AttentionOutput],
    arrays: Mapping[str, jax.Array],
    *,
    window: int,
    fading_window: int,
    chunk: int | None,
) -> AttentionOutput:
    """Attention of this piece's queries, with a memory for each of its chunks.

    The operation takes as many queries as keys, so queries of zeros stand beside the halo, whose
    results are dropped: (P + W + F) / P of the work that there is.

    Args:
      attend: `pallas_kernels.memory_attention`; `arrays`: its arrays.
      chunk: C, divides P; None without an eidetic memory.
    """
    batch, length = arrays["q_BLHK"].shape[:2]
    others = (lax.axis_size(AXIS) - 1) * length
    fades = "fading_k_BLGK" in arrays and fading_window > 0
    sizes = {
        "k_BLGK": min(window - 1, others),
        "v_BLGK": min(window - 1, others),
        "fading_k_BLGK": min(window + fading_window - 1, others) if fades else 0,
        "fading_v_BLGK": min(window + fading_window - 1, others) if fades else 0,
    }
    reach = max(sizes.values())
    multiple = 1 if chunk is None else chunk
    added = -(-reach // multiple) * multiple  # so that chunks start where they did

    def before(x: jax.Array, size: int) -> jax.Array:
        if size:
            x = jnp.concatenate([halo(x, size), x], axis=1)
        return jnp.pad(x, [(0, 0), (added - size, 0), *[(0, 0)] * (x.ndim - 2)])

    longer = {}
    for name, array in arrays.items():
        if "_BZ" in name:
            widths = [(0, 0), (added // multiple, 0), *[(0, 0)] * (array.ndim - 2)]
            longer[name] = jnp.pad(array, widths)
        elif name != "segment_ids_BL":
            longer[name] = before(array, sizes.get(name, 0))
    ids_BL = arrays.get("segment_ids_BL", jnp.zeros((batch, length), jnp.int32))
    exists_L = jnp.arange(-added, length) + first_token(length) >= 0
    longer["segment_ids_BL"] = jnp.where(exists_L[None, :], before(ids_BL, reach), NO_DOCUMENT)
    out = attend(**longer)
    return AttentionOutput(*(x[:, added:] for x in out))


def full_attention(
    arrays: Mapping[str, jax.Array], *, scale: float | None = None
) -> AttentionOutput:
    """Attention to every token before: keys and values go round, one device on in each step.

    Ring attention (arXiv 2310.01889), with an online softmax over blocks of keys.
    """
    q_BLHK = arrays["q_BLHK"]
    (batch, length, heads, width), groups = q_BLHK.shape, arrays["k_BLGK"].shape[2]
    wide = jnp.promote_types(q_BLHK.dtype, jnp.float32)
    scale = width**-0.5 if scale is None else scale
    q_BLGJK = q_BLHK.reshape(batch, length, groups, heads // groups, width)
    ids_BL = arrays.get("segment_ids_BL", jnp.zeros((batch, length), jnp.int32))
    pieces, mine = lax.axis_size(AXIS), lax.axis_index(AXIS)
    time_L = jnp.arange(length)
    query_L = mine * length + time_L
    block = next(size for size in range(min(_KEYS, length), 0, -1) if length % size == 0)

    def blocks(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(batch, -1, block, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def visit(carry: tuple[jax.Array, ...], keys: tuple[jax.Array, ...]) -> Any:
        o_BLGJK, sum_BLGJ, max_BLGJ = carry
        k_BSGK, v_BSGK, ids_BS, key_S = keys
        logits = scale * jnp.einsum(
            "BLGJK,BSGK->BLGJS", q_BLGJK, k_BSGK, preferred_element_type=wide
        )
        seen_BLS = (key_S[None, None, :] <= query_L[None, :, None]) & (
            ids_BS[:, None, :] == ids_BL[:, :, None]
        )
        logits = jnp.where(seen_BLS[:, :, None, None, :], logits, -jnp.inf)
        new_BLGJ = jnp.maximum(max_BLGJ, logits.max(axis=-1))
        weights = jnp.exp(logits - new_BLGJ[..., None])
        shrink_BLGJ = jnp.exp(max_BLGJ - new_BLGJ)
        o_BLGJK = o_BLGJK * shrink_BLGJ[..., None] + jnp.einsum(
            "BLGJS,BSGK->BLGJK", weights.astype(v_BSGK.dtype), v_BSGK, preferred_element_type=wide
        )
        return (o_BLGJK, sum_BLGJ * shrink_BLGJ + weights.sum(axis=-1), new_BLGJ), None

    least = jnp.full(q_BLGJK.shape[:-1], jnp.finfo(wide).min / 2, wide)
    carry = (jnp.zeros(q_BLGJK.shape, wide), jnp.zeros_like(least), least)
    keys = (arrays["k_BLGK"], arrays["v_BLGK"], ids_BL)
    for hop in range(pieces):
        if hop:
            pairs = [(i, (i + 1) % pieces) for i in range(pieces)]
            keys = tuple(lax.ppermute(x, AXIS, pairs) for x in keys)
        key_L = (mine - hop) % pieces * length + time_L
        carry, _ = lax.scan(visit, carry, (*map(blocks, keys), key_L.reshape(-1, block)))
    o_BLGJK, sum_BLGJ, max_BLGJ = carry
    o_BLHK = (o_BLGJK / sum_BLGJ[..., None]).reshape(q_BLHK.shape).astype(q_BLHK.dtype)
    return AttentionOutput(o_BLHK, (max_BLGJ + jnp.log(sum_BLGJ)).reshape(q_BLHK.shape[:3]))
