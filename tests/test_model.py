"""Properties of the whole model, in float64: causality, decoding, documents, special cases."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh

from bmojo_jax import cache, layers, model
from pallas_kernels.memory_attention import cudnn
from tests.models import FAMILIES, float64_params, packed_positions, small_config
from tests.tolerances import relative_rms

LENGTH = 40
# One compilation instead of one for each primitive.
hidden_states = jax.jit(model.hidden_states, static_argnums=0)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def tokens(rng, batch=2, length=LENGTH):
    return jnp.asarray(rng.integers(0, 31, size=(batch, length)))


def packed(tokens_BL, *rows):
    """The arguments of `hidden_states`: documents that start at 0 and at the given tokens."""
    return {"positions_BL": jnp.asarray(packed_positions(tokens_BL.shape[1], *rows))}


def decode(config, params, tokens_BL, positions_BL, size):
    """Hidden states from pieces of a size."""
    extend = jax.jit(lambda t, c, p: model.bind(config, params).extend(t, c, None, p))
    state = cache.empty_cache(config, tokens_BL.shape[0], max_length=LENGTH)
    parts = []
    for first in range(0, LENGTH, size):
        piece = slice(first, first + size)
        x_BLD, state = extend(tokens_BL[:, piece], state, positions_BL[:, piece])
        parts.append(x_BLD)
    return np.concatenate(parts, axis=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_pass_equals_decoding(rng, family):
    """Token by token, of documents that start and end anywhere, L far beyond W + F + C."""
    config = small_config(**FAMILIES[family])
    params = float64_params(config)
    tokens_BL = tokens(rng)
    documents = packed(tokens_BL, (13, 15), (22, 30))
    want = hidden_states(config, params, tokens_BL, **documents)
    got = decode(config, params, tokens_BL, size=1, **documents)
    np.testing.assert_allclose(got, want, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_different_lengths_decode_as_if_alone(rng, family):
    """Pieces of which rows have fewer tokens than there is room for, with documents in them."""
    config = small_config(**FAMILIES[family])
    params = float64_params(config)
    tokens_BL = tokens(rng)
    documents = packed(tokens_BL, (13, 15), (22, 30))
    pieces = [(4, 4), (3, 0), (2, 4), (0, 1), (4, 4), (4, 3), (1, 4), (4, 4), (4, 3), (4, 4)]
    state = cache.empty_cache(config, 2, max_length=LENGTH)
    extend = jax.jit(lambda t, c, n, p: model.bind(config, params).extend(t, c, n, p))
    used = np.zeros(2, int)
    rows = [[], []]
    for lengths in pieces:
        index = np.minimum(used[:, None] + np.arange(4), LENGTH - 1)
        of_piece = (
            np.take_along_axis(np.asarray(x), index, axis=1)
            for x in (tokens_BL, documents["positions_BL"])
        )
        piece_BL, positions_BL = of_piece
        x_BLD, state = extend(piece_BL, state, np.array(lengths), positions_BL)
        for row, length in enumerate(lengths):
            rows[row].append(x_BLD[row, :length])
        used += np.array(lengths)
    np.testing.assert_array_equal(state.time_B, used)
    want = hidden_states(config, params, tokens_BL, **documents)
    for row in range(2):
        got = np.concatenate(rows[row])
        np.testing.assert_allclose(got, want[row, : used[row]], atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_causality_by_gradient(rng, family):
    """Of logits at t, the gradient is zero after t and not before, at every border."""
    config = small_config(**FAMILIES[family])
    params = float64_params(config)
    language_model = model.bind(config, params)
    tokens_BL = tokens(rng, batch=1)

    @jax.jit
    @jax.grad
    def reach_of(x_BLD, t):
        documents = layers.one_document(1, LENGTH)
        for i in range(len(config.blocks)):
            group = jax.tree.map(lambda p: p[0], params["groups"])
            block = model.bind_block(config, i, group[str(i)])
            x_BLD = block(x_BLD, documents, statistics=False)[0]
        return jnp.sum(jnp.sin(x_BLD[0, t]))

    x_BLD = language_model.embedding.table[...][tokens_BL]
    for t in (0, 6, 12, 27, 39):
        reach = np.abs(reach_of(x_BLD, t)[0]).max(axis=-1)
        assert (reach[t + 1 :] == 0).all()
        assert reach[t] > 0
        if t and config.pattern != "swa+mlp":
            assert reach[t - 1] > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_documents_are_isolated(rng, family):
    """A packed document gives what it gives alone, at an equal offset modulo the chunk."""
    config = small_config(**FAMILIES[family])
    params = float64_params(config)
    tokens_BL = tokens(rng)
    start = 2 * config.chunk
    together = hidden_states(config, params, tokens_BL, **packed(tokens_BL, (start,), (start,)))
    # Alone at the start of a row; what follows it is of no document of its own.
    moved_BL = jnp.roll(tokens_BL, -start, axis=1)
    alone = hidden_states(config, params, moved_BL, **packed(tokens_BL, (), ()))
    np.testing.assert_allclose(together[:, start:], alone[:, : LENGTH - start], atol=1e-12)


@pytest.mark.parametrize("family", ["bmojo", "hybrid"])
def test_results_depend_on_an_offset_modulo_the_chunk_only(rng, family):
    config = small_config(**FAMILIES[family])
    params = float64_params(config)
    tail_BL = tokens(rng, batch=1, length=24)

    def after(offset):
        tokens_BL = jnp.concatenate([tokens(rng, batch=1, length=offset), tail_BL], axis=1)
        whole = hidden_states(config, params, tokens_BL, **packed(tokens_BL, (offset,)))
        return whole[:, offset:]

    np.testing.assert_allclose(after(3), after(3 + 2 * config.chunk), atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_at_the_end_changes_nothing(rng, family):
    config = small_config(**FAMILIES[family])
    params = float64_params(config)
    tokens_BL = tokens(rng)
    whole = hidden_states(config, params, tokens_BL, **packed(tokens_BL, (), ()))
    short = hidden_states(config, params, tokens_BL[:, :17])
    np.testing.assert_allclose(whole[:, :17], short, atol=1e-12)


def bmojo_mixer(config, params):
    block = jax.tree.map(lambda p: p[0], params["groups"])["0"]
    return model.bind_block(config, 0, block).mixer


def sliding_window(config, params, window):
    """The attention of a B'MOJO layer's parameters as a plain sliding-window mixer."""
    plain = dataclasses.replace(config, pattern="swa", window=window)
    block = jax.tree.map(lambda p: p[0], params["groups"])["0"]
    own = {"norm": block["norm"], "mixer": block["mixer"]["attention"]}
    return model.bind_block(plain, 0, own).mixer


def test_fading_stream_of_the_input_is_a_wider_window(rng):
    """Spec section 5: with f := u and tied weights B'MOJO-F is a sliding window of W + F."""
    config = small_config(pattern="bmojo_f")
    params = float64_params(config)
    u_BLD = jnp.asarray(rng.normal(size=(2, LENGTH, 16)))
    documents = layers.packed_documents(jnp.asarray(packed_positions(LENGTH, (9,), (33,))))
    got, _ = bmojo_mixer(config, params).attention(u_BLD, documents, f_BLD=u_BLD)
    wide = config.window + config.fading_span
    want, _ = sliding_window(config, params, wide)(u_BLD, documents)
    np.testing.assert_allclose(got, want, atol=1e-12)


def test_long_window_is_full_attention(rng):
    """Spec section 5: with W >= L B'MOJO's attention is full causal attention."""
    config = small_config(pattern="bmojo", window=LENGTH, ssm_residual=False)
    params = float64_params(config)
    u_BLD = jnp.asarray(rng.normal(size=(2, LENGTH, 16)))
    documents = layers.one_document(2, LENGTH)
    got, _ = bmojo_mixer(config, params)(u_BLD, documents)
    plain = dataclasses.replace(config, pattern="attention")
    block = jax.tree.map(lambda p: p[0], params["groups"])["0"]
    own = {"norm": block["norm"], "mixer": block["mixer"]["attention"]}
    want, _ = model.bind_block(plain, 0, own).mixer(u_BLD, documents)
    np.testing.assert_allclose(got, want, atol=1e-12)


def test_memory_of_everything_is_full_attention_up_to_staleness(rng):
    """Spec section 5: M >= tokens that left the window, F = 0, original positions.

    Queries at a chunk's first token miss nothing; there the layer is full attention.
    """
    config = small_config(
        pattern="bmojo",
        fading_window=0,
        eidetic_tokens=LENGTH,
        eidetic_positions="original",
        ssm_residual=False,
    )
    params = float64_params(config)
    u_BLD = jnp.asarray(rng.normal(size=(2, LENGTH, 16)))
    documents = layers.packed_documents(jnp.asarray(packed_positions(LENGTH, (), (14,))))
    got, _ = bmojo_mixer(config, params)(u_BLD, documents)
    want, _ = sliding_window(config, params, LENGTH)(u_BLD, documents)
    np.testing.assert_allclose(got[:, :: config.chunk], want[:, :: config.chunk], atol=1e-12)
    assert np.abs(got - want)[:, config.chunk + config.window :].max() > 1e-3


def test_memory_of_the_newest_is_a_wider_window(rng):
    """With F = 0 and original positions; queries at a chunk's first token miss nothing."""
    config = small_config(
        pattern="bmojo",
        fading_window=0,
        eidetic_tokens=7,
        eidetic_selection="newest",
        eidetic_positions="original",
        ssm_residual=False,
    )
    params = float64_params(config)
    u_BLD = jnp.asarray(rng.normal(size=(2, LENGTH, 16)))
    documents = layers.packed_documents(jnp.asarray(packed_positions(LENGTH, (), (14,))))
    got, _ = bmojo_mixer(config, params)(u_BLD, documents)
    want, _ = sliding_window(config, params, config.window + 7)(u_BLD, documents)
    np.testing.assert_allclose(got[:, :: config.chunk], want[:, :: config.chunk], atol=1e-12)


def test_memory_of_the_fading_stream(rng):
    """Of f := u it is that of the input, with tied weights; of another f it is another."""
    of_input = small_config(pattern="bmojo", eidetic_tokens=7)
    params = float64_params(of_input)
    of_fading = dataclasses.replace(of_input, eidetic_content="fading")
    u_BLD, f_BLD = jnp.asarray(rng.normal(size=(2, 2, LENGTH, 16)))
    e_BL = jnp.asarray(rng.uniform(size=(2, LENGTH)))
    documents = layers.one_document(2, LENGTH)

    def attend(config, f_BLD):
        attention = bmojo_mixer(config, params).attention
        return attention(u_BLD, documents, f_BLD=f_BLD, e_BL=e_BL)[0]

    np.testing.assert_array_equal(attend(of_fading, u_BLD), attend(of_input, u_BLD))
    assert np.abs(attend(of_fading, f_BLD) - attend(of_input, f_BLD)).max() > 1e-3


def test_no_memory_is_bmojo_f(rng):
    config = small_config(pattern="bmojo", eidetic_tokens=0)
    params = float64_params(config)
    tokens_BL = tokens(rng)
    want = hidden_states(config, params, tokens_BL)
    fading_only = dataclasses.replace(config, pattern="bmojo_f")
    np.testing.assert_array_equal(hidden_states(fading_only, params, tokens_BL), want)


def test_eidetic_gate_moves_attention_and_gives_the_innovation_a_gradient(rng):
    config = small_config(eidetic_gate=True)
    params = float64_params(config)
    tokens_BL = tokens(rng)

    def loss(gate):
        changed = jax.tree.map(lambda p: p, params)
        changed["groups"]["0"]["mixer"]["attention"]["eidetic_gate"] = gate
        return jnp.sum(jnp.sin(hidden_states(config, changed, tokens_BL)))

    gate = params["groups"]["0"]["mixer"]["attention"]["eidetic_gate"]
    slope = jax.grad(loss)(gate)
    assert np.abs(slope).min() > 0
    small = 1e-5 * jnp.ones_like(gate)
    numeric = (loss(gate + small) - loss(gate - small)) / 2e-5
    np.testing.assert_allclose(jnp.sum(slope), numeric, rtol=1e-6)


def test_rematerialisation_changes_no_gradient(rng):
    """Nested: two stretches of two groups."""
    config = small_config(pattern="bmojo+mlp,mamba", depth=8)
    params = float64_params(config)
    tokens_BL = tokens(rng)

    def gradient(remat):
        changed = dataclasses.replace(config, remat=remat)
        run = lambda p: jnp.sum(jnp.sin(hidden_states(changed, p, tokens_BL)))  # noqa: E731
        return jax.jit(jax.grad(run))(params)

    want = gradient("none")
    for remat in ("kernels", "dots", "full", "nested"):
        jax.tree.map(
            lambda got, want: np.testing.assert_allclose(got, want, atol=1e-10),
            gradient(remat),
            want,
        )


@pytest.mark.parametrize(
    ("remat", "scans", "attentions", "selections"),
    [
        ("none", 1, 1, 1),
        ("kernels", 1, 1, 1),
        ("dots", 2, 1, 1),
        ("full", 2, 2, 1),
        ("nested", 3, 3, 1),
    ],
)
def test_what_rematerialisation_computes_again(remat, scans, attentions, selections):
    """In a training step, of the forward passes of scan and attention, and of selections."""
    config = small_config(
        pattern="bmojo",
        depth=4,
        compute_dtype="bfloat16",
        remat=remat,
        scan_implementation="pallas_triton",
        attention_implementation="pallas_triton",
    )
    counts = collections.Counter(_used_operations(_gradient_on_a_gpu(config).jaxpr.jaxpr))
    assert counts["selective_scan_forward_kernel"] == scans
    assert counts["memory_attention_forward_kernel"] == attentions
    assert counts["top_k"] == selections


def test_nested_rematerialisation_keeps_the_inputs_of_stretches():
    """Of 34 groups: those of 17 stretches, and of the two groups of one of them."""
    assert [model._stretch(groups) for groups in (1, 2, 3, 4, 12, 34, 37)] == [1, 1, 1, 2, 3, 2, 1]

    def stacked_inputs(remat):
        settings = {"compute_dtype": "float32", "remat": remat}
        config = small_config(pattern="mamba", depth=12, width=48, **settings)
        shapes = _given_by_loops(_gradient_on_a_gpu(config).jaxpr.jaxpr)
        return {shape[0] for shape in shapes if shape[1:] == (1, 64, 48)}

    assert stacked_inputs("full") == {12}
    assert stacked_inputs("nested") == {4, 3}


def test_a_transformer_of_one_document_a_row_attends_through_cudnn(monkeypatch):
    """Forward and backward, in the loop over layers: nobody asks for a gradient of the log-sum-exp,
    which cuDNN does not have."""
    monkeypatch.setattr(cudnn._binding, "check_cudnn_version", lambda: 91200)
    monkeypatch.setattr(cudnn._binding, "check_compute_capability", lambda capability: True)
    config = small_config(
        pattern="attention+mlp",
        depth=4,
        head_width=16,
        compute_dtype="bfloat16",
        remat="dots",
        attention_implementation="cudnn",
    )
    with jax.enable_x64(False):
        text = _gradient_on_a_gpu(config).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @__cudnn$fmhaSoftmax(") == 1
    assert text.count("custom_call @__cudnn$fmhaSoftmaxBackward(") == 1
    assert "xla.gpu.triton" not in text


def _gradient_on_a_gpu(config):
    """Traced for an H100."""
    shapes = jax.eval_shape(lambda: model.init_params(config, jax.random.key(0)))
    tokens_BL = jax.ShapeDtypeStruct((1, 64), jnp.int32)

    def loss(params, tokens_BL):
        return jnp.sum(hidden_states(config, params, tokens_BL).astype(jnp.float32))

    device = AbstractDevice("NVIDIA H100 80GB HBM3", None, platform="gpu")
    mesh = AbstractMesh((), (), abstract_device=device)
    with jax.enable_x64(False), jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(jax.grad(loss)).trace(shapes, tokens_BL)


def _used_operations(jaxpr):
    """Names of kernels and primitives of which some result is used: XLA drops the others."""
    used = {id(v) for v in jaxpr.outvars}
    for eqn in reversed(jaxpr.eqns):
        if not any(id(v) in used for v in eqn.outvars):
            continue
        used |= {id(v) for v in eqn.invars}
        if eqn.primitive.name == "pallas_call":
            yield eqn.params["name"]
            continue
        yield eqn.primitive.name
        for parameter in eqn.params.values():
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from _used_operations(inner)


def _given_by_loops(jaxpr):
    """Shapes of what loops give."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan":
            yield from (v.aval.shape for v in eqn.outvars)
        if eqn.primitive.name != "pallas_call":
            for parameter in eqn.params.values():
                inner = getattr(parameter, "jaxpr", parameter)
                if hasattr(inner, "eqns"):
                    yield from _given_by_loops(inner)


def test_depth_does_not_grow_the_program():
    """The compiled program holds one group, however deep the model."""

    def size(depth):
        config = small_config(pattern="bmojo,mamba+mlp", depth=depth, compute_dtype="float32")
        shapes = jax.eval_shape(lambda: model.init_params(config, jax.random.key(0)))
        tokens_BL = jax.ShapeDtypeStruct((1, 16), jnp.int32)
        lowered = jax.jit(lambda p, t: model.hidden_states(config, p, t)).lower(shapes, tokens_BL)
        return len(lowered.as_text())

    assert size(16) <= 1.02 * size(2)


def test_two_groups_are_no_loop():
    """What they keep for the backward pass is not copied into an array of both."""

    def loops(depth, remat="none"):
        config = small_config(pattern="swa", depth=depth, remat=remat, compute_dtype="float32")
        return (
            _gradient_on_a_gpu(config)
            .lower(lowering_platforms=("cuda",))
            .as_text()
            .count("stablehlo.while")
        )

    assert loops(2) < loops(3) == loops(2, remat="full")


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("family", ["bmojo_gate", "bmojo_mlp_mamba", "transformer"])
def test_lowers_for_accelerators(family, platform):
    """Forward and gradient, on a machine that has neither."""
    config = small_config(**FAMILIES[family], compute_dtype="bfloat16")
    shapes = jax.eval_shape(lambda: model.init_params(config, jax.random.key(0)))
    ints = jax.ShapeDtypeStruct((2, 16), jnp.int32)

    def loss(params, tokens_BL, positions_BL):
        x_BLD = model.hidden_states(config, params, tokens_BL, positions_BL=positions_BL)
        return jnp.sum(jnp.square(x_BLD.astype(jnp.float32)))

    traced = jax.jit(jax.grad(loss)).trace(shapes, ints, ints)
    assert "stablehlo" in traced.lower(lowering_platforms=(platform,)).as_text()


def test_bfloat16_keeps_the_parts_that_need_it_in_float32(rng):
    config = small_config(compute_dtype="bfloat16")
    params = model.init_params(config, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}
    tokens_BL = tokens(rng)
    low = hidden_states(config, params, tokens_BL)
    assert low.dtype == jnp.bfloat16
    exact = dataclasses.replace(config, compute_dtype="float32")
    high = hidden_states(exact, params, tokens_BL)
    error = jnp.linalg.norm(low.astype(jnp.float32) - high) / jnp.linalg.norm(high)
    assert 1e-5 < error < 0.05
    logits = model.bind(config, params).logits(low)
    assert logits.dtype == jnp.float32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["mamba", "hybrid", "bmojo_f"])
def test_decoding_equals_the_whole_pass_in_low_precision(rng, family, dtype):
    """Families without a discrete choice, which rounding could tip."""
    config = small_config(**FAMILIES[family], compute_dtype=dtype)
    params = model.init_params(config, jax.random.key(0))
    tokens_BL = tokens(rng)
    positions_BL = jnp.asarray(packed_positions(LENGTH, (13,), (22, 30)))
    want = hidden_states(config, params, tokens_BL, positions_BL=positions_BL)
    got = decode(config, params, tokens_BL, positions_BL, 4)
    assert got.dtype == want.dtype == jnp.dtype(dtype)
    assert relative_rms(got, want) < {"float32": 1e-5, "bfloat16": 2e-2}[dtype]


def test_bfloat16_gradients_of_shared_rows_are_summed_in_float32(rng):
    """One token used thousands of times: bfloat16 sums would stop growing at 256."""
    config = small_config(pattern="swa", compute_dtype="bfloat16", window=2)
    params = model.init_params(config, jax.random.key(0))
    tokens_BL = jnp.full((8, 512), 3)

    def gradient(dtype):
        changed = dataclasses.replace(config, compute_dtype=dtype)
        loss = lambda p: hidden_states(changed, p, tokens_BL).astype(jnp.float32)[..., 0].sum()  # noqa: E731
        return jax.grad(loss)(params)["embedding"]["table"][3]

    assert relative_rms(gradient("bfloat16"), gradient("float32")) < 0.05


def test_a_piece_beyond_the_limit_is_refused(rng):
    config = small_config()
    state = cache.empty_cache(config, 2, max_length=LENGTH)
    with pytest.raises(ValueError, match=r"length=5 tokens: a piece must have at most 4"):
        model.bind(config, float64_params(config)).extend(tokens(rng, length=5), state)


def test_module_and_functions_agree(rng):
    from flax import nnx

    config = small_config()
    language_model = model.LanguageModel(config, rngs=nnx.Rngs(params=jax.random.key(3)))
    params = model.init_params(config, jax.random.key(3))
    tokens_BL = tokens(rng)
    want = model.bind(config, params)(tokens_BL)
    np.testing.assert_array_equal(language_model(tokens_BL), want)


def test_statistics_are_shares_and_ages(rng):
    config = small_config()
    params = float64_params(config)
    language_model = model.bind(config, params)
    tokens_BL = tokens(rng)
    plain, nothing = language_model.hidden_states(tokens_BL)
    hidden, measured = language_model.hidden_states(tokens_BL, statistics=True)
    np.testing.assert_array_equal(hidden, plain)
    assert nothing == {"0": {}}
    layer = measured["0"]
    total = layer["mass_in_context"] + layer["mass_fading"] + layer["mass_eidetic"]
    np.testing.assert_allclose(total, 1, atol=1e-12)
    assert all(float(layer[name].min()) > 0 for name in layer)
    # Nothing younger than the window is in the memory; nothing is older than the row.
    assert float(layer["memory_age"].min()) >= config.window
    assert float(layer["memory_age"].max()) < LENGTH
    # What is kept is above the average.
    assert (layer["memory_innovation"] > layer["innovation"]).all()


def test_a_piece_longer_than_a_ring_is_refused():
    """Its tokens would share slots, even where all but the first few are padding."""
    config = small_config(**FAMILIES["transformer"], compute_dtype="float32")
    language_model = model.LanguageModel(config, rngs=nnx.Rngs(0))
    tokens_BL, length_B = jnp.zeros((1, 4), jnp.int32), jnp.full((1,), 2)
    with pytest.raises(ValueError, match="a piece of 4 tokens: the cache holds 3 of a row"):
        language_model.extend(tokens_BL, cache.empty_cache(config, 1, max_length=3), length_B)


def test_cache_is_constant_but_for_full_attention():
    """And made by one program, which serves every length where it is constant."""
    for family, changes in FAMILIES.items():
        config = small_config(**changes, compute_dtype="float32")
        programs = [
            jax.make_jaxpr(lambda n=n, config=config: cache.empty_cache(config, 1, max_length=n))()
            for n in (64, 4096)
        ]
        assert all(len(program.eqns) == 1 for program in programs)
        assert (str(programs[0]) == str(programs[1])) == (family != "transformer")
        sizes = [
            sum(leaf.nbytes for leaf in jax.tree.leaves(cache.empty_cache(config, 1, max_length=n)))
            for n in (64, 4096)
        ]
        assert (sizes[0] < sizes[1]) == (family == "transformer")
