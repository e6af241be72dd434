"""Both operations, forward and gradient, lower for accelerators on a machine without one."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels import Unsupported, memory_attention, selective_scan
from pallas_kernels.memory_attention import cudnn
from pallas_kernels.shapes import ATTENTION_CASES, SCAN_CASES

PLATFORMS = ["cuda", "tpu"]


SCANS = [("cuda", "xla"), ("cuda", "pallas_triton"), ("tpu", "xla"), ("tpu", "pallas_tpu")]
# What shows that a kernel was lowered and not its interpreter.
MARKS = {
    "xla": "stablehlo",
    "pallas_triton": "__gpu$xla.gpu.triton",
    "pallas_tpu": "tpu_custom_call",
}
DEVICES = {
    "cuda": AbstractDevice("NVIDIA H100 80GB HBM3", None, platform="gpu"),
    "tpu": AbstractDevice("TPU v5 lite", None, platform="tpu"),
}


def lowers(loss, shapes, platform, mark="stablehlo"):
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=DEVICES[platform])):
        traced = jax.jit(jax.grad(loss, argnums=tuple(range(len(shapes))))).trace(*shapes)
        return mark in traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(("platform", "implementation"), SCANS)
@pytest.mark.parametrize("case", SCAN_CASES)
def test_selective_scan_lowers(case, implementation, platform):
    sizes = dataclasses.asdict(SCAN_CASES[case])

    def array(letters, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(tuple(sizes[letter] for letter in letters), dtype)

    shapes = [array(x) for x in ("BLE", "BLE")]
    shapes += [array("EN", jnp.float32), array("BLN"), array("BLN"), array("E", jnp.float32)]
    shapes += [array("BLE"), array("E", jnp.float32), array("BEN", jnp.float32)]

    def loss(*inputs):
        *required, z_BLE, dt_bias_E, h0_BEN = inputs
        reset_BL = jnp.zeros(z_BLE.shape[:2], jnp.bool_)
        out = selective_scan(
            *required,
            z_BLE=z_BLE,
            dt_bias_E=dt_bias_E,
            h0_BEN=h0_BEN,
            reset_BL=reset_BL,
            implementation=implementation,
        )
        return out.y_BLE.astype(jnp.float32).sum() + out.h_BEN.sum()

    assert lowers(loss, shapes, platform, MARKS[implementation])


@pytest.mark.parametrize(("platform", "implementation"), SCANS)
def test_selective_scan_lowers_beside_float64(implementation, platform):
    """With x64 enabled, of inputs that are narrower."""
    with jax.enable_x64(True):
        test_selective_scan_lowers("b1_l2048_e4096", implementation, platform)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("case", ATTENTION_CASES)
def test_memory_attention_lowers(case, platform):
    shape = ATTENTION_CASES[case]
    chunks = -(-shape.L // shape.chunk)

    def array(*dims):
        return jax.ShapeDtypeStruct((shape.B, *dims), jnp.bfloat16)

    shapes = [array(shape.L, heads, shape.K) for heads in (shape.H, *[shape.G] * 4)]
    shapes += [array(chunks, shape.eidetic, shape.G, shape.K)] * 2

    def loss(q, k, v, fading_k, fading_v, eidetic_k, eidetic_v):
        out = memory_attention(
            q,
            k,
            v,
            window=shape.window,
            fading_k_BLGK=fading_k,
            fading_v_BLGK=fading_v,
            fading_window=shape.fading_window,
            eidetic_k_BZMGK=eidetic_k,
            eidetic_v_BZMGK=eidetic_v,
            eidetic_valid_BZM=jnp.ones(eidetic_k.shape[:3], jnp.bool_),
            chunk=shape.chunk,
            segment_ids_BL=jnp.ones(q.shape[:2], jnp.int32),
            implementation="xla",
        )
        return out.o_BLHK.astype(jnp.float32).sum() + out.lse_BLH.sum()

    assert lowers(loss, shapes, platform)


@pytest.fixture
def cudnn_found(monkeypatch):
    """As on a machine with an H100 and its libraries."""
    monkeypatch.setattr(cudnn._binding, "check_cudnn_version", lambda: 91200)
    monkeypatch.setattr(cudnn._binding, "check_compute_capability", lambda capability: True)


@pytest.mark.parametrize("gradient_of_lse", [False, True])
@pytest.mark.parametrize("window", [64, 256])
def test_cudnn_lowers(cudnn_found, window, gradient_of_lse):
    """Backward by cuDNN too, unless the log-sum-exp has a gradient: that only Triton's has."""
    q, kv = (jax.ShapeDtypeStruct((2, 256, heads, 64), jnp.bfloat16) for heads in (4, 2))

    def loss(q_BLHK, k_BLGK, v_BLGK):
        out = memory_attention(q_BLHK, k_BLGK, v_BLGK, window=window, implementation="cudnn")
        o = out.o_BLHK.astype(jnp.float32).sum()
        return o + out.lse_BLH.sum() if gradient_of_lse else o

    def lowers_to(mark):
        return lowers(loss, [q, kv, kv], "cuda", mark)

    with jax.enable_x64(False):
        assert lowers_to("__cudnn$fmhaSoftmax")
        assert lowers_to("fmhaSoftmaxBackward") != gradient_of_lse
        assert lowers_to(MARKS["pallas_triton"]) == gradient_of_lse


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"segment_ids_BL": jnp.zeros((1, 128), jnp.int32)}, "segment_ids_BL"),
        ({"fading_window": 16}, "fading"),
        ({"blocks": {"queries": 64}}, "blocks"),
        ({"dtype": "float32"}, "float32"),
        ({"K": 136}, "K=136"),
    ],
)
def test_cudnn_says_what_it_cannot_take(cudnn_found, changed, named):
    dtype, K = changed.pop("dtype", "bfloat16"), changed.pop("K", 64)
    q = jax.ShapeDtypeStruct((1, 128, 2, K), dtype)

    def attend(q_BLHK):
        fading = dict(fading_k_BLGK=q_BLHK, fading_v_BLGK=q_BLHK) if "fading" in named else {}
        return memory_attention(
            q_BLHK, q_BLHK, q_BLHK, window=32, implementation="cudnn", **fading, **changed
        )

    mesh = AbstractMesh((), (), abstract_device=DEVICES["cuda"])
    with jax.sharding.use_abstract_mesh(mesh), pytest.raises(Unsupported, match=named):
        jax.eval_shape(attend, q)


def test_cudnn_is_refused_where_it_is_not(monkeypatch):
    q = jnp.zeros((1, 8, 2, 64), jnp.bfloat16)
    with pytest.raises(Unsupported, match="NVIDIA"):
        memory_attention(q, q, q, window=8, implementation="cudnn")

    def nothing_found():
        raise RuntimeError("cuDNN is not detected.")

    monkeypatch.setattr(cudnn._binding, "check_cudnn_version", nothing_found)
    mesh = AbstractMesh((), (), abstract_device=DEVICES["cuda"])
    with jax.sharding.use_abstract_mesh(mesh), pytest.raises(Unsupported, match="not detected"):
        jax.eval_shape(lambda q: memory_attention(q, q, q, window=8, implementation="cudnn"), q)
