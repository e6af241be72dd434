"""Whole runs, as processes that are killed at any moment, whose disk is full or damaged."""

import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from bmojo_jax import checkpoint
from tests.runs import records as read_records
from tests.test_nothing_lost import flip, largest
from tests.test_train_cli import ROOT, Shell

pytestmark = pytest.mark.slow
STEPS = 300
EVERY = 5
KILLS = 20
TIMEOUT_S = 300


@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    return Shell(tmp_path_factory.mktemp("nothing_lost"))


ARGUMENTS = (
    f"--config.steps={STEPS}",
    f"--config.checkpoint_every={EVERY}",
    "--config.eval_every=100",
    "--config.eval_batches=2",
    "--config.log_every=1",
    "--config.sample_tokens=0",
    "--config.compare_with=nothing",
)


@pytest.fixture(scope="module")
def finished(shell):
    workdir = shell.folder / "finished"
    _Run(shell, workdir).end()
    return workdir


def _last_step(workdir):
    """Of the last whole line of metrics.jsonl."""
    with contextlib.suppress(OSError), (workdir / "metrics.jsonl").open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 2000))
        for line in reversed(file.read().split(b"\n")[:-1]):
            with contextlib.suppress(ValueError):
                return json.loads(line)["step"]
    return 0


def _half_saved(workdir):
    return list((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp"))


def _saved(workdir):
    names = [path.name for path in (workdir / "checkpoints").glob("*")]
    return max((int(name) for name in names if name.isdecimal()), default=0)


def _assert_same_runs(workdir, finished):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_bytes().splitlines()]
    assert [r["step"] for r in lines if r["split"] == "train"] == list(range(1, STEPS + 1))
    for split in ("train", "validation"):
        assert read_records(workdir, split) == read_records(finished, split)
    ends = [checkpoint.load(path) for path in (workdir, finished)]
    assert [trained.step for trained in ends] == [STEPS, STEPS]
    jax.tree.map(np.testing.assert_array_equal, *(trained.params for trained in ends))
    assert not _half_saved(workdir) and not list((workdir / "checkpoints").glob("*-*"))


class _Run:
    """A process of train.py; what it says can be read while it runs.

    Not by way of a file, which a limit on files would cut short.
    """

    def __init__(self, shell, workdir):
        arguments = ("--config", shell.config, "--workdir", workdir, *ARGUMENTS)
        self.process = subprocess.Popen(
            [sys.executable, ROOT / "train.py", *arguments],
            env=shell.environment | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._lines = []
        self._reader = threading.Thread(target=lambda: self._lines.extend(self.process.stderr))
        self._reader.start()

    def said(self):
        return "".join(self._lines)

    def wait_for(self, condition, pause=0.002):
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            assert self.process.poll() is None and time.monotonic() < deadline, self.said()
            time.sleep(pause)

    def end(self, status=0):
        """Waits for the end of the run; returns what it has said."""
        status_now = self.process.wait(TIMEOUT_S)
        self._reader.join(TIMEOUT_S)
        self.process.stderr.close()
        assert status_now == status, self.said()
        return self.said()

    def limit_files(self, size):
        hard = resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE)[1]
        resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, (size, hard))


def _kill(shell, workdir, moment, rng):
    """Kills a run at a random moment of a kind; returns how long it has lived."""
    for leftover in _half_saved(workdir):
        (leftover / "of an earlier run").touch()
    begin = _last_step(workdir)
    # All of them together come before the end.
    limit = begin + rng.randint(1, 4 * EVERY)
    delay = rng.uniform(0.1, 6.0)
    saves = rng.randint(1, 2)
    seen = set()
    run = _Run(shell, workdir)
    since = time.monotonic()

    def has_come():
        step = _last_step(workdir)
        if moment == "start":
            return time.monotonic() - since > delay or step > begin
        if moment == "step":
            return step >= limit
        new = {p.name for p in _half_saved(workdir) if not (p / "of an earlier run").exists()}
        seen.update(new)
        return new and len(seen) >= saves

    run.wait_for(has_come, pause=0.0005)
    if moment != "start":
        time.sleep(rng.uniform(0, 0.02))
    run.process.kill()
    run.end(-signal.SIGKILL)
    return time.monotonic() - since


def test_killed_at_twenty_random_moments(shell, finished):
    rng = random.Random(3)
    workdir = shell.folder / "killed"
    moments = ["start"] * 5 + ["step"] * 7 + ["save"] * 8
    assert len(moments) == KILLS
    rng.shuffle(moments)
    hits, advances, previous, lived = 0, 0, 0, []
    for moment in moments:
        lived.append(_kill(shell, workdir, moment, rng))
        leftovers = [p for p in _half_saved(workdir) if not (p / "of an earlier run").exists()]
        hits += bool(leftovers)
        advances += _saved(workdir) > previous
        previous = _saved(workdir)
    print(f"{hits} of {KILLS} kills were in the middle of a save; step {previous} was saved then")
    print("lived", [round(x, 2) for x in lived])
    # Otherwise nothing was tried.
    assert hits >= 4 and advances >= 8 and 10 * EVERY <= previous < STEPS
    said = _Run(shell, workdir).end()
    assert f"continues after step {previous} " in said
    assert "damaged" not in said
    _assert_same_runs(workdir, finished)


def test_a_run_on_a_disk_that_is_full_for_a_while(shell, finished):
    workdir = shell.folder / "full for a while"
    run = _Run(shell, workdir)
    run.wait_for(lambda: _saved(workdir) >= 2 * EVERY)
    run.limit_files(2000)
    run.wait_for(lambda: run.said().count("could not be saved") >= 2)
    saved = _saved(workdir)
    run.limit_files(resource.RLIM_INFINITY)
    said = run.end()
    assert 2 * EVERY <= saved < STEPS
    assert re.search(rf"step \d+ could not be saved in {workdir}/checkpoints: .*too large", said)
    assert len(re.findall(r"metrics\.jsonl cannot be written: ", said)) == 1
    assert "metrics.jsonl can be written again" in said
    _assert_same_runs(workdir, finished)


def test_a_run_that_ends_on_a_full_disk_says_so(shell, finished):
    workdir = shell.folder / "full"
    run = _Run(shell, workdir)
    run.wait_for(lambda: _saved(workdir) >= 2 * EVERY)
    run.limit_files(2000)
    run.wait_for(lambda: "could not be saved" in run.said())
    run.process.send_signal(signal.SIGTERM)
    said = run.end(1)
    told = rf"^train\.py: step (\d+) could not be saved in {workdir}/checkpoints: .* The last good "
    told += r"checkpoint, step (\d+), is kept in .*The same command continues"
    found = re.search(told, said, re.MULTILINE)
    assert found, said
    stopped, good = map(int, found.groups())
    assert good == _saved(workdir) < stopped
    # Writes that were under way may leave something, until the next run.
    assert f"continues after step {good} " in _Run(shell, workdir).end()
    assert not _half_saved(workdir)
    _assert_same_runs(workdir, finished)


def test_a_damaged_run_continues_from_the_checkpoint_before(shell, finished):
    workdir = shell.folder / "damaged"
    shutil.copytree(finished, workdir)
    flip(largest(workdir / "checkpoints" / str(STEPS)))
    said = _Run(shell, workdir).end()
    told = rf"checkpoint of step={STEPS} is damaged: state/.*\. The one of step {STEPS - EVERY} is"
    assert re.search(told, said)
    assert (workdir / "checkpoints" / f"damaged-{STEPS}").is_dir()
    shutil.rmtree(workdir / "checkpoints" / f"damaged-{STEPS}")
    _assert_same_runs(workdir, finished)
