"""The Triton kernels of the memory attention: their lowering, their block sizes, what they refuse.

Their results are compared in `test_memory_attention.py`, in interpret mode.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels import Unsupported, memory_attention
from pallas_kernels.shapes import ATTENTION_CASES, AttentionShape

H100 = AbstractDevice("NVIDIA H100 80GB HBM3", None, platform="gpu")
GPU = AbstractMesh((), (), abstract_device=H100)
KERNEL = "__gpu$xla.gpu.triton"


def abstract(shape: AttentionShape, dtype: str = "bfloat16", **more: Any) -> dict[str, Any]:
    """Every array of a call."""
    s = shape
    token = jax.ShapeDtypeStruct((s.B, s.L, s.G, s.K), dtype)
    arrays: dict[str, Any] = {"q_BLHK": jax.ShapeDtypeStruct((s.B, s.L, s.H, s.K), dtype)}
    arrays |= {"k_BLGK": token, "v_BLGK": token}
    if s.fading_window:
        arrays |= {"fading_k_BLGK": token, "fading_v_BLGK": token}
    if s.eidetic:
        sizes = (s.B, -(-s.L // s.chunk), s.eidetic, s.G, s.K)
        slot = jax.ShapeDtypeStruct(sizes, dtype)
        arrays |= {"eidetic_k_BZMGK": slot, "eidetic_v_BZMGK": slot}
        arrays["eidetic_valid_BZM"] = jax.ShapeDtypeStruct(sizes[:3], "bool")
    return arrays | more


def attend(arrays: dict[str, Any], shape: AttentionShape, **options: Any) -> jax.Array:
    chunk = shape.chunk if shape.eidetic else None
    window, fading = shape.window, shape.fading_window
    out = memory_attention(**arrays, window=window, fading_window=fading, chunk=chunk, **options)
    return out.o_BLHK


def both(arrays: dict[str, Any], shape: AttentionShape) -> Any:
    floats = {n: v for n, v in arrays.items() if jnp.issubdtype(v.dtype, jnp.floating)}
    rest = {n: v for n, v in arrays.items() if n not in floats}

    def loss(floats: dict[str, Any]) -> jax.Array:
        o = attend(floats | rest, shape, implementation="pallas_triton")
        return o.astype(jnp.float32).sum()

    return jax.grad(loss)(floats)


@pytest.mark.parametrize("name", [name for name in ATTENTION_CASES if name.startswith("b1_l")])
def test_production_shapes_lower(name: str) -> None:
    """A forward kernel, delta, one by queries, one by keys of each stream."""
    shape = ATTENTION_CASES[name]
    with jax.sharding.use_abstract_mesh(GPU):
        traced = jax.jit(functools.partial(both, shape=shape)).trace(abstract(shape))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count(f"@{KERNEL}") == 6


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("K", [32, 64, 96, 128, 256])
def test_every_width_lowers_with_every_option(K: int, dtype: str) -> None:
    shape = AttentionShape(2, 1000, 8, 2, K, 100, 70, 200, 96)
    bias = jax.ShapeDtypeStruct((2, 11, 8, 200), "float32")
    segments = jax.ShapeDtypeStruct((2, 1000), "int32")
    arrays = abstract(shape, dtype, eidetic_bias_BZHM=bias, segment_ids_BL=segments)
    with jax.sharding.use_abstract_mesh(GPU):
        traced = jax.jit(functools.partial(both, shape=shape)).trace(arrays)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count(f"@{KERNEL}") == 6


def test_it_is_preferred_on_nvidia_gpus_only() -> None:
    shape = AttentionShape(1, 64, 2, 2, 32, 8, 8, 4, 8)
    other = AbstractDevice("AMD Instinct MI300X", None, platform="gpu")
    for device, kernels in ((H100, 1), (other, 0)):
        with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
            traced = jax.jit(functools.partial(attend, shape=shape)).trace(abstract(shape))
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert text.count(f"@{KERNEL}") == kernels


def test_what_cannot_run_is_refused() -> None:
    wide = AttentionShape(1, 64, 2, 2, 300, 8, 8, 4, 8)
    with pytest.raises(Unsupported, match="K=300 must be at most 256"):
        run_shape(wide, implementation="pallas_triton")
    small = AttentionShape(1, 64, 2, 2, 32, 8, 8, 4, 8)
    with pytest.raises(Unsupported, match="float16 must be float32 or bfloat16"):
        run_shape(small, "float16", implementation="pallas_triton")


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ({"forward_keys": 24}, r"blocks\['forward_keys'\]=24 must be a power of two from 16 on"),
        ({"dq_queries": 8}, r"blocks\['dq_queries'\]=8 must be a power of two from 16 on"),
        ({"queries": 64}, "blocks has 'queries'; it takes"),
    ],
)
def test_wrong_blocks_are_named(blocks: dict[str, int], message: str) -> None:
    shape = AttentionShape(1, 64, 2, 2, 32, 8, 8, 4, 8)
    with pytest.raises(ValueError, match=message):
        run_shape(shape, implementation="pallas_triton", blocks=blocks)


def run_shape(shape: AttentionShape, dtype: str = "bfloat16", **options: Any) -> Any:
    function = functools.partial(attend, shape=shape, **options)
    return jax.eval_shape(function, abstract(shape, dtype))
