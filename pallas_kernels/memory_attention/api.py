"""Attention over three memories under one softmax: the read side of a B'MOJO layer.

    o_i = sum_s exp(l_is - lse_i) v_s          lse_i = log sum_s exp(l_is)
    l_is = K^-0.5 q_i . k_s  (+ bias_s where s is eidetic)

where s runs over the in-context keys [i - W + 1, i], the fading keys [i - W - F + 1, i - W] and
the filled slots of the memory of chunk i // C: see mask.py for who sees whom. With F = 0 and no
memory this is sliding-window attention, with W >= L full causal attention. Rotary embedding and
the gathers that fill the memory are the caller's.

Source: B'MOJO, arXiv 2407.06324 (abstract and the authors' discussion); chunked memories and the
eidetic bias are ours.

Dtypes: matrix products in the inputs' dtype with float32 accumulation; logits, softmax and lse in
float32; o in q's dtype. float64 inputs are float64 throughout.

Implementations: "reference" (dense, differentiated by JAX) and backends. A backend is a module
with `forward(operands, spec) -> AttentionOutput` and `backward(operands, spec, out, d_out) ->
Operands` of gradients; `_attend` below is the one place that makes a differentiable function of
them.
"""

import functools
from collections.abc import Mapping
from types import ModuleType

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.arguments import expect
from pallas_kernels.memory_attention import (
    cudnn,
    pallas_mosaic_gpu,
    pallas_tpu,
    pallas_triton,
    reference,
    xla,
)
from pallas_kernels.memory_attention.operands import (
    AttentionOutput,
    Eidetic,
    Fading,
    Operands,
    Spec,
)

__all__ = ["SAVED", "AttentionOutput", "memory_attention"]

# The name, for policies of `jax.checkpoint`, of what the backward pass needs beyond the operands.
SAVED = "memory_attention"


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 2))
def _attend(backend: ModuleType, operands: Operands, spec: Spec) -> AttentionOutput:
    return backend.forward(operands, spec)


def _attend_forward(
    backend: ModuleType, operands: Operands, spec: Spec
) -> tuple[AttentionOutput, tuple[Operands, AttentionOutput]]:
    out = backend.forward(operands, spec)
    out = AttentionOutput(*(checkpoint_name(v, SAVED) for v in out))
    return out, (operands, out)


def _attend_backward(
    backend: ModuleType,
    spec: Spec,
    residuals: tuple[Operands, AttentionOutput],
    d_out: AttentionOutput,
) -> tuple[Operands]:
    operands, out = residuals
    return (backend.backward(operands, spec, out, d_out),)


_attend.defvjp(_attend_forward, _attend_backward)

IMPLEMENTATIONS = {
    "reference": reference.attend,
    "xla": functools.partial(_attend, xla),
    "pallas_triton": functools.partial(_attend, pallas_triton),
    "pallas_tpu": functools.partial(_attend, pallas_tpu),
    "pallas_mosaic_gpu": functools.partial(_attend, pallas_mosaic_gpu),
    "cudnn": functools.partial(cudnn.attend, saved=SAVED),
}


def memory_attention(
    q_BLHK: Float[Array, "B L H K"],
    k_BLGK: Float[Array, "B L G K"],
    v_BLGK: Float[Array, "B L G K"],
    *,
    window: int,
    fading_k_BLGK: Float[Array, "B L G K"] | None = None,
    fading_v_BLGK: Float[Array, "B L G K"] | None = None,
    fading_window: int = 0,
    eidetic_k_BZMGK: Float[Array, "B Z M G K"] | None = None,
    eidetic_v_BZMGK: Float[Array, "B Z M G K"] | None = None,
    eidetic_valid_BZM: Bool[Array, "B Z M"] | None = None,
    eidetic_bias_BZHM: Float[Array, "B Z H M"] | None = None,
    chunk: int | None = None,
    segment_ids_BL: Int[Array, "B L"] | None = None,
    scale: float | None = None,
    implementation: str | None = None,
    blocks: Mapping[str, int] | None = None,
) -> AttentionOutput:
    """Attends in-context, fading and eidetic keys under one softmax.

    H query heads share G key/value heads: query head h reads head h // (H / G).

    Args:
      window: W, the tokens seen verbatim, the query itself included. L or more: all of them.
      fading_k_BLGK, fading_v_BLGK: keys and values of the state's outputs, each at its token's
        position. Without them, or with fading_window = 0, the stream is off.
      fading_window: F, how many fading keys are seen, right behind the window.
      eidetic_k_BZMGK, eidetic_v_BZMGK: the memory of every chunk, Z = ceil(L / C). Without them,
        or with M = 0, the stream is off.
      eidetic_valid_BZM: which slots are filled. Without it a memory could not be told from the
        future, so it has no default.
      eidetic_bias_BZHM: added to the eidetic logits.
      chunk: C, the tokens that share a memory.
      segment_ids_BL: documents of a packed sequence. A key is seen only from its own document, a
        memory only from the document that is open at its chunk's first token.
      scale: factor on the logits before the bias; K^-0.5 by default.
      implementation: one of IMPLEMENTATIONS, or None for the platform's best.
      blocks: block sizes of the implementation; results do not depend on them.

    Returns:
      The attended values and the log-sum-exp of the logits. Gradients flow through both, to
      every float input.

    Raises:
      ValueError: shapes, dtypes or options do not fit each other.
      Unsupported: the named implementation cannot take these inputs.
    """
    if q_BLHK.ndim != 4 or k_BLGK.ndim != 4:
        raise ValueError(f"q {q_BLHK.shape} must be [B, L, H, K] and k {k_BLGK.shape} [B, L, G, K]")
    B, L, H, K = q_BLHK.shape
    G = k_BLGK.shape[2]
    if 0 in (B, L, H, K, G):
        raise ValueError(f"q {q_BLHK.shape} and k {k_BLGK.shape} must have no empty axis")
    if H % G:
        raise ValueError(f"{G=} key/value heads must divide {H=} query heads")
    if window < 1:
        raise ValueError(f"{window=} must be at least 1: it counts the query's own token")
    if fading_window < 0:
        raise ValueError(f"{fading_window=} must be positive, or 0 for none")
    float_type = q_BLHK.dtype.type
    expect("q_BLHK", q_BLHK, (B, L, H, K), jnp.floating)
    expect("k_BLGK", k_BLGK, (B, L, G, K), float_type)
    expect("v_BLGK", v_BLGK, (B, L, G, K), float_type)
    if segment_ids_BL is not None:
        expect("segment_ids_BL", segment_ids_BL, (B, L), jnp.integer)

    fading = None
    if fading_k_BLGK is not None and fading_v_BLGK is not None:
        expect("fading_k_BLGK", fading_k_BLGK, (B, L, G, K), float_type)
        expect("fading_v_BLGK", fading_v_BLGK, (B, L, G, K), float_type)
        # With W >= L no token is ever W old.
        if fading_window > 0 and window < L:
            fading = Fading(fading_k_BLGK, fading_v_BLGK)
    elif fading_k_BLGK is not None or fading_v_BLGK is not None:
        raise ValueError("fading_k_BLGK and fading_v_BLGK come together: one of them is None")

    eidetic = None
    memory = (eidetic_k_BZMGK, eidetic_v_BZMGK, eidetic_valid_BZM)
    if (
        eidetic_k_BZMGK is not None
        and eidetic_v_BZMGK is not None
        and eidetic_valid_BZM is not None
    ):
        if chunk is None or chunk < 1:
            raise ValueError(f"{chunk=} must be positive with an eidetic memory")
        if eidetic_k_BZMGK.ndim != 5:
            raise ValueError(f"eidetic_k_BZMGK has shape {eidetic_k_BZMGK.shape}, needs 5 axes")
        Z, M = -(-L // chunk), eidetic_k_BZMGK.shape[2]
        expect("eidetic_k_BZMGK", eidetic_k_BZMGK, (B, Z, M, G, K), float_type)
        expect("eidetic_v_BZMGK", eidetic_v_BZMGK, (B, Z, M, G, K), float_type)
        expect("eidetic_valid_BZM", eidetic_valid_BZM, (B, Z, M), jnp.bool_)
        if eidetic_bias_BZHM is not None:
            expect("eidetic_bias_BZHM", eidetic_bias_BZHM, (B, Z, H, M), jnp.floating)
        if M > 0:
            eidetic = Eidetic(
                eidetic_k_BZMGK, eidetic_v_BZMGK, eidetic_valid_BZM, eidetic_bias_BZHM
            )
    elif any(array is not None for array in (*memory, eidetic_bias_BZHM)):
        raise ValueError(
            "an eidetic memory needs eidetic_k_BZMGK, eidetic_v_BZMGK and eidetic_valid_BZM; "
            f"given: {[array is not None for array in memory]}"
        )

    operands = Operands(q_BLHK, k_BLGK, v_BLGK, fading, eidetic, segment_ids_BL)
    spec = Spec(
        window=min(window, L),
        fading_window=0 if fading is None else min(fading_window, L),
        chunk=L if eidetic is None or chunk is None else min(chunk, L),
        scale=K**-0.5 if scale is None else scale,
        blocks=tuple(sorted((blocks or {}).items())),
    )
    return dispatch.run("memory_attention", IMPLEMENTATIONS, implementation, operands, spec)
