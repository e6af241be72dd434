"""The model class of the lm-evaluation-harness, and the suite over local task files."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bmojo_jax import evaluate, model
from bmojo_jax.checkpoint import Trained
from bmojo_jax.data.tokenizers import ByteTokenizer
from bmojo_jax.evaluate import harness
from tests.runs import tiny_run

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed"
)


class PairTokenizer(ByteTokenizer):
    """Two letters together are one word, from the text's start on: 257 + 256 * first + second."""

    vocab_size = 257 + 128 * 128

    def encode(self, document):
        data = document.encode() if isinstance(document, str) else document
        ids, i = [], 0
        while i < len(data):
            pair = data[i : i + 2]
            if len(pair) == 2 and pair.isalpha():
                ids.append(257 + 128 * pair[0] + pair[1])
            else:
                ids.append(pair[0])
            i += 2 if ids[-1] > 256 else 1
        return np.array(ids, np.int32)

    def decode_bytes(self, ids, *, continued=False):
        result = b""
        for i in np.asarray(ids).tolist():
            result += bytes(divmod(i - 257, 128)) if i > 256 else bytes([i]) if i < 256 else b""
        return result

    def fingerprint(self):
        return "pairs"


def trained_with(tokenizer):
    config = tiny_run("unused", model={"vocab_size": tokenizer.vocab_size, "pattern": "mamba"})
    params = model.init_params(config.model, jax.random.key(0))
    return Trained(config, jax.tree.map(lambda x: 3 * x, params), 6, tokenizer)


def request(*arguments):
    from lm_eval.api.instance import Instance

    return Instance("loglikelihood", {}, arguments, 0)


def log_p_by_hand(trained, context, continuation):
    ids = [*context, *continuation]
    padded = np.zeros((1, 64), np.int32)
    padded[0, : len(ids)] = ids
    logits_BLV = _logits(trained.config.model, trained.params, padded)
    log_p_LV = np.asarray(jax.nn.log_softmax(logits_BLV[0], axis=-1), np.float64)
    rows = np.arange(len(context) - 1, len(ids) - 1)
    greedy = bool((log_p_LV[rows].argmax(-1) == continuation).all())
    return log_p_LV[rows, continuation].sum(), greedy


@jax.jit(static_argnums=0)
def _logits(config, params, tokens_BL):
    return model.bind(config, params)(jnp.asarray(tokens_BL))


@needs_harness
def test_loglikelihood_splits_and_starts_texts_as_is_usual():
    from bmojo_jax.evaluate.harness_model import HarnessModel

    tokenizer = PairTokenizer()
    trained = trained_with(tokenizer)
    harness_model = HarnessModel(trained)
    got = harness_model.loglikelihood(
        [
            request("abc d", " ef"),
            request("", "abcd"),
            request("a b  ", "cd"),  # the spaces belong to the continuation
            request("abc", "def"),  # of three words of the whole, two are taken for the context's
        ]
    )
    encode = lambda text: tokenizer.encode(text).tolist()  # noqa: E731
    pairs = [
        ([256, *encode("abc d")], encode(" ef")),
        ([256], encode("abcd")),
        ([256, *encode("a b")], encode("  cd")),
        ([256, *encode("abc")], encode("abcdef")[2:]),
    ]
    assert [len(continuation) for _, continuation in pairs] == [2, 2, 3, 1]
    for (log_p, greedy), pair in zip(got, pairs, strict=True):
        want, want_greedy = log_p_by_hand(trained, *pair)
        assert log_p == pytest.approx(want, rel=1e-4)
        assert greedy == want_greedy
        assert type(log_p) is float and type(greedy) is bool
    context = pairs[0][0]
    padded = np.zeros((1, 64), np.int32)
    padded[0, : len(context)] = context
    best = int(_logits(trained.config.model, trained.params, padded)[0, len(context) - 1].argmax())
    assert harness_model._loglikelihood_tokens([(None, context, [best])])[0][1] is True


@needs_harness
def test_rolling_is_one_pass_over_the_whole_text():
    from bmojo_jax.evaluate.harness_model import HarnessModel

    trained = trained_with(ByteTokenizer())
    texts = ["A text of some length, longer than a row.", "b"]
    got = HarnessModel(trained).loglikelihood_rolling([request(text) for text in texts])
    for log_p, text in zip(got, texts, strict=True):
        assert log_p == pytest.approx(
            log_p_by_hand(trained, [256], list(text.encode()))[0], rel=1e-4
        )


@needs_harness
def test_generate_until(monkeypatch):
    from bmojo_jax.evaluate import scoring
    from bmojo_jax.evaluate.harness_model import HarnessModel

    asked = []

    def greedy(trained, prompts, *, max_tokens, stop):
        asked.append((prompts, max_tokens, stop))
        return [f"{len(prompt)}" for prompt in prompts]

    monkeypatch.setattr(scoring, "greedy", greedy)
    harness_model = HarnessModel(trained_with(ByteTokenizer()))
    got = harness_model.generate_until(
        [
            request("ab", {"until": ["\n", "."], "max_gen_toks": 5, "temperature": 0.7}),
            request("abc", {"until": "."}),
            request("", {"until": ["\n", "."], "max_gen_toks": 5, "do_sample": False}),
        ]
    )
    assert got == ["3", "4", "1"]
    assert asked == [
        ([[256, 97, 98], [256]], 5, ("\n", ".")),
        ([[256, 97, 98, 99]], 256, (".",)),
    ]
    for wrong in ({"do_sample": True}, {"num_beams": 3}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
            harness_model.generate_until([request("a", wrong)])
    assert harness_model.tokenizer_name == "bmojo_jax-bytes"
    assert harness_model.eot_token_id == 256


def test_without_the_harness_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r"lm-eval .*: pip install -r requirements-harness.txt"):
        harness.run(trained_with(ByteTokenizer()), tasks=("piqa_local",))


@needs_harness
def test_wrong_tasks_and_folders_are_refused(tmp_path):
    trained = trained_with(ByteTokenizer())
    with pytest.raises(ValueError, match=r"--tasks=piqa: .*'piqa_local'"):
        harness.run(trained, tasks=("piqa",))
    with pytest.raises(ValueError, match=r"--tasks=: must be some of"):
        harness.run(trained)
    with pytest.raises(ValueError, match=r"--task_data='': .*piqa_local.yaml"):
        harness.run(trained, tasks=("piqa_local",))
    with pytest.raises(ValueError, match=r"--task_data='nowhere'"):
        harness.run(trained, tasks=("piqa_local",), task_data="nowhere")
    with pytest.raises(ValueError, match=r"--task_folder='nowhere'"):
        harness.run(trained, tasks=("piqa_local",), task_folder="nowhere")


def test_table_and_figure(tmp_path):
    row = {"task": "t", "metric": "acc", "filter": "none", "value": 0.25, "stderr": 0.05}
    rows = [
        {**row, "items": 1234, "higher_is_better": True},
        {**row, "metric": "perplexity", "value": 31.5, "stderr": None, "items": 7},
    ]
    result = {"suite": "harness", "title": "step 1", "training_length": 16, "by_metric": rows}
    text = evaluate.table(result)
    assert "0.2500" in text and "0.0500" in text and "1,234" in text and "31.5000" in text
    evaluate.write(result, tmp_path)
    assert (tmp_path / "harness.png").stat().st_size > 3000


TASKS = sorted(path.stem for path in harness.TASKS.glob("*.yaml"))
_ALL_TASKS = """
import json, pathlib, sys
import jax
import tests.evaluate.test_harness as this
from bmojo_jax.data.tokenizers import ByteTokenizer
from bmojo_jax.evaluate import harness

result = harness.run(
    this.trained_with(ByteTokenizer()), tasks=tuple(this.TASKS), task_data=sys.argv[1], items=3
)
assert "torch" not in sys.modules
pathlib.Path(sys.argv[2]).write_text(json.dumps(result))
"""


@needs_harness
@pytest.mark.slow
@pytest.mark.skipif("BMOJO_DATA" not in os.environ, reason="BMOJO_DATA is not set: no items")
def test_every_task_over_its_items(tmp_path):
    """In a process of its own: the harness warns, and imports much."""
    items = pathlib.Path(os.environ["BMOJO_DATA"]) / "lm_eval"
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-c", _ALL_TASKS, str(items), str(tmp_path / "result.json")]
    root = pathlib.Path(__file__).parent.parent.parent
    subprocess.run(command, check=True, env=environment, cwd=root)
    result = json.loads((tmp_path / "result.json").read_text())
    measured = {(row["task"], row["metric"]): row for row in result["by_metric"]}
    assert sorted({task for task, _ in measured}) == TASKS
    for task in ("piqa_local", "arc_easy_local", "winogrande_local", "lambada_local"):
        row = measured[task, "acc"]
        assert row["items"] == 3 and row["value"] * 3 == pytest.approx(round(row["value"] * 3))
        assert row["stderr"] is not None
    assert measured["lambada_generate_local", "exact_match"]["value"] == 0
    assert 6 < measured["lambada_rolling_local", "bits_per_byte"]["value"] < 20
