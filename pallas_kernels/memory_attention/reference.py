"""The definition: dense masks over every key, plain autodiff. See api.py for the equation.

Computes in float32, or in float64 for such inputs, whatever the inputs' dtype, and returns o in
q's dtype. Cost and memory are L (2 L + Z M): for tests and small shapes only.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.memory_attention import mask
from pallas_kernels.memory_attention.operands import AttentionOutput, Operands, Spec


def attend(operands: Operands, spec: Spec) -> AttentionOutput:
    """All three streams side by side as one list of S keys, each with its mask."""
    x = operands
    B, L, H, K = x.q_BLHK.shape
    G = x.k_BLGK.shape[2]
    dtype = jnp.promote_types(x.q_BLHK.dtype, jnp.float32)
    query_L1 = jnp.arange(L)[:, None]
    key_1L = jnp.arange(L)[None, :]

    def documents(query: jax.Array, key: jax.Array) -> jax.Array:
        if x.segment_ids_BL is None:
            return jnp.ones((B, *jnp.broadcast_shapes(query.shape, key.shape)), bool)
        return mask.same_document(x.segment_ids_BL, query, key)

    one_document_BLL = documents(query_L1, key_1L)
    seen = mask.in_context(query_L1, key_1L, window=spec.window)
    keys, values, masks = [x.k_BLGK], [x.v_BLGK], [seen[None] & one_document_BLL]
    biases = [jnp.zeros((B, L, H), dtype)]
    if x.fading is not None:
        seen = mask.fading(query_L1, key_1L, window=spec.window, fading_window=spec.fading_window)
        keys.append(x.fading.k_BLGK)
        values.append(x.fading.v_BLGK)
        masks.append(seen[None] & one_document_BLL)
        biases.append(jnp.zeros((B, L, H), dtype))
    if x.eidetic is not None:
        Z, M = x.eidetic.k_BZMGK.shape[1:3]
        memory_1S = jnp.repeat(jnp.arange(Z), M)[None, :]
        seen = mask.eidetic(query_L1, memory_1S, chunk=spec.chunk)
        seen = seen[None] & documents(query_L1, memory_1S * spec.chunk)
        keys.append(x.eidetic.k_BZMGK.reshape(B, Z * M, G, K))
        values.append(x.eidetic.v_BZMGK.reshape(B, Z * M, G, K))
        masks.append(seen & x.eidetic.valid_BZM.reshape(B, 1, Z * M))
        if x.eidetic.bias_BZHM is None:
            biases.append(jnp.zeros((B, Z * M, H), dtype))
        else:
            biases.append(x.eidetic.bias_BZHM.swapaxes(2, 3).reshape(B, Z * M, H))

    def repeat_heads(parts: list[jax.Array]) -> jax.Array:
        return jnp.repeat(jnp.concatenate(parts, axis=1).astype(dtype), H // G, axis=2)

    q_BLHK, k_BSHK, v_BSHK = x.q_BLHK.astype(dtype), repeat_heads(keys), repeat_heads(values)
    mask_BLS = jnp.concatenate(masks, axis=2)
    bias_BSH = jnp.concatenate([bias.astype(dtype) for bias in biases], axis=1)
    logits_BHLS = spec.scale * jnp.einsum("BLHK,BSHK->BHLS", q_BLHK, k_BSHK, precision="highest")
    logits_BHLS += bias_BSH.transpose(0, 2, 1)[:, :, None, :]
    logits_BHLS = jnp.where(mask_BLS[:, None], logits_BHLS, -jnp.inf)
    lse_BHL = jax.nn.logsumexp(logits_BHLS, axis=-1)
    weights_BHLS = jnp.exp(logits_BHLS - lse_BHL[..., None])
    o_BLHK = jnp.einsum("BHLS,BSHK->BLHK", weights_BHLS, v_BSHK, precision="highest")
    return AttentionOutput(o_BLHK.astype(x.q_BLHK.dtype), lse_BHL.swapaxes(1, 2))
