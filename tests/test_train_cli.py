"""The programs as a user runs them, and every setting's check."""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from bmojo_jax import checkpoint, config
from bmojo_jax.config import TrainConfig
from bmojo_jax.data import sources
from bmojo_jax.settings import from_dict, to_dict
from tests.runs import records, tiny_run, write_documents

ROOT = pathlib.Path(__file__).parents[1]
STEPS = 300


class Shell:
    """Runs the programs, on one device, with what was compiled before."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        write_documents(folder / "documents")
        settings = tiny_run(
            folder / "documents",
            data={"batch_size": 2},
            steps=STEPS,
            eval_every=100,
            checkpoint_every=100,
            sample_prompt="the ",
            sample_tokens=5,
            compare_with="zlib_and_bigram",
        )
        self.config = folder / "tiny.py"
        self.config.write_text(
            "import json\n"
            "from bmojo_jax.config import TrainConfig\n"
            "from bmojo_jax.settings import from_dict, to_config_dict\n"
            f"SETTINGS = json.loads({json.dumps(to_dict(settings))!r})\n"
            "def get_config():\n"
            "    return to_config_dict(from_dict(TrainConfig, SETTINGS))\n"
        )
        flags = os.environ["XLA_FLAGS"].split()
        flags = [flag for flag in flags if "device_count" not in flag]
        self.environment = os.environ | {
            "XLA_FLAGS": " ".join(flags),
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }

    def start(self, program: str, *arguments: object, **options) -> subprocess.Popen:
        """`program` is a file, or a module that is named like one."""
        is_module = program.startswith("bmojo_jax.")
        called = ["-m", program] if is_module else [str(ROOT / program)]
        return subprocess.Popen(
            [sys.executable, *called, *map(str, arguments)],
            cwd=self.folder,
            env=self.environment | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )

    def run(self, program: str, *arguments: object) -> subprocess.CompletedProcess:
        process = self.start(program, *arguments)
        out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def train(self, workdir: pathlib.Path, *overrides: str) -> subprocess.CompletedProcess:
        return self.run("train.py", "--config", self.config, "--workdir", workdir, *overrides)


@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    return Shell(tmp_path_factory.mktemp("shell"))


@pytest.fixture(scope="module")
def finished(shell):
    workdir = shell.folder / "finished"
    return workdir, shell.train(workdir)


def test_a_run(finished):
    workdir, process = finished
    assert process.returncode == 0, process.stderr
    assert {path.name for path in workdir.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "tensorboard",
        "loss.png",
        "checkpoints",
        "validation.json",
        "sample.txt",
    }
    assert list((workdir / "tensorboard").glob("events*"))
    assert (workdir / "sample.txt").read_text().startswith("the ")
    assert (workdir / "sample.txt").read_text() in process.stdout
    result = json.loads((workdir / "validation.json").read_text())
    last = records(workdir, "validation")[-1]
    assert result["loss"] == last["loss"] and result["step"] == last["step"] == STEPS
    closing = re.search(
        r"validation: ([\d.]+) bits per byte \(zlib -9: ([\d.]+), byte bigram: ([\d.]+)\), "
        r"on the same ([\d,]+) held-out bytes$",
        process.stdout.strip(),
    )
    wanted = [result[k] for k in ("bits_per_byte", "zlib_bits_per_byte", "bigram_bits_per_byte")]
    assert list(closing.groups()[:3]) == [f"{value:.3f}" for value in wanted]
    # Each held-out document has one target that is no byte: its end.
    documents = _held_out(workdir)
    assert int(closing[4].replace(",", "")) == sum(map(len, documents))
    assert result["targets"] == sum(map(len, documents)) + len(documents)


def _held_out(workdir):
    settings = from_dict(TrainConfig, json.loads((workdir / "config.json").read_text()))
    return sources.read_split(settings.data, "validation")


def test_a_finished_run_says_again_what_came_of_it(finished, shell):
    workdir, first = finished
    before = (workdir / "metrics.jsonl").read_text()
    again = shell.train(workdir)
    assert again.returncode == 0, again.stderr
    assert again.stdout == first.stdout
    assert (workdir / "metrics.jsonl").read_text() == before


def test_sigterm_saves_and_the_same_command_continues(finished, shell):
    workdir = shell.folder / "stopped"
    process = shell.start("train.py", "--config", shell.config, "--workdir", workdir)
    deadline = time.monotonic() + 90
    metrics = workdir / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "stops after this step, with a checkpoint" in err
    stopped = int(re.search(r"stopped after step (\d+); the same command continues", out)[1])
    assert 2 <= stopped < STEPS
    assert (workdir / "checkpoints" / str(stopped)).is_dir() and (workdir / "loss.png").exists()
    assert not (workdir / "sample.txt").exists()

    process = shell.train(workdir)
    assert process.returncode == 0, process.stderr
    assert f"continues after step {stopped} " in process.stderr
    train = records(workdir)
    assert [record["step"] for record in train] == list(range(1, STEPS + 1))
    assert train == records(finished[0])
    assert process.stdout == finished[1].stdout
    ends = [checkpoint.load(path).params for path in (workdir, finished[0])]
    jax.tree.map(np.testing.assert_array_equal, *ends)


def test_a_run_that_fails_ends_in_one_message(shell):
    workdir = shell.folder / "failed"
    process = shell.train(
        workdir,
        "--config.optim.learning_rate=1e38",
        "--config.optim.warmup_steps=0",
        "--config.checkpoint_every=1",
    )
    assert process.returncode == 1
    last = process.stderr.strip().splitlines()[-1]
    assert re.match(r"train\.py: step 2: loss .*checkpoint, step 1, is kept in .*failed/ch", last)
    for noise in ("Traceback", "terminate called", "Exception ignored"):
        assert noise not in process.stderr, process.stderr
    assert (workdir / "loss.png").exists()


def test_an_exception_ends_without_an_abort(shell):
    """Threads that read data must not outlive the interpreter."""
    script = shell.folder / "broken.py"
    script.write_text(
        "import runpy, sys\n"
        "from bmojo_jax import metrics\n"
        "def broken(self, step, measured):\n"
        "    raise RuntimeError('planted')\n"
        "metrics.Reporter.train = broken\n"
        f"sys.argv[0] = {str(ROOT / 'train.py')!r}\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    environment = shell.environment | {"PYTHONPATH": str(ROOT)}
    workdir = shell.folder / "broken"
    process = subprocess.run(
        [sys.executable, script, "--config", shell.config, "--workdir", workdir],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 1
    assert "RuntimeError: planted" in process.stderr
    for noise in ("terminate called", "Exception ignored", "Fatal Python error"):
        assert noise not in process.stderr, process.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.model.windw=3"], "model.windw is not a setting; did you mean model.window?"),
        (["--config.model.window=abc"], "flag --config.model.window=abc: invalid literal"),
        (["--config.steps=0"], "steps=0: must be a number >= 1"),
        (["--config.data.path=/none"], "data.path='/none': must be the path of an existing folder"),
        (["--config.mesh.fsdp=2"], "must divide the number of devices, 1"),
        (["--config=none.py"], "[Errno 2] No such file or directory: 'none.py'"),
        (["--config=none.py", "--config.steps=3"], "[Errno 2] No such file or directory"),
        (["--wrkdir=x"], "Unknown command line flag 'wrkdir'. Did you mean: workdir ?"),
        (
            ["--distributed", "--coordinator=localhost:1", "--num_processes=1", "--process_id=1"],
            "Got process_id=1, num_processes=1",
        ),
        (["--process_id=1"], "--num_processes and --process_id need --distributed"),
        (["--config.model.compute_dtype=float64"], "must be 'float32' or 'bfloat16' unless JAX"),
    ],
)
def test_a_wrong_command_is_one_message_and_leaves_no_files(arguments, message, shell):
    before = sorted(shell.folder.rglob("*"))
    process = shell.train(shell.folder / "never", *arguments)
    assert process.returncode == 1 and process.stdout == ""
    *logged, last = process.stderr.strip().splitlines()
    assert last.startswith("train.py: ") and message in last
    assert all(re.match(r"[IW]\d{4} ", line) for line in logged), process.stderr
    after = [path for path in sorted(shell.folder.rglob("*")) if "__pycache__" not in path.parts]
    assert [path for path in after if path not in before] == []


def test_evaluation_of_a_run(finished, shell):
    workdir, _ = finished
    process = shell.run("eval.py", "--workdir", workdir, "--contexts", "8,16")
    assert process.returncode == 0, process.stderr
    result = json.loads((workdir / "eval" / "validation.json").read_text())
    assert f"{result['by_context'][1]['loss']:.4f}" in process.stdout
    # Rows are packed alike, but there are more of them in a batch of the training run.
    assert result["by_context"][1]["loss"] == pytest.approx(
        records(workdir, "validation")[-1]["loss"], rel=1e-6
    )
    process = shell.run("eval.py", "--workdir", workdir, "--suite", "memory", "--batches", "2")
    assert process.returncode == 0, process.stderr
    assert re.search(r"^ +0 +bmojo +0\.\d{4} ", process.stdout, re.MULTILINE)
    assert {path.name for path in (workdir / "eval").iterdir()} == {
        f"{suite}.{kind}" for suite in ("validation", "memory") for kind in ("json", "png")
    }


def test_evaluation_on_other_documents(finished, shell):
    """A work directory that was copied to another machine, where its data are elsewhere."""
    workdir = shell.folder / "copied"
    shutil.copytree(finished[0], workdir)
    settings = json.loads((workdir / "config.json").read_text())
    other = shell.folder / "other documents"
    write_documents(other, count=30)
    arguments = ("--workdir", workdir, "--contexts=16", "--data_path", other)
    process = shell.run("eval.py", *arguments)
    assert process.returncode == 0, process.stderr
    assert str(other) in process.stdout.splitlines()[0]
    result = json.loads((workdir / "eval" / "validation.json").read_text())
    assert result["data"] == str(other)
    data = from_dict(TrainConfig, settings).data
    held_out = sources.read_split(dataclasses.replace(data, path=str(other)), "validation")
    assert len(held_out) > len(_held_out(workdir))
    assert result["by_context"][0]["bytes"] == sum(map(len, held_out))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workdir=finished", "--data_path=/none"], r"eval\.py: data\.path='/none': must be"),
        (["--workdir=never"], "eval.py: never/checkpoints does not exist"),
        (["--workdir=finished", "--step=7"], "step=7 in .*/checkpoints, which holds"),
        (["--workdir=finished", "--contexts=8,x"], "contexts=.*must be positive integers"),
        (["--workdir=finished", "--suite=memroy"], "memroy.*validation.*memory"),
    ],
)
def test_a_wrong_evaluation_is_one_message(arguments, message, finished, shell):
    process = shell.run("eval.py", *arguments)
    assert process.returncode == 1
    assert re.search(message, process.stderr) and "Traceback" not in process.stderr
    assert not (shell.folder / "never").exists()


GENERATE = "bmojo_jax.generate"


def test_generation(finished, shell):
    arguments = ("--workdir", finished[0], "--prompt", "the memory", "--tokens=12", "--seed=3")
    process = shell.run(GENERATE, *arguments)
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("the memory") and len(process.stdout) > len("the memory\n")
    assert len(process.stdout) <= len("the memory") + 12 + len("\n")
    assert process.stderr == ""
    assert shell.run(GENERATE, *arguments).stdout == process.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workdir=never"], "never/checkpoints does not exist: no run has saved anything there"),
        (["--workdir=finished", "--step=7"], r"no checkpoint of step=7 in .*, which holds"),
        (["--workdir=finished", "--top_p=0"], r"top_p=0\.0: must be in \(0, 1\]"),
    ],
)
def test_a_wrong_generation_is_one_line(arguments, message, finished, shell):
    process = shell.run(GENERATE, *arguments)
    assert process.returncode == 1 and process.stdout == ""
    assert re.fullmatch(rf"generate\.py: .*{message}.*\n", process.stderr), process.stderr
    assert not (shell.folder / "never").exists()


# Settings, without a process.

# A wrong value for every field, of the right type; what is missing here takes any value.
WRONG = {
    "model.vocab_size": 0,
    "model.width": 0,
    "model.depth": 0,
    "model.pattern": "bmojoo",
    "model.num_heads": 0,
    "model.num_kv_heads": 3,
    "model.head_width": 7,
    "model.window": 0,
    "model.fading_window": -1,
    "model.eidetic_tokens": -1,
    "model.chunk": 0,
    "model.rope_theta": float("inf"),
    "model.fading_projections": "both",
    "model.eidetic_positions": "slots",
    "model.innovation_of": "output",
    "model.eidetic_selection": "largest",
    "model.eidetic_content": "output",
    "model.ssm_expand": 0,
    "model.ssm_state": 0,
    "model.conv_taps": 0,
    "model.mlp_width": 0,
    "model.norm_eps": 0.0,
    "model.compute_dtype": "float16",
    "model.remat": "some",
    "optim.learning_rate": float("nan"),
    "optim.schedule": "cosine",
    "optim.warmup_steps": -1,
    "optim.decay_fraction": 1.5,
    "optim.final_fraction": -0.1,
    "optim.beta1": 1.0,
    "optim.beta2": 1.0,
    "optim.eps": 0.0,
    "optim.weight_decay": -1.0,
    "optim.clip_norm": 0.0,
    "optim.accumulate": 0,
    "data.source": "folder",
    "data.weight": 0.0,
    "data.not_utf8": "keep",
    "data.longest_document": 0,
    "data.validation_fraction": 1.0,
    "data.tokenizer": "",
    "data.sequence_length": 0,
    "data.batch_size": 0,
    "data.document_start": "end",
    "data.shuffle_window": 0,
    "data.seed": -1,
    "data.workers": -1,
    "data.shards": -1,
    "task.name": "mqr",
    "task.vocab_size": 1,
    "task.pairs": (),
    "task.filler": "ones",
    "task.train_examples": -1,
    "task.test_examples": 0,
    "task.rates": (1e-3, 0.0),
    "task.seeds": 0,
    "task.replicas_at_once": -1,
    "mesh.data": 0,
    "mesh.fsdp": -2,
    "mesh.context": 0,
    "mesh.tensor": 0,
    "steps": 0,
    "seed": -1,
    "z_loss": -1.0,
    "vocab_chunk": 0,
    "non_finite": "ignore",
    "log_every": 0,
    "eval_every": 0,
    "eval_batches": -1,
    "checkpoint_every": 0,
    "keep_last": 0,
    "keep_best": -1,
    "sample_tokens": -1,
    "compare_with": "gzip",
}
ANY_VALUE = {
    *("model.qk_norm", "model.fading_norm", "model.ssm_residual", "model.eidetic_gate"),
    *("model.ssm_norm", "model.tie_embeddings", "sample_prompt", "data.exclude"),
    # Checked by what uses them, also before anything is compiled or written.
    *("model.scan_implementation", "model.attention_implementation"),
    *("data.path", "data.include", "data.mixed_in", "data.name", "data.split", "data.text_field"),
    *("data.validation_include", "data.validation_split", "data.boundary_token"),
}


def _with(name, value):
    values = to_dict(TrainConfig())
    *section, field = name.split(".")
    (values[section[0]] if section else values)[field] = value
    return values


def test_every_setting_is_listed():
    assert set(WRONG) | ANY_VALUE == set(config.setting_names())


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_value_is_named(name):
    stated = re.escape(f"{name}={WRONG[name]!r}: ") + ".*must be "
    with pytest.raises(ValueError, match=stated):
        from_dict(TrainConfig, _with(name, WRONG[name]))


@pytest.mark.parametrize("name", config.setting_names())
def test_a_wrong_type_is_named(name):
    with pytest.raises(ValueError, match=re.escape(f"{name}=b'1': must be of type ")):
        from_dict(TrainConfig, _with(name, b"1"))


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("model.windw", "model.window"),
        ("window", "model.window"),
        ("optim.batch_size", "data.batch_size"),
        ("optim.lerning_rate", "optim.learning_rate"),
        ("modle.chunk", "model.chunk"),
        ("eval_batch", "eval_batches"),
        ("data.mixed_in[0].wieght", "data.mixed_in[0].weight"),
        ("data.mixd_in", "data.mixed_in"),
    ],
)
def test_an_unknown_setting_suggests_the_nearest(name, nearest):
    message = re.escape(f"{name} is not a setting; did you mean {nearest}?")
    with pytest.raises(ValueError, match=message):
        config.check_name(name)
    if name.count(".") < 2 and name.split(".")[0] in ("model", "optim", "eval_batch"):
        with pytest.raises(ValueError, match=message):
            from_dict(TrainConfig, _with(name, 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim.accumulate": 3}, r"data\.batch_size=8: must be a multiple of optim\.accumulate=3"),
        ({"optim.warmup_steps": 2000}, r"optim\.warmup_steps=2000: must be at most steps=1000"),
        (
            {"model.num_kv_heads": 3},
            r"model\.num_kv_heads=3: must be a divisor of model\.num_heads",
        ),
        ({"model.depth": 3, "model.pattern": "mamba,swa"}, r"model\.depth=3: must be a multiple"),
        ({"mesh.data": -1, "mesh.fsdp": -1}, r"mesh\.data/fsdp=-1: must be -1 for one axis"),
        ({"compare_with": "zlib_and_bigram"}, r"eval_batches=16: must be 0, the whole split"),
        ({"model.pattern": "mamba,bmoj"}, r"'bmoj' must be one of .*did you mean 'bmojo'"),
    ],
)
def test_settings_that_contradict_each_other(changes, message):
    values = to_dict(TrainConfig())
    for name, value in changes.items():
        *section, field = name.split(".")
        (values[section[0]] if section else values)[field] = value
    with pytest.raises(ValueError, match=message):
        from_dict(TrainConfig, values)
