"""Accuracy of the replicas of a sweep on a generated task; what suites of tasks are made of.

    accuracy     share of answers whose label has the highest logit of all words; for mqar the
                 mean of the rows' shares, else over all answers
    macro        that share for each label, mean over the labels that occur
    by distance  that share, by the tokens between the question and where its answer stood

A sweep is P replicas, equal but for learning rate and seed; their parameters are stacked in front.
Answers of a test are brought to the host, where every summary is made from them.
"""

import dataclasses
import math
import os
import pathlib
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float
from matplotlib.figure import Figure

from bmojo_jax import model
from bmojo_jax.checkpoint import Checkpoints
from bmojo_jax.config import TaskConfig, TrainConfig
from bmojo_jax.data import tasks
from bmojo_jax.data.tasks.example import Example
from bmojo_jax.evaluate import intervals
from bmojo_jax.settings import from_dict

# Reach of a window of 32 tokens in one layer, in two, and in four.
BUCKETS: tuple[tuple[int, int | None], ...] = ((1, 31), (32, 62), (63, 127), (128, None))
REPLICA = "replica"  # the mesh axis
_LOGITS = 2**26  # how many are held at a time


class Replica(NamedTuple):
    rate: float
    seed: int  # how far from the first one


def replicas(config: TrainConfig) -> list[Replica]:
    """Rate and seed of every replica, in their order."""
    rates = config.task.rates or (config.optim.learning_rate,)
    return [Replica(rate, seed) for rate in rates for seed in range(config.task.seeds)]


def replica_mesh(count: int) -> Mesh:
    """A mesh of as many devices as share `count` replicas evenly."""
    devices = jax.devices()
    number = max(n for n in range(1, len(devices) + 1) if count % n == 0)
    return jax.make_mesh(
        (number,), (REPLICA,), axis_types=(AxisType.Auto,), devices=devices[:number]
    )


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The replicas out of a work directory."""

    config: TrainConfig
    params: model.Params  # an axis of P replicas in front of every array
    step: int


def load(workdir: str | os.PathLike[str], *, step: int | None = None) -> Sweep:
    """The replicas that a sweep has left in `workdir`, at `step` or the latest one.

    Raises:
      FileNotFoundError: there is no such checkpoint.
      ValueError: the run was no sweep.
    """
    directory = pathlib.Path(workdir) / "checkpoints"
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} does not exist: no run has saved anything there")
    with Checkpoints(directory, keep_last=1, keep_best=0, mode="read") as checkpoints:

        def read(step: int) -> Sweep:
            config = from_dict(TrainConfig, checkpoints.config(step))
            if config.task.name == "none":
                raise ValueError(
                    f"{workdir}: must be the work directory of a run on a task (configs/mqar.py, "
                    "configs/mad.py); this one was trained on documents"
                )
            count = len(replicas(config))
            placement = NamedSharding(replica_mesh(count), PartitionSpec(REPLICA))
            shapes = jax.eval_shape(lambda: model.init_params(config.model, jax.random.key(0)))
            abstract = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype, sharding=placement),
                shapes,
            )
            return Sweep(config, checkpoints.read_params(step, abstract), step)

        return checkpoints.read_whole(read, step)


class Answers(NamedTuple):
    """Of P replicas to the A questions of each of B rows."""

    correct_PBA: Bool[np.ndarray, "P B A"]
    nll_PBA: Float[np.ndarray, "P B A"]  # nats


def test_examples(config: TrainConfig) -> Example:
    """The rows that every replica is tested on."""
    task = config.task
    return jax.jit(
        lambda: tasks.examples(
            task,
            config.data.sequence_length,
            "test",
            config.data.seed,
            jnp.arange(task.test_examples),
        )
    )()


def asked_states(config: TrainConfig, params: model.Params, rows: Example) -> Float[Array, "B A D"]:
    """Hidden states at the asked positions, of one replica."""
    x_BLD = model.hidden_states(config.model, params, rows.tokens)
    # By a product with 0 and 1: a gather's gradient is a scatter, which GPUs sort if it must be
    # deterministic.
    asked_BAL = rows.asked[:, :, None] == jnp.arange(x_BLD.shape[1])[None, None, :]
    highest = jax.lax.Precision.HIGHEST
    return jnp.einsum("BAL,BLD->BAD", asked_BAL.astype(x_BLD.dtype), x_BLD, precision=highest)


def _answer(
    config: TrainConfig, params: model.Params, rows: Example
) -> tuple[Bool[Array, "B A"], Float[Array, "B A"]]:
    x_BAD = asked_states(config, params, rows)
    w_VD = model.output_weights(config.model, params).astype(x_BAD.dtype)
    wide = jnp.promote_types(x_BAD.dtype, jnp.float32)
    logits_BAV = jnp.einsum("BAD,VD->BAV", x_BAD, w_VD, preferred_element_type=wide)
    of_label_BA = jnp.take_along_axis(logits_BAV, rows.labels[:, :, None], axis=2)[:, :, 0]
    nll_BA = jax.nn.logsumexp(logits_BAV, axis=-1) - of_label_BA
    # Not finite is not right, whatever argmax makes of it.
    correct_BA = (jnp.argmax(logits_BAV, axis=-1) == rows.labels) & jnp.isfinite(nll_BA)
    return correct_BA, nll_BA


def _rows_at_once(config: TrainConfig, rows: Example) -> int:
    """As many rows as the logits leave room for, a divisor of their number."""
    number, asked = rows.asked.shape
    most = max(_LOGITS // (asked * config.model.vocab_size), 1)
    most = min(most, config.data.batch_size)
    return max(n for n in range(1, min(most, number) + 1) if number % n == 0)


class Tester:
    """Asks all replicas; compiled once for all tests with rows of one shape."""

    def __init__(self, config: TrainConfig, mesh: Mesh):
        def answer(params: model.Params, rows: Example) -> Any:
            at_once = _rows_at_once(config, rows)
            pieces = jax.tree.map(lambda x: x.reshape(-1, at_once, *x.shape[1:]), rows)

            def one(params: model.Params) -> Any:
                answers = jax.lax.map(lambda rows: _answer(config, params, rows), pieces)
                return jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), answers)

            return jax.lax.map(one, params)

        replica = PartitionSpec(REPLICA)
        self._answer = jax.jit(
            jax.shard_map(
                answer,
                mesh=mesh,
                in_specs=(replica, PartitionSpec()),
                out_specs=replica,
                check_vma=False,
            )
        )

    def __call__(self, params: model.Params, rows: Example) -> Answers:
        return Answers(*jax.device_get(self._answer(params, rows)))


def _shares(task: TaskConfig, rows: Example, answers: Answers) -> tuple[np.ndarray, np.ndarray]:
    """Of every row: what accuracy is the ratio of, [P, B] and [B]."""
    scored_BA = np.asarray(rows.scored)
    asked_B = scored_BA.sum(axis=-1)
    right_PB = (answers.correct_PBA & scored_BA[None]).sum(axis=-1)
    if task.name == "mqar":
        return right_PB / asked_B[None], np.ones(asked_B.shape)
    return right_PB, asked_B


def in_buckets(distance: np.ndarray) -> list[np.ndarray]:
    """For every bucket, which of the distances lie in it."""
    return [(distance >= first) & (distance <= (last or distance.max())) for first, last in BUCKETS]


def score(
    config: TrainConfig,
    rows: Example,
    answers: Answers,
    *,
    spread: Literal["none", "rows"] = "none",
) -> list[dict[str, Any]]:
    """For every replica its rate, seed and scores; None where nothing of the kind was asked.

    Args:
      spread: "rows" adds the 95 % interval of the accuracy, rows drawn again.
    """
    task = config.task
    scored_BA = np.asarray(rows.scored)
    labels = np.asarray(rows.labels)[scored_BA]
    values_PB, weights_B = _shares(task, rows, answers)
    result = []
    for i, (rate, seed) in enumerate(replicas(config)):
        correct = answers.correct_PBA[i][scored_BA]
        loss = float(answers.nll_PBA[i][scored_BA].mean(dtype=np.float64))
        by_label = [correct[labels == label].mean() for label in np.unique(labels)]
        row: dict[str, Any] = {
            "rate": rate,
            "seed": seed,
            "loss": loss if math.isfinite(loss) else None,
            "accuracy": float(values_PB[i].sum() / weights_B.sum()),
            "macro": float(np.mean(by_label)),
        }
        if spread == "rows":
            low, high = intervals.interval(values_PB[i], weights_B)
            if low == high:  # all rows right, or all wrong: draws of them say nothing
                low, high = intervals.share_interval(row["accuracy"], len(weights_B))
            row["interval"] = [low, high]
        if task.name == "mqar":
            distance = np.asarray(rows.distance)[scored_BA]
            row["by_distance"] = [
                float(correct[inside].mean()) if inside.any() else None
                for inside in in_buckets(distance)
            ]
        result.append(row)
    return result


def by_rate(scores: list[dict[str, Any]], measure: str) -> list[dict[str, Any]]:
    """For every rate the mean of `measure` over its seeds, the lowest and the highest."""
    rows = []
    for rate in dict.fromkeys(row["rate"] for row in scores):
        values = [row[measure] for row in scores if row["rate"] == rate]
        rows.append(
            {
                "rate": rate,
                "seeds": len(values),
                "mean": float(np.mean(values)),
                "median": float(np.median(values)),
                "lowest": min(values),
                "highest": max(values),
            }
        )
    return rows


def best_rate(scores: list[dict[str, Any]], measure: str) -> dict[str, Any]:
    """The entry of `by_rate` with the highest mean; of equals the first."""
    return max(by_rate(scores, measure), key=lambda row: row["mean"])


def condition(
    config: TrainConfig, rows: Example, answers: Answers, *, measure: str, name: str
) -> dict[str, Any]:
    """What a suite writes of one kind of rows.

    Args:
      measure: the score by which the best rate is chosen.
    """
    scores = score(config, rows, answers, spread="rows")
    scored_BA = np.asarray(rows.scored)
    entry: dict[str, Any] = {
        "name": name,
        "items": len(scored_BA),
        "answers": int(scored_BA.sum()),
        "measure": measure,
        "replicas": scores,
        "by_rate": by_rate(scores, measure),
        "best": best_rate(scores, measure),
    }
    if config.task.name == "mqar":
        distance = np.asarray(rows.distance)[scored_BA]
        entry["share_by_distance"] = [float(inside.mean()) for inside in in_buckets(distance)]
    return entry


def title(sweep: Sweep) -> str:
    task, length = sweep.config.task, sweep.config.data.sequence_length
    return (
        f"step {sweep.step}, {sweep.config.model.pattern}, {task.name}, "
        f"trained on rows of {length:,} tokens"
    )


def bucket_names() -> list[str]:
    return [f"{a}-{b}" if b else f">{a - 1}" for a, b in BUCKETS]


def table(result: dict[str, Any]) -> list[str]:
    """The lines of every condition: its replicas, then its best rate."""
    lines = []
    for entry in result["conditions"]:
        distances = "share_by_distance" in entry
        head = f"{'rate':>9} {'seed':>4} {'accuracy':>8} {'95 % interval':>15} {'macro':>7} "
        head += f"{'loss':>8}"
        if distances:
            head += "".join(f"{name:>8}" for name in bucket_names()) + "  tokens ago"
        lines += [f"{entry['name']}: {entry['items']:,} rows, {entry['answers']:,} answers", head]
        for row in entry["replicas"]:
            low, high = row["interval"]
            loss = "-" if row["loss"] is None else f"{row['loss']:.4f}"
            line = f"{row['rate']:>9.2g} {row['seed']:>4} {row['accuracy']:>8.2%} "
            line += f"{f'{low:.2%}-{high:.2%}':>15} {row['macro']:>7.2%} {loss:>8}"
            for share in row.get("by_distance", ()):
                line += f"{'-' if share is None else f'{share:.1%}':>8}"
            lines.append(line)
        if distances:
            shares = "".join(f"{share:>8.1%}" for share in entry["share_by_distance"])
            lines.append(f"{'share of the answers':>57}{shares}")
        lines += [best_line(entry["best"], entry["measure"]), ""]
    return lines[:-1]


def best_line(best: dict[str, Any], measure: str) -> str:
    line = f"best rate {best['rate']:.2g}: {measure} {best['mean']:.2%}"
    if best["seeds"] > 1:
        line += (
            f", mean of {best['seeds']} seeds (median {best['median']:.2%}, "
            f"{best['lowest']:.2%} to {best['highest']:.2%})"
        )
    return line


def draw(result: dict[str, Any], figure: Figure) -> None:
    """By rate, every seed a point; by distance, at the best rate, where that is known."""
    distances = "share_by_distance" in result["conditions"][0]
    axes = figure.subplots(1, 1 + distances, squeeze=False)[0]
    for entry in result["conditions"]:
        measure = entry["measure"]
        rates = [row["rate"] for row in entry["by_rate"]]
        (line,) = axes[0].plot(rates, [row["mean"] for row in entry["by_rate"]])
        points = [(row["rate"], row[measure]) for row in entry["replicas"]]
        axes[0].plot(*zip(*points, strict=True), "o", color=line.get_color(), label=entry["name"])
        if not distances:
            continue
        chosen = [row for row in entry["replicas"] if row["rate"] == entry["best"]["rate"]]
        for row in chosen:
            known = [(i, x) for i, x in enumerate(row["by_distance"]) if x is not None]
            axes[1].plot(*zip(*known, strict=True), "o-", color=line.get_color())
    axes[0].set_xscale("log")
    axes[0].set_xlabel("learning rate")
    axes[0].set_ylabel(f"{result['conditions'][0]['measure']}, lines: mean of seeds")
    axes[0].legend()
    if distances:
        axes[1].set_xticks(range(len(BUCKETS)), bucket_names())
        axes[1].set_xlabel("tokens since the answer stood there; best rate, every seed")
        axes[1].set_ylabel("share of right answers")
    for each in axes:
        each.set_ylim(-0.02, 1.02)
        each.grid(alpha=0.3)
