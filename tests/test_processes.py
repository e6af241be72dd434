"""Training by several processes of one device each, connected as on several hosts."""

import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from bmojo_jax import checkpoint
from bmojo_jax.settings import to_dict
from tests.runs import records, tiny_run
from tests.test_train_cli import ROOT, Shell

pytestmark = pytest.mark.slow
TIMEOUT_S = 240  # processes that wait for each other do so for ever

# All processes run it; each gives its own rows of the same batches.
STEPS = """
import json, sys
import jax
import numpy as np
from bmojo_jax import paths, sharding, trainer
from bmojo_jax.config import MeshConfig, TrainConfig
from bmojo_jax.data.tokenizers import ByteTokenizer
from bmojo_jax.settings import from_dict

settings, coordinator, count, index = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
devices = int(sys.argv[5])
if count > 1:
    jax.distributed.initialize(coordinator, count, index)
config = from_dict(TrainConfig, json.loads(settings))
assert jax.device_count() == devices and jax.process_count() == count
for sizes in json.loads(sys.argv[6]):
    mesh = sharding.make_mesh(MeshConfig(**sizes))
    program = trainer.make_program(config, mesh, ByteTokenizer())
    rng = np.random.default_rng(0)
    whole = jax.NamedSharding(mesh, jax.P())
    norms = jax.jit(lambda tree: jax.tree.map(jax.numpy.linalg.norm, tree), out_shardings=whole)
    with jax.set_mesh(mesh):
        state = program.init()
        for _ in range(2):
            ids_BL = rng.integers(0, 257, (8, 17)).astype(np.int32)
            batch = {
                "inputs": ids_BL[:, :-1],
                "targets": ids_BL[:, 1:],
                "weights": (rng.random((8, 16)) < 0.7).astype(np.float32),
                "segment_ids": np.ones((8, 16), np.int32),
                "positions": np.tile(np.arange(16, dtype=np.int32), (8, 1)),
            }
            readers = sharding.readers(mesh)
            share = 8 // readers.count
            rows = slice(share * readers.index, share * (readers.index + 1))
            batch = {name: x[rows] for name, x in batch.items()}
            state, measured = program.step(state, sharding.place_batch(batch, mesh))
        result = {"params": norms(state.params), "moments": norms(state.opt_state), **measured}
    result = jax.device_get(result)
    print(json.dumps({path: float(x) for path, x in paths.flatten_paths(result).items()}))
"""


class Processes:
    """Runs a program in several processes."""

    def __init__(self, folder: pathlib.Path, count: int = 2):
        self.count = count
        self.shell = Shell(folder)  # its environment has one device for each process
        self.settings = tiny_run(folder / "documents", log_every=1, data={"batch_size": 8})

    def start(self, *command: object) -> list[subprocess.Popen]:
        """PORT and INDEX stand for what the processes are to be given."""
        with socket.create_server(("localhost", 0)) as server:
            port = server.getsockname()[1]
        return [
            subprocess.Popen(
                [
                    str(x).replace("PORT", str(port)).replace("INDEX", str(index))
                    for x in (sys.executable, *command)
                ],
                env=self.shell.environment | {"PYTHONPATH": str(ROOT)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for index in range(self.count)
        ]

    def finish(
        self, processes: list[subprocess.Popen], *, status: int = 0
    ) -> list[tuple[str, str]]:
        """What they have printed; all must end with `status`, in time."""
        deadline = time.monotonic() + TIMEOUT_S
        try:
            printed = [p.communicate(timeout=deadline - time.monotonic()) for p in processes]
        finally:
            for process in processes:
                process.kill()
        assert [process.returncode for process in processes] == [status] * self.count, printed
        # What carries messages between processes on CPUs, Gloo, prints that it does.
        return [
            ("".join(x for x in out.splitlines(keepends=True) if not x.startswith("[Gloo]")), err)
            for out, err in printed
        ]

    def train(self, workdir: pathlib.Path, *overrides: str) -> list[subprocess.Popen]:
        return self.start(
            ROOT / "train.py",
            *("--config", self.shell.config, "--workdir", workdir, "--distributed"),
            *("--coordinator=localhost:PORT", f"--num_processes={self.count}"),
            "--process_id=INDEX",
            *("--config.data.batch_size=8", "--config.eval_every=3", *overrides),
        )


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return Processes(tmp_path_factory.mktemp("pair"))


MESHES = {
    2: [{"data": 2}, {"data": 1, "fsdp": 2}, {"data": 1, "tensor": 2}],
    4: [{"data": 1, "fsdp": 2, "context": 2}],
}


@pytest.mark.parametrize("count", MESHES)
def test_processes_step_like_one(count, tmp_path):
    several = Processes(tmp_path, count)
    arguments = (json.dumps(to_dict(several.settings)), "localhost:PORT")
    meshes = json.dumps(MESHES[count])
    started = several.start("-c", STEPS, *arguments, count, "INDEX", count, meshes)
    outputs = [out for out, _ in several.finish(started)]
    flags = (
        f"{several.shell.environment['XLA_FLAGS']} --xla_force_host_platform_device_count={count}"
    )
    alone = subprocess.run(
        [sys.executable, "-c", STEPS, arguments[0], "", "1", "0", str(count), meshes],
        env=several.shell.environment | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert alone.returncode == 0, alone.stderr
    lines = [[json.loads(x) for x in out.splitlines()] for out in (*outputs, alone.stdout)]
    assert [len(x) for x in lines] == [len(MESHES[count])] * (count + 1)
    for *some, wanted in zip(*lines, strict=True):
        assert all(one == some[0] for one in some)
        assert some[0] == pytest.approx(wanted, rel=1e-5)
        assert wanted["loss"] > 1 and wanted["params/embedding/table"] > 0


@pytest.mark.parametrize("mesh", [(), ("--config.mesh.data=1", "--config.mesh.fsdp=2")])
def test_a_run_of_two_processes_is_continued(mesh, pair, tmp_path):
    every = ("--config.checkpoint_every=3", "--config.log_every=1", *mesh)
    (out, _), (silent, _) = pair.finish(pair.train(tmp_path, "--config.steps=4", *every))
    assert "no sample of several processes" in out and "validation: " in out
    assert silent == ""
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3, 4]
    before = records(tmp_path)

    (out, err), (silent, _) = pair.finish(pair.train(tmp_path, "--config.steps=6", *every))
    assert "continues after step 4 " in err and "files came or went" not in err
    assert "validation: " in out and silent == ""
    assert records(tmp_path)[:4] == before
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in records(tmp_path, "validation")] == [3, 4, 6]
    assert checkpoint.load(tmp_path).step == 6

    # One process goes on with what two have read.
    alone = tmp_path / "alone"
    shutil.copytree(tmp_path, alone, ignore=shutil.ignore_patterns("alone"))
    shutil.copytree(tmp_path, tmp_path / "both", ignore=shutil.ignore_patterns("alone"))
    more = ("--config.steps=8", "--config.log_every=1")
    one = pair.shell.train(alone, "--config.data.batch_size=8", "--config.eval_every=3", *more)
    assert one.returncode == 0, one.stderr
    pair.finish(pair.train(tmp_path / "both", *more, *mesh))
    losses, wanted = ([r["loss"] for r in records(x)[-2:]] for x in (alone, tmp_path / "both"))
    assert losses == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("index", [0, 1])
def test_sigterm_to_one_stops_both_with_a_checkpoint(index, pair, tmp_path):
    processes = pair.train(
        tmp_path, "--config.steps=100000", "--config.log_every=2", "--config.eval_every=100000"
    )
    metrics = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + TIMEOUT_S
    try:
        while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
            assert time.monotonic() < deadline
            assert all(process.poll() is None for process in processes)
            time.sleep(0.05)
        os.kill(processes[index].pid, signal.SIGTERM)
    except BaseException:
        for process in processes:
            process.kill()
        raise
    printed = pair.finish(processes)
    stopped = int(re.search(r"stopped after step (\d+)", printed[0][0])[1])
    assert stopped % 2 == 0 and records(tmp_path)[-1]["step"] == stopped
    assert printed[1][0] == ""
    assert checkpoint.load(tmp_path).step == stopped


FAIL = """
import sys
from bmojo_jax import processes
coordinator, index, gone = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
processes.connect(coordinator, 2, index)
with processes.ending_the_others(), processes.end_with_the_others("Try again."):
    processes.gather("both are there")
    if index == gone:
        sys.exit("what went wrong")
    processes.gather("nobody answers")
"""


@pytest.mark.parametrize("gone", [0, 1])
def test_when_one_fails_the_others_end(gone, pair):
    processes = pair.start("-c", FAIL, "localhost:PORT", "INDEX", gone)
    started = time.monotonic()
    try:
        said = [process.communicate(timeout=90)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert time.monotonic() - started < 60
    assert "what went wrong" in said[gone] and processes[gone].returncode == 1
    assert processes[1 - gone].returncode != 0
    told = ("another process of this run seems to have ended", "another task died")
    assert any(text in said[1 - gone] for text in told)


@pytest.mark.parametrize("gone", [0, 1])
def test_when_one_is_killed_the_others_say_so_and_a_restart_goes_on(gone, pair, tmp_path):
    every = ("--config.steps=40", "--config.checkpoint_every=5", "--config.log_every=1")
    pair.finish(pair.train(tmp_path / "whole", *every))
    wanted = records(tmp_path / "whole")

    workdir = tmp_path / "killed"
    processes = pair.train(workdir, *every)
    metrics = workdir / "metrics.jsonl"
    deadline = time.monotonic() + TIMEOUT_S
    try:
        while not (metrics.exists() and metrics.read_text().count("\n") >= 8):
            assert time.monotonic() < deadline
            assert all(process.poll() is None for process in processes)
            time.sleep(0.02)
        processes[gone].kill()
        killed = time.monotonic()
        _, said = processes[1 - gone].communicate(timeout=60)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert time.monotonic() - killed < 60
    assert processes[1 - gone].returncode not in (0, None)
    # JAX may be first to find out, and says it in its own words.
    told = ("another process of this run seems to have ended", "another task died")
    assert any(text in said for text in told)

    pair.finish(pair.train(workdir, *every))
    assert records(workdir) == wanted
