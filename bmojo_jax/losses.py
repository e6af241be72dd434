"""Token-weighted cross-entropy without the logits of the whole vocabulary.

    lse = log sum_v exp(x . w_v)       nll = lse - x . w_target       z = lse^2

The vocabulary is walked in J chunks with a running maximum and a running sum (online softmax,
arXiv 1805.02867); the gradient walks it again and recomputes each chunk's logits:

    dlogit_v = dlse exp(logit_v - lse) + dscore [v = target]

so what is held is [B, L, vocab_chunk] in float32, never [B, L, V]. z is the auxiliary loss of
PaLM (arXiv 2204.02311, section 5), which keeps lse near 0.

Chunk j is the words j, j + J, j + 2 J, ...: a vocabulary cut over devices in contiguous pieces
then has every device busy in every chunk, with its own words.

Dtypes: matrix products in x's dtype with float32 accumulation, softmax in float32 (float64 where
x is); w is converted chunk by chunk and its gradient has w's dtype.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from bmojo_jax import sharding


class Loss(NamedTuple):
    """Sums over the tokens of a batch; divide by `weight` after adding up batches."""

    nll: Float[Array, ""]  # weighted negative log-likelihood, nats
    z_loss: Float[Array, ""]  # weighted lse^2, times the coefficient
    weight: Float[Array, ""]  # of the weights
    correct: Float[Array, ""]  # of the weights where no other word scores as high as the target


class _Scores(NamedTuple):
    lse_BL: Array  # log-sum-exp of all logits
    score_BL: Array  # the target's logit
    correct_BL: Array  # bool


def num_chunks(V: int, vocab_chunk: int) -> int:
    """J: chunks of at most `vocab_chunk` words, of equal size if up to twice as many allow it.

    Equal chunks need no padding, which would move words between devices that share the table.
    """
    least = -(-V // vocab_chunk)
    return next((J for J in range(least, min(2 * least, V + 1)) if V % J == 0), least)


def _split(w_VD: Array, J: int) -> Array:
    """[V, D] -> [words of a chunk, J, D], the last rows zero where J does not divide V."""
    V, D = w_VD.shape
    w_VD = jnp.pad(w_VD, ((0, -V % J), (0, 0)))
    return sharding.constrain(w_VD.reshape(-1, J, D), "tensor", None, sharding.FULLY)


def _chunk(words_VJD: Array, j: Array, dtype: jnp.dtype) -> Array:
    w_VD = lax.dynamic_index_in_dim(words_VJD, j, axis=1, keepdims=False).astype(dtype)
    return sharding.constrain(w_VD, "tensor", None)


def _logits(x_BLD: Array, w_VD: Array, j: Array, *, V: int, J: int) -> Array:
    """Logits of chunk j, -inf where it is padded beyond the vocabulary of V words."""
    dtype = jnp.promote_types(x_BLD.dtype, jnp.float32)
    logits_BLV = jnp.einsum("BLD,VD->BLV", x_BLD, w_VD, preferred_element_type=dtype)
    if V % J:
        real_V = jnp.arange(w_VD.shape[0], dtype=jnp.int32) * J + j < V
        logits_BLV = jnp.where(real_V[None, None, :], logits_BLV, -jnp.inf)
    return sharding.constrain(logits_BLV, sharding.BATCH, sharding.CONTEXT, "tensor")


def _is_target(targets_BL: Array, j: Array, *, J: int, words: int) -> Array:
    """Whether a word of chunk j is the token's target, [B, L, words]."""
    # A comparison and not a gather: it fuses, and works on a cut vocabulary without exchange.
    here_BL = jnp.where(targets_BL % J == j, targets_BL // J, -1)
    return here_BL[:, :, None] == jnp.arange(words, dtype=jnp.int32)[None, None, :]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _scores(x_BLD: Array, w_VD: Array, targets_BL: Array, J: int) -> _Scores:
    dtype = jnp.promote_types(x_BLD.dtype, jnp.float32)
    words_VJD = _split(w_VD, J)

    def step(carry: tuple[Array, ...], j: Array) -> tuple[tuple[Array, ...], None]:
        max_BL, sum_BL, score_BL, rival_BL = carry
        logits_BLV = _logits(x_BLD, _chunk(words_VJD, j, x_BLD.dtype), j, V=w_VD.shape[0], J=J)
        target_BLV = _is_target(targets_BL, j, J=J, words=words_VJD.shape[0])
        # Of the target and of the others in one pass over the logits: their maximum needs no more.
        own_BL = jnp.where(target_BLV, logits_BLV, 0).sum(axis=-1)
        others_BL = jnp.where(target_BLV, -jnp.inf, logits_BLV).max(axis=-1)
        largest_BL = jnp.maximum(others_BL, jnp.where(targets_BL % J == j, own_BL, -jnp.inf))
        new_BL = jnp.maximum(max_BL, largest_BL)
        sum_BL = sum_BL * jnp.exp(max_BL - new_BL)
        sum_BL += jnp.exp(logits_BLV - new_BL[:, :, None]).sum(axis=-1)
        return (new_BL, sum_BL, score_BL + own_BL, jnp.maximum(rival_BL, others_BL)), None

    zeros_BL = jnp.zeros(x_BLD.shape[:2], dtype)
    start = (zeros_BL - jnp.inf, zeros_BL, zeros_BL, zeros_BL - jnp.inf)
    end, _ = lax.scan(step, start, jnp.arange(J, dtype=jnp.int32))
    max_BL, sum_BL, score_BL, rival_BL = end
    return _Scores(max_BL + jnp.log(sum_BL), score_BL, score_BL > rival_BL)


def _scores_forward(
    x_BLD: Array, w_VD: Array, targets_BL: Array, J: int
) -> tuple[_Scores, tuple[Array, ...]]:
    scores = _scores(x_BLD, w_VD, targets_BL, J)
    return scores, (x_BLD, w_VD, targets_BL, scores.lse_BL)


def _scores_backward(
    J: int, residuals: tuple[Array, ...], d_scores: _Scores
) -> tuple[Array, Array, None]:
    x_BLD, w_VD, targets_BL, lse_BL = residuals
    V, D = w_VD.shape
    words_VJD = _split(w_VD, J)

    def step(carry: tuple[Array, Array], j: Array) -> tuple[tuple[Array, Array], None]:
        dx_BLD, dwords_VJD = carry
        w_VD = _chunk(words_VJD, j, x_BLD.dtype)
        logits_BLV = _logits(x_BLD, w_VD, j, V=V, J=J)
        target_BLV = _is_target(targets_BL, j, J=J, words=w_VD.shape[0])
        dlogits_BLV = d_scores.lse_BL[:, :, None] * jnp.exp(logits_BLV - lse_BL[:, :, None])
        dlogits_BLV += jnp.where(target_BLV, d_scores.score_BL[:, :, None], 0)
        dlogits_BLV = dlogits_BLV.astype(x_BLD.dtype)
        dx_BLD += jnp.einsum("BLV,VD->BLD", dlogits_BLV, w_VD, preferred_element_type=dx_BLD.dtype)
        dw_VD = jnp.einsum("BLV,BLD->VD", dlogits_BLV, x_BLD, preferred_element_type=dx_BLD.dtype)
        dw_VD = sharding.constrain(dw_VD.astype(words_VJD.dtype), "tensor", sharding.FULLY)
        return (dx_BLD, lax.dynamic_update_index_in_dim(dwords_VJD, dw_VD, j, axis=1)), None

    start = (jnp.zeros(x_BLD.shape, lse_BL.dtype), jnp.zeros_like(words_VJD))
    (dx_BLD, dwords_VJD), _ = lax.scan(step, start, jnp.arange(J, dtype=jnp.int32))
    return dx_BLD.astype(x_BLD.dtype), dwords_VJD.reshape(-1, D)[:V], None


_scores.defvjp(_scores_forward, _scores_backward)


def cross_entropy(
    x_BLD: Float[Array, "B L D"],
    w_VD: Float[Array, "V D"],
    targets_BL: Int[Array, "B L"],
    weights_BL: Float[Array, "B L"],
    *,
    vocab_chunk: int,
    z_loss: float,
) -> Loss:
    """The loss of predicting `targets_BL` with the logits x . w.

    Args:
      vocab_chunk: words whose logits are held at a time.
      z_loss: coefficient of the lse^2 term.
    """
    scores = _scores(x_BLD, w_VD, targets_BL, num_chunks(w_VD.shape[0], vocab_chunk))
    weights_BL = weights_BL.astype(scores.lse_BL.dtype)
    return Loss(
        nll=(weights_BL * (scores.lse_BL - scores.score_BL)).sum(),
        z_loss=z_loss * (weights_BL * jnp.square(scores.lse_BL)).sum(),
        weight=weights_BL.sum(),
        correct=(weights_BL * scores.correct_BL).sum(),
    )


def per_token_nll(
    x_BLD: Float[Array, "B L D"],
    w_VD: Float[Array, "V D"],
    targets_BL: Int[Array, "B L"],
    *,
    vocab_chunk: int,
) -> Float[Array, "B L"]:
    """The negative log-likelihood of every target, in nats."""
    scores = _scores(x_BLD, w_VD, targets_BL, num_chunks(w_VD.shape[0], vocab_chunk))
    return scores.lse_BL - scores.score_BL
