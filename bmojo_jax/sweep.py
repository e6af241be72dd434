"""Training of a sweep: several learning rates and seeds of one model on a generated task, at once.

    replica p = (rate, seed);  params_p <- params_p + rate_p * update_p    (an update for rate 1)

A replica is one entry of an axis in front of every array of parameters and optimizer; `vmap` makes
all of them take their step together, so that models too small for a device fill it. Replicas do not
talk to each other: devices share them evenly, and one that diverges stays as it was before its
first update that was not finite ("stop"), or leaves such updates out ("skip").

Examples are made on the device, from the number of the step and the seed alone: rates of one seed
see the same rows, and a resumed run continues bit for bit from its step. Steps between two reports
are one call.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import sys
import time
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
import tqdm
from absl import logging
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int
from matplotlib.figure import Figure

from bmojo_jax import checks, lock, losses, model, optim, trainer
from bmojo_jax.checkpoint import Checkpoints
from bmojo_jax.config import TrainConfig
from bmojo_jax.data import tasks
from bmojo_jax.data.tasks.example import Example
from bmojo_jax.evaluate import mad, mqar, recall
from bmojo_jax.evaluate.recall import REPLICA, Sweep
from bmojo_jax.records import JsonLines
from bmojo_jax.settings import from_dict, to_dict


class SweepState(NamedTuple):
    """All that a step reads and writes; P in front of everything but the step."""

    step: Int[Array, ""]
    skipped: Int[Array, " P"]  # updates that changed nothing: not finite, or after one ("stop")
    params: model.Params
    opt_state: optax.OptState


class Sums(NamedTuple):
    """Over steps, of every replica."""

    loss: Array  # [P], nats
    accuracy: Array  # [P]


def _update(
    config: TrainConfig,
    optimizer: optax.GradientTransformation,
    replica: tuple[Array, model.Params, optax.OptState],
    rate: Array,
    rows: Example,
) -> tuple[tuple[Array, model.Params, optax.OptState], Sums]:
    """One step of one replica."""
    skipped, params, opt_state = replica

    def mean_loss(params: model.Params) -> tuple[Array, losses.Loss]:
        x_BAD = recall.asked_states(config, params, rows)
        loss = losses.cross_entropy(
            x_BAD,
            model.output_weights(config.model, params),
            rows.labels,
            rows.trained.astype(jnp.float32),
            vocab_chunk=config.vocab_chunk,
            z_loss=config.z_loss,
        )
        return (loss.nll + loss.z_loss) / loss.weight, loss

    grads, loss = jax.grad(mean_loss, has_aux=True)(params)
    updates, new_opt_state = optimizer.update(grads, opt_state, params)
    new_params = jax.tree.map(lambda p, u: p + rate * u, params, updates)
    finite = jnp.isfinite(loss.nll) & jnp.isfinite(optax.tree.norm(grads))
    moves = finite if config.non_finite == "skip" else finite & (skipped == 0)
    keep = lambda new, old: jnp.where(moves, new, old)  # noqa: E731
    after = (
        skipped + ~moves,
        jax.tree.map(keep, new_params, params),
        jax.tree.map(keep, new_opt_state, opt_state),
    )
    return after, Sums(loss.nll / loss.weight, loss.correct / loss.weight)


class Program:
    """The compiled parts of a sweep."""

    def __init__(self, config: TrainConfig):
        self.config = config
        replicas = recall.replicas(config)
        self.mesh = recall.replica_mesh(len(replicas))
        shapes = jax.eval_shape(lambda: model.init_params(config.model, jax.random.key(0)))
        # The rate is data: the schedule goes up to 1 and multiplies it.
        unit = dataclasses.replace(config.optim, learning_rate=1.0)
        self._optimizer = optim.make_optimizer(unit, config.steps, shapes)
        whole, cut = PartitionSpec(), PartitionSpec(REPLICA)
        specs: Any = SweepState(*cast(Any, (whole, cut, cut, cut)))
        self._rate_P = jnp.asarray([replica.rate for replica in replicas], jnp.float32)
        self._seed_P = jnp.asarray([replica.seed for replica in replicas], jnp.int32)

        state_shapes = jax.eval_shape(self._init)
        shardings = jax.tree.map(lambda _: NamedSharding(self.mesh, cut), state_shapes)
        shardings = shardings._replace(step=NamedSharding(self.mesh, whole))
        self.abstract_state = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            state_shapes,
            shardings,
        )
        self.init = jax.jit(self._init, out_shardings=shardings)
        advance = jax.shard_map(
            self._advance,
            mesh=self.mesh,
            in_specs=(specs, cut, cut, whole),
            out_specs=(specs, cut),
            check_vma=False,
        )
        self._compiled = jax.jit(advance, donate_argnums=0)

    def advance(self, state: SweepState, steps: int) -> tuple[SweepState, Sums]:
        """So many updates of every replica, and the means over them; donates the state."""
        return self._compiled(state, self._rate_P, self._seed_P, jnp.int32(steps))

    def _init(self) -> SweepState:
        config = self.config

        def replica(seed: Array) -> tuple[model.Params, optax.OptState]:
            params = model.init_params(config.model, jax.random.key(config.seed + seed))
            return params, self._optimizer.init(params)

        params, opt_state = jax.vmap(replica)(self._seed_P)
        return SweepState(jnp.zeros((), jnp.int32), jnp.zeros_like(self._seed_P), params, opt_state)

    def _rows(self, step: Array, seed_P: Array) -> Example:
        """The batch of every replica, [P, B, ...]; made once for each seed."""
        config = self.config

        def of_seed(seed: Array) -> Example:
            seed += config.data.seed
            index_B = tasks.train_indices(config.task, config.data.batch_size, seed, step)
            length = config.data.sequence_length
            return tasks.examples(config.task, length, "train", seed, index_B)

        seeds = jax.vmap(of_seed)(jnp.arange(config.task.seeds))
        return jax.tree.map(lambda x: x[seed_P], seeds)

    def _advance(
        self, state: SweepState, rate_P: Array, seed_P: Array, steps: Array
    ) -> tuple[SweepState, Sums]:
        """`steps` updates of the replicas of this device."""
        config = self.config
        at_once = min(config.task.replicas_at_once, len(rate_P)) or len(rate_P)

        def one(arguments: Any) -> Any:
            return _update(config, self._optimizer, *arguments)

        def step(_: Array, carry: tuple[SweepState, Sums]) -> tuple[SweepState, Sums]:
            state, sums = carry
            rows = self._rows(state.step, seed_P)
            arguments = (tuple(state[1:]), rate_P, rows)
            if at_once == len(rate_P):
                after, measured = jax.vmap(one)(arguments)
            else:
                after, measured = jax.lax.map(one, arguments, batch_size=at_once)
            return SweepState(state.step + 1, *after), jax.tree.map(jnp.add, sums, measured)

        zeros = Sums(jnp.zeros_like(rate_P), jnp.zeros_like(rate_P))
        state, sums = jax.lax.fori_loop(0, steps, step, (state, zeros))
        return state, jax.tree.map(lambda x: x / steps, sums)


class Records:
    """What a sweep reports: metrics.jsonl, a progress bar and, when closed, accuracy.png."""

    def __init__(self, config: TrainConfig, workdir: pathlib.Path, start: int):
        """Records beyond `start` of an earlier part of the run are dropped."""
        self._config = config
        self._lines = JsonLines(workdir / "metrics.jsonl", start_step=start)
        # Every refresh is a new line where the output is not a terminal.
        interval = 0.1 if sys.stderr.isatty() else 30.0
        self._bar = tqdm.tqdm(
            total=config.steps,
            initial=start,
            unit="step",
            mininterval=interval,
            maxinterval=max(interval, 10.0),
            dynamic_ncols=True,
        )
        self._said: dict[str, str] = {}

    def train(self, step: int, sums: Sums, skipped: list[int], steps_per_second: float) -> None:
        losses, accuracies = (_finite(values.tolist()) for values in sums)
        tokens = self._config.data.batch_size * self._config.data.sequence_length
        self._lines.add(
            {
                "step": step,
                "split": "train",
                "loss": losses,
                "accuracy": accuracies,
                "skipped": skipped,
                "tokens_per_second": steps_per_second * tokens * len(losses),
            }
        )
        known = [loss for loss in losses if loss is not None]
        self._said["lowest loss"] = f"{min(known):.4f}" if known else "not finite"
        self._bar.set_postfix(self._said, refresh=False)
        self._bar.update(step - self._bar.n)

    def test(self, step: int, scores: list[dict[str, Any]]) -> None:
        names = [name for name in scores[0] if name not in ("rate", "seed")]
        columns = {name: [row[name] for row in scores] for name in names}
        self._lines.add({"step": step, "split": "test"} | columns)
        best = recall.best_rate(scores, "accuracy")
        self._said["best rate"] = f"{best['rate']:.2g} ({best['mean']:.1%})"
        self._bar.set_postfix(self._said, refresh=False)

    def close(self) -> None:
        self._bar.close()
        self._lines.close()
        path = self._lines.path
        try:
            self._draw(path.with_name("accuracy.png"))
        except OSError as error:
            logging.error("%s cannot be written: %s", path.with_name("accuracy.png"), error)

    def _draw(self, path: pathlib.Path) -> None:
        lines = self._lines.path.read_text().splitlines() if self._lines.path.exists() else []
        tests = [record for record in map(json.loads, lines) if record["split"] == "test"]
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        replicas = recall.replicas(self._config)
        rates = list(dict.fromkeys(replica.rate for replica in replicas))
        for i, (rate, seed) in enumerate(replicas):
            axes.plot(
                [record["step"] for record in tests],
                [record["accuracy"][i] for record in tests],
                color=f"C{rates.index(rate)}",
                label=f"{rate:.2g}" if seed == 0 else None,
            )
        axes.set_ylim(-0.02, 1.02)
        axes.set_xlabel("step")
        axes.set_ylabel(f"{self._config.task.name}: accuracy")
        axes.legend(title="learning rate")
        axes.grid(alpha=0.3)
        figure.savefig(path, dpi=120)


def _finite(values: list[float]) -> list[float | None]:
    """JSON has no NaN and no infinity."""
    return [value if math.isfinite(value) else None for value in values]


def _check(config: TrainConfig) -> None:
    """Raises ValueError for what is wrong, before anything is compiled or written."""
    tasks.check(config)
    checks.check_precision(config)
    if jax.process_count() > 1:
        raise ValueError(
            f"--distributed: must not be given with task.name={config.task.name!r}, which one "
            "process trains on all its devices"
        )


def _check_continuation(before: dict[str, Any], step: int, now: TrainConfig) -> None:
    """Raises ValueError if `now` cannot continue a sweep that was started with `before`."""
    old = from_dict(TrainConfig, before)
    for field, value in to_dict(now.task).items():
        was = getattr(old.task, field)
        if field != "replicas_at_once" and was != value:
            raise ValueError(
                f"task.{field}={value!r}: must be {was!r}, with which the run in this work "
                "directory was started (or choose another work directory)"
            )
    checks.check_continuation(before, step, now)


def _next_stop(config: TrainConfig, step: int) -> int:
    """The next step at which something is reported, tested or saved."""
    every = (config.log_every, config.eval_every, config.checkpoint_every)
    return min(config.steps, *((step // n + 1) * n for n in every))


def train(config: TrainConfig, workdir: str | os.PathLike[str]) -> None:
    """Trains to `config.steps`, from the latest whole checkpoint in `workdir` if there is one.

    Prints the scores of all replicas and leaves them in `sweep.json`; a signal ends the run before,
    after a checkpoint.

    Raises:
      checks.SettingsError: the settings do not fit, another run is writing in `workdir`, or all
        checkpoints there are damaged; nothing was compiled or written.
      SaveError: the last state could not be saved.
    """
    workdir = pathlib.Path(workdir)
    with contextlib.ExitStack() as stack:
        with checks.settings_errors():
            checks.check_workdir(workdir)
            _check(config)
            program = Program(config)
            workdir.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock.hold(workdir))
            # Before what saves, so that saving, too, is over when a signal has its usual effect.
            signals = stack.enter_context(trainer.stop_signals())
            checkpoints = stack.enter_context(
                Checkpoints(
                    workdir / "checkpoints", keep_last=config.keep_last, keep_best=config.keep_best
                )
            )
            latest = checkpoints.latest_step()
            if latest is None:
                state = program.init()
            else:
                _check_continuation(checkpoints.config(latest), latest, config)
                state, _ = checkpoints.restore(program.abstract_state)
                logging.info("continues after step %d of %s", int(state.step), workdir)
        checkpoints.clean_up()
        trainer.write_config(config, workdir)
        state = _run(config, workdir, program, state, checkpoints, signals, stack)
        step = int(state.step)
        if step < config.steps:
            print(f"stopped after step {step}; the same command continues from there")
        else:
            _finish(config, workdir, state)


def _run(
    config: TrainConfig,
    workdir: pathlib.Path,
    program: Program,
    state: SweepState,
    checkpoints: Checkpoints,
    signals: list[int],
    stack: contextlib.ExitStack,
) -> SweepState:
    """The loop: until the last step or a signal; the state it ends with is saved."""
    step = int(state.step)
    records = Records(config, workdir, step)
    stack.callback(records.close)
    rows = recall.test_examples(config)
    tester = recall.Tester(config, program.mesh)
    while step < config.steps and not signals:
        following = _next_stop(config, step)
        since = time.perf_counter()
        state, sums = program.advance(state, following - step)
        means, skipped = jax.device_get((sums, state.skipped))
        rate = (following - step) / (time.perf_counter() - since)
        step = following
        records.train(step, means, skipped.tolist(), rate)
        last = step == config.steps
        lowest = None
        # A process that is told to end may have little time: no evaluation then.
        if last or (step % config.eval_every == 0 and not signals):
            scores = recall.score(config, rows, tester(state.params, rows))
            records.test(step, scores)
            lowest = min((row["loss"] for row in scores if row["loss"] is not None), default=None)
        if last or signals or step % config.checkpoint_every == 0:
            checkpoints.save(step, state, {}, to_dict(config), validation_loss=lowest)
    checkpoints.check_saved(step)
    return state


def _finish(config: TrainConfig, workdir: pathlib.Path, state: SweepState) -> None:
    """Prints and writes what came of every replica."""
    suite = mqar if config.task.name == "mqar" else mad
    result = suite.run(Sweep(config, state.params, config.steps))
    result["skipped"] = jax.device_get(state.skipped).tolist()
    for (rate, seed), skipped in zip(recall.replicas(config), result["skipped"], strict=True):
        if skipped:
            logging.warning(
                "rate %g, seed %d: %d updates changed nothing: not finite, or after such a one",
                *(rate, seed, skipped),
            )
    part = workdir / "sweep.json.part"
    part.write_text(json.dumps(result, indent=2) + "\n")
    os.replace(part, workdir / "sweep.json")
    print("\n".join([result["title"], "", *suite.table(result)]))
