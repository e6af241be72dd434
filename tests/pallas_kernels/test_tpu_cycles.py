"""The bundles of the selective scan's TPU kernels, and what counts them."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest

from benchmarks import tpu_scan_bundles

ROOT = pathlib.Path(__file__).parents[2]
# What was reached, with a little room for another libtpu.
ROOM = 1.02

without_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, which compiles for TPUs, is not installed",
)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the command writes, run in a process of its own, whose libtpu dumps what it does."""
    path = tmp_path_factory.mktemp("bundles") / "bundles.json"
    command = [sys.executable, "-m", "benchmarks.tpu_cycles", "--output", str(path)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=600)
    return json.loads(path.read_text())


@pytest.mark.slow
@without_libtpu
@pytest.mark.parametrize("chip", tpu_scan_bundles.CHIPS)
@pytest.mark.parametrize("program", tpu_scan_bundles.PROGRAMS)
def test_bundles(measured: dict[str, Any], chip: str, program: tpu_scan_bundles.Program) -> None:
    recorded = json.loads((ROOT / "results/kernels/tpu_bundles.json").read_text())
    counts = {variant: measured["counts"][chip][variant][program] for variant in ("plain", "full")}
    goal = tpu_scan_bundles.GOALS[program]
    assert counts["plain"]["total"] <= goal.must
    assert counts["full"]["total"] <= tpu_scan_bundles.FULL_GOAL * counts["plain"]["total"]
    for variant, count in counts.items():
        before = recorded["counts"][chip][variant][program]["total"]
        assert count["total"] <= ROOM * before, (variant, count)


BUNDLES = """
// kernel: made up
     0   :  { %a = vmov 1 }
  0x10   : > { %b = vadd %a, %a }
  0x11 LB: >> { %c = vadd %b, %a ;; %d = vmul %b, %b }
  0x12   : >> { %e = vadd %c, %a }
  0x13 LE: > { %f = vadd %e, %a }
  0x14 LB: >> { %g = vadd %f, %a }
  0x15   : >> { %h = vadd %f, %a }
  0x16   : >> { %i = vadd %f, %a }
  0x17 LB: >> { %j = vadd %f, %a }
  0x18 LB: >> { %k = vadd %f, %a }
  0x19 PF: > { %l = vadd %k, %a }
"""


def test_every_bundle_that_runs_is_counted() -> None:
    count = tpu_scan_bundles.count(BUNDLES, "forward", C=16, Z=4, K=4, vmem_mib=1.0)
    # A tile is two units of 512 channels; `spread` runs for one tile in four.
    assert count.loops == {
        "spread": 2 / 16 / 4 / 2,
        "prepare": 3 / 32 / 2,
        "scan": 1 / 16 / 2,
        "finish": 1 / 32 / 2,
    }
    assert count.outside == 3 / 16 / 2
    assert count.total == sum(count.loops.values()) + count.outside


def test_unknown_loops_are_refused() -> None:
    with pytest.raises(ValueError, match="backward: 4 loops where there should be"):
        tpu_scan_bundles.count(BUNDLES, "backward", C=16, Z=4, K=4, vmem_mib=1.0)
