"""Multi-query associative recall (arXiv 2312.04927; the protocol of HazyResearch/zoology).

A row of L tokens over V words, with k pairs (4 k <= L):

    k1 v1 k2 v2 ... kk vk | slots of two tokens: a query key and a filler, or two fillers

Keys are k different words of 1 .. V/2 - 1, values k different ones of V/2 .. V - 1. Slot s of the
(L - 2 k) / 2 has a probability proportional to (s + 1)^(a - 1), a = 0.01; k slots are drawn one
after the other without replacement, key j gets the j-th. The label, its value, stands at the query
key's own position 2 k + 2 slot_j. Fillers are any words, uniformly ("random"), or word 0 ("zero").

Slots are the k largest of log p_s + Gumbel noise, in falling order: this *is* drawing one after the
other without replacement (arXiv 1903.06059, section 2.3), in one parallel step.

k is an argument that may be traced: arrays have room for `most` pairs and mask the rest.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from bmojo_jax.data.tasks.example import Example
from bmojo_jax.settings import require

POWER = 0.01  # a


def check(*, vocab_size: int, length: int, pairs: tuple[int, ...]) -> None:
    """Raises ValueError if there are too few words or tokens."""
    require(length % 2 == 0, "data.sequence_length", length, 'even with task.name="mqar"')
    require(
        4 * max(pairs) <= length,
        "task.pairs",
        pairs,
        f"at most a quarter of data.sequence_length={length}",
    )
    require(
        vocab_size % 2 == 0 and vocab_size // 2 > max(pairs),
        "task.vocab_size",
        vocab_size,
        f"even and at least {2 * max(pairs) + 2} for task.pairs={pairs}",
    )


def slots(key: Array, k: Int[Array, ""] | int, *, length: int) -> Int[Array, " S"]:
    """The slots in the order in which keys get them; those from k on get none."""
    slot_S = jnp.arange(length // 2)
    log_p_S = (POWER - 1) * jnp.log1p(slot_S.astype(jnp.float32))
    log_p_S = jnp.where(slot_S < length // 2 - k, log_p_S, -jnp.inf)
    return jnp.argsort(log_p_S + jax.random.gumbel(key, (length // 2,)), descending=True)


def _different_words(key: Array, first: int, end: int, count: int) -> Int[Array, " A"]:
    """`count` different words of first .. end - 1, every ordered choice equally likely."""
    return first + jax.lax.top_k(jax.random.bits(key, (end - first,)), count)[1]


def example(
    key: Array, k: Int[Array, ""] | int, *, vocab_size: int, length: int, most: int, filler: str
) -> Example:
    """One row; of its `most` answers, the first k count."""
    key_words, value_words, key_slots, key_filler = jax.random.split(key, 4)
    half = vocab_size // 2
    keys_A = _different_words(key_words, 1, half, most)
    values_A = _different_words(value_words, half, vocab_size, most)
    slots_S = slots(key_slots, k, length=length)
    index_A = jnp.arange(most)
    real_A = index_A < k
    asked_A = jnp.where(real_A, 2 * k + 2 * slots_S[:most], 0)

    # Every token asks what it is: gathers alone, no scatter.
    token_L = jnp.arange(length)
    pair_L = jnp.minimum(token_L // 2, most - 1)
    context_L = jnp.where(token_L % 2 == 0, keys_A[pair_L], values_A[pair_L])
    rank_L = jnp.argsort(slots_S)[jnp.maximum(token_L - 2 * k, 0) // 2]
    is_query_L = (token_L % 2 == 0) & (rank_L < k)
    query_L = keys_A[jnp.minimum(rank_L, most - 1)]
    if filler == "random":
        filler_L = jax.random.randint(key_filler, (length,), 0, vocab_size)
    else:
        filler_L = jnp.zeros((length,), jnp.int32)
    behind_L = jnp.where(is_query_L, query_L, filler_L)
    tokens_L = jnp.where(token_L < 2 * k, context_L, behind_L)
    return Example(
        tokens=tokens_L,
        asked=asked_A,
        labels=values_A,
        trained=real_A,
        scored=real_A,
        distance=asked_A - (2 * index_A + 1),
    )
