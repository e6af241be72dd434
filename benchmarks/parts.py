"""Parts of a layer as programs of their own: errors, times, and the least that they could take.

A part is a pure function of arrays that gradients reach and of constants that they do not. It is
timed forward, and forward with the gradients of everything. Floors: every argument and result moved
once at the speed of a copy, matrix products at the speed of a large bfloat16 product, both measured
in the same run; that of a whole is the sum of its parts'.

Nothing with a large error is timed: the largest relative one of an output or gradient against the
same program in float32, from the same rounded inputs and with weights that are not rounded.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks import scan_accuracy, timing

KINDS = ("forward", "forward_backward")
# Largest relative error with which a time is printed: roundings to bfloat16 of weights and of the
# values between the parts add up.
LIMIT = 3e-2

Arrays = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Part:
    """A function of inputs, which have gradients, and constants, which have none.

    Attributes:
      flops: of the matrix products in it, by kind.
      least_bytes: by kind, where not every argument must be read; otherwise all of them count.
      kinds: forward alone, if nothing has a gradient.
      least_seconds: by kind, of what else takes time whatever the program.
      exact: what must come out forward, if not what the function gives in float32: no error is
        allowed.
    """

    function: Callable[[Any, Any], Arrays]
    inputs: Any
    constants: Any = ()
    flops: Mapping[str, float] = dataclasses.field(default_factory=dict)
    least_bytes: Mapping[str, float] = dataclasses.field(default_factory=dict)
    kinds: Sequence[str] = KINDS
    least_seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    exact: Callable[[Any, Any], Arrays] | None = None


def of_modules(
    modules: Any,
    function: Callable[..., Arrays],
    *inputs: Any,
    constants: tuple[Any, ...] = (),
    **more: Any,
) -> Part:
    """function(modules, *inputs, *constants); the modules' weights become inputs."""
    graph, weights = nnx.split(modules)
    return Part(
        lambda inputs, constants: function(nnx.merge(graph, inputs[0]), *inputs[1:], *constants),
        (weights, *inputs),
        constants,
        **more,
    )


# From the implementation of kernels (None: the best) and a seed. Arrays are drawn when it is
# called: those of all parts of a long row would not fit beside each other.
MakePart = Callable[[str | None, int], Part]


class Speeds(NamedTuple):
    """Of this device: bytes of a copy, read and written, and operations of a product, by second."""

    copy: float
    product: float

    def floor(self, part: Part, kind: str) -> float:
        """Seconds."""
        moved = part.least_bytes.get(kind)
        if moved is None:
            moved = _moved_bytes(part, kind)
        arithmetic = part.flops.get(kind, 0) / self.product
        return max(moved / self.copy, arithmetic, part.least_seconds.get(kind, 0))


def speeds(product_side: int, samples: int) -> Speeds:
    """Measures both."""
    with timing.turn():
        keys = jax.random.split(jax.random.key(0), 4)
        matrices = [jax.random.normal(key, (product_side,) * 2, jnp.bfloat16) for key in keys]
        job = timing.Job(jax.jit(jnp.matmul), [tuple(matrices[:2]), tuple(matrices[2:])])
        seconds = timing.measure({"product": job}, samples=samples)["product"].seconds
        copy = timing.copied_bytes_per_second(samples=samples)
        return Speeds(copy, 2 * product_side**3 / seconds)


def product_flops(multiply_adds: float) -> dict[str, float]:
    """By kind, of products whose operands both have gradients."""
    return {"forward": 2 * multiply_adds, "forward_backward": 6 * multiply_adds}


def _moved_bytes(part: Part, kind: str) -> float:
    out = jax.eval_shape(part.function, part.inputs, part.constants)
    read_and_written = timing.nbytes((part.inputs, part.constants, out))
    if kind == "forward":
        return read_and_written
    return read_and_written + timing.nbytes((part.inputs, part.constants, out, part.inputs))


def _program(function: Callable[[Any, Any], Arrays], kind: str) -> Any:
    """(inputs, constants, gradients of the outputs) -> outputs, and gradients of the inputs."""
    if kind == "forward":
        return jax.jit(lambda inputs, constants, d_out: function(inputs, constants))

    def forward_backward(inputs: Any, constants: Any, d_out: Arrays) -> Arrays:
        out, pull_back = jax.vjp(lambda inputs: function(inputs, constants), inputs)
        gradients = jax.tree_util.tree_leaves_with_path(pull_back(d_out)[0])
        name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
        return out | {f"d {name(path)}": v for path, v in gradients}

    return jax.jit(forward_backward)


def _arguments(part: Part, kind: str, seed: int) -> tuple[Any, Any, Arrays]:
    """Random gradients of the outputs, where they are needed."""
    d_out: Arrays = {}
    if kind != "forward":
        out = jax.eval_shape(part.function, part.inputs, part.constants)
        keys = dict(zip(out, jax.random.split(jax.random.key(seed), len(out)), strict=True))
        d_out = {name: jax.random.normal(keys[name], v.shape, v.dtype) for name, v in out.items()}
    return part.inputs, part.constants, d_out


class _Checked:
    """A part and its definition: the same in float32, never through the same kernel, as what is
    wrong in that would be wrong in float32 too."""

    def __init__(self, part: Part, defined: Part, kind: str):
        self.part = part
        self.run = _program(part.function, kind)
        self.arguments = _arguments(part, kind, 0)
        self._wide_run = _program(defined.function, kind)

    def lower(self) -> list[Callable[[], Any]]:
        return [functools.partial(self.run.lower, *self.arguments), self._lower_wide]

    def _wide(self) -> Any:
        return jax.tree.map(
            lambda v: v.astype(jnp.float32) if v.dtype == jnp.bfloat16 else v, self.arguments
        )

    def _lower_wide(self) -> Any:
        with jax.default_matmul_precision("highest"):
            return self._wide_run.lower(*jax.eval_shape(self._wide))

    def errors(self) -> dict[str, float]:
        """The relative error of every result."""
        got = self.run(*self.arguments)
        if self.part.exact is not None:
            want = self.part.exact(self.part.inputs, self.part.constants)
        else:
            with jax.default_matmul_precision("highest"):
                want = self._wide_run(*self._wide())
        return scan_accuracy.errors(got, want)


def measure(
    make: MakePart,
    *,
    implementation: str | None,
    kinds: Iterable[str] = KINDS,
    samples: int,
    speeds: Speeds | None = None,
    checked: bool = True,
) -> list[dict[str, Any]]:
    """Errors, times and floors of one part, a row for each kind.

    Args:
      speeds: None: without a floor, that of a whole.
      checked: whether there is memory and time for float32.
    """
    with timing.compiling():
        part = make(implementation, 0)
        kinds = [kind for kind in kinds if kind in part.kinds]
        defined = make("xla", 0) if checked and part.exact is None else part
        programs = {kind: _Checked(part, defined, kind) for kind in kinds}
        wanted = 2 if checked and part.exact is None else 1
        lower = [one for program in programs.values() for one in program.lower()[:wanted]]
        failures = dict(zip(kinds, timing.compile_all(lower)[::wanted], strict=True))
    with timing.turn():
        rows: list[dict[str, Any]] = []
        for kind, program in programs.items():
            row: dict[str, Any] = {"kind": kind}
            if speeds is not None:
                row["floor_ms"] = 1e3 * speeds.floor(part, kind)
            if (failure := failures[kind]) is not None:
                row["wrong"] = scan_accuracy.in_short(failure)
            elif checked:
                row["errors"] = program.errors()
                limit = LIMIT if part.exact is None else 0
                if not max(row["errors"].values()) <= limit:
                    row["wrong"] = f"errors above {limit}: {row['errors']}"
            rows.append(row)
        right = [row for row in rows if "wrong" not in row]
        sets = timing.number_of_sets(timing.nbytes((part.inputs, part.constants)))
        drawn = [part, *(make(implementation, seed) for seed in range(1, sets))] if right else []
        jobs = {
            row["kind"]: timing.Job(
                programs[row["kind"]].run,
                [_arguments(one, row["kind"], seed) for seed, one in enumerate(drawn)],
            )
            for row in right
        }
        times = timing.measure(jobs, samples=samples)
        for row in right:
            row |= times[row["kind"]].record()
        return rows


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Milliseconds and multiples of the floor, one line for each part."""
    lines = [f"{'':<24}" + "".join(f"{kind + ', ms':>22}{'x floor':>9}" for kind in KINDS)]
    lines[0] += f"{'error':>10}"
    for name in dict.fromkeys(row["part"] for row in rows):
        of = {row["kind"]: row for row in rows if row["part"] == name}
        text = "".join(_cells(of.get(kind)) for kind in KINDS)
        errors = [e for row in of.values() for e in row.get("errors", {}).values()]
        shown = f"{max(errors):.1e}" if errors else "unchecked"
        lines.append(f"{name:<24}{text}{shown:>10}")
    return lines


def _cells(row: Mapping[str, Any] | None) -> str:
    if row is None or "ms" not in row:
        return f"{'-' if row is None else 'wrong':>22}{'-':>9}"
    return f"{row['ms']:>22.4f}{row['ms'] / row['floor_ms']:>9.2f}"
