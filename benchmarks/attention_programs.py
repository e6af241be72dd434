"""What is measured of the attention over three memories: inputs, programs, exact results, floors.

Errors are relative root mean squares against the "xla" implementation in float64 on the same
rounded inputs; the tests hold that against the definition.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import attention_peers
from pallas_kernels import memory_attention
from pallas_kernels.memory_attention.operands import Eidetic, Fading, Operands
from pallas_kernels.shapes import AttentionShape

# Tokens times key heads, of which results in float64 fit the device's memory.
_EXACT_TOKENS = 2**17
# Largest error of a tensor with which a time is printed: bfloat16 results are rounded once, and
# weights and gradients of logits before their products as well.
LIMIT = 1e-2


class Inputs(NamedTuple):
    """Operands, and the gradient of the output."""

    operands: Operands
    do_BLHK: jax.Array


Attend = Callable[[Operands], jax.Array]


@functools.partial(jax.jit, static_argnames="shape")
def draw_inputs(key: jax.Array, *, shape: AttentionShape) -> Inputs:
    """Normal, bfloat16; no segments, no bias, every slot filled."""
    s, keys = shape, iter(jax.random.split(key, 8))
    Z = -(-s.L // s.chunk)

    def normal(*sizes: int) -> jax.Array:
        return jax.random.normal(next(keys), sizes, jnp.bfloat16)

    q, do = normal(s.B, s.L, s.H, s.K), normal(s.B, s.L, s.H, s.K)
    k, v, fading_k, fading_v = (normal(s.B, s.L, s.G, s.K) for _ in range(4))
    eidetic = None
    if s.eidetic:
        memory = (s.B, Z, s.eidetic, s.G, s.K)
        eidetic = Eidetic(normal(*memory), normal(*memory), jnp.ones(memory[:3], bool), None)
    return Inputs(Operands(q, k, v, Fading(fading_k, fading_v), eidetic, None), do)


def ours(name: str, shape: AttentionShape, **changes: Any) -> Attend:
    """`memory_attention` by the named implementation, with other options than the shape's."""
    options: dict[str, Any] = dict(window=shape.window, fading_window=shape.fading_window)
    options |= changes

    def attend(x: Operands) -> jax.Array:
        memory: dict[str, Any] = {}
        if x.fading is not None:
            memory |= {"fading_k_BLGK": x.fading.k_BLGK, "fading_v_BLGK": x.fading.v_BLGK}
        if x.eidetic is not None:
            memory |= {"eidetic_k_BZMGK": x.eidetic.k_BZMGK, "eidetic_v_BZMGK": x.eidetic.v_BZMGK}
            memory |= {"eidetic_valid_BZM": x.eidetic.valid_BZM, "chunk": shape.chunk}
        out = memory_attention(
            x.q_BLHK, x.k_BLGK, x.v_BLGK, **memory, **options, implementation=name
        )
        return out.o_BLHK

    return attend


def differentiated(attend: Attend) -> Callable[[Operands], tuple[jax.Array, Any]]:
    """o, and the function from its gradient to those of the float operands."""

    def forward(x: Operands) -> tuple[jax.Array, Any]:
        floats, rest = split(x)
        return jax.vjp(lambda floats: attend(joined(floats, rest)), floats)

    return forward


# The gradients of the float operands, of what `differentiated` gave.
backward = jax.jit(lambda pull, do_BLHK: pull(do_BLHK))


def split(x: Operands) -> tuple[dict[str, Any], Any]:
    """What has gradients, and what not."""
    floats: dict[str, Any] = {"q": x.q_BLHK, "k": x.k_BLGK, "v": x.v_BLGK}
    if x.fading is not None:
        floats |= {"fading_k": x.fading.k_BLGK, "fading_v": x.fading.v_BLGK}
    if x.eidetic is not None:
        floats |= {"eidetic_k": x.eidetic.k_BZMGK, "eidetic_v": x.eidetic.v_BZMGK}
    return floats, None if x.eidetic is None else x.eidetic.valid_BZM


def joined(floats: Mapping[str, jax.Array], valid: Any) -> Operands:
    fading = Fading(floats["fading_k"], floats["fading_v"]) if "fading_k" in floats else None
    eidetic = None
    if valid is not None:
        eidetic = Eidetic(floats["eidetic_k"], floats["eidetic_v"], valid, None)
    return Operands(floats["q"], floats["k"], floats["v"], fading, eidetic, None)


class Exact:
    """Results of one case in float64, by the keys that are seen; of the first heads where all of
    them would take too much memory."""

    def __init__(self, shape: AttentionShape, inputs: Inputs):
        self.shape, self.inputs = shape, inputs
        self.key_heads = max(1, min(shape.G, _EXACT_TOKENS // (shape.B * shape.L)))
        self.done: dict[str, dict[str, jax.Array]] = {}

    def of(self, name: str) -> dict[str, jax.Array]:
        """What an implementation or a peer should give, of the streams that it has."""
        seen = name if name in ("cudnn_window", "cudnn_full") else "all"
        if seen not in self.done:
            self.done[seen] = self._compute(seen)
        return self.done[seen]

    def _compute(self, seen: str) -> dict[str, jax.Array]:
        changes, x = {}, self.inputs.operands
        if seen != "all":
            both = self.shape.window + self.shape.fading_window
            changes = {"window": both if seen == "cudnn_window" else self.shape.L}
            x = x._replace(fading=None)
        with jax.enable_x64(True):
            wide = jax.tree.map(self._part, Inputs(x, self.inputs.do_BLHK))
            return results(jax.jit(differentiated(ours("xla", self.shape, **changes))), wide)

    def _part(self, v: jax.Array) -> jax.Array:
        if v.dtype != jnp.bfloat16:  # which slots are filled
            return v
        heads = v.shape[-2] * self.key_heads // self.shape.G
        return v[..., :heads, :].astype(jnp.float64)


def results(forward: Any, inputs: Inputs) -> dict[str, jax.Array]:
    o, pull = forward(inputs.operands)
    (gradients,) = backward(pull, inputs.do_BLHK)
    return {"o": o, **{f"d {name}": gradient for name, gradient in gradients.items()}}


def errors(
    got: Mapping[str, jax.Array | np.ndarray], want: Mapping[str, jax.Array]
) -> dict[str, float]:
    """Of the heads that `want` has; computed where the arrays are, in float64."""
    with jax.enable_x64(True):
        return {
            name: float(_relative(jnp.asarray(got[name][..., : v.shape[-2], :]), v))
            for name, v in want.items()
            if name in got
        }


@jax.jit
def _relative(got: jax.Array, want: jax.Array) -> jax.Array:
    size = jnp.linalg.norm(want.ravel())
    return jnp.linalg.norm((got.astype(jnp.float64) - want).ravel()) / jnp.where(size, size, 1)


def useful_flops(kind: str, name: str, shape: AttentionShape) -> float:
    """4 K for each key that a query sees, by head, of an implementation or peer; 2.5 times as many
    backward. Memories are full."""
    i = np.arange(shape.L)
    if name == "cudnn_full":
        seen = i + 1
    else:
        seen = np.minimum(i + 1, shape.window + shape.fading_window)
        seen = seen + (0 if name in attention_peers.NAMES else shape.eidetic)
    passes = {"forward": 1, "backward": 2.5}[kind]
    return 4 * passes * shape.K * shape.H * shape.B * float(seen.sum())
