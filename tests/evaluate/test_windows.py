import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bmojo_jax import model, sharding
from bmojo_jax.checkpoint import Trained
from bmojo_jax.config import DataConfig, MeshConfig, TrainConfig
from bmojo_jax.data.tokenizers import ByteTokenizer
from bmojo_jax.evaluate import windows
from bmojo_jax.evaluate.windows import FORMS, Window, window_nll
from tests.models import FAMILIES, SMALL
from tests.tolerances import TOLERANCE, relative_rms

# Chunks are 4 tokens, the window 5, the fading window 3: all borders are crossed, several times.
WINDOWS = [
    *(Window(0, 0, 45), Window(1, 3, 45), Window(0, 5, 7), Window(1, 0, 1), Window(2, 2, 3)),
    *(Window(2, 0, 16), Window(1, 20, 23), Window(0, 4, 41), Window(0, 17, 16), Window(1, 30, 12)),
]


@pytest.fixture
def documents(rng):
    return [rng.integers(SMALL.vocab_size, size=n).astype(np.int32) for n in (46, 60, 20)]


def _settings(sequence_length=12, **changes):
    config = dataclasses.replace(SMALL, compute_dtype="float32", **changes)
    return TrainConfig(model=config, data=DataConfig(sequence_length=sequence_length))


def _trained(**changes):
    """A model with parameters none of which is a one, a zero or a small number."""
    settings = _settings(**changes)
    config = settings.model
    params = model.init_params(config, jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [
        leaf + 0.3 * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return Trained(settings, jax.tree.unflatten(tree, leaves), 0, ByteTokenizer())


def alone(trained, documents, windows):
    """What the model says of each window in a row of its own."""
    longest = max(window.length for window in windows)
    forward = jax.jit(
        lambda tokens: jax.nn.log_softmax(model.bind(trained.config.model, trained.params)(tokens))
    )
    result = []
    for document, start, length in windows:
        ids = documents[document][start : start + length + 1]
        row = np.full(longest, 3, np.int32)  # one shape: causal, so padding is free
        row[:length] = ids[:-1]
        log_p = np.asarray(forward(jnp.asarray(row[None])))[0]
        result.append(-log_p[np.arange(length), ids[1:]])
    return result


def _check_forms(family, documents):
    trained = _trained(**FAMILIES[family])
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:2])
    wanted = alone(trained, documents, WINDOWS)
    # Few rows: several windows follow one another in each.
    for form in ("whole", "stream"):
        got = window_nll(trained, documents, WINDOWS, mesh=mesh, form=form, rows=2)
        assert [len(nll) for nll in got] == [window.length for window in WINDOWS]
        # Of each, or an error in a short one would drown.
        for window, a, b in zip(WINDOWS, got, wanted, strict=True):
            assert relative_rms(a, b) < TOLERANCE["float32"], (form, window)


def test_windows_read_together_are_what_they_are_alone(documents):
    _check_forms("bmojo", documents)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"bmojo", "bmojo_paper"}))
def test_windows_read_together_are_what_they_are_alone_in_every_family(family, documents):
    _check_forms(family, documents)


def test_auto_streams_what_is_longer_than_training():
    """Which jobs are made, without running them."""

    def jobs(form, pattern, lengths):
        found = [Window(0, 0, length) for length in lengths]
        trained = Trained(_settings(10, pattern=pattern), {}, 0, ByteTokenizer())
        return [
            (job.form, sorted(found[place.window].length for place in job.places), job.length)
            for job in windows._jobs(trained, found, form=form, rows=None, unit=1)
        ]

    lengths = (3, 9, 10, 11, 40, 41, 90)
    # Rows are multiples of the chunk, 4.
    assert jobs("auto", "bmojo", lengths) == [
        ("whole", [3, 9, 10], 12),
        ("stream", [11, 40, 41, 90], 92),
    ]
    assert jobs("auto", "mamba,attention", lengths) == [
        ("whole", [90], 92),
        ("whole", [41], 44),
        ("whole", [3, 9, 10, 11, 40], 40),
    ]
    assert jobs("whole", "bmojo", (41, 3)) == [("whole", [41], 44), ("whole", [3], 4)]
    assert jobs("stream", "attention", (41, 3)) == [("stream", [3, 41], 44)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"form": "streams"}, rf"form='streams': must be one of .*{FORMS[1]}"),
        ({"rows": 3}, "rows=3: must be a positive multiple of 2, for the devices"),
        ({"windows": [Window(2, 0, 20)]}, r"length=20\): must lie in its document of 20 ids"),
        ({"windows": [Window(2, -1, 5)]}, r"start=-1, length=5\): must lie in its document"),
    ],
)
@pytest.mark.usefixtures("annotations_off")
def test_wrong_arguments(changes, message, documents):
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:2])
    arguments = {"windows": WINDOWS, **changes}
    with pytest.raises(ValueError, match=message):
        window_nll(Trained(_settings(), {}, 0, ByteTokenizer()), documents, mesh=mesh, **arguments)
