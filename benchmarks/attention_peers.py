"""What the memory attention is measured against: cuDNN through JAX, FlexAttention in PyTorch.

    cudnn_merged   one sliding window over in-context keys, one over fading keys (queries shifted by
                   W), merged by their log-sum-exps: what the authors of B'MOJO do with
                   FlashAttention. The backward passes get the merged output and log-sum-exp, so
                   that each recomputes the weights of the common softmax.
    cudnn_window   one sliding window of W + F in-context keys: as many keys, half as many arrays
    cudnn_full     full causal attention
    flex           FlexAttention, torch.compile, fading keys behind the in-context ones in one
                   array of 2 L keys, with a block mask

None has an eidetic memory. That of one stream is the implementation "cudnn" of
`pallas_kernels.memory_attention` as well.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import memory_attention
from pallas_kernels.memory_attention import cudnn
from pallas_kernels.memory_attention.operands import Operands

CUDNN = ("cudnn_merged", "cudnn_window", "cudnn_full")
NAMES = (*CUDNN, "flex")
Gradients = tuple[Array, ...]


def _scale(q: Array) -> float:
    return q.shape[-1] ** -0.5


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def cudnn_merged(
    q: Array, k: Array, v: Array, fading_k: Array, fading_v: Array, window: int, fading_window: int
) -> Array:
    """o [B, L, H, K]; all arrays [B, L, heads, K]."""
    return _merged(q, k, v, fading_k, fading_v, window, fading_window)[0]


def _merged(
    q: Array, k: Array, v: Array, fading_k: Array, fading_v: Array, window: int, fading_window: int
) -> tuple[Array, Array]:
    L = q.shape[1]
    o, lse = cudnn.band(q, k, v, window=window, scale=_scale(q))
    if L <= window:
        return o, lse
    late, lse_late = cudnn.band(
        q[:, window:],
        fading_k[:, : L - window],
        fading_v[:, : L - window],
        window=fading_window,
        scale=_scale(q),
    )
    lse_late = jnp.pad(lse_late, ((0, 0), (0, 0), (window, 0)), constant_values=-jnp.inf)
    late = jnp.pad(late, ((0, 0), (window, 0), (0, 0), (0, 0)))
    both = jnp.logaddexp(lse, lse_late)

    def weight(part: Array) -> Array:
        return jnp.exp(part - both).swapaxes(1, 2)[..., None]

    merged = o * weight(lse) + late * weight(lse_late)
    return merged.astype(q.dtype), both


def _merged_forward(*args: Any) -> tuple[Array, tuple[Array, ...]]:
    o, lse = _merged(*args)
    return o, (*args[:5], o, lse)


def _merged_backward(
    window: int, fading_window: int, residuals: tuple[Array, ...], do: Array
) -> Gradients:
    q, k, v, fading_k, fading_v, o, lse = residuals
    L = q.shape[1]
    dq, dk, dv = cudnn.band_backward(q, k, v, o, lse, do, window=window, scale=_scale(q))
    if L <= window:
        return dq, dk, dv, jnp.zeros_like(fading_k), jnp.zeros_like(fading_v)
    early, late = slice(0, L - window), slice(window, L)
    dq_late, *d_fading = cudnn.band_backward(
        q[:, late],
        fading_k[:, early],
        fading_v[:, early],
        o[:, late],
        lse[:, :, late],
        do[:, late],
        window=fading_window,
        scale=_scale(q),
    )
    d_fading_k, d_fading_v = (jnp.pad(d, ((0, 0), (0, window), (0, 0), (0, 0))) for d in d_fading)
    return dq.at[:, late].add(dq_late), dk, dv, d_fading_k, d_fading_v


cudnn_merged.defvjp(_merged_forward, _merged_backward)


def through_cudnn(name: str, window: int, fading_window: int) -> Callable[[Operands], Array]:
    """o of the named peer, differentiable; its operands' memory is not looked at."""

    def attend(x: Operands) -> Array:
        if name == "cudnn_merged":
            assert x.fading is not None
            return cudnn_merged(x.q_BLHK, x.k_BLGK, x.v_BLGK, *x.fading, window, fading_window)
        keys = window + fading_window if name == "cudnn_window" else x.q_BLHK.shape[1]
        return memory_attention(
            x.q_BLHK, x.k_BLGK, x.v_BLGK, window=keys, implementation="cudnn"
        ).o_BLHK

    return attend


def flex(
    shape: tuple[int, int, int, int, int], window: int, fading_window: int
) -> tuple[Callable[..., Any], Callable[[int], Any]]:
    """FlexAttention of [B, L, H, G, K], bfloat16: the function of (q, keys, values), all
    [B, heads, tokens, K] with 2 L keys, and a function that draws its arguments from a seed.

    Raises:
      ImportError: PyTorch is not installed.
    """
    torch = importlib.import_module("torch")
    attention = importlib.import_module("torch.nn.attention.flex_attention")
    # Else the first backward pass decides that none may be run again.
    config: Any = importlib.import_module("torch._functorch.config")
    config.donated_buffer = False
    # A program for each mask: some eight are kept otherwise, and what comes later is not compiled.
    importlib.import_module("torch._dynamo").reset()
    B, L, H, G, K = shape

    def seen(batch: Any, head: Any, query: Any, key: Any) -> Any:
        del batch, head
        age = query - key % L
        in_context = (key < L) & (age >= 0) & (age < window)
        fading = (key >= L) & (age >= window) & (age < window + fading_window)
        return in_context | fading

    mask = attention.create_block_mask(seen, None, None, L, 2 * L, device="cuda")
    compiled = torch.compile(
        functools.partial(attention.flex_attention, block_mask=mask, enable_gqa=H != G),
        dynamic=False,
    )

    def draw(seed: int) -> Any:
        generator = torch.Generator("cuda").manual_seed(seed)

        def normal(heads: int, tokens: int) -> Any:
            return torch.randn(
                (B, heads, tokens, K), generator=generator, device="cuda", dtype=torch.bfloat16
            ).requires_grad_()

        return normal(H, L), normal(G, 2 * L), normal(G, 2 * L)

    return compiled, draw
