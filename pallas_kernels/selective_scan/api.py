"""The selective scan of Mamba-1 with softplus, skip connection and gate in one operation.

    dt_t = softplus(dt_raw_t + dt_bias)
    h_t  = exp(dt_t a) h_{t-1} + (dt_t x_t) b_t       state [E, N] per batch row
    y_t  = (h_t c_t + d x_t) SiLU(z_t)

(Mamba, arXiv 2312.00752, section 3.) Ours on top: an initial and a final state with gradients,
and resets at document boundaries.

Dtypes: state, decays and sums are in the inputs' common dtype and at least float32; y has x's
dtype, every gradient that of its input, and the final state is float32 (float64 if an input is).
Of bfloat16 inputs "pallas_triton" takes products with b and c on tensor cores, which cut their
other factor to 11 bits.

A neutral step: dt_raw = -1e4 makes dt exactly 0 and the decay exactly 1, so the state leaves the
step as it came. Decoding uses it for rows that have nothing to read.

Worked example, E = N = 1, a = -1, b = c = 1, d = 0, dt = ln 2 (the state halves per step):
x = 1, 0, 0 gives y = ln 2, ln 2 / 2, ln 2 / 4; with a reset at the last step ln 2, ln 2 / 2, 0.

Implementations: "reference" (differentiated by JAX) and backends. A backend is a module with
`forward(operands, blocks, *, for_backward) -> (ScanOutput, residuals)` and
`backward(residuals, d_out, blocks) -> Operands` of gradients, which raises `Unsupported` for
what it cannot take; `_scan` below is the one place that makes a differentiable function of them.
"""

import functools
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from pallas_kernels import dispatch
from pallas_kernels.selective_scan import pallas_tpu, pallas_triton, reference, xla
from pallas_kernels.selective_scan.operands import Operands, ScanOutput

__all__ = ["SAVED", "ScanOutput", "selective_scan"]

# The name, for policies of `jax.checkpoint`, of y_BLE and of what the backward pass needs beyond
# the operands: with both saved, nothing of the scan is computed again.
SAVED = "selective_scan"

Blocks = tuple[tuple[str, int], ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 2))
def _scan(backend: ModuleType, operands: Operands, blocks: Blocks) -> ScanOutput:
    return backend.forward(operands, dict(blocks), for_backward=False)[0]


def _scan_forward(
    backend: ModuleType, operands: Operands, blocks: Blocks
) -> tuple[ScanOutput, Any]:
    out, (_, states) = backend.forward(operands, dict(blocks), for_backward=True)
    out = out._replace(y_BLE=checkpoint_name(out.y_BLE, SAVED))
    return out, (operands, jax.tree.map(lambda v: checkpoint_name(v, SAVED), states))


def _scan_backward(
    backend: ModuleType, blocks: Blocks, residuals: Any, d_out: ScanOutput
) -> tuple[Operands]:
    return (backend.backward(residuals, d_out, dict(blocks)),)


_scan.defvjp(_scan_forward, _scan_backward)


def _run_reference(operands: Operands, blocks: Blocks) -> ScanOutput:
    if blocks:
        raise ValueError(f"blocks={dict(blocks)} must be None: the reference has no block sizes")
    return reference.scan(operands)


IMPLEMENTATIONS = {
    "reference": _run_reference,
    "xla": functools.partial(_scan, xla),
    "pallas_triton": functools.partial(_scan, pallas_triton),
    "pallas_tpu": functools.partial(_scan, pallas_tpu),
}


def selective_scan(
    x_BLE: Float[Array, "B L E"],
    dt_BLE: Float[Array, "B L E"],
    a_EN: Float[Array, "E N"],
    b_BLN: Float[Array, "B L N"],
    c_BLN: Float[Array, "B L N"],
    d_E: Float[Array, " E"],
    *,
    z_BLE: Float[Array, "B L E"] | None = None,
    dt_bias_E: Float[Array, " E"] | None = None,
    reset_BL: Bool[Array, "B L"] | None = None,
    h0_BEN: Float[Array, "B E N"] | None = None,
    implementation: str | None = None,
    blocks: Mapping[str, int] | None = None,
) -> ScanOutput:
    """Runs the scan along L.

    Args:
      dt_BLE: step sizes before bias and softplus.
      a_EN: decay rates, already negative (-exp(A_log) is the caller's). With resets none may be
        positive.
      d_E: weight of the skip connection.
      z_BLE: gate before SiLU. Without it y is not gated.
      dt_bias_E: added to dt_BLE.
      reset_BL: True at t drops the state, h0_BEN too, before token t is read. The kernels drop it
        by a decay of 0, which inf and NaN outlive.
      h0_BEN: state before the first token, zero by default.
      implementation: "reference", "xla", "pallas_triton", "pallas_tpu", or None for the platform's
        best.
      blocks: block sizes of the implementation; results do not depend on them.

    Returns:
      Outputs and final state. Gradients flow through both, to every float input.

    Raises:
      ValueError: shapes, dtypes or options do not fit each other.
      Unsupported: the named implementation cannot take these inputs.
    """
    if x_BLE.ndim != 3 or x_BLE.shape[1] < 1:
        raise ValueError(f"{x_BLE.shape=} must be [B, L, E] with L >= 1")
    if a_EN.ndim != 2:
        raise ValueError(f"{a_EN.shape=} must be [E, N]")
    operands = Operands(
        x_BLE,
        dt_BLE,
        a_EN,
        b_BLN,
        c_BLN,
        d_E,
        z_BLE,
        jnp.zeros_like(d_E) if dt_bias_E is None else dt_bias_E,
        reset_BL,
        jnp.zeros((x_BLE.shape[0], *a_EN.shape), jnp.float32) if h0_BEN is None else h0_BEN,
    )
    _check(operands)
    sizes = tuple(sorted((blocks or {}).items()))
    return dispatch.run("selective_scan", IMPLEMENTATIONS, implementation, operands, sizes)


def _check(operands: Operands) -> None:
    """Every operand has the shape that its suffix says, in the sizes of x_BLE and a_EN."""
    (B, L, E), N = operands.x_BLE.shape, operands.a_EN.shape[1]
    sizes = {"B": B, "L": L, "E": E, "N": N}
    for name, array in operands._asdict().items():
        if array is None:
            continue
        wanted = tuple(sizes[letter] for letter in name.rsplit("_", 1)[1])
        if array.shape != wanted:
            raise ValueError(
                f"{name}.shape={array.shape} must be {wanted}, beside "
                f"x_BLE.shape={operands.x_BLE.shape} and a_EN.shape={operands.a_EN.shape}"
            )
        kind = jnp.bool_ if name == "reset_BL" else jnp.floating
        if not jnp.issubdtype(array.dtype, kind):
            raise ValueError(f"{name}.dtype={array.dtype} must be {kind.__name__}")
