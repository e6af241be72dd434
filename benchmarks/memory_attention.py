"""Checks attention over three memories against float64, and times it beside its peers.

    python -m benchmarks.memory_attention --output results/kernels/attention.json
    python -m benchmarks.memory_attention --output results/kernels/attention.json --draw
    python -m benchmarks.memory_attention --output tuning.json --tune

For every length, head width and size of the memory: implementations of `memory_attention`, and the
peers of `attention_peers`, which have no eidetic memory. Each forward alone, and backward alone
from what the forward pass saved. Errors are relative root mean squares against the "xla"
implementation in float64 on the same rounded inputs (the tests hold that against the definition),
of the output and of every gradient; what is wrong has no time. Peers are checked up to
`--checked_length`.

Times are medians of at least 20 samples. TFLOP/s are useful ones: 4 K operations for each key that
a query really sees, by head, and 2.5 times as many backward. Memories are full.

The JSON is written after every case: a run that is cut off loses none. The exit status is 1 if
anything was wrong.
"""

import functools
import importlib
import itertools
import json
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags

from benchmarks import attention_peers, attention_tuning, scan_accuracy, timing
from benchmarks.attention_programs import (
    LIMIT,
    Exact,
    Inputs,
    backward,
    differentiated,
    draw_inputs,
    errors,
    ours,
    results,
    useful_flops,
)
from benchmarks.record import Record
from pallas_kernels import dispatch
from pallas_kernels.memory_attention import api
from pallas_kernels.shapes import AttentionShape

PEERS = attention_peers.NAMES
KINDS = ("forward", "backward")

_OUTPUT = flags.DEFINE_string("output", None, "JSON to write, or to draw.", required=True)
_IMPLEMENTATIONS = flags.DEFINE_list(
    "implementations", None, "By default those that are made for the platform."
)
_PEERS = flags.DEFINE_list("peers", list(PEERS), "To measure beside them; only on NVIDIA GPUs.")
_LENGTHS = flags.DEFINE_list("lengths", ["2048", "8192", "32768"], "L.")
_WIDTHS = flags.DEFINE_list("widths", ["128", "64"], "K.")
_MEMORIES = flags.DEFINE_list("memories", ["0", "64"], "M.")
_HEADS = flags.DEFINE_integer("heads", 16, "H.")
_KEY_HEADS = flags.DEFINE_integer("key_heads", 16, "G.")
_WINDOW = flags.DEFINE_integer("window", 512, "W.")
_FADING = flags.DEFINE_integer("fading_window", 512, "F.")
_CHUNK = flags.DEFINE_integer("chunk", 256, "C.")
_CHECKED = flags.DEFINE_integer("checked_length", 8192, "Largest L at which peers are checked.")
_SAMPLES = flags.DEFINE_integer("samples", 20, "Of each time.", lower_bound=2)
_COMMIT = flags.DEFINE_string("commit", "", "Of the code that runs, for the record.")
_TUNE = flags.DEFINE_bool("tune", False, "Search block sizes for the cases.")
_TUNE_SECONDS = flags.DEFINE_float("tune_seconds", 480, "After which the search ends.")
_DRAW = flags.DEFINE_bool("draw", False, "Make a figure, .svg and .png, beside the JSON.")


class Timed:
    """One case: the programs of implementations and of the peers in JAX."""

    def __init__(self, shape: AttentionShape, names: Sequence[str]):
        self.shape = shape
        self.like = jax.eval_shape(functools.partial(self.draw, 0))
        attends = {name: ours(name, shape) for name in names if name not in PEERS}
        attends |= {
            name: attention_peers.through_cudnn(name, shape.window, shape.fading_window)
            for name in names
            if name in attention_peers.CUDNN
        }
        self.made = {name: jax.jit(attend) for name, attend in attends.items()}
        self.saving = {name: jax.jit(differentiated(attend)) for name, attend in attends.items()}

    def draw(self, seed: int) -> Inputs:
        return draw_inputs(jax.random.key(seed), shape=self.shape)

    def lower(self) -> list[Callable[[], Any]]:
        """What is to be compiled."""

        def lower_backward(name: str) -> Any:
            _, pull = self.saving[name].eval_shape(self.like.operands)
            return backward.lower(pull, self.like.do_BLHK)

        forward = [*self.made.values(), *self.saving.values()]
        return [functools.partial(program.lower, self.like.operands) for program in forward] + [
            functools.partial(lower_backward, name) for name in self.saving
        ]

    def measure(self) -> tuple[list[dict[str, Any]], Exact]:
        """One row for each name and kind; and what they should give."""
        shape, first = self.shape, self.draw(0)
        sets = timing.number_of_sets(timing.nbytes(first))
        inputs = [first, *map(self.draw, range(1, sets))]
        exact, rows = Exact(shape, first), []
        jobs: dict[tuple[str, str], timing.Job] = {}
        row_of: dict[tuple[str, str], dict[str, Any]] = {}
        for name, saving in self.saving.items():
            row: dict[str, Any] = dict(implementation=name, L=shape.L, K=shape.K, M=shape.eidetic)
            try:
                if name not in PEERS or shape.L <= _CHECKED.value:
                    row["errors"] = errors(results(saving, first), exact.of(name))
                    if not max(row["errors"].values()) <= LIMIT:
                        row["wrong"] = f"errors above {LIMIT}: {row['errors']}"
            except Exception as error:
                row["wrong"] = scan_accuracy.in_short(error)
            if "wrong" in row:
                rows.append(row)
                continue
            saved = [saving(one.operands)[1] for one in inputs]
            gradients = [one.do_BLHK for one in inputs]
            jobs[name, "forward"] = timing.Job(self.made[name], [(one.operands,) for one in inputs])
            jobs[name, "backward"] = timing.Job(backward, [*zip(saved, gradients, strict=True)])
            for kind in KINDS:
                row_of[name, kind] = {**row, "kind": kind}
        for (name, kind), times in timing.measure(jobs, samples=_SAMPLES.value).items():
            row_of[name, kind] |= times.record()
        return with_speed([*rows, *row_of.values()], shape), exact


def with_speed(rows: list[dict[str, Any]], shape: AttentionShape) -> list[dict[str, Any]]:
    for row in rows:
        if "ms" in row:
            flops = useful_flops(row["kind"], row["implementation"], shape)
            row["useful_tflops"] = 1e-9 * flops / row["ms"]
    return rows


def measure_flex(exact: Exact) -> list[dict[str, Any]]:
    """FlexAttention's rows; what went wrong, if it does not run here."""
    shape = exact.shape
    row: dict[str, Any] = {"implementation": "flex", "L": shape.L, "K": shape.K, "M": shape.eidetic}
    try:
        torch = importlib.import_module("torch")
        attend, draw = attention_peers.flex(
            (shape.B, shape.L, shape.H, shape.G, shape.K), shape.window, shape.fading_window
        )
        if shape.L <= _CHECKED.value:
            row["errors"] = errors(_flex_results(attend, exact), exact.of("flex"))
            if not max(row["errors"].values()) <= LIMIT:
                return [row | {"wrong": f"errors above {LIMIT}: {row['errors']}"}]
        sets = [draw(seed) for seed in range(3)]
        outputs = [attend(*one) for one in sets]
        gradients = [torch.randn_like(o) for o in outputs]

        def forward(i: int) -> None:
            with torch.no_grad():
                attend(*sets[i])

        def backward(i: int) -> None:
            torch.autograd.grad(outputs[i], sets[i], gradients[i], retain_graph=True)

        rows = []
        for kind, run in (("forward", forward), ("backward", backward)):
            rows.append(row | {"kind": kind} | _torch_timing(torch, run, len(sets)).record())
        return rows
    except Exception as error:
        return [row | {"wrong": scan_accuracy.in_short(error)}]


def _torch_timing(torch: Any, run: Callable[[int], None], sets: int) -> timing.Timing:
    """As `timing.measure` does it: a sample is some 10 ms of calls that walk through the sets."""

    def sample(calls: int) -> tuple[float, float]:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for call in range(calls):
            run(call % sets)
        host = time.perf_counter() - start
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / calls, host / calls

    sample(3)
    calls = max(sets, int(0.01 / sample(sets)[0]))
    sample(calls)
    times = timing.summary([sample(calls) for _ in range(_SAMPLES.value)], calls)
    if not times.host_bound:
        return times
    profiler = importlib.import_module("torch.profiler")
    with profiler.profile(activities=[profiler.ProfilerActivity.CUDA]) as profile:
        sample(calls)
    microseconds = sum(event.self_device_time_total for event in profile.key_averages())
    return times._replace(device=1e-6 * microseconds / calls or None)


def _flex_results(attend: Callable[..., Any], exact: Exact) -> dict[str, np.ndarray]:
    torch = importlib.import_module("torch")
    x, do = exact.inputs
    assert x.fading is not None

    def tensor(*parts: jax.Array) -> Any:
        values = np.concatenate([np.asarray(v, np.float32) for v in parts], axis=1)
        tensor = torch.from_numpy(values).to("cuda", torch.bfloat16).transpose(1, 2)
        return tensor.contiguous().requires_grad_()

    q, k, v = tensor(x.q_BLHK), tensor(x.k_BLGK, x.fading[0]), tensor(x.v_BLGK, x.fading[1])
    o = attend(q, k, v)
    gradients = torch.autograd.grad(o, (q, k, v), tensor(do).detach())
    o, dq, dk, dv = (
        t.detach().transpose(1, 2).float().cpu().numpy().astype(np.float64) for t in (o, *gradients)
    )
    L = q.shape[2]
    return {
        "o": o,
        "d q": dq,
        "d k": dk[:, :L],
        "d fading_k": dk[:, L:],
        "d v": dv[:, :L],
        "d fading_v": dv[:, L:],
    }


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Milliseconds and useful TFLOP/s by implementation."""
    lines = [
        f"{'L, K, M':<20}{'':<16}" + "".join(f"{k:>12} ms  TFLOP/s" for k in KINDS) + "   error"
    ]
    by: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        key = (row["L"], row["K"], row["M"], row["implementation"])
        by.setdefault(key, {})[row.get("kind", "wrong")] = row
    for (L, K, M, name), of in by.items():
        text = "".join(
            f"{of[kind]['ms']:>15.3f}{of[kind]['useful_tflops']:>9.0f}"
            if "ms" in of.get(kind, {})
            else f"{'-':>15}{'-':>9}"
            for kind in KINDS
        )
        error = max(
            (e for row in of.values() for e in row.get("errors", {}).values()), default=None
        )
        shown = "" if error is None else f"{error:>8.1e}"
        lines.append(f"{f'{L}, {K}, {M}':<20}{name:<16}{text}{shown}")
    return lines


def draw(content: Mapping[str, Any], path: pathlib.Path) -> None:
    """Useful TFLOP/s over L, by kind and K."""
    from matplotlib.figure import Figure

    rows = [row for row in content["rows"] if "ms" in row]
    widths = sorted({row["K"] for row in rows})
    figure = Figure(figsize=(5 * len(KINDS), 3.4 * len(widths) + 0.6), layout="constrained")
    panels = figure.subplots(len(widths), len(KINDS), squeeze=False, sharex=True)
    series = list(dict.fromkeys((row["implementation"], row["M"]) for row in rows))
    handles: dict[str, Any] = {}
    for (K, kind), axes in zip(itertools.product(widths, KINDS), panels.flat, strict=True):
        for number, (name, M) in enumerate(series):
            points = sorted(
                (row["L"], row["useful_tflops"])
                for row in rows
                if (row["K"], row["kind"], row["implementation"], row["M"]) == (K, kind, name, M)
            )
            if points:
                (line,) = axes.plot(*zip(*points, strict=True), "o-", color=f"C{number}")
                handles.setdefault(f"{name}, M = {M}", line)
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.set_title(f"{kind}, K = {K}")
        axes.set_xlabel("L")
        axes.set_ylabel("useful TFLOP/s")
        axes.grid(alpha=0.3)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
    figure.suptitle(f"Attention over three memories on {content['device']}")
    for suffix in (".svg", ".png"):
        figure.savefig(path.with_suffix(suffix), dpi=130)


def main(argv: list[str]) -> None:
    del argv
    output = pathlib.Path(_OUTPUT.value)
    if _DRAW.value:
        draw(json.loads(output.read_text()), output)
        return
    unknown = [name for name in _PEERS.value if name not in PEERS]
    if unknown:
        raise app.UsageError(f"--peers: {unknown} must be of {PEERS}")
    peers = _PEERS.value if "NVIDIA" in dispatch.device_kind() else []
    names = _IMPLEMENTATIONS.value or dispatch.preferred(api.IMPLEMENTATIONS)
    shapes = [
        AttentionShape(
            B=1,
            L=int(L),
            H=_HEADS.value,
            G=_KEY_HEADS.value,
            K=int(K),
            window=_WINDOW.value,
            fading_window=_FADING.value,
            eidetic=int(M),
            chunk=_CHUNK.value,
        )
        for K, L, M in itertools.product(_WIDTHS.value, _LENGTHS.value, _MEMORIES.value)
    ]
    record = Record(output, "memory_attention", _COMMIT.value)
    if _TUNE.value:
        attention_tuning.tune_all(names, shapes, record, seconds=_TUNE_SECONDS.value)
        return
    rows: list[dict[str, Any]] = []

    def add(measured: list[dict[str, Any]]) -> None:
        rows.extend(measured)
        record.add("rows", rows)
        timing.say("\n".join(table(measured)))

    # Peers have no eidetic memory: once is enough.
    beside = [[] if shape.eidetic else peers for shape in shapes]
    cases = [
        Timed(shape, [*names, *(name for name in also if name != "flex")])
        for shape, also in zip(shapes, beside, strict=True)
    ]
    # All at once, on all cores. What fails fails again below.
    lower = [one for case in cases for one in case.lower()]
    timing.say(f"compiling {len(lower)} programs")
    timing.compile_all(lower)
    with timing.turn():
        flex: list[Exact] = []
        for case, also in timing.progress([*zip(cases, beside, strict=True)], unit="case"):
            measured, exact = case.measure()
            add(measured)
            if "flex" in also:
                flex.append(exact)
        # At the end: JAX's profiler does not start again where PyTorch's has been.
        for exact in flex:
            add(with_speed(measure_flex(exact), exact.shape))
    wrong = [row for row in rows if "wrong" in row]
    if wrong:
        raise SystemExit("\n".join(["wrong, and therefore not timed:", *map(str, wrong)]))


if __name__ == "__main__":
    app.run(main)
