"""The bundles of the attention's TPU kernels beside splash attention's, and what counts them."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from benchmarks import tpu_attention_bundles, tpu_branches, tpu_bundles
from pallas_kernels.memory_attention import mask
from pallas_kernels.shapes import ATTENTION_CASES

ROOT = pathlib.Path(__file__).parents[2]
# What was reached, with a little room for another libtpu.
ROOM = 1.02
# The oldest and the newest: others take their time to compile for, and are counted by the command.
CHIPS = ("v4", "v6e")

without_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, which compiles for TPUs, is not installed",
)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the command writes, run in a process of its own, whose libtpu dumps what it does."""
    path = tmp_path_factory.mktemp("bundles") / "bundles.json"
    command = [sys.executable, "-m", "benchmarks.tpu_cycles"]
    command += ["--op", "memory_attention", "--output", str(path), "--chips", ",".join(CHIPS)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=900)
    return json.loads(path.read_text())


@pytest.mark.slow
@without_libtpu
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("case", tpu_attention_bundles.CASES)
@pytest.mark.parametrize("name", tpu_attention_bundles.PASSES)
def test_bundles(
    measured: dict[str, Any], chip: str, case: str, name: tpu_attention_bundles.Pass
) -> None:
    recorded = json.loads((ROOT / "results/kernels/tpu_attention_bundles.json").read_text())
    count = measured["counts"][chip][case][name]
    assert count["ours"] <= tpu_attention_bundles.GOAL * count["splash"], count
    assert count["ours"] <= ROOM * recorded["counts"][chip][case][name]["ours"], count


# A loop of two stages, of which the second has two conditions. One bundle follows a branch anyway.
BUNDLES = """
// kernel: made up
     0   :  { %a = vmov 1 } /* Start region 1 */
  0x10 LB: > { %b = vadd %a, %a
bounds: (1, 2) } /* Start region 9 :: Start region 2 */
  0x11   : > { %c = sbr.rel (%p1) target = $region3  ;;  %d = vmul %b, %b }
  0x12   : > { %e = vadd %c, %a }
  0x13   : > { %f = vadd %e, %a } /* Start region 4 */
  0x14   : > { %g = sbr.rel (!%p2) target = $region5 }
  0x15   :  {}
  0x16   : > { %h = vadd %f, %a } /* Start region 6 */
  0x17   :  {}
  0x18   : > { %i = vadd %f, %a } /* End region 6 */
  0x19 PF: > { %j = vadd %f, %a } /* Start/End empty region 5 */
  0x1a   : > { %k = sbr.rel (%p3) target = $region7 }
  0x1b   : > { %l = vadd %f, %a }
  0x1c   : > { %m = vadd %f, %a } /* Start region 8 */
  0x1d PF: > { %n = vadd %f, %a } /* Start/End empty region 7 :: End region 4 */
  0x1e PF: > { %o = vadd %f, %a } /* Start/End empty region 3 */
  0x1f   :  { %p = sbr.rel (!%p4) target = $region9 }
  0x20   : > { %q = vadd %f, %a } /* End region 9 */
  0x21   :  { %r = vadd %f, %a }
"""


def test_every_bundle_counts_as_often_as_it_runs() -> None:
    # In the loop 17, of them 3 in the first condition and 1 in the second.
    assert tpu_attention_bundles.per_step(BUNDLES, "v4", [1, 1]) == 17
    assert tpu_attention_bundles.per_step(BUNDLES, "v4", [0.5, 0.25]) == 13 + 1.5 + 0.25
    # The compiler leaves out what always holds.
    assert tpu_attention_bundles.per_step(BUNDLES, "v4", [1, 0.5, 0.25]) == 14.75


def test_unknown_structure_is_refused() -> None:
    with pytest.raises(ValueError, match="count=2 branches, where conditions hold in"):
        tpu_attention_bundles.per_step(BUNDLES, "v4", [0.5, 0.25, 0.125])
    with pytest.raises(ValueError, match="0 loops, where there should be one"):
        tpu_attention_bundles.per_step(BUNDLES.replace("$region9", "$region2000"), "v4", [1, 1])
    # Whether it is the second or the third one that is left makes a difference.
    with pytest.raises(ValueError, match="count=3 branches"):
        tpu_branches.of_branches([0.5, 1, 0, 0.25], 3)


def test_bundles_are_parsed() -> None:
    bundles = tpu_bundles.parse(BUNDLES)
    assert len(bundles) == 19
    depths = [bundle.depth for bundle in bundles]
    assert depths == [0, 1, 1, 1, 1, 1, 0, 1, 0, 1, 1, 1, 1, 1, 1, 1, 0, 1, 0]
    assert [i for i, bundle in enumerate(bundles) if bundle.starts] == [1]
    assert bundles[1].regions == (9, 2)
    targets = [(i, b.target) for i, b in enumerate(bundles) if b.target is not None]
    assert targets == [(2, 3), (5, 5), (11, 7), (16, 9)]


def test_shares_of_conditions() -> None:
    """Of the step's number, of an array that is known beforehand, and of both."""

    def kernel(wanted: Any, x: Any, out: Any) -> None:
        i, j = pl.program_id(0), pl.program_id(1)

        @pl.when(j == 0)
        def _() -> None:
            out[...] = x[...]

        @pl.when(wanted[i, j] > 2)
        def _() -> None:
            out[...] += x[...]

            @pl.when(jnp.maximum(i, j) >= 3)
            def _() -> None:
                out[...] *= 2

        @pl.when(i >= 0)
        def _() -> None:
            out[...] += 1

    wanted = np.arange(20).reshape(4, 5) % 7
    block = pl.BlockSpec((8, 128), lambda i, j, wanted: (0, 0))

    @jax.jit
    def program(x: jax.Array) -> jax.Array:
        grid = pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=(4, 5), in_specs=[block], out_specs=block
        )
        shape = jax.ShapeDtypeStruct((8, 128), jnp.float32)
        return pl.pallas_call(kernel, grid_spec=grid, out_shape=shape)(jnp.asarray(wanted), 2 * x)

    (found,) = tpu_branches.kernels(program, jax.ShapeDtypeStruct((8, 128), jnp.float32))
    assert found.grid == (4, 5)
    i, j = np.indices((4, 5))
    late = (wanted > 2) & (np.maximum(i, j) >= 3)
    assert found.shares == (1 / 5, np.mean(wanted > 2), np.mean(late), 1)


@pytest.mark.parametrize("case", ["primes", "full"])
def test_visible_logits(case: str) -> None:
    shape = ATTENTION_CASES[case]
    query, key = jnp.arange(shape.L)[:, None], jnp.arange(shape.L)[None]
    windows = {"window": shape.window, "fading_window": shape.fading_window}
    seen = mask.in_context(query, key, window=shape.window) | mask.fading(query, key, **windows)
    memory = jnp.arange(-(-shape.L // shape.chunk))[None]
    memories = mask.eidetic(query, memory, chunk=shape.chunk).sum() * shape.eidetic
    assert tpu_attention_bundles.visible(shape) == seen.sum() + memories
