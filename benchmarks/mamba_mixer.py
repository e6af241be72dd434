"""What a Mamba mixer and the innovation test cost, whole and in parts, beside their floors.

    python -m benchmarks.mamba_mixer --output results/kernels/mamba_mixer.json

Does everything around the scan cost no more than the bytes that it must move? The parts are those
of `bmojo_jax.ssm.Mamba` and `bmojo_jax.memory.innovation`, each as a program of its own: the matrix
products, convolution + SiLU, the scan, the norm after it, the innovation. "mixer" and "mixer and
innovation" are whole. In each forward alone, and forward with the gradients of everything.

Floors: every argument and result, once, at the speed of a copy; products at the speed of a large
bfloat16 product, both measured in the same run; the scan also its arithmetic. That of a whole is
the sum of its parts'. Parameters are float32 and rounded to bfloat16 in each program.

Nothing with a large error is timed: the largest relative one of an output or gradient against the
same program in float32, from the same rounded inputs and with weights that are not rounded.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import app, flags
from flax import nnx

from benchmarks import scan_accuracy, scan_programs, timing
from benchmarks.record import Record
from bmojo_jax import presets
from bmojo_jax.layers import CausalConv, one_document
from bmojo_jax.memory import innovation
from bmojo_jax.ssm import Mamba
from pallas_kernels import selective_scan
from pallas_kernels.shapes import ScanShape


class Case(NamedTuple):
    """A size of the presets, and the rows of a batch."""

    size: presets.Size
    B: int
    L: int


CASES: Mapping[str, Case] = {
    "1_4b_b1_l2048": Case("1_4b", 1, 2048),
    "1_4b_b8_l2048": Case("1_4b", 8, 2048),
    "30m_b16_l2048": Case("30m", 16, 2048),
    "tiny_b1_l64": Case("tiny", 1, 64),
}

_OUTPUT = flags.DEFINE_string("output", None, "JSON to write.", required=True)
_CASES = flags.DEFINE_list("cases", list(CASES)[:3], f"Of {list(CASES)}.")
_IMPLEMENTATIONS = flags.DEFINE_list("implementations", None, "Of the scan; default: the best.")
_SAMPLES = flags.DEFINE_integer("samples", 20, "Of each time.", lower_bound=2)
_PRODUCT = flags.DEFINE_integer("product", 8192, "Side of the product that gives the floor.")
_COMMIT = flags.DEFINE_string("commit", "", "Of the code that runs, for the record.")

KINDS = ("forward", "forward_backward")
WHOLE = ("mixer", "mixer and innovation")
# Largest relative error with which a time is printed: roundings to bfloat16 of weights and of the
# values between the parts add up (1.6e-2 at the tiny size on a CPU, in the gradient of W_dt).
LIMIT = 3e-2

Arrays = dict[str, Any]


class Part(NamedTuple):
    """A pure function of a tree of arrays, and the operations of the products in it."""

    function: Callable[[Any], Arrays]
    inputs: Any
    flops: float = 0.0


class Program(NamedTuple):
    """Of one part and kind: (inputs, cotangents) -> outputs and gradients."""

    run: Any
    arguments: tuple[Any, Any]
    least_bytes: int


def parts_of(case: Case, implementation: str | None, seed: int) -> dict[str, Part]:
    """The whole mixer and its parts with random weights and inputs, which depend on the seed."""
    config = presets.model("bmojo", case.size)
    B, L, D, E, N, R = (
        case.B,
        case.L,
        config.width,
        config.ssm_inner,
        config.ssm_state,
        config.dt_rank,
    )
    config = dataclasses.replace(config, scan_implementation=implementation)
    mamba = Mamba(config, output_scale=1.0, rngs=nnx.Rngs(seed))
    documents = one_document(B, L)
    keys = iter(jax.random.split(jax.random.key(seed), 8))

    def normal(width: int) -> jax.Array:
        return jax.random.normal(next(keys), (B, L, width), jnp.bfloat16)

    def part(module: Any, function: Callable[..., Arrays], *inputs: Any, flops: int = 0) -> Part:
        """Of modules, whose weights become inputs, and arrays."""
        graph, weights = nnx.split(module)
        return Part(lambda v: function(nnx.merge(graph, v[0]), *v[1:]), (weights, *inputs), flops)

    def mixer(mamba: Mamba, u_BLD: jax.Array) -> Arrays:
        return {"f_BLD": mamba(u_BLD, documents)}

    def mixer_and_innovation(mamba: Mamba, u_BLD: jax.Array) -> Arrays:
        f_BLD = mamba(u_BLD, documents)
        return {"f_BLD": f_BLD, "e_BL": innovation(f_BLD, documents.positions_BL)}

    def products(mamba: Mamba, u_BLD: Any, x_BLE: Any, low_BLR: Any, y_BLE: Any) -> Arrays:
        return {
            "xz_BL2E": mamba.in_proj(u_BLD),
            "low": mamba.x_proj(x_BLE),
            "dt_BLE": mamba.dt_proj(low_BLR),
            "f_BLD": mamba.out_proj(y_BLE),
        }

    def convolution(conv: CausalConv, x_BLE: jax.Array) -> Arrays:
        return {"x_BLE": conv(x_BLE, documents.positions_BL)}

    def scan(arrays: Arrays) -> Arrays:
        return {"y_BLE": selective_scan(**arrays, implementation=implementation).y_BLE}

    shape = ScanShape(B=B, L=L, E=E, N=N)
    drawn = scan_programs.draw(next(keys), shape=shape, dtype="bfloat16")
    u_BLD, y_BLE = normal(D), normal(E)
    multiply_adds = B * L * E * (3 * D + 2 * R + 2 * N)
    return {
        "mixer": part(mamba, mixer, u_BLD),
        "mixer and innovation": part(mamba, mixer_and_innovation, u_BLD),
        "products": part(
            mamba, products, u_BLD, normal(E), normal(R), y_BLE, flops=2 * multiply_adds
        ),
        "convolution + SiLU": part(mamba.conv, convolution, normal(E)),
        "scan": Part(scan, scan_programs.as_variant(drawn, "plain").arrays),
        "norm": part(mamba.norm, lambda norm, y_BLE: {"y_BLE": norm(y_BLE)}, y_BLE),
        "innovation": Part(
            lambda f_BLD: {"e_BL": innovation(f_BLD, documents.positions_BL)}, normal(D)
        ),
    }


def program_of(part: Part, kind: str, seed: int) -> Program:
    """Compiled later: nothing but random cotangents is computed here."""
    out = jax.eval_shape(part.function, part.inputs)
    keys = dict(zip(out, jax.random.split(jax.random.key(seed), len(out)), strict=True))
    d_out = {name: jax.random.normal(keys[name], v.shape, v.dtype) for name, v in out.items()}
    read_and_written = timing.nbytes((part.inputs, out))
    if kind == "forward":
        return Program(
            jax.jit(lambda inputs, d_out: part.function(inputs)),
            (part.inputs, d_out),
            read_and_written,
        )

    def forward_backward(inputs: Any, d_out: Arrays) -> Arrays:
        out, pull_back = jax.vjp(part.function, inputs)
        gradients = jax.tree_util.tree_leaves_with_path(pull_back(d_out)[0])
        name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
        return out | {f"d {name(path)}": v for path, v in gradients}

    least = read_and_written + timing.nbytes((part.inputs, d_out, part.inputs))
    return Program(jax.jit(forward_backward), (part.inputs, d_out), least)


def wide_errors(program: Program) -> dict[str, float]:
    """The relative error of every result against the same program in float32."""

    def widen(v: jax.Array) -> jax.Array:
        return v.astype(jnp.float32) if v.dtype == jnp.bfloat16 else v

    got = program.run(*program.arguments)
    with jax.default_matmul_precision("highest"):
        want = program.run(*jax.tree.map(widen, program.arguments))
    return scan_accuracy.errors(got, want)


def measure(
    case: Case, implementation: str | None, *, copy: float, product: float
) -> list[dict[str, Any]]:
    """Errors, times and floors of one case, one row for each part and kind."""
    parts = parts_of(case, implementation, 0)
    wanted = [(name, kind) for name in parts for kind in KINDS]
    programs = {(name, kind): program_of(parts[name], kind, 0) for name, kind in wanted}
    timing.compile_all(
        functools.partial(program.run.lower, *program.arguments) for program in programs.values()
    )
    errors = {key: wide_errors(program) for key, program in programs.items()}
    right = {key for key, e in errors.items() if max(e.values()) <= LIMIT}

    sets = timing.number_of_sets(timing.nbytes(programs["scan", "forward"].arguments))
    others = [parts_of(case, implementation, seed) for seed in range(1, sets)]
    jobs = {}
    for key in right:
        program = programs[key]
        more = [program_of(other[key[0]], key[1], 1).arguments for other in others]
        jobs[key] = timing.Job(program.run, [program.arguments, *more])
    times = timing.measure(jobs, samples=_SAMPLES.value)

    def floor(name: str, kind: Any) -> float:
        if name in WHOLE:
            inside = [n for n in parts if n not in WHOLE and (n != "innovation" or name != "mixer")]
            return sum(floor(n, kind) for n in inside)
        seconds = [programs[name, kind].least_bytes / copy]
        passes = 1 if kind == "forward" else 3
        seconds.append(passes * parts[name].flops / product)
        if name == "scan":
            (B, L, E), N = (parts[name].inputs[n].shape for n in ("x_BLE", "a_EN"))
            shape = ScanShape(B=B, L=L, E=E, N=N[1])
            seconds.append(scan_programs.arithmetic_floor(kind, shape) or 0)
        return max(seconds)

    rows = []
    for name, kind in wanted:
        row: dict[str, Any] = {"part": name, "kind": kind, "errors": errors[name, kind]}
        row["floor_ms"] = 1e3 * floor(name, kind)
        if (name, kind) in right:
            row |= times[name, kind].record()
        rows.append(row)
    return rows


def product_flops_per_second(side: int, samples: int) -> float:
    """Of a large bfloat16 matrix product."""
    keys = jax.random.split(jax.random.key(0), 4)
    matrices = [jax.random.normal(key, (side, side), jnp.bfloat16) for key in keys]
    job = timing.Job(jax.jit(jnp.matmul), [tuple(matrices[:2]), tuple(matrices[2:])])
    return 2 * side**3 / timing.measure({"product": job}, samples=samples)["product"].seconds


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Milliseconds and multiples of the floor, one line for each part."""
    lines = [f"{'':<24}" + "".join(f"{kind + ', ms':>22}{'x floor':>9}" for kind in KINDS)]
    lines[0] += f"{'error':>9}"
    for name in dict.fromkeys(row["part"] for row in rows):
        of = {row["kind"]: row for row in rows if row["part"] == name}
        text = "".join(
            f"{row['ms']:>22.4f}{row['ms'] / row['floor_ms']:>9.2f}"
            if "ms" in row
            else f"{'wrong':>22}{'-':>9}"
            for row in (of[kind] for kind in KINDS)
        )
        error = max(e for row in of.values() for e in row["errors"].values())
        lines.append(f"{name:<24}{text}{error:>9.1e}")
    for kind in KINDS:
        parts = [row for row in rows if row["kind"] == kind and row["part"] not in WHOLE]
        if all("ms" in row for row in parts):
            lines.append(f"sum of parts, {kind}: {sum(row['ms'] for row in parts):.4f} ms")
    return lines


def main(argv: list[str]) -> None:
    del argv
    output = pathlib.Path(_OUTPUT.value)
    copy = timing.copied_bytes_per_second(samples=_SAMPLES.value)
    product = product_flops_per_second(_PRODUCT.value, _SAMPLES.value)
    record = Record(
        output,
        "mamba_mixer",
        _COMMIT.value,
        copied_bytes_per_second=copy,
        product_flops_per_second=product,
    )
    cases: list[dict[str, Any]] = []
    timing.say(f"copy {copy / 1e12:.2f} TB/s, product {product / 1e12:.0f} TFLOP/s")
    wrong: list[str] = []
    runs = [(case, name) for case in _CASES.value for name in _IMPLEMENTATIONS.value or [None]]
    for case, name in timing.progress(runs, unit="case"):
        rows = measure(CASES[case], name, copy=copy, product=product)
        cases.append({"case": case, "implementation": name or "best", "rows": rows})
        record.add("cases", cases)
        timing.say("\n".join([f"{case}, scan by {name or 'the best'}", *table(rows)]))
        wrong += [f"{case} {row['part']} {row['kind']}" for row in rows if "ms" not in row]
    if wrong:
        raise SystemExit(f"errors above {LIMIT}, and therefore not timed: {wrong}")


if __name__ == "__main__":
    app.run(main)
