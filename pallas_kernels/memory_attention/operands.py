"""What api.py hands to an implementation, checked, and what it expects back."""

import dataclasses
from typing import NamedTuple

import jax


class Fading(NamedTuple):
    """Keys and values of the state's outputs, at their tokens' positions."""

    k_BLGK: jax.Array
    v_BLGK: jax.Array


class Eidetic(NamedTuple):
    """The memory of every chunk, which of its slots are filled, and a bias on its logits."""

    k_BZMGK: jax.Array
    v_BZMGK: jax.Array
    valid_BZM: jax.Array
    bias_BZHM: jax.Array | None


class Operands(NamedTuple):
    """The arrays of one call; a stream that is off is None. Gradients have the same structure."""

    q_BLHK: jax.Array
    k_BLGK: jax.Array
    v_BLGK: jax.Array
    fading: Fading | None
    eidetic: Eidetic | None
    segment_ids_BL: jax.Array | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """The static side of one call, in normal form.

    Attributes:
      window: at most L.
      fading_window: at most L; 0 exactly if the fading stream is off.
      chunk: at most L; L if the eidetic stream is off.
      scale: factor on the logits.
      blocks: the caller's block sizes as sorted (name, size) pairs, so that the spec hashes.
    """

    window: int
    fading_window: int
    chunk: int
    scale: float
    blocks: tuple[tuple[str, int], ...] = ()


class AttentionOutput(NamedTuple):
    """Attended values, and the natural log of the softmax's denominator."""

    o_BLHK: jax.Array
    lse_BLH: jax.Array
