"""Evaluation on held-out documents: loss by context length and by position.

    loss            mean nll of the targets, nats per token
    bits per byte   sum of nll / (ln 2 * bytes that the targets stand for)

*By context length T*: the held-out documents are packed into rows of T tokens, so no token sees
more than T - 1 tokens of its document. *By position*: the loss of the tokens that stand at
positions [2^k, 2^(k+1)) of their document piece, in the rows of one context length.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array
from matplotlib.figure import Figure

from bmojo_jax import checkpoint, losses, model, sharding
from bmojo_jax.config import MeshConfig, TrainConfig
from bmojo_jax.data import pipeline, tokenizers
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
    def tokens(self) -> float:
        return float(self.weight_L.sum())

    @property
    def loss(self) -> float:
        """Nats per token."""
        return float(self.nll_L.sum()) / self.tokens

    @property
    def bits_per_byte(self) -> float:
        return bits_per_byte(float(self.nll_L.sum()), self.num_bytes)

    def metrics(self) -> dict[str, float]:
        return {"loss": self.loss, "bits_per_byte": self.bits_per_byte, "tokens": self.tokens}

    def by_position(self) -> list[dict[str, float]]:
        """Loss of the tokens at positions [first, last], in octaves."""
        rows = []
        first = 0
        while first < len(self.weight_L):
            end = max(2 * first, 1)
            tokens = float(self.weight_L[first:end].sum())
            if tokens:
                loss = float(self.nll_L[first:end].sum()) / tokens
                last = min(end, len(self.weight_L)) - 1
                rows.append({"first": first, "last": last, "loss": loss, "tokens": tokens})
            first = end
        return rows


def make_validator(config: TrainConfig, mesh: Mesh) -> Callable[[model.Params], Validation]:
    """A function from parameters to their loss on the validation split, `eval_batches` of it."""
    token_bytes_V = tokenizers.make_tokenizer(config.data.tokenizer).token_bytes_V()
    length = config.data.sequence_length

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
        zeros_L = jnp.zeros((length,), jnp.float32)
        return _Sums(
            nll_L=zeros_L.at[positions_BL].add(weights_BL * nll_BL),
            weight_L=zeros_L.at[positions_BL].add(weights_BL),
            num_bytes=jnp.sum(jnp.asarray(token_bytes_V)[batch["targets"]] * weights_BL),
        )

    replicated = NamedSharding(mesh, PartitionSpec())
    step = jax.jit(sums, out_shardings=replicated)

    def validate(params: model.Params) -> Validation:
        batches = pipeline.validation_batches(
            config.data,
            config.model.chunk,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            limit=config.eval_batches,
        )
        total = _Sums(np.zeros(length), np.zeros(length), np.zeros(()))
        pending = None
        with jax.set_mesh(mesh):
            for batch in tqdm.tqdm(
                batches, desc="validation", unit="batch", leave=False, mininterval=1, disable=None
            ):
                following = step(params, sharding.place_batch(batch, mesh))
                # One batch late, so that the device always has one to work on.
                if pending is not None:
                    total = _add(total, pending)
                pending = following
        total = _add(total, pending)
        return Validation(total.nll_L, total.weight_L, float(total.num_bytes))

    return validate


def _at_context(config: TrainConfig, context: int, mesh: Mesh) -> TrainConfig:
    """The settings with rows of `context` tokens and about as many tokens in a batch."""
    tokens = config.data.batch_size * config.data.sequence_length
    unit = math.lcm(mesh.shape["data"] * mesh.shape["fsdp"], jax.process_count())
    rows = max(tokens // context // unit, 1) * unit
    data = dataclasses.replace(config.data, sequence_length=context, batch_size=rows)
    optim = dataclasses.replace(config.optim, accumulate=1)
    return dataclasses.replace(config, data=data, optim=optim)


def default_contexts(config: TrainConfig) -> tuple[int, ...]:
    """Powers of two from 64 to four times the training length."""
    most = 4 * config.data.sequence_length
    return tuple(2**k for k in range(6, most.bit_length()) if 2**k <= most) or (most,)


def validation_suite(
    workdir: pathlib.Path, *, contexts: tuple[int, ...] | None, step: int | None, batches: int
) -> dict[str, Any]:
    """Loss by context length and by position of the model in `workdir`.

    Args:
      contexts: lengths of the rows; None: `default_contexts`.
      step: of the checkpoint; None: the latest.
      batches: how many batches of the validation split; 0: all of it.

    Returns:
      What is written to JSON: the settings, a row for each context, the positions in rows of the
      training length (or the nearest context below).
    """
    mesh = sharding.make_mesh(MeshConfig())
    trained = checkpoint.load(workdir, step=step, mesh=mesh)
    config = dataclasses.replace(
        trained.config, eval_batches=batches, mesh=MeshConfig(), compare_with="nothing"
    )
    contexts = default_contexts(config) if contexts is None else tuple(sorted(contexts))
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


def table(result: dict[str, Any]) -> str:
    """The result of `validation_suite` as text."""
    lines = [
        f"step {result['step']}, {result['data']}, trained on rows of "
        f"{result['training_length']:,} tokens",
        "",
        f"{'context':>12} {'nats/token':>11} {'bits/byte':>10} {'tokens':>10}",
    ]
    for row in result["by_context"]:
        lines.append(
            f"{row['context']:>12,} {row['loss']:>11.4f} {row['bits_per_byte']:>10.4f} "
            f"{row['tokens']:>10,.0f}"
        )
    positions = result["by_position"]
    lines += ["", f"by position, rows of {positions['context']:,} tokens"]
    lines.append(f"{'position':>12} {'nats/token':>11} {'':>10} {'tokens':>10}")
    for row in positions["octaves"]:
        span = f"{row['first']}-{row['last']}" if row["last"] > row["first"] else f"{row['first']}"
        lines.append(f"{span:>12} {row['loss']:>11.4f} {'':>10} {row['tokens']:>10,.0f}")
    return "\n".join(lines)


def draw(result: dict[str, Any], path: pathlib.Path) -> None:
    """A figure of loss by context length and by position."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
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
    figure.savefig(path, dpi=120)


def write(result: dict[str, Any], directory: pathlib.Path) -> None:
    """Leaves `validation.json` and `validation.png` in `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    name = result["suite"]
    (directory / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    draw(result, directory / f"{name}.png")
