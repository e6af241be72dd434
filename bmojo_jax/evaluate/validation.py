"""Loss on the validation split, by context length and by position.

    loss            mean nll of the targets, nats per token
    bits per byte   sum of nll / (ln 2 * bytes that the targets stand for)

*By context length T*: the held-out documents are packed into rows of T tokens, so no token sees
more than T - 1 tokens of its document. *By position*: the loss of the tokens that stand at
positions [2^k, 2^(k+1)) of their document piece, in the rows of one context length.

Intervals are bootstraps over documents.
"""

import dataclasses
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
from bmojo_jax.evaluate.intervals import interval
from bmojo_jax.metrics import bits_per_byte


class _Tokens(NamedTuple):
    """Of a batch, on every process."""

    nll_BL: Array  # 0 where the weight is
    weights_BL: Array
    positions_BL: Array  # in the document piece
    bytes_BL: Array  # that the target stands for
    starts_BL: Array  # whether it is the first token of a document


class _Totals:
    """Sums over batches in their order, in float64 on the host."""

    def __init__(self, length: int) -> None:
        self.nll_L = np.zeros(length)
        self.weight_L = np.zeros(length)
        self.num_bytes = 0.0
        # Of each document. Entry 0 stays empty: rows begin with the start of the first.
        self.nll_D, self.weight_D = np.zeros(1), np.zeros(1)

    def add(self, tokens: _Tokens) -> None:
        nll, weights, positions, num_bytes, starts = (
            np.asarray(array).reshape(-1) for array in tokens
        )
        length = len(self.nll_L)
        self.nll_L += np.bincount(positions, nll, length)
        self.weight_L += np.bincount(positions, weights, length)
        self.num_bytes += float(num_bytes.sum(dtype=np.float64))
        document = len(self.nll_D) - 1 + np.cumsum(starts)
        new = int(document[-1]) + 1 - len(self.nll_D)
        self.nll_D = np.pad(self.nll_D, (0, new)) + np.bincount(
            document, nll, len(self.nll_D) + new
        )
        self.weight_D = np.pad(self.weight_D, (0, new)) + np.bincount(
            document, weights, len(self.weight_D) + new
        )


@dataclasses.dataclass(frozen=True)
class Validation:
    """Sums over a validation split, and what follows from them."""

    nll_L: np.ndarray  # nats, by position in the document piece
    weight_L: np.ndarray  # targets, likewise
    num_bytes: float  # that the targets stand for
    nll_D: np.ndarray  # nats, by document
    weight_D: np.ndarray  # targets, likewise

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

    @property
    def documents(self) -> int:
        return int((self.weight_D > 0).sum())

    @property
    def interval(self) -> tuple[float, float]:
        """95 % of the loss, over documents."""
        return interval(self.nll_D, self.weight_D)

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
    readers = sharding.readers(mesh)

    def measure(params: model.Params, batch: dict[str, Array]) -> _Tokens:
        x_BLD = model.hidden_states(
            config.model, params, batch["inputs"], positions_BL=batch["positions"]
        )
        nll_BL = losses.per_token_nll(
            x_BLD,
            model.output_weights(config.model, params),
            batch["targets"],
            vocab_chunk=config.vocab_chunk,
        )
        weights_BL = batch["weights"]
        return _Tokens(
            nll_BL=weights_BL * nll_BL,
            weights_BL=weights_BL,
            positions_BL=batch["positions"],
            bytes_BL=jnp.asarray(token_bytes_V)[batch["targets"]] * weights_BL,
            starts_BL=(batch["inputs"] == tokenizer.boundary_id) & (weights_BL > 0),
        )

    replicated = NamedSharding(mesh, PartitionSpec())
    step = jax.jit(measure, out_shardings=replicated)

    def validate(params: model.Params) -> Validation:
        batches = pipeline.validation_batches(
            source,
            config.data,
            config.model.chunk,
            tokenizer,
            shard=readers.index,
            shards=readers.count,
            limit=config.eval_batches,
        )
        total = _Totals(length)
        pending = None
        with jax.set_mesh(mesh):
            for batch in tqdm.tqdm(
                batches, desc="validation", unit="batch", leave=False, mininterval=1, disable=None
            ):
                following = step(params, sharding.place_batch(batch, mesh))
                # One batch late, so that the device always has one to work on.
                if pending is not None:
                    total.add(pending)
                pending = following
        if pending is not None:
            total.add(pending)
        return Validation(**vars(total))

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
    return mesh.shape["data"] * mesh.shape["fsdp"]


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
        rows.append(
            {
                "context": context,
                **result.metrics(),
                "interval": list(result.interval),
                "bytes": result.num_bytes,
                "documents": result.documents,
            }
        )
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
    documents = max(row["documents"] for row in result["by_context"])
    lines = [
        f"{documents:,} documents; intervals: 95 %, bootstrap over documents",
        "",
        f"{'context':>12} {'nats/token':>11} {'bits/byte':>10} {'targets':>10} {'interval':^18}",
    ]
    for row in result["by_context"]:
        low, high = row["interval"]
        lines.append(
            f"{row['context']:>12,} {row['loss']:>11.4f} {row['bits_per_byte']:>10.4f} "
            f"{row['targets']:>10,.0f} {low:>8.4f} - {high:.4f}"
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
    contexts = [row["context"] for row in rows]
    left.plot(contexts, [row["loss"] for row in rows], "o-")
    low, high = zip(*(row["interval"] for row in rows), strict=True)
    left.fill_between(contexts, low, high, alpha=0.2, label="95 %, over documents")
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
