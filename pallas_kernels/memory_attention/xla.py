"""Blockwise attention in plain JAX: any platform, time L (W + F + M), memory linear in L.

A loop over blocks of queries. A block of Q queries slices the Q + W - 1 in-context keys, the
Q + F - 1 fading keys and the memories of its chunks, and takes one dense softmax over them. The
backward pass is the same loop: it recomputes the weights from lse and adds the gradients of keys
and values into buffers that it carries. Source: the blocking is FlashAttention's (arXiv
2205.14135, 2307.08691), the streams and their nesting with chunks are ours.

Dtypes: products in the inputs' dtype with float32 accumulation, softmax, lse and the carried
gradients in float32 (all float64 for float64 inputs).

Measured on 2 CPU cores, float32, forward / forward + backward in ms, Q = 64:

    B8 L512 H4 K32 W=F=64 M16 C32     9 /  22    reference 45 / 133    all blocks at once 25 /  58
    B8 L512 H4 K64 W=F=128 M32 C64   17 /  58    reference 53 / 153    all blocks at once 45 / 111
    B1 L2048 H4 K64, full attention  26 /  66    jax.nn.dot_product_attention 98 / 281

The loop wins over batching all blocks because a block's logits stay in the cache; for the same
reason Q = 128 and 256 are slower there.
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import blocks
from pallas_kernels.memory_attention import mask
from pallas_kernels.memory_attention.operands import AttentionOutput, Operands, Spec


class _Plan(NamedTuple):
    """How the queries are cut into `count` blocks of `size`, so that blocks and chunks nest.

    Chunks shorter than the wanted size go several to a block. Longer ones are cut into equal
    blocks; the last of them may reach beyond its chunk, and those rows are padding.
    """

    size: int
    count: int
    chunk: int
    chunks_per_block: int
    blocks_per_chunk: int

    def first_chunk(self, block):
        return block // self.blocks_per_chunk * self.chunks_per_block

    def start(self, block):
        return self.first_chunk(block) * self.chunk + block % self.blocks_per_chunk * self.size


class _Stream(NamedTuple):
    """Keys and values of one kind, heads first; A is the axis that blocks take slices of.

    In-context and fading: A = L, and k, v are [B, G, L, K]. Eidetic: A = Z, [B, G, Z, M, K].
    """

    k_BGA: jax.Array
    v_BGA: jax.Array
    bias_BGRZM: jax.Array | None = None


class _Slice(NamedTuple):
    """What one block sees of one stream: its queries fall into Z lots, each with S own keys.

    Z is 1 but for memories of several chunks in a block. `bias` is [B, G, R, Z, 1, M].
    """

    start: jax.Array
    k_BGZSK: jax.Array
    v_BGZSK: jax.Array
    seen_BGRZQS: jax.Array
    bias_BGRZQS: jax.Array | None


def forward(operands: Operands, spec: Spec) -> AttentionOutput:
    x = operands
    L, G = x.k_BLGK.shape[1:3]
    plan = _plan(x, spec)
    streams = _streams(x, plan)
    q_NBGRQK = _cut(x.q_BLHK, plan, G)

    def attend(end: int, block_q: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        block, q_BGRQK = block_q
        slices = _slices(x, spec, plan, streams, block, end).values()
        logits = [_logits(q_BGRQK, part, spec.scale) for part in slices]
        top = functools.reduce(jnp.maximum, [a.max(-1, keepdims=True) for a in logits])
        weights = [jnp.exp(a - top) for a in logits]
        total = functools.reduce(jnp.add, [w.sum(-1, keepdims=True) for w in weights])
        parts = [
            _whole(_product("BGRZQS,BGZSK->BGRZQK", _lots(w, part), part.v_BGZSK))
            for w, part in zip(weights, slices, strict=True)
        ]
        o_BGRQK = functools.reduce(jnp.add, parts) / total
        return o_BGRQK.astype(q_BGRQK.dtype), top + jnp.log(total)

    parts = [
        lax.map(functools.partial(attend, end), (jnp.arange(a, b), q_NBGRQK[a:b]))
        for a, b, end in _groups(plan, spec, L)
    ]
    o_NBGRQK, lse_NBGRQ1 = (jnp.concatenate(part) for part in zip(*parts, strict=True))
    return AttentionOutput(_join(o_NBGRQK, plan, L), _join(lse_NBGRQ1, plan, L)[..., 0])


def backward(
    operands: Operands, spec: Spec, out: AttentionOutput, d_out: AttentionOutput
) -> Operands:
    x = operands
    L, G = x.k_BLGK.shape[1:3]
    dtype = jnp.promote_types(x.q_BLHK.dtype, jnp.float32)
    plan = _plan(x, spec)
    streams, to_operands = jax.vjp(lambda x: _streams(x, plan), x)

    # With p = exp(l - lse): dl = p (dp - delta), where lse's own gradient joins the softmax's.
    delta_BLH = (d_out.o_BLHK.astype(dtype) * out.o_BLHK.astype(dtype)).sum(-1) - d_out.lse_BLH
    rows = (
        _cut(x.q_BLHK, plan, G),
        _cut(d_out.o_BLHK, plan, G),
        # Padding weighs nothing: exp(l - inf) = 0.
        _cut(out.lse_BLH[..., None], plan, G, fill=jnp.inf),
        _cut(delta_BLH[..., None], plan, G),
    )

    def differentiate(
        end: int, totals: dict[str, _Stream], row: tuple[jax.Array, ...]
    ) -> tuple[dict[str, _Stream], jax.Array]:
        block, q, d_o, lse, delta = row
        totals = dict(totals)
        d_q = jnp.zeros_like(q, dtype=dtype)
        for name, part in _slices(x, spec, plan, streams, block, end).items():
            weights = jnp.exp(_logits(q, part, spec.scale) - lse)
            d_o_lots, q_lots = _lots(d_o, part), _lots(q, part)
            d_weights = _whole(_product("BGRZQK,BGZSK->BGRZQS", d_o_lots, part.v_BGZSK))
            d_logits = _lots(weights * (d_weights - delta), part)
            d_k = spec.scale * _product("BGRZQS,BGRZQK->BGZSK", d_logits, q_lots)
            d_v = _product("BGRZQS,BGRZQK->BGZSK", _lots(weights, part), d_o_lots)
            d_q += spec.scale * _whole(_product("BGRZQS,BGZSK->BGRZQK", d_logits, part.k_BGZSK))
            total = totals[name]
            totals[name] = _Stream(
                _add(total.k_BGA, d_k, part.start, axis=2),
                _add(total.v_BGA, d_v, part.start, axis=2),
                None
                if total.bias_BGRZM is None
                else _add(total.bias_BGRZM, d_logits.sum(-2), part.start, axis=3),
            )
        return totals, d_q.astype(q.dtype)

    totals = jax.tree.map(lambda a: jnp.zeros_like(a, dtype=dtype), streams)
    d_q_parts = []
    for a, b, end in _groups(plan, spec, L):
        each = (jnp.arange(a, b), *(row[a:b] for row in rows))
        totals, d_q_part = lax.scan(functools.partial(differentiate, end), totals, each)
        d_q_parts.append(d_q_part)
    totals = jax.tree.map(lambda total, a: total.astype(a.dtype), totals, streams)
    (gradients,) = to_operands(totals)
    return gradients._replace(q_BLHK=_join(jnp.concatenate(d_q_parts), plan, L))


def _plan(operands: Operands, spec: Spec) -> _Plan:
    B, L, H, K = operands.q_BLHK.shape
    M = 0 if operands.eidetic is None else operands.eidetic.k_BZMGK.shape[2]
    shape = {"B": B, "L": L, "H": H, "G": operands.k_BLGK.shape[2], "K": K}
    shape |= {"W": spec.window, "F": spec.fading_window, "M": M, "C": spec.chunk}
    target = blocks.choose(
        "memory_attention/xla",
        shape=shape,
        dtype=operands.q_BLHK.dtype,
        heuristic={"queries": 64},
        override=dict(spec.blocks),
    )["queries"]
    chunks = -(-L // spec.chunk)
    if spec.chunk <= target:
        together = min(target // spec.chunk, chunks)
        return _Plan(together * spec.chunk, -(-chunks // together), spec.chunk, together, 1)
    parts = -(-spec.chunk // target)
    return _Plan(-(-spec.chunk // parts), chunks * parts, spec.chunk, 1, parts)


def _groups(plan: _Plan, spec: Spec, L: int) -> list[tuple[int, int, int]]:
    """(first block, last block + 1, end of the keys that these blocks can see), in order.

    Under (nearly) full attention early queries see few keys. Four loops, each over the keys up to
    its own end, do 5/8 of the work of one loop over all keys; the least possible is 1/2.
    """
    count = min(4, plan.count) if 2 * spec.window >= L else 1
    borders = [plan.count * group // count for group in range(count + 1)]
    return [(a, b, min(L, plan.start(b - 1) + plan.size)) for a, b in itertools.pairwise(borders)]


def _pad(x: jax.Array, axis: int, size: int, fill: float = 0.0) -> jax.Array:
    widths = [(0, size - x.shape[axis] if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=fill)


def _cut(x_BLHX: jax.Array, plan: _Plan, G: int, fill: float = 0.0) -> jax.Array:
    """Rows of queries as blocks, heads first: [N, B, G, R, Q, X] with N blocks and H = G R."""
    B, _, H, X = x_BLHX.shape
    spans = plan.count // plan.blocks_per_chunk
    span = plan.chunk * plan.chunks_per_block
    x = _pad(x_BLHX, 1, spans * span, fill).reshape(B, spans, span, H, X)
    x = _pad(x, 2, plan.blocks_per_chunk * plan.size, fill)
    return x.reshape(B, plan.count, plan.size, G, H // G, X).transpose(1, 0, 3, 4, 2, 5)


def _join(x_NBGRQX: jax.Array, plan: _Plan, L: int) -> jax.Array:
    """The inverse of `_cut`: [B, L, H, X]."""
    N, B, G, R, Q, X = x_NBGRQX.shape
    x = x_NBGRQX.transpose(1, 0, 4, 2, 3, 5)
    x = x.reshape(B, N // plan.blocks_per_chunk, plan.blocks_per_chunk * Q, G * R, X)
    x = x[:, :, : plan.chunk * plan.chunks_per_block]
    return x.reshape(B, -1, G * R, X)[:, :L]


def _streams(operands: Operands, plan: _Plan) -> dict[str, _Stream]:
    """The streams that are on, laid out for slicing. Linear, so that JAX can transpose it."""
    x = operands
    streams = {"in_context": _Stream(x.k_BLGK.swapaxes(1, 2), x.v_BLGK.swapaxes(1, 2))}
    if x.fading is not None:
        streams["fading"] = _Stream(x.fading.k_BLGK.swapaxes(1, 2), x.fading.v_BLGK.swapaxes(1, 2))
    if x.eidetic is not None:
        B, _, M, G, _ = x.eidetic.k_BZMGK.shape
        # The last block may reach beyond the last chunk.
        Z = plan.first_chunk(plan.count)
        bias = x.eidetic.bias_BZHM
        if bias is not None:
            bias = _pad(bias, 1, Z).reshape(B, Z, G, -1, M).transpose(0, 2, 3, 1, 4)
        streams["eidetic"] = _Stream(
            _pad(x.eidetic.k_BZMGK, 1, Z).transpose(0, 3, 1, 2, 4),
            _pad(x.eidetic.v_BZMGK, 1, Z).transpose(0, 3, 1, 2, 4),
            bias,
        )
    return streams


def _slices(
    operands: Operands,
    spec: Spec,
    plan: _Plan,
    streams: dict[str, _Stream],
    block: jax.Array,
    end: int,
) -> dict[str, _Slice]:
    """What block number `block` sees among keys before `end`; streams without any are left out."""
    x = operands
    first = plan.start(block)
    query_Q = first + jnp.arange(plan.size)
    slices: dict[str, _Slice] = {}
    for name, stream in streams.items():
        if x.eidetic is not None and name == "eidetic":
            start, size = plan.first_chunk(block), plan.chunks_per_block
            query_ZQS = query_Q.reshape(size, -1, 1)
            memory_Z = start + jnp.arange(size)
            memory_ZQS = memory_Z[:, None, None]
            valid_BZM = jnp.take(x.eidetic.valid_BZM, memory_Z, axis=1, mode="clip")
            seen = mask.eidetic(query_ZQS, memory_ZQS, chunk=plan.chunk)[None]
            seen_BZQS = seen & valid_BZM[:, :, None, :]
            key_ZQS = memory_ZQS * plan.chunk
            k_BGZSK, v_BGZSK = (
                lax.dynamic_slice_in_dim(a, start, size, axis=2)
                for a in (stream.k_BGA, stream.v_BGA)
            )
        else:
            nearest = 0 if name == "in_context" else spec.window
            width = spec.window if name == "in_context" else spec.fading_window
            if end <= nearest:
                continue
            size = min(plan.size + width - 1, end - nearest)
            start = jnp.clip(first + plan.size - nearest - size, 0, end - nearest - size)
            query_ZQS = query_Q[None, :, None]
            key_ZQS = start + jnp.arange(size)[None, None, :]
            if name == "in_context":
                seen = mask.in_context(query_ZQS, key_ZQS, window=spec.window)
            else:
                seen = mask.fading(
                    query_ZQS, key_ZQS, window=spec.window, fading_window=spec.fading_window
                )
            seen_BZQS = seen[None]
            k_BGZSK, v_BGZSK = (
                lax.dynamic_slice_in_dim(a, start, size, axis=2)[:, :, None]
                for a in (stream.k_BGA, stream.v_BGA)
            )
        if x.segment_ids_BL is not None:
            seen_BZQS &= mask.same_document(x.segment_ids_BL, query_ZQS, key_ZQS)
        bias = stream.bias_BGRZM
        if bias is not None:
            bias = lax.dynamic_slice_in_dim(bias, start, size, axis=3)[..., None, :]
        slices[name] = _Slice(start, k_BGZSK, v_BGZSK, seen_BZQS[:, None, None], bias)
    return slices


def _product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """einsum in b's dtype, which is the inputs', with the accumulator's dtype as result."""
    dtype = jnp.promote_types(b.dtype, jnp.float32)
    return jnp.einsum(equation, a.astype(b.dtype), b, preferred_element_type=dtype)


def _lots(x_BGRQX: jax.Array, part: _Slice) -> jax.Array:
    """Splits a block's queries into the lots that see different keys."""
    *heads, Q, X = x_BGRQX.shape
    Z = part.k_BGZSK.shape[2]
    return x_BGRQX.reshape(*heads, Z, Q // Z, X)


def _whole(x_BGRZQX: jax.Array) -> jax.Array:
    """The inverse of `_lots`."""
    *heads, Z, Q, X = x_BGRZQX.shape
    return x_BGRZQX.reshape(*heads, Z * Q, X)


def _logits(q_BGRQK: jax.Array, part: _Slice, scale: float) -> jax.Array:
    """Logits of a block, [B, G, R, Q, S], very negative where a key is not seen."""
    logits = scale * _product("BGRZQK,BGZSK->BGRZQS", _lots(q_BGRQK, part), part.k_BGZSK)
    if part.bias_BGRZQS is not None:
        logits += part.bias_BGRZQS.astype(logits.dtype)
    # Finite: rows of padding may see nothing, and inf - inf is NaN.
    unseen = -0.7 * float(jnp.finfo(logits.dtype).max)
    return _whole(jnp.where(part.seen_BGRZQS, logits, unseen))


def _add(total: jax.Array, part: jax.Array, start: jax.Array, axis: int) -> jax.Array:
    """`total` with `part` added to its slice at `start`: in place inside a loop."""
    part = part.reshape(*total.shape[:axis], -1, *total.shape[axis + 1 :])
    old = lax.dynamic_slice_in_dim(total, start, part.shape[axis], axis)
    return lax.dynamic_update_slice_in_dim(total, old + part, start, axis)
