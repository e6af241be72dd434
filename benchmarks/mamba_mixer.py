"""What a Mamba mixer and the innovation test cost, whole and in parts, beside their floors.

    python -m benchmarks.mamba_mixer --output results/kernels/mamba_mixer.json

Does everything around the scan cost no more than the bytes that it must move? The parts are those
of `bmojo_jax.ssm.Mamba` and `pallas_kernels.innovation`, each as a program of its own: the matrix
products, convolution + SiLU, the scan, the norm after it, the innovation; `parts.py` has how they
are checked and timed. "mixer" and "mixer and innovation" are whole; their floors are the sums of
those of their parts, and that of the scan is its arithmetic too. Parameters are float32 and rounded
to bfloat16 in each program.

The JSON is written after every part. The exit status is 1 if anything was wrong.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import app, flags
from flax import nnx

from benchmarks import scan_programs, timing
from benchmarks.parts import (
    KINDS,
    Arrays,
    MakePart,
    Part,
    Speeds,
    measure,
    of_modules,
    product_flops,
    speeds,
    table,
)
from benchmarks.record import Record
from bmojo_jax import presets
from bmojo_jax.layers import CausalConv, Documents
from bmojo_jax.ssm import Mamba
from pallas_kernels import innovation, selective_scan
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
INSIDE = ("products", "convolution + SiLU", "scan", "norm")
WHOLE = {"mixer": INSIDE, "mixer and innovation": (*INSIDE, "innovation")}

_OUTPUT = flags.DEFINE_string("output", None, "JSON to write.", required=True)
_CASES = flags.DEFINE_list("cases", list(CASES)[:3], f"Of {list(CASES)}.")
_IMPLEMENTATIONS = flags.DEFINE_list("implementations", None, "Of the scan; default: the best.")
_SAMPLES = flags.DEFINE_integer("samples", 20, "Of each time.", lower_bound=2)
_PRODUCT = flags.DEFINE_integer("product", 8192, "Side of the product that gives the floor.")
_COMMIT = flags.DEFINE_string("commit", "", "Of the code that runs, for the record.")


def parts_of(case: Case) -> dict[str, MakePart]:
    """The whole mixer and its parts, with random weights and inputs."""
    config = presets.model("bmojo", case.size)
    B, L, D, E = case.B, case.L, config.width, config.ssm_inner
    N, R = config.ssm_state, config.dt_rank
    shape = ScanShape(B=B, L=L, E=E, N=N)

    def mamba(implementation: str | None, seed: int) -> Mamba:
        settings = dataclasses.replace(config, scan_implementation=implementation)
        return Mamba(settings, output_scale=1.0, rngs=nnx.Rngs(seed))

    def normal(width: int, seed: int) -> jax.Array:
        return jax.random.normal(jax.random.key(seed), (B, L, width), jnp.bfloat16)

    # An array, not a constant of the programs: XLA would compute masks while compiling.
    def positions() -> jax.Array:
        return jnp.broadcast_to(jnp.arange(L, dtype=jnp.int32)[None, :], (B, L))

    def innovation_test(implementation: str | None) -> Callable[..., jax.Array]:
        # Other implementations are the scan's.
        chosen = "xla" if implementation == "xla" else None
        return functools.partial(innovation, implementation=chosen)

    def mixer(implementation: str | None, seed: int) -> Part:
        def run(mamba: Mamba, u_BLD: Any, positions_BL: Any) -> Arrays:
            return {"f_BLD": mamba(u_BLD, Documents(positions_BL, None))}

        module = mamba(implementation, seed)
        return of_modules(module, run, normal(D, seed), constants=(positions(),))

    def mixer_and_innovation(implementation: str | None, seed: int) -> Part:
        def run(mamba: Mamba, u_BLD: Any, positions_BL: Any) -> Arrays:
            f_BLD = mamba(u_BLD, Documents(positions_BL, None))
            return {"f_BLD": f_BLD, "e_BL": test(f_BLD, positions_BL)}

        test = innovation_test(implementation)
        module = mamba(implementation, seed)
        return of_modules(module, run, normal(D, seed), constants=(positions(),))

    def products(implementation: str | None, seed: int) -> Part:
        def run(projections: Any, u_BLD: Any, x_BLE: Any, low_BLR: Any, y_BLE: Any) -> Arrays:
            in_proj, x_proj, dt_proj, out_proj = projections
            return {
                "xz_BL2E": in_proj(u_BLD),
                "low": x_proj(x_BLE),
                "dt_BLE": dt_proj(low_BLR),
                "f_BLD": out_proj(y_BLE),
            }

        module = mamba(implementation, seed)
        projections = (module.in_proj, module.x_proj, module.dt_proj, module.out_proj)
        inputs = [normal(width, seed + i) for i, width in enumerate((D, E, R, E))]
        flops = product_flops(B * L * E * (3 * D + 2 * R + 2 * N))
        return of_modules(projections, run, *inputs, flops=flops)

    def convolution(implementation: str | None, seed: int) -> Part:
        def run(conv: CausalConv, x_BLE: Any, positions_BL: Any) -> Arrays:
            return {"x_BLE": conv(x_BLE, positions_BL)}

        conv = mamba(implementation, seed).conv
        return of_modules(conv, run, normal(E, seed), constants=(positions(),))

    def scan(implementation: str | None, seed: int) -> Part:
        def run(arrays: Any, constants: Any) -> Arrays:
            del constants
            return {"y_BLE": selective_scan(**arrays, implementation=implementation).y_BLE}

        drawn = scan_programs.draw(jax.random.key(seed), shape=shape, dtype="bfloat16")
        least = {kind: scan_programs.arithmetic_floor(kind, shape) or 0.0 for kind in KINDS}
        arrays = scan_programs.as_variant(drawn, "plain").arrays
        return Part(run, arrays, least_seconds=least)

    def norm(implementation: str | None, seed: int) -> Part:
        module = mamba(implementation, seed).norm
        return of_modules(module, lambda norm, y_BLE: {"y_BLE": norm(y_BLE)}, normal(E, seed))

    def innovations(implementation: str | None, seed: int) -> Part:
        test = innovation_test(implementation)
        return Part(
            lambda f_BLD, positions_BL: {"e_BL": test(f_BLD, positions_BL)},
            normal(D, seed),
            positions(),
        )

    # The whole last: its floor is that of its parts.
    return {
        "products": products,
        "convolution + SiLU": convolution,
        "scan": scan,
        "norm": norm,
        "innovation": innovations,
        "mixer": mixer,
        "mixer and innovation": mixer_and_innovation,
    }


def measure_case(
    case: Case, implementation: str | None, speeds: Speeds
) -> Iterator[list[dict[str, Any]]]:
    """Part by part, a row for each kind."""
    floors: dict[tuple[str, str], float] = {}
    for name, make in parts_of(case).items():
        rows = measure(
            make,
            implementation=implementation,
            samples=_SAMPLES.value,
            speeds=None if name in WHOLE else speeds,
        )
        for row in rows:
            if name in WHOLE:
                row["floor_ms"] = sum(floors[part, row["kind"]] for part in WHOLE[name])
            floors[name, row["kind"]] = row["floor_ms"]
        yield [{"part": name, **row} for row in rows]


def main(argv: list[str]) -> None:
    del argv
    measured = speeds(_PRODUCT.value, _SAMPLES.value)
    record = Record(
        pathlib.Path(_OUTPUT.value),
        "mamba_mixer",
        _COMMIT.value,
        copied_bytes_per_second=measured.copy,
        product_flops_per_second=measured.product,
    )
    timing.say(
        f"copy {measured.copy / 1e12:.2f} TB/s, product {measured.product / 1e12:.0f} TFLOP/s"
    )
    cases: list[dict[str, Any]] = []
    wrong: list[str] = []
    runs = [(case, name) for case in _CASES.value for name in _IMPLEMENTATIONS.value or [None]]
    for case, name in timing.progress(runs, unit="case"):
        rows: list[dict[str, Any]] = []
        cases.append({"case": case, "implementation": name or "best", "rows": rows})
        for of_part in measure_case(CASES[case], name, measured):
            rows += of_part
            record.add("cases", cases)
        timing.say("\n".join([f"{case}, scan by {name or 'the best'}", *table(rows)]))
        wrong += [
            f"{case} {row['part']} {row['kind']}: {row['wrong']}" for row in rows if "wrong" in row
        ]
    if wrong:
        raise SystemExit("\n".join(["wrong, and therefore not timed:", *wrong]))


if __name__ == "__main__":
    app.run(main)
