"""The benchmark of the memory attention: what is wrong gets no time; peers are what they say."""

import json
import pathlib

import jax
import jax.numpy as jnp
import pytest

from benchmarks import attention_peers, attention_tuning
from benchmarks.attention_programs import draw_inputs, useful_flops
from pallas_kernels.shapes import AttentionShape
from tests.test_benchmarks import run
from tests.tolerances import TOLERANCE, relative_rms

SHAPE = AttentionShape(1, 40, 2, 1, 16, 8, 6, 4, 8)

# An implementation whose gradient of the fading values is wrong.
PLANTED = """
import functools, types
from absl import app
from benchmarks import memory_attention, timing
from pallas_kernels.memory_attention import api, xla

timing.ROTATED_BYTES = 0

def backward(operands, spec, out, d_out):
    gradients = xla.backward(operands, spec, out, d_out)
    fading = gradients.fading
    return gradients._replace(fading=fading._replace(v_BLGK=fading.v_BLGK * 1.05))

planted = types.SimpleNamespace(forward=xla.forward, backward=backward)
api.IMPLEMENTATIONS["planted"] = functools.partial(api._attend, planted)
app.run(memory_attention.main)
"""


def test_what_is_wrong_is_not_timed(tmp_path: pathlib.Path) -> None:
    output = tmp_path / "attention.json"
    sizes = ["--lengths=40", "--widths=16", "--memories=0,4", "--heads=2", "--key_heads=1"]
    sizes += ["--window=8", "--fading_window=6", "--chunk=8", "--samples=2"]
    options = [f"--output={output}", "--implementations=xla,planted", *sizes]
    result = run("-c", PLANTED, *options)
    assert result.returncode == 1, result.stderr
    rows = json.loads(output.read_text())["rows"]
    right = [row for row in rows if row["implementation"] == "xla"]
    assert len(right) == 4
    for row in right:
        assert row["ms"] > 0 and row["useful_tflops"] > 0, row
        assert max(row["errors"].values()) < 1e-2
    wrong = [row for row in rows if row["implementation"] == "planted"]
    assert len(wrong) == 2
    for row in wrong:
        assert "ms" not in row and row["errors"]["d fading_v"] == pytest.approx(0.05, rel=0.1)
    drawn = run("-m", "benchmarks.memory_attention", f"--output={output}", "--draw")
    assert drawn.returncode == 0, drawn.stderr
    assert (tmp_path / "attention.svg").stat().st_size


@pytest.mark.parametrize(
    ("name", "keys"),
    [("xla", 4 + 14), ("cudnn_merged", 14), ("cudnn_window", 14), ("flex", 14)],
)
def test_useful_operations(name: str, keys: int) -> None:
    """A late query sees W + F keys, of ours the memory as well; the first one itself."""
    grown = useful_flops("forward", name, SHAPE)
    longer = useful_flops("forward", name, AttentionShape(1, 41, 2, 1, 16, 8, 6, 4, 8))
    assert longer - grown == 4 * 16 * 2 * keys
    assert useful_flops("backward", name, SHAPE) == 2.5 * grown
    one = AttentionShape(1, 1, 2, 1, 16, 8, 6, 0, 8)
    assert useful_flops("forward", name, one) == 4 * 16 * 2
    assert useful_flops("forward", "cudnn_full", SHAPE) == 4 * 16 * 2 * 40 * 41 / 2


def test_merging_gives_the_common_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN's calls replaced by dense ones that have the same contract, gradients included."""
    x, do = draw_inputs(jax.random.key(0), shape=SHAPE)
    x, do = jax.tree.map(lambda v: v.astype(jnp.float32) if v.dtype != bool else v, (x, do))
    assert x.fading is not None

    def logits(q: jax.Array, k: jax.Array, window: int) -> jax.Array:
        age = jnp.arange(q.shape[1])[:, None] - jnp.arange(k.shape[1])[None, :]
        s = jnp.einsum("BLHK,BSHK->BHLS", q, jnp.repeat(k, 2, axis=2)) * q.shape[-1] ** -0.5
        return jnp.where((age >= 0) & (age < window), s, -jnp.inf)

    def band(q: jax.Array, k: jax.Array, v: jax.Array, *, window: int, scale: float):
        assert scale == q.shape[-1] ** -0.5
        s = logits(q, k, window)
        lse = jax.nn.logsumexp(s, axis=-1)
        p = jnp.exp(s - lse[..., None])
        return jnp.einsum("BHLS,BSHK->BLHK", p, jnp.repeat(v, 2, axis=2)), lse

    def band_backward(q, k, v, o, lse, do, *, window, scale):
        assert scale == q.shape[-1] ** -0.5

        def weighted(q, k, v):
            # The derivative of sum(do o) with lse and delta held as given.
            s = logits(q, k, window)
            p = jax.lax.stop_gradient(jnp.exp(s - lse[..., None]))
            wide = jnp.repeat(v, 2, axis=2)
            dp = jnp.einsum("BLHK,BSHK->BHLS", do, jax.lax.stop_gradient(wide))
            delta = (o * do).sum(-1).swapaxes(1, 2)[..., None]
            through_logits = (jnp.where(p > 0, s, 0) * p * (dp - delta)).sum()
            return through_logits + jnp.einsum("BLHK,BHLS,BSHK->", do, p, wide)

        return jax.grad(weighted, argnums=(0, 1, 2))(q, k, v)

    monkeypatch.setattr(attention_peers.cudnn, "band", band)
    monkeypatch.setattr(attention_peers.cudnn, "band_backward", band_backward)

    def merged(*arrays: jax.Array) -> jax.Array:
        return attention_peers.cudnn_merged(*arrays, SHAPE.window, SHAPE.fading_window)

    def reference(*arrays: jax.Array) -> jax.Array:
        q, k, v, fading_k, fading_v = arrays
        near = logits(q, k, SHAPE.window)
        age = jnp.arange(SHAPE.L)[:, None] - jnp.arange(SHAPE.L)[None, :]
        far = logits(q, fading_k, SHAPE.window + SHAPE.fading_window)
        far = jnp.where(age >= SHAPE.window, far, -jnp.inf)
        p = jax.nn.softmax(jnp.concatenate([near, far], axis=-1), axis=-1)
        values = jnp.repeat(jnp.concatenate([v, fading_v], axis=1), 2, axis=2)
        return jnp.einsum("BHLS,BSHK->BLHK", p, values)

    arrays = (x.q_BLHK, x.k_BLGK, x.v_BLGK, *x.fading)
    got, pull = jax.vjp(merged, *arrays)
    want, pull_reference = jax.vjp(reference, *arrays)
    assert relative_rms(got, want) <= TOLERANCE["float32"]
    for mine, exact in zip(pull(do), pull_reference(do), strict=True):
        assert relative_rms(mine, exact) <= TOLERANCE["float32"]


def test_scores_of_block_sizes() -> None:
    search = attention_tuning.Search("xla", SHAPE)
    scores = search.scores({"start": {}, "8": {"queries": 8}, "no": {"queries": 0}}, samples=2)
    assert scores["start"] == 1 and isinstance(scores["8"], float)
    assert "queries" in str(scores["no"])
