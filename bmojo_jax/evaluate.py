"""Evaluation on held-out documents: loss by context length and position; use of the memories.

    loss            mean nll of the targets, nats per token
    bits per byte   sum of nll / (ln 2 * bytes that the targets stand for)

*By context length T*: the held-out documents are packed into rows of T tokens, so no token sees
more than T - 1 tokens of its document. *By position*: the loss of the tokens that stand at
positions [2^k, 2^(k+1)) of their document piece, in the rows of one context length.

*Memory*: for every layer, which share of the attention mass each stream of keys gets, the
innovation of all tokens and of those that are remembered, and how many tokens old those are.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bmojo_jax import losses, model, sharding
from bmojo_jax.checkpoint import Trained
from bmojo_jax.config import MeshConfig, TrainConfig
from bmojo_jax.data import pipeline, sources, tokenizers
from bmojo_jax.metrics import bits_per_byte


class _Sums(NamedTuple):
    nll_L: Array | np.ndarray  # by position in the document piece
    weight_L: Array | np.ndarray
    num_bytes: Array | np.ndarray


def _add(total: _Sums, part: _Sums) -> _Sums:
    """In float64 on the host."""
    return jax.tree.map(lambda a, b: a + np.asarray(b, np.float64), total, part)


@dataclasses.dataclass(frozen=True)
class Validation:
    """Sums over a validation split, and what follows from them."""

    nll_L: np.ndarray  # nats, by position in the document piece
    weight_L: np.ndarray  # targets, likewise
    num_bytes: float  # that the targets stand for

    @property
    def targets(self) -> float:
        """Tokens that were predicted."""
        return float(self.weight_L.sum())

    @property
    def loss(self) -> float:
        """Nats per token."""
        return float(self.nll_L.sum()) / self.targets

    @property
    def bits_per_byte(self) -> float:
        return bits_per_byte(float(self.nll_L.sum()), self.num_bytes)

    def metrics(self) -> dict[str, float]:
        return {"loss": self.loss, "bits_per_byte": self.bits_per_byte, "targets": self.targets}

    def by_position(self) -> list[dict[str, int | float]]:
        """Loss of the tokens at positions [first, last], in octaves."""
        rows = []
        first = 0
        while first < len(self.weight_L):
            end = max(2 * first, 1)
            targets = float(self.weight_L[first:end].sum())
            if targets:
                loss = float(self.nll_L[first:end].sum()) / targets
                last = min(end, len(self.weight_L)) - 1
                rows.append({"first": first, "last": last, "loss": loss, "targets": targets})
            first = end
        return rows


def make_validator(config: TrainConfig, mesh: Mesh) -> Callable[[model.Params], Validation]:
    """A function from parameters to their loss on the validation split, `eval_batches` of it."""
    token_bytes_V = tokenizers.make_tokenizer(config.data.tokenizer).token_bytes_V()
    length = config.data.sequence_length
    source = sources.open_source(config.data, "validation")

    def sums(params: model.Params, batch: dict[str, Array]) -> _Sums:
        x_BLD = model.hidden_states(
            config.model, params, batch["inputs"], positions_BL=batch["positions"]
        )
        nll_BL = losses.per_token_nll(
            x_BLD,
            model.output_weights(config.model, params),
            batch["targets"],
            vocab_chunk=config.vocab_chunk,
        )
        weights_BL, positions_BL = batch["weights"], batch["positions"]
        zeros_L = jnp.zeros((length,), nll_BL.dtype)
        return _Sums(
            nll_L=zeros_L.at[positions_BL].add(weights_BL * nll_BL),
            weight_L=zeros_L.at[positions_BL].add(weights_BL.astype(nll_BL.dtype)),
            num_bytes=jnp.sum(jnp.asarray(token_bytes_V)[batch["targets"]] * weights_BL),
        )

    replicated = NamedSharding(mesh, PartitionSpec())
    step = jax.jit(sums, out_shardings=replicated)

    def validate(params: model.Params) -> Validation:
        batches = pipeline.validation_batches(
            source,
            config.data,
            config.model.chunk,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            limit=config.eval_batches,
        )
        total = _Sums(np.zeros(length), np.zeros(length), np.zeros(()))
        pending = total
        with jax.set_mesh(mesh):
            for batch in tqdm.tqdm(
                batches, desc="validation", unit="batch", leave=False, mininterval=1, disable=None
            ):
                following = step(params, sharding.place_batch(batch, mesh))
                # One batch late, so that the device always has one to work on.
                total = _add(total, pending)
                pending = following
        total = _add(total, pending)
        nll_L, weight_L = np.asarray(total.nll_L), np.asarray(total.weight_L)
        return Validation(nll_L, weight_L, float(total.num_bytes))

    return validate


def _at_context(config: TrainConfig, context: int, mesh: Mesh) -> TrainConfig:
    """The settings with rows of `context` tokens and about as many tokens in a batch."""
    tokens = config.data.batch_size * config.data.sequence_length
    unit = _rows_together(mesh)
    rows = max(tokens // context // unit, 1) * unit
    data = dataclasses.replace(config.data, sequence_length=context, batch_size=rows)
    optim = dataclasses.replace(config.optim, accumulate=1)
    return dataclasses.replace(config, data=data, optim=optim)


def _rows_together(mesh: Mesh) -> int:
    """The fewest rows of a batch that every device has equally many of."""
    return math.lcm(mesh.shape["data"] * mesh.shape["fsdp"], jax.process_count())


def default_contexts(config: TrainConfig) -> tuple[int, ...]:
    """Powers of two from 64 to four times the training length, and that length itself."""
    length = config.data.sequence_length
    powers = [2**k for k in range(6, (4 * length).bit_length()) if 2**k <= 4 * length]
    return tuple(sorted({*powers, length}))


def validation_suite(
    trained: Trained, *, contexts: tuple[int, ...] | None = None, batches: int = 0
) -> dict[str, Any]:
    """Loss by context length and by position.

    Args:
      contexts: lengths of the rows; None: `default_contexts`.
      batches: how many batches of the validation split; 0: all of it.

    Returns:
      What is written to JSON: the settings, a row for each context, the positions in rows of the
      training length (or the nearest context below, or the shortest).
    """
    mesh = sharding.make_mesh(MeshConfig())
    config = dataclasses.replace(
        trained.config, eval_batches=batches, mesh=MeshConfig(), compare_with="nothing"
    )
    contexts = default_contexts(config) if contexts is None else tuple(sorted(set(contexts)))
    if not contexts or contexts[0] < 1:
        raise ValueError(f"{contexts=}: must be positive numbers of tokens")
    rows, positions = [], None
    for context in tqdm.tqdm(contexts, desc="context", unit="context", disable=None):
        result = make_validator(_at_context(config, context, mesh), mesh)(trained.params)
        rows.append({"context": context, **result.metrics(), "bytes": result.num_bytes})
        if positions is None or context <= config.data.sequence_length:
            positions = {"context": context, "octaves": result.by_position()}
    return {
        "suite": "validation",
        "step": trained.step,
        "data": config.data.path,
        "training_length": config.data.sequence_length,
        "by_context": rows,
        "by_position": positions,
    }


# Columns of the memory suite: key, heading, and what it is a mean over.
_MEMORY: tuple[tuple[str, str, Literal["tokens", "remembered"]], ...] = (
    ("mass_in_context", "in-context", "tokens"),
    ("mass_fading", "fading", "tokens"),
    ("mass_eidetic", "eidetic", "tokens"),
    ("innovation", "innovation", "tokens"),
    ("memory_innovation", "remembered", "remembered"),
    ("memory_age", "age", "remembered"),
    ("memory_filled", "filled", "tokens"),
)


def memory_suite(trained: Trained, *, batches: int = 8) -> dict[str, Any]:
    """What the layers do with their memories, on rows of the training length.

    A batch has one row for each device. Layers have the entries that exist for their mixer (see
    `LanguageModel.hidden_states`); padding in the split's last row counts as tokens.

    Args:
      batches: how many batches of the validation split; 0: all of it.

    Returns:
      What is written to JSON: the settings and a row for each layer.
    """
    config = trained.config
    mesh = sharding.make_mesh(MeshConfig())
    data = dataclasses.replace(config.data, batch_size=_rows_together(mesh))

    def statistics(params: model.Params, batch: dict[str, Array]) -> dict[str, dict[str, Array]]:
        bound = model.bind(config.model, params)
        return bound.hidden_states(batch["inputs"], batch["positions"], statistics=True)[1]

    step = jax.jit(statistics, out_shardings=NamedSharding(mesh, PartitionSpec()))
    layers = [
        {"layer": i, "mixer": config.model.blocks[i % len(config.model.blocks)].mixer}
        for i in range(config.model.depth)
    ]
    totals = [dict.fromkeys((key for key, _, _ in _MEMORY), (0.0, 0.0)) for _ in layers]
    with jax.set_mesh(mesh):
        for batch in pipeline.validation_batches(
            sources.open_source(data, "validation"),
            data,
            config.model.chunk,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            limit=batches,
        ):
            weight = float(batch["weights"].mean())
            measured = jax.device_get(step(trained.params, sharding.place_batch(batch, mesh)))
            for i, total in enumerate(totals):
                group, block = divmod(i, len(config.model.blocks))
                values = {key: float(x[group]) for key, x in measured[str(block)].items()}
                for key, _, over in _MEMORY:
                    if key in values:
                        w = weight * (values["memory_filled"] if over == "remembered" else 1.0)
                        total[key] = (total[key][0] + w * values[key], total[key][1] + w)
    for layer, total in zip(layers, totals, strict=True):
        layer |= {key: value / weight for key, (value, weight) in total.items() if weight}
    return {
        "suite": "memory",
        "step": trained.step,
        "data": config.data.path,
        "training_length": config.data.sequence_length,
        "by_layer": layers,
    }


def table(result: dict[str, Any]) -> str:
    """The result of a suite as text."""
    title = (
        f"step {result['step']}, {result['data']}, trained on rows of "
        f"{result['training_length']:,} tokens"
    )
    rows = _memory_rows(result) if result["suite"] == "memory" else _validation_rows(result)
    return "\n".join([title, "", *rows])


def _validation_rows(result: dict[str, Any]) -> list[str]:
    lines = [f"{'context':>12} {'nats/token':>11} {'bits/byte':>10} {'targets':>10}"]
    for row in result["by_context"]:
        lines.append(
            f"{row['context']:>12,} {row['loss']:>11.4f} {row['bits_per_byte']:>10.4f} "
            f"{row['targets']:>10,.0f}"
        )
    positions = result["by_position"]
    lines += ["", f"by position, rows of {positions['context']:,} tokens"]
    lines.append(f"{'position':>12} {'nats/token':>11} {'':>10} {'targets':>10}")
    for row in positions["octaves"]:
        span = f"{row['first']}-{row['last']}" if row["last"] > row["first"] else f"{row['first']}"
        lines.append(f"{span:>12} {row['loss']:>11.4f} {'':>10} {row['targets']:>10,.0f}")
    return lines


def _memory_rows(result: dict[str, Any]) -> list[str]:
    lines = [
        f"{'':>13} {'share of attention mass':^32} {'innovation, mean of':^21} {'memory':^17}",
        f"{'layer':>5} {'mixer':>7} {'in-context':>10} {'fading':>10} {'eidetic':>10} "
        f"{'all':>10} {'remembered':>10} {'age':>8} {'filled':>8}",
    ]
    for row in result["by_layer"]:
        line = f"{row['layer']:>5} {row['mixer']:>7}"
        for key, _, _ in _MEMORY:
            width = 8 if key in ("memory_age", "memory_filled") else 10
            form = ".1f" if key == "memory_age" else ".4f"
            line += f" {format(row[key], form) if key in row else '-':>{width}}"
        lines.append(line)
    lines += ["", "age in tokens, at the start of the chunk that remembers; filled: share of slots"]
    return lines


def draw(result: dict[str, Any], path: pathlib.Path) -> None:
    """A figure of a suite's result."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    if result["suite"] == "memory":
        _draw_memory(result, left, right)
    else:
        _draw_validation(result, left, right)
    figure.savefig(path, dpi=120)


def _draw_validation(result: dict[str, Any], left: Axes, right: Axes) -> None:
    rows, octaves = result["by_context"], result["by_position"]["octaves"]
    left.plot([row["context"] for row in rows], [row["loss"] for row in rows], "o-")
    left.axvline(result["training_length"], color="grey", linestyle=":", label="training length")
    left.legend()
    left.set_xlabel("context, tokens")
    # Octaves are drawn at their last position; position 0 has no logarithm.
    right.plot([row["last"] + 1 for row in octaves], [row["loss"] for row in octaves], "o-")
    right.set_xlabel(f"position in the document, rows of {result['by_position']['context']}")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_ylabel("nats per token")
        axes.grid(alpha=0.3)


def _draw_memory(result: dict[str, Any], left: Axes, right: Axes) -> None:
    rows = result["by_layer"]
    layers = [row["layer"] for row in rows]
    below = np.zeros(len(rows))
    for key, heading, _ in _MEMORY[:3]:
        shares = np.array([row.get(key, 0.0) for row in rows])
        left.bar(layers, shares, bottom=below, label=heading)
        below += shares
    left.set_ylabel("share of attention mass")
    remembering = [row for row in rows if "memory_age" in row]
    right.plot(
        [row["layer"] for row in remembering], [row["memory_age"] for row in remembering], "o-"
    )
    right.set_ylabel("age of remembered tokens")
    left.legend()
    for axes in (left, right):
        axes.set_xlabel("layer")
        axes.set_xlim(-0.5, len(rows) - 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)


def write(result: dict[str, Any], directory: pathlib.Path) -> None:
    """Leaves `<suite>.json` and `<suite>.png` in `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    name = result["suite"]
    (directory / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    draw(result, directory / f"{name}.png")
