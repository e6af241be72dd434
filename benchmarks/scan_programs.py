"""The programs of a selective scan that are checked and timed, and their random inputs.

    forward           outputs alone, as in inference
    forward_saving    outputs, and what the backward pass needs beyond the inputs
    backward          inputs, saved values and cotangents to gradients
    forward_backward  both in one program, as in training

Two variants: "plain" has one document per row and no initial state; "full" has resets at document
boundaries, an initial state, and a gradient that reaches the final state.
"""

import functools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from benchmarks.timing import nbytes
from pallas_kernels import dispatch, selective_scan
from pallas_kernels.selective_scan import api
from pallas_kernels.selective_scan.operands import Operands, ScanOutput
from pallas_kernels.shapes import ScanShape

Variant = Literal["plain", "full"]
Kind = Literal["forward", "forward_saving", "backward", "forward_backward"]
Arrays = dict[str, Array]
VARIANTS: tuple[Variant, ...] = ("plain", "full")
KINDS: tuple[Kind, ...] = ("forward", "forward_saving", "backward", "forward_backward")
# Tokens of a document on average, where rows hold several.
_DOCUMENT = 256
# Results of the special-function unit of an H100 or H200, ps each: 132 multiprocessors give 16 a
# clock at 1.755 GHz. An element takes N exponentials and those of softplus and gate, in either pass
# (a backward pass that computes the states again takes twice as many, unless it keeps them).
_RESULT_PS, _BEYOND_STATES = 5.4 / 20, 4


class Inputs(NamedTuple):
    """Arguments of `selective_scan` by name, and the cotangents of its outputs by theirs."""

    arrays: Arrays
    d_out: Arrays  # h_BEN only in the full variant


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def draw(key: Array, *, shape: ScanShape, dtype: str) -> Inputs:
    """Random inputs as a Mamba layer has them at the start of training, in the full variant.

    Decay rates near -(n + 1), step sizes within [1e-3, 1e-1] log-uniformly; weights, h0 and the
    final state's cotangent are float32, all else has `dtype`.
    """
    B, L, E, N = shape.B, shape.L, shape.E, shape.N
    keys = iter(jax.random.split(key, 13))

    def normal(*sizes: int, dtype: str = dtype) -> Array:
        return jax.random.normal(next(keys), sizes, jnp.float32).astype(dtype)

    rates_N = jnp.arange(1, N + 1, dtype=jnp.float32)
    dt_E = 10 ** jax.random.uniform(next(keys), (E,), jnp.float32, -3, -1)
    arrays = {
        "x_BLE": normal(B, L, E),
        "dt_BLE": 0.5 * normal(B, L, E),
        "a_EN": -rates_N[None, :] * jnp.exp(0.1 * normal(E, N, dtype="float32")),
        "b_BLN": normal(B, L, N),
        "c_BLN": normal(B, L, N),
        "d_E": 1 + 0.1 * normal(E, dtype="float32"),
        "z_BLE": normal(B, L, E),
        "dt_bias_E": jnp.log(jnp.expm1(dt_E)),
        "h0_BEN": normal(B, E, N, dtype="float32"),
        "reset_BL": jax.random.bernoulli(next(keys), 1 / _DOCUMENT, (B, L)),
    }
    return Inputs(arrays, {"y_BLE": normal(B, L, E), "h_BEN": normal(B, E, N, dtype="float32")})


def as_variant(inputs: Inputs, variant: Variant) -> Inputs:
    """Inputs of the full variant, or what is left of them in the plain one."""
    if variant == "full":
        return inputs
    arrays = {name: v for name, v in inputs.arrays.items() if name not in ("h0_BEN", "reset_BL")}
    return Inputs(arrays, {"y_BLE": inputs.d_out["y_BLE"]})


def outputs_and_gradients(
    inputs: Inputs, *, implementation: str, blocks: Mapping[str, int] | None = None
) -> Arrays:
    """y_BLE and h_BEN, and "d x_BLE" and so on for every float input that is there."""
    floats = {name: v for name, v in inputs.arrays.items() if name != "reset_BL"}
    reset_BL = inputs.arrays.get("reset_BL")

    def run(floats: Arrays) -> ScanOutput:
        return selective_scan(
            **floats, reset_BL=reset_BL, implementation=implementation, blocks=blocks
        )

    out, pull_back = jax.vjp(run, floats)
    gradients = pull_back(_cotangents(inputs.d_out, out))[0]
    return out._asdict() | {f"d {name}": v for name, v in gradients.items()}


def _cotangents(d_out: Arrays, out: Any) -> ScanOutput:
    """Of both outputs; one that is not there is zero, as autodiff has it."""
    zeros = jnp.zeros(out.h_BEN.shape, out.h_BEN.dtype)
    return ScanOutput(d_out["y_BLE"], d_out.get("h_BEN", zeros))


def _operands(arrays: Arrays) -> Operands:
    """What `api.selective_scan` hands to a backend."""
    B, _, E = arrays["x_BLE"].shape
    h0_BEN = jnp.zeros((B, E, arrays["a_EN"].shape[1]), jnp.float32)
    optional: dict[str, Any] = {"z_BLE": None, "reset_BL": None, "h0_BEN": h0_BEN}
    return Operands(**(optional | arrays))


class Programs(NamedTuple):
    """Jitted programs of one implementation for inputs of one shape."""

    forward: Any  # Inputs -> ScanOutput
    forward_saving: Any  # Inputs -> (ScanOutput, what is saved beyond the inputs)
    backward: Any  # Inputs, what is saved -> gradients
    forward_backward: Any  # Inputs -> outputs and gradients
    saved: Any  # shapes of what is saved beyond the inputs

    def arguments(self, kind: Kind, inputs: Inputs) -> tuple[Any, ...]:
        """What the program `kind` is called with."""
        return (inputs, self.forward_saving(inputs)[1]) if kind == "backward" else (inputs,)

    def shapes(self, kind: Kind, inputs: Inputs) -> tuple[Any, ...]:
        """The same for the compiler: nothing is run."""
        return (inputs, self.saved) if kind == "backward" else (inputs,)

    def results(self, kind: Kind, inputs: Inputs) -> Arrays:
        """What the program `kind` makes of inputs, named as by `outputs_and_gradients`."""
        got = getattr(self, kind)(*self.arguments(kind, inputs))
        if kind == "forward_saving":
            got = got[0]
        return got._asdict() if isinstance(got, ScanOutput) else got


def arithmetic_floor(kind: Kind, shape: ScanShape) -> float | None:
    """Seconds, where the device's are known."""
    if not any(name in dispatch.device_kind() for name in ("H100", "H200")):
        return None
    passes = 2 if kind == "forward_backward" else 1
    return 1e-12 * passes * _RESULT_PS * (shape.N + _BEYOND_STATES) * elements(shape)


def elements(shape: ScanShape) -> int:
    return shape.B * shape.L * shape.E


def least_bytes(kind: Kind, inputs: Inputs) -> int:
    """Bytes that a program must read and write: every argument and result once.

    States that are saved for the backward pass are not among them: how many is a backend's choice.
    """
    read = nbytes(inputs.arrays)
    h_BEN = jax.eval_shape(_operands, inputs.arrays).h0_BEN
    forward = read + nbytes((inputs.arrays["x_BLE"], h_BEN))
    # Gradients are as large as the inputs that they belong to.
    backward = read + nbytes(inputs.d_out) + read
    both = {"backward": backward, "forward_backward": forward + backward}
    return both.get(kind, forward)


def backend_of(implementation: str) -> Any:
    """The module behind an implementation other than the reference."""
    run: Any = api.IMPLEMENTATIONS[implementation]
    return run.args[0]


def programs(
    implementation: str, like: Inputs, blocks: Mapping[str, int] | None = None
) -> Programs:
    """The programs for inputs of the shapes and dtypes of `like`.

    Raises:
      Unsupported: the implementation does not take them.
    """
    backend, sizes = backend_of(implementation), dict(blocks or {})
    recipe: list[Any] = []

    def forward_saving(inputs: Inputs) -> tuple[ScanOutput, list[Array]]:
        operands = _operands(inputs.arrays)
        out, residuals = backend.forward(operands, sizes, for_backward=True)
        leaves, structure = jax.tree.flatten(residuals)
        # A residual that is an input costs nothing; as an output of a program it would be copied.
        inputs_at = {id(v): place for place, v in enumerate(jax.tree.leaves(operands))}
        places = [inputs_at.get(id(leaf)) for leaf in leaves]
        recipe[:] = structure, places
        return out, [leaf for leaf, place in zip(leaves, places, strict=True) if place is None]

    out, saved = jax.eval_shape(forward_saving, like)
    structure, places = recipe

    def backward(inputs: Inputs, saved: list[Array]) -> Arrays:
        known, rest = jax.tree.leaves(_operands(inputs.arrays)), iter(saved)
        leaves = [next(rest) if place is None else known[place] for place in places]
        residuals = jax.tree.unflatten(structure, leaves)
        gradients = backend.backward(residuals, _cotangents(inputs.d_out, out), sizes)
        return {
            f"d {name}": v
            for name, v in gradients._asdict().items()
            if v is not None and name in inputs.arrays
        }

    def forward(inputs: Inputs) -> ScanOutput:
        return selective_scan(**inputs.arrays, implementation=implementation, blocks=sizes)

    whole = functools.partial(outputs_and_gradients, implementation=implementation, blocks=sizes)
    return Programs(*map(jax.jit, (forward, forward_saving, backward, whole)), saved=saved)
