"""What decoding keeps of the past: constant memory per layer, however long the context.

Only full attention layers grow, up to a length fixed beforehand. A new row starts with a whole pass
(`prefill`), or with an empty cache; then it is continued piece by piece (`extend`). A piece of one
token is a decoding step.

Everything counts in *times*: tokens since the start of the row. The document of a token is told by
the time at which it starts, so that packed documents need no bookkeeping in the caches: a key of
time t is of the query's document when t >= start.

    ring of a window W:       R = W + P         P: the longest piece
    with an eidetic memory:   R = W + C + P     tokens wait in the ring until they are candidates
    fading ring:              R = W + F + P     F at least C where the memory is of this stream
    full attention:           R = the greatest length
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from bmojo_jax.config import BlockSpec, ModelConfig
from bmojo_jax.layers import at_least_float32
from bmojo_jax.memory import Slots, empty_slots
from pallas_kernels import KeyRing
from pallas_kernels.innovation.api import TAPS
from pallas_kernels.write_keys.xla import write_ring


class Piece(NamedTuple):
    """The next tokens of every row; rows may have fewer than L of them."""

    time_B: Int[Array, " B"]  # of the first token
    positions_BL: Int[Array, "B L"]  # in the document
    length_B: Int[Array, " B"]  # how many of the L tokens are real
    # Whether some row crosses a chunk's border, where that is known as the program is made.
    crosses: bool | None = None

    @property
    def time_BL(self) -> Int[Array, "B L"]:
        return self.time_B[:, None] + jnp.arange(self.positions_BL.shape[1])[None, :]

    @property
    def start_BL(self) -> Int[Array, "B L"]:
        """Time of the first token of each token's document."""
        return self.time_BL - self.positions_BL

    @property
    def real_BL(self) -> Bool[Array, "B L"]:
        return jnp.arange(self.positions_BL.shape[1])[None, :] < self.length_B[:, None]

    @property
    def end_B(self) -> Int[Array, " B"]:
        return self.time_B + self.length_B


class SsmCache(NamedTuple):
    """Of a Mamba mixer."""

    tail_BTE: Float[Array, "B T E"]  # the last T - 1 inputs of the convolution
    h_BEN: Float[Array, "B E N"]  # the state, float32


class EideticCache(NamedTuple):
    """The memory of the current chunk, and innovations of the tokens that may enter the next."""

    slots: Slots
    k_BMGK: Float[Array, "B M G K"]  # normed, unrotated
    v_BMGK: Float[Array, "B M G K"]
    e_BR: Float[Array, "B R"]  # ring beside the in-context keys


class AttentionCache(NamedTuple):
    """Of an attention mixer; streams that it does not have are None."""

    window: KeyRing
    fading: KeyRing | None
    eidetic: EideticCache | None


class BmojoCache(NamedTuple):
    """Of a B'MOJO mixer."""

    ssm: SsmCache
    attention: AttentionCache
    states_BTD: Float[Array, "B T D"] | None  # the last 4 states, for the innovation


# Of every group the caches of its blocks. Not stacked: a step writes into them in place.
Layers = tuple[tuple[SsmCache | AttentionCache | BmojoCache, ...], ...]


class Cache(NamedTuple):
    """Of a model: rows that were fed time_B tokens so far."""

    time_B: Int[Array, " B"]
    position_B: Int[Array, " B"]  # of the next token, should it continue the last document
    layers: Layers


def shift(tail: Array, new_BLX: Array, length_B: Int[Array, " B"]) -> Array:
    """The last entries of tail followed by the first length_B of new_BLX; as many as tail has."""
    history = jnp.concatenate([tail, new_BLX.astype(tail.dtype)], axis=1)
    index_BT = length_B[:, None] + jnp.arange(tail.shape[1])[None, :]
    return jnp.take_along_axis(history, index_BT[:, :, None], axis=1)


def last(x_BLX: Array, length_B: Int[Array, " B"], like: Array) -> Array:
    """Of new rows of length_B tokens the last entries, as many as `like`, [B, T, X], has; zeros
    before the row."""
    time_BT = length_B[:, None] + jnp.arange(-like.shape[1], 0)[None, :]
    return _at(x_BLX, time_BT).astype(like.dtype)


def ring_of(x_BL: Array, length_B: Int[Array, " B"], like: Array) -> Array:
    """What a ring `like` [B, R, ...] holds after the first length_B of x_BL[B, L, ...], which
    starts the row; zeros where there is nothing yet."""
    return _at(x_BL, ring_times(length_B, like.shape[1])).astype(like.dtype)


def _at(x_BL: Array, time_BT: Int[Array, "B T"]) -> Array:
    """Entries of new rows by their times; zeros for negative ones."""
    times = time_BT.reshape(*time_BT.shape, *(1,) * (x_BL.ndim - 2))
    taken = jnp.take_along_axis(x_BL, jnp.maximum(times, 0), axis=1, mode="clip")
    return jnp.where(times >= 0, taken, 0)


def write(buffer_BR: Array, new_BL: Array, piece: Piece) -> Array:
    """Puts the real tokens of new_BL[B, L, ...] into their slots of a ring [B, R, ...], L <= R."""
    return write_ring(buffer_BR, new_BL, piece.time_BL, piece.real_BL)


def ring_times(end_B: Int[Array, " B"], capacity: int) -> Int[Array, "B R"]:
    """Time of what lies in each slot of a ring whose latest token is end - 1; negative: nothing."""
    latest_B1 = end_B[:, None] - 1
    slot_1R = jnp.arange(capacity)[None, :]
    return latest_B1 - (latest_B1 - slot_1R) % capacity


def longest_piece(config: ModelConfig) -> int:
    """P: tokens that a piece may hold. At most one chunk, so that it crosses one border at most."""
    return min(config.chunk, 256)


def _state_dtype(config: ModelConfig) -> jnp.dtype:
    """Of SSM states and innovations."""
    return at_least_float32(config.compute_dtype)


def check_room(config: ModelConfig, cache: Cache, longest: int) -> None:
    """Raises ValueError if full attention cannot hold `longest` tokens in a row."""
    for block, layer in zip(config.blocks, cache.layers[0], strict=True):
        if block.mixer == "attention":
            assert isinstance(layer, AttentionCache)
            room = layer.window.k_BRGK.shape[1]
            if longest > room:
                raise ValueError(
                    f"a row of {longest} tokens: the cache was made for max_length={room}"
                )


def _ring(config: ModelConfig, batch: int, capacity: int) -> KeyRing:
    shape = (batch, capacity, config.num_kv_heads, config.head_width)
    return KeyRing(*(jnp.zeros(shape, config.compute_dtype) for _ in range(2)))


def _ssm(config: ModelConfig, batch: int) -> SsmCache:
    inner = config.ssm_inner
    return SsmCache(
        tail_BTE=jnp.zeros((batch, config.conv_taps - 1, inner), config.compute_dtype),
        h_BEN=jnp.zeros((batch, inner, config.ssm_state), _state_dtype(config)),
    )


def _bmojo(config: ModelConfig, batch: int, size: int) -> BmojoCache:
    longest = longest_piece(config)
    window, fading = config.window, config.fading_span
    if size and config.eidetic_content == "fading":
        fading = max(fading, config.chunk)
    eidetic = None
    if size:
        capacity = window + config.chunk + longest
        shape = (batch, size, config.num_kv_heads, config.head_width)
        eidetic = EideticCache(
            slots=empty_slots(batch, size, _state_dtype(config)),
            k_BMGK=jnp.zeros(shape, config.compute_dtype),
            v_BMGK=jnp.zeros(shape, config.compute_dtype),
            e_BR=jnp.zeros((batch, capacity), _state_dtype(config)),
        )
    return BmojoCache(
        ssm=_ssm(config, batch),
        attention=AttentionCache(
            window=_ring(config, batch, window + longest + (config.chunk if size else 0)),
            fading=_ring(config, batch, window + fading + longest) if fading else None,
            eidetic=eidetic,
        ),
        states_BTD=jnp.zeros((batch, TAPS, config.width), config.compute_dtype) if size else None,
    )


def _mixer(config: ModelConfig, spec: BlockSpec, batch: int, max_length: int):
    match spec.mixer:
        case "mamba":
            return _ssm(config, batch)
        case "attention":
            return AttentionCache(_ring(config, batch, max_length), None, None)
        case "swa":
            capacity = config.window + longest_piece(config)
            return AttentionCache(_ring(config, batch, capacity), None, None)
        case "bmojo_f":
            return _bmojo(config, batch, 0)
        case _:
            return _bmojo(config, batch, config.eidetic_tokens)


def empty_cache(config: ModelConfig, batch: int, *, max_length: int) -> Cache:
    """A cache that has seen nothing.

    Args:
      max_length: tokens that a row may reach; only full attention layers reserve memory for them.
    """
    if batch < 1 or max_length < 1:
        raise ValueError(f"{batch=} and {max_length=} must be positive")
    grows = any(block.mixer == "attention" for block in config.blocks)
    return _empty(config, batch, max_length if grows else 1)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _empty(config: ModelConfig, batch: int, max_length: int) -> Cache:
    """One program: hundreds of arrays, made one by one, take longer than a prompt's pass."""
    return Cache(
        time_B=jnp.zeros((batch,), jnp.int32),
        position_B=jnp.zeros((batch,), jnp.int32),
        layers=tuple(
            tuple(_mixer(config, spec, batch, max_length) for spec in config.blocks)
            for _ in range(config.num_groups)
        ),
    )
