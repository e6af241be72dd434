"""Rows of a table by token, with a gradient that costs a GPU little more than its bytes.

    x_t = table[token_t]        d table[v] = sum over t with token_t = v of dx_t

XLA's scatter-add sums with atomics on GPUs, in no fixed order, or, with
`--xla_gpu_deterministic_ops=true`, as `train.py` sets it, by a prefix sum over all T D numbers:
25 million of them took some 100 passes and 15 of 44 ms of a training step on an H100. So there the
rows are put in the order of their tokens, in blocks of R, and

    partial[b, j] = sum of the rows of block b that have its j-th token    (a product with 0 and 1)

A token's rows begin in one block and may go on at the head (j = 0) of the following ones; a second
product, over blocks, adds those. All sums are float32 (float64 of float64), always in one order.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bmojo_jax import sharding
from pallas_kernels import dispatch

# R: as many rows as a product takes at no more than the cost of reading them.
_BLOCK = 128


def embed(
    table_VD: Float[Array, "V D"], tokens_BL: Int[Array, "B L"], dtype: Any
) -> Float[Array, "B L D"]:
    """The tokens' rows in `dtype`. The gradient sums all uses of a token in the table's dtype."""
    mesh = sharding.ambient_mesh()
    if dispatch.platform() == "gpu" and (mesh is None or mesh.size == 1):
        return _embed(table_VD, tokens_BL, jnp.dtype(dtype))
    # Elsewhere scatters are serial anyway; and partitioned ones are XLA's to cut.
    return table_VD[tokens_BL].astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _embed(table_VD: Array, tokens_BL: Array, dtype: Any) -> Array:
    return table_VD[tokens_BL].astype(dtype)


def _forward(table_VD: Array, tokens_BL: Array, dtype: Any) -> tuple[Array, tuple[Array, Array]]:
    # Of the table its rows and its dtype are wanted, no values.
    return _embed(table_VD, tokens_BL, dtype), (tokens_BL, table_VD[:, :0])


def _backward(dtype: Any, saved: tuple[Array, Array], dx_BLD: Array) -> tuple[Array, None]:
    del dtype
    tokens_BL, like_V0 = saved
    rows_TD = dx_BLD.reshape(-1, dx_BLD.shape[-1])
    return sum_by_token(rows_TD, tokens_BL.reshape(-1), len(like_V0)).astype(like_V0.dtype), None


_embed.defvjp(_forward, _backward)


def sum_by_token(
    rows_TD: Float[Array, "T D"], tokens_T: Int[Array, " T"], V: int
) -> Float[Array, "V D"]:
    """Of each of V tokens the sum of its rows, float32 or wider; the same bits every time."""
    wide = jnp.promote_types(rows_TD.dtype, jnp.float32)
    add = functools.partial(
        jnp.einsum, precision=jax.lax.Precision.HIGHEST, preferred_element_type=wide
    )
    T, R = len(tokens_T), _BLOCK
    padding = -T % R
    order_T = jnp.pad(jnp.argsort(tokens_T), (0, padding))  # stable
    sorted_T = jnp.pad(tokens_T[order_T[:T]], (0, padding), constant_values=V)

    # Which token of its block a row has, counted from 0.
    blocks_NR = sorted_T.reshape(-1, R)
    changes_NR = jnp.diff(blocks_NR, axis=1, prepend=blocks_NR[:, :1]) != 0
    place_NR = jnp.cumsum(changes_NR, axis=1)
    has_NJR = place_NR[:, None, :] == jnp.arange(R)[None, :, None]
    rows_NRD = rows_TD[order_T].reshape(*blocks_NR.shape, -1)
    partial_NJD = add("NJR,NRD->NJD", has_NJR.astype(rows_TD.dtype), rows_NRD)

    # What is at the head of a block and began in an earlier one goes to the block where it did.
    N = len(blocks_NR)
    head_N = blocks_NR[:, 0]
    find = functools.partial(jnp.searchsorted, sorted_T, method="scan_unrolled")
    began_N = find(head_N) // R
    earlier_N = began_N < jnp.arange(N)
    goes_MN = (began_N[None, :] == jnp.arange(N)[:, None]) & earlier_N[None, :]
    carried_ND = add("MN,ND->MD", goes_MN.astype(wide), partial_NJD[:, 0])

    first_V, end_V = (find(jnp.arange(V), side=side) for side in ("left", "right"))
    block_V = jnp.minimum(first_V, len(sorted_T) - 1) // R
    goes_on_V = (end_V - 1) // R > block_V
    sum_VD = partial_NJD[block_V, place_NR.reshape(-1)[jnp.minimum(first_V, len(sorted_T) - 1)]]
    sum_VD += jnp.where(goes_on_V[:, None], carried_ND[block_V], 0)
    return jnp.where((end_V > first_V)[:, None], sum_VD, 0)
