"""Generation by whole models, beside each other: time to the first token, and of every next one.

    python -m benchmarks.inference --output results/model/inference.json
    python -m benchmarks.inference --output results/model/inference.json --draw

"first_token": one row of random tokens, from the prompt on the host to the logits on the device
(`generate.begin`). "decode": after such a prompt, greedy steps one after another (`generate.step`),
in each row of a batch, whose rows are copies of one. Parameters are random, those of
`model.for_inference` in the compute dtype; transformers attend through cuDNN on GPUs.

A decode row's error is the relative RMS of its logits, a few tokens after the prompt, against a
whole pass over prompt and tokens; what is wrong has no time. `bound_ms`: to read the parameters
once, at the speed of a copy measured in the same run, half of which is reading. The JSON is written
after every case; what does not fit says so. The exit status is 1 if anything was wrong.
"""

import dataclasses
import json
import pathlib
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jaxtyping import Array

from benchmarks import scan_accuracy, timing
from benchmarks.record import Record
from bmojo_jax import generate, model, presets
from bmojo_jax.cache import Cache
from bmojo_jax.config import ModelConfig
from pallas_kernels import dispatch

# Largest error with which a time is printed: both sides round to bfloat16 in every layer.
LIMIT = 5e-2
_CHECKED_TOKENS, _WARM_TOKENS = 8, 8

_OUTPUT = flags.DEFINE_string("output", None, "JSON to write, or to draw.", required=True)
_FAMILIES = flags.DEFINE_list("families", ["transformer", "bmojo"], "Of the presets.")
_SIZE = flags.DEFINE_enum("size", "1_4b", list(presets.SIZES), "Of the presets.")
_WIDTH = flags.DEFINE_integer("head_width", 128, "K.")
_PROMPTS = flags.DEFINE_list(
    "prompts", ["2048", "8192", "16384", "32768", "65536"], "Tokens before the first one."
)
_CONTEXTS = flags.DEFINE_list(
    "contexts", ["2048", "8192", "16384", "131072"], "Tokens before those that are timed."
)
_BATCHES = flags.DEFINE_list("batches", ["1", "64"], "Rows that are decoded together.")
_TOKENS = flags.DEFINE_integer("tokens", 256, "Of a sample of decoding.", lower_bound=1)
_SAMPLES = flags.DEFINE_integer("samples", 3, "Of each time.", lower_bound=1)
_CHECKED = flags.DEFINE_integer("checked_length", 16384, "Longest context with an error.")
_COMMIT = flags.DEFINE_string("commit", "", "Of the code that runs, for the record.")
_DRAW = flags.DEFINE_bool("draw", False, "Make a figure, .svg and .png, beside the JSON.")

_most_likely = jax.jit(lambda logits_BV: jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)[:, None])


def settings(family: Any) -> ModelConfig:
    size: Any = _SIZE.value
    width: Any = _WIDTH.value
    cudnn = family == "transformer" and "NVIDIA" in dispatch.device_kind()
    return dataclasses.replace(
        presets.model(family, size, head_width=width),
        compute_dtype="bfloat16",
        attention_implementation="cudnn" if cudnn else None,
    )


class Family:
    """A model with random parameters, and what is measured of it."""

    def __init__(self, family: str):
        self.family, self.config = family, settings(family)
        params = model.init_params(self.config, jax.random.key(0))
        self.params = jax.block_until_ready(model.for_inference(self.config, params))

    def first_token(self, length: int) -> dict[str, Any]:
        """Seconds of a prompt of `length` tokens; the first one compiles and does not count."""
        prompt, seconds = _tokens(length), []
        for _ in range(1 + _SAMPLES.value):
            start = time.perf_counter()
            logits_BV, _ = generate.begin(self.config, self.params, [prompt], max_length=length)
            jax.block_until_ready(logits_BV)
            seconds.append(time.perf_counter() - start)
        return {"samples_s": seconds[1:], "ms": 1e3 * statistics.median(seconds[1:])}

    def decode(self, context: int) -> Iterator[dict[str, Any]]:
        """A row for each batch."""
        prompt = _tokens(context)
        counted = _WARM_TOKENS + _CHECKED_TOKENS + _SAMPLES.value * _TOKENS.value
        begun = {"max_length": context + counted}
        for batch in map(int, _BATCHES.value):
            row: dict[str, Any] = {"batch": batch}
            try:
                logits_BV, cache = generate.begin(self.config, self.params, [prompt], **begun)
                logits_BV, cache = jax.tree.map(
                    lambda x, batch=batch: jnp.repeat(x, batch, axis=0), (logits_BV, cache)
                )
                row |= self._steps(prompt, logits_BV, cache)
            except Exception as error:  # too large, say: the others are still worth the time
                row["wrong"] = scan_accuracy.in_short(error)
            yield row

    def _steps(self, prompt: list[int], logits_BV: Array, cache: Cache) -> dict[str, Any]:
        row: dict[str, Any] = {"cache_bytes": timing.nbytes(cache)}
        self._time = len(prompt)  # of every row
        logits_BV, cache, tokens = self._run(logits_BV, cache, _CHECKED_TOKENS)
        if len(prompt) <= _CHECKED.value:
            row["error"] = self._error(prompt + tokens, logits_BV)
            if not row["error"] <= LIMIT:
                return row | {"wrong": f"error {row['error']:.1e} above {LIMIT}"}
        logits_BV, cache, _ = self._run(logits_BV, cache, _WARM_TOKENS)
        seconds = []
        for _ in range(_SAMPLES.value):
            start = time.perf_counter()
            logits_BV, cache, _ = self._run(logits_BV, cache, _TOKENS.value)
            seconds.append((time.perf_counter() - start) / _TOKENS.value)
        return row | {"samples_s": seconds, "ms": 1e3 * statistics.median(seconds)}

    def _run(self, logits_BV: Array, cache: Cache, count: int) -> tuple[Array, Cache, list[int]]:
        """Greedy steps; what was fed to the first row."""
        ones_B, fed = np.ones(logits_BV.shape[:1], np.int32), []
        for _ in range(count):
            token_B1 = _most_likely(logits_BV)
            fed.append(token_B1)
            time_B = np.full(len(ones_B), self._time)
            logits_BV, cache = generate.step(
                self.config, self.params, cache, logits_BV, token_B1, ones_B, time_B=time_B
            )
            self._time += 1
        jax.block_until_ready(logits_BV)
        return logits_BV, cache, [int(token_B1[0, 0]) for token_B1 in fed]

    def _error(self, tokens: list[int], logits_BV: Array) -> float:
        """Of the first row, against a whole pass."""

        def last(params: model.Params, tokens_BL: Array) -> Array:
            bound = model.bind(self.config, params)
            return bound.logits(bound.hidden_states(tokens_BL)[0][:, -1:])[0, 0]

        want_V = np.asarray(jax.jit(last)(self.params, jnp.asarray([tokens])), np.float64)
        got_V = np.asarray(logits_BV[0], np.float64)
        return float(np.linalg.norm(got_V - want_V) / np.linalg.norm(want_V))


def _tokens(length: int) -> list[int]:
    return np.random.default_rng(0).integers(0, 256, length).tolist()


def line(row: Mapping[str, Any]) -> str:
    what = f"{row['what']:<12}{row['family']:<12}{row['length']:>8}{row['batch']:>5}"
    if "ms" not in row:
        return f"{what}  {row['wrong']}"
    bound = f"  bound {row['bound_ms']:.3f}" if "bound_ms" in row else ""
    error = f"  error {row['error']:.1e}" if "error" in row else ""
    return f"{what}{row['ms']:>12.3f} ms{bound}{error}"


def draw(content: Mapping[str, Any], path: pathlib.Path) -> None:
    """Milliseconds over tokens before, to the first token and of a step for each batch."""
    from matplotlib.figure import Figure

    rows = [row for row in content["rows"] if "ms" in row]
    kinds = list(dict.fromkeys((row["what"], row["batch"]) for row in rows))
    figure = Figure(figsize=(4.2 * len(kinds), 3.6), layout="constrained")
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        shown = [row for row in rows if (row["what"], row["batch"]) == kind]
        for family in dict.fromkeys(row["family"] for row in shown):
            points = sorted((row["length"], row["ms"]) for row in shown if row["family"] == family)
            axes.plot(*zip(*points, strict=True), "o-", label=family)
        if "bound_ms" in shown[0]:
            axes.axhline(shown[0]["bound_ms"], color="black", linestyle=":", label="weights read")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("tokens before")
        axes.set_ylabel("ms")
        axes.set_title(f"{kind[0].replace('_', ' ')}, batch {kind[1]}")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(f"Generation by {content['size']} models on {content['device']}")
    for suffix in (".svg", ".png"):
        figure.savefig(path.with_suffix(suffix), dpi=130)


def main(argv: Sequence[str]) -> None:
    del argv
    output = pathlib.Path(_OUTPUT.value)
    if _DRAW.value:
        draw(json.loads(output.read_text()), output)
        return
    record = Record(output, "inference", _COMMIT.value, size=_SIZE.value)
    copy = timing.copied_bytes_per_second(samples=5)
    record.add("copied_bytes_per_second", copy)
    rows: list[dict[str, Any]] = []

    def add(what: str, family: str, length: int, row: dict[str, Any]) -> None:
        rows.append({"what": what, "family": family, "length": length, "batch": 1} | row)
        record.add("rows", rows)
        timing.say(line(rows[-1]))

    for name in _FAMILIES.value:
        family = Family(name)
        bound = {"bound_ms": 1e3 * timing.nbytes(family.params) / copy}
        for length in timing.progress([int(n) for n in _PROMPTS.value], unit="prompt"):
            try:
                row = family.first_token(length)
            except Exception as error:
                row = {"wrong": scan_accuracy.in_short(error)}
            add("first_token", name, length, row)
        for context in timing.progress([int(n) for n in _CONTEXTS.value], unit="context"):
            for row in family.decode(context):
                add("decode", name, context, row | bound)
        del family
    wrong = [row for row in rows if "wrong" in row]
    if wrong:
        raise SystemExit("\n".join(["wrong, or did not run:", *map(str, wrong)]))


if __name__ == "__main__":
    app.run(main)
