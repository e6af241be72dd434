"""What a model says of given continuations, and how it goes on by itself.

    log p(continuation | context) = sum_t log softmax(logits_(t-1))[token_t]
    greedy                          every token of the continuation is the most likely one

Two forms give the same: a whole pass over rows padded to a few lengths (powers of two; padding
stands behind, where causality makes it harmless), and, for sequences beyond `_LONGEST_WHOLE`, the
recurrent form piece by piece. Nothing is cut off. Logits are held for some columns at a time.

Dtype: logits and log-softmax are float32 (float64 in a float64 model). Everything runs on one
device.
"""

import codecs
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jaxtyping import Array, Bool, Float, Int

from bmojo_jax import generate, model
from bmojo_jax.cache import Cache, empty_cache, longest_piece
from bmojo_jax.checkpoint import Trained
from bmojo_jax.config import ModelConfig
from bmojo_jax.data.tokenizers import Tokenizer
from bmojo_jax.layers import at_least_float32

_TOKENS = 32_768  # of a batch
_ROWS = 64  # of a batch at most
# Below these, rows and continuations are not told apart: every shape is compiled anew.
_SHORTEST_ROW = 64
_FEWEST_COLUMNS = 16
_LONGEST_WHOLE = 32_768  # a longer sequence is streamed
_LOGITS = 2**25  # held at a time


class Request(NamedTuple):
    """Token ids; the context has at least one."""

    context: Sequence[int]
    continuation: Sequence[int]


class Score(NamedTuple):
    """Of one continuation of L tokens."""

    log_p_L: Float[np.ndarray, " L"]
    greedy_L: Bool[np.ndarray, " L"]  # whether each is the most likely after those before it

    @property
    def log_p(self) -> float:
        return float(self.log_p_L.sum(dtype=np.float64))

    @property
    def is_greedy(self) -> bool:
        return bool(self.greedy_L.all())


def log_likelihoods(
    trained: Trained, requests: Sequence[Request], *, description: str = "log-likelihood"
) -> list[Score]:
    """The scores of continuations, in the order of the requests.

    Raises:
      ValueError: a context is empty, or an id is none of the model's.
    """
    config, num_words = trained.config.model, trained.tokenizer.vocab_size
    params = _on_one_device(trained.params)
    for i, request in enumerate(requests):
        if not request.context:
            raise ValueError(f"request {i}: its context must have at least one token")
        _check_ids(config, [*request.context, *request.continuation])
    empty = Score(np.zeros(0, np.float32), np.zeros(0, bool))
    scores = [empty] * len(requests)
    buckets: dict[tuple[int, int], list[int]] = {}
    for i, request in enumerate(requests):
        if request.continuation:
            length = len(request.context) + len(request.continuation) - 1
            columns = max(len(request.continuation), _FEWEST_COLUMNS)
            shape = (_power_of_two(max(length, _SHORTEST_ROW)), _power_of_two(columns))
            buckets.setdefault(shape, []).append(i)
    total = sum(map(len, buckets.values()))
    with tqdm.tqdm(total=total, desc=description, unit="request", disable=None) as bar:
        for (length, columns), members in sorted(buckets.items(), reverse=True):
            rows = _rows(length, len(members))
            for first in range(0, len(members), rows):
                part = members[first : first + rows]
                batch = [requests[i] for i in part]
                batch += [batch[-1]] * (rows - len(batch))
                if length > _LONGEST_WHOLE:
                    found = _stream(config, num_words, params, batch)
                else:
                    found = _whole(config, num_words, params, batch, length, columns)
                for i, score in zip(part, found, strict=False):
                    scores[i] = score
                bar.update(len(part))
    return scores


def greedy(
    trained: Trained,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    stop: Sequence[str] = (),
    description: str = "generating",
) -> list[str]:
    """The most likely continuations as text, up to a document boundary or one of `stop`.

    Args:
      max_tokens: of a continuation.
      stop: strings that end a continuation and are not part of it; found in the text, wherever
        they start within a token.
    """
    if max_tokens < 1:
        raise ValueError(f"{max_tokens=}: must be >= 1")
    params = _on_one_device(trained.params)
    texts = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    with tqdm.tqdm(total=len(prompts), desc=description, unit="prompt", disable=None) as bar:
        while order:
            longest = _power_of_two(len(prompts[order[0]]) + max_tokens)
            rows = _rows(longest, len(order))
            part, order = order[:rows], order[rows:]
            batch = [prompts[i] for i in part]
            batch += [batch[-1]] * (rows - len(batch))
            found = _continue(trained, params, batch, longest, max_tokens, [s for s in stop if s])
            for i, text in zip(part, found, strict=False):
                texts[i] = text
            bar.update(len(part))
    return texts


def split(tokenizer: Tokenizer, context: str, whole: str) -> Request:
    """A context behind a boundary, and what `whole` has beyond as many tokens.

    So the context holds nothing of what follows it, even where tokens could reach over the border.
    """
    ids = tokenizer.encode(context).tolist()
    return Request([tokenizer.boundary_id, *ids], tokenizer.encode(whole).tolist()[len(ids) :])


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _rows(length: int, available: int) -> int:
    """Rows of a batch, of which there are few different numbers."""
    return min(max(_TOKENS // length, 1), _ROWS, _power_of_two(available))


def _on_one_device(params: model.Params) -> model.Params:
    return jax.device_put(params, jax.local_devices()[0])


def _check_ids(config: ModelConfig, ids: Sequence[int]) -> None:
    low, high = min(ids), max(ids)
    if low < 0 or high >= config.vocab_size:
        raise ValueError(f"token ids in [{low}, {high}]: must be in [0, {config.vocab_size})")


def _scores(
    language_model: model.LanguageModel,
    num_words: int,
    x_BLD: Float[Array, "B L D"],
    targets_BL: Int[Array, "B L"],
) -> tuple[Float[Array, "B L"], Bool[Array, "B L"]]:
    """log p of every target, and whether it is the most likely of the tokenizer's words."""
    batch, length = targets_BL.shape
    vocab = language_model.config.vocab_size
    columns = min(length, _power_of_two(max(_LOGITS // (batch * vocab), 1)))
    blocks = -(-length // columns)
    pad = blocks * columns - length
    x_BLD = jnp.pad(x_BLD, ((0, 0), (0, pad), (0, 0)))
    targets_BL = jnp.pad(targets_BL, ((0, 0), (0, pad)))

    def block(first: Array) -> tuple[Array, Array]:
        x_BCD = jax.lax.dynamic_slice_in_dim(x_BLD, first, columns, axis=1)
        targets_BC = jax.lax.dynamic_slice_in_dim(targets_BL, first, columns, axis=1)
        logits_BCV = language_model.logits(x_BCD)
        logits_BCV = logits_BCV.astype(at_least_float32(logits_BCV.dtype))
        log_p_BCV = jax.nn.log_softmax(logits_BCV, axis=-1)
        log_p_BC = jnp.take_along_axis(log_p_BCV, targets_BC[:, :, None], axis=-1)[:, :, 0]
        best_BC = jnp.argmax(logits_BCV[:, :, :num_words], axis=-1)
        return log_p_BC, best_BC == targets_BC

    log_p_ZBC, greedy_ZBC = jax.lax.map(block, jnp.arange(blocks) * columns)
    join = lambda x_ZBC: jnp.moveaxis(x_ZBC, 0, 1).reshape(batch, -1)[:, :length]  # noqa: E731
    return join(log_p_ZBC), join(greedy_ZBC)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _whole_pass(
    config: ModelConfig,
    num_words: int,
    params: model.Params,
    tokens_BL: Array,
    first_B: Array,
    targets_BC: Array,
) -> tuple[Array, Array]:
    """Scores of the C targets that follow columns first_B, first_B + 1, ... of each row."""
    language_model = model.bind(config, params)
    x_BLD, _ = language_model.hidden_states(tokens_BL)
    column_BC = first_B[:, None] + jnp.arange(targets_BC.shape[1])[None, :]
    column_BC = jnp.minimum(column_BC, tokens_BL.shape[1] - 1)
    x_BCD = jnp.take_along_axis(x_BLD, column_BC[:, :, None], axis=1)
    return _scores(language_model, num_words, x_BCD, targets_BC)


def _whole(
    config: ModelConfig,
    num_words: int,
    params: model.Params,
    batch: Sequence[Request],
    length: int,
    columns: int,
) -> list[Score]:
    tokens_BL = np.zeros((len(batch), length), np.int32)
    targets_BC = np.zeros((len(batch), columns), np.int32)
    first_B = np.array([len(request.context) - 1 for request in batch], np.int32)
    for row, (context, continuation) in enumerate(batch):
        ids = [*context, *continuation[:-1]]
        tokens_BL[row, : len(ids)] = ids
        targets_BC[row, : len(continuation)] = continuation
    log_p_BC, greedy_BC = jax.device_get(
        _whole_pass(config, num_words, params, tokens_BL, first_B, targets_BC)
    )
    return [
        Score(log_p_BC[row, :size], greedy_BC[row, :size])
        for row, size in enumerate(len(request.continuation) for request in batch)
    ]


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _piece(
    config: ModelConfig,
    num_words: int,
    params: model.Params,
    cache: Cache,
    tokens_BL: Array,
    targets_BL: Array,
    length_B: Array,
) -> tuple[Array, Array, Cache]:
    language_model = model.bind(config, params)
    x_BLD, cache = language_model.extend(tokens_BL, cache, length_B)
    return *_scores(language_model, num_words, x_BLD, targets_BL), cache


def _stream(
    config: ModelConfig, num_words: int, params: model.Params, batch: Sequence[Request]
) -> list[Score]:
    """Every token's score through the recurrent form; those of the contexts are dropped."""
    piece = longest_piece(config)
    rows = [[*request.context, *request.continuation] for request in batch]
    length_B = np.array([len(row) - 1 for row in rows])
    padded = -(-int(length_B.max()) // piece) * piece
    tokens_BL = np.zeros((len(rows), padded + 1), np.int32)
    for i, row in enumerate(rows):
        tokens_BL[i, : len(row)] = row
    cache = empty_cache(config, len(rows), max_length=padded)
    parts = []
    for first in range(0, padded, piece):
        end = first + piece
        log_p_BL, greedy_BL, cache = _piece(
            config,
            num_words,
            params,
            cache,
            tokens_BL[:, first:end],
            tokens_BL[:, first + 1 : end + 1],
            np.clip(length_B - first, 0, piece).astype(np.int32),
        )
        parts.append((log_p_BL, greedy_BL))
    log_p_BL, greedy_BL = (
        np.concatenate(blocks, axis=1) for blocks in zip(*jax.device_get(parts), strict=True)
    )
    return [
        Score(
            log_p_BL[i, len(request.context) - 1 : size],
            greedy_BL[i, len(request.context) - 1 : size],
        )
        for i, (request, size) in enumerate(zip(batch, length_B, strict=True))
    ]


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _next(
    config: ModelConfig,
    num_words: int,
    params: model.Params,
    cache: Cache,
    token_B: Array,
    running_B: Array,
) -> tuple[Array, Cache]:
    """Feeds one token to the rows that are running; the most likely ones to follow."""
    language_model = model.bind(config, params)
    x_B1D, cache = language_model.extend(token_B[:, None], cache, running_B.astype(jnp.int32))
    return _best(language_model.logits(x_B1D)[:, 0], num_words), cache


@functools.partial(jax.jit, static_argnums=1)
def _best(logits_BV: Array, num_words: int) -> Array:
    return jnp.argmax(logits_BV[:, :num_words], axis=-1).astype(jnp.int32)


def _continue(
    trained: Trained,
    params: model.Params,
    prompts: Sequence[Sequence[int]],
    max_length: int,
    max_tokens: int,
    stop: Sequence[str],
) -> list[str]:
    config, tokenizer = trained.config.model, trained.tokenizer
    num_words = tokenizer.vocab_size
    # Of few sizes, so that it is compiled few times; a piece longer than the prompts is cut.
    longest = max(map(len, prompts))
    piece = min(longest_piece(config), 1 << (longest.bit_length() - 1))
    cache = empty_cache(config, len(prompts), max_length=max_length)
    logits_BV, cache = generate.prefill(config, params, cache, prompts, piece=piece)
    token_B = _best(logits_BV, num_words)
    decoders = [codecs.getincrementaldecoder("utf-8")(errors="replace") for _ in prompts]
    texts = [""] * len(prompts)
    running_B = np.ones(len(prompts), bool)
    for step in range(max_tokens):
        for row, token in enumerate(np.asarray(token_B).tolist()):
            if not running_B[row]:
                continue
            ended = token == tokenizer.boundary_id
            if not ended:
                new = tokenizer.decode_bytes([token], continued=True)
                texts[row] += decoders[row].decode(new)
            if ended or step + 1 == max_tokens:
                texts[row] += decoders[row].decode(b"", final=True)
            ends = [place for place in map(texts[row].find, stop) if place >= 0]
            if ends:
                texts[row] = texts[row][: min(ends)]
            running_B[row] = not ended and not ends
        if not running_B.any():
            break
        if step + 1 < max_tokens:
            token_B, cache = _next(config, num_words, params, cache, token_B, running_B)
    return texts
