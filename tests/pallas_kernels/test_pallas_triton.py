"""The Triton kernels of the selective scan: what they save, their block sizes, their lowering.

Their results are compared in `test_selective_scan.py`, in interpret mode.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels import Unsupported
from pallas_kernels.selective_scan import pallas_triton
from pallas_kernels.selective_scan.operands import Operands, ScanOutput
from pallas_kernels.selective_scan.triton_sums import Terms, sums
from pallas_kernels.shapes import SCAN_CASES, ScanShape
from tests.pallas_kernels.test_selective_scan import draw, expected, outputs_and_gradients, run
from tests.tolerances import relative_rms

H100 = AbstractDevice("NVIDIA H100 80GB HBM3", None, platform="gpu")
GPU = AbstractMesh((), (), abstract_device=H100)
KERNEL = "__gpu$xla.gpu.triton"


def abstract(shape: ScanShape, dtype: str = "bfloat16") -> Operands:
    sizes = dataclasses.asdict(shape)

    def array(name: str) -> jax.ShapeDtypeStruct:
        dims = tuple(sizes[letter] for letter in name.rsplit("_", 1)[1])
        kind = {"reset_BL": "bool", "a_EN": "float32", "h0_BEN": "float32"}.get(name, dtype)
        return jax.ShapeDtypeStruct(dims, kind)

    return Operands(*(array(name) for name in Operands._fields))


def test_a_kernel_equals_float64(rng: np.random.Generator) -> None:
    """One shape by default; `test_selective_scan.py` has the others, which are slow."""
    operands = draw(rng, ScanShape(B=2, L=21, E=4, N=3))
    blocks = {"chunk": 8, "forward_groups": 1}
    got = outputs_and_gradients(operands, "pallas_triton", blocks)
    want = expected(operands, "pallas_triton")
    errors = {name: relative_rms(got[name], want[name]) for name in want}
    assert all(error < 1e-6 for error in errors.values()), errors


@pytest.mark.parametrize("name", [name for name in SCAN_CASES if name.startswith("b")])
def test_saved_for_backward(name: str) -> None:
    """Beyond the inputs one byte per element at most, and nothing without a backward pass."""
    shape = SCAN_CASES[name]

    def forward(operands: Operands, for_backward: bool) -> Any:
        return pallas_triton.forward(operands, {}, for_backward=for_backward)

    with jax.sharding.use_abstract_mesh(GPU):
        saving = functools.partial(forward, for_backward=True)
        _, (_, starts) = jax.eval_shape(saving, abstract(shape))
        _, (_, nothing) = jax.eval_shape(
            functools.partial(forward, for_backward=False), abstract(shape)
        )
    assert starts.size * starts.dtype.itemsize <= shape.B * shape.L * shape.E
    assert nothing is None


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("N", [8, 32, 64])
def test_every_number_of_states_lowers(N: int, dtype: str) -> None:
    shape = ScanShape(B=1, L=100_003, E=1000, N=N)

    def both(operands: Operands) -> Operands:
        out, residuals = pallas_triton.forward(operands, {}, for_backward=True)
        return pallas_triton.backward(residuals, ScanOutput(*out), {})

    with jax.sharding.use_abstract_mesh(GPU):
        lowered = jax.jit(both).trace(abstract(shape, dtype)).lower(lowering_platforms=("cuda",))
    # So few channels are cut into segments: the states before them, and the gradients after; and
    # the sums over programs.
    assert lowered.as_text().count(f"@{KERNEL}") == 5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sums_over_programs(rng: np.random.Generator, dtype: str) -> None:
    """Of some terms of an array and of all of another, as many as are several steps of a program;
    nothing of the columns that are not wanted, whatever they are."""
    values = rng.normal(size=(300, 2, 100)).astype(np.float32)
    values[:, :, 72:] = np.nan
    few = rng.normal(size=(1, 1, 9000)).astype(np.float32)
    got = sums(
        {
            "early": Terms(jnp.asarray(values), 0, 131, 72, jnp.dtype(dtype)),
            "late": Terms(jnp.asarray(values), 131, 169, 72, jnp.dtype(dtype)),
            "few": Terms(jnp.asarray(few), 0, 1, 9000),
        },
        interpret=True,
    )
    limit = 1e-6 if dtype == "float32" else 4e-3
    for name, terms in {"early": values[:131], "late": values[131:]}.items():
        assert got[name].dtype == dtype
        want = terms[:, :, :72].astype(np.float64).sum(0)
        assert relative_rms(np.asarray(got[name], np.float64), want) < limit
    np.testing.assert_array_equal(got["few"], few[0])


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ({"forward_warps": 3}, r"blocks\['forward_warps'\]=3 must be a power of two"),
        ({"chunk": 8}, r"blocks\['chunk'\]=8 must be at least 4 times .*'forward_groups'\]=8"),
        ({"warps": 4}, "blocks has 'warps'; it takes"),
    ],
)
def test_wrong_blocks_are_named(
    rng: np.random.Generator, blocks: dict[str, int], message: str
) -> None:
    operands = draw(rng, ScanShape(B=1, L=64, E=8, N=16))
    with pytest.raises(ValueError, match=message):
        outputs_and_gradients(operands, "pallas_triton", blocks)


def test_what_cannot_run_is_refused(rng: np.random.Generator) -> None:
    operands = abstract(SCAN_CASES["b1_l2048_e4096"])
    other = AbstractDevice("AMD Instinct MI300X", None, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=other)):
        with pytest.raises(Unsupported, match="this is AMD Instinct MI300X"):
            pallas_triton.forward(operands, {}, for_backward=False)
    long = abstract(ScanShape(B=1, L=2**20, E=2**11, N=16))
    with jax.sharding.use_abstract_mesh(GPU), pytest.raises(Unsupported, match="below 2\\^31"):
        pallas_triton.forward(long, {}, for_backward=False)
    with pytest.raises(Unsupported, match="must have elements"):
        run(draw(rng, ScanShape(B=0, L=4, E=8, N=16)), "pallas_triton")


@pytest.mark.slow
@pytest.mark.parametrize(("segments", "L", "parts"), [(2, 32, 1), (2, 47, 2), (4, 61, 4)])
def test_segments_make_a_whole(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, segments: int, L: int, parts: int
) -> None:
    """Side by side from border states that a first pass finds, which cuts them once more; 2 is the
    shortest chain of them."""
    steps = -(-L // (8 * segments)) * 8
    monkeypatch.setattr(pallas_triton, "_SHORTEST_PART", steps // parts)
    monkeypatch.setattr(pallas_triton, "_GROUPS_ALONE", 1)
    assert pallas_triton._parts(steps, warps=2) == parts
    operands = draw(rng, ScanShape(B=2, L=L, E=5, N=16))
    blocks = {"chunk": 8, "forward_groups": 1}
    blocks |= {"forward_segments": segments, "backward_segments": segments}
    got = outputs_and_gradients(operands, "pallas_triton", blocks)
    want = expected(operands, "pallas_triton")
    errors = {name: relative_rms(got[name], want[name]) for name in want}
    assert all(error < 1e-6 for error in errors.values()), errors


def test_few_channels_are_cut_into_segments() -> None:
    one_row = abstract(SCAN_CASES["b1_l2048_e4096"])
    sizes = pallas_triton._sizes(one_row, {})
    assert (sizes["forward_segments"], sizes["backward_segments"]) == (1, 4)
    assert pallas_triton._parts(512, warps=3 * 512) == 2
    for shape in (SCAN_CASES["b8_l2048_e4096"], ScanShape(B=1, L=300, E=64, N=16)):
        sizes = pallas_triton._sizes(abstract(shape), {})
        assert (sizes["forward_segments"], sizes["backward_segments"]) == (1, 1)


@pytest.mark.slow
def test_long_document_of_few_channels(rng: np.random.Generator) -> None:
    """Many chunks: the state and its gradient go through all of them."""
    operands = draw(rng, ScanShape(B=1, L=700, E=8, N=16), leave_out=("reset_BL",))
    operands["a_EN"] = operands["a_EN"] * 0.01
    got = outputs_and_gradients(operands, "pallas_triton")
    want = expected(operands, "pallas_triton")
    errors = {name: relative_rms(got[name], want[name]) for name in want}
    assert all(error < 2e-6 for error in errors.values()), errors
    assert run(operands, "pallas_triton").y_BLE.shape == (1, 700, 8)
