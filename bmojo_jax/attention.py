"""Attention over up to three streams of keys under one softmax (arXiv 2407.06324; our spec 2.3).

Query i attends to in-context keys of tokens (i - W, i], to fading keys, made from the SSM's
output f, of tokens (i - W - F, i - W], and to the eidetic keys of its chunk's memory. Queries and
keys of the window are rotated to their own positions; eidetic keys as `eidetic_positions` says.
The fading projections are the in-context ones unless they are untied.

Matrix products run in the compute dtype; norms, rotations and softmax are float32.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from bmojo_jax import memory, operations
from bmojo_jax.cache import AttentionCache, EideticCache, Piece, ring_of, ring_times, write
from bmojo_jax.config import ModelConfig
from bmojo_jax.layers import (
    Documents,
    Projection,
    RMSNorm,
    one_document,
)
from pallas_kernels import KeyRing, KeyStream

# Keeps log(e / mean e) finite where a token was predicted without error.
INNOVATION_FLOOR = 1e-6


class Seen(NamedTuple):
    """Keys, neither normed nor rotated, and values of a whole pass; None: no such stream."""

    window: tuple[Array, Array]
    fading: tuple[Array, Array] | None
    kept: operations.Memory | None


class Attention(nnx.Module):
    """Projections, norms, rotary and the joint softmax. Which tokens to remember is given.

    Used for full attention, sliding windows (no fading, no memory) and inside the B'MOJO mixer.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        window: int | None,
        fading_window: int,
        eidetic_tokens: int,
        output_scale: float,
        rngs: nnx.Rngs,
    ):
        """`window=None` attends to everything before."""
        width, heads, kv_heads, head = (
            config.width,
            config.num_heads,
            config.num_kv_heads,
            config.head_width,
        )
        self.config = config
        self.window = window
        self.fading_window = fading_window
        self.eidetic_tokens = eidetic_tokens
        self.q_proj = Projection((width,), (heads, head), rngs=rngs)
        self.k_proj = Projection((width,), (kv_heads, head), rngs=rngs)
        self.v_proj = Projection((width,), (kv_heads, head), rngs=rngs)
        self.remembers_fading = bool(eidetic_tokens) and config.eidetic_content == "fading"
        self.reads_fading = bool(fading_window) or self.remembers_fading
        if self.reads_fading and config.fading_projections == "untied":
            self.fading_k_proj = Projection((width,), (kv_heads, head), rngs=rngs)
            self.fading_v_proj = Projection((width,), (kv_heads, head), rngs=rngs)
        if config.qk_norm:
            self.q_norm = RMSNorm(head, config.norm_eps)
            self.k_norm = RMSNorm(head, config.norm_eps)
        if eidetic_tokens and config.eidetic_gate:
            self.eidetic_gate = nnx.Param(jnp.zeros((heads,), jnp.float32))
        self.o_proj = Projection((heads, head), (width,), scale=output_scale, rngs=rngs)

    def keys_values(self, u_BLD: Array) -> tuple[Array, Array]:
        """In-context k_BLGK, v_BLGK; k is neither normed nor rotated."""
        return self.k_proj(u_BLD), self.v_proj(u_BLD)

    def fading_keys_values(self, f_BLD: Array) -> tuple[Array, Array]:
        """The same of the fading stream."""
        if self.config.fading_projections == "tied":
            return self.keys_values(f_BLD)
        return self.fading_k_proj(f_BLD), self.fading_v_proj(f_BLD)

    def _normed(self, k: Array) -> Array:
        """What caches and the memory store: keys that are not rotated."""
        return self.k_norm(k) if self.config.qk_norm else k

    def placed(self, x_BLHK: Array, norm: str, positions_BL: Array) -> Array:
        """Queries or keys as attention takes them: normed by `q_norm` or `k_norm`, and rotated."""
        config = self.config
        scale_K = getattr(self, norm).scale[...] if config.qk_norm else None
        return operations.norm_rotary(
            x_BLHK, scale_K, positions_BL, theta=config.rope_theta, eps=config.norm_eps
        )

    def gate_bias(self, innovation: Array, valid: Array) -> Array:
        """b_h log(e_j / mean e), mean over the memory's tokens: [..., M] -> [..., H, M]."""
        count = jnp.maximum(jnp.sum(valid, axis=-1, keepdims=True), 1)
        present = jnp.where(valid, innovation, 0)
        mean = jnp.sum(present, axis=-1, keepdims=True) / count
        ratio = (present + INNOVATION_FLOOR) / (mean + INNOVATION_FLOOR)
        gate_H = self.eidetic_gate[...]
        shape = (1,) * (innovation.ndim - 1) + (-1, 1)
        return gate_H.reshape(shape) * jnp.log(ratio)[..., None, :]

    def output(self, o_BLHK: Array) -> Array:
        return self.o_proj(o_BLHK)

    def __call__(
        self,
        u_BLD: Float[Array, "B L D"],
        documents: Documents,
        *,
        f_BLD: Float[Array, "B L D"] | None = None,
        e_BL: Float[Array, "B L"] | None = None,
        statistics: bool = False,
    ) -> tuple[Float[Array, "B L D"], dict[str, Array]]:
        """The whole pass.

        Args:
          f_BLD: the fading stream (needed when `reads_fading`).
          e_BL: the innovations (needed when eidetic_tokens > 0).
          statistics: also return the share of attention mass on each stream, and what is kept.
        """
        qkv, streams, shared, seen = self._streams(u_BLD, documents, f_BLD, e_BL)
        o_BLHK, lse_BLH = operations.memory_attention(*qkv, **streams, **shared)
        masses = {}
        if statistics:
            fading = {name: value for name, value in streams.items() if "fading" in name}
            window_lse = operations.memory_attention(*qkv, **shared).lse_BLH
            recent_lse = operations.memory_attention(*qkv, **fading, **shared).lse_BLH
            in_context = jnp.mean(jnp.exp(window_lse - lse_BLH))
            recent = jnp.mean(jnp.exp(recent_lse - lse_BLH))
            masses = {
                "mass_in_context": in_context,
                "mass_fading": recent - in_context,
                "mass_eidetic": 1 - recent,
            }
            if seen.kept is not None:
                masses |= self._memory_statistics(seen.kept)
        return self.output(o_BLHK), masses

    def prefill(
        self,
        u_BLD: Float[Array, "B L D"],
        length_B: Int[Array, " B"],
        empty: AttentionCache,
        *,
        padded: bool,
        f_BLD: Float[Array, "B L D"] | None = None,
        e_BL: Float[Array, "B L"] | None = None,
    ) -> tuple[Float[Array, "B L D"], AttentionCache]:
        """The whole pass of new rows, one document each, of length_B tokens, and their cache."""
        del padded  # what is behind a row's tokens is seen by none of them
        documents = one_document(*u_BLD.shape[:2])
        qkv, streams, shared, seen = self._streams(u_BLD, documents, f_BLD, e_BL)
        o_BLHK = operations.memory_attention(*qkv, **streams, **shared).o_BLHK

        def ring(keys_values: tuple[Array, Array], like: KeyRing) -> KeyRing:
            k, v = (ring_of(x, length_B, v) for x, v in zip(keys_values, like, strict=True))
            return KeyRing(self._normed(k), v)

        fading = eidetic = None
        if empty.fading is not None:
            assert seen.fading is not None
            fading = ring(seen.fading, empty.fading)
        if empty.eidetic is not None:
            assert e_BL is not None and seen.kept is not None
            eidetic = self._first_memory(seen.kept, e_BL, length_B, empty.eidetic)
        cache = AttentionCache(ring(seen.window, empty.window), fading, eidetic)
        return self.output(o_BLHK), cache

    def _streams(self, u_BLD, documents: Documents, f_BLD, e_BL):
        """What `memory_attention` takes: q, k and v; the other streams; the rest. And `Seen`."""
        positions_BL = documents.positions_BL
        q_BLHK = self.placed(self.q_proj(u_BLD), "q_norm", positions_BL)
        k_BLGK, v_BLGK = self.keys_values(u_BLD)
        streams: dict[str, Any] = {}
        kept = fading = None
        if self.reads_fading:
            assert f_BLD is not None
            fading = self.fading_keys_values(f_BLD)
        if self.eidetic_tokens:
            assert e_BL is not None
            source = fading if self.remembers_fading else (k_BLGK, v_BLGK)
            assert source is not None
            kept = self._remember(*source, e_BL, documents)
            streams |= self._eidetic(kept, positions_BL)
        if self.fading_window:
            assert fading is not None
            streams |= {
                "fading_k_BLGK": self.placed(fading[0], "k_norm", positions_BL),
                "fading_v_BLGK": fading[1],
                "fading_window": self.fading_window,
            }
        shared: dict[str, Any] = {
            "window": u_BLD.shape[1] if self.window is None else self.window,
            "segment_ids_BL": documents.segment_ids_BL,
            "implementation": self.config.attention_implementation,
        }
        qkv = (q_BLHK, self.placed(k_BLGK, "k_norm", positions_BL), v_BLGK)
        return qkv, streams, shared, Seen((k_BLGK, v_BLGK), fading, kept)

    def _first_memory(
        self, kept: operations.Memory, e_BL: Array, length_B: Array, empty: EideticCache
    ) -> EideticCache:
        """The memory of the chunk of each new row's last token."""
        chunk_B = jnp.maximum(length_B - 1, 0) // self.config.chunk

        def of_chunk(x_BZ: Array) -> Array:
            index = chunk_B.reshape((-1,) + (1,) * (x_BZ.ndim - 1))
            return jnp.take_along_axis(x_BZ, index, axis=1)[:, 0]

        valid_BM = of_chunk(kept.valid_BZM)
        dtype = empty.slots.innovation_BM.dtype
        innovation_BM = jnp.where(valid_BM, of_chunk(kept.tokens["e_BL"]).astype(dtype), -jnp.inf)
        time_BM = jnp.where(valid_BM, of_chunk(kept.index_BZM), -1)
        return EideticCache(
            slots=memory.Slots(innovation_BM=innovation_BM, time_BM=time_BM),
            k_BMGK=self._normed(of_chunk(kept.tokens["k_BLGK"])).astype(empty.k_BMGK.dtype),
            v_BMGK=of_chunk(kept.tokens["v_BLGK"]).astype(empty.v_BMGK.dtype),
            e_BR=ring_of(e_BL, length_B, empty.e_BR),
        )

    def extend(
        self,
        u_BLD: Float[Array, "B L D"],
        cache: AttentionCache,
        piece: Piece,
        *,
        f_BLD: Float[Array, "B L D"] | None = None,
        e_BL: Float[Array, "B L"] | None = None,
    ) -> tuple[Float[Array, "B L D"], AttentionCache]:
        """Continues every row by a piece: attention to the cached keys.

        Rotary counts from the piece's first token: only differences matter, and small angles
        stay exact however long the row is.
        """
        time_BL = piece.time_BL[:, :, None]
        start_BL = piece.start_BL[:, :, None]
        zero_B1 = piece.time_B[:, None]
        q_BLHK = self.placed(self.q_proj(u_BLD), "q_norm", piece.time_BL - zero_B1)
        before, keys_values = [cache.window], [self.keys_values(u_BLD)]
        if cache.fading is not None:
            assert f_BLD is not None
            before.append(cache.fading)
            keys_values.append(self.fading_keys_values(f_BLD))
        ring, *rings = operations.write_keys(
            before,
            keys_values,
            piece.time_BL,
            piece.real_BL,
            self.k_norm.scale[...] if self.config.qk_norm else None,
            eps=self.config.norm_eps,
        )

        def stream(ring: KeyRing, oldest: int | None, newest: int) -> KeyStream:
            """The keys whose age is in [newest, oldest)."""
            time_BR = ring_times(piece.end_B, ring.k_BRGK.shape[1])
            age_BLR = time_BL - time_BR[:, None, :]
            visible = (age_BLR >= newest) & (time_BR[:, None, :] >= jnp.maximum(start_BL, 0))
            if oldest is not None:
                visible &= age_BLR < oldest
            return KeyStream(ring.k_BRGK, ring.v_BRGK, time_BR - zero_B1, visible)

        streams = [stream(ring, self.window, 0)]
        fading, eidetic = rings[0] if rings else None, cache.eidetic
        if fading is not None and self.fading_window:
            assert self.window is not None
            streams.append(stream(fading, self.window + self.fading_window, self.window))
        if eidetic is not None:
            assert e_BL is not None
            eidetic = eidetic._replace(e_BR=write(eidetic.e_BR, e_BL, piece))
            source = fading if self.remembers_fading else ring
            assert source is not None
            eidetic, memories = self._extend_memory(eidetic, source, piece)
            streams += memories
        o_BLHK = operations.cached_attention(q_BLHK, streams, theta=self.config.rope_theta)
        return self.output(o_BLHK), AttentionCache(window=ring, fading=fading, eidetic=eidetic)

    def _extend_memory(
        self, before: EideticCache, ring: KeyRing, piece: Piece
    ) -> tuple[EideticCache, list[KeyStream]]:
        """Refreshes the memory of the rows whose piece crosses a chunk border.

        Queries before the border see the old memory, the others the new one.
        """
        chunk, window = self.config.chunk, self.config.window
        length = piece.positions_BL.shape[1]
        border_B = -(-piece.time_B // chunk) * chunk
        crosses_B = border_B < piece.end_B
        time_BC = (border_B - chunk - window + 1)[:, None] + jnp.arange(chunk)[None, :]
        index_B1 = jnp.clip(border_B - piece.time_B, 0, length - 1)[:, None]
        start_B = jnp.take_along_axis(piece.start_BL, index_B1, axis=1)[:, 0]

        def refresh(before: EideticCache) -> EideticCache:
            e_BC = jnp.take_along_axis(before.e_BR, time_BC % before.e_BR.shape[1], axis=1)
            slots, source_BM = memory.absorb(before.slots, e_BC, time_BC, start_B)
            source = jnp.maximum(source_BM, 0)[:, :, None, None]

            def gather(old_BMGK, ring_BRGK):
                slot_BC11 = (time_BC % ring_BRGK.shape[1])[:, :, None, None]
                fresh = jnp.take_along_axis(ring_BRGK, slot_BC11, axis=1)
                return jnp.take_along_axis(jnp.concatenate([old_BMGK, fresh], 1), source, axis=1)

            after = EideticCache(
                slots=slots,
                k_BMGK=gather(before.k_BMGK, ring.k_BRGK),
                v_BMGK=gather(before.v_BMGK, ring.v_BRGK),
                e_BR=before.e_BR,
            )

            def choose(new, old):
                return jnp.where(crosses_B.reshape((-1,) + (1,) * (new.ndim - 1)), new, old)

            return jax.tree.map(choose, after, before)

        if piece.crosses is None:
            after = jax.lax.cond(jnp.any(crosses_B), refresh, lambda before: before, before)
        else:
            after = refresh(before) if piece.crosses else before
        crossed_BL1 = (piece.time_BL >= border_B[:, None])[:, :, None]
        if length == 1:
            border_B = jnp.where(crosses_B, border_B, border_B - chunk)
            every_BL1 = jnp.ones_like(crossed_BL1)
            return after, [self._memory_stream(after, border_B, start_B, piece, every_BL1)]
        first_B = piece.start_BL[:, 0]
        return after, [
            self._memory_stream(before, border_B - chunk, first_B, piece, ~crossed_BL1),
            self._memory_stream(after, border_B, start_B, piece, crossed_BL1),
        ]

    def _memory_stream(
        self,
        eidetic: EideticCache,
        border_B: Array,
        start_B: Array,
        piece: Piece,
        sees_BL1: Array,
    ) -> KeyStream:
        """The memory of the chunk that starts at border_B, for the queries that see it.

        Their document starts at start_B.
        """
        config = self.config
        time_BM = eidetic.slots.time_BM
        valid_BM = time_BM >= 0
        if config.eidetic_positions == "slot":
            positions_BM = memory.slot_positions(
                border_B - piece.time_B,
                window=config.window,
                fading_window=self.fading_window,
                size=self.eidetic_tokens,
            )
        elif config.eidetic_positions == "original":
            positions_BM = time_BM - piece.time_B[:, None]
        else:  # unrotated in the whole pass, whose positions count from the document's start
            positions_BM = jnp.broadcast_to((start_B - piece.time_B)[:, None], time_BM.shape)
        same_document = time_BM[:, None, :] >= piece.start_BL[:, :, None]
        bias_BHM = None
        if config.eidetic_gate:
            bias_BHM = self.gate_bias(eidetic.slots.innovation_BM, valid_BM)
        visible = valid_BM[:, None, :] & same_document & sees_BL1
        return KeyStream(eidetic.k_BMGK, eidetic.v_BMGK, positions_BM, visible, bias_BHM)

    def _remember(self, k_BLGK, v_BLGK, e_BL, documents: Documents) -> operations.Memory:
        """The memory of every chunk: keys (neither normed nor rotated), values, innovations,
        positions."""
        tokens = {
            "k_BLGK": k_BLGK,
            "v_BLGK": v_BLGK,
            "e_BL": e_BL,
            "positions_BL": documents.positions_BL,
        }
        return operations.remember(
            e_BL,
            documents.start_BL,
            tokens,
            window=self.config.window,
            chunk=self.config.chunk,
            size=self.eidetic_tokens,
        )

    def _eidetic(self, kept: operations.Memory, positions_BL: Array) -> dict[str, Any]:
        """The arguments of `memory_attention` that describe the eidetic stream."""
        config = self.config
        k_BZMGK = kept.tokens["k_BLGK"]
        if config.eidetic_positions == "none":
            eidetic_k = self._normed(k_BZMGK)
        else:
            slots_BZM = kept.tokens["positions_BL"]
            if config.eidetic_positions == "slot":
                slots_BZM = memory.slot_positions(
                    _first_of_chunks(positions_BL, config.chunk),
                    window=config.window,
                    fading_window=self.fading_window,
                    size=self.eidetic_tokens,
                )
            # As tokens of a row: keys and queries need their angles from the same operation.
            flat = k_BZMGK.reshape(k_BZMGK.shape[0], -1, *k_BZMGK.shape[3:])
            eidetic_k = self.placed(flat, "k_norm", slots_BZM.reshape(flat.shape[:2]))
            eidetic_k = eidetic_k.reshape(k_BZMGK.shape)
        stream = {
            "eidetic_k_BZMGK": eidetic_k,
            "eidetic_v_BZMGK": kept.tokens["v_BLGK"],
            "eidetic_valid_BZM": kept.valid_BZM,
            "chunk": config.chunk,
        }
        if config.eidetic_gate:
            stream["eidetic_bias_BZHM"] = self.gate_bias(kept.tokens["e_BL"], kept.valid_BZM)
        return stream

    def _memory_statistics(self, kept: operations.Memory) -> dict[str, Array]:
        """Mean innovation of what is remembered, its age at the chunk's start, slots in use."""
        count = jnp.maximum(jnp.sum(kept.valid_BZM), 1)
        first_Z = jnp.arange(kept.index_BZM.shape[1]) * self.config.chunk
        age_BZM = first_Z[None, :, None] - kept.index_BZM
        e_BZM = kept.tokens["e_BL"]
        statistics = {
            "memory_innovation": jnp.sum(jnp.where(kept.valid_BZM, e_BZM, 0)) / count,
            "memory_age": jnp.sum(jnp.where(kept.valid_BZM, age_BZM, 0)) / count,
            "memory_filled": jnp.mean(kept.valid_BZM.astype(e_BZM.dtype)),
        }
        return jax.lax.stop_gradient(statistics)


def _first_of_chunks(x_BL: Array, chunk: int) -> Array:
    """[B, Z]. Not a slice with steps, for which devices that share a row would exchange it all."""
    padded_BL = jnp.pad(x_BL, ((0, 0), (0, -x_BL.shape[1] % chunk)))
    return padded_BL.reshape(x_BL.shape[0], -1, chunk)[:, :, 0]
