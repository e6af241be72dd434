"""Searches block sizes of an operation and keeps what is faster in `tuned.json`.

A backend with block sizes worth tuning has `TUNABLE: Mapping[str, tuple[int, ...]]`, block name to
candidates, and asks `blocks.choose` for them. The search starts from the sizes that are in use and
changes one at a time: all candidates of a name are compiled at once, those whose results are right
are timed in turns with the sizes chosen so far, and the best is taken. The names are gone through
again until nothing improves or time is up. At last the choice is measured once more against the
start, and kept if it still is faster.
"""

import itertools
import json
import os
import time
from collections.abc import Mapping
from typing import Any, Protocol

from benchmarks import timing
from pallas_kernels import blocks, dispatch

Sizes = dict[str, int]
# An entry must be worth its line: the least gain over what is there.
LEAST_GAIN = 0.02
_SEARCH_SAMPLES, _FINAL_SAMPLES = 7, 25


class Search(Protocol):
    """One case of an operation."""

    def scores(self, choices: Mapping[str, Sizes], *, samples: int) -> dict[str, float | str]:
        """Times of every choice relative to the first, which must work; or why it has none."""
        ...


def tune(
    search: Search,
    tunable: Mapping[str, tuple[int, ...]],
    *,
    op: str,
    key: str,
    seconds: float,
) -> dict[str, Any]:
    """Searches for `seconds`; keeps what is faster, and returns everything that was tried.

    Args:
      op: "operation/implementation", as in `blocks.choose`.
      key: `blocks.case_key` of the case.
    """
    end = time.monotonic() + seconds
    chosen: Sizes = {}
    trials: list[dict[str, Any]] = []
    unchanged = 0
    for name in itertools.cycle(tunable):
        if unchanged == len(tunable) or time.monotonic() > end:
            break
        candidates = {str(size): chosen | {name: size} for size in tunable[name]}
        scores = search.scores({"as before": chosen} | candidates, samples=_SEARCH_SAMPLES)
        trials.append({"others": dict(chosen), "block": name, "scores": scores})
        timing.say(f"{op} {key} {name}: {_in_words(scores)}")
        best = _best(scores)
        unchanged += 1
        if best != "as before":
            chosen, unchanged = candidates[best], 1
    result: dict[str, Any] = {"op": op, "case": key, "trials": trials}
    if chosen:
        final = search.scores({"start": {}, "chosen": chosen}, samples=_FINAL_SAMPLES)
        result |= {"chosen": chosen, "score": final["chosen"]}
        if _best(final) == "chosen":
            keep(op, key, chosen)
            return result | {"kept": chosen}
    return result | {"kept": None}


def keep(op: str, key: str, sizes: Sizes) -> None:
    """Writes sizes of a case into tuned.json; every other entry stays."""
    file = blocks.TUNED_FILE
    table = json.loads(file.read_text())
    cases = table.setdefault(dispatch.device_kind(), {}).setdefault(op, {})
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
