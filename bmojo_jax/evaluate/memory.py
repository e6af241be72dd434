"""What the layers do with their memories, on the validation split.

For every layer, which share of the attention mass each stream of keys gets, the innovation of all
tokens and of those that are remembered, and how many tokens old those are. Intervals are bootstraps
over batches; neighbouring ones may be of one document, so they say the least that is uncertain.
"""

import dataclasses
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bmojo_jax import model, sharding
from bmojo_jax.checkpoint import Trained
from bmojo_jax.config import MeshConfig
from bmojo_jax.data import pipeline, sources
from bmojo_jax.evaluate.intervals import interval
from bmojo_jax.evaluate.validation import rows_together, title

# Columns: key, heading, and what it is a mean over.
_MEMORY: tuple[tuple[str, str, Literal["tokens", "remembered"]], ...] = (
    ("mass_in_context", "in-context", "tokens"),
    ("mass_fading", "fading", "tokens"),
    ("mass_eidetic", "eidetic", "tokens"),
    ("innovation", "innovation", "tokens"),
    ("memory_innovation", "remembered", "remembered"),
    ("memory_age", "age", "remembered"),
    ("memory_filled", "filled", "tokens"),
)


def run(trained: Trained, *, batches: int = 8) -> dict[str, Any]:
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
    data = dataclasses.replace(config.data, batch_size=rows_together(mesh))

    def statistics(params: model.Params, batch: dict[str, Array]) -> dict[str, dict[str, Array]]:
        bound = model.bind(config.model, params)
        return bound.hidden_states(batch["inputs"], batch["positions"], statistics=True)[1]

    step = jax.jit(statistics, out_shardings=NamedSharding(mesh, PartitionSpec()))
    layers: list[dict[str, Any]] = [
        {"layer": i, "mixer": config.model.blocks[i % len(config.model.blocks)].mixer}
        for i in range(config.model.depth)
    ]
    # For every layer and key: values times weight, and weights, of the batches.
    parts: list[dict[str, list[tuple[float, float]]]] = [{} for _ in layers]
    tokens, read = 0.0, 0
    with jax.set_mesh(mesh):
        for batch in pipeline.validation_batches(
            sources.open_source(data, "validation"),
            data,
            config.model.chunk,
            trained.tokenizer,
            shard=jax.process_index(),
            shards=jax.process_count(),
            limit=batches,
        ):
            weight = float(batch["weights"].mean())
            tokens, read = tokens + float(batch["weights"].sum()), read + 1
            measured = jax.device_get(step(trained.params, sharding.place_batch(batch, mesh)))
            for i, part in enumerate(parts):
                group, block = divmod(i, len(config.model.blocks))
                values = {key: float(x[group]) for key, x in measured[str(block)].items()}
                for key, _, over in _MEMORY:
                    if key in values:
                        w = weight * (values["memory_filled"] if over == "remembered" else 1.0)
                        part.setdefault(key, []).append((w * values[key], w))
    for layer, part in zip(layers, parts, strict=True):
        sums = {key: np.array(pairs) for key, pairs in part.items()}
        sums = {key: pairs for key, pairs in sums.items() if pairs[:, 1].sum()}
        layer |= {key: float(x[:, 0].sum() / x[:, 1].sum()) for key, x in sums.items()}
        if sums:
            layer["intervals"] = {key: list(interval(*x.T)) for key, x in sums.items()}
    return {
        "suite": "memory",
        "title": title(trained),
        "step": trained.step,
        "data": config.data.path,
        "training_length": config.data.sequence_length,
        "batches": read,
        "tokens": tokens * jax.process_count(),
        "by_layer": layers,
    }


def table(result: dict[str, Any]) -> list[str]:
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
    lines.append(f"{result['tokens']:,.0f} tokens in {result['batches']:,} batches")
    for key, heading, _ in _MEMORY:
        ends = [row["intervals"][key] for row in result["by_layer"] if key in row]
        if ends:
            widest = max(high - low for low, high in ends) / 2
            lines.append(f"95 % over batches, widest of all layers: {heading} ±{widest:.4f}")
    return lines


def draw(result: dict[str, Any], figure: Figure) -> None:
    left, right = figure.subplots(1, 2)
    rows = result["by_layer"]
    layers = [row["layer"] for row in rows]
    below = np.zeros(len(rows))
    for key, heading, _ in _MEMORY[:3]:
        shares = np.array([row.get(key, 0.0) for row in rows])
        left.bar(layers, shares, bottom=below, label=heading)
        below += shares
    left.set_ylabel("share of attention mass")
    remembering = [row for row in rows if "memory_age" in row]
    ages = np.array([row["memory_age"] for row in remembering])
    ends = np.array([row["intervals"]["memory_age"] for row in remembering]).reshape(-1, 2)
    right.errorbar(
        [row["layer"] for row in remembering],
        ages,
        # An interval of quantiles need not hold the mean where there are few batches.
        np.maximum([ages - ends[:, 0], ends[:, 1] - ages], 0),
        fmt="o-",
        capsize=3,
    )
    right.set_ylabel("age of remembered tokens")
    left.legend()
    for axes in (left, right):
        axes.set_xlabel("layer")
        axes.set_xlim(-0.5, len(rows) - 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
