"""Training: the state, one pure step, and the loop.

    loss = sum of weighted nll over the batch / sum of weights       (+ z-loss)

A batch is cut into `optim.accumulate` micro-batches whose gradients are summed before they are
divided by the weight of the whole batch, so accumulation changes memory and not the result. An
update with a non-finite loss or gradient norm leaves parameters and optimizer untouched; the loop
then stops with a report, or goes on (`TrainState.skipped` counts them).

Everything runs on a mesh (one device is a mesh of one): the state is born sharded, its buffers are
donated, and batches are made of each process's own rows.
"""

import collections
import contextlib
import dataclasses
import json
import math
import os
import pathlib
import signal
from collections.abc import Generator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, UInt

from bmojo_jax import checks, lock, losses, metrics, model, optim, processes, sharding
from bmojo_jax.checkpoint import Checkpoints
from bmojo_jax.config import TrainConfig
from bmojo_jax.data import pipeline, sources
from bmojo_jax.data.tokenizers import Tokenizer
from bmojo_jax.evaluate import validation
from bmojo_jax.metrics import Reporter
from bmojo_jax.settings import to_dict

Batch = dict[str, Any]
Metrics = dict[str, Array]


class TrainState(NamedTuple):
    """All that a step reads and writes beside the batch."""

    step: Int[Array, ""]  # batches seen
    skipped: Int[Array, ""]  # of these, how many were not finite and changed nothing
    params: model.Params
    opt_state: optax.OptState
    key: UInt[Array, " 2"]  # for randomness in a step (nothing draws from it so far)


def make_deterministic() -> None:
    """Same seed, same devices, same numbers; to be called before a device is used.

    Otherwise a GPU adds up the gradients of gathers in any order (measured on an H100: losses of
    equal runs 4e-3 apart after 40 steps; bit for bit equal with this, at 10 % fewer tokens/s; since
    then `embedding.py` sums the largest of them itself).
    """
    option = "--xla_gpu_deterministic_ops"
    chosen = os.environ.get("XLA_FLAGS", "")
    if option not in chosen:
        os.environ["XLA_FLAGS"] = f"{chosen} {option}=true".strip()


class NonFiniteError(RuntimeError):
    """A loss or gradient was NaN or infinite; names the step and the last good checkpoint."""


def init_state(config: TrainConfig, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    params_key, key = jax.random.split(jax.random.key(config.seed))
    params = model.init_params(config.model, params_key)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        key=jax.random.key_data(key),
    )


def loss_sums(
    config: TrainConfig, params: model.Params, batch: Batch
) -> tuple[Float[Array, ""], losses.Loss]:
    """Sum of nll and z-loss over a batch, and its parts. Without "positions" in the batch every row
    is one document."""
    x_BLD = model.hidden_states(
        config.model, params, batch["inputs"], positions_BL=batch.get("positions")
    )
    with jax.named_scope("cross_entropy"):
        loss = losses.cross_entropy(
            x_BLD,
            model.output_weights(config.model, params),
            batch["targets"],
            batch["weights"],
            vocab_chunk=config.vocab_chunk,
            z_loss=config.z_loss,
        )
    return loss.nll + loss.z_loss, loss


def train_step(
    config: TrainConfig,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    batch: Batch,
    token_bytes_V: Int[Array, " V"],
) -> tuple[TrainState, Metrics]:
    """One update. `batch` holds arrays [B, L], see `bmojo_jax.data`; V is the tokenizer's."""
    pieces = config.optim.accumulate
    micro_batches = jax.tree.map(lambda x: x.reshape(-1, pieces, *x.shape[1:]), batch)
    gradient = jax.grad(lambda params, part: loss_sums(config, params, part), has_aux=True)

    def accumulate(total, index):
        part = jax.tree.map(lambda x: x[:, index], micro_batches)
        return jax.tree.map(jnp.add, total, gradient(state.params, part)), None

    if pieces == 1:
        grads, loss = gradient(state.params, batch)
    else:
        shapes = jax.eval_shape(
            gradient, state.params, jax.tree.map(lambda x: x[:, 0], micro_batches)
        )
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        (grads, loss), _ = jax.lax.scan(accumulate, zeros, jnp.arange(pieces))
    weight = jnp.maximum(loss.weight, 1)
    grads = jax.tree.map(lambda g: g / weight, grads)
    with jax.named_scope("optimizer"):
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        norms = metrics.norms(grad=grads, param=state.params, update=updates)
    finite = jnp.isfinite(loss.nll) & jnp.isfinite(norms["grad_norm"])
    keep = lambda new, old: jnp.where(finite, new, old)  # noqa: E731
    new_state = TrainState(
        step=state.step + 1,
        skipped=state.skipped + ~finite,
        params=jax.tree.map(keep, params, state.params),
        opt_state=jax.tree.map(keep, opt_state, state.opt_state),
        key=state.key,
    )
    num_bytes = jnp.sum(token_bytes_V[batch["targets"]] * batch["weights"])
    schedule = optim.make_schedule(config.optim, config.steps)
    measured = {
        "loss": loss.nll / weight,
        "bits_per_byte": loss.nll / (math.log(2) * jnp.maximum(num_bytes, 1)),
        "accuracy": loss.correct / weight,
        "z_loss": loss.z_loss / weight,
        "learning_rate": jnp.asarray(schedule(state.step - state.skipped), jnp.float32),
        "targets": loss.weight,
        "skipped": new_state.skipped,
        "finite": finite,
    }
    return new_state, measured | norms


@dataclasses.dataclass(frozen=True)
class Program:
    """The compiled parts of a run on a mesh."""

    mesh: Mesh
    state_shardings: TrainState
    init: Any  # () -> TrainState
    step: Any  # (state, batch) -> (state, metrics); donates the state
    abstract_state: TrainState  # shapes with shardings, for restoring


def make_program(config: TrainConfig, mesh: Mesh, tokenizer: Tokenizer) -> Program:
    """Builds what runs on the devices; nothing is compiled before it is called."""
    shapes = jax.eval_shape(lambda: model.init_params(config.model, jax.random.key(0)))
    optimizer = optim.make_optimizer(config.optim, config.steps, shapes)
    state_shapes = jax.eval_shape(lambda: init_state(config, optimizer))
    shardings = sharding.state_shardings(mesh, state_shapes.params, state_shapes)
    replicated = NamedSharding(mesh, PartitionSpec())
    token_bytes_V = tokenizer.token_bytes_V()
    return Program(
        mesh=mesh,
        state_shardings=shardings,
        init=jax.jit(lambda: init_state(config, optimizer), out_shardings=shardings),
        step=jax.jit(
            lambda state, batch: train_step(
                config, optimizer, state, batch, jnp.asarray(token_bytes_V)
            ),
            in_shardings=(shardings, sharding.batch_sharding(mesh)),
            out_shardings=(shardings, replicated),
            donate_argnums=0,
            compiler_options=_compiler_options(mesh),
        ),
        abstract_state=jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            state_shapes,
            shardings,
        ),
    )


def _compiler_options(mesh: Mesh) -> dict[str, bool]:
    """For GPUs; why, was seen in what XLA compiles for an H100.

    bfloat16 is bfloat16: otherwise a rounding that is widened again is left out, and the wide
    values are written to memory, a ninth of a B'MOJO layer's bytes forward. And no kernel writes
    into the stack of what layers keep: where its result is used otherwise too, it would run twice.
    """
    if mesh.devices.flat[0].platform not in ("gpu", "cuda"):
        return {}
    return {"xla_allow_excess_precision": False, "xla_gpu_enable_dynamic_slice_fusion": False}


def write_config(config: TrainConfig, workdir: pathlib.Path) -> None:
    """Leaves the resolved settings in `config.json`."""
    if jax.process_index():
        return
    part = workdir / "config.json.part"
    part.write_text(json.dumps(to_dict(config), indent=2) + "\n")
    os.replace(part, workdir / "config.json")


@contextlib.contextmanager
def stop_signals() -> Generator[list[int]]:
    """Notes SIGTERM and SIGINT instead of dying of them; a second SIGINT does interrupt."""
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)
        # Not by logging, which may be what the signal has interrupted.
        with contextlib.suppress(OSError):  # Ctrl-C also ends what the output is piped to
            os.write(2, b"\nstops after this step, with a checkpoint (Ctrl-C again: at once)\n")

    previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    step: int
    params: model.Params
    tokenizer: Tokenizer
    validation: validation.Validation | None  # of the last evaluation
    interrupted: bool  # by SIGTERM or SIGINT, after a checkpoint


@dataclasses.dataclass(frozen=True)
class _Parts:
    """What a run is made of, when all that can be checked before it begins has been."""

    mesh: Mesh
    tokenizer: Tokenizer
    program: Program
    batches: pipeline.Batches
    documents: str  # fingerprint of those that are trained on
    checkpoints: Checkpoints


def _set_up(config: TrainConfig, workdir: pathlib.Path, stack: contextlib.ExitStack) -> _Parts:
    """Raises ValueError before anything is compiled or written; `stack` closes the parts."""
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_divisible(config, mesh)
    readers = sharding.readers(mesh)
    checks.check_precision(config)
    checks.check_comparison(config)
    checkpoints = stack.enter_context(
        Checkpoints(workdir / "checkpoints", keep_last=config.keep_last, keep_best=config.keep_best)
    )
    latest = checkpoints.latest_step()
    saved = None if latest is None else checkpoints.tokenizer(latest)
    if latest is not None:
        checks.check_continuation(checkpoints.config(latest), latest, config, tokenizer=saved)
    tokenizer = checks.choose_tokenizer(config.data, saved)
    checks.check_vocabulary(config, tokenizer)
    program = make_program(config, mesh, tokenizer)
    checks.check_implementations(config, program)
    source = sources.open_source(config.data, "train")
    documents = pipeline.fingerprint(source, config.data)
    shards = config.data.shards or readers.count
    if latest is not None:
        place = checkpoints.place(latest)
        checks.check_documents(checkpoints.config(latest), place["documents"], documents, config)
        shards = len(place["shards"])
    batches = pipeline.Batches(
        source,
        config.data,
        config.model.chunk,
        tokenizer,
        shards=shards,
        reader=readers.index,
        readers=readers.count,
    )
    stack.callback(batches.close)
    return _Parts(mesh, tokenizer, program, batches, documents, checkpoints)


def _restore(parts: _Parts, config: TrainConfig) -> TrainState:
    """The state of the latest checkpoint that is whole; the batches go on from its place."""
    state, place = parts.checkpoints.restore(parts.program.abstract_state)
    if place["documents"] == parts.documents:
        parts.batches.set_state(place["shards"])
    else:  # a place in another list, and in a document, means nothing
        logging.warning(
            "data.path=%r: files came or went since step %d: their order from here on is another "
            "one, from its beginning",
            *(config.data.path, int(state.step)),
        )
    return state


def _make(workdir: pathlib.Path) -> None:
    """Makes the work directory, for all processes; ValueError if another run has meanwhile."""
    problem = ""
    if jax.process_index() == 0:
        try:
            workdir.mkdir(parents=True)
        except FileExistsError:
            problem = "must not be made by another run at the same time"
    if problem := processes.first_says(lambda: problem):
        raise ValueError(f"workdir={str(workdir)!r}: {problem}")


def train(config: TrainConfig, workdir: str | os.PathLike[str]) -> Outcome:
    """Trains to `config.steps`, from the latest checkpoint in `workdir` that is whole, if any.

    Raises:
      checks.SettingsError: the settings do not fit, another run is writing in `workdir`, or all
        checkpoints there are damaged; nothing was compiled or written.
      NonFiniteError: `non_finite` is "stop" and a loss or gradient was not finite.
      SaveError: the last state could not be saved.
    """
    workdir = pathlib.Path(workdir)
    with contextlib.ExitStack() as stack, contextlib.ExitStack() as set_up:
        with checks.settings_errors():
            checks.check_workdir(workdir)
            if existed := processes.first_says(workdir.exists):
                stack.enter_context(lock.hold(workdir))
            parts = _set_up(config, workdir, set_up)
            if not existed:
                _make(workdir)
                stack.enter_context(lock.hold(workdir))
        # Until saving, too, is over signals do not have their usual effect.
        signals = stack.enter_context(stop_signals())
        stack.enter_context(set_up.pop_all())
        mesh, program, batches, checkpoints = (
            *(parts.mesh, parts.program, parts.batches, parts.checkpoints),
        )
        stack.enter_context(jax.set_mesh(mesh))
        if checkpoints.latest_step() is None:
            state, start = program.init(), 0
        else:
            with checks.settings_errors():
                state = _restore(parts, config)
            start = int(state.step)
            logging.info("continues after step %d of %s", start, workdir)
        checkpoints.clean_up()
        write_config(config, workdir)
        reporter = Reporter(
            workdir,
            steps=config.steps,
            start_step=start,
            log_every=config.log_every,
            tokens_per_step=config.data.batch_size * config.data.sequence_length,
            flops_per_token=metrics.flops_per_token(config.model, config.data.sequence_length),
        )
        stack.callback(reporter.close)
        validate = validation.make_validator(config, mesh, parts.tokenizer)
        left_out = _left_out(batches)
        # Entered last, so that it is left before anything is closed.
        advice = f"The same command on all of them continues from the last checkpoint in {workdir}."
        stack.enter_context(processes.end_with_the_others(advice))

        step, validated = start, None
        for step in range(start + 1, config.steps + 1):
            with reporter.waiting():
                batch = next(batches)
            state, measured = program.step(state, sharding.place_batch(batch, mesh))
            check_finite(config, step - 1, reporter.train(step, measured), checkpoints)
            stops = _agreed(bool(signals), step, config)
            last = step == config.steps
            # A process that is told to end may have little time: no evaluation then.
            evaluates = last or (step % config.eval_every == 0 and not stops)
            saves = last or stops or step % config.checkpoint_every == 0
            if evaluates or saves:
                check_finite(config, step, reporter.flush(), checkpoints)
                with reporter.paused():
                    if (now := _left_out(batches)) != left_out:
                        left_out = now
                        reporter.left_out(step, left_out)
                        logging.warning("documents left out until step %d: %s", step, left_out)
                    elif left_out and (last or stops):
                        logging.warning("documents left out in all: %s", left_out)
                    validation_loss = None
                    if evaluates:
                        validated = validate(state.params)
                        validation_loss = validated.loss
                        reporter.validation(step, validated.metrics())
                    if saves:
                        checkpoints.save(
                            step,
                            state,
                            {"shards": batches.get_state(), "documents": parts.documents},
                            to_dict(config),
                            tokenizer=parts.tokenizer,
                            validation_loss=validation_loss,
                        )
            if stops:
                break
        checkpoints.check_saved(step)
        if validated is None and step == config.steps:  # the run had ended before
            validated = validate(state.params)
    return Outcome(step, state.params, parts.tokenizer, validated, interrupted=step < config.steps)


def _left_out(batches: pipeline.Batches) -> dict[str, int]:
    """How many documents all processes have left out so far, by reason."""
    own = {shard: pipeline.left_out(state) for shard, state in batches.get_state().items()}
    of_shards: dict[str, dict[str, int]] = {}  # of which several processes may have the same
    for text in processes.gather(json.dumps(own)):
        of_shards |= json.loads(text)
    counts = sum(map(collections.Counter, of_shards.values()), collections.Counter())
    return dict(sorted(counts.items()))


def _agreed(stop: bool, step: int, config: TrainConfig) -> bool:
    """Whether to stop after this step, the same on all processes: they save together."""
    if jax.process_count() == 1:
        return stop
    # Asking makes every process wait for the device, so not after every step.
    if step % config.log_every:
        return False
    return bool(multihost_utils.process_allgather(np.int32(stop)).any())


def check_finite(
    config: TrainConfig, step: int, measured: dict[str, float] | None, checkpoints: Checkpoints
) -> None:
    """Stops or warns if the update of `step` was skipped for a loss that was not finite."""
    if measured is None or measured["finite"]:
        return
    report = (
        f"step {step}: loss {measured['loss']}, gradient norm {measured['grad_norm']}, "
        f"learning rate {measured['learning_rate']:g}"
    )
    if config.non_finite == "skip":
        logging.warning("%s: update skipped, %d so far", report, measured["skipped"])
        return
    raise NonFiniteError(
        f"{report}. {checkpoints.last_good()}. The same command continues from there: lower "
        'optim.learning_rate or optim.clip_norm, or skip such updates with non_finite="skip".'
    )
