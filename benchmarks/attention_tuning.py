"""Block sizes of the memory attention: what `tuning` searches among.

The score is the mean of two ratios of times, forward alone and both passes.
"""

import functools
import itertools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import scan_accuracy, timing, tuning
from benchmarks.attention_programs import (
    LIMIT,
    Exact,
    Inputs,
    differentiated,
    draw_inputs,
    errors,
    ours,
    results,
)
from benchmarks.record import Record
from benchmarks.tuning import Sizes
from pallas_kernels import blocks
from pallas_kernels.memory_attention import api
from pallas_kernels.shapes import AttentionShape


class Search:
    """The inputs of one case and what they must give."""

    def __init__(self, implementation: str, shape: AttentionShape):
        self.implementation, self.shape = implementation, shape
        first = draw_inputs(jax.random.key(0), shape=shape)
        sets = timing.number_of_sets(timing.nbytes(first))
        more = [draw_inputs(jax.random.key(n), shape=shape) for n in range(1, sets)]
        self.inputs = [first, *more]
        self.want = Exact(shape, first).of(implementation)

    def scores(self, choices: Mapping[str, Sizes], *, samples: int) -> dict[str, float | str]:
        """See `tuning.Search`."""
        programs: dict[tuple[str, str], Any] = {}
        for name, sizes in choices.items():
            attend = ours(self.implementation, self.shape, blocks=sizes)

            def both(inputs: Inputs, attend: Any = attend) -> Any:
                o, pull = differentiated(attend)(inputs.operands)
                return o, pull(inputs.do_BLHK)

            def forward(inputs: Inputs, attend: Any = attend) -> jax.Array:
                return attend(inputs.operands)

            programs[name, "forward"], programs[name, "both"] = jax.jit(forward), jax.jit(both)
        first = self.inputs[0]
        failed = timing.compile_all(
            functools.partial(program.lower, first) for program in programs.values()
        )
        refused: dict[str, float | str] = {}
        for (name, kind), failure in zip(programs, failed, strict=True):
            if failure is not None:
                refused[name] = scan_accuracy.in_short(failure)
            elif kind == "both" and name not in refused:
                attend = ours(self.implementation, self.shape, blocks=choices[name])
                found = errors(results(jax.jit(differentiated(attend)), first), self.want)
                if not max(found.values()) <= LIMIT:
                    refused[name] = f"errors above {LIMIT}: {found}"
        start = next(iter(choices))
        if start in refused:
            raise ValueError(f"{choices[start]}: {refused[start]}")
        jobs = {
            key: timing.Job(program, [(one,) for one in self.inputs])
            for key, program in programs.items()
            if key[0] not in refused
        }
        times = timing.measure(jobs, samples=samples)

        def score(name: str) -> float:
            ratios = [times[name, k].seconds / times[start, k].seconds for k in ("forward", "both")]
            return sum(ratios) / len(ratios)

        return refused | {name: score(name) for name in choices if name not in refused}


def tune_all(
    implementations: Sequence[str],
    shapes: Sequence[AttentionShape],
    record: Record,
    *,
    seconds: float,
) -> None:
    """Searches block sizes of all that have any, in equal parts of the time."""
    runs: dict[str, Any] = {
        name: api.IMPLEMENTATIONS[name] for name in implementations if name in api.IMPLEMENTATIONS
    }
    # Those that are modules of this package have block sizes, or may have.
    backends = {name: run.args[0] for name, run in runs.items() if getattr(run, "args", ())}
    tasks = [
        (name, shape)
        for name, shape in itertools.product(backends, shapes)
        if getattr(backends[name], "TUNABLE", {})
    ]
    if not tasks:
        raise SystemExit(f"none of {list(implementations)} has anything to tune")
    end, found = time.monotonic() + seconds, []
    for number, (name, shape) in enumerate(timing.progress(tasks, unit="case")):
        key = blocks.case_key(sizes_of(shape), jnp.dtype("bfloat16"))
        result: dict[str, Any]
        try:
            result = tuning.tune(
                Search(name, shape),
                backends[name].TUNABLE,
                op=f"memory_attention/{name}",
                key=key,
                seconds=(end - time.monotonic()) / (len(tasks) - number),
            )
        except Exception as error:  # the others are still worth the device's time
            result = {"op": name, "case": key, "wrong": scan_accuracy.in_short(error)}
        found.append(result)
        record.add("tuning", found)
        timing.say(f"{name} {key}: {result.get('wrong') or result['kept'] or 'nothing kept'}")


def sizes_of(shape: AttentionShape) -> dict[str, int]:
    """By the letters that the backends give `blocks.choose`."""
    s = shape
    sizes = {letter: getattr(s, letter) for letter in "BLHGK"}
    chunk = min(s.chunk, s.L) if s.eidetic else s.L
    return sizes | {"W": s.window, "F": s.fading_window, "M": s.eidetic, "C": chunk}
