"""Loss on the validation split, by context length and by position.

    loss            mean nll of the targets, nats per token
    bits per byte   sum of nll / (ln 2 * bytes that the targets stand for)

*By context length T*: the held-out documents are packed into rows of T tokens, so no token sees
more than T - 1 tokens of its document. *By position*: the loss of the tokens that stand at
positions [2^k, 2^(k+1)) of their document piece, in the rows of one context length.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array
from matplotlib.figure import Figure

from bmojo_jax import losses, model, sharding
from bmojo_jax.checkpoint import Trained
from bmojo_jax.config import MeshConfig, TrainConfig
from bmojo_jax.data import pipeline, sources
from bmojo_jax.data.tokenizers import Tokenizer
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


def make_validator(
    config: TrainConfig, mesh: Mesh, tokenizer: Tokenizer
) -> Callable[[model.Params], Validation]:
    """A function from parameters to their loss on the validation split, `eval_batches` of it."""
    token_bytes_V = tokenizer.token_bytes_V()
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
            tokenizer,
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
    unit = rows_together(mesh)
    rows = max(tokens // context // unit, 1) * unit
    data = dataclasses.replace(config.data, sequence_length=context, batch_size=rows)
    optim = dataclasses.replace(config.optim, accumulate=1)
    return dataclasses.replace(config, data=data, optim=optim)


def rows_together(mesh: Mesh) -> int:
    """The fewest rows of a batch that every device has equally many of."""
    return math.lcm(mesh.shape["data"] * mesh.shape["fsdp"], jax.process_count())


def default_contexts(config: TrainConfig) -> tuple[int, ...]:
    """Powers of two from 64 to four times the training length, and that length itself."""
    length = config.data.sequence_length
    powers = [2**k for k in range(6, (4 * length).bit_length()) if 2**k <= 4 * length]
    return tuple(sorted({*powers, length}))


def title(trained: Trained) -> str:
    """What every suite on documents says of the model first."""
    data = trained.config.data
    return f"step {trained.step}, {data.path}, trained on rows of {data.sequence_length:,} tokens"


def run(
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
        result = make_validator(_at_context(config, context, mesh), mesh, trained.tokenizer)(
            trained.params
        )
        rows.append({"context": context, **result.metrics(), "bytes": result.num_bytes})
        if positions is None or context <= config.data.sequence_length:
            positions = {"context": context, "octaves": result.by_position()}
    return {
        "suite": "validation",
        "title": title(trained),
        "step": trained.step,
        "data": config.data.path,
        "training_length": config.data.sequence_length,
        "by_context": rows,
        "by_position": positions,
    }


def table(result: dict[str, Any]) -> list[str]:
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


def draw(result: dict[str, Any], figure: Figure) -> None:
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
