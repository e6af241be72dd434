"""The definition in jax.numpy: all keys rotated, all logits, one softmax."""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.rotary import rotary

if TYPE_CHECKING:
    from pallas_kernels.cached_attention.api import KeyStream


def cached_attention(q_BLHK: Array, streams: "list[KeyStream]", theta: float) -> Array:
    batch, length, heads, width = q_BLHK.shape
    groups = streams[0].k_BSGK.shape[2]
    wide = jnp.promote_types(q_BLHK.dtype, jnp.float32)
    q = q_BLHK.reshape(batch, length, groups, heads // groups, width)
    logits = []
    for k_BSGK, _, positions_BS, visible_BLS, bias_BHS in streams:
        k_BSGK = rotary(k_BSGK, positions_BS, theta).astype(q.dtype)
        scores = jnp.einsum("BLGJK,BSGK->BGJLS", q, k_BSGK, preferred_element_type=wide)
        scores = scores.reshape(batch, heads, length, -1) * width**-0.5
        if bias_BHS is not None:
            scores = scores + bias_BHS[:, :, None, :]
        logits.append(jnp.where(visible_BLS[:, None], scores, -jnp.inf))
    weights_BHLS = jax.nn.softmax(jnp.concatenate(logits, axis=-1), axis=-1)
    # A query that sees nothing, beyond its row's length, has no weights, and must not have NaN.
    weights_BHLS = jnp.where(jnp.isnan(weights_BHLS), 0, weights_BHLS).astype(q.dtype)
    v_BSGK = jnp.concatenate([stream.v_BSGK.astype(q.dtype) for stream in streams], axis=1)
    weights = weights_BHLS.reshape(batch, groups, heads // groups, length, -1)
    o = jnp.einsum("BGJLS,BSGK->BLGJK", weights, v_BSGK, preferred_element_type=wide)
    return o.reshape(batch, length, heads, width).astype(q.dtype)
