"""The TPU kernels of the selective scan: as they are compiled, on a simulated memory of a TPU.

Their results are compared in `test_selective_scan.py`, in interpret mode and without unrolling.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh

# Whether races were found is told nowhere else.
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as simulator  # isort: skip

from pallas_kernels import Unsupported, dispatch
from pallas_kernels.selective_scan import pallas_tpu
from pallas_kernels.selective_scan.operands import Operands
from pallas_kernels.shapes import SCAN_CASES, ScanShape
from tests.pallas_kernels.test_selective_scan import draw, expected, outputs_and_gradients
from tests.tolerances import relative_rms

TPU = AbstractMesh((), (), abstract_device=AbstractDevice("TPU v5 lite", None, platform="tpu"))


def simulate(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
    """Runs kernels as they are compiled for a TPU, on a simulated one."""
    monkeypatch.setattr(dispatch, "interpreted", lambda wanted: False)
    real = pl.pallas_call

    def pallas_call(*args: Any, **kwargs: Any) -> Any:
        return real(*args, **kwargs | {"interpret": pltpu.InterpretParams(**settings)})

    monkeypatch.setattr(pallas_tpu.pl, "pallas_call", pallas_call)
    jax.clear_caches()


@pytest.mark.slow
def test_no_races(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing reads memory that was never written (it holds NaN), is out of bounds, or is on its
    way; the order of the batch changes no bit."""
    operands = draw(rng, ScanShape(B=2, L=20, E=1030, N=8))
    want = expected(operands, "pallas_tpu")
    runs = []
    for seed in (0, 1):
        simulate(monkeypatch, detect_races=True, random_seed=seed)
        runs.append(outputs_and_gradients(operands, "pallas_tpu", {"chunk": 16}))
        assert simulator.races is not None and not simulator.races.races_found
    errors = {name: relative_rms(runs[0][name], want[name]) for name in want}
    assert all(error < 1e-6 for error in errors.values()), errors
    for name in want:
        np.testing.assert_array_equal(runs[0][name], runs[1][name], err_msg=name)


def test_a_kernel_equals_float64(rng: np.random.Generator) -> None:
    """One shape by default; `test_selective_scan.py` has the others, which are slow."""
    operands = draw(rng, ScanShape(B=2, L=21, E=4, N=3))
    got = outputs_and_gradients(operands, "pallas_tpu", {"chunk": 16})
    want = expected(operands, "pallas_tpu")
    errors = {name: relative_rms(got[name], want[name]) for name in want}
    assert all(error < 1e-6 for error in errors.values()), errors


def abstract(shape: ScanShape) -> Operands:
    sizes = dataclasses.asdict(shape)

    def array(name: str) -> jax.ShapeDtypeStruct:
        dims = tuple(sizes[letter] for letter in name.rsplit("_", 1)[1])
        dtype = {"reset_BL": "bool", "a_EN": "float32", "h0_BEN": "float32"}.get(name, "bfloat16")
        return jax.ShapeDtypeStruct(dims, dtype)

    return Operands(*(array(name) for name in Operands._fields))


@pytest.mark.parametrize("name", [name for name in SCAN_CASES if name.startswith("b")])
def test_saved_for_backward(name: str) -> None:
    """Beyond the inputs one byte per element at most, and nothing without a backward pass."""
    shape = SCAN_CASES[name]

    def run(operands: Operands, for_backward: bool) -> Any:
        return pallas_tpu.forward(operands, {}, for_backward=for_backward)

    with jax.sharding.use_abstract_mesh(TPU):
        saving = functools.partial(run, for_backward=True)
        _, (_, first) = jax.eval_shape(saving, abstract(shape))
        _, nothing = jax.eval_shape(functools.partial(run, for_backward=False), abstract(shape))
    padded = -(-shape.E // 1024) * 1024
    assert first.size * first.dtype.itemsize <= shape.B * shape.L * padded
    assert nothing is None


@pytest.mark.parametrize("E", [1536, 16384])
@pytest.mark.parametrize("N", [8, 16, 32, 64])
def test_default_blocks_fit_in_vmem(N: int, E: int) -> None:
    shape = ScanShape(B=1, L=2048, E=E, N=N)

    def forward(operands: Operands, blocks: dict[str, int]) -> Any:
        return pallas_tpu.forward(operands, blocks, for_backward=True)

    with jax.sharding.use_abstract_mesh(TPU):
        jax.eval_shape(functools.partial(forward, blocks={}), abstract(shape))
        # Already the forward pass refuses what only the backward pass has no room for.
        with pytest.raises(Unsupported, match=rf"C=512 steps of {N=} states .* MiB of VMEM"):
            jax.eval_shape(functools.partial(forward, blocks={"chunk": 512}), abstract(shape))
