"""Searches block sizes of the selective scan and keeps what is faster in `tuned.json`.

A backend with block sizes worth tuning has `TUNABLE: Mapping[str, tuple[int, ...]]`, block name to
candidates, and asks `blocks.choose` for them as "selective_scan/NAME" with the sizes of B, L, E and
N and x's dtype. The search starts from the sizes that are in use and changes one at a time: all
candidates of a name are compiled at once, those whose results are right are timed in turns with
the sizes chosen so far, and the best is taken. The names are gone through again until nothing
improves or time is up. The score is the mean of two ratios of times, forward alone and both passes.

At last the choice is measured once more against the start, and kept if it still is faster.
"""

import functools
import itertools
import json
import os
import time
from collections.abc import Mapping
from typing import Any

import jax

from benchmarks import scan_accuracy, scan_programs, timing
from benchmarks.scan_programs import Inputs, Kind
from pallas_kernels import blocks, dispatch
from pallas_kernels.shapes import SCAN_CASES

Sizes = dict[str, int]
# An entry must be worth its line: the least gain over what is there.
LEAST_GAIN = 0.02
_KINDS: tuple[Kind, ...] = ("forward", "forward_backward")
_SEARCH_SAMPLES, _FINAL_SAMPLES = 7, 25


class Search:
    """The inputs of one case and what they must give."""

    def __init__(self, implementation: str, case: str, dtype: str):
        self.implementation, self.case, self.dtype = implementation, case, dtype
        first = self._draw(0)
        sets = timing.number_of_sets(timing.nbytes(first))
        self.inputs = [first, *(self._draw(seed) for seed in range(1, sets))]
        self.want = scan_accuracy.exact(first)

    def _draw(self, seed: int) -> Inputs:
        key, shape = jax.random.key(seed), SCAN_CASES[self.case]
        inputs = scan_programs.draw(key, shape=shape, dtype=self.dtype)
        return scan_programs.as_variant(inputs, "plain")

    def scores(self, choices: Mapping[str, Sizes], *, samples: int) -> dict[str, float | str]:
        """Of every choice relative to the first, which must work; or why it is none."""
        made, refused = {}, {}
        for name, sizes in choices.items():
            try:
                made[name] = scan_programs.programs(self.implementation, self.inputs[0], sizes)
            except Exception as error:  # sizes that the backend does not take together
                refused[name] = scan_accuracy.in_short(error)
        programs = [(name, kind, getattr(made[name], kind)) for name in made for kind in _KINDS]
        timing.compile_all(
            functools.partial(program.lower, self.inputs[0]) for _, _, program in programs
        )
        jobs = {}
        for name, kind, program in programs:
            checked = scan_accuracy.check(made[name], kind, self.inputs[0], self.want, self.dtype)
            if "wrong" in checked:
                refused[name] = checked["wrong"]
            jobs[name, kind] = timing.Job(program, [(one,) for one in self.inputs])
        jobs = {key: job for key, job in jobs.items() if key[0] not in refused}
        first = next(iter(choices))
        if first in refused:
            raise ValueError(f"{choices[first]}: {refused[first]}")
        times = timing.measure(jobs, samples=samples)

        def score(name: str) -> float:
            ratios = [times[name, kind].median / times[first, kind].median for kind in _KINDS]
            return sum(ratios) / len(ratios)

        return refused | {name: score(name) for name in choices if name not in refused}


def tune(implementation: str, case: str, dtype: str, *, seconds: float) -> dict[str, Any]:
    """Searches for `seconds`; keeps what is faster, and returns everything that was tried."""
    end = time.monotonic() + seconds
    tunable: Mapping[str, tuple[int, ...]] = scan_programs.backend_of(implementation).TUNABLE
    search = Search(implementation, case, dtype)
    chosen: Sizes = {}
    trials: list[dict[str, Any]] = []
    unchanged = 0
    for name in itertools.cycle(tunable):
        if unchanged == len(tunable) or time.monotonic() > end:
            break
        candidates = {str(size): chosen | {name: size} for size in tunable[name]}
        scores = search.scores({"as before": chosen} | candidates, samples=_SEARCH_SAMPLES)
        trials.append({"others": dict(chosen), "block": name, "scores": scores})
        timing.say(f"{implementation} {case} {dtype} {name}: {_in_words(scores)}")
        best = _best(scores)
        unchanged += 1
        if best != "as before":
            chosen, unchanged = candidates[best], 1
    result = {"implementation": implementation, "case": case, "dtype": dtype, "trials": trials}
    if chosen:
        final = search.scores({"start": {}, "chosen": chosen}, samples=_FINAL_SAMPLES)
        result |= {"chosen": chosen, "score": final["chosen"]}
        if _best(final) == "chosen":
            keep(implementation, case, dtype, chosen)
            return result | {"kept": chosen}
    return result | {"kept": None}


def keep(implementation: str, case: str, dtype: str, sizes: Sizes) -> None:
    """Writes sizes of a case into tuned.json; every other entry stays."""
    file = blocks.TUNED_FILE
    table = json.loads(file.read_text())
    op = f"selective_scan/{implementation}"
    cases = table.setdefault(dispatch.device_kind(), {}).setdefault(op, {})
    key = blocks.case_key(vars(SCAN_CASES[case]), dtype)
    cases[key] = cases.get(key, {}) | sizes
    part = file.with_name(file.name + ".part")
    part.write_text(json.dumps(table, indent=1) + "\n")
    os.replace(part, file)
    blocks._tuned.cache_clear()


def _best(scores: Mapping[str, float | str]) -> str:
    """The fastest, or the first, to which scores are relative, where the gain is too small."""
    times = {name: score for name, score in scores.items() if isinstance(score, float)}
    best = min(times, key=lambda name: times[name])
    return best if times[best] < 1 - LEAST_GAIN else next(iter(times))


def _in_words(scores: Mapping[str, float | str]) -> str:
    return ", ".join(
        f"{name} {score:.3f}" if isinstance(score, float) else f"{name} refused"
        for name, score in scores.items()
    )
