"""What a run reports: norms, bits per byte, throughput and utilisation, and where it goes.

Model FLOPs utilisation (arXiv 2204.02311, appendix B) is

    MFU = tokens per second * flops_per_token / (devices * peak FLOP/s of a device)

with the peak for bfloat16 matrix products, whatever dtype the run computes in.

`Reporter` writes a progress bar, `metrics.jsonl`, TensorBoard files and, when closed,
`loss.png`. Step n of its records is the state after n updates. A disk that cannot be written to is
reported and does not stop the run.
"""

import contextlib
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Generator, Mapping
from typing import Any

import jax
import optax
import tqdm
from absl import logging
from matplotlib.figure import Figure

from bmojo_jax.config import ModelConfig
from bmojo_jax.records import EventFile, JsonLines

# bfloat16 matrix products without sparsity, FLOP/s of a device as its vendor states it. The first
# entry that starts the device kind holds.
PEAK_FLOPS: tuple[tuple[str, float], ...] = (
    ("NVIDIA H200", 989e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H100 NVL", 835e12),
    ("NVIDIA H100", 989e12),
    ("NVIDIA A100", 312e12),
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),
    ("TPU v6 lite", 918e12),
    ("TPU v6e", 918e12),
)


def peak_flops(device_kind: str) -> float | None:
    """The peak of a device kind; None where no peak is known (a CPU): then there is no MFU."""
    return next((peak for kind, peak in PEAK_FLOPS if device_kind.startswith(kind)), None)


def norms(**trees: Any) -> dict[str, jax.Array]:
    """The global norm of each tree: norms(grad=grads) is {"grad_norm": ...}."""
    return {f"{name}_norm": optax.tree.norm(tree) for name, tree in trees.items()}


def bits_per_byte(nll: float, num_bytes: float) -> float:
    """Of a sum of negative log-likelihoods in nats over a text of `num_bytes` bytes."""
    return nll / math.log(2) / num_bytes


def _mean_visible_keys(model: ModelConfig, mixer: str, L: int) -> float:
    """Keys that a query sees, averaged over a row of L tokens of one document."""
    if mixer == "attention":
        return (L + 1) / 2
    W, F, M, C = model.window, model.fading_span, model.eidetic_tokens, model.chunk
    keys = sum(min(i + 1, W) for i in range(L))
    if mixer in ("bmojo_f", "bmojo"):
        keys += sum(min(max(i + 1 - W, 0), F) for i in range(L))
    if mixer == "bmojo":
        keys += sum(min(max(i // C * C - W + 1, 0), M) for i in range(L))
    return keys / L


def flops_per_token(model: ModelConfig, sequence_length: int) -> float:
    """Floating-point operations of training on one token.

    Three times the forward pass (the backward pass takes two products for each), of which counts

    * 2 per entry of every matrix that a token is multiplied with, the head included; tied
      projections of the fading stream are used twice and count twice;
    * 4 H K per key that a query really sees in window, fading window and memory (half of the
      tokens with full causal attention), for q . k and p . v.

    Left out: recomputation, since it is no useful work, and everything that is no matrix product:
    embedding lookup, norms, convolution, selection, and the work on the scan's state (about
    10 E N per token and layer, on the vector units).
    """
    D, H, G, K = model.width, model.num_heads, model.num_kv_heads, model.head_width
    E, N, R = model.ssm_inner, model.ssm_state, model.dt_rank
    ssm = D * 2 * E + E * (R + 2 * N) + R * E + E * D
    forward = 2 * D * model.vocab_size
    for block in model.blocks:
        entries, keys = 0, 0.0
        if block.mixer in ("mamba", "bmojo_f", "bmojo"):
            entries += ssm
        if block.mixer != "mamba":
            entries += 2 * D * H * K + 2 * D * G * K
            keys = _mean_visible_keys(model, block.mixer, sequence_length)
        if model.reads_fading(block.mixer):
            entries += 2 * D * G * K
        if block.mlp:
            entries += 3 * D * model.mlp_width
        forward += model.num_groups * (2 * entries + 4 * H * K * keys)
    return 3.0 * forward


class Reporter:
    """Reports the progress of a training run; only process 0 writes.

    Metrics of a step are handed over as device arrays and converted at the call for the next
    step, so the device always has a step to work on while the host waits for the one before.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        steps: int,
        start_step: int,
        log_every: int,
        tokens_per_step: int,
        flops_per_token: float,
    ) -> None:
        """Starts reporting steps start_step + 1 .. steps.

        Records beyond `start_step` of an earlier part of the run are dropped: it stopped after
        the checkpoint that is resumed, and these steps will be made again.
        """
        self._directory = pathlib.Path(directory)
        self._log_every = log_every
        self._steps = steps
        self._tokens_per_step = tokens_per_step
        peak = peak_flops(jax.devices()[0].device_kind)
        self._mfu_per_rate = flops_per_token / (peak * jax.device_count()) if peak else None
        self._pending: tuple[int, Mapping[str, Any]] | None = None
        self._clock: tuple[int, float] | None = None  # step and time from which a rate counts
        self._waited = 0.0  # seconds since then, for data
        self._last: dict[str, str] = {}
        self._writes = jax.process_index() == 0
        if not self._writes:
            return
        self._directory.mkdir(parents=True, exist_ok=True)
        self._lines = JsonLines(self._directory / "metrics.jsonl", start_step=start_step)
        self._board = EventFile(self._directory / "tensorboard", start_step=start_step)
        # Every refresh is a new line where the output is not a terminal.
        interval = 0.1 if sys.stderr.isatty() else 30.0
        self._bar = tqdm.tqdm(
            total=steps,
            initial=start_step,
            unit="step",
            mininterval=interval,
            maxinterval=max(interval, 10.0),
            dynamic_ncols=True,
        )

    def train(self, step: int, metrics: Mapping[str, Any]) -> dict[str, float] | None:
        """Takes the metrics of update `step`: "loss" (nats per token), "bits_per_byte" and others.

        Every log_every-th step and the last one are recorded.

        Returns:
          The metrics of the step before, converted; None if there is none.
        """
        converted = self.flush()
        self._pending = (step, metrics)
        return converted

    def flush(self) -> dict[str, float] | None:
        """Waits for the step that is still pending and reports it; returns its metrics."""
        if self._pending is None:
            return None
        step, metrics = self._pending
        self._pending = None
        values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
        now = time.perf_counter()
        if self._clock is None:
            self._clock, self._waited = (step, now), 0.0  # the first step compiles: it is not timed
        if step % self._log_every == 0 or step == self._steps:
            rates = {}
            first, since = self._clock
            if step > first:
                rate = (step - first) * self._tokens_per_step / (now - since)
                rates["tokens_per_second"] = rate
                # Of the host, ahead of which the device works: an upper bound of its own wait.
                rates["data_wait"] = self._waited / (now - since)
                if self._mfu_per_rate is not None:
                    rates["mfu"] = rate * self._mfu_per_rate
            self._clock, self._waited = (step, now), 0.0
            self._record(step, "train", values | rates)
        if self._writes:
            self._bar.update(step - self._bar.n)
        return values

    def validation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records an evaluation after update `step`: "loss", "bits_per_byte" and others."""
        self.flush()
        self._record(step, "validation", dict(metrics))

    def left_out(self, step: int, counts: Mapping[str, int]) -> None:
        """Records how many documents were left out until update `step`, by reason."""
        self._record(step, "left_out", dict(counts))

    @contextlib.contextmanager
    def waiting(self) -> Generator[None]:
        """Counts what runs inside, taking the next batch, as time spent waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextlib.contextmanager
    def paused(self) -> Generator[None]:
        """Keeps what runs inside, evaluation or saving, out of the rate of training.

        What is pending is reported first, so that a checkpoint never runs ahead of the records.
        """
        self.flush()
        start = time.perf_counter()
        yield
        if self._clock is not None:
            step, since = self._clock
            self._clock = (step, since + time.perf_counter() - start)

    def close(self) -> None:
        """Reports what is pending, draws loss.png and closes every file."""
        self.flush()
        if not self._writes:
            return
        self._bar.close()
        self._board.close()
        self._lines.close()
        try:
            self._draw()
        except OSError as error:
            logging.error("%s cannot be written: %s", self._directory / "loss.png", error)

    def _record(self, step: int, split: str, values: Mapping[str, float]) -> None:
        if not self._writes:
            return
        record = {"step": step, "tokens": step * self._tokens_per_step, "split": split}
        # JSON has no NaN and no infinity.
        finite = {name: x if math.isfinite(x) else None for name, x in values.items()}
        self._lines.add(record | finite)
        self._board.add(step, {f"{split}/{n}": x for n, x in finite.items() if x is not None})
        if split == "train":
            self._last["loss"] = f"{values['loss']:.4f}"
            self._last["bits/byte"] = f"{values['bits_per_byte']:.3f}"
            if "tokens_per_second" in values:
                self._last["tokens/s"] = f"{values['tokens_per_second']:,.0f}"
        elif split == "validation":
            self._last["validation"] = f"{values['loss']:.4f}"
        self._bar.set_postfix(self._last, refresh=False)

    def _draw(self) -> None:
        lines = self._lines.path.read_text().splitlines() if self._lines.path.exists() else []
        records = [json.loads(line) for line in lines]
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        for split, style in (("train", "-"), ("validation", "o-")):
            points = [
                (record["tokens"], record["bits_per_byte"])
                for record in records
                if record["split"] == split and record["bits_per_byte"] is not None
            ]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=split, markersize=3)
        axes.set_xlabel("tokens")
        axes.set_ylabel("bits per byte")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
        part = self._directory / "loss.part.png"  # what was there stays, if there is no room
        try:
            figure.savefig(part, dpi=120)
            os.replace(part, self._directory / "loss.png")
        finally:
            part.unlink(missing_ok=True)
