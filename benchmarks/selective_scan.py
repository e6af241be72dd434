"""Checks every implementation of the selective scan against float64, and only then times it.

    python -m benchmarks.selective_scan --output results/kernels/scan.json
    python -m benchmarks.selective_scan --output results/kernels/scan.json --draw
    python -m benchmarks.selective_scan --output tuning.json --tune

First the hard inputs of `scan_accuracy`, in every dtype: an implementation that gets one wrong is
not timed in that dtype. Then for every case, dtype and variant the programs of `scan_programs`:
compiled, run on random inputs, each of their results compared with float64, run again and compared
bit for bit, and timed together, in turns. A program with a wrong result has no time.

Times are medians of at least 20 samples, in ms and in ps per element: one element is one channel
at one time of one row. Floors stand beside them: that of the arithmetic on the device, and that of
memory, the bytes that must move at the speed of a copy measured in the same run. The CUDA kernel of
state-spaces/mamba stands for what was the best before.

The JSON holds every error and time and is written after every case: a run that is cut off loses
none. `--draw` makes a figure from it. `--tune` searches block sizes instead, and
keeps what is faster in `pallas_kernels/tuned.json`. The exit status is 1 if anything was wrong.
"""

import functools
import itertools
import json
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from absl import app, flags

from benchmarks import scan_accuracy, scan_programs, scan_tuning, timing
from benchmarks.record import Record
from benchmarks.scan_programs import KINDS, VARIANTS, Inputs, Kind
from pallas_kernels import Unsupported, dispatch
from pallas_kernels.selective_scan import api
from pallas_kernels.shapes import SCAN_CASES

Lower = Callable[[], Any]
_KEY = ("implementation", "case", "dtype", "variant", "kind")
_TIMED = [name for name, shape in SCAN_CASES.items() if shape.L * shape.E >= 2**18]

_OUTPUT = flags.DEFINE_string("output", None, "JSON to write, or to draw.", required=True)
_IMPLEMENTATIONS = flags.DEFINE_list(
    "implementations",
    None,
    "By default those that are made for the platform. Others run where they can (interpreted on a "
    'CPU); "reference" is checked on the hard inputs and never timed.',
)
_CASES = flags.DEFINE_list("cases", _TIMED, f"Timed shapes, of {list(SCAN_CASES)}.")
_DTYPES = flags.DEFINE_list("dtypes", ["bfloat16"], "Timed, of bfloat16 and float32.")
_VARIANTS = flags.DEFINE_list("variants", list(VARIANTS), "Timed.")
_KINDS = flags.DEFINE_list("kinds", list(KINDS), "Timed programs.")
_HARD = flags.DEFINE_list(
    "hard", list(scan_accuracy.HARD_CASES), "Hard inputs, checked in both dtypes; empty: none."
)
_SAMPLES = flags.DEFINE_integer("samples", 20, "Of each time.", lower_bound=2)
_COMMIT = flags.DEFINE_string("commit", "", "Of the code that runs, for the record.")
_DRAW = flags.DEFINE_bool("draw", False, "Make a figure, .svg and .png, beside the JSON.")
_TUNE = flags.DEFINE_bool("tune", False, "Search block sizes for the cases and dtypes.")
_TUNE_SECONDS = flags.DEFINE_float("tune_seconds", 480, "After which the search ends.")

# Milliseconds of state-spaces/mamba's CUDA kernel (selective_scan_cuda, bfloat16, N = 16, with
# softplus, skip and gate) on an H100 80GB, torch 2.11, CUDA 13.0: medians, random inputs.
CUDA_PEER: Mapping[str, Mapping[str, float]] = {
    "b8_l2048_e4096": {"forward": 1.168, "backward": 4.790},
    "b1_l2048_e4096": {"forward": 0.163, "backward": 0.736},
    "b1_l16384_e4096": {"forward": 1.511, "backward": 5.479},
    "b8_l2048_e1536": {"forward": 0.452, "backward": 1.847},
}


def usable(implementations: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Those that the device takes, and why not the others."""
    like = jax.eval_shape(
        lambda key: scan_programs.draw(key, shape=SCAN_CASES["primes"], dtype="float32"),
        jax.random.key(0),
    )
    refused = {}
    for name in implementations:
        try:
            jax.eval_shape(
                lambda inputs, name=name: scan_programs.outputs_and_gradients(
                    inputs, implementation=name
                ),
                like,
            )
        except Unsupported as error:
            refused[name] = str(error)
    return [name for name in implementations if name not in refused], refused


class Hard:
    """The hard inputs, and their programs."""

    def __init__(self, implementations: Sequence[str], cases: Sequence[str]):
        self.implementations = implementations
        self.inputs = {
            (case, dtype): scan_accuracy.draw_hard(scan_accuracy.HARD_CASES[case], dtype, seed)
            for seed, case in enumerate(cases)
            for dtype in scan_accuracy.LIMITS
        }
        self.run: Any = jax.jit(
            scan_programs.outputs_and_gradients, static_argnames="implementation"
        )

    def lower(self) -> list[Lower]:
        """What is to be compiled; cases of one shape share programs."""
        shared: dict[Any, Lower] = {}
        for (case, dtype), one in self.inputs.items():
            shape = scan_accuracy.HARD_CASES[case].shape
            shared[shape, dtype, ""] = functools.partial(scan_accuracy.lower_exact, one)
            for name in self.implementations:
                lower = functools.partial(self.run.lower, one, implementation=name)
                shared[shape, dtype, name] = lower
        return list(shared.values())

    def check(self) -> list[dict[str, Any]]:
        """Errors, one row for each implementation, case and dtype."""
        rows = []
        for (case, dtype), one in timing.progress(list(self.inputs.items()), unit="hard input"):
            want = scan_accuracy.exact(one)
            for name in self.implementations:
                row: dict[str, Any] = {"implementation": name, "case": case, "dtype": dtype}
                try:
                    got = self.run(one, implementation=name)
                    row |= scan_accuracy.judge(scan_accuracy.errors(got, want), dtype)
                except Exception as error:
                    row["wrong"] = scan_accuracy.in_short(error)
                rows.append(row)
        return rows


class Timed:
    """One case, dtype and variant: a row and a program for each implementation and kind."""

    def __init__(self, case: str, dtype: str, variant: Any, implementations: Sequence[str]):
        self.case, self.dtype, self.variant = case, dtype, variant
        self.like = jax.eval_shape(lambda: self.draw(0))
        self.rows: dict[tuple[str, Kind], dict[str, Any]] = {}
        self.made: dict[str, scan_programs.Programs] = {}
        kinds: Sequence[Any] = _KINDS.value
        for name in implementations:
            try:
                self.made[name] = scan_programs.programs(name, self.like)
                wrong = {}
            except Exception as error:
                wrong = {"wrong": scan_accuracy.in_short(error)}
            for kind in kinds:
                row = dict(case=case, dtype=dtype, variant=variant, implementation=name, kind=kind)
                self.rows[name, kind] = row | wrong

    def draw(self, seed: int) -> Inputs:
        inputs = scan_programs.draw(
            jax.random.key(seed), shape=SCAN_CASES[self.case], dtype=self.dtype
        )
        return scan_programs.as_variant(inputs, self.variant)

    def lower(self) -> list[Lower]:
        """What is to be compiled."""
        return [functools.partial(scan_accuracy.lower_exact, self.like)] + [
            functools.partial(
                getattr(self.made[name], kind).lower, *self.made[name].shapes(kind, self.like)
            )
            for name, kind in self.rows
            if name in self.made
        ]

    def leave_out(self, name: str) -> None:
        self.rows = {key: row for key, row in self.rows.items() if key[0] != name}

    def measure(self, copy: float) -> list[dict[str, Any]]:
        """Errors and times beside the floors.

        Args:
          copy: bytes per second that the device's memory can read and write.
        """
        shape, rows, made, first = SCAN_CASES[self.case], self.rows, self.made, self.draw(0)
        for (_, kind), row in rows.items():
            row |= floors(self.case, kind, self.like, copy)
        want = scan_accuracy.exact(first)
        for (name, kind), row in rows.items():
            if "wrong" not in row:
                row |= scan_accuracy.check(made[name], kind, first, want, self.dtype)
        del want

        sets = timing.number_of_sets(timing.nbytes(first))
        inputs = [first, *(self.draw(seed) for seed in range(1, sets))]
        jobs = {
            (name, kind): timing.Job(
                getattr(made[name], kind), [made[name].arguments(kind, one) for one in inputs]
            )
            for (name, kind), row in rows.items()
            if "wrong" not in row
        }
        for (name, kind), times in timing.measure(jobs, samples=_SAMPLES.value).items():
            per_element = 1 / scan_programs.elements(shape)
            rows[name, kind] |= {
                **times.record(),
                "ps": 1e12 * times.seconds * per_element,
                "saved_bytes_per_element": timing.nbytes(made[name].saved) * per_element,
            }
        return list(rows.values())


def floors(case: str, kind: Kind, inputs: Inputs, copy: float) -> dict[str, float | None]:
    """What a time is to be compared with, in ps per element."""
    shape = SCAN_CASES[case]
    ps = 1e12 / scan_programs.elements(shape)
    arithmetic = scan_programs.arithmetic_floor(kind, shape)
    peer = None
    if case in CUDA_PEER:
        passes = {"backward": ["backward"], "forward_backward": ["forward", "backward"]}
        peer = 1e-3 * sum(CUDA_PEER[case][one] for one in passes.get(kind, ["forward"]))
    return {
        "arithmetic_floor_ps": None if arithmetic is None else ps * arithmetic,
        "memory_floor_ps": ps * scan_programs.least_bytes(kind, inputs) / copy,
        "cuda_peer_ps": None if peer is None else ps * peer,
    }


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """ps per element of every implementation below the floors and the peer, by case."""
    kinds = [kind for kind in KINDS if any(row["kind"] == kind for row in rows)]
    lines = [
        f"{'ps per element':<42}"
        + "".join(f"{kind.replace('forward_', 'fwd_'):>13}" for kind in kinds)
        + f"{'saved B':>9}{'error':>9}{'same bits':>10}"
    ]

    def line(name: str, variant: str, of: Mapping[str, Any], field: str, end: str = "") -> str:
        figures = (of.get(kind, {}).get(field) for kind in kinds)
        text = "".join(f"{'-' if v is None else format(v, '.2f'):>13}" for v in figures)
        return f"  {name:<32}{variant:<8}{text}{end}"

    def group(row: Mapping[str, Any]) -> tuple[str, str]:
        return row["case"], row["dtype"]

    for (case, dtype), some in itertools.groupby(rows, key=group):
        lines.append(f"{case} {dtype}")
        members: dict[tuple[str, str], dict[str, Any]] = {}
        for row in some:
            members.setdefault((row["variant"], row["implementation"]), {})[row["kind"]] = row
        first = next(iter(members.values()))
        lines.append(line("floor of arithmetic", "", first, "arithmetic_floor_ps"))
        lines.append(line("floor of memory", "", first, "memory_floor_ps"))
        lines.append(line("CUDA, state-spaces/mamba", "", first, "cuda_peer_ps"))
        for (variant, name), of in members.items():
            errors = [e for row in of.values() for e in row.get("errors", {}).values()]
            same = all(row.get("same_bits_again") for row in of.values())
            saved = max(row.get("saved_bytes_per_element", 0) for row in of.values())
            error = max(errors, default=float("nan"))
            end = f"{saved:>9.2f}{error:>9.1e}{'yes' if same else 'NO':>10}"
            lines.append(line(name, variant, of, "ps", end))
    return lines


def wrong_in(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What was wrong, one line each."""
    return [
        " ".join(str(row[name]) for name in (*_KEY, "wrong") if name in row)
        for row in rows
        if "wrong" in row
    ]


def draw(content: Mapping[str, Any], path: pathlib.Path) -> None:
    """Bars of ps per element by case and implementation, with the floor and the peer."""
    from matplotlib.figure import Figure

    rows = [row for row in content["rows"] if "ms" in row]
    kinds = [kind for kind in KINDS if any(row["kind"] == kind for row in rows)]
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    size = (4.2 * len(kinds), 3.4 * len(dtypes) + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(dtypes), len(kinds), squeeze=False)
    handles: dict[str, Any] = {}
    for (dtype, kind), axes in zip(itertools.product(dtypes, kinds), panels.flat, strict=True):
        shown = [row for row in rows if (row["dtype"], row["kind"]) == (dtype, kind)]
        cases = list(dict.fromkeys(row["case"] for row in shown))
        series = sorted({(row["implementation"], row["variant"]) for row in shown})
        for row in shown:
            here, which = cases.index(row["case"]), (row["implementation"], row["variant"])
            offset = 0.8 * ((series.index(which) + 0.5) / len(series) - 0.5)
            bar = axes.bar(
                here + offset, row["ps"], 0.8 / len(series), color=f"C{series.index(which)}"
            )
            handles.setdefault(", ".join(which), bar)
            axes.bar_label(bar, fmt="%.3g", fontsize=6)
            if row["variant"] != rows[0]["variant"]:
                continue
            floor = max(row["arithmetic_floor_ps"] or 0, row["memory_floor_ps"])
            for label, ps, style in (("floor", floor, "-"), ("CUDA", row["cuda_peer_ps"], ":")):
                if ps is not None:
                    ends = (here - 0.45, here + 0.45)
                    handles[label] = axes.hlines(ps, *ends, color="black", linestyle=style)
        axes.set_yscale("log")
        axes.set_ylabel("ps per element")
        axes.set_title(f"{kind.replace('_', ' ')}, {dtype}")
        axes.set_xticks(range(len(cases)), [c.replace("_", "\n") for c in cases], fontsize=8)
        axes.grid(axis="y", alpha=0.3)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))
    figure.suptitle(f"Selective scan on {content['device']}")
    for suffix in (".svg", ".png"):
        figure.savefig(path.with_suffix(suffix), dpi=130)


def tune_all(implementations: Sequence[str], record: Record) -> None:
    """Searches block sizes of all that have any, in equal parts of the time."""
    tunable = [
        name
        for name in implementations
        if name != "reference" and getattr(scan_programs.backend_of(name), "TUNABLE", {})
    ]
    tasks = list(itertools.product(tunable, _CASES.value, _DTYPES.value))
    if not tasks:
        raise SystemExit(f"none of {implementations} has anything to tune")
    end, results = time.monotonic() + _TUNE_SECONDS.value, []
    for number, task in enumerate(timing.progress(tasks, unit="case")):
        seconds = (end - time.monotonic()) / (len(tasks) - number)
        try:
            result = scan_tuning.tune(*task, seconds=seconds)
        except Exception as error:  # the others are still worth the device's time
            result = {"task": task, "wrong": scan_accuracy.in_short(error)}
        results.append(result)
        record.add("tuning", results)
        timing.say(f"{' '.join(task)}: {result.get('wrong') or result['kept'] or 'nothing kept'}")


def check_names() -> None:
    for flag, known in (
        (_CASES, SCAN_CASES),
        (_DTYPES, scan_accuracy.LIMITS),
        (_VARIANTS, VARIANTS),
        (_KINDS, KINDS),
        (_HARD, scan_accuracy.HARD_CASES),
    ):
        unknown = [name for name in flag.value if name not in known]
        if unknown:
            raise app.UsageError(f"--{flag.name}: {unknown} must be of {list(known)}")


def main(argv: list[str]) -> None:
    del argv
    check_names()
    output = pathlib.Path(_OUTPUT.value)
    if _DRAW.value:
        draw(json.loads(output.read_text()), output)
        return
    implementations, refused = usable(
        _IMPLEMENTATIONS.value or dispatch.preferred(api.IMPLEMENTATIONS)
    )
    record = Record(output, "selective_scan", _COMMIT.value, limits=scan_accuracy.LIMITS)
    record.add("not_usable", refused)
    for name, reason in refused.items():
        timing.say(f"{name} is not usable here: {reason}")
    if _TUNE.value:
        tune_all(implementations, record)
        return

    checked = Hard(implementations, _HARD.value)
    named = [name for name in implementations if name != "reference"]
    groups = [
        Timed(*group, named)
        for group in itertools.product(_CASES.value, _DTYPES.value, _VARIANTS.value)
    ]
    # All at once, on all cores: a program takes seconds to minutes. What fails fails again below.
    lower = [*checked.lower(), *(one for group in groups for one in group.lower())]
    timing.say(f"compiling {len(lower)} programs")
    timing.compile_all(lower)
    with timing.turn():
        measure_all(checked, groups, implementations, named, record)


def measure_all(
    checked: Hard,
    groups: Sequence[Timed],
    implementations: Sequence[str],
    named: Sequence[str],
    record: Record,
) -> None:
    """Fills the record; the process ends with status 1 if anything was wrong."""
    hard = checked.check()
    record.add("hard", hard)
    for name, dtype in itertools.product(implementations, scan_accuracy.LIMITS):
        of = [row for row in hard if (row["implementation"], row["dtype"]) == (name, dtype)]
        errors = [e for row in of for e in row.get("errors", {}).values()]
        if errors:
            timing.say(f"hard inputs: {name} {dtype}: worst error {max(errors):.1e}")
    failed = {(row["implementation"], row["dtype"]) for row in hard if "wrong" in row}
    # Not first: a device that has just started is slower.
    copy = timing.copied_bytes_per_second(samples=_SAMPLES.value)
    record.add("copied_bytes_per_second", copy)
    rows: list[dict[str, Any]] = []
    failures: list[str] = []
    for group in timing.progress(groups, unit="case"):
        for name in named:
            if (name, group.dtype) in failed:
                group.leave_out(name)
        try:
            measured = group.measure(copy)
        except Exception as error:  # the other cases are still worth the device's time
            what = f"{group.case} {group.dtype} {group.variant}"
            failures.append(f"{what}: {scan_accuracy.in_short(error)}")
            record.add("failures", failures)
            continue
        rows += measured
        record.add("rows", rows)
        timing.say("\n".join(table(measured)))
    print("\n".join(["", *table(rows)]), flush=True)
    slow = [" ".join(row[n] for n in _KEY) for row in rows if row.get("host_bound")]
    if slow:
        print("the host's time, not the device's:", *slow, sep="\n", flush=True)
    wrong = [*wrong_in([*hard, *rows]), *failures]
    if wrong:
        raise SystemExit("\n".join(["wrong, and therefore not timed:", *wrong]))


if __name__ == "__main__":
    app.run(main)
