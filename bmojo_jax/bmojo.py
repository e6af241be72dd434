"""The B'MOJO mixer: fading memory, innovation test and joint attention (arXiv 2407.06324).

    f = SSM(u)                                    fading memory, normed when `fading_norm`
    memory = top-M of innovation(f), by chunk     long-term eidetic memory (`memory.py`)
    out = Attention(u; window of u, of f, memory)   (+ f before the norm when `ssm_residual`)

With M = 0 this is B'MOJO-F; with F = 0 too it is a sliding window beside an SSM.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from bmojo_jax import memory, operations
from bmojo_jax.attention import Attention
from bmojo_jax.cache import BmojoCache, Piece, last, shift
from bmojo_jax.config import ModelConfig
from bmojo_jax.layers import Documents, RMSNorm, one_document
from bmojo_jax.ssm import Mamba
from pallas_kernels import innovation


class Bmojo(nnx.Module):
    """u [B, L, D] -> out [B, L, D]; `eidetic_tokens` = 0 for B'MOJO-F."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        eidetic_tokens: int,
        output_scale: float,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.eidetic_tokens = eidetic_tokens
        # Scaled down like every branch where f reaches the residual stream; where it is a stream
        # of keys only, its scale must match that of u.
        ssm_scale = output_scale if config.ssm_residual else 1.0
        self.ssm = Mamba(config, output_scale=ssm_scale, rngs=rngs)
        if config.fading_norm:
            self.fading_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(
            config,
            window=config.window,
            fading_window=config.fading_span,
            eidetic_tokens=eidetic_tokens,
            output_scale=output_scale,
            rngs=rngs,
        )

    def __call__(
        self, u_BLD: Float[Array, "B L D"], documents: Documents, *, statistics: bool = False
    ) -> tuple[Float[Array, "B L D"], dict[str, Array]]:
        """The whole pass, and per-layer statistics when asked for."""
        ssm_BLD = self.ssm(u_BLD, documents)
        f_BLD = self._fading(ssm_BLD)
        e_BL = None
        if self.eidetic_tokens:
            e_BL = self._scores(self._signal(u_BLD, f_BLD), documents.positions_BL)
        out_BLD, measured = self.attention(
            u_BLD, documents, f_BLD=f_BLD, e_BL=e_BL, statistics=statistics
        )
        if statistics and e_BL is not None:
            measured["innovation"] = jax.lax.stop_gradient(jnp.mean(e_BL))
        return self._residual(out_BLD, ssm_BLD), measured

    def prefill(
        self,
        u_BLD: Float[Array, "B L D"],
        length_B: Int[Array, " B"],
        empty: BmojoCache,
        *,
        padded: bool,
    ) -> tuple[Float[Array, "B L D"], BmojoCache]:
        """The whole pass of new rows, one document each, of length_B tokens, and their cache."""
        ssm_BLD, ssm_cache = self.ssm.prefill(u_BLD, length_B, empty.ssm, padded=padded)
        f_BLD = self._fading(ssm_BLD)
        e_BL = states_BTD = None
        if empty.states_BTD is not None:
            s_BLD = self._signal(u_BLD, f_BLD)
            e_BL = self._scores(s_BLD, one_document(*u_BLD.shape[:2]).positions_BL)
            states_BTD = last(s_BLD, length_B, empty.states_BTD)
        out_BLD, attention_cache = self.attention.prefill(
            u_BLD, length_B, empty.attention, padded=padded, f_BLD=f_BLD, e_BL=e_BL
        )
        return self._residual(out_BLD, ssm_BLD), BmojoCache(ssm_cache, attention_cache, states_BTD)

    def extend(
        self, u_BLD: Float[Array, "B L D"], cache: BmojoCache, piece: Piece
    ) -> tuple[Float[Array, "B L D"], BmojoCache]:
        """Continues every row by a piece."""
        ssm_BLD, ssm_cache = self.ssm.extend(u_BLD, cache.ssm, piece)
        f_BLD = self._fading(ssm_BLD)
        e_BL = states_BTD = None
        if cache.states_BTD is not None:
            s_BLD = self._signal(u_BLD, f_BLD)
            e_BL = self._scores(s_BLD, piece.positions_BL, cache.states_BTD)
            states_BTD = shift(cache.states_BTD, s_BLD, piece.length_B)
        out_BLD, attention_cache = self.attention.extend(
            u_BLD, cache.attention, piece, f_BLD=f_BLD, e_BL=e_BL
        )
        return self._residual(out_BLD, ssm_BLD), BmojoCache(ssm_cache, attention_cache, states_BTD)

    def _fading(self, ssm_BLD):
        return self.fading_norm(ssm_BLD) if self.config.fading_norm else ssm_BLD

    def _signal(self, u_BLD, f_BLD):
        """What the innovation test watches."""
        return f_BLD if self.config.innovation_of == "fading" else u_BLD

    def _scores(
        self, s_BLD: Array, positions_BL: Array, tail_BTD: Array | None = None
    ) -> Float[Array, "B L"]:
        """By which tokens are remembered, of whole rows or of pieces that follow a tail."""
        selection = self.config.eidetic_selection
        if selection != "innovation":
            return memory.order(positions_BL, selection)
        if tail_BTD is None:
            return operations.innovation(s_BLD, positions_BL)
        return innovation(s_BLD, positions_BL, tail_BTD)

    def _residual(self, out_BLD, ssm_BLD):
        return out_BLD + ssm_BLD if self.config.ssm_residual else out_BLD
