"""Sweeps of MQAR side by side: what is merged, chosen, counted, and refused."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from matplotlib.figure import Figure

from benchmarks import mqar
from bmojo_jax import cache, sweep
from tests.test_benchmarks import ROOT
from tests.test_sweep import MODEL, tiny_sweep


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two seeds of a sliding window in two runs, and one of another family."""
    folder = tmp_path_factory.mktemp("mqar")
    few = {"task": {"seeds": 1}}
    sweep.train(tiny_sweep(**few), folder / "swa-0")
    sweep.train(tiny_sweep(**few, seed=1), folder / "swa-1")
    sweep.train(tiny_sweep(**few, model={"pattern": "mamba"}), folder / "mamba")
    return folder


def test_seeds_are_one_model(runs):
    swa, mamba = mqar.read([runs / "swa-0", runs / "swa-1", runs / "mamba"])
    assert (swa["label"], mamba["label"]) == ("swa", "mamba")
    assert {(row["rate"], row["seed"]) for row in swa["replicas"]} == {
        (rate, seed) for rate in (0.01, 0.03) for seed in (0, 1)
    }
    assert [row["seeds"] for row in swa["by_rate"]] == [2, 2]
    for name, model, seed in (("swa-1", swa, 1), ("mamba", mamba, 0)):
        result = json.loads((runs / name / "sweep.json").read_text())
        rows = [row for row in model["replicas"] if row["seed"] == seed]
        for i, row in enumerate(rows):
            want = [entry["replicas"][i]["accuracy"] for entry in result["conditions"]]
            assert row["by_pairs"] == dict(zip(("2", "4"), want, strict=True))


def test_the_best_rate_is_of_the_mean_over_seeds(runs):
    (model,) = mqar.read([runs / "swa-0", runs / "swa-1"])
    means = {
        rate: np.mean([row["accuracy"] for row in model["replicas"] if row["rate"] == rate])
        for rate in (0.01, 0.03)
    }
    assert model["best"]["rate"] == max(means, key=lambda rate: means[rate])
    assert {row["rate"] for row in mqar.at_best(model)} == {model["best"]["rate"]}
    line = mqar.table([model])[-1]
    assert f"| {100 * max(means.values()):.1f} |" in line


@pytest.mark.parametrize(
    ("pattern", "kinds"), [("mamba", ["states"]), ("attention", ["window"]), ("bmojo", ["eidetic"])]
)
def test_memory_is_what_the_cache_holds(pattern, kinds):
    config = dataclasses.replace(MODEL, pattern=pattern)
    layers = cache.empty_cache(config, 1, max_length=24).layers
    held = {
        "states": [getattr(layer, "h_BEN", None) for group in layers for layer in group]
        + [getattr(layer, "tail_BTE", None) for group in layers for layer in group],
        "window": [getattr(layer, "window", None) for group in layers for layer in group],
        "eidetic": [
            (layer.attention.eidetic.k_BMGK, layer.attention.eidetic.v_BMGK)
            for group in layers
            for layer in group
            if isinstance(layer, cache.BmojoCache) and layer.attention.eidetic is not None
        ],
    }
    counted = mqar.memory(config, 24)
    for kind in kinds:
        assert counted[kind] == sum(leaf.size for leaf in jax.tree.leaves(held[kind])) > 0
    if pattern != "bmojo":
        assert sum(counted.values()) == sum(counted[kind] for kind in kinds)


def test_memory_of_streams():
    config = dataclasses.replace(
        MODEL, pattern="bmojo", depth=2, num_kv_heads=1, head_width=8, window=5, fading_window=3
    )
    counted = mqar.memory(dataclasses.replace(config, eidetic_tokens=4), 64)
    assert (counted["window"], counted["fading"], counted["eidetic"]) == (160, 96, 128)
    assert mqar.memory(dataclasses.replace(config, pattern="bmojo_f"), 64)["eidetic"] == 0
    assert mqar.memory(dataclasses.replace(config, pattern="swa"), 64)["states"] == 0


def test_settings_that_differ_are_named():
    base = tiny_sweep(model={"pattern": "bmojo"})
    fewer = tiny_sweep(model={"pattern": "bmojo", "eidetic_tokens": 1})
    other = tiny_sweep(model={"pattern": "mamba"}, task={"filler": "zero"})
    every = [base, fewer, other]
    size = base.model.eidetic_tokens
    assert mqar.label(base, every) == f"bmojo, eidetic_tokens={size}, filler=random"
    assert mqar.label(fewer, every) == "bmojo, eidetic_tokens=1, filler=random"
    assert mqar.label(other, every) == "mamba, filler=zero"
    pattern = {"pattern": "bmojo+mlp", "chunk": 3}
    other = tiny_sweep(model={**pattern, "eidetic_selection": "newest"})
    every = [tiny_sweep(model=pattern), other, tiny_sweep(model={"pattern": "mamba"})]
    assert [mqar.label(config, every) for config in every] == [
        "bmojo+mlp, chunk=3, eidetic_selection=innovation",
        "bmojo+mlp, chunk=3, eidetic_selection=newest",
        "mamba",
    ]


def test_models_with_other_numbers_of_pairs_are_drawn(runs):
    """Of the greatest number of pairs there is nothing of some."""
    models = mqar.read([runs / "swa-0", runs / "mamba"])
    for row in models[1]["replicas"]:
        del row["by_pairs"]["4"]
    figure = Figure()
    mqar.draw(models, figure)
    crosses = [line for line in figure.axes[0].get_lines() if line.get_marker() == "x"]
    assert sum(len(line.get_xdata()) for line in crosses) == 1
    # Some distances do not occur in rows so short, in either.
    *_, whole, partly = mqar.table(models)
    assert partly.count("| - ") == whole.count("| - ") + 1


def test_what_is_refused(runs, tmp_path):
    with pytest.raises(ValueError, match="no work directories"):
        mqar.read([])
    with pytest.raises(ValueError, match="its seed twice"):
        mqar.read([runs / "swa-0", runs / "swa-0"])
    for name in ("config.json", "metrics.jsonl"):
        (tmp_path / name).write_text((runs / "swa-0" / name).read_text())
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["step"] < 6]
    (tmp_path / "metrics.jsonl").write_text("\n".join(kept) + "\n")
    with pytest.raises(ValueError, match="tested after its last step, 6"):
        mqar.read([tmp_path])


@pytest.mark.slow
def test_the_command_writes_everything(runs, tmp_path):
    command = [sys.executable, "-m", "benchmarks.mqar", "--out", str(tmp_path), "--commit=abc"]
    folders = [str(runs / name) for name in ("swa-0", "swa-1", "mamba")]
    done = subprocess.run([*command, *folders], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {
        *("mqar.json", "mqar.md", "mqar.svg", "mqar.png")
    }
    record = json.loads((tmp_path / "mqar.json").read_text())
    assert record["commit"] == "abc"
    assert {model["label"] for model in record["models"]} == {"swa", "mamba"}
    assert (tmp_path / "mqar.md").read_text().strip() in done.stdout
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 1
    assert "no work directories" in refused.stderr
