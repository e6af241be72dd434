"""Who sees whom: the one place that says which keys a query attends.

    in-context  j in [i - W + 1, i]            W keys, the query itself included
    fading      j in [i - W - F + 1, i - W]    the F keys right behind them
    eidetic     the memory of chunk i // C     frozen at the chunk's first token, i // C * C

and none of a negative index or of another document. Worked example, W = F = 3: token 6 sees
in-context {4, 5, 6} and fading {1, 2, 3}; token 0 sees itself.

Indices are integer arrays that broadcast against each other explicitly (equal rank), so that
dense masks, blocks of them and kernels' tiles all come from the same lines.
"""

import jax
import jax.numpy as jnp


def in_context(query: jax.Array, key: jax.Array, *, window: int) -> jax.Array:
    """Whether the query at position `query` sees the token at position `key` verbatim."""
    return (key >= 0) & (key <= query) & (key > query - window)


def fading(query: jax.Array, key: jax.Array, *, window: int, fading_window: int) -> jax.Array:
    """Whether the query at position `query` sees the state's output at position `key`."""
    oldest = query - window - fading_window + 1
    return (key >= 0) & (key <= query - window) & (key >= oldest)


def eidetic(query: jax.Array, memory: jax.Array, *, chunk: int) -> jax.Array:
    """Whether the query at position `query` reads the memory of chunk number `memory`."""
    return query // chunk == memory


def same_document(segment_ids_BL: jax.Array, query: jax.Array, key: jax.Array) -> jax.Array:
    """Whether positions `query` and `key` are of one document: [B, *broadcast(query, key)].

    For an eidetic memory `key` is the first position of its chunk. Positions outside the
    sequence take the nearest document: what they are is for the predicates above to say.
    """
    return jnp.take(segment_ids_BL, query, axis=1, mode="clip") == jnp.take(
        segment_ids_BL, key, axis=1, mode="clip"
    )
