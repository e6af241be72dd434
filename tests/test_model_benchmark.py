"""The benchmark of whole models: what a step's time is put down to, and the command."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import profiling
from tests.test_benchmarks import ROOT


def test_time_goes_to_the_scope_that_an_operation_is_from() -> None:
    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        y = x @ w
        with jax.named_scope("selective_scan"):
            return jnp.sum(jnp.sin(jnp.cumsum(y, axis=0)))

    x = jnp.ones((256, 256))
    text = jax.jit(jax.grad(loss)).lower(x, x).compile().as_text()
    names = profiling.operation_names(text)
    assert any("jvp(selective_scan)" in name for name in names.values())
    scan = next(key for key, name in names.items() if "selective_scan" in name)
    kernels = [(scan, 0.2), ("cublas-gemm.1", 0.3), ("loop_fusion", 0.1), (scan, 0.05)]
    parts = profiling.by_part(kernels, names, step=1.0)
    assert parts == pytest.approx(
        {"scan": 0.25, "matrix products": 0.3, profiling.REST: 0.1, profiling.IDLE: 0.35}
    )
    assert profiling.longest(kernels, names)[0][:2] == [0.3, "cublas-gemm.1"]


@pytest.mark.slow
def test_command(tmp_path: pathlib.Path) -> None:
    output = tmp_path / "model.json"
    command = [sys.executable, "-m", "benchmarks.model", f"--output={output}", "--size=tiny"]
    cases = ["--cases=bmojo:128,nothing:128", "--tokens=256", "--head_width=64"]
    ran = subprocess.run([*command, *cases], capture_output=True, text=True, cwd=ROOT, check=False)
    assert ran.returncode != 0 and "must be one of ('transformer'" in ran.stderr
    content = json.loads(output.read_text())
    measured, refused = content["rows"]
    assert content["device"] == "cpu" and measured["rows"] == 2
    assert measured["tokens_per_s"] == pytest.approx(256 / measured["step_s"])
    assert {"scan", "attention", "selection", "matrix products"} < set(measured["parts"])
    assert "step_s" not in refused
    two = ["--cases=bmojo:128", "--tokens=256", "--head_width=64", "--mesh=context=2"]
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    subprocess.run([*command, *two], cwd=ROOT, env=environment, check=True)
    (cut,) = json.loads(output.read_text())["rows"]
    np.testing.assert_allclose(cut["losses"], measured["losses"], rtol=1e-2)
    drawn = subprocess.run([*command, "--draw"], capture_output=True, text=True, cwd=ROOT)
    assert drawn.returncode == 0, drawn.stderr
    assert output.with_suffix(".svg").exists() and output.with_suffix(".png").exists()


@pytest.mark.slow
def test_inference_command(tmp_path: pathlib.Path) -> None:
    output = tmp_path / "inference.json"
    command = [sys.executable, "-m", "benchmarks.inference", f"--output={output}", "--size=tiny"]
    sizes = ["--head_width=64", "--prompts=300", "--contexts=20,300", "--batches=1,2", "--tokens=4"]
    ran = subprocess.run([*command, *sizes], capture_output=True, text=True, cwd=ROOT, check=False)
    assert ran.returncode == 0, ran.stderr
    rows = json.loads(output.read_text())["rows"]
    assert len(rows) == 2 * (1 + 2 * 2)
    assert all(row["ms"] > 0 for row in rows)
    decoded = [row for row in rows if row["what"] == "decode"]
    assert all(row["error"] < 5e-2 and row["bound_ms"] > 0 for row in decoded)
    held = {(row["family"], row["length"], row["batch"]): row["cache_bytes"] for row in decoded}
    assert held["bmojo", 300, 1] == held["bmojo", 20, 1] < held["bmojo", 20, 2]
    assert held["transformer", 300, 1] > held["transformer", 20, 1]
    drawn = subprocess.run([*command, "--draw"], capture_output=True, text=True, cwd=ROOT)
    assert drawn.returncode == 0, drawn.stderr
    assert output.with_suffix(".svg").exists()
