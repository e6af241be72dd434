"""Generation: a whole pass over the prompts, then one token at a time with constant memory.

    python -m bmojo_jax.generate --workdir DIR --prompt "def main("

Rows of a batch may have prompts of different lengths and stop at different times; a row that has
stopped is no longer advanced. Sampling follows the usual order: temperature, then top-k, then top-p
(the smallest set of tokens whose probability reaches p, arXiv 1904.09751); temperature 0 is greedy.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from bmojo_jax import checkpoint, console, model
from bmojo_jax.cache import Cache, check_room, empty_cache, longest_piece
from bmojo_jax.config import ModelConfig
from bmojo_jax.data import tokenizers
from bmojo_jax.model import Params


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the logits."""

    temperature: float = 1.0  # 0: the most likely token
    top_k: int = 0  # 0: no limit
    top_p: float = 1.0
    num_words: int | None = None  # ids from here on, padding of the vocabulary, are never drawn

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature}: must be >= 0")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k}: must be >= 0 (0: no limit)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: must be in (0, 1]")
        if self.num_words is not None and self.num_words < 1:
            raise ValueError(f"num_words={self.num_words}: must be >= 1 (None: all)")


def sample(logits_BV: Float[Array, "B V"], key: Array, sampling: Sampling) -> Int[Array, " B"]:
    """Draws one token for each row."""
    if sampling.num_words is not None:
        word_1V = jnp.arange(logits_BV.shape[1])[None, :]
        logits_BV = jnp.where(word_1V < sampling.num_words, logits_BV, -jnp.inf)
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV / sampling.temperature
    vocab = logits_BV.shape[1]
    if 0 < sampling.top_k < vocab:
        lowest_B1 = jax.lax.top_k(logits_BV, sampling.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < lowest_B1, -jnp.inf, logits_BV)
    if sampling.top_p < 1:
        sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        probability_BV = jax.nn.softmax(sorted_BV, axis=-1)
        above_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
        lowest_B1 = jnp.min(
            jnp.where(above_BV < sampling.top_p, sorted_BV, jnp.inf), axis=-1, keepdims=True
        )
        logits_BV = jnp.where(logits_BV < lowest_B1, -jnp.inf, logits_BV)
    return jax.random.categorical(key, logits_BV, axis=-1).astype(jnp.int32)


def _begin(
    config: ModelConfig, params: Params, empty: Cache, tokens_BL: np.ndarray, lengths: np.ndarray
) -> tuple[Array, Cache]:
    """The logits after as many tokens of each row as `lengths` says, and the cache.

    A program for each block of the pattern, called for every group: no copies of their weights and
    caches for a loop over them, and no layer is compiled twice. The device is far behind the host.
    """
    groups = params["groups"]
    if not isinstance(groups, tuple):
        groups = _apart(groups)
    ends = {name: values for name, values in params.items() if name != "groups"}
    padded = bool(lengths.min() < tokens_BL.shape[1])
    length_B = jnp.asarray(lengths)
    begin_block = _begin_block(jax.default_backend())
    x_BLD = _embed(config, ends, tokens_BL)
    layers = []
    for group, caches in zip(groups, empty.layers, strict=True):
        after = []
        for index, before in enumerate(caches):
            block = group[str(index)]
            x_BLD, cache = begin_block(config, index, padded, x_BLD, before, block, length_B)
            after.append(cache)
        layers.append(tuple(after))
    logits_BV = _last_logits(config, ends, x_BLD, length_B)
    # Two arrays: the next step is given both to write over.
    return logits_BV, Cache(length_B, jnp.copy(length_B), tuple(layers))


_apart = jax.jit(model.apart)


@functools.partial(jax.jit, static_argnums=0)
def _embed(config: ModelConfig, ends: Params, tokens_BL: Array) -> Array:
    return model.bind_ends(config, ends).embed(tokens_BL)


def _block_begun(
    config: ModelConfig,
    index: int,
    padded: bool,
    x_BLD: Array,
    empty: Any,
    params: Params,
    length_B: Array,
) -> tuple[Array, Any]:
    block = model.bind_block(config, index, params)
    return block.prefill(x_BLD, length_B, empty, padded=padded)


@functools.cache
def _begin_block(platform: str) -> Callable[..., tuple[Array, Any]]:
    """`_block_begun`, compiled; the activations and the empty cache are donated.

    Of products that share an input XLA would make one on a GPU, and then copy its parts apart."""
    options = {"xla_gpu_dot_merger_threshold_mb": 0} if platform == "gpu" else None
    return jax.jit(
        _block_begun, static_argnums=(0, 1, 2), donate_argnums=(3, 4), compiler_options=options
    )


@functools.partial(jax.jit, static_argnums=0)
def _last_logits(config: ModelConfig, ends: Params, x_BLD: Array, length_B: Array) -> Array:
    language_model = model.bind_ends(config, ends)
    x_B1D = jnp.take_along_axis(x_BLD, (length_B - 1)[:, None, None], axis=1)
    return language_model.logits(language_model.norm(x_B1D))[:, 0]


def _extended(
    config: ModelConfig,
    params: Params,
    cache: Cache,
    logits_BV: Array,
    tokens_BL: Array,
    length_B: Array,
    crosses: bool | None,
) -> tuple[Array, Cache]:
    """Feeds a piece; the logits after each row's last token (the old ones where it has none)."""
    language_model = model.bind(config, params)
    x_BLD, cache = language_model.extend(tokens_BL, cache, length_B, crosses=crosses)
    last_B11 = jnp.maximum(length_B - 1, 0)[:, None, None]
    x_B1D = jnp.take_along_axis(x_BLD, last_B11, axis=1)
    after_BV = language_model.logits(x_B1D)[:, 0]
    return jnp.where((length_B > 0)[:, None], after_BV, logits_BV), cache


@functools.cache
def _extend(platform: str) -> Callable[..., tuple[Array, Cache]]:
    """`_extended`, compiled; the cache and the old logits are donated.

    For one row on a GPU, XLA would write every weight times its input to memory, and then sum."""
    options = {"xla_disable_hlo_passes": "dot-strength-reduction"} if platform == "gpu" else None
    return jax.jit(
        _extended, static_argnums=(0, 6), donate_argnums=(2, 3), compiler_options=options
    )


def step(
    config: ModelConfig,
    params: Params,
    cache: Cache,
    logits_BV: Float[Array, "B V"],
    tokens_BL: Int[ArrayLike, "B L"],
    length_B: Int[ArrayLike, " B"],
    *,
    time_B: np.ndarray | None = None,
) -> tuple[Float[Array, "B V"], Cache]:
    """Continues every row by the first length_B of its tokens, a piece: compiled once a size.

    Args:
      cache, logits_BV: what the step before returned; they are donated.
      time_B: tokens that each row had so far, where the caller keeps count: then a step of one
        token is one of two programs, as a row starts a chunk or none does, and no device waits to
        know which. Wrong counts give wrong memories.

    Returns:
      The logits after each row's last token, float32 (the old ones where it has none), the cache.
    """
    crosses = None
    if time_B is not None and np.shape(tokens_BL)[1] == 1 and config.remembers:
        crosses = bool(((time_B % config.chunk == 0) & (np.asarray(length_B) > 0)).any())
    extend = _extend(jax.default_backend())
    return extend(config, params, cache, logits_BV, tokens_BL, length_B, crosses)


_sample = jax.jit(sample, static_argnames="sampling")


def begin(
    config: ModelConfig,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    max_length: int,
) -> tuple[Float[Array, "B V"], Cache]:
    """Feeds prompts of any lengths to new rows, in one pass, as `prefill` does with an empty cache.

    Args:
      max_length: of a row in the end; see `empty_cache`.

    Returns:
      The logits that follow each prompt, float32, and the cache.
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    cache = empty_cache(config, max(len(prompts), 1), max_length=max_length)
    longest = int(lengths.max(initial=0))
    if longest <= longest_piece(config):  # with one program for all of them
        return prefill(config, params, cache, prompts)
    check_room(config, cache, longest)
    # Few lengths to compile for, and few tokens in vain: eight steps from 2^n to 2^(n+1).
    step = max(longest_piece(config), 1 << max(longest.bit_length() - 4, 0))
    tokens = _rows(config, prompts, lengths, -(-longest // step) * step)
    return _begin(config, params, cache, tokens, lengths)


def prefill(
    config: ModelConfig,
    params: Params,
    cache: Cache,
    prompts: Sequence[Sequence[int]],
    *,
    piece: int | None = None,
) -> tuple[Float[Array, "B V"], Cache]:
    """Continues rows with prompts of any lengths, in pieces.

    Args:
      cache: continued where it stands; it is donated. Full attention needs room for the prompts.
      piece: tokens of a piece, at most `longest_piece(config)`, which is the default. The result
        does not depend on it.

    Returns:
      The logits that follow each prompt, float32, and the cache.
    """
    longest = longest_piece(config)
    piece = longest if piece is None else piece
    if not 1 <= piece <= longest:
        raise ValueError(f"{piece=}: must be in [1, {longest}] (model.chunk={config.chunk})")
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    piece = min(piece, int(lengths.max(initial=1)))
    rounds = -(-int(lengths.max(initial=0)) // piece)
    tokens = _rows(config, prompts, lengths, rounds * piece)
    time_B = np.asarray(cache.time_B)
    check_room(config, cache, int((time_B + lengths).max()))
    logits_BV = jnp.zeros((len(prompts), config.vocab_size), jnp.float32)
    for first in range(0, tokens.shape[1], piece):
        length_B = np.clip(lengths - first, 0, piece)
        tokens_BL = tokens[:, first : first + piece]
        logits_BV, cache = step(
            config, params, cache, logits_BV, tokens_BL, length_B, time_B=time_B
        )
        time_B = time_B + length_B
    return logits_BV, cache


def _rows(
    config: ModelConfig, prompts: Sequence[Sequence[int]], lengths: np.ndarray, length: int
) -> np.ndarray:
    """The prompts as rows of one length, checked."""
    if not lengths.size or not lengths.min():
        raise ValueError("every prompt needs at least one token")
    tokens = np.zeros((len(prompts), length), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    if tokens.min() < 0 or tokens.max() >= config.vocab_size:
        raise ValueError(
            f"token ids in [{tokens.min()}, {tokens.max()}]: must be in [0, {config.vocab_size})"
        )
    return tokens


def stream(
    config: ModelConfig,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    sampling: Sampling,
    stop_ids: Sequence[int] = (),
    seed: int = 0,
) -> Iterator[list[int | None]]:
    """Yields the next token of every row, None for rows that have stopped.

    A row stops after a token of `stop_ids` (which is yielded) or `max_tokens` tokens.
    """
    if max_tokens < 1:
        raise ValueError(f"{max_tokens=}: must be >= 1")
    longest = max((len(prompt) for prompt in prompts), default=0)
    logits_BV, cache = begin(config, params, prompts, max_length=longest + max_tokens)
    time_B = np.array([len(prompt) for prompt in prompts])
    running_B = np.ones(len(prompts), bool)
    keys = jax.random.split(jax.random.key(seed), max_tokens)
    for number in range(max_tokens):
        token_B = _sample(logits_BV, keys[number], sampling=sampling)
        chosen = np.asarray(token_B)
        yield [
            int(token) if running else None
            for token, running in zip(chosen, running_B, strict=True)
        ]
        running_B &= ~np.isin(chosen, list(stop_ids))
        if not running_B.any():
            return
        if number + 1 < max_tokens:
            length_B = running_B.astype(np.int32)
            logits_BV, cache = step(
                config, params, cache, logits_BV, token_B[:, None], length_B, time_B=time_B
            )
            time_B += length_B


def generate(
    config: ModelConfig,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    sampling: Sampling,
    stop_ids: Sequence[int] = (),
    seed: int = 0,
) -> list[list[int]]:
    """The continuation of every prompt, without the prompt; arguments as of `stream`."""
    rows: list[list[int]] = [[] for _ in prompts]
    for tokens in stream(
        config,
        params,
        prompts,
        max_tokens=max_tokens,
        sampling=sampling,
        stop_ids=stop_ids,
        seed=seed,
    ):
        for row, token in zip(rows, tokens, strict=True):
            if token is not None:
                row.append(token)
    return rows


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"not understood: {' '.join(argv[1:])}")
    console.show_messages(logging.WARNING)
    values = flags.FLAGS
    try:
        sampling = Sampling(values.temperature, values.top_k, values.top_p)
        trained = checkpoint.load(values.workdir, step=values.step)
        _print_continuation(trained, sampling)
    except (FileNotFoundError, ValueError) as error:
        console.fail(error)


def _print_continuation(trained: checkpoint.Trained, sampling: Sampling) -> None:
    values = flags.FLAGS
    tokenizer = trained.tokenizer
    prompt = [tokenizer.boundary_id, *tokenizer.encode(values.prompt).tolist()]
    decoder = tokenizers.StreamingDecoder(tokenizer)
    decoder.push(prompt)  # what follows continues a text; the prompt is printed as it was given
    print(values.prompt, end="", flush=True)
    for tokens in stream(
        trained.config.model,
        model.for_inference(trained.config.model, trained.params),
        [prompt],
        max_tokens=values.tokens,
        sampling=dataclasses.replace(sampling, num_words=tokenizer.vocab_size),
        stop_ids=[tokenizer.boundary_id],
        seed=values.seed,
    ):
        text = decoder.push([token for token in tokens if token is not None])
        print(text, end="", flush=True)
    print(decoder.finish())


if __name__ == "__main__":  # here, since train.py imports this module and has flags of its own
    flags.DEFINE_string("workdir", None, "The work directory of a run.")
    flags.DEFINE_string("prompt", "", "What to continue.")
    flags.DEFINE_integer("tokens", 500, "At most so many tokens.", lower_bound=1)
    flags.DEFINE_float("temperature", 0.8, "0: always the most likely token.")
    flags.DEFINE_integer("top_k", 0, "Draw among the k most likely tokens; 0: all.")
    flags.DEFINE_float("top_p", 0.95, "Draw among the fewest tokens of this probability.")
    flags.DEFINE_integer("seed", 0, "Of the draws.")
    flags.DEFINE_integer("step", None, "Of the checkpoint; default: the latest.")
    flags.mark_flags_as_required(["workdir"])
    app.run(main)
