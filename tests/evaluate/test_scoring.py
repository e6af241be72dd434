"""Scores of continuations and greedy ones, against one whole pass per sequence."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from bmojo_jax import model, sharding
from bmojo_jax.checkpoint import Trained
from bmojo_jax.config import MeshConfig
from bmojo_jax.data.tasks.prompts import Prompt
from bmojo_jax.data.tokenizers import ByteTokenizer
from bmojo_jax.evaluate import answers, intervals, scoring
from bmojo_jax.evaluate.scoring import Request, Score
from tests.models import FAMILIES, float64_params, small_config
from tests.runs import tiny_run

VOCAB = 300  # 43 more than the tokenizer has
# All have state; those with attention take long to compile.
FAMILY = [
    "mamba",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("bmojo", "transformer")),
]


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def build(family="bmojo"):
    config = small_config(**FAMILIES[family], vocab_size=VOCAB)
    run = dataclasses.replace(tiny_run("unused"), model=config)
    return Trained(run, float64_params(config), 0, ByteTokenizer())


def whole_logits(trained, ids):
    """Of one sequence; padded, so that one shape is compiled."""
    padded = np.zeros((1, 64), np.int32)
    padded[0, : len(ids)] = ids
    return np.asarray(_logits(trained.config.model, trained.params, padded))[0, : len(ids)]


@jax.jit(static_argnums=0)
def _logits(config, params, tokens_BL):
    return model.bind(config, params)(jnp.asarray(tokens_BL))


def by_hand(trained, request):
    ids = [*request.context, *request.continuation]
    logits_LV = whole_logits(trained, ids)[len(request.context) - 1 : -1]
    log_p_LV = jax.nn.log_softmax(logits_LV.astype(np.float64), axis=-1)
    log_p_L = np.asarray(log_p_LV)[np.arange(len(logits_LV)), request.continuation]
    return log_p_L, logits_LV[:, :257].argmax(-1) == request.continuation


def requests_of(rng, trained):
    """Of many lengths; some continuations are the greedy ones, wholly or at first."""
    made = []
    for context, continuation in ((1, 1), (1, 20), (9, 3), (30, 17), (40, 5), (17, 16)):
        ids = [256, *rng.integers(0, 256, context + continuation - 1).tolist()]
        made.append(Request(ids[:context], ids[context:]))
    for context in (made[2].context, made[4].context):
        ids = list(context)
        for _ in range(4):
            ids.append(int(whole_logits(trained, ids)[-1, :257].argmax()))
        made.append(Request(context, ids[len(context) :]))
    made.append(Request(made[-1].context, [*made[-1].continuation[:-1], 7]))
    return made


def check(trained, requests, scores):
    assert len(scores) == len(requests)
    for request, score in zip(requests, scores, strict=True):
        log_p_L, greedy_L = by_hand(trained, request)
        np.testing.assert_allclose(score.log_p_L, log_p_L, rtol=1e-5)
        np.testing.assert_array_equal(score.greedy_L, greedy_L)
        assert score.log_p == pytest.approx(log_p_L.sum(), rel=1e-5)
        assert score.is_greedy == greedy_L.all()


@pytest.mark.parametrize("family", FAMILY)
def test_log_likelihoods_in_one_pass_and_streamed(rng, family, monkeypatch):
    trained = build(family)
    requests = requests_of(rng, trained)
    # As eval.py loads them: on all devices.
    everywhere = NamedSharding(sharding.make_mesh(MeshConfig()), PartitionSpec())
    spread = dataclasses.replace(trained, params=jax.device_put(trained.params, everywhere))
    whole = scoring.log_likelihoods(spread, requests)
    check(trained, requests, whole)
    assert [score.is_greedy for score in whole] == [False] * 6 + [True, True, False]
    monkeypatch.setattr(scoring, "_LONGEST_WHOLE", 8)
    monkeypatch.setattr(scoring, "_ROWS", 4)  # several batches, the last one not full
    monkeypatch.setattr(scoring, "_whole", None)
    check(trained, requests, scoring.log_likelihoods(trained, requests))


def test_logits_are_held_for_some_columns_at_a_time(rng, monkeypatch):
    trained = build("mamba")
    language_model = model.bind(trained.config.model, trained.params)
    x_BLD = jnp.asarray(rng.normal(size=(2, 11, 16)))
    targets_BL = jnp.asarray(rng.integers(0, 257, (2, 11)), jnp.int32)
    at_once = scoring._scores(language_model, 257, x_BLD, targets_BL)
    monkeypatch.setattr(scoring, "_LOGITS", 2 * VOCAB * 4)
    in_parts = scoring._scores(language_model, 257, x_BLD, targets_BL)
    np.testing.assert_allclose(at_once[0], in_parts[0])
    np.testing.assert_array_equal(at_once[1], in_parts[1])


def greedy_by_hand(trained, prompt, count):
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(whole_logits(trained, ids)[-1, :257].argmax()))
    return ids[len(prompt) :]


def text_of(trained, ids):
    if 256 in ids:
        ids = ids[: ids.index(256)]
    return trained.tokenizer.decode(ids)


@pytest.mark.parametrize("family", FAMILY)
def test_greedy_text(rng, family, monkeypatch):
    trained = build(family)
    monkeypatch.setattr(scoring, "_ROWS", 4)
    prompts = [[256, *rng.integers(0, 256, n).tolist()] for n in (0, 12, 30, 3, 21)]
    rows = [greedy_by_hand(trained, prompt, 8) for prompt in prompts]
    want = [text_of(trained, row) for row in rows]
    assert scoring.greedy(trained, prompts, max_tokens=8) == want
    # Words that the tokenizer lacks would have been chosen otherwise.
    best = [
        whole_logits(trained, [*prompt, *row[:-1]])[-len(row) :].argmax(-1)
        for prompt, row in zip(prompts, rows, strict=True)
    ]
    assert np.max(best) >= 257

    # Within the longest text (of bytes that are no character several make one), and at an end.
    longest = max(range(len(want)), key=lambda row: len(want[row]))
    stop = [want[longest][3:5], want[0][-1:], "never"]
    assert all(map(len, stop))
    cut = [min([text.find(s) for s in stop if s in text], default=None) for text in want]
    assert cut[longest] is not None and cut[longest] <= 3
    want = [text[:end] for text, end in zip(want, cut, strict=True)]
    assert scoring.greedy(trained, prompts, max_tokens=8, stop=stop) == want


def scripted(monkeypatch, trained, script):
    """The model says these tokens, whatever it is asked."""
    steps = iter(script)
    monkeypatch.setattr(scoring, "_best", lambda logits_BV, num_words: np.array(next(steps)))
    monkeypatch.setattr(
        scoring, "_next", lambda c, n, p, cache, token_B, running_B: (np.array(next(steps)), cache)
    )


def test_greedy_text_ends_at_a_boundary_or_a_stop_string(monkeypatch):
    """A stop string may end within a character's or a word's tokens; characters stay whole."""
    trained = build("mamba")
    rows = [
        [*b"ab", 256, *b"cd..."],  # a boundary
        [*"é.\nzz..".encode()][:8],  # a stop string of two characters
        [*b"abcdefgh"],
        [*b"abcdefg", 0xC3],  # ends within a character
    ]
    scripted(monkeypatch, trained, np.array(rows).T)
    prompts = [[256, 65]] * 4
    assert scoring.greedy(trained, prompts, max_tokens=8, stop=[".\n", ""]) == [
        "ab",
        "é",
        "abcdefgh",
        "abcdefg\ufffd",
    ]


def test_wrong_requests_are_refused():
    trained = build("mamba")
    with pytest.raises(ValueError, match="request 1: its context must have at least one token"):
        scoring.log_likelihoods(trained, [Request([1], [2]), Request([], [2])])
    with pytest.raises(ValueError, match=r"token ids in \[1, 300\]: must be in \[0, 300\)"):
        scoring.log_likelihoods(trained, [Request([1], [300])])
    with pytest.raises(ValueError, match="max_tokens=0"):
        scoring.greedy(trained, [[1]], max_tokens=0)
    assert scoring.log_likelihoods(trained, [Request([1], [])])[0].log_p == 0.0


def test_splitting_a_text_after_its_context():
    request = scoring.split(ByteTokenizer(), "ab", "ab c")
    assert request == Request([256, 97, 98], [32, 99])


def test_answers_and_their_summary(monkeypatch):
    """With a model that knows the first prompt by heart, and half of the second."""
    prompts = [
        Prompt("Q", " A", ("abc", "DEF"), (0.1, 0.2), "."),
        Prompt("Q", " A", ("123", "456"), (0.1, 0.2), "."),
    ]
    asked = {}

    def log_likelihoods(trained, requests, *, description):
        asked["requests"] = requests
        size = len(requests[0].continuation)
        half = np.arange(size) < 4
        return [
            Score(np.full(size, -0.5), np.ones(size, bool)),
            Score(np.where(half, -0.5, -2.5), half),
        ]

    def greedy(trained, prompts, *, max_tokens, description):
        asked["max_tokens"] = max_tokens
        return [" Abc, def.", " 123, 999."]

    monkeypatch.setattr(scoring, "log_likelihoods", log_likelihoods)
    monkeypatch.setattr(scoring, "greedy", greedy)
    found = answers.answers(build("mamba"), prompts, description="test")
    first = asked["requests"][0]
    assert first.context == [256, *b"Q A"] and bytes(first.continuation) == b" abc, DEF"
    assert asked["max_tokens"] == 10
    result = answers.summary(found)
    assert (result["items"], result["targets"]) == (2, 18)
    assert (result["generated"], result["exact"]) == (0.75, 0.5)
    assert result["accuracy"] == pytest.approx(13 / 18)
    assert result["nats"] == pytest.approx((13 * 0.5 + 5 * 2.5) / 18)
    low, high = result["exact_interval"]
    assert low == pytest.approx(0.0945, abs=1e-3) and high == pytest.approx(0.9055, abs=1e-3)
    low, high = intervals.share_interval(0.0, 20)
    assert low == 0 and high == pytest.approx(0.1611, abs=1e-3)
    assert answers.default_lengths(1024) == (512, 1024, 2048, 4096, 8192)
