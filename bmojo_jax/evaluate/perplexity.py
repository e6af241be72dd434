"""Loss of the same target tokens under longer and longer contexts.

*Fixed suffix* (the protocol of length generalisation on books): an anchor is a place in a held-out
document; its targets are the S tokens that end there. Each context T predicts the same targets of
the same anchors, so a difference between two contexts is not one between easy and hard tokens. A
window of T tokens is read from a fresh state, and its last targets count:

    min(S, T // 2) of them,  so that a target has between T // 2 + 1 and T tokens before it

For T >= 2 S one window holds all S targets, for shorter ones several that end min(S, T // 2)
tokens apart do; `mean_context` is the mean number of tokens that a target is predicted from.
With S = 8, x for tokens that are read, digits for the window a target belongs to:

    T = 16    x x x x x x x x x                     T = 8    x x x x x
                              1 1 1 1 1 1 1 1                        1 1 1 1
                                                                     x x x x x
                                                                             2 2 2 2

Anchors depend on the document's length in tokens, the contexts, how many anchors and targets there
are to be, and a seed: they are those of every model with the same tokenizer. Documents that are too
short for one of the contexts are left out for all. Windows never cross documents.

*By position*: the loss in one long pass over each of these documents from its boundary on.

Intervals are bootstraps over documents; the difference from the context of the training length is
paired, since the targets are the same.
"""

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int
from matplotlib.figure import Figure

from bmojo_jax import sharding
from bmojo_jax.checkpoint import Trained
from bmojo_jax.config import MeshConfig
from bmojo_jax.data import packing, sources
from bmojo_jax.data.documents import BadDocument, Source
from bmojo_jax.data.tokenizers import Tokenizer
from bmojo_jax.evaluate.intervals import interval
from bmojo_jax.evaluate.validation import title
from bmojo_jax.evaluate.windows import Form, Window, window_nll
from bmojo_jax.metrics import bits_per_byte

_SEED = 0  # of anchors and bootstraps
_DEFAULT_CONTEXTS = tuple(2**k for k in range(8, 16))


class Documents(NamedTuple):
    ids: list[Int[np.ndarray, " L"]]  # each framed by boundaries: | d0..d(n-1) |
    bad: dict[str, int]  # how many could not be used, by reason


def read_documents(source: Source, tokenizer: Tokenizer) -> Documents:
    """All documents of a source as ids."""
    ids: list[np.ndarray] = []
    bad: Counter[str] = Counter()
    for index in range(len(source)):
        document = source[index]
        if isinstance(document, BadDocument):
            bad[document.reason] += 1
        elif isinstance(document, np.ndarray):
            # Several documents: | d | e | is cut into | d | and | e |.
            borders = np.flatnonzero(document == tokenizer.boundary_id)
            ids += [document[a : b + 1] for a, b in itertools.pairwise(borders)]
        else:
            ids.append(packing.framed_ids(document, tokenizer=tokenizer))
    return Documents(ids, dict(bad))


def counted(context: int, suffix: int) -> int:
    """How many targets of a window of `context` tokens count."""
    return min(suffix, max(context // 2, 1))


def earliest_anchor(contexts: Sequence[int], suffix: int) -> int:
    """The fewest tokens before an anchor for which all windows of all contexts exist."""
    return max(
        context + (-(-suffix // counted(context, suffix)) - 1) * counted(context, suffix)
        for context in contexts
    )


def choose_anchors(tokens: int, contexts: Sequence[int], *, anchors: int, suffix: int) -> list[int]:
    """Ends of suffixes in a document of n tokens: indices into | d0..d(n-1) | of last targets.

    At most `anchors` of them, whose suffixes do not overlap; none if the document is too short.
    """
    first = earliest_anchor(contexts, suffix)
    if tokens < first:
        return []
    count = min(anchors, (tokens - first) // suffix + 1)
    slack = tokens - first - (count - 1) * suffix
    offsets = np.random.default_rng((_SEED, tokens)).integers(slack + 1, size=count)
    return [int(first + o + i * suffix) for i, o in enumerate(sorted(offsets))]


class _Part(NamedTuple):
    """The last `count` targets of a window belong to an anchor's suffix."""

    window: Window
    count: int


def suffix_windows(document: int, anchor: int, context: int, suffix: int) -> list[_Part]:
    """The windows of `context` tokens that predict the suffix, the last first."""
    step = counted(context, suffix)
    return [
        _Part(Window(document, anchor - done - context, context), min(step, suffix - done))
        for done in range(0, suffix, step)
    ]


def mean_context(context: int, suffix: int) -> float:
    """Tokens that a target is predicted from, its mean over the suffix."""
    parts = suffix_windows(0, 0, context, suffix)
    return sum(part.count * (context - (part.count - 1) / 2) for part in parts) / suffix


def default_contexts(tokens: Sequence[int], training_length: int) -> tuple[int, ...]:
    """Powers of two from 256 to 32,768, and the training length, that half the documents hold."""
    longest = np.median(tokens)
    contexts = sorted({*_DEFAULT_CONTEXTS, training_length})
    return tuple(context for context in contexts if context <= longest)


def run(
    trained: Trained,
    *,
    contexts: tuple[int, ...] | None = None,
    anchors: int = 4,
    suffix: int = 512,
    form: Form = "auto",
    rows: int | None = None,
) -> dict[str, Any]:
    """Loss of fixed targets by context, and by position in one long pass.

    Args:
      contexts: tokens of the windows; None: `default_contexts`.
      anchors: at most so many in a document.
      suffix: targets before an anchor.
      form, rows: see `window_nll`; the results do not depend on them, but for rounding.

    Returns:
      What is written to JSON: the settings, a row for each context, the positions, and the sums
      of every document, from which all of it can be computed again.

    Raises:
      ValueError: an option that cannot be, or no document is long enough.
    """
    for name, value in (("anchors", anchors), ("suffix", suffix)):
        if value < 1:
            raise ValueError(f"{name}={value}: must be >= 1")
    data = trained.config.data
    training_length = data.sequence_length
    tokenizer = trained.tokenizer
    documents = read_documents(sources.open_source(data, "validation"), tokenizer)
    tokens = [len(ids) - 2 for ids in documents.ids]
    if not tokens:
        raise ValueError(f"data.path={data.path!r}: holds no document that can be used")
    if contexts is None:
        contexts = default_contexts(tokens, training_length)
    contexts = tuple(sorted(set(contexts)))
    if not contexts or contexts[0] < 1:
        raise ValueError(
            f"{contexts=}: must be positive numbers of tokens; the longest of {len(tokens)} "
            f"documents of data.path={data.path!r} has {max(tokens):,}"
        )
    chosen = [choose_anchors(n, contexts, anchors=anchors, suffix=suffix) for n in tokens]
    used = [i for i, ends in enumerate(chosen) if ends]
    if not used:
        raise ValueError(
            f"{contexts=}: no document of data.path={data.path!r} holds the longest, which with "
            f"{suffix=} needs {earliest_anchor(contexts, suffix):,} tokens; the longest of "
            f"{len(tokens)} documents has {max(tokens):,}"
        )
    keys: list[tuple[int, int | None]] = []  # document and context, or None for the long pass
    parts: list[_Part] = []
    for i in used:
        keys.append((i, None))
        parts.append(_Part(Window(i, 0, contexts[-1]), contexts[-1]))
        for context in contexts:
            for anchor in chosen[i]:
                found = suffix_windows(i, anchor, context, suffix)
                keys += [(i, context)] * len(found)
                parts += found
    nll = window_nll(
        trained,
        documents.ids,
        [part.window for part in parts],
        mesh=sharding.make_mesh(MeshConfig()),
        form=form,
        rows=rows,
    )
    sums = {(i, context): 0.0 for i in used for context in contexts}
    passes: dict[int, np.ndarray] = {}
    for (i, context), part, nll_L in zip(keys, parts, nll, strict=True):
        if context is None:
            passes[i] = nll_L.astype(np.float64)
        else:
            sums[i, context] += float(nll_L[-part.count :].sum(dtype=np.float64))
    token_bytes_V = tokenizer.token_bytes_V()
    octaves = _octaves(contexts[-1])
    per_document = [
        {
            "tokens": tokens[i],
            "anchors": chosen[i],
            "targets": len(chosen[i]) * suffix,
            "bytes": int(
                sum(
                    token_bytes_V[documents.ids[i][end - suffix + 1 : end + 1]].sum()
                    for end in chosen[i]
                )
            ),
            "nll_by_context": [sums[i, context] for context in contexts],
            "nll_by_octave": [float(passes[i][a : b + 1].sum()) for a, b in octaves],
        }
        for i in used
    ]
    return {
        "suite": "perplexity",
        "title": title(trained),
        "step": trained.step,
        "data": data.path,
        "training_length": training_length,
        "settings": {
            "include": data.validation_include or data.include,
            "tokenizer": tokenizer.fingerprint(),
            "contexts": list(contexts),
            "anchors": anchors,
            "suffix": suffix,
            "form": form,
            "compute_dtype": trained.config.model.compute_dtype,
            "device": jax.devices()[0].device_kind,
            "seed": _SEED,
        },
        "documents": len(used),
        "documents_too_short": len(tokens) - len(used),
        "documents_bad": documents.bad,
        "anchors": sum(len(document["anchors"]) for document in per_document),
        "targets": sum(document["targets"] for document in per_document),
        "bytes": sum(document["bytes"] for document in per_document),
        "by_context": _by_context(per_document, contexts, suffix, training_length),
        "by_position": {
            "context": contexts[-1],
            "octaves": _by_position(per_document, octaves),
        },
        "per_document": per_document,
    }


def _octaves(length: int) -> list[tuple[int, int]]:
    """First and last position: 0, 1, 2-3, 4-7 and so on."""
    firsts = [0, *(2**k for k in range((length - 1).bit_length()))]
    return [(first, min(max(2 * first - 1, 0), length - 1)) for first in firsts]


def _by_context(
    per_document: Sequence[dict[str, Any]],
    contexts: Sequence[int],
    suffix: int,
    training_length: int,
) -> list[dict[str, Any]]:
    targets_D = np.array([document["targets"] for document in per_document])
    bytes_D = np.array([document["bytes"] for document in per_document])
    nll_DT = np.array([document["nll_by_context"] for document in per_document])
    rows = []
    for t, context in enumerate(contexts):
        nll_D = nll_DT[:, t]
        row = {
            "context": context,
            "mean_context": mean_context(context, suffix),
            "loss": float(nll_D.sum() / targets_D.sum()),
            "interval": interval(nll_D, targets_D, _SEED),
            "bits_per_byte": bits_per_byte(float(nll_D.sum()), float(bytes_D.sum())),
            "targets": int(targets_D.sum()),
        }
        if training_length in contexts:
            more_D = nll_D - nll_DT[:, contexts.index(training_length)]
            row["delta"] = float(more_D.sum() / targets_D.sum())
            row["delta_interval"] = interval(more_D, targets_D, _SEED)
        rows.append({k: list(v) if isinstance(v, tuple) else v for k, v in row.items()})
    return rows


def _by_position(
    per_document: Sequence[dict[str, Any]], octaves: Sequence[tuple[int, int]]
) -> list[dict[str, Any]]:
    nll_DO = np.array([document["nll_by_octave"] for document in per_document])
    rows = []
    for o, (first, last) in enumerate(octaves):
        each = last - first + 1  # targets of a document
        rows.append(
            {
                "first": first,
                "last": last,
                "loss": float(nll_DO[:, o].mean() / each),
                "interval": list(interval(nll_DO[:, o] / each, seed=_SEED)),
                "targets": each * len(per_document),
            }
        )
    return rows


def table(result: dict[str, Any]) -> list[str]:
    bad = sum(result["documents_bad"].values())
    lines = [
        f"{result['documents']:,} documents ({result['documents_too_short']:,} are too short, "
        f"{bad:,} could not be used), {result['anchors']:,} anchors, "
        f"{result['targets']:,} targets, the same for every context",
        "intervals: 95 %, bootstrap over documents; "
        f"delta: from the training length, {result['training_length']:,}, paired",
        "",
        f"{'context':>13} {'mean':>8} {'nats/token':>11} {'interval':^19} {'bits/byte':>10} "
        f"{'delta':>9} {'interval':^19}",
    ]
    for row in result["by_context"]:
        delta = f"{'-':>9}"
        if "delta" in row:
            delta = f"{row['delta']:>+9.4f} {_span(row['delta_interval'], '+'):>19}"
        lines.append(
            f"{row['context']:>13,} {row['mean_context']:>8,.0f} {row['loss']:>11.4f} "
            f"{_span(row['interval']):>19} {row['bits_per_byte']:>10.4f} {delta}"
        )
    positions = result["by_position"]
    lines += ["", f"by position, one pass of {positions['context']:,} tokens over each document"]
    lines.append(f"{'position':>13} {'targets':>8} {'nats/token':>11} {'interval':^19}")
    for row in positions["octaves"]:
        span = f"{row['first']}-{row['last']}" if row["last"] > row["first"] else f"{row['first']}"
        lines.append(
            f"{span:>13} {row['targets']:>8,} {row['loss']:>11.4f} {_span(row['interval']):>19}"
        )
    return lines


def _span(interval: Sequence[float], sign: str = "") -> str:
    low, high = interval
    return f"{low:{sign}.4f} .. {high:{sign}.4f}"


def draw(result: dict[str, Any], figure: Figure) -> None:
    left, right = figure.subplots(1, 2)
    draw_contexts(left, result)
    draw_positions(right, result)
    for axes in (left, right):
        axes.axvline(
            result["training_length"], color="grey", linestyle=":", label="training length"
        )
    left.legend()


def draw_contexts(axes: Any, result: dict[str, Any], **line: Any) -> None:
    """The loss by context with its intervals, on one pair of axes; `line`: how it looks."""
    rows = result["by_context"]
    _draw_line(axes, [row["context"] for row in rows], rows, **line)
    axes.set_xlabel("context, tokens")


def draw_positions(axes: Any, result: dict[str, Any], **line: Any) -> None:
    """The loss by position; octaves at their ends, since position 0 has no logarithm."""
    rows = result["by_position"]["octaves"]
    _draw_line(axes, [row["last"] + 1 for row in rows], rows, **line)
    axes.set_xlabel("position in the document")


def _draw_line(axes: Any, x: list[int], rows: Sequence[dict[str, Any]], **line: Any) -> None:
    (drawn,) = axes.plot(x, [row["loss"] for row in rows], "o-", markersize=4, **line)
    low, high = zip(*(row["interval"] for row in rows), strict=True)
    axes.fill_between(x, low, high, alpha=0.15, color=drawn.get_color(), linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_ylabel("nats per token")
    axes.grid(alpha=0.3)
