"""Many replicas trained at once: each as if alone, resumable bit for bit, and what they learn."""

import dataclasses
import json
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eval as eval_program
from bmojo_jax import checkpoint, checks, evaluate, losses, model, optim, sweep
from bmojo_jax.checkpoint import Checkpoints
from bmojo_jax.config import DataConfig, OptimConfig, TaskConfig, TrainConfig
from bmojo_jax.data import tasks
from bmojo_jax.evaluate import mad, mqar, recall
from bmojo_jax.settings import to_dict
from tests.runs import TINY, changed

ROOT = pathlib.Path(__file__).parents[1]
MODEL = dataclasses.replace(TINY, vocab_size=32, pattern="swa")


def tiny_sweep(**changes):
    """A sweep with `changed` settings."""
    config = TrainConfig(
        model=MODEL,
        optim=OptimConfig(warmup_steps=2, weight_decay=0.3),
        data=DataConfig(sequence_length=16, batch_size=4),
        task=TaskConfig(
            name="mqar", vocab_size=24, pairs=(2, 4), test_examples=16, rates=(0.01, 0.03), seeds=2
        ),
        steps=6,
        log_every=2,
        eval_every=4,
        checkpoint_every=2,
    )
    return changed(config, **changes)


def records(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("tokens_per_second", None)
    return lines


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("sweep") / "run"
    sweep.train(tiny_sweep(), workdir)
    return workdir


def test_a_sweep_leaves_what_it_says(finished):
    assert {path.name for path in finished.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "checkpoints",
        "accuracy.png",
        "sweep.json",
    }
    got = records(finished)
    assert [(r["step"], r["split"]) for r in got] == [
        (2, "train"),
        (4, "train"),
        (4, "test"),
        (6, "train"),
        (6, "test"),
    ]
    assert all(len(r["loss"]) == len(r["accuracy"]) == 4 for r in got)
    assert all(len(set(r["loss"])) == 4 for r in got)  # every replica is another
    result = json.loads((finished / "sweep.json").read_text())
    assert [c["name"] for c in result["conditions"]] == [
        "2 pairs in 16 tokens",
        "4 pairs in 16 tokens",
    ]
    replicas = [(row["rate"], row["seed"]) for row in result["conditions"][0]["replicas"]]
    assert replicas == [(0.01, 0), (0.01, 1), (0.03, 0), (0.03, 1)]
    assert result["skipped"] == [0, 0, 0, 0] and result["step"] == 6


def alone(config, rate, seed, steps):
    """A replica trained the plain way: one model, its own optimizer, the rate in the schedule."""
    one = dataclasses.replace(config.optim, learning_rate=rate)
    params = model.init_params(config.model, jax.random.key(config.seed + seed))
    optimizer = optim.make_optimizer(one, config.steps, params)
    opt_state = optimizer.init(params)
    length, batch = config.data.sequence_length, config.data.batch_size

    @jax.jit
    def update(params, opt_state, step):
        index_B = tasks.train_indices(config.task, batch, seed, step)
        rows = tasks.examples(config.task, length, "train", seed, index_B)

        def loss(params):
            x_BLD = model.hidden_states(config.model, params, rows.tokens)
            # Every position, the ones that are not asked with weight 0.
            targets_BL = jnp.zeros((batch, length), jnp.int32)
            weights_BL = jnp.zeros((batch, length))
            row_B1 = jnp.arange(batch)[:, None]
            asked_BA = jnp.where(rows.trained, rows.asked, length)
            targets_BL = targets_BL.at[row_B1, asked_BA].set(rows.labels, mode="drop")
            weights_BL = weights_BL.at[row_B1, asked_BA].set(1.0, mode="drop")
            w_VD = model.output_weights(config.model, params)
            total = losses.cross_entropy(
                x_BLD, w_VD, targets_BL, weights_BL, vocab_chunk=8, z_loss=0.0
            )
            return total.nll / total.weight

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    values = []
    for step in range(steps):
        params, opt_state, value = update(params, opt_state, step)
        values.append(float(value))
    return params, values


@pytest.mark.parametrize("index", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_replica_is_what_it_would_be_alone(finished, index):
    config = tiny_sweep()
    rate, seed = recall.replicas(config)[index]
    params, values = alone(config, rate, seed, 6)
    got = recall.load(finished)
    for name, mine, theirs in zip(
        *(jax.tree.leaves(tree) for tree in (names(params), params, got.params)), strict=True
    ):
        np.testing.assert_allclose(theirs[index], mine, rtol=2e-4, atol=2e-5, err_msg=name)
    train = [record["loss"][index] for record in records(finished) if record["split"] == "train"]
    np.testing.assert_allclose(train, np.reshape(values, (3, 2)).mean(axis=1), rtol=1e-4)


def names(tree):
    return jax.tree_util.tree_map_with_path(lambda path, _: jax.tree_util.keystr(path), tree)


@pytest.mark.slow
def test_some_at_a_time_and_on_one_device_is_the_same(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(recall, "replica_mesh", lambda _: single_mesh())
    sweep.train(tiny_sweep(task={"replicas_at_once": 3}), tmp_path / "run")
    assert recall.replica_mesh(4).size == 1
    for mine, theirs in zip(records(tmp_path / "run"), records(finished), strict=True):
        np.testing.assert_allclose(mine["loss"], theirs["loss"], rtol=1e-4)


def single_mesh():
    kind = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((1,), (recall.REPLICA,), axis_types=kind, devices=jax.devices()[:1])


def test_devices_share_replicas_evenly():
    sizes = {count: recall.replica_mesh(count).size for count in (1, 4, 6, 7, 9, 16)}
    assert sizes == {1: 1, 4: 4, 6: 6, 7: 7, 9: 3, 16: 8}


@pytest.mark.slow
def test_a_replica_that_diverges_does_not_harm_the_others(finished, tmp_path, annotations_off):
    """The last two replicas lose their footing at the first step."""
    config = tiny_sweep(task={"rates": (0.01, 1e30)})
    sweep.train(config, tmp_path / "run")
    result = json.loads((tmp_path / "run" / "sweep.json").read_text())
    assert result["skipped"][:2] == [0, 0] and min(result["skipped"][2:]) > 0
    for mine, theirs in zip(records(tmp_path / "run"), records(finished), strict=True):
        assert mine["loss"][:2] == theirs["loss"][:2]
    state = recall.load(tmp_path / "run")
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


# A process that is killed at the given step, in the middle of its loop.
KILLED = """
import json, os, signal, sys
from bmojo_jax import sweep
from bmojo_jax.config import TrainConfig
from bmojo_jax.settings import from_dict
advance = sweep.Program.advance
def deadly(self, state, steps):
    if int(state.step) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    return advance(self, state, steps)
sweep.Program.advance = deadly
sweep.train(from_dict(TrainConfig, json.loads(sys.argv[1])), sys.argv[2])
"""


@pytest.mark.slow
def test_a_killed_sweep_goes_on_bit_for_bit(finished, tmp_path):
    workdir = tmp_path / "run"
    arguments = [json.dumps(to_dict(tiny_sweep())), str(workdir), "4"]
    process = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert not (workdir / "sweep.json").exists()
    sweep.train(tiny_sweep(), workdir)
    ends = [recall.load(path).params for path in (workdir, finished)]
    jax.tree.map(np.testing.assert_array_equal, *ends)
    assert records(workdir) == records(finished)
    assert (workdir / "sweep.json").read_text() == (finished / "sweep.json").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": {"rates": (0.01,)}}, r"task\.rates=\(0\.01,\): must be \(0\.01, 0\.03\), with"),
        ({"task": {"pairs": (2,)}}, r"task\.pairs=\(2,\): must be \(2, 4\)"),
        ({"model": {"width": 8}}, r"model\.width=8: must be 16"),
        ({"steps": 4}, r"steps=4: must be at least 6"),
    ],
)
def test_what_cannot_be_continued_is_named(finished, changes, message):
    with pytest.raises(checks.SettingsError, match=message):
        sweep.train(tiny_sweep(**changes), finished)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": {"pairs": (5,)}}, r"task\.pairs=\(5,\): must be at most a quarter"),
        ({"model": {"vocab_size": 23}}, r"model\.vocab_size=23: must be at least task\.vocab"),
        ({"model": {"compute_dtype": "float64"}}, r"model\.compute_dtype='float64'"),
    ],
)
def test_a_wrong_setting_is_named_before_anything_is_written(tmp_path, changes, message):
    with pytest.raises(checks.SettingsError, match=message):
        sweep.train(tiny_sweep(**changes), tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_accumulation_is_refused():
    with pytest.raises(ValueError, match=r"optim\.accumulate=2: must be 1 with task\.name='mqar'"):
        tiny_sweep(optim={"accumulate": 2})


# Scores.


def answers_of(rows, right_PBA):
    return recall.Answers(right_PBA, np.where(right_PBA, 0.5, 1.5))


def test_scores_of_known_answers():
    config = tiny_sweep(task={"rates": (0.01,), "seeds": 2})
    rows = jax.tree.map(np.asarray, recall.test_examples(config))
    # The first replica knows rows with two pairs only, the second one answer of every row.
    right = np.zeros((2, 16, 4), bool)
    right[0, ::2, :2] = True
    right[1, :, 0] = True
    first, second = recall.score(config, rows, answers_of(rows, right))
    assert first["accuracy"] == 0.5  # mean of rows, not of answers: those would be 1 / 3
    assert second["accuracy"] == pytest.approx((1 / 2 + 1 / 4) / 2)
    assert first["loss"] == pytest.approx(1.5 - 1 / 3)
    labels, known = rows.labels[rows.scored], right[0][rows.scored]
    macro = np.mean([known[labels == label].mean() for label in set(labels)])
    assert first["macro"] == pytest.approx(macro)
    near = rows.distance[rows.scored] <= 31
    assert near.all() and first["by_distance"] == [pytest.approx(1 / 3), None, None, None]


def test_distances_fall_into_buckets():
    inside = recall.in_buckets(np.array([1, 31, 32, 62, 63, 127, 128, 253]))
    assert [list(np.nonzero(x)[0]) for x in inside] == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_best_rate_is_the_mean_over_seeds():
    scores = [
        {"rate": rate, "accuracy": accuracy}
        for rate, accuracy in ((1e-3, 0.9), (1e-3, 0.1), (1e-2, 0.6), (1e-2, 0.7), (1e-2, 0.8))
    ]
    best = recall.best_rate(scores, "accuracy")
    assert best == {
        "rate": 1e-2,
        "seeds": 3,
        "mean": pytest.approx(0.7),
        "median": 0.7,
        "lowest": 0.6,
        "highest": 0.8,
    }


def test_answers_are_those_of_the_whole_model(finished):
    """Logits at the asked positions alone, against those of every position."""
    got = recall.load(finished)
    rows = recall.test_examples(got.config)
    answers = recall.Tester(got.config, recall.replica_mesh(4))(got.params, rows)
    for i in range(4):
        params = jax.tree.map(lambda x, i=i: jnp.asarray(np.asarray(x)[i]), got.params)
        logits_BLV = model.bind(MODEL, params)(rows.tokens)
        at_BAV = jnp.take_along_axis(logits_BLV, rows.asked[:, :, None], axis=1)
        nll_BA = -jnp.take_along_axis(jax.nn.log_softmax(at_BAV), rows.labels[:, :, None], axis=2)
        np.testing.assert_allclose(answers.nll_PBA[i], nll_BA[:, :, 0], rtol=1e-5, atol=1e-5)
        right_BA = jnp.argmax(at_BAV, axis=-1) == rows.labels
        np.testing.assert_array_equal(answers.correct_PBA[i], right_BA)


def test_suite_on_other_rows(finished, tmp_path):
    assert evaluate.SUITES["mqar"] is mqar and "pairs" in eval_program._OPTIONS
    got = mqar.load(finished)
    result = mqar.run(got, pairs=(2, 3, 6), lengths=(16, 24), items=8)
    kinds = [(c["length"], c["pairs"], c["items"]) for c in result["conditions"]]
    assert kinds == [(16, 2, 8), (16, 3, 8), (24, 2, 8), (24, 3, 8), (24, 6, 8)]
    assert all(len(row["interval"]) == 2 for row in result["conditions"][0]["replicas"])
    evaluate.write(result, tmp_path)
    assert (tmp_path / "mqar.png").exists() and "mean of 2 seeds" in evaluate.table(result)
    with pytest.raises(ValueError, match=r"pairs=\(9,\): must be at most a quarter of"):
        mqar.run(got, pairs=(9,))
    with pytest.raises(ValueError, match="must be a task of MAD for this suite"):
        mad.run(got)


def test_suites_of_language_models_refuse_a_sweep(finished):
    with pytest.raises(ValueError, match="must be of a language model; it holds a sweep"):
        checkpoint.load(finished)


def test_suite_refuses_a_run_on_documents(tmp_path):
    with Checkpoints(tmp_path / "checkpoints", keep_last=1, keep_best=0) as checkpoints:
        checkpoints.save(1, {"params": {"x": jnp.ones(2)}}, {}, to_dict(TrainConfig()))
    with pytest.raises(ValueError, match="must be the work directory of a run on a task"):
        mqar.load(tmp_path)


@pytest.mark.slow
def test_a_task_of_mad(tmp_path):
    config = tiny_sweep(
        model={"vocab_size": 16},
        task={"name": "in_context_recall", "vocab_size": 16, "train_examples": 8},
    )
    sweep.train(config, tmp_path)
    result = json.loads((tmp_path / "sweep.json").read_text())
    assert (result["suite"], result["task"]) == ("mad", "in_context_recall")
    entry = result["conditions"][0]
    rows = recall.test_examples(config)
    assert entry["answers"] == int(rows.scored.sum()) and "by_distance" not in entry["replicas"][0]
    assert entry["best"]["mean"] == max(
        np.mean([row["macro"] for row in entry["replicas"][i : i + 2]]) for i in (0, 2)
    )


# Learning, with the commands of configs/mqar.py.


def small_run(workdir, family, *overrides):
    """The small variant as a user runs it: on one device, compiled in earnest."""
    environment = {"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    since = time.monotonic()
    process = subprocess.run(
        [
            *(sys.executable, str(ROOT / "train.py"), "--workdir", str(workdir)),
            *("--config", f"{ROOT}/configs/mqar.py:{family},small", *overrides),
        ],
        env=environment,
        cwd=workdir.parent,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    result = json.loads((workdir / "sweep.json").read_text())
    best = result["conditions"][0]["best"]
    assert re.search(rf"best rate .*accuracy {best['mean']:.2%}", process.stdout)
    return best["mean"], time.monotonic() - since


@pytest.mark.slow
def test_attention_solves_what_a_short_window_cannot(tmp_path):
    attention, seconds = small_run(tmp_path / "attention", "attention")
    window, more = small_run(tmp_path / "swa", "swa")
    assert attention > 0.95
    assert window < 0.3
    print(f"{seconds + more:.0f} s")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mamba", "hybrid", "bmojo_f", "bmojo"])
def test_every_family_takes_steps(tmp_path, family):
    accuracy, _ = small_run(
        tmp_path / family, family, "--config.steps=100", "--config.task.rates=(0.01,)"
    )
    train = [r for r in records(tmp_path / family) if r["split"] == "train"]
    assert train[-1]["loss"][0] < 0.9 * np.log(32) and 0 <= accuracy <= 1
