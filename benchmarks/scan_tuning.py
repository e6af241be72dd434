"""Block sizes of the selective scan: what `tuning` searches among.

The score is the mean of two ratios of times, forward alone and both passes.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax

from benchmarks import scan_accuracy, scan_programs, timing, tuning
from benchmarks.scan_programs import Inputs, Kind
from benchmarks.tuning import Sizes
from pallas_kernels import blocks
from pallas_kernels.shapes import SCAN_CASES

_KINDS: tuple[Kind, ...] = ("forward", "forward_backward")


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
            ratios = [times[name, kind].seconds / times[first, kind].seconds for kind in _KINDS]
            return sum(ratios) / len(ratios)

        return refused | {name: score(name) for name in choices if name not in refused}


def tune(implementation: str, case: str, dtype: str, *, seconds: float) -> dict[str, Any]:
    """See `tuning.tune`."""
    return tuning.tune(
        Search(implementation, case, dtype),
        scan_programs.backend_of(implementation).TUNABLE,
        op=f"selective_scan/{implementation}",
        key=blocks.case_key(vars(SCAN_CASES[case]), dtype),
        seconds=seconds,
    )
