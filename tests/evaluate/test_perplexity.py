import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bmojo_jax import evaluate, model, sharding
from bmojo_jax.checkpoint import Trained
from bmojo_jax.config import MeshConfig
from bmojo_jax.data import sources
from bmojo_jax.data.documents import BadDocument
from bmojo_jax.data.tokenizers import ByteTokenizer
from bmojo_jax.evaluate import perplexity
from bmojo_jax.evaluate.intervals import interval
from tests.runs import tiny_run

CONTEXTS, SUFFIX = (8, 16, 40), 10
LENGTHS = (55, 39, 41, 90, 12, 66, 70, 45, 40, 61)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model with random parameters, and documents of random bytes."""
    folder = tmp_path_factory.mktemp("documents")
    rng = np.random.default_rng(0)
    for i, length in enumerate(LENGTHS):
        text = rng.integers(97, 123, size=length).astype(np.uint8)
        (folder / f"{i}.txt").write_bytes(text.tobytes())
    config = tiny_run(
        folder, model={"pattern": "bmojo"}, data={"validation_fraction": 0.7, "seed": 3}
    )
    params = model.init_params(config.model, jax.random.key(0))
    params = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(jax.random.key(1), x.shape), params)
    mesh = sharding.make_mesh(MeshConfig())
    params = jax.device_put(params, sharding.param_shardings(mesh, params))
    return Trained(config, params, 7, ByteTokenizer())


@pytest.fixture(scope="module")
def result(trained):
    return perplexity.run(trained, contexts=CONTEXTS, suffix=SUFFIX, anchors=2)


@pytest.fixture(scope="module")
def forward(trained):
    """Log-probabilities [B, 40, V] after rows of 40 tokens; one shape, compiled once."""
    bound = model.bind(trained.config.model, trained.params)
    forward = jax.jit(lambda tokens: jax.nn.log_softmax(bound(tokens)))
    return lambda rows: np.asarray(forward(jnp.asarray(rows)), np.float64)


def _nll_by_hand(forward, framed, anchor, context):
    """The summed nll of a suffix: windows whose last min(10, T / 2) targets count, alone."""
    rows, places = [], []
    step, left = min(SUFFIX, context // 2), SUFFIX
    while left:
        end = anchor - (SUFFIX - left)
        count = min(step, left)
        rows.append(np.full(40, 99, np.int32))  # causal, so padding is free
        rows[-1][:context] = framed[end - context : end]
        for back in range(count):
            places.append((len(rows) - 1, context - 1 - back, framed[end - back]))
        left -= count
    rows += [rows[0]] * (3 - len(rows))
    log_p = forward(np.stack(rows))
    return -sum(log_p[place] for place in places)


def test_loss_by_context_is_that_of_windows_alone(trained, result, forward):
    documents = sources.read_split(trained.config.data, "validation")
    long = [np.array([256, *document, 256]) for document in documents if len(document) >= 40]
    assert result["documents"] == len(long) == len(result["per_document"])
    assert result["documents_too_short"] == len(documents) - len(long) > 0
    assert result["anchors"] > len(long)  # some documents have room for two

    by_hand = {context: [] for context in CONTEXTS}
    for framed, measured in zip(long, result["per_document"], strict=True):
        assert measured["tokens"] == len(framed) - 2
        assert all(40 <= anchor <= measured["tokens"] for anchor in measured["anchors"])
        for context in CONTEXTS:
            sums = (_nll_by_hand(forward, framed, end, context) for end in measured["anchors"])
            by_hand[context].append(sum(sums))
        wanted = [values[-1] for values in by_hand.values()]
        assert measured["nll_by_context"] == pytest.approx(wanted, rel=1e-5)
        assert measured["targets"] == measured["bytes"] == SUFFIX * len(measured["anchors"])

    targets = [measured["targets"] for measured in result["per_document"]]
    assert result["targets"] == sum(targets)
    for row, context in zip(result["by_context"], CONTEXTS, strict=True):
        values = np.array(by_hand[context])
        loss = values.sum() / sum(targets)
        assert (row["context"], row["targets"]) == (context, sum(targets))
        assert row["loss"] == pytest.approx(loss, rel=1e-5)
        assert row["bits_per_byte"] == pytest.approx(loss / math.log(2), rel=1e-5)
        assert row["interval"] == pytest.approx(list(interval(values, targets)), rel=1e-4)
        # The training length is 16. Paired: the interval of the differences.
        more = values - np.array(by_hand[16])
        assert row["delta"] == pytest.approx(more.sum() / sum(targets), abs=1e-5)
        assert row["delta_interval"] == pytest.approx(list(interval(more, targets)), abs=1e-4)
    losses = [row["loss"] for row in result["by_context"]]
    assert len({round(loss, 3) for loss in losses}) == len(CONTEXTS)


def test_loss_by_position_is_that_of_one_pass(trained, result, forward):
    documents = sources.read_split(trained.config.data, "validation")
    rows = np.array([[256, *document[:40]] for document in documents if len(document) >= 40])
    # Three at a time, the shape that is compiled already.
    log_p = np.concatenate([forward(np.resize(row[:-1], (3, 40)))[:1] for row in rows])
    nll = -np.take_along_axis(log_p, rows[:, 1:, None], axis=2)[..., 0]
    octaves = result["by_position"]["octaves"]
    spans = [(row["first"], row["last"]) for row in octaves]
    assert spans == [(0, 0), (1, 1), (2, 3), (4, 7), (8, 15), (16, 31), (32, 39)]
    for row in octaves:
        here = nll[:, row["first"] : row["last"] + 1]
        assert row["targets"] == here.size
        assert row["loss"] == pytest.approx(here.mean(), rel=1e-5)
        assert row["interval"] == pytest.approx(list(interval(here.mean(axis=1))), rel=1e-4)


def test_result_is_written_and_shown(result, tmp_path):
    evaluate.write(result, tmp_path)
    assert json.loads((tmp_path / "perplexity.json").read_text()) == result
    assert (tmp_path / "perplexity.png").stat().st_size > 5000
    text = evaluate.table(result)
    for row in (*result["by_context"], *result["by_position"]["octaves"]):
        assert f"{row['loss']:.4f}" in text
        assert f"{row['interval'][0]:.4f} .. {row['interval'][1]:.4f}" in text
    assert f"{result['anchors']} anchors, {result['targets']} targets" in text
    assert f"({result['documents_too_short']} are too short, 0 could not be used)" in text


@pytest.mark.parametrize("suffix", [1, 10, 512])
@pytest.mark.parametrize("context", [1, 2, 7, 16, 256, 300, 512, 1023, 1024, 4096])
def test_every_context_has_the_same_targets(context, suffix):
    anchor = perplexity.earliest_anchor((context,), suffix)
    seen, before = [], []
    for (document, start, length), count in perplexity.suffix_windows(3, anchor, context, suffix):
        assert (document, length) == (3, context) and start >= 0
        targets = range(start + length - count + 1, start + length + 1)
        seen += targets
        before += [target - start for target in targets]
    assert sorted(seen) == list(range(anchor - suffix + 1, anchor + 1))
    assert max(before) == context and min(before) >= max(context - context // 2, 1)
    assert min(before) >= context - suffix + 1
    assert perplexity.mean_context(context, suffix) == pytest.approx(np.mean(before))
    # No earlier anchor would do.
    parts = perplexity.suffix_windows(3, anchor - 1, context, suffix)
    assert min(part.window.start for part in parts) < 0


def test_anchors_do_not_overlap_and_fill_the_document():
    choose = perplexity.choose_anchors
    for tokens in (1023, 1024, 1535, 1536, 3000, 5000, 100_000):
        ends = choose(tokens, (256, 1024), anchors=4, suffix=512)
        assert len(ends) == min(4, max(tokens - 1024 + 512, 0) // 512)
        assert all(1024 <= end <= tokens for end in ends)
        assert all(np.diff(ends) >= 512)
        assert ends == choose(tokens, (1024,), anchors=4, suffix=512)
    assert choose(1024, (1024,), anchors=4, suffix=512) == [1024]
    many = np.array([choose(n, (64,), anchors=3, suffix=8) for n in range(5000, 5300)])
    # Uniform over the document: means of the order statistics.
    np.testing.assert_allclose(many.mean(axis=0) / 5150, [0.25, 0.5, 0.75], atol=0.04)


class _Source:
    """A source of other kinds of documents than text."""

    documents = (
        b"abc",
        BadDocument("x", "not UTF-8"),
        np.array([256, 1, 2, 256, 256, 3, 256], np.int32),
        BadDocument("y", "not UTF-8"),
        BadDocument("z", "empty"),
    )

    def __len__(self):
        return len(self.documents)

    def __getitem__(self, index):
        return self.documents[index]

    def fingerprint(self):
        return ""


def test_documents_of_every_kind_are_read():
    ids, bad = perplexity.read_documents(_Source(), ByteTokenizer())
    assert [framed.tolist() for framed in ids] == [
        [256, 97, 98, 99, 256],
        [256, 1, 2, 256],
        [256, 256],
        [256, 3, 256],
    ]
    assert bad == {"not UTF-8": 2, "empty": 1}


def test_default_contexts():
    assert perplexity.default_contexts([100_000], 2048) == tuple(2**k for k in range(8, 16))
    assert perplexity.default_contexts([10, 1000, 1030, 5000, 90_000], 800) == (256, 512, 800, 1024)
    assert perplexity.default_contexts([255], 512) == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"anchors": 0}, "anchors=0: must be >= 1"),
        ({"suffix": 0}, "suffix=0: must be >= 1"),
        ({"contexts": (0, 8)}, r"contexts=\(0, 8\): must be positive"),
        ({"contexts": ()}, r"contexts=\(\): must be positive .* has 90"),
        ({"contexts": None}, r"contexts=\(16,\): no document .* needs 520 tokens; .* has 90"),
        (
            {"contexts": (8, 91)},
            r"no document .* holds the longest, .* needs 586 tokens; .* has 90",
        ),
    ],
)
def test_wrong_options(options, message, trained):
    with pytest.raises(ValueError, match=message):
        perplexity.run(trained, **options)
