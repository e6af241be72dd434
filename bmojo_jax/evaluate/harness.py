"""Tasks of EleutherAI's lm-evaluation-harness, from local task files.

    python eval.py --workdir DIR --suite harness --tasks lambada_local,piqa_local --task_data ITEMS

The harness is an optional extra. Task files are its YAML; ours, in `harness_tasks/`, repeat the
usual prompts of LAMBADA, PIQA, ARC-Easy and WinoGrande over local files of items. `TASK_DATA` in a
task file stands for the folder that is given.

Metrics and their standard errors are the harness's. See `harness_model.py` for how texts are read.
"""

import os
import pathlib
import shutil
import tempfile
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from bmojo_jax.checkpoint import Trained
from bmojo_jax.evaluate.validation import title

TASKS = pathlib.Path(__file__).parent / "harness_tasks"
_PLACEHOLDER = "TASK_DATA"
_BOOTSTRAPS = 1000  # draws, for metrics without a formula of their standard error


def run(
    trained: Trained,
    *,
    tasks: tuple[str, ...] = (),
    task_folder: str = str(TASKS),
    task_data: str = "",
    items: int = 0,
) -> dict[str, Any]:
    """The harness's metrics for each task.

    Args:
      tasks: names.
      task_folder: with task files; those that they include must be in it too.
      task_data: the folder of items, for task files that say TASK_DATA.
      items: the first of each task; 0: all.

    Raises:
      ValueError: the harness is not installed, a task is unknown, or its items are missing.
    """
    try:
        import lm_eval
        import lm_eval.tasks
    except ImportError as error:
        raise ValueError(
            f"--suite harness needs lm-eval ({error}): pip install -r requirements-harness.txt"
        ) from error
    from bmojo_jax.evaluate.harness_model import HarnessModel

    # Its bootstrap would fork this process, whose threads a child cannot take over.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary) / "tasks"
        _copy_tasks(pathlib.Path(task_folder), folder, task_data)
        manager = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)
        unknown = [name for name in tasks if name not in manager.all_tasks]
        if unknown or not tasks:
            raise ValueError(
                f"--tasks={','.join(tasks)}: must be some of {manager.all_tasks} of "
                f"--task_folder={task_folder}"
            )
        _check_items(folder, tasks, task_data)
        output = lm_eval.simple_evaluate(
            model=HarnessModel(trained),
            tasks=list(tasks),
            task_manager=manager,
            limit=items or None,
            bootstrap_iters=_BOOTSTRAPS,
            log_samples=False,
        )
    assert output is not None  # of a single process
    return {
        "suite": "harness",
        "title": f"{title(trained)}; lm-evaluation-harness {lm_eval.__version__}",
        "step": trained.step,
        "training_length": trained.config.data.sequence_length,
        "by_metric": _rows(output),
    }


def _copy_tasks(source: pathlib.Path, folder: pathlib.Path, task_data: str) -> None:
    if not source.is_dir():
        raise ValueError(f"--task_folder={str(source)!r}: must be a folder of task files")
    shutil.copytree(source, folder)
    for path in folder.rglob("*.yaml"):
        if task_data:
            text = path.read_text().replace(_PLACEHOLDER, str(pathlib.Path(task_data).absolute()))
            path.write_text(text)


def _check_items(folder: pathlib.Path, tasks: Sequence[str], task_data: str) -> None:
    """That task files which need a folder of items got one."""
    if task_data and not pathlib.Path(task_data).is_dir():
        raise ValueError(f"--task_data={task_data!r}: must be the folder of the items")
    for path in folder.rglob("*.yaml"):
        if path.stem in tasks and _PLACEHOLDER in path.read_text():
            raise ValueError(
                f"--task_data={task_data!r}: must be the folder of the items that {path.name} reads"
            )


def _rows(output: Any) -> list[dict[str, Any]]:
    """A row for each task, filter and metric."""
    rows = []
    for task, metrics in output["results"].items():
        for key, value in metrics.items():
            name, comma, chosen = key.partition(",")
            if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = metrics.get(f"{name}_stderr,{chosen}")
            rows.append(
                {
                    "task": task,
                    "metric": name,
                    "filter": chosen,
                    "value": float(value),
                    "stderr": float(error) if isinstance(error, int | float) else None,
                    "items": output["n-samples"][task]["effective"],
                    "higher_is_better": output["higher_is_better"][task].get(name),
                }
            )
    return rows


def table(result: dict[str, Any]) -> list[str]:
    lines = [f"{'task':>24} {'metric':>16} {'value':>12} {'stderr':>10} {'items':>7}"]
    for row in result["by_metric"]:
        error = "-" if row["stderr"] is None else f"{row['stderr']:.4f}"
        lines.append(
            f"{row['task']:>24} {row['metric']:>16} {row['value']:>12.4f} {error:>10} "
            f"{row['items']:>7,}"
        )
    return lines


def draw(result: dict[str, Any], figure: Figure) -> None:
    """Accuracies; what has no upper end stands in the table."""
    axes = figure.subplots()
    rows = [row for row in result["by_metric"] if row["metric"].startswith(("acc", "exact"))]
    labels = [f"{row['task']}\n{row['metric']}" for row in rows]
    errors = [1.96 * (row["stderr"] or 0.0) for row in rows]
    axes.bar(range(len(rows)), [row["value"] for row in rows], yerr=errors, capsize=3)
    axes.set_xticks(range(len(rows)), labels, fontsize=8)
    axes.set_ylabel("share of items, 95 %")
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.3, axis="y")
