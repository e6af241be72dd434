"""Causal attention by NVIDIA's cuDNN, through JAX's binding: one stream of keys, rows of one
document.

What a transformer would use, so that B'MOJO is compared with the best there is for it. cuDNN has
neither a second stream under the same softmax nor a gradient of the log-sum-exp; where that is
asked for, the backward pass is Triton's. JAX's public function rounds the log-sum-exp to the
output's dtype, therefore its module is called directly.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax._src.cudnn import fused_attention_stablehlo
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from pallas_kernels import dispatch
from pallas_kernels.dispatch import Unsupported
from pallas_kernels.memory_attention import pallas_triton
from pallas_kernels.memory_attention.operands import AttentionOutput, Operands, Spec

_DTYPES = (jnp.bfloat16, jnp.float16)
_LARGEST_K = 128
_binding: Any = fused_attention_stablehlo  # private, and its types say less than its documentation


def band(
    q_BLHK: Array, k_BSGK: Array, v_BSGK: Array, *, window: int | None, scale: float
) -> tuple[Array, Array]:
    """o [B, L, H, K] and lse [B, H, L] of causal attention to the last `window` keys, or all."""
    causal = _binding.MaskType.CAUSAL
    return _binding.dot_product_attention(
        q_BLHK,
        k_BSGK,
        v_BSGK,
        scale=scale,
        mask_type=causal,
        sliding_window_length=window,
        return_residual=True,
    )


def band_backward(
    q_BLHK: Array,
    k_BSGK: Array,
    v_BSGK: Array,
    o_BLHK: Array,
    lse_BHL: Array,
    do_BLHK: Array,
    *,
    window: int | None,
    scale: float,
) -> tuple[Array, Array, Array]:
    """dq, dk, dv with weights exp(l - lse) and delta from o, whatever these are."""
    unused = jnp.zeros(0, q_BLHK.dtype)
    residuals = (q_BLHK, k_BSGK, v_BSGK, *[unused] * 7, lse_BHL, o_BLHK)
    seed, dropout, is_variadic = 42, 0.0, (False, False)
    layout = _binding.AttentionLayout.BTNH.value
    return _binding._dot_product_attention_bwd_rule(
        scale,
        seed,
        dropout,
        is_variadic,
        _binding.MaskType.CAUSAL,
        layout,
        window,
        True,
        False,
        residuals,
        do_BLHK,
    )[:3]


def attend(operands: Operands, spec: Spec, *, saved: str) -> AttentionOutput:
    """`saved`: the name of what the backward pass needs beyond the operands."""
    _check(operands, spec)
    return AttentionOutput(*_attend(operands.q_BLHK, operands.k_BLGK, operands.v_BLGK, spec, saved))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _attend(
    q_BLHK: Array, k_BLGK: Array, v_BLGK: Array, spec: Spec, saved: str
) -> tuple[Array, Array]:
    del saved
    o_BLHK, lse_BHL = band(q_BLHK, k_BLGK, v_BLGK, window=_window(q_BLHK, spec), scale=spec.scale)
    return o_BLHK, lse_BHL.swapaxes(1, 2)


def _attend_forward(
    q: Any, k: Any, v: Any, spec: Spec, saved: str
) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    qkv = (q.value, k.value, v.value)
    o_BLHK, lse_BLH = (checkpoint_name(r, saved) for r in _attend(*qkv, spec, saved))
    return (o_BLHK, lse_BLH), (*qkv, o_BLHK, lse_BLH)


def _attend_backward(
    spec: Spec, saved: str, residuals: tuple[Array, ...], d_out: tuple[Any, Any]
) -> tuple[Array, Array, Array]:
    del saved
    *qkv, o_BLHK, lse_BLH = residuals
    do_BLHK, d_lse_BLH = d_out
    if isinstance(do_BLHK, SymbolicZero):
        do_BLHK = jnp.zeros_like(o_BLHK)
    if isinstance(d_lse_BLH, SymbolicZero):
        q_BLHK, k_BLGK, v_BLGK = qkv
        return band_backward(
            q_BLHK,
            k_BLGK,
            v_BLGK,
            o_BLHK,
            lse_BLH.swapaxes(1, 2),
            do_BLHK,
            window=_window(q_BLHK, spec),
            scale=spec.scale,
        )
    operands = Operands(*qkv, fading=None, eidetic=None, segment_ids_BL=None)
    out, d = AttentionOutput(o_BLHK, lse_BLH), AttentionOutput(do_BLHK, d_lse_BLH)
    gradients = pallas_triton.backward(operands, spec, out, d)
    return gradients.q_BLHK, gradients.k_BLGK, gradients.v_BLGK


_attend.defvjp(_attend_forward, _attend_backward, symbolic_zeros=True)


def _window(q_BLHK: Array, spec: Spec) -> int | None:
    return spec.window if spec.window < q_BLHK.shape[1] else None


def _check(x: Operands, spec: Spec) -> None:
    if dispatch.interpreted("gpu") or "NVIDIA" not in dispatch.device_kind():
        raise Unsupported(f"cuDNN is for NVIDIA's GPUs, and this is {dispatch.device_kind()}")
    try:
        _binding.check_cudnn_version()
    except RuntimeError as error:
        raise Unsupported(str(error)) from error
    for name in ("fading", "eidetic", "segment_ids_BL"):
        if getattr(x, name) is not None:
            raise Unsupported(f"{name} must be None: cuDNN has one stream of keys, one document")
    if x.q_BLHK.dtype not in _DTYPES:
        raise Unsupported(f"q.dtype={x.q_BLHK.dtype.name} must be bfloat16 or float16")
    K = x.q_BLHK.shape[3]
    if K > _LARGEST_K or K % 8:
        raise Unsupported(f"{K=} must be a multiple of 8 and at most {_LARGEST_K}")
    if spec.blocks:
        raise Unsupported(f"blocks={dict(spec.blocks)} must be None: cuDNN chooses its own")
