"""Families and sizes: exact counts (golden), parameter-matched, every shape checked."""

import dataclasses
import itertools
import json
import pathlib

import jax
import numpy as np
import pytest

from bmojo_jax import model, paths, presets

GOLDEN = pathlib.Path(__file__).parent / "golden"
CASES = list(itertools.product(presets.PATTERNS, presets.SIZES))


@pytest.mark.parametrize(("family", "size"), CASES)
def test_counts_are_golden_and_true(family, size):
    """The count by formula, by shape and in the table agree, for every family and size."""
    golden = json.loads((GOLDEN / "preset_parameters.json").read_text())
    config = presets.model(family, size)
    shapes = jax.eval_shape(lambda: model.init_params(config, jax.random.key(0)))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert count == presets.model_parameters(config) == golden[size][family]
    hidden = jax.eval_shape(
        lambda p, t: model.hidden_states(config, p, t),
        shapes,
        jax.ShapeDtypeStruct((1, 2048), np.int32),
    )
    assert hidden.shape == (1, 2048, config.width)


@pytest.mark.parametrize("paper", [False, True])
@pytest.mark.parametrize("kv_heads", ["grouped", "full"])
@pytest.mark.parametrize("head_width", [64, 128])
@pytest.mark.parametrize("size", presets.SIZES)
def test_families_match_within_3_percent(size, head_width, kv_heads, paper):
    """Of all parameters but the embedding, which is the same for all."""
    counts = []
    for family in presets.PATTERNS:
        config = presets.model(family, size, head_width=head_width, kv_heads=kv_heads, paper=paper)
        counts.append(config.num_groups * presets.group_parameters(config))
        assert config.head_width == head_width
        assert config.num_heads * head_width == config.width
    assert max(counts) <= 1.03 * min(counts)


def test_widths_are_those_of_the_ladder():
    widths = [presets.SIZES[size].width for size in ("130m", "370m", "790m", "1_4b", "3b")]
    assert widths == [768, 1024, 1536, 2048, 2560]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pattern": "bmojo_f"},
        {"pattern": "mamba+mlp,swa,attention+mlp", "depth": 3},
        {"eidetic_gate": True, "fading_projections": "untied", "tie_embeddings": False},
        {"ssm_norm": False, "fading_norm": False, "qk_norm": False, "conv_taps": 3},
        {"fading_window": 0, "fading_projections": "untied"},
        {"fading_window": 0, "fading_projections": "untied", "eidetic_content": "fading"},
        {"eidetic_tokens": 0, "eidetic_gate": True},
    ],
)
def test_formula_counts_every_option(changes):
    config = dataclasses.replace(presets.model("bmojo", "tiny", vocab_size=100), **changes)
    shapes = jax.eval_shape(lambda: model.init_params(config, jax.random.key(0)))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert presets.model_parameters(config) == count


def parameter_tree(family, size):
    config = presets.model(family, size)
    shapes = jax.eval_shape(lambda: model.init_params(config, jax.random.key(0)))
    return {
        path: f"{'x'.join(map(str, leaf.shape))} {leaf.dtype}"
        for path, leaf in paths.flatten_paths(shapes).items()
    }


@pytest.mark.parametrize(("family", "size"), CASES)
def test_parameter_tree_is_golden(family, size):
    """Path, shape and dtype of every parameter: what checkpoints and rules rely on."""
    golden = json.loads((GOLDEN / "parameter_trees.json").read_text())
    assert parameter_tree(family, size) == golden[size][family]


def test_paper_presets_have_none_of_our_additions():
    for family in presets.PATTERNS:
        config = presets.model(family, "130m", paper=True)
        assert not (config.ssm_norm or config.fading_norm or config.qk_norm or config.ssm_residual)
    bmojo = presets.model("bmojo", "130m")
    assert bmojo.ssm_norm and bmojo.fading_norm and bmojo.qk_norm and bmojo.ssm_residual


@pytest.mark.usefixtures("annotations_off")
def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="size='2b': must be one of"):
        presets.model("bmojo", "2b")
    with pytest.raises(ValueError, match="head_width=96: must be one of"):
        presets.model("bmojo", "3b", head_width=96)


def gradient_norm(depth):
    config = dataclasses.replace(
        presets.model("bmojo", "tiny", vocab_size=64), depth=depth, chunk=16, window=16
    )
    params = model.init_params(config, jax.random.key(0))
    tokens_BL = jax.random.randint(jax.random.key(1), (2, 64), 0, 64)

    def loss(params):
        logits_BLV = model.bind(config, params)(tokens_BL)
        return -jax.nn.log_softmax(logits_BLV)[:, :-1, 0].mean()

    grads = jax.jit(jax.grad(loss))(params)
    return np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads)))


def test_gradients_at_the_start_do_not_grow_with_depth():
    assert 0.25 < gradient_norm(2) / gradient_norm(16) < 4


if __name__ == "__main__":  # rewrites the golden files: python -m tests.test_presets
    counts = {
        size: {
            family: presets.model_parameters(presets.model(family, size))
            for family in presets.PATTERNS
        }
        for size in presets.SIZES
    }
    (GOLDEN / "preset_parameters.json").write_text(json.dumps(counts, indent=2) + "\n")
    trees = {
        size: {family: parameter_tree(family, size) for family in presets.PATTERNS}
        for size in presets.SIZES
    }
    (GOLDEN / "parameter_trees.json").write_text(json.dumps(trees, indent=1) + "\n")
