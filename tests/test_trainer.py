import dataclasses
import json
import os
import re
import shutil
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from bmojo_jax import checks, closing, metrics, optim, sharding, trainer
from bmojo_jax.checkpoint import Checkpoints
from bmojo_jax.config import TrainConfig
from bmojo_jax.data import sources
from bmojo_jax.data.tokenizers import ByteTokenizer
from bmojo_jax.settings import to_dict
from tests.runs import TINY, first_batches, records, tiny_run, write_documents
from tests.steps import assert_same, on_mesh, packed_batch, take_step

BYTES_V = jnp.asarray(ByteTokenizer().token_bytes_V())


@pytest.fixture(scope="module", autouse=True)
def _compile_once(tmp_path_factory):
    """A run that is made again, as after a restart, need not be compiled again."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in zip(names, (str(tmp_path_factory.mktemp("compiled")), 0.0), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("documents")
    write_documents(path)
    return path


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """An uninterrupted run: its work directory and how it ended."""
    workdir = tmp_path_factory.mktemp("finished")
    return workdir, trainer.train(_resumed_config(folder), workdir)


def _resumed_config(folder) -> TrainConfig:
    return tiny_run(folder, optim={"accumulate": 2, "warmup_steps": 2}, data={"batch_size": 16})


def test_a_run_leaves_its_results(finished, folder):
    workdir, outcome = finished
    assert (outcome.step, outcome.interrupted) == (6, False)
    train, validation = records(workdir), records(workdir, "validation")
    assert [record["step"] for record in train] == [1, 2, 3, 4, 5, 6]
    assert [record["tokens"] for record in train] == [16 * 16 * n for n in range(1, 7)]
    assert [record["step"] for record in validation] == [3, 6]
    wanted = {"loss", "bits_per_byte", "grad_norm", "param_norm", "update_norm", "learning_rate"}
    assert wanted <= set(train[0])
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert "tokens_per_second" in lines[-2] and "mfu" not in lines[-2]
    assert train[-1]["loss"] < train[0]["loss"]
    assert json.loads((workdir / "config.json").read_text()) == json.loads(
        json.dumps(to_dict(_resumed_config(folder)))
    )
    names = {path.name for path in workdir.iterdir()}
    assert names == {"config.json", "metrics.jsonl", "tensorboard", "loss.png", "checkpoints"}
    assert outcome.validation.loss == validation[-1]["loss"]
    with Checkpoints(workdir / "checkpoints", keep_last=2, keep_best=1, mode="read") as saved:
        assert saved.latest_step() == 6
        assert saved.best_step() == min(validation, key=lambda record: record["loss"])["step"]


class _Crash(Exception):
    pass


def _fail_at(monkeypatch, step, what):
    """Lets `what` happen once, after update `step` has been handed to the reporter."""
    original = metrics.Reporter.train

    def train(self, now, measured):
        result = original(self, now, measured)
        if now == step:
            monkeypatch.setattr(metrics.Reporter, "train", original)
            what()
        return result

    monkeypatch.setattr(metrics.Reporter, "train", train)


def _crash():
    raise _Crash


def _threads():
    return [t for t in threading.enumerate() if t.name.startswith("grain-thread-prefetch")]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_continues_exactly(
    number, finished, folder, tmp_path, monkeypatch, capsys
):
    config = _resumed_config(folder)
    before = signal.getsignal(number)
    _fail_at(monkeypatch, 4, lambda: os.kill(os.getpid(), number))
    outcome = trainer.train(config, tmp_path)
    assert (outcome.step, outcome.interrupted) == (4, True)
    assert (tmp_path / "checkpoints" / "4").is_dir()
    assert signal.getsignal(number) is before
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3, 4]
    assert (tmp_path / "loss.png").stat().st_size > 1000
    closing.report(config, outcome, tmp_path)
    assert "stopped after step 4; the same command continues" in capsys.readouterr().out
    assert not _threads()
    _assert_continues(finished, config, tmp_path)


def test_a_crash_costs_the_steps_since_the_last_checkpoint(finished, folder, tmp_path, monkeypatch):
    config = _resumed_config(folder)
    _fail_at(monkeypatch, 5, _crash)
    with pytest.raises(_Crash):
        trainer.train(config, tmp_path)
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3, 4, 5]
    assert (tmp_path / "loss.png").stat().st_size > 1000
    assert not _threads()
    _assert_continues(finished, config, tmp_path)


def _assert_continues(finished, config, workdir):
    wanted_dir, wanted = finished
    outcome = trainer.train(config, workdir)
    assert (outcome.step, outcome.interrupted) == (6, False)
    assert records(workdir) == records(wanted_dir)
    assert records(workdir, "validation") == records(wanted_dir, "validation")
    assert_same(outcome.params, wanted.params)


def test_a_finished_run_is_left_as_it_is(finished, folder):
    workdir, wanted = finished
    before = (workdir / "metrics.jsonl").read_text()
    checkpoints = sorted(path.name for path in (workdir / "checkpoints").iterdir())
    outcome = trainer.train(_resumed_config(folder), workdir)
    assert (outcome.step, outcome.interrupted) == (6, False)
    assert outcome.validation.metrics() == wanted.validation.metrics()
    assert (workdir / "metrics.jsonl").read_text() == before
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == checkpoints
    assert_same(outcome.params, wanted.params)


def test_documents_that_come_or_go_are_told(folder, tmp_path, monkeypatch, caplog):
    """The place in the data is one in a list of files."""
    documents, workdir = tmp_path / "documents", tmp_path / "run"
    shutil.copytree(folder, documents)
    config = _resumed_config(documents)
    told = re.escape(f"data.path={str(documents)!r}: files came or went since step ")

    def train_to(step):
        caplog.clear()
        with monkeypatch.context() as patched:
            _fail_at(patched, step, lambda: os.kill(os.getpid(), signal.SIGTERM))
            assert trainer.train(config, workdir).step == step
        return caplog.text

    assert not re.search(told, train_to(2))
    assert not re.search(told, train_to(3))
    went = sources.open_source(config.data, "train")[0]
    next(path for path in documents.iterdir() if path.read_bytes() == went).unlink()
    assert re.search(told + "3:", train_to(4))
    write_documents(documents, count=40)
    assert re.search(told + "4:", train_to(5))


def test_folders_may_be_moved_but_not_exchanged(finished, folder, tmp_path, monkeypatch):
    documents, workdir = tmp_path / "documents", tmp_path / "run"
    shutil.copytree(folder, documents)
    _fail_at(monkeypatch, 4, _crash)
    with pytest.raises(_Crash):
        trainer.train(_resumed_config(documents), workdir)
    other = tmp_path / "other"
    write_documents(other, count=20)
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    told = rf"data\.path='{other}': must hold the same documents as '{documents}'"
    with pytest.raises(checks.SettingsError, match=told):
        trainer.train(_resumed_config(other), workdir)
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before
    os.rename(documents, tmp_path / "moved")
    _assert_continues(finished, _resumed_config(tmp_path / "moved"), workdir)


def test_documents_left_out_are_told_and_counted(folder, tmp_path, caplog):
    documents = tmp_path / "documents"
    shutil.copytree(folder, documents)
    for i in range(20):
        (documents / f"bad{i}.txt").write_bytes(b"caf\xe9 " * 3)
    with caplog.at_level("WARNING"):
        trainer.train(_resumed_config(documents), tmp_path / "run")
    counted = records(tmp_path / "run", "left_out")
    assert counted and counted[-1]["step"] in (3, 6)
    assert counted[-1]["not UTF-8"] >= 5
    told = f"documents left out until step {counted[-1]['step']}: "
    assert any(r.getMessage().startswith(told) for r in caplog.records)
    assert len(counted) == len({line["not UTF-8"] for line in counted})  # only what has changed


def test_a_run_keeps_its_shards(folder, tmp_path):
    trainer.train(tiny_run(folder, steps=2, data={"shards": 4}), tmp_path)
    with Checkpoints(tmp_path / "checkpoints", keep_last=1, keep_best=1, mode="read") as saved:
        assert set(saved.place()["shards"]) == set("0123")
    with pytest.raises(checks.SettingsError, match=r"data\.shards=2: must be 4, with which"):
        trainer.train(tiny_run(folder, data={"shards": 2}), tmp_path)


def test_a_second_ctrl_c_interrupts():
    with pytest.raises(KeyboardInterrupt), trainer.stop_signals() as received:
        os.kill(os.getpid(), signal.SIGINT)
        assert received == [signal.SIGINT]
        os.kill(os.getpid(), signal.SIGINT)
    with trainer.stop_signals() as received:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert received == [signal.SIGTERM] * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"window": 6}}, r"model\.window=6: must be 5, .*another work directory"),
        ({"data": {"sequence_length": 32}}, r"data\.sequence_length=32: must be 16"),
        ({"data": {"seed": 1}}, r"data\.seed=1: must be 0"),
        ({"data": {"workers": 1}}, r"data\.workers=1: must be 0"),
        ({"data": {"include": "*.txt"}}, r"data\.include='\*\.txt': must be ''"),
        ({"data": {"tokenizer": "other.json"}}, r"data\.tokenizer='other\.json': must be 'bytes'"),
        ({"steps": 5, "optim": {"warmup_steps": 1}}, r"steps=5: must be at least 6"),
    ],
)
def test_a_run_is_not_continued_as_another(changes, message, finished, folder):
    config = _resumed_config(folder)
    with pytest.raises(ValueError, match=message):
        checks.check_continuation(
            to_dict(config),
            6,
            dataclasses.replace(
                config,
                **{
                    k: dataclasses.replace(getattr(config, k), **v) if isinstance(v, dict) else v
                    for k, v in changes.items()
                },
            ),
        )


def test_what_a_continuation_may_change(folder):
    before = to_dict(tiny_run(folder))
    now = tiny_run(
        folder,
        steps=60,
        optim={"learning_rate": 1.0, "accumulate": 2},
        model={"remat": "full", "compute_dtype": "bfloat16"},
        mesh={"fsdp": 2},
    )
    checks.check_continuation(json.loads(json.dumps(before)), 6, now)


class _Reversed(ByteTokenizer):
    """Gives other ids, and has no file of its own."""

    def fingerprint(self):
        return "reversed"


def test_the_tokenizer_of_a_continuation(folder, tmp_path, monkeypatch, caplog):
    data = tiny_run(folder).data
    file = tmp_path / "tokenizer.json"
    named = dataclasses.replace(data, tokenizer=str(file))
    saved = _Reversed()
    assert isinstance(checks.choose_tokenizer(data, None), ByteTokenizer)
    with pytest.raises(
        ValueError, match=r"data\.tokenizer='bytes': must be the tokenizer with whi"
    ):
        checks.choose_tokenizer(data, saved)
    with caplog.at_level("INFO"):
        assert checks.choose_tokenizer(named, saved) is saved  # its file is gone
    assert f"data.tokenizer={str(file)!r} is gone; its copy in the checkpoint" in caplog.text
    with pytest.raises(ValueError, match=r"data\.tokenizer="):
        checks.choose_tokenizer(named, None)
    file.write_text("{}")
    made = []
    monkeypatch.setattr(
        checks.tokenizers, "make_tokenizer", lambda data: made.append(data) or saved
    )
    assert checks.choose_tokenizer(named, saved) is saved and made == [named]
    with pytest.raises(ValueError, match=rf"data\.tokenizer='{file}': .*gives other ids"):
        checks.choose_tokenizer(named, ByteTokenizer())
    # By its file it is compared, not by its name.
    now = dataclasses.replace(tiny_run(folder), data=named)
    checks.check_continuation(to_dict(tiny_run(folder)), 1, now, tokenizer=saved)


def test_another_model_is_refused_before_anything_is_written(finished, folder):
    workdir, _ = finished
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    config = dataclasses.replace(
        _resumed_config(folder), model=dataclasses.replace(TINY, eidetic_positions="none")
    )
    with pytest.raises(checks.SettingsError, match=r"model\.eidetic_positions='none'"):
        trainer.train(config, workdir)
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh": {"data": 3}}, r"mesh\.data=3.*number of devices, 8"),
        ({"data": {"batch_size": 4}}, r"data\.batch_size .*=4 must be a multiple .*=8"),
        ({"mesh": {"data": 4, "tensor": 2}, "model": {"num_heads": 3, "num_kv_heads": 1}}, "heads"),
        ({"model": {"vocab_size": 256}}, r"model\.vocab_size=256: must be at least 257"),
        ({"model": {"scan_implementation": "cuda"}}, r"model\.scan_implementation='cuda'.*'xla'"),
        ({"data": {"path": "/no/such/folder"}}, r"data\.path='/no/such/folder': must be"),
        ({"model": {"compute_dtype": "float64"}}, r"compute_dtype='float64': must be 'float32' or"),
        ({"data": {"include": "*.nothing"}}, r"data\.include='\*\.nothing'"),
        (
            {"optim": {"schedule": "warmup_stable_decay", "decay_fraction": 0.9}},
            r"optim\.decay_fraction=0\.9 must be at most 0\.6",
        ),
    ],
)
def test_settings_that_do_not_fit_leave_no_files(changes, message, folder, tmp_path):
    workdir = tmp_path / "run"
    with pytest.raises(checks.SettingsError, match=message):
        trainer.train(tiny_run(folder, **changes), workdir)
    assert not workdir.exists()


def test_the_work_directory_must_be_one(folder, tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(checks.SettingsError, match=r"workdir=.*/file/run'.*/file must be a dir"):
        trainer.train(tiny_run(folder), tmp_path / "file" / "run")
    assert (tmp_path / "file").read_text() == "kept"


# Losses that are not finite.


def _poison(monkeypatch, is_bad):
    """The loss is NaN for what `is_bad(batch)` says."""
    original = trainer.loss_sums

    def loss_sums(config, params, batch):
        loss, parts = original(config, params, batch)
        factor = jnp.where(is_bad(batch), jnp.nan, 1.0)
        return loss * factor, parts._replace(nll=parts.nll * factor)

    monkeypatch.setattr(trainer, "loss_sums", loss_sums)


def test_a_skipped_update_changes_nothing(monkeypatch, folder):
    config = tiny_run(folder, non_finite="skip", optim={"accumulate": 2})
    good = packed_batch()
    good["targets"][good["targets"] == 1] = 2
    bad = good | {"targets": good["targets"].copy()}
    bad["targets"][3, 4] = 1
    _poison(monkeypatch, lambda batch: (batch["targets"] == 1).any())
    program = on_mesh(config)
    state, _ = jax.device_get(take_step(program, program.init(), good))
    after, measured = jax.device_get(take_step(program, state, bad))
    assert np.isnan(measured["loss"]) and not measured["finite"]
    assert (after.step, after.skipped, measured["skipped"]) == (2, 1, 1)
    assert_same((after.params, after.opt_state), (state.params, state.opt_state))
    # As if the bad batch had not been there, but for the count; the rate is the next one's.
    then, measured = jax.device_get(take_step(program, after, good))
    directly, wanted = jax.device_get(take_step(program, state, good))
    assert_same(then.params, directly.params)
    assert measured["learning_rate"] == wanted["learning_rate"]
    schedule = optim.make_schedule(config.optim, config.steps)
    assert measured["learning_rate"] == pytest.approx(float(schedule(1)))


@pytest.fixture
def bad_fourth_batch(monkeypatch, folder):
    config = tiny_run(folder)
    batches = first_batches(config.data, config.model.chunk)
    sums = [int(next(batches)["inputs"].sum()) for _ in range(6)]
    batches.close()
    assert len(set(sums)) == 6
    _poison(monkeypatch, lambda batch: batch["inputs"].sum() == sums[3])


def test_non_finite_losses_are_skipped_and_counted(bad_fourth_batch, folder, tmp_path, caplog):
    with caplog.at_level("WARNING"):
        outcome = trainer.train(tiny_run(folder, non_finite="skip"), tmp_path)
    train = records(tmp_path)
    assert [record["step"] for record in train if record["loss"] is None] == [4]
    assert [record["finite"] for record in train] == [1, 1, 1, 0, 1, 1]
    assert [record["skipped"] for record in train] == [0, 0, 0, 1, 1, 1]
    assert (outcome.step, outcome.interrupted) == (6, False)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(outcome.params)))
    messages = [r.getMessage() for r in caplog.records if "NaN or Inf" not in r.getMessage()]
    assert len(messages) == 1
    assert re.match(r"step 4: loss nan, .* update skipped, 1 so far", messages[0])


@pytest.mark.parametrize("checkpoint_every", [1, 3, 6])
def test_a_non_finite_loss_stops_with_a_report(
    checkpoint_every, bad_fourth_batch, folder, tmp_path
):
    config = tiny_run(folder, checkpoint_every=checkpoint_every, log_every=6, eval_every=6)
    with pytest.raises(trainer.NonFiniteError) as raised:
        trainer.train(config, tmp_path)
    message = str(raised.value)
    assert re.match(r"step 4: loss nan, gradient norm nan, learning rate 0\.0005\d*\. ", message)
    assert (tmp_path / "loss.png").exists()
    with Checkpoints(tmp_path / "checkpoints", keep_last=2, keep_best=1, mode="read") as saved:
        if checkpoint_every == 6:
            assert "No checkpoint had been saved" in message
            assert saved.latest_step() is None
            return
        kept = f"The last good checkpoint, step 3, is kept in {tmp_path / 'checkpoints'}"
        assert kept in message
        assert saved.latest_step() == 3
        program = trainer.make_program(config, sharding.make_mesh(config.mesh), ByteTokenizer())
        state, _ = saved.restore(program.abstract_state)
    assert state.step == 3 and state.skipped == 0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(state)))


def test_a_huge_learning_rate_stops_the_run(folder, tmp_path):
    config = tiny_run(folder, optim={"learning_rate": 1e38, "warmup_steps": 0})
    with pytest.raises(trainer.NonFiniteError, match=r"step 2: .* rate 7\.75e\+37.*lower optim\."):
        trainer.train(config, tmp_path)
