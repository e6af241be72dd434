"""What a run has saved outlives damage, a full disk and a second run."""

import contextlib
import gc
import json
import os
import re
import resource
import shutil
import struct
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c

from bmojo_jax import checks, lock, manifest, records, trainer
from bmojo_jax.checkpoint import Checkpoints, DamagedError, SaveError
from bmojo_jax.data.tokenizers import ByteTokenizer
from bmojo_jax.inventory import TEMPORARY
from tests.runs import tiny_run


@pytest.fixture(autouse=True)
def _nothing_left_behind():
    """asyncio logs the errors of writes that failed when they are collected: not in a later test,
    which may look at what is logged."""
    yield
    gc.collect()


def _state(seed, size=3000):
    rng = np.random.default_rng(seed)
    return {
        "params": {"w": jnp.asarray(rng.normal(size=(2, size)), jnp.float32)},
        "step": jnp.int32(seed),
    }


def _abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


ABSTRACT = _abstract(_state(0))


def _open(directory, keep_last=3, mode="write"):
    return Checkpoints(directory, keep_last=keep_last, keep_best=0, mode=mode)


def _save(checkpoints, step, **options):
    return checkpoints.save(
        step, _state(step), {"at": step}, {"n": step}, tokenizer=ByteTokenizer(), **options
    )


def _assert_restores(directory, step, mode="read"):
    with _open(directory, mode=mode) as checkpoints:
        state, place = checkpoints.restore(ABSTRACT)
    assert place == {"at": step}
    jax.tree.map(np.testing.assert_array_equal, state, _state(step))


def _content(directory):
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


# Damage.


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A directory with the checkpoints 1, 2 and 3."""
    directory = tmp_path_factory.mktemp("three")
    with _open(directory) as checkpoints:
        for step in (1, 2, 3):
            assert _save(checkpoints, step, validation_loss=1.0 / step)
    return directory


@pytest.fixture
def directory(three, tmp_path):
    shutil.copytree(three, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def largest(folder):
    return max((folder / "state").rglob("*"), key=lambda path: path.stat().st_size)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGES = {
    "flipped byte": (lambda f: flip(largest(f)), "state/.* has other content than"),
    "truncated": (lambda f: os.truncate(largest(f), 100), r"state/.* has 100 bytes instead of \d"),
    "missing": (lambda f: largest(f).unlink(), "state/.* is missing"),
    "empty": (_empty, "config/metadata is missing"),
    "item gone": (lambda f: shutil.rmtree(f / "data"), "data/.* is missing"),
    "flipped in JSON": (lambda f: flip(f / "config/metadata"), "config/metadata has other conte"),
    "no JSON": (lambda f: (f / "metrics/metrics").write_text("{"), "metrics/metrics has 1 bytes"),
    "manifest": (lambda f: os.truncate(f / manifest.NAME, 99), "manifest.json is unreadable"),
    "not complete": (lambda f: (f / "commit_success.txt").unlink(), "commit_success.txt is missi"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(damage, directory, caplog):
    break_it, problem = DAMAGES[damage]
    folder = directory / "3"
    break_it(folder)
    told = rf"{directory}: the checkpoint of step=3 is damaged: {problem}.*\. The one of step 2 is"
    before = _content(directory)
    _assert_restores(directory, 2)  # reading leaves everything as it is
    assert _content(directory) == before
    errors = [record for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 1 and re.match(told, errors[0].getMessage())
    with (
        _open(directory, mode="read") as checkpoints,
        pytest.raises(DamagedError, match=f"{directory}: the checkpoint of step=3 .*{problem}"),
    ):
        checkpoints.restore(ABSTRACT, step=3)

    damaged = _content(folder)
    with _open(directory) as checkpoints:
        assert checkpoints.restore(ABSTRACT)[1] == {"at": 2}
        assert checkpoints.latest_step() == 2
        assert not folder.exists() and _content(directory / "damaged-3") == damaged
        assert _save(checkpoints, 3)
    _assert_restores(directory, 3)
    shutil.rmtree(folder / "config")
    _assert_restores(directory, 2, mode="write")
    assert {path.name for path in directory.iterdir()} == {"1", "2", "damaged-3", "damaged-3-2"}


def test_one_damaged_before_a_whole_one_is_out_of_the_way(directory):
    os.truncate(largest(directory / "2"), 0)
    _assert_restores(directory, 3, mode="write")
    assert {path.name for path in directory.iterdir()} == {"1", "damaged-2", "3"}


def test_if_all_are_damaged_nothing_is_started_anew(directory):
    for step in (1, 2, 3):
        flip(largest(directory / str(step)))
    before = _content(directory)
    for _ in range(2):
        with _open(directory) as checkpoints:
            with pytest.raises(DamagedError, match=r"(?s)all are damaged \(1: .*; 2: .*; 3: "):
                checkpoints.restore(ABSTRACT)
            with pytest.raises(DamagedError, match="all are damaged"):
                checkpoints.latest_step()
    assert _content(directory) == before
    for step in (1, 2, 3):
        os.rename(directory / str(step), directory / f"damaged-{step}")
    with _open(directory) as checkpoints, pytest.raises(DamagedError, match="damaged-1; damaged-2"):
        checkpoints.latest_step()


def test_checkpoints_from_before_there_were_manifests(directory, caplog):
    for step in (1, 2, 3):
        (directory / str(step) / manifest.NAME).unlink()
        shutil.rmtree(directory / str(step) / "tokenizer")
    _assert_restores(directory, 3)
    with _open(directory, mode="read") as checkpoints:
        assert checkpoints.tokenizer() is None
    assert not caplog.records
    os.truncate(largest(directory / "3"), 100)
    (directory / "2" / "config" / "metadata").write_text("{")
    _assert_restores(directory, 1, mode="write")
    assert "step=2 is damaged: config/metadata is unreadable" in caplog.text
    assert "step=3 is damaged: state cannot be loaded: " in caplog.text
    assert {path.name for path in directory.iterdir()} == {"1", "damaged-2", "damaged-3"}


def test_what_a_killed_run_leaves_is_removed_by_the_next(directory):
    leftovers = ("4.orbax-checkpoint-tmp", "removed-0")
    for name in leftovers:
        shutil.copytree(directory / "1" / "state", directory / name / "state")
    _assert_restores(directory, 3)
    assert all((directory / name).is_dir() for name in leftovers)
    with _open(directory) as checkpoints:
        checkpoints.clean_up()
    assert sorted(path.name for path in directory.iterdir()) == ["1", "2", "3"]


def test_the_manifest_names_every_file(directory):
    folder = directory / "3"
    names = {name for name in _content(folder) if not name.startswith("_CHECKPOINT")}
    entries = json.loads((folder / manifest.NAME).read_text())["files"]
    assert names - set(entries) == {manifest.NAME, "commit_success.txt"} and set(entries) < names
    assert sum(entry["bytes"] for entry in entries.values()) > _state(0)["params"]["w"].nbytes


# A full disk. RLIMIT_FSIZE needs no rights: a file that grows beyond it cannot be written.


@contextlib.contextmanager
def _files_up_to(size):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def _filled_up(directory):
    """Leaves no room in a file system."""
    filler = directory / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(1024)):
            pass
    yield
    filler.unlink()


# When one write of a save fails, orbax leaves the others to end in a loop that is closed.
orbax_leaves_writes = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def _check_full_disk(directory, full, caplog):
    with _open(directory, keep_last=1) as checkpoints:
        assert _save(checkpoints, 1)
        checkpoints.check_saved(1)
        for step in (2, 3):
            with full():
                _save(checkpoints, step)
                with pytest.raises(SaveError) as raised:
                    checkpoints.check_saved(step)
            message = f"step {step} could not be saved in {directory}: "
            last = f"The last good checkpoint, step 1, is kept in {directory}"
            assert str(raised.value).startswith(message) and last in str(raised.value)
            assert re.search(r"No space left|too large", str(raised.value))
            ours = [r.getMessage() for r in caplog.records if r.getMessage().startswith(message)]
            assert len(ours) == 1 and last in ours[0]
            # No half checkpoint that looks like a whole one, and no less than there was. Writes of
            # the failed save that were under way may still leave files; `close` removes them.
            names = {path.name for path in directory.iterdir() if TEMPORARY not in path.name}
            assert names - {"filler", "lost+found"} == {"1"}
            assert checkpoints.latest_step() == 1
            assert checkpoints.restore(ABSTRACT)[1] == {"at": 1}
        _assert_restores(directory, 1)
        assert _save(checkpoints, 4)
        checkpoints.check_saved(4)
        assert checkpoints.latest_step() == 4
    _assert_restores(directory, 4)
    assert {path.name for path in directory.iterdir()} - {"lost+found"} == {"4"}


@orbax_leaves_writes
def test_a_full_disk_costs_nothing_that_was_saved(tmp_path, caplog):
    _check_full_disk(tmp_path / "checkpoints", lambda: _files_up_to(10_000), caplog)


@orbax_leaves_writes
def test_a_full_file_system_costs_nothing_that_was_saved(tmp_path, caplog):
    """On a real one where mounting is permitted, else by the limit again."""
    mounted = (
        os.geteuid() == 0
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", tmp_path], check=False, stderr=-3
        ).returncode
    )
    print("on a tmpfs of 300 kB" if mounted else "with RLIMIT_FSIZE")
    full = (lambda: _filled_up(tmp_path)) if mounted else (lambda: _files_up_to(10_000))
    try:
        _check_full_disk(tmp_path, full, caplog)
    finally:
        if mounted:
            subprocess.run(["umount", "-l", tmp_path], check=True)


def test_records_wait_for_room_on_the_disk(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    lines = records.JsonLines(path, start_step=0)
    wanted = [{"step": step, "text": "x" * 100} for step in range(1, 9)]
    for record in wanted[:3]:
        lines.add(record)
    with _files_up_to(path.stat().st_size + 50):  # half a line has room
        for record in wanted[3:6]:
            lines.add(record)
        assert path.read_text().splitlines() == [json.dumps(record) for record in wanted[:3]]
    for record in wanted[6:]:
        lines.add(record)
    lines.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == wanted
    assert [r.levelname for r in caplog.records] == ["ERROR"]
    told = rf"{path} cannot be written: .*Records are kept"
    assert re.match(told, caplog.records[0].getMessage())


@pytest.mark.parametrize(
    "torn", ["", '{"step": 3, "lo', '{"step": 3}', "\0\0\0", "7\n[]\nnull\n", '{"step": 9}\n']
)
def test_lines_that_are_no_records_are_dropped(torn, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n' + torn)
    lines = records.JsonLines(path, start_step=3)
    lines.add({"step": 4})
    lines.close()
    complete = [3] if torn == '{"step": 3}' else []
    read = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert read == [1, 2, *complete, 4]
    path.write_text('{"step": 1}\n{"st\n{"step": 2}\n{"step": 5}\n{"step": 3}\n')
    records.JsonLines(path, start_step=3)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'


def _events(path):
    """What TensorBoard reads of a file, all of it, or an error."""
    content = path.read_bytes()
    while content:
        header, data = content[:8], content[12 : 12 + struct.unpack("<Q", content[:8])[0]]
        sums = struct.pack("<I", masked_crc32c(header)), struct.pack("<I", masked_crc32c(data))
        assert (content[8:12], content[12 + len(data) : 16 + len(data)]) == sums
        yield event_pb2.Event.FromString(data)
        content = content[16 + len(data) :]


def test_tensorboard_events_wait_for_room_on_the_disk(tmp_path):
    board = records.EventFile(tmp_path / "board", start_step=4)
    (path,) = (tmp_path / "board").iterdir()
    board.add(5, {"train/loss": 0.5, "train/norm": 2.0})
    with _files_up_to(path.stat().st_size + 20):
        board.add(6, {"train/loss": 0.25})
    board.add(7, {"train/loss": 0.125})
    board.close()
    version, start, *scalars = _events(path)
    assert version.file_version == "brain.Event:2"
    assert start.step == 5 and start.session_log.status == event_pb2.SessionLog.START
    found = [(e.step, {v.tag: v.simple_value for v in e.summary.value}) for e in scalars]
    assert found == [
        (5, {"train/loss": 0.5, "train/norm": 2.0}),
        (6, {"train/loss": 0.25}),
        (7, {"train/loss": 0.125}),
    ]


# Two runs.


def test_one_run_at_a_time(tmp_path):
    told = rf"workdir='{tmp_path}': must not be in use by another run \(process {os.getpid()} on "
    with lock.hold(tmp_path):
        with pytest.raises(ValueError, match=told), lock.hold(tmp_path):
            pass
        assert (tmp_path / "lock").exists()
    assert not (tmp_path / "lock").exists()
    with lock.hold(tmp_path):  # again
        pass


def test_a_killed_process_holds_nothing(tmp_path):
    """The lock is the system's: without JAX, which would take seconds to start."""
    program = (
        "import fcntl, os, time\n"
        f"descriptor = os.open({str(tmp_path / 'lock')!r}, os.O_RDWR | os.O_CREAT)\n"
        "fcntl.flock(descriptor, fcntl.LOCK_EX)\n"
        "os.write(descriptor, b'process 1 on a')\n"
        "print('held', flush=True)\n"
        "time.sleep(60)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(ValueError, match=r"\(process 1 on a writes"), lock.hold(tmp_path):
        pass
    holder.kill()
    holder.communicate()
    with lock.hold(tmp_path):
        assert (tmp_path / "lock").read_text().startswith(f"process {os.getpid()} on ")


def test_a_second_run_is_refused_before_it_changes_anything(tmp_path):
    with lock.hold(tmp_path):
        before = _content(tmp_path)
        with pytest.raises(checks.SettingsError, match="must not be in use by another run"):
            trainer.train(tiny_run(tmp_path / "documents"), tmp_path)
        assert _content(tmp_path) == before


def test_reading_goes_on_to_what_a_run_has_saved_meanwhile(tmp_path, caplog):
    with _open(tmp_path, keep_last=1) as checkpoints:
        _save(checkpoints, 1)
        checkpoints.wait()
        with _open(tmp_path, mode="read") as reader:
            _save(checkpoints, 2)
            checkpoints.wait()  # step 1, of which the reader knows, is removed
            place = reader.restore(ABSTRACT)[1]
    assert place == {"at": 2}
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
