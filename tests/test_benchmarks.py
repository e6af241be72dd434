"""Benchmarks: what is wrong gets no time, and block sizes are kept only where they are faster."""

import functools
import json
import os
import pathlib
import subprocess
import sys
import time
import types
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from benchmarks import parts, profiling, scan_accuracy, scan_programs, scan_tuning, timing
from pallas_kernels import blocks
from pallas_kernels.selective_scan import api, xla
from pallas_kernels.shapes import SCAN_CASES

ROOT = pathlib.Path(__file__).parent.parent

# A right implementation and two planted ones: the first one's gradient of b is wrong at the timed
# shape (5 steps), the second one's outputs in one of the hard cases (1 step).
PLANTED = """
import functools, json, pathlib, sys, types
from absl import app
from benchmarks import selective_scan, timing
from pallas_kernels.selective_scan import api, xla

timing.ROTATED_BYTES = 0

def backward(residuals, d_out, blocks):
    gradients = xla.backward(residuals, d_out, blocks)
    wrong = 1.02 if d_out.y_BLE.shape[1] == 5 else 1
    return gradients._replace(b_BLN=(wrong * gradients.b_BLN).astype(gradients.b_BLN.dtype))

def forward(operands, blocks, *, for_backward):
    out, residuals = xla.forward(operands, blocks, for_backward=for_backward)
    wrong = 1.02 if operands.x_BLE.shape[1] == 1 else 1
    return out._replace(h_BEN=wrong * out.h_BEN), residuals

def plant(forward, backward):
    return functools.partial(api._scan, types.SimpleNamespace(forward=forward, backward=backward))

api.IMPLEMENTATIONS["wrong_gradient"] = plant(xla.forward, backward)
api.IMPLEMENTATIONS["wrong_if_hard"] = plant(forward, xla.backward)
try:
    app.run(selective_scan.main)
finally:
    output = pathlib.Path(selective_scan._OUTPUT.value)
    selective_scan.draw(json.loads(output.read_text()), output)
"""


def run(*command: str) -> subprocess.CompletedProcess:
    """Flags belong to a process: commands that define the same ones cannot share one."""
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_what_is_wrong_is_not_timed(tmp_path: pathlib.Path) -> None:
    output = tmp_path / "scan.json"
    result = run(
        "-c",
        PLANTED,
        f"--output={output}",
        "--implementations=xla,wrong_gradient,wrong_if_hard",
        "--cases=one_state",
        "--variants=full",
        "--kinds=forward,backward",
        "--hard=one_step",
        "--samples=2",
    )
    assert result.returncode == 1, result.stderr
    content = json.loads(output.read_text())
    rows = {(row["implementation"], row["kind"]): row for row in content["rows"]}
    for key in (("xla", "forward"), ("xla", "backward"), ("wrong_gradient", "forward")):
        row = rows.pop(key)
        assert row["ms"] > 0 and row["ps"] > 0 and row["memory_floor_ps"] > 0, row
        assert row["same_bits_again"] and max(row["errors"].values()) < 5e-3, row
    row = rows.pop(("wrong_gradient", "backward"))
    assert "ms" not in row and "d b_BLN" in row["wrong"] and "d c_BLN" not in row["wrong"]
    assert row["errors"]["d b_BLN"] == pytest.approx(0.02, rel=0.2)
    assert not rows  # nothing of what is wrong on hard inputs
    hard = {(row["implementation"], row["dtype"]): row for row in content["hard"]}
    assert len(hard) == 6
    for (name, _), row in hard.items():
        assert ("wrong" in row) == (name == "wrong_if_hard"), row
    for line in ("wrong_gradient one_state bfloat16 full backward", "wrong_if_hard one_step"):
        assert line in result.stderr
    assert "floor of memory" in result.stdout
    assert (tmp_path / "scan.svg").stat().st_size and (tmp_path / "scan.png").stat().st_size


@pytest.mark.slow
def test_mixer_in_parts(tmp_path: pathlib.Path) -> None:
    output = tmp_path / "mixer.json"
    options = ["--cases=tiny_b1_l64", "--samples=2", "--product=64"]
    result = run("-m", "benchmarks.mamba_mixer", f"--output={output}", *options)
    assert result.returncode == 0, result.stderr
    (case,) = json.loads(output.read_text())["cases"]
    rows = {(row["part"], row["kind"]): row for row in case["rows"]}
    assert len(rows) == 2 * 7
    for kind in ("forward", "forward_backward"):
        floors = {part: row["floor_ms"] for (part, k), row in rows.items() if k == kind}
        whole = floors.pop("mixer and innovation")
        assert floors.pop("mixer") == pytest.approx(whole - floors["innovation"])
        assert whole == pytest.approx(sum(floors.values()))
        assert all(row["ms"] > 0 for row in rows.values())


SMALL_LAYER = ["--size=tiny", "--head_width=64", "--lengths=300", "--samples=2", "--product=64"]


@pytest.mark.slow
def test_attention_in_parts(tmp_path: pathlib.Path) -> None:
    output = tmp_path / "attention.json"
    options = [f"--output={output}", "--key_heads=1", *SMALL_LAYER]
    result = run("-m", "benchmarks.attention_mixer", *options)
    assert result.returncode == 0, result.stderr
    (case,) = json.loads(output.read_text())["cases"]
    rows = {(row["part"], row["kind"]): row for row in case["rows"]}
    assert len(rows) == 2 * 11 - 2
    for kind in ("forward", "forward_backward"):
        floors = {part: row["floor_ms"] for (part, k), row in rows.items() if k == kind}
        chosen = {part: rows[part, "forward"]["floor_ms"] for part in ("innovation", "selection")}
        around = floors["norms + rotary"] + floors["gathers"] + sum(chosen.values())
        assert floors["around"] == pytest.approx(around)
        others = floors["projections"] + floors["attention"] + floors["output"]
        assert floors["mixer"] == pytest.approx(around + others)
        # Apart they move what is between them twice.
        assert floors["norms"] + floors["rotary"] > floors["norms + rotary"]
    assert all(row["ms"] > 0 for (part, _), row in rows.items() if part != "around")
    assert all(row["errors"] for row in rows.values())


@pytest.mark.slow
def test_share_of_the_selection(tmp_path: pathlib.Path) -> None:
    output = tmp_path / "selection.json"
    options = [f"--output={output}", "--key_heads=1", "--memories=4,16", "--chunks=32"]
    result = run("-m", "benchmarks.selection", *options, *SMALL_LAYER)
    assert result.returncode == 0, result.stderr
    content = json.loads(output.read_text())
    assert len(content["shares"]) == 2 * 2
    for row in content["shares"]:
        spent = row["innovation"] + row["selection"] + row["gathers"]
        assert row["share"] == pytest.approx(spent / row["mixer"])
    chosen = [row for row in content["rows"] if row["part"] == "selection"]
    assert len(chosen) == 2
    assert all(row["errors"] == {"index_BZM": 0, "valid_BZM": 0} for row in chosen)


@pytest.mark.parametrize("wrong", ["nothing", "output", "gradient", "exact"])
def test_parts_that_are_wrong_are_not_timed(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    """A product whose implementation differs from that in float32, or from what must come out."""
    monkeypatch.setattr(timing, "ROTATED_BYTES", 0)

    def make(implementation: str | None, seed: int) -> parts.Part:
        keys = jax.random.split(jax.random.key(seed))
        a, b = (jax.random.normal(key, (8, 8), jnp.bfloat16) for key in keys)

        def product(a: jax.Array, b: jax.Array) -> dict[str, jax.Array]:
            if implementation == "mine" and wrong == "output":
                b = 1.1 * b
            if implementation == "mine" and wrong == "gradient":
                b = b + 0.1 * (b - jax.lax.stop_gradient(b))
                a = a + 0.1 * (a - jax.lax.stop_gradient(a))
            return {"y": a @ b}

        def exact(a: jax.Array, b: jax.Array) -> dict[str, jax.Array]:
            return {"y": product(a, b)["y"].at[0, 0].add(1)}

        flops = parts.product_flops(8**3)
        if wrong == "exact":
            return parts.Part(product, a, b, flops, kinds=("forward",), exact=exact)
        return parts.Part(product, a, b, flops)

    speeds = parts.Speeds(copy=1e9, product=1e6)
    rows = parts.measure(make, implementation="mine", samples=2, speeds=speeds)
    by = {row["kind"]: row for row in rows}
    # 2 x 512 operations, and as many for each operand's gradient.
    assert by["forward"]["floor_ms"] == pytest.approx(1.024)
    if wrong != "exact":
        assert by["forward_backward"]["floor_ms"] == pytest.approx(3.072)
    timed = {kind for kind, row in by.items() if "ms" in row}
    assert (
        timed
        == {
            "nothing": {"forward", "forward_backward"},
            "output": set(),
            "gradient": {"forward"},
            "exact": set(),
        }[wrong]
    )
    assert timed == {kind for kind, row in by.items() if "wrong" not in row}


def test_exact_is_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """In groups of rows, on hard inputs."""
    monkeypatch.setattr(scan_accuracy, "_VALUES_AT_ONCE", 1)
    define = jax.jit(lambda v: scan_programs.outputs_and_gradients(v, implementation="reference"))
    for name in ("small_dt", "large_dt", "mixed", "reset_everywhere"):
        inputs = scan_accuracy.draw_hard(scan_accuracy.HARD_CASES[name], "float32", 0)
        got = scan_accuracy.exact(inputs)
        with jax.enable_x64(True):
            wide = jax.tree.map(
                lambda v: v if v.dtype == jnp.bool_ else v.astype(jnp.float64), inputs
            )
            errors = scan_accuracy.errors(got, define(wide))
        assert max(errors.values()) < 1e-13, errors


def test_errors_of_zeros_and_nans() -> None:
    zero, one, nan = (jnp.full((2, 3), value) for value in (0.0, 1.0, jnp.nan))
    got = {"same": zero, "half": 1.5 * one, "something": one, "lost": nan}
    want = {"same": zero, "half": one, "something": zero, "lost": one}
    errors = scan_accuracy.errors(got, want)
    assert errors == {"same": 0, "half": 0.5, "something": float("inf"), "lost": float("inf")}
    judged = scan_accuracy.judge(errors, "float32")
    assert "same" not in judged["wrong"] and "lost" in judged["wrong"]
    assert "wrong" not in scan_accuracy.judge({"same": 0.0}, "float32")
    assert scan_accuracy.equal_bits({"v": nan}, {"v": nan})
    assert not scan_accuracy.equal_bits({"v": zero}, {"v": -zero})


def test_saved_and_least_bytes() -> None:
    """Of a scan of known sizes, counted by hand; inputs are not among what is saved."""
    shape = SCAN_CASES["many_chunks"]
    B, L, E, N = shape.B, shape.L, shape.E, shape.N
    like = jax.eval_shape(
        lambda: scan_programs.draw(jax.random.key(0), shape=shape, dtype="bfloat16")
    )
    inputs = scan_programs.as_variant(like, "plain")
    made = scan_programs.programs("xla", inputs, {"chunk": 8})
    assert timing.nbytes(made.saved) == 4 * B * -(-L // 8) * E * N
    read = 2 * (3 * B * L * E + 2 * B * L * N) + 4 * (E * N + 2 * E)
    assert scan_programs.least_bytes("forward", inputs) == read + 2 * B * L * E + 4 * B * E * N
    assert scan_programs.least_bytes("backward", inputs) == 2 * read + 2 * B * L * E


def test_timing_walks_through_all_sets() -> None:
    """Sleeps stand for programs: what is measured is their mean, in turns."""
    calls: list[str] = []

    def sleep(name: str, seconds: float) -> jax.Array:
        calls.append(name)
        time.sleep(seconds)
        return jnp.zeros(())

    jobs = {
        "slow": timing.Job(sleep, [("slow", 0.006), ("slow too", 0.008)]),
        "fast": timing.Job(sleep, [("fast", 0.002)]),
    }
    times = timing.measure(jobs, samples=3)
    assert times["slow"].calls == 2 and times["slow"].median >= 0.007
    assert times["fast"].calls >= 1 and 0.002 <= times["fast"].median < times["slow"].median
    assert times["slow"].samples == 3
    assert times["slow"].low <= times["slow"].median <= times["slow"].high
    rounds = [name for name in calls[-3 * (2 + times["fast"].calls) :] if name != "fast"]
    assert rounds == ["slow", "slow too"] * 3


def test_hidden_device_time_is_from_the_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of calls that the host takes longer to enqueue than the device to run."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    sets = [(jnp.full((64, 64), value),) for value in (1.0, 2.0)]
    job = timing.Job(jax.jit(lambda v: v @ v + 1), sets)
    monkeypatch.setattr(timing.Timing, "host_bound", True)
    record = timing.measure({"it": job}, samples=2)["it"].record()
    assert record["from_profile"] and 0 < record["ms"] < 1
    two_of_each = [("a", 0.001), ("b", 0.002)] * 20 + [("a", 0.001), ("b", 0.009)] * 4
    monkeypatch.setattr(profiling, "kernels", lambda run: two_of_each)
    record = timing.measure({"it": job}, samples=2)["it"].record()
    assert record["ms"] == pytest.approx(3)  # the median of calls
    monkeypatch.setattr(timing.Timing, "host_bound", False)
    record = timing.measure({"it": job}, samples=2)["it"].record()
    assert not record["from_profile"] and record["ms"] == record["wall_ms"]


def planted() -> Any:
    """xla, with outputs that are wrong where the chunk is 16."""

    def forward(operands: Any, sizes: Mapping[str, int], *, for_backward: bool) -> Any:
        chosen = blocks.choose(
            "selective_scan/planted",
            shape=vars(SCAN_CASES["one_state"]),
            dtype=operands.x_BLE.dtype,
            heuristic={"chunk": 8},
            override=sizes,
        )
        out, residuals = xla.forward(operands, chosen, for_backward=for_backward)
        wrong = 2 if chosen["chunk"] == 16 else 1
        return out._replace(y_BLE=wrong * out.y_BLE), residuals

    module: Any = types.ModuleType("planted")
    module.forward, module.backward = forward, xla.backward
    return module


def test_tuning_keeps_what_is_right_and_faster(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = jax.devices()[0].device_kind
    before = {device: {"selective_scan/xla": {"some case": {"chunk": 4}}}}
    (tmp_path / "tuned.json").write_text(json.dumps(before))
    monkeypatch.setattr(blocks, "TUNED_FILE", tmp_path / "tuned.json")
    monkeypatch.setattr(timing, "ROTATED_BYTES", 0)
    backend = planted()
    run = functools.partial(api._scan, backend)
    monkeypatch.setitem(api.IMPLEMENTATIONS, "planted", run)
    seconds = {"as before": 1.0, "5": 0.7, "16": 0.1, "start": 1.0, "chosen": 0.7}

    def measure(jobs: Mapping[tuple[str, str], Any], *, samples: int) -> dict[Any, Any]:
        return {key: timing.Timing(seconds[key[0]], 0.0, 0.0, samples, 1, 0.0) for key in jobs}

    monkeypatch.setattr(timing, "measure", measure)
    blocks._tuned.cache_clear()
    try:
        # What is kept must pass the second measurement as well.
        backend.TUNABLE, seconds["chosen"] = {"chunk": (5,)}, 0.99
        result = scan_tuning.tune("planted", "one_state", "float32", seconds=60)
        assert result["chosen"] == {"chunk": 5} and result["kept"] is None
        assert json.loads(blocks.TUNED_FILE.read_text()) == before

        backend.TUNABLE, seconds["chosen"] = {"chunk": (0, 5, 16)}, 0.7
        result = scan_tuning.tune("planted", "one_state", "float32", seconds=60)
        assert result["kept"] == {"chunk": 5}
        scores = result["trials"][0]["scores"]
        assert "positive" in scores["0"] and "y_BLE" in scores["16"] and scores["5"] == 0.7
        after = json.loads(blocks.TUNED_FILE.read_text())
        entry = after[device].pop("selective_scan/planted")
        assert entry == {"B1 E4 L5 N1 float32": {"chunk": 5}} and after == before

        made = blocks.choose(
            "selective_scan/planted",
            shape=vars(SCAN_CASES["one_state"]),
            dtype=jnp.dtype("float32"),
            heuristic={"chunk": 8},
            override=None,
        )
        assert made == {"chunk": 5}
    finally:
        blocks._tuned.cache_clear()
