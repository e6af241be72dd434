"""The Mosaic GPU kernels of the memory attention: interpreted, on a simulated memory, and lowered.

What only a GPU has is not interpreted: left sides of products in registers, and running sums that
stay in them. That path is lowered here; that it computes the same is for a GPU to show.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, PartitionSpec

# Whether races were found is told nowhere else.
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as simulator  # isort: skip

from pallas_kernels import Unsupported, memory_attention
from pallas_kernels.memory_attention import pallas_mosaic_gpu, reference
from pallas_kernels.memory_attention.api import SAVED
from pallas_kernels.memory_attention.operands import (
    AttentionOutput,
    Eidetic,
    Fading,
    Operands,
    Spec,
)
from pallas_kernels.shapes import ATTENTION_CASES, AttentionShape
from tests.pallas_kernels.test_memory_attention import draw
from tests.tolerances import TOLERANCE, relative_rms

IMPLEMENTATION = "pallas_mosaic_gpu"
H100 = AbstractDevice("NVIDIA H100 80GB HBM3", None, platform="gpu")
GPU = AbstractMesh((), (), abstract_device=H100)
KERNEL, TRITON = "mosaic_gpu_v2", "__gpu$xla.gpu.triton"

# All B, L, H, G, K, W, F, M, C, and the tokens of a document. In turn: every border inside tiles,
# heads shared; memories of a tile, each a block's; borders on those of tiles, two warpgroups of
# slots; documents; many memories in a tile and full attention; plain window; keys of the state
# alone; one token.
SHAPES = {
    "inside": (AttentionShape(1, 300, 2, 1, 64, 70, 40, 20, 48), None),
    "one_tile": (AttentionShape(1, 300, 2, 1, 64, 70, 40, 50, 128), 140),
    "aligned": (AttentionShape(1, 384, 1, 1, 128, 128, 128, 128, 64), None),
    "documents": (AttentionShape(2, 200, 1, 1, 64, 50, 40, 40, 64), 90),
    "full": (AttentionShape(1, 200, 1, 1, 64, 1000, 0, 70, 16), None),
    "window": (AttentionShape(2, 130, 2, 2, 64, 9, 0, 0, 1), None),
    "fading": (AttentionShape(1, 260, 2, 1, 64, 1, 190, 0, 1), None),
    "one_token": (AttentionShape(1, 1, 2, 1, 128, 5, 3, 2, 1), None),
}


def operands_of(
    rng: np.random.Generator, shape: AttentionShape, document: int | None
) -> tuple[Operands, Spec]:
    floats, options = draw(rng, shape, "bfloat16", segments=False)
    fading = eidetic = segments = None
    if shape.fading_window:
        fading = Fading(floats["fading_k_BLGK"], floats["fading_v_BLGK"])
    if shape.eidetic:
        eidetic = Eidetic(
            floats["eidetic_k_BZMGK"],
            floats["eidetic_v_BZMGK"],
            options["eidetic_valid_BZM"],
            floats["eidetic_bias_BZHM"].astype(jnp.float32),
        )
    if document:
        ids = np.arange(shape.L) // document
        segments = jnp.asarray(np.broadcast_to(ids, (shape.B, shape.L)), jnp.int32)
    window = min(shape.window, shape.L)
    spec = Spec(
        window=window,
        fading_window=shape.fading_window if fading else 0,
        chunk=min(shape.chunk, shape.L) if eidetic else shape.L,
        scale=shape.K**-0.5,
    )
    streams = (floats[name] for name in ("q_BLHK", "k_BLGK", "v_BLGK"))
    return Operands(*streams, fading, eidetic, segments), spec


def floats_of(x: Operands) -> Any:
    """What has a gradient."""
    eidetic = None if x.eidetic is None else x.eidetic._replace(valid_BZM=None)
    return x._replace(eidetic=eidetic, segment_ids_BL=None)


def exact(
    x: Operands, spec: Spec, d_out: AttentionOutput
) -> tuple[AttentionOutput, dict[str, np.ndarray]]:
    """The reference in float64, and its gradients."""

    def attend(floats: Any) -> AttentionOutput:
        eidetic = floats.eidetic
        if eidetic is not None:
            eidetic = eidetic._replace(valid_BZM=x.eidetic.valid_BZM)
        whole = floats._replace(eidetic=eidetic, segment_ids_BL=x.segment_ids_BL)
        return reference.attend(whole, spec)

    with jax.enable_x64(True):
        wide = functools.partial(jax.tree.map, lambda v: jnp.asarray(np.asarray(v, np.float64)))
        out, pull = jax.vjp(attend, wide(floats_of(x)))
        return jax.tree.map(np.asarray, out), named(pull(wide(d_out))[0])


def named(gradients: Any) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(gradients)
    return {jax.tree_util.keystr(path): np.asarray(v, np.float64) for path, v in leaves}


# Three warpgroups: the last block reaches beyond the row, in the shortest ring that there may be;
# memories of other chunks are skipped, or seen by all where a chunk ends within a tile.
THREE = {"forward_workers": 3, "dq_workers": 3}
BLOCKS = {name: (name, {}) for name in SHAPES} | {
    "inside_3": ("inside", THREE),
    "one_tile_3": ("one_tile", THREE),
    "documents_3": ("documents", THREE | {"forward_stages": 4, "dq_stages": 4}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", BLOCKS)
def test_equals_float64_without_races(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    name, blocks = BLOCKS[case]
    shape, document = SHAPES[name]
    x, spec = operands_of(rng, shape, document)
    spec = dataclasses.replace(spec, blocks=tuple(sorted(blocks.items())))
    kernel = pallas_mosaic_gpu._call

    def watched(*args: Any, **options: Any) -> dict[str, jax.Array]:
        _, _, outputs, _, plan, _ = args
        if "lse" in outputs:  # on a GPU its copies do not end where a row does
            assert outputs["lse"].shape[2] == plan.tiles * plan.block
        results = jax.block_until_ready(kernel(*args, **options))
        assert not simulator.get_races().races_found
        return results

    monkeypatch.setattr(pallas_mosaic_gpu, "_call", watched)
    got = pallas_mosaic_gpu.forward(x, spec)
    d_o = rng.standard_normal(got.o_BLHK.shape)
    d_lse = rng.standard_normal(got.lse_BLH.shape)
    d_out = AttentionOutput(jnp.asarray(d_o, "bfloat16"), jnp.asarray(d_lse, "float32"))
    want, want_gradients = exact(x, spec, d_out)
    gradients = named(floats_of(pallas_mosaic_gpu.backward(x, spec, got, d_out)))
    assert gradients.keys() == want_gradients.keys()
    pairs = {n: (gradients[n], want_gradients[n]) for n in gradients}
    pairs["o"], pairs["lse"] = (got.o_BLHK, want.o_BLHK), (got.lse_BLH, want.lse_BLH)
    errors = {n: relative_rms(*pair) for n, pair in pairs.items()}
    assert all(np.isfinite(np.asarray(pair[0], np.float64)).all() for pair in pairs.values())
    assert max(errors.values()) <= TOLERANCE["bfloat16"], errors


def abstract(shape: AttentionShape, dtype: str = "bfloat16", **more: Any) -> dict[str, Any]:
    """Every array of a call."""
    s = shape
    token = jax.ShapeDtypeStruct((s.B, s.L, s.G, s.K), dtype)
    arrays: dict[str, Any] = {"q_BLHK": jax.ShapeDtypeStruct((s.B, s.L, s.H, s.K), dtype)}
    arrays |= {"k_BLGK": token, "v_BLGK": token}
    arrays |= {"fading_k_BLGK": token, "fading_v_BLGK": token}
    sizes = (s.B, -(-s.L // s.chunk), s.eidetic, s.G, s.K)
    slot = jax.ShapeDtypeStruct(sizes, dtype)
    arrays |= {"eidetic_k_BZMGK": slot, "eidetic_v_BZMGK": slot}
    arrays["eidetic_valid_BZM"] = jax.ShapeDtypeStruct(sizes[:3], "bool")
    return arrays | more


def attend(
    arrays: dict[str, Any],
    shape: AttentionShape,
    implementation: str | None = IMPLEMENTATION,
    **options: Any,
) -> AttentionOutput:
    return memory_attention(
        **arrays,
        window=shape.window,
        fading_window=shape.fading_window,
        chunk=shape.chunk,
        implementation=implementation,
        **options,
    )


def lowered(arrays: dict[str, Any], shape: AttentionShape) -> str:
    """Of the gradient of o and lse in every float operand."""
    floats = {n: v for n, v in arrays.items() if jnp.issubdtype(v.dtype, jnp.floating)}

    def loss(floats: dict[str, Any], arrays: dict[str, Any]) -> jax.Array:
        out = attend(arrays | floats, shape)
        return out.o_BLHK.astype(jnp.float32).sum() + out.lse_BLH.sum()

    with jax.sharding.use_abstract_mesh(GPU):
        traced = jax.jit(jax.grad(loss)).trace(floats, arrays)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("name", ["b1_l2048_g16_k128", "b1_l32768_g4_k64"])
def test_production_shapes_lower(name: str) -> None:
    """A forward kernel, one by queries, one by keys of the bands and one of the memories; delta."""
    shape = ATTENTION_CASES[name]
    text = lowered(abstract(shape), shape)
    assert text.count(f"@{KERNEL}") == 4
    assert text.count(f"@{TRITON}") == 1


def test_one_stream_lowers() -> None:
    """Full attention: neither fading keys nor a memory."""
    shape = AttentionShape(1, 256, 2, 2, 64, 256, 0, 0, 256)
    arrays = {name: abstract(shape)[name] for name in ("q_BLHK", "k_BLGK", "v_BLGK")}
    assert lowered(arrays, shape).count(f"@{KERNEL}") == 3


def test_devices_side_by_side_lower() -> None:
    """Under shard_map, heads and rows over devices."""
    shape = AttentionShape(4, 256, 4, 4, 64, 100, 0, 0, 256)
    arrays = {name: abstract(shape)[name] for name in ("q_BLHK", "k_BLGK", "v_BLGK")}
    axes = (AxisType.Auto, AxisType.Auto)
    mesh = AbstractMesh((2, 2), ("data", "tensor"), axis_types=axes, abstract_device=H100)
    spec = PartitionSpec("data", None, "tensor")
    function = jax.shard_map(
        lambda arrays: attend(arrays, shape).o_BLHK,
        mesh=mesh,
        in_specs=spec,
        out_specs=spec,
        check_vma=False,
    )
    with jax.sharding.use_abstract_mesh(mesh):
        text = jax.jit(function).trace(arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count(f"@{KERNEL}") == 1


@pytest.mark.parametrize(
    ("K", "dtype", "preferred"),
    [(64, "bfloat16", True), (32, "bfloat16", False), (64, "float32", False)],
)
def test_it_is_preferred_where_it_runs(K: int, dtype: str, preferred: bool) -> None:
    shape = AttentionShape(1, 64, 2, 2, K, 8, 8, 4, 8)
    with jax.sharding.use_abstract_mesh(GPU):
        function = functools.partial(attend, shape=shape, implementation=None)
        text = (
            jax.jit(function)
            .trace(abstract(shape, dtype))
            .lower(lowering_platforms=("cuda",))
            .as_text()
        )
    assert (text.count(f"@{KERNEL}"), text.count(f"@{TRITON}")) == (preferred, not preferred)


@pytest.mark.slow
def test_rows_may_be_mapped(rng: np.random.Generator) -> None:
    """vmap, as a sweep's replicas do, gives what each call gives."""
    x, spec = operands_of(rng, *SHAPES["window"])
    several = jax.tree.map(lambda v: jnp.stack([v, v[::-1], 2 * v]), floats_of(x))

    def both(x: Operands) -> Any:
        out = pallas_mosaic_gpu.forward(x, spec)
        return out, floats_of(pallas_mosaic_gpu.backward(x, spec, out, out))

    mapped = jax.vmap(both)(several)
    for i in range(3):
        one = both(jax.tree.map(lambda v, i=i: v[i], several))
        jax.tree.map(lambda v, w, i=i: np.testing.assert_array_equal(v[i], w), mapped, one)


@pytest.mark.slow
@pytest.mark.parametrize("K", [64, 128])
def test_every_option_lowers(K: int) -> None:
    shape = AttentionShape(2, 1000, 8, 2, K, 100, 70, 200, 96)
    bias = jax.ShapeDtypeStruct((2, 11, 8, 200), "float32")
    segments = jax.ShapeDtypeStruct((2, 1000), "int32")
    arrays = abstract(shape, eidetic_bias_BZHM=bias, segment_ids_BL=segments)
    assert lowered(arrays, shape).count(f"@{KERNEL}") == 4


@pytest.mark.parametrize(
    ("K", "dtype", "options", "message"),
    [
        (32, "bfloat16", {}, r"K=32 must be one of \(64, 128\)"),
        (64, "float32", {}, "float32 must be bfloat16"),
        (64, "bfloat16", {"scale": -1.0}, "scale=-1.0 must be positive"),
    ],
)
def test_what_cannot_run_is_refused(
    K: int, dtype: str, options: dict[str, float], message: str
) -> None:
    shape = AttentionShape(1, 64, 2, 2, K, 8, 8, 4, 8)
    with pytest.raises(Unsupported, match=message):
        jax.eval_shape(functools.partial(attend, shape=shape, **options), abstract(shape, dtype))


def test_it_is_for_hopper_only() -> None:
    shape = AttentionShape(1, 64, 2, 2, 64, 8, 8, 4, 8)
    other = AbstractDevice("NVIDIA A100-SXM4-40GB", None, platform="gpu")
    with (
        jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=other)),
        pytest.raises(Unsupported, match="this is NVIDIA A100"),
    ):
        jax.eval_shape(functools.partial(attend, shape=shape), abstract(shape))


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ({"forward_keys": 96}, r"blocks\['forward_keys'\]=96 must be one of \(64, 128\)"),
        ({"dq_stages": 2}, r"blocks\['dq_stages'\]=2 must be at least 3"),
        ({"dq_stages": 3, "dq_workers": 3}, r"blocks\['dq_stages'\]=3 must be at least 4"),
        ({"forward_workers": 4}, r"blocks\['forward_workers'\]=4 must be one of \(2, 3\)"),
        ({"keys": 64}, "blocks has 'keys'; it takes"),
    ],
)
def test_wrong_blocks_are_named(blocks: dict[str, int], message: str) -> None:
    shape = AttentionShape(1, 64, 2, 2, 64, 8, 8, 4, 8)
    function = functools.partial(attend, shape=shape, blocks=blocks)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(function, abstract(shape))


@pytest.mark.parametrize(("names", "kernels"), [((SAVED,), 1), ((), 2)])
def test_what_was_kept_is_not_computed_again(names: tuple[str, ...], kernels: int) -> None:
    """The names of what is kept decide."""

    def loss(q_BLHK: jax.Array) -> jax.Array:
        q_BLHK = jnp.sin(q_BLHK)
        out = memory_attention(q_BLHK, q_BLHK, q_BLHK, window=64, implementation=IMPLEMENTATION)
        return jnp.sin(out.o_BLHK.astype(jnp.float32)).sum()

    policy = jax.checkpoint_policies.save_only_these_names(*names)
    shape = jax.ShapeDtypeStruct((1, 128, 2, 64), jnp.bfloat16)
    with jax.sharding.use_abstract_mesh(GPU):
        gradient = jax.jit(jax.grad(jax.checkpoint(loss, policy=policy)))
        found = list(_kernels(gradient.trace(shape).jaxpr.jaxpr))
    assert found.count("memory_attention_forward_kernel") == kernels
    assert found.count("memory_attention_queries_kernel") == 1


def _kernels(jaxpr: Any) -> Iterator[str]:
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "mpmd_map":
            yield eqn.params["name"]
            continue
        for parameter in eqn.params.values():
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from _kernels(inner)
