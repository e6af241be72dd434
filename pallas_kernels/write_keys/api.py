"""What decoding keeps of a token: its key, normed but not rotated, and its value.

    k_ring[t mod R] = k_t / sqrt(mean k_t^2 + eps) * scale        v_ring[t mod R] = v_t

of every real new token t, in several rings (in-context and fading keys) of the same tokens.
(QK-norm, arXiv 2302.05442 section 2; RMS norm, arXiv 1910.07467.)

Implementations: "xla" (the definition) and "pallas_triton" (one new token).
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.arguments import expect
from pallas_kernels.write_keys import pallas_triton, xla

IMPLEMENTATIONS = {"xla": xla.write_keys, "pallas_triton": pallas_triton.write_keys}


class KeyRing(NamedTuple):
    """The latest R keys, normed and unrotated, and values; token t lies in slot t mod R."""

    k_BRGK: Float[Array, "B R G K"]
    v_BRGK: Float[Array, "B R G K"]


def write_keys(
    rings: Sequence[KeyRing],
    keys_values: Sequence[tuple[Float[Array, "B L G K"], Float[Array, "B L G K"]]],
    time_BL: Int[Array, "B L"],
    real_BL: Bool[Array, "B L"],
    scale_K: Float[Array, " K"] | None,
    *,
    eps: float,
    implementation: str | None = None,
) -> tuple[KeyRing, ...]:
    """The rings with new tokens in them; in place where the old ones are not used any more.

    Args:
      keys_values: of each ring, of L new tokens, at most as many as it holds.
      time_BL: of the tokens, from 0, ascending by ones.
      real_BL: which tokens to write.
      scale_K: of the keys' norm; None: there is none.
      implementation: "xla", "pallas_triton", or None for the platform's best.

    Raises:
      ValueError: shapes do not fit each other, or a ring is too short.
      Unsupported: the named implementation cannot take these inputs.
    """
    if not rings or len(rings) != len(keys_values):
        raise ValueError(
            f"{len(rings)} rings and {len(keys_values)} keys and values: must be equal"
        )
    B, L = time_BL.shape
    expect("real_BL", real_BL, (B, L), jnp.bool_)
    G, K = rings[0].k_BRGK.shape[2:]
    for i, (ring, new) in enumerate(zip(rings, keys_values, strict=True)):
        R = ring.k_BRGK.shape[1]
        if R < L:
            raise ValueError(f"a piece of {L} tokens: the cache holds {R} of a row")
        for name, buffer, values in zip("kv", ring, new, strict=True):
            expect(f"rings[{i}].{name}_BRGK", buffer, (B, R, G, K), jnp.floating)
            expect(f"keys_values[{i}].{name}_BLGK", values, (B, L, G, K), jnp.floating)
    if scale_K is not None:
        expect("scale_K", scale_K, (K,), jnp.floating)
    pairs = [(ring.k_BRGK, ring.v_BRGK) for ring in rings]
    arguments = (pairs, keys_values, time_BL, real_BL, scale_K, eps)
    written = dispatch.run("write_keys", IMPLEMENTATIONS, implementation, *arguments)
    return tuple(KeyRing(k, v) for k, v in written)
