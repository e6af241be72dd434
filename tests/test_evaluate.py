import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bmojo_jax import checkpoint, evaluate, model, sharding, trainer
from bmojo_jax.checkpoint import Trained
from bmojo_jax.config import MeshConfig
from bmojo_jax.data import pipeline, sources
from bmojo_jax.evaluate import intervals, memory, validation
from tests.runs import records, tiny_run, write_documents


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained model, its work directory and the held-out documents."""
    folder, workdir = (tmp_path_factory.mktemp(name) for name in ("documents", "run"))
    write_documents(folder)
    config = tiny_run(
        folder,
        model={"pattern": "bmojo,mamba", "depth": 4},
        optim={"learning_rate": 1e-2},
        eval_every=6,
    )
    trainer.train(config, workdir)
    mesh = sharding.make_mesh(MeshConfig())
    return (
        workdir,
        checkpoint.load(workdir, mesh=mesh),
        sources.read_split(config.data, "validation"),
    )


def _nll_by_hand(trained, documents, context):
    """For every target: its position in its piece, -log p and its document, piece by piece."""
    positions, nll, owners = [], [], []
    length = trained.config.data.sequence_length
    forward = jax.jit(
        lambda tokens: jax.nn.log_softmax(model.bind(trained.config.model, trained.params)(tokens))
    )
    column = 0
    for owner, document in enumerate(documents):
        ids = np.array([256, *document, 256])
        done = 0
        while done < len(ids) - 1:
            size = min(len(ids) - 1 - done, context - column % context)
            row = np.zeros(max(length, context), np.int32)  # one shape: causal, so padding is free
            row[:size] = ids[done : done + size]
            log_p = np.asarray(forward(jnp.asarray(row[None])))[0]
            targets = ids[done + 1 : done + 1 + size]
            nll.extend(-log_p[np.arange(size), targets].astype(np.float64))
            positions.extend(range(size))
            owners.extend([owner] * size)
            done += size
            column += size
    return np.array(positions), np.array(nll), np.array(owners)


def test_validation_suite(run, tmp_path):
    workdir, trained, documents = run
    result = validation.run(trained, contexts=(32, 16, 5))
    assert [row["context"] for row in result["by_context"]] == [5, 16, 32]
    assert (result["step"], result["training_length"]) == (6, 16)
    num_bytes = sum(map(len, documents))
    for row in result["by_context"]:
        assert row["targets"] == num_bytes + len(documents)
        assert row["bytes"] == num_bytes
        bits = row["loss"] * row["targets"] / math.log(2) / num_bytes
        assert row["bits_per_byte"] == pytest.approx(bits)
    assert len({row["loss"] for row in result["by_context"]}) == 3

    # What training reported on the same split.
    reported = records(workdir, "validation")[-1]
    assert reported["step"] == 6
    for name in ("loss", "bits_per_byte", "targets"):
        assert result["by_context"][1][name] == pytest.approx(reported[name], rel=1e-6)

    # What a model that sees one piece at a time says.
    for context, row in ((5, result["by_context"][0]), (16, result["by_context"][1])):
        positions, nll, owners = _nll_by_hand(trained, documents, context)
        assert row["loss"] == pytest.approx(nll.mean(), rel=1e-5)
        assert row["documents"] == len(documents)
        spread = intervals.interval(np.bincount(owners, nll), np.bincount(owners))
        assert row["interval"] == pytest.approx(list(spread), rel=1e-5)
    assert result["by_position"]["context"] == 16
    octaves = result["by_position"]["octaves"]
    assert [(row["first"], row["last"]) for row in octaves] == [
        *((0, 0), (1, 1), (2, 3), (4, 7), (8, 15)),
    ]
    for row in octaves:
        here = (positions >= row["first"]) & (positions <= row["last"])
        assert row["targets"] == here.sum()
        assert row["loss"] == pytest.approx(nll[here].mean(), rel=1e-5)

    evaluate.write(result, tmp_path)
    assert json.loads((tmp_path / "validation.json").read_text()) == result
    assert (tmp_path / "validation.png").stat().st_size > 5000
    text = evaluate.table(result)
    for row in (*result["by_context"], *octaves):
        assert f"{row['loss']:.4f}" in text and f"{row['targets']:,.0f}" in text


def test_default_contexts():
    config = tiny_run("unused")
    at = lambda length: dataclasses.replace(  # noqa: E731
        config, data=dataclasses.replace(config.data, sequence_length=length)
    )
    assert validation.default_contexts(at(256)) == (64, 128, 256, 512, 1024)
    assert validation.default_contexts(at(200)) == (64, 128, 200, 256, 512)
    assert validation.default_contexts(at(8)) == (8,)


@pytest.mark.parametrize("contexts", [(), (0, 8)])
def test_contexts_must_be_positive(contexts, run):
    with pytest.raises(ValueError, match=r"contexts=.* must be positive"):
        validation.run(run[1], contexts=contexts)


def test_batches_limit_the_validation(run):
    _, trained, _ = run
    (row,) = validation.run(trained, contexts=(16,), batches=1)["by_context"]
    assert 0 < row["targets"] <= 8 * 16


def test_memory_suite(run, tmp_path):
    _, trained, _ = run
    result = memory.run(trained, batches=2)
    layers = result["by_layer"]
    assert [(row["layer"], row["mixer"]) for row in layers] == [
        *((0, "bmojo"), (1, "mamba"), (2, "bmojo"), (3, "mamba")),
    ]
    assert set(layers[1]) == {"layer", "mixer"}
    config = trained.config.model
    for row in (layers[0], layers[2]):
        masses = [row[f"mass_{stream}"] for stream in ("in_context", "fading", "eidetic")]
        assert sum(masses) == pytest.approx(1) and min(masses) > 0
        assert row["memory_innovation"] > row["innovation"] > 0
        assert config.window <= row["memory_age"] < 16
        assert 0 < row["memory_filled"] < 1
    assert layers[0]["memory_age"] != layers[2]["memory_age"]

    evaluate.write(result, tmp_path)
    assert json.loads((tmp_path / "memory.json").read_text()) == result
    assert (tmp_path / "memory.png").stat().st_size > 5000
    lines = evaluate.table(result).splitlines()
    (line,) = (line for line in lines if line.split()[:2] == ["2", "bmojo"])
    assert line.split()[2:] == [
        *(f"{layers[2][f'mass_{stream}']:.4f}" for stream in ("in_context", "fading", "eidetic")),
        *(f"{layers[2][name]:.4f}" for name in ("innovation", "memory_innovation")),
        *(f"{layers[2]['memory_age']:.1f}", f"{layers[2]['memory_filled']:.4f}"),
    ]
    (line,) = (line for line in lines if line.split()[:2] == ["1", "mamba"])
    assert line.split()[2:] == ["-"] * 7


def test_memory_statistics_are_means_over_batches(run):
    """Against the statistics of each batch, added up by hand."""
    _, trained, _ = run
    config = trained.config
    data = dataclasses.replace(config.data, batch_size=8)

    @jax.jit
    def statistics(params, batch):
        bound = model.bind(config.model, params)
        return bound.hidden_states(batch["inputs"], batch["positions"], statistics=True)[1]

    sums = dict.fromkeys(("mass_eidetic", "memory_age"), 0.0)
    weights = dict.fromkeys(sums, 0.0)
    parts = {name: [] for name in sums}
    source = sources.open_source(data, "validation")
    for batch in pipeline.validation_batches(
        source,
        data,
        config.model.chunk,
        trained.tokenizer,
        shard=0,
        shards=1,
        limit=0,
    ):
        measured = statistics(trained.params, batch)["0"]
        share = batch["weights"].mean()
        for name in sums:
            weight = share * (measured["memory_filled"][1] if name == "memory_age" else 1)
            sums[name] += float(weight * measured[name][1])
            weights[name] += float(weight)
            parts[name].append((float(weight * measured[name][1]), float(weight)))
    row = memory.run(trained, batches=0)["by_layer"][2]
    for name in sums:
        assert row[name] == pytest.approx(sums[name] / weights[name], rel=1e-4)
        spread = intervals.interval(*np.array(parts[name]).T)
        assert row["intervals"][name] == pytest.approx(list(spread), rel=1e-4)


def test_loading_needs_a_run_and_leaves_it_alone(run, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none/checkpoints does not exist: no run"):
        checkpoint.load(tmp_path / "none")
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*empty/checkpoints"):
        checkpoint.load(tmp_path / "empty")
    workdir, trained, _ = run
    with pytest.raises(FileNotFoundError, match=r"step=4 in .*, which holds \[3, 6\]"):
        checkpoint.load(workdir, step=4)
    # A run that is saving at this moment.
    saving = workdir / "checkpoints" / "9.orbax-checkpoint-tmp"
    saving.mkdir()
    names = sorted(path.name for path in (workdir / "checkpoints").iterdir())
    single = checkpoint.load(workdir, step=6)
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == names
    saving.rmdir()
    assert isinstance(single, Trained) and single.step == 6
    jax.tree.map(np.testing.assert_array_equal, single.params, trained.params)
    assert all(leaf.devices() == {jax.devices()[0]} for leaf in jax.tree.leaves(single.params))
