"""Attention of a few new tokens to cached keys, under one softmax over all their streams: decoding.

    o_i = sum_j softmax_j( scale q_i . R(p_j) k_j + bias_j ) v_j      over the j that i sees

(arXiv 2407.06324, section 3, with the streams of `memory_attention`.) Caches hold keys before they
are rotated: R(p) is the rotary rotation to position p, counted from any token, as long as queries,
which come rotated, and keys count from the same one.

Implementations: "xla" (the definition) and "pallas_triton" (one new token).
"""

from typing import NamedTuple

from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.cached_attention import pallas_triton, xla

IMPLEMENTATIONS = {"xla": xla.cached_attention, "pallas_triton": pallas_triton.cached_attention}


class KeyStream(NamedTuple):
    """Cached keys and values, and which queries see them."""

    k_BSGK: Float[Array, "B S G K"]  # not rotated
    v_BSGK: Float[Array, "B S G K"]
    positions_BS: Int[Array, "B S"]  # to which keys are rotated
    visible_BLS: Bool[Array, "B L S"]
    bias_BHS: Float[Array, "B H S"] | None = None  # added to the logits


def cached_attention(
    q_BLHK: Float[Array, "B L H K"],
    streams: list[KeyStream],
    *,
    theta: float,
    implementation: str | None = None,
) -> Float[Array, "B L H K"]:
    """Attention of L queries to all keys of all streams that they see; scale = K^-1/2.

    Args:
      q_BLHK: rotated; H is a multiple of the streams' G, heads of keys.
      theta: base of the rotary frequencies.
      implementation: "xla", "pallas_triton", or None for the platform's best.

    Returns:
      o_BLHK in q's dtype; 0 for a query that sees nothing.

    Raises:
      ValueError: shapes do not fit each other.
      Unsupported: the named implementation cannot take these inputs.
    """
    B, L, H, K = q_BLHK.shape
    if not streams:
        raise ValueError("streams must not be empty")
    G = streams[0].k_BSGK.shape[2]
    if H % G:
        raise ValueError(f"{H=} query heads must be a multiple of {G=} key heads")
    for i, stream in enumerate(streams):
        S = stream.k_BSGK.shape[1]
        wanted = {"k_BSGK": (B, S, G, K), "v_BSGK": (B, S, G, K), "positions_BS": (B, S)}
        wanted |= {"visible_BLS": (B, L, S), "bias_BHS": (B, H, S)}
        for name, array in stream._asdict().items():
            if array is not None and array.shape != wanted[name]:
                raise ValueError(
                    f"streams[{i}].{name} has shape {array.shape}, expected {wanted[name]}"
                )
    return dispatch.run("cached_attention", IMPLEMENTATIONS, implementation, q_BLHK, streams, theta)
