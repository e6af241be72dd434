"""Training steps compiled for TPUs that are not here."""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest

from bmojo_jax import aot
from bmojo_jax.config import MeshConfig
from tests.runs import tiny_run
from tests.test_train_cli import ROOT

without_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, which compiles for TPUs, is not installed",
)


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bmojo_jax.aot", *arguments],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
    )


SMALL = (
    "--config=configs/lm.py:bmojo,tiny",
    "--config.data.batch_size=8",
    "--config.data.sequence_length=512",
    "--config.model.depth=2",
)


@pytest.mark.slow
@without_libtpu
def test_a_step_is_compiled_and_reported(tmp_path):
    output = tmp_path / "report.json"
    ran = _run("--topology=v5e:2x2", *SMALL, f"--output={output}", "--config.mesh.fsdp=4")
    assert ran.returncode == 0, ran.stderr
    assert "mesh fsdp=4" in ran.stdout and "16 GiB: fits" in ran.stdout
    report = json.loads(output.read_text())
    assert (report["devices"], report["device"]) == (4, "TPU v5 lite")
    assert report["memory"]["fits"] and report["memory"]["needed"] > report["memory"]["arguments"]
    # Parameters and two moments, float32, a quarter each; vectors are whole, and all is in tiles.
    assert 3 <= report["memory"]["arguments"] / report["parameters"] < 6
    assert report["received"]["all-gather"] > 0
    assert report["step_s"][0] <= report["step_s"][1]
    assert report["settings"]["mesh"]["fsdp"] == 4


@pytest.mark.slow
@without_libtpu
def test_kernels_run_on_a_cut_row():
    """Those of TPUs, with rows over four devices, are in the program."""
    ran = _run("--topology=v5e:2x2", *SMALL, "--config.mesh.data=1", "--config.mesh.context=4")
    assert ran.returncode == 0, ran.stderr
    assert "selective_scan runs as pallas_tpu" in ran.stderr
    assert "memory_attention runs as pallas_tpu" in ran.stderr
    assert "collective-permute" in ran.stdout


@pytest.mark.slow
@without_libtpu
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--topology=v5e:3x3",), "aot.py: topology='v5e:3x3' must be like v5e:2x2"),
        (("--topology=v3:2x2",), r"aot.py: topology='v3:2x2' has chips of TPU v3; .* TPU v4"),
        (("--topology=v5e:2x2", "--config.mesh.fsdp=3"), "aot.py: .*mesh.fsdp=3.*devices, 4"),
        (("--topology=v5e:2x2", "--config.data.batch_size=6"), "aot.py: data.batch_size"),
    ],
)
def test_what_cannot_be_compiled_is_said_in_a_line(arguments, message):
    ran = _run(*SMALL, *arguments)
    assert ran.returncode == 1
    assert re.search(message, ran.stderr.strip().splitlines()[-1])


def test_advice_names_what_takes_less(tmp_path):
    run = tiny_run(tmp_path, mesh=MeshConfig(data=-1), data={"batch_size": 16})
    wanted = {"mesh.data=1 mesh.fsdp=4", "optim.accumulate=2", 'model.remat="full"'}
    advice = aot.advice(run, 4)
    assert wanted <= {line.split(":")[0] for line in advice}
    assert advice[-1] == "a larger topology"
    full = dataclasses.replace(run, model=dataclasses.replace(run.model, remat="full"))
    assert 'model.remat="nested"' in {line.split(":")[0] for line in aot.advice(full, 4)}
    model = dataclasses.replace(run.model, remat="nested")
    smallest = dataclasses.replace(
        run, model=model, mesh=MeshConfig(data=1, fsdp=-1), vocab_chunk=2048
    )
    smallest = dataclasses.replace(
        smallest, data=dataclasses.replace(run.data, batch_size=4, sequence_length=10)
    )
    assert aot.advice(smallest, 4) == ["a larger topology"]
