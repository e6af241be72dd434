"""The language model: embedding, a pattern of residual blocks repeated over depth, norm, head.

    x = embedding[tokens];  each block: x += mixer(norm(x)), then x += mlp(norm(x)) if it has one
    logits = norm(x) @ head        (head = embedding^T when tied)

One repetition of the pattern is a *group*. The parameters of all groups are stacked and
`jax.lax.scan` runs over them, so that compile time does not grow with depth; `remat` says what a
group's backward pass recomputes: nothing, norms and whatever else is cheap, that and the scan, or
all but the choice of what to remember; that once, or twice to keep fewer groups' inputs.

Two ways to use it: the NNX module `LanguageModel` (notebooks, surgery), and the functions below
it over a nested dict of parameters (training). Parameters are float32.
"""

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from bmojo_jax import memory, operations
from bmojo_jax.attention import Attention
from bmojo_jax.bmojo import Bmojo
from bmojo_jax.cache import Cache, Layers, Piece, longest_piece
from bmojo_jax.config import BlockSpec, ModelConfig
from bmojo_jax.embedding import embed
from bmojo_jax.layers import (
    PRODUCT,
    Documents,
    Projection,
    RMSNorm,
    SwiGLU,
    one_document,
    packed_documents,
)
from bmojo_jax.sharding import BATCH, CONTEXT, constrain
from bmojo_jax.ssm import Mamba
from pallas_kernels.memory_attention import api as memory_attention
from pallas_kernels.selective_scan import api as selective_scan

Params = dict[str, Any]

EMBEDDING_STDDEV = 0.02


Mixer = Mamba | Attention | Bmojo


def _mixer(config: ModelConfig, spec: BlockSpec, scale: float, rngs: nnx.Rngs) -> Mixer:
    match spec.mixer:
        case "mamba":
            return Mamba(config, output_scale=scale, rngs=rngs)
        case "swa" | "attention":
            return Attention(
                config,
                window=config.window if spec.mixer == "swa" else None,
                fading_window=0,
                eidetic_tokens=0,
                output_scale=scale,
                rngs=rngs,
            )
        case "bmojo_f":
            return Bmojo(config, eidetic_tokens=0, output_scale=scale, rngs=rngs)
        case _:
            tokens = config.eidetic_tokens
            return Bmojo(config, eidetic_tokens=tokens, output_scale=scale, rngs=rngs)


class Block(nnx.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)) where the pattern says so."""

    def __init__(self, config: ModelConfig, spec: BlockSpec, *, rngs: nnx.Rngs):
        branches = config.num_groups * sum(1 + block.mlp for block in config.blocks)
        scale = branches**-0.5  # keeps the residual stream's size independent of depth
        self.spec = spec
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.mixer = _mixer(config, spec, scale, rngs)
        if spec.mlp:
            self.mlp_norm = RMSNorm(config.width, config.norm_eps)
            self.mlp = SwiGLU(config.width, config.mlp_width, output_scale=scale, rngs=rngs)

    def __call__(
        self, x_BLD: Array, documents: Documents, *, statistics: bool
    ) -> tuple[Array, dict[str, Array]]:
        u_BLD = self.norm(x_BLD)
        measured = {}
        if isinstance(self.mixer, Mamba):
            out_BLD = self.mixer(u_BLD, documents)
        else:
            out_BLD, measured = self.mixer(u_BLD, documents, statistics=statistics)
        return self._mlp(x_BLD + out_BLD), measured

    def prefill(
        self,
        x_BLD: Float[Array, "B L D"],
        length_B: Int[Array, " B"],
        empty: Any,
        *,
        padded: bool,
    ) -> tuple[Float[Array, "B L D"], Any]:
        """The whole pass of new rows, one document each, and the cache to go on with.

        Args:
          length_B: tokens of each row that count, at least 1; what is behind them is ignored.
          empty: the block's of `empty_cache`; for full attention at least as long as the rows.
          padded: whether some row has less than L tokens.
        """
        out_BLD, cache = self.mixer.prefill(self.norm(x_BLD), length_B, empty, padded=padded)
        return self._mlp(x_BLD + out_BLD), cache

    def extend(self, x_BLD: Array, cache: Any, piece: Piece) -> tuple[Array, Any]:
        out_BLD, cache = self.mixer.extend(self.norm(x_BLD), cache, piece)
        return self._mlp(x_BLD + out_BLD), cache

    def _mlp(self, x_BLD):
        x_BLD = constrain(x_BLD, BATCH, CONTEXT, None)
        return x_BLD + self.mlp(self.mlp_norm(x_BLD)) if self.spec.mlp else x_BLD


class Embedding(nnx.Module):
    def __init__(self, vocab: int, width: int, *, rngs: nnx.Rngs):
        draw = jax.random.normal(rngs.params(), (vocab, width), jnp.float32)
        self.table = nnx.Param(draw * EMBEDDING_STDDEV)


class LanguageModel(nnx.Module):
    """A model of the family. `__call__` gives logits; `hidden_states` stops before the head.

    Example:
      >>> model = LanguageModel(presets.model("bmojo", "tiny"), rngs=nnx.Rngs(0))
      >>> logits_BLV = model(tokens_BL)
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.width, rngs=rngs)

        @nnx.split_rngs(splits=config.num_groups)
        @nnx.vmap
        def group(rngs: nnx.Rngs):
            blocks = (Block(config, spec, rngs=rngs) for spec in config.blocks)
            return nnx.Dict({str(i): block for i, block in enumerate(blocks)})

        self.groups = group(rngs)
        self.norm = RMSNorm(config.width, config.norm_eps)
        if not config.tie_embeddings:
            self.head = Projection((config.width,), (config.vocab_size,), rngs=rngs)

    def __call__(
        self, tokens_BL: Int[Array, "B L"], positions_BL: Int[Array, "B L"] | None = None
    ) -> Float[Array, "B L V"]:
        """Logits, float32. `positions_BL` restart at 0 with each document of a packed row."""
        return self.logits(self.hidden_states(tokens_BL, positions_BL)[0])

    def hidden_states(
        self,
        tokens_BL: Int[Array, "B L"],
        positions_BL: Int[Array, "B L"] | None = None,
        *,
        statistics: bool = False,
    ) -> tuple[Float[Array, "B L D"], dict[str, dict[str, Array]]]:
        """Hidden states after the last norm; statistics of each layer, [num_groups], if asked."""
        config = self.config
        if positions_BL is None:
            documents = one_document(*tokens_BL.shape)
        else:
            documents = packed_documents(positions_BL)
        graph, stacked = nnx.split(self.groups)

        def body(x_BLD, group):
            blocks = nnx.merge(graph, group)
            measured = {}
            for i in range(len(config.blocks)):
                x_BLD, measured[str(i)] = blocks[str(i)](x_BLD, documents, statistics=statistics)
            return x_BLD, measured

        x_BLD, measured = _over_groups(body, self.embed(tokens_BL), stacked, config.remat)
        return self.norm(x_BLD), measured

    def extend(
        self,
        tokens_BL: Int[Array, "B L"],
        cache: Cache,
        length_B: Int[Array, " B"] | None = None,
        positions_BL: Int[Array, "B L"] | None = None,
        *,
        crosses: bool | None = None,
    ) -> tuple[Float[Array, "B L D"], Cache]:
        """Continues every row by its first length_B tokens (None: all of them).

        Args:
          positions_BL: None: the row's document goes on.
          crosses: whether some row's piece has the first token of a chunk (`Piece.crosses`); None:
            asked on the device, which waits for the answer, and copies what memories hold.

        Returns:
          Hidden states after the last norm (beyond a row's length they mean nothing), the cache.
          Rows with full attention must stay within the `max_length` of their cache.

        Raises:
          ValueError: the piece is longer than `longest_piece(config)`, or than a row of the cache.
        """
        batch, length = tokens_BL.shape
        if length > longest_piece(self.config):
            raise ValueError(
                f"{length=} tokens: a piece must have at most {longest_piece(self.config)} "
                f"(model.chunk={self.config.chunk})"
            )
        if length_B is None:
            length_B = jnp.full((batch,), length, jnp.int32)
        if positions_BL is None:
            positions_BL = cache.position_B[:, None] + jnp.arange(length)[None, :]
        piece = Piece(cache.time_B, positions_BL, length_B)

        def extended(crosses: bool | None) -> tuple[Array, Layers]:
            def step(x_BLD, block, before):
                return block.extend(x_BLD, before, piece._replace(crosses=crosses))

            return self._through(step, tokens_BL, cache.layers)

        one_branch = length == 1 and self.config.remembers and operations.waits_at_branches()
        if crosses is None and one_branch:
            # One branch of a step, not one of every layer; it takes twice as long to compile.
            crosses_B = (piece.time_B % self.config.chunk == 0) & (length_B > 0)
            x_BLD, layers = jax.lax.cond(
                jnp.any(crosses_B), lambda: extended(True), lambda: extended(False)
            )
        else:
            x_BLD, layers = extended(crosses)
        last_B1 = jnp.maximum(length_B - 1, 0)[:, None]
        position_B = jnp.take_along_axis(positions_BL, last_B1, axis=1)[:, 0] + 1
        position_B = jnp.where(length_B > 0, position_B, cache.position_B)
        return self.norm(x_BLD), Cache(piece.end_B, position_B, layers)

    def _through(self, step, tokens_BL: Array, caches: Layers) -> tuple[Array, Layers]:
        """The blocks one after the other: (x_BLD, its cache) = step(x_BLD, block, its cache)."""
        graph, stacked = nnx.split(self.groups)

        def body(x_BLD, group_and_caches):
            group, caches = group_and_caches
            blocks = nnx.merge(graph, group)
            after = []
            for i, before in enumerate(caches):
                x_BLD, cache = step(x_BLD, blocks[str(i)], before)
                after.append(cache)
            return x_BLD, tuple(after)

        x_BLD = self.embed(tokens_BL)
        if tokens_BL.shape[1] > 1:
            x_BLD, after = jax.lax.scan(body, x_BLD, (stacked, _stacked(caches)))
            return x_BLD, apart(after)
        # A loop over stacked arrays would copy them, which takes longer than to read them.
        groups = []
        for group, before in zip(apart(stacked), caches, strict=True):
            x_BLD, after = body(x_BLD, (group, before))
            groups.append(after)
        return x_BLD, tuple(groups)

    def embed(self, tokens_BL: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        # Gathered before it is rounded: the gradient sums the uses of a token, in float32.
        x_BLD = embed(self.embedding.table[...], tokens_BL, self.config.compute_dtype)
        return constrain(x_BLD, BATCH, CONTEXT, None)

    def logits(self, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B L V"]:
        w_VD = self.output_weights().astype(x_BLD.dtype)
        return jnp.einsum("BLD,VD->BLV", x_BLD, w_VD, preferred_element_type=jnp.float32)

    def output_weights(self) -> Float[Array, "V D"]:
        if self.config.tie_embeddings:
            return self.embedding.table[...]
        return self.head.kernel[...].T


def apart(stacked: Any) -> tuple[Any, ...]:
    """Of arrays with a leading axis of groups those of each group."""
    count = len(jax.tree.leaves(stacked)[0])
    return tuple(jax.tree.map(operator.itemgetter(group), stacked) for group in range(count))


def _stacked(groups: tuple[Any, ...]) -> Any:
    """XLA takes slices of it from the groups' own arrays."""
    return jax.tree.map(lambda *x: jnp.stack(x), *groups)


# Step sizes are no named product: they are as large as the scan's input, and soon computed.
_KEPT = {
    "kernels": (memory.SAVED, PRODUCT, memory_attention.SAVED, selective_scan.SAVED),
    "dots": (memory.SAVED, PRODUCT, memory_attention.SAVED),
    "full": (memory.SAVED,),
    "nested": (memory.SAVED,),
}


def _over_groups(body: Any, x_BLD: Array, stacked: Any, remat: str) -> tuple[Array, Any]:
    """(x_BLD, what body measures of each group) after body(x_BLD, group) of every group.

    "nested": in stretches of groups, each recomputed as a whole, then group by group. Of a stretch
    only the input is kept, and in the one whose turn it is that of every group."""
    groups = len(jax.tree.leaves(stacked)[0])
    if remat == "none":
        # A loop would copy what two groups keep into an array of both, and out of it again.
        return jax.lax.scan(body, x_BLD, stacked, unroll=groups <= 2)
    body = _recomputed(body, _KEPT[remat])
    stretch = _stretch(groups) if remat == "nested" else 1
    if stretch == 1:
        return jax.lax.scan(body, x_BLD, stacked)
    whole = _recomputed(functools.partial(jax.lax.scan, body), _KEPT[remat])
    x_BLD, measured = jax.lax.scan(
        whole, x_BLD, jax.tree.map(lambda v: v.reshape(-1, stretch, *v.shape[1:]), stacked)
    )
    return x_BLD, jax.tree.map(lambda v: v.reshape(groups, *v.shape[2:]), measured)


def _recomputed(body: Any, kept: tuple[str, ...]) -> Any:
    policy = jax.checkpoint_policies.save_only_these_names(*kept)
    return jax.checkpoint(body, prevent_cse=False, policy=policy)


def _stretch(groups: int) -> int:
    """Groups of a stretch: as few inputs as can be, the shorter stretch if two are as good."""
    sizes = [size for size in range(1, groups + 1) if groups % size == 0]
    return min(sizes, key=lambda size: size + groups // size)


def init_params(config: ModelConfig, key: Array) -> Params:
    """Draws the parameters: a nested dict, arrays below "groups" with a leading axis of groups."""
    model = LanguageModel(config, rngs=nnx.Rngs(params=key))
    return nnx.to_pure_dict(nnx.split(model, nnx.Param)[1])


@functools.cache
def _graph(config: ModelConfig) -> nnx.GraphDef:
    abstract = nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(params=0)))
    return nnx.split(abstract, nnx.Param, ...)[0]


def bind(config: ModelConfig, params: Params) -> LanguageModel:
    """The module with these parameters, also those of `for_inference`."""
    if isinstance(params["groups"], tuple):
        params = params | {"groups": _stacked(params["groups"])}
    return nnx.merge(_graph(config), nnx.State(params))


def bind_ends(config: ModelConfig, params: Params) -> LanguageModel:
    """The module without its blocks, of all parameters but "groups"."""
    return nnx.merge(_graph_of_ends(config), nnx.State(params))


@functools.cache
def _graph_of_ends(config: ModelConfig) -> nnx.GraphDef:
    abstract = nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(params=0)))
    del abstract.groups
    return nnx.split(abstract, nnx.Param, ...)[0]


def bind_block(config: ModelConfig, index: int, params: Params) -> Block:
    """Block `index` of the pattern with the parameters of one layer (no axis of groups)."""
    abstract = nnx.eval_shape(lambda: Block(config, config.blocks[index], rngs=nnx.Rngs(params=0)))
    return nnx.merge(nnx.split(abstract, nnx.Param, ...)[0], nnx.State(params))


@functools.partial(jax.jit, static_argnums=0)
def for_inference(config: ModelConfig, params: Params) -> Params:
    """The parameters for decoding, which is as fast as they are read.

    What every use rounds to the compute dtype is rounded now, which changes no result. "groups" is
    a tuple of the groups' parameters, as copies of stacked ones would be made for every token.
    """

    def rounded(path: tuple[Any, ...], x: Array) -> Array:
        names = [entry.key for entry in path]
        product = names[-1] == "kernel" and names[-2] != "conv"
        return x.astype(config.compute_dtype) if product or names[-1] == "table" else x

    params = jax.tree_util.tree_map_with_path(rounded, params)
    return params | {"groups": apart(params["groups"])}


def hidden_states(
    config: ModelConfig,
    params: Params,
    tokens_BL: Int[Array, "B L"],
    *,
    positions_BL: Int[Array, "B L"] | None = None,
) -> Float[Array, "B L D"]:
    """Hidden states after the last norm, in the compute dtype."""
    return bind(config, params).hidden_states(tokens_BL, positions_BL)[0]


def output_weights(config: ModelConfig, params: Params) -> Float[Array, "V D"]:
    """The head's weights, float32."""
    return bind(config, params).output_weights()
