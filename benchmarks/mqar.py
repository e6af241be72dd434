"""Sets sweeps of multi-query associative recall side by side: accuracy by memory, the paper's axes.

    python train.py --config configs/mqar.py:bmojo --workdir runs/mqar-bmojo
    python -m benchmarks.mqar --out results/mqar --commit HASH --hardware 'one H100' runs/mqar-*

Reads what `train.py` has left in each work directory: `config.json`, the last test of
`metrics.jsonl` (rows of all numbers of pairs together) and, once a run has finished, `sweep.json`
(each number of pairs by itself). Runs whose model, task, optimizer, data and steps differ in
nothing but rates and seeds are one model.

"Memory" is how many numbers a row leaves in all layers for what follows it: SSM states with the
inputs of the convolution, keys and values in the window, of the fading stream, and remembered.
A model's best rate is the one with the highest mean over its seeds, of all rows together.
"""

import json
import pathlib
import sys
from typing import Any

from absl import app, flags
from matplotlib.figure import Figure

from bmojo_jax import console
from bmojo_jax.config import ModelConfig, TrainConfig
from bmojo_jax.evaluate import recall
from bmojo_jax.settings import from_dict, to_dict

# Settings that mean nothing where nothing is remembered.
_OF_MEMORIES = ("chunk", "innovation_of")
_OF_MEMORIES += tuple(name for name in to_dict(ModelConfig()) if name.startswith("eidetic_"))


def memory(config: ModelConfig, length: int) -> dict[str, int]:
    """Numbers that a row of `length` tokens leaves, of every kind, in all layers together.

    At a chunk's border. Between two, B'MOJO holds besides the up to C - 1 tokens that wait to be
    candidates, and at any time their innovations and the 4 states that predict the next one.
    """
    token = 2 * config.num_kv_heads * config.head_width
    state = config.ssm_inner * (config.ssm_state + config.conv_taps - 1)
    total = {"states": 0, "window": 0, "fading": 0, "eidetic": 0}
    for block in config.blocks:
        if block.mixer in ("mamba", "bmojo_f", "bmojo"):
            total["states"] += state
        if block.mixer == "attention":
            total["window"] += length * token
        elif block.mixer != "mamba":
            total["window"] += min(config.window, length) * token
        if block.mixer in ("bmojo_f", "bmojo"):
            total["fading"] += min(config.fading_span, length) * token
        if block.mixer == "bmojo":
            total["eidetic"] += config.eidetic_tokens * token
    return {kind: number * config.num_groups for kind, number in total.items()}


def label(config: TrainConfig, others: list[TrainConfig]) -> str:
    """The pattern, and whatever of the model and the task not all of `others` share."""
    parts = [config.model.pattern]
    for section in ("model", "task", "optim", "data"):
        mine = to_dict(getattr(config, section))
        for name, value in mine.items():
            if name in ("pattern", "rates", "seeds", "seed"):
                continue
            if name in _OF_MEMORIES and not config.model.remembers:
                continue
            if any(to_dict(getattr(other, section))[name] != value for other in others):
                parts.append(f"{name}={value}")
    if any(other.steps != config.steps for other in others):
        parts.append(f"steps={config.steps}")
    return ", ".join(parts)


def read(folders: list[pathlib.Path]) -> list[dict[str, Any]]:
    """A model for each label, with its replicas.

    Raises:
      ValueError: no folder, or one that is no finished sweep of MQAR; a replica twice.
      FileNotFoundError: a folder has not what a sweep leaves.
    """
    if not folders:
        raise ValueError("no work directories: must be given, e.g. runs/mqar-*")
    configs = []
    for folder in folders:
        configs.append(from_dict(TrainConfig, json.loads((folder / "config.json").read_text())))
        if configs[-1].task.name != "mqar":
            raise ValueError(f"{folder}: task.name={configs[-1].task.name!r} must be 'mqar'")
    models: dict[str, dict[str, Any]] = {}
    for folder, config in zip(folders, configs, strict=True):
        name = label(config, configs)
        model = models.setdefault(
            name,
            {
                "label": name,
                "config": to_dict(config),
                "memory": memory(config.model, config.data.sequence_length),
                "replicas": [],
            },
        )
        known = {(row["rate"], row["seed"]) for row in model["replicas"]}
        for row in _replicas(folder, config):
            if (row["rate"], row["seed"]) in known:
                raise ValueError(f"{folder}: {name} has rate {row['rate']} and its seed twice")
            model["replicas"].append(row)
    for model in models.values():
        model["by_rate"] = recall.by_rate(model["replicas"], "accuracy")
        model["best"] = recall.best_rate(model["replicas"], "accuracy")
    return list(models.values())


def _replicas(folder: pathlib.Path, config: TrainConfig) -> list[dict[str, Any]]:
    """Scores of every replica after the last step."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    tests = [record for record in map(json.loads, lines) if record["split"] == "test"]
    if not tests or tests[-1]["step"] != config.steps:
        raise ValueError(f"{folder}: must have been tested after its last step, {config.steps}")
    last = tests[-1]
    rows: list[dict[str, Any]] = [
        {
            "rate": rate,
            "seed": config.seed + seed,
            "accuracy": last["accuracy"][i],
            "by_distance": last["by_distance"][i],
        }
        for i, (rate, seed) in enumerate(recall.replicas(config))
    ]
    if (folder / "sweep.json").exists():
        result = json.loads((folder / "sweep.json").read_text())
        for i, row in enumerate(rows):
            row["by_pairs"] = {
                str(entry["pairs"]): entry["replicas"][i]["accuracy"]
                for entry in result["conditions"]
            }
    return rows


def at_best(model: dict[str, Any]) -> list[dict[str, Any]]:
    """The replicas of its best rate, one for each seed."""
    return [row for row in model["replicas"] if row["rate"] == model["best"]["rate"]]


def _pairs(models: list[dict[str, Any]]) -> list[str]:
    found = {k for model in models for row in model["replicas"] for k in row.get("by_pairs", ())}
    return sorted(found, key=int)


def _mean(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{100 * sum(known) / len(known):.1f}" if known else "-"


def table(models: list[dict[str, Any]]) -> list[str]:
    """Markdown: means over the seeds of the best rate, in %; the spread over seeds of all rows."""
    pairs, buckets = _pairs(models), recall.bucket_names()
    heads = ["model", "memory", "best rate", "seeds", "all rows", "lowest to highest"]
    heads += [f"k = {k}" for k in pairs] + [f"{name} tokens ago" for name in buckets]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for model in models:
        rows = at_best(model)
        shares = [row["accuracy"] for row in rows]
        cells = [
            model["label"],
            f"{sum(model['memory'].values()):,}",
            f"{model['best']['rate']:.2g}",
            str(len(rows)),
            _mean(shares),
            f"{100 * min(shares):.1f} to {100 * max(shares):.1f}",
        ]
        cells += [_mean([row.get("by_pairs", {}).get(k) for row in rows]) for k in pairs]
        cells += [_mean([row["by_distance"][i] for row in rows]) for i in range(len(buckets))]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def draw(models: list[dict[str, Any]], figure: Figure) -> None:
    """By memory and by distance at the best rate, by rate; every seed a point."""
    by_memory, by_rate, by_distance = figure.subplots(1, 3, sharey=True)
    pairs = _pairs(models)
    for i, model in enumerate(models):
        color, rows = f"C{i}", at_best(model)
        size = sum(model["memory"].values())
        last = [row.get("by_pairs", {}).get(pairs[-1]) for row in rows] if pairs else []
        most = [share for share in last if share is not None]
        every = [row["accuracy"] for row in rows]
        by_memory.plot([size] * len(every), every, "o", color=color, label=model["label"])
        by_memory.plot([size] * len(most), most, "x", color=color)
        rates = [row["rate"] for row in model["by_rate"]]
        by_rate.plot(rates, [row["mean"] for row in model["by_rate"]], color=color)
        points = [(row["rate"], row["accuracy"]) for row in model["replicas"]]
        by_rate.plot(*zip(*points, strict=True), "o", markersize=4, color=color)
        for row in rows:
            known = [(j, x) for j, x in enumerate(row["by_distance"]) if x is not None]
            by_distance.plot(*zip(*known, strict=True), "o-", markersize=4, color=color)
    by_memory.plot([], [], "o", color="grey", label="all rows")
    if pairs:
        by_memory.plot([], [], "x", color="grey", label=f"k = {pairs[-1]}")
    by_memory.set_xscale("log", base=2)
    by_memory.set_xlabel("numbers kept of a row (states, keys, values)")
    by_memory.set_ylabel("share of right answers")
    by_memory.set_title("by memory, best rate, every seed")
    by_memory.legend(fontsize="small")
    by_rate.set_xscale("log")
    by_rate.set_xlabel("learning rate")
    by_rate.set_title("all rows, by rate; lines: mean of seeds")
    by_distance.set_xticks(range(len(recall.BUCKETS)), recall.bucket_names())
    by_distance.set_xlabel("tokens since the answer stood there")
    by_distance.set_title("by distance, best rate, every seed")
    for axes in (by_memory, by_rate, by_distance):
        axes.set_ylim(-0.02, 1.02)
        axes.grid(alpha=0.3)


def main(argv: list[str]) -> None:
    values = flags.FLAGS
    try:
        models = read([pathlib.Path(folder) for folder in argv[1:]])
    except (OSError, ValueError) as error:
        console.fail(error)
    models.sort(key=lambda model: -model["best"]["mean"])
    lines = table(models)
    print("\n".join(lines))
    out = pathlib.Path(values.out)
    out.mkdir(parents=True, exist_ok=True)
    record = {
        "command": " ".join(["python -m benchmarks.mqar", *sys.argv[1:]]),
        "commit": values.commit,
        "hardware": values.hardware,
        "models": models,
    }
    (out / "mqar.json").write_text(json.dumps(record, indent=1) + "\n")
    (out / "mqar.md").write_text("\n".join(lines) + "\n")
    figure = Figure(figsize=(16, 5), layout="constrained")
    draw(models, figure)
    for suffix in (".svg", ".png"):
        figure.savefig((out / "mqar").with_suffix(suffix), dpi=120)


if __name__ == "__main__":
    flags.DEFINE_string(
        "out", None, "Folder for the JSON, the table and the figure.", required=True
    )
    flags.DEFINE_string("commit", "", "Of the code that ran, for the record.")
    flags.DEFINE_string("hardware", "", "What it ran on, for the record.")
    app.run(main)
