"""Device time of jitted functions: rotated buffers, interleaved samples, medians.

A sample enqueues many calls and waits once, so that the device and not the host sets its time.
Calls walk through several sets of arguments, and as many results are kept, so that neither lies in
the device's cache when its turn comes. The samples of all jobs alternate: a drift of clocks or
temperature hits every job alike. Where a call is so short that the host cannot keep up, its time is
that of its kernels in a profile, the median over calls.
"""

import collections
import contextlib
import fcntl
import math
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import profiling

# Three times the 50 MB second-level cache of an H100. More sets than _MOST_SETS are pointless:
# what is that small is bound by launches, not by memory.
ROTATED_BYTES = 150e6
_MOST_SETS = 8
_SAMPLE_SECONDS = 0.01
_MOST_CALLS = 256
_WARM_ROUNDS = 3
_PROFILED_CALLS = 24
# Calls after which the host's time is read: runtimes block once some 30 are in flight.
_HOST_CALLS = 16
_COPIED_VALUES = 2**26  # of float32
_WARM_SECONDS = 1.0


class Job(NamedTuple):
    """A jitted function, and the sets of arguments that its calls walk through."""

    function: Any
    arguments: Sequence[tuple[Any, ...]]


class Timing(NamedTuple):
    """Seconds per call: the median and the quartiles of samples of `calls` calls each."""

    median: float
    low: float
    high: float
    samples: int
    calls: int
    host: float  # to enqueue a call; close to the median, it hides the device's time
    device: float | None = None  # of its kernels in a profile, where the host's time hides it

    @property
    def seconds(self) -> float:
        """Of the device, if there is anything to tell it by."""
        return self.median if self.device is None else self.device

    @property
    def host_bound(self) -> bool:
        return self.host > 0.8 * self.median

    def record(self) -> dict[str, Any]:
        """For JSON, in milliseconds."""
        return {
            "ms": 1e3 * self.seconds,
            "wall_ms": 1e3 * self.median,
            "quartiles_ms": [1e3 * self.low, 1e3 * self.high],
            "samples": self.samples,
            "calls_per_sample": self.calls,
            "host_ms": 1e3 * self.host,
            "host_bound": self.host_bound,
            "from_profile": self.device is not None,
        }


class _Sampler:
    """Samples of one job."""

    def __init__(self, job: Job):
        self.job = job
        self.kept = collections.deque[Any](maxlen=len(job.arguments))
        self.calls = 1
        self.sample()
        self.calls = len(job.arguments)
        seconds, _ = self.sample()
        wanted = math.ceil(_SAMPLE_SECONDS / seconds)
        self.calls = min(_MOST_CALLS, max(len(job.arguments), wanted))

    def sample(self) -> tuple[float, float]:
        """Seconds per call, all and of the host alone."""
        function, arguments = self.job
        early, host = min(self.calls, _HOST_CALLS), 0.0
        start = time.perf_counter()
        for number in range(self.calls):
            self.kept.append(function(*arguments[number % len(arguments)]))
            if number + 1 == early:
                host = time.perf_counter() - start
        jax.block_until_ready(self.kept[-1])
        return (time.perf_counter() - start) / self.calls, host / early

    def device_seconds(self) -> float | None:
        """Of a call's kernels; None if the profile has none."""
        function, arguments = self.job
        rounds = -(-_PROFILED_CALLS // len(arguments))
        results: list[Any] = []

        def run() -> Any:
            for _ in range(rounds):
                results[:] = [function(*one) for one in arguments]
            return results

        seconds = [duration for _, duration in profiling.kernels(run)]
        count, more = divmod(len(seconds), rounds * len(arguments))
        if not count or more:  # not as many for each call
            return sum(seconds) / (rounds * len(arguments)) or None
        return statistics.median(sum(seconds[i : i + count]) for i in range(0, len(seconds), count))


_turns: list[int] = []  # of this process, each within the one before; the first has the open file


@contextlib.contextmanager
def turn() -> Iterator[None]:
    """Benchmarks may compile side by side; within this a process measures alone.

    Of the processes of a machine that see the same GPUs, those that use neither this nor
    `compiling` are not kept from using them."""
    _turns.append(_turns[0] if _turns else _locked(fcntl.LOCK_EX))
    try:
        yield
    finally:
        file = _turns.pop()
        if not _turns:
            os.close(file)


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Not while another process measures: compilers of GPU programs try them out on the device.

    Whatever else a benchmark runs there belongs in this or in its turn."""
    if _turns:
        yield
        return
    file = _locked(fcntl.LOCK_SH)
    try:
        yield
    finally:
        os.close(file)


def _locked(kind: int) -> int:
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", "all").replace("/", "_")
    path = pathlib.Path(tempfile.gettempdir(), f"bmojo_jax-{os.getuid()}-measures-on-{devices}")
    file = os.open(path, os.O_CREAT | os.O_RDWR)
    fcntl.flock(file, kind)
    return file


def measure[Name](jobs: Mapping[Name, Job], *, samples: int) -> dict[Name, Timing]:
    """Times every job. All have run before the first sample, so none compiles in it."""
    with turn():
        samplers = {name: _Sampler(job) for name, job in jobs.items()}
        measured: dict[Name, list[tuple[float, float]]] = {name: [] for name in jobs}
        for number in range(_WARM_ROUNDS + samples):
            for name, sampler in samplers.items():
                seconds = sampler.sample()
                if number >= _WARM_ROUNDS:
                    measured[name].append(seconds)
        times = {name: summary(values, samplers[name].calls) for name, values in measured.items()}
        for name, timing in times.items():
            if timing.host_bound and jax.default_backend() == "gpu":
                times[name] = timing._replace(device=samplers[name].device_seconds())
    return times


def summary(values: Sequence[tuple[float, float]], calls: int) -> Timing:
    """Of samples: seconds per call, all and of the host alone."""
    seconds, host = zip(*values, strict=True)
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return Timing(median, low, high, len(seconds), calls, statistics.median(host))


def compile_all(lower: Iterable[Callable[[], Any]]) -> list[BaseException | None]:
    """Compiles what the functions lower, on all cores; says of each what failed, if anything.

    A later call of the jitted function finds its program compiled. Tracing takes turns, only the
    compiler runs in threads.
    """

    def start(lower_one: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future = pool.submit(lower_one().compile)
        except Exception as error:
            future.set_exception(error)
        return future

    with compiling(), ThreadPoolExecutor() as pool:
        running = [start(lower_one) for lower_one in lower]
        return [future.exception() for future in running]


def copied_bytes_per_second(*, samples: int) -> float:
    """Read and written, of a copy that is far larger than any cache: what memory can do."""
    with turn():
        sets = [(jnp.full(_COPIED_VALUES, value, jnp.float32),) for value in (1.0, 2.0)]
        job = Job(jax.jit(lambda v: -v), sets)
        warm = time.monotonic() + _WARM_SECONDS  # a device that has just started is slower
        while time.monotonic() < warm:
            jax.block_until_ready([job.function(*one) for one in sets])
        return 2 * nbytes(sets[0]) / measure({"copy": job}, samples=samples)["copy"].seconds


def nbytes(tree: Any) -> int:
    """Bytes of all arrays, or shapes, in a tree."""
    return sum(v.size * v.dtype.itemsize for v in jax.tree.leaves(tree))


def number_of_sets(bytes_of_a_set: int) -> int:
    """How many sets of arguments it takes to exceed the cache; at least two."""
    return min(_MOST_SETS, max(2, math.ceil(ROTATED_BYTES / max(bytes_of_a_set, 1))))


def progress[T](items: Iterable[T], *, unit: str, total: int | None = None) -> Iterable[T]:
    """A progress bar, where tqdm is installed."""
    try:
        import tqdm
    except ImportError:
        return items
    return tqdm.tqdm(items, unit=unit, total=total, disable=None)


def say(line: str) -> None:
    """Prints a line without breaking the progress bar."""
    try:
        import tqdm
    except ImportError:
        print(line, flush=True)
    else:
        tqdm.tqdm.write(line)
