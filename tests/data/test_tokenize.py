"""Token files are written whole, the same by any number of processes, through any interruption."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from bmojo_jax.config import DataConfig, SourceConfig
from bmojo_jax.data import sources, tokenize, tokens
from bmojo_jax.data.documents import BadDocument


@pytest.fixture
def data(tmp_path, rng):
    """60 files of letters; one is not UTF-8."""
    folder = tmp_path / "text"
    folder.mkdir()
    for n in range(60):
        size = rng.integers(1, 3000)
        (folder / f"{n}.txt").write_bytes(rng.integers(64, 127, size, np.uint8).tobytes())
    (folder / "bad.txt").write_bytes(b"\xff\xfe")
    return DataConfig(path=str(folder), validation_fraction=0.2)


def contents(folder):
    return {path.name: path.read_bytes() for path in pathlib.Path(folder).iterdir()}


def test_the_description_says_what_was_read(data, tmp_path):
    description = tokenize.tokenize(data, tmp_path / "out", shards=4, processes=1)
    assert json.loads((tmp_path / "out/tokens.json").read_text()) == description
    left_out = {}
    for split in ("train", "validation"):
        source = sources.open_source(data, split)
        read = [source[index] for index in range(len(source))]
        good = [document for document in read if isinstance(document, bytes)]
        facts = description["splits"][split]
        assert facts["documents"] == len(good)
        assert facts["text_bytes"] == sum(map(len, good))
        assert facts["tokens"] == sum(map(len, good)) + len(good)
        assert facts["records"] == sum(shard["records"] for shard in facts["shards"])
        assert sum(facts["left_out"].values()) == len(read) - len(good)
        left_out |= facts["left_out"]
    assert left_out == {"not UTF-8": 1}
    files = {f"train-{n:05}-of-00004.array_record" for n in range(4)}
    files |= {"tokens.json", "validation-00000-of-00001.array_record"}
    assert contents(tmp_path / "out").keys() == files


def test_an_interrupted_command_goes_on_to_the_same_bytes(data, tmp_path, monkeypatch):
    tokenize.tokenize(data, tmp_path / "whole", shards=5, processes=1)
    original, finished = os.replace, []

    def stop_after_three(source, target):
        original(source, target)
        if str(target).endswith(".array_record"):
            finished.append(pathlib.Path(target).name)
            if len(finished) == 3:
                (tmp_path / f"parts/{finished[0]}.part-1").write_bytes(b"of a killed process")
                raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stop_after_three)
    with pytest.raises(KeyboardInterrupt):
        tokenize.tokenize(data, tmp_path / "parts", shards=5, processes=1)
    unfinished = dataclasses.replace(data, source="tokens", path=str(tmp_path / "parts"))
    with pytest.raises(ValueError, match=r"this one is not finished: give the same command again"):
        tokens.open_tokens(unfinished, unfinished, "train")
    for changed, name in (
        ({"seed": 1}, r"data\.seed=0 and not 1"),
        ({"exclude": ("x",)}, r"data\.exclude=\[\] and not \['x'\]"),
    ):
        with pytest.raises(ValueError, match=rf"was begun with {name}: give the same settings"):
            tokenize.tokenize(
                dataclasses.replace(data, **changed), tmp_path / "parts", shards=5, processes=1
            )
    with pytest.raises(ValueError, match=r"was begun with shards=5 and not 4"):
        tokenize.tokenize(data, tmp_path / "parts", shards=4, processes=1)
    tokenize.tokenize(data, tmp_path / "parts", shards=5, processes=1)
    assert len(finished) == len(set(finished)) == 6  # no shard twice
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_changed_documents_are_noticed(data, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenize, "_finish", lambda *_: {})
    tokenize.tokenize(data, tmp_path / "out", shards=2, processes=1)
    (tmp_path / "text/new.txt").write_text("new")
    with pytest.raises(ValueError, match=r"was begun with documents=.* same settings and docume"):
        tokenize.tokenize(data, tmp_path / "out", shards=2, processes=1)


def test_nothing_is_overwritten(data, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"must be a new or empty folder; it holds 'mine.txt'"):
        tokenize.tokenize(data, tmp_path / "other", shards=2, processes=1)
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts/corpus.part1.zip").write_text("mine")
    with pytest.raises(ValueError, match=r"new or empty folder; it holds 'corpus.part1.zip'"):
        tokenize.tokenize(data, tmp_path / "parts", shards=2, processes=1)
    tokenize.tokenize(data, tmp_path / "out", shards=2, processes=1)
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match=r"out': must be a new folder; this one is finished"):
        tokenize.tokenize(data, tmp_path / "out", shards=2, processes=1)
    assert contents(tmp_path / "out") == before
    with tokenize._alone(tmp_path / "other"):
        with pytest.raises(ValueError, match=r"other': must not be in use"):
            tokenize.tokenize(data, tmp_path / "other", shards=2, processes=1)
    written = dataclasses.replace(data, source="tokens", path=str(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"data\.source='tokens': must be documents that are not"):
        tokenize.tokenize(written, tmp_path / "again", shards=2, processes=1)


class Documents(list):
    def fingerprint(self):
        return "these"


def test_what_sources_yield_is_counted(tmp_path, monkeypatch):
    framed = np.array([256, 97, 98, 256, 99, 256], np.int32)  # | a b | c |
    read = {
        "train": Documents([b"xyz", framed, b"", BadDocument("b", "unreadable")]),
        "validation": Documents([b"v"]),
    }
    monkeypatch.setattr(sources, "open_source", lambda data, split: read[split])
    description = tokenize.tokenize(DataConfig(), tmp_path / "out", shards=9, processes=1)
    facts = description["splits"]["train"]
    assert len(facts["shards"]) == 4  # as many as documents
    counted = {name: facts[name] for name in ("documents", "tokens", "text_bytes", "left_out")}
    assert counted == {
        "documents": 3,
        "tokens": 4 + 5,
        "text_bytes": 6,
        "left_out": {"empty": 1, "unreadable": 1},
    }
    data = DataConfig(source="tokens", path=str(tmp_path / "out"))
    source = tokens.open_tokens(data, data, "train")  # two of the files are empty
    records = [source[index].tolist() for index in range(len(source))]
    assert sorted(records) == [[256, 97, 98, 256, 99, 256], [256, 120, 121, 122, 256]]

    read["train"].append(np.array([256, 999, 256], np.int32))
    with pytest.raises(ValueError, match=r"ids from 256 to 999: must be in \[0, 257\)"):
        tokenize.tokenize(DataConfig(), tmp_path / "range", shards=1, processes=1)
    read["train"] = Documents([b"", b""])
    with pytest.raises(ValueError, match=r"must hold train documents that can be used; left out:"):
        tokenize.tokenize(DataConfig(), tmp_path / "none", shards=1, processes=1)


def command(data, output, *, processes, shards=8):
    return [
        *(sys.executable, "-m", "bmojo_jax.data.tokenize", "--config", "configs/quickstart.py"),
        *(f"--config.data.path={data.path}", "--config.data.validation_fraction=0.2"),
        *("--output", str(output), "--shards", str(shards), "--processes", str(processes)),
    ]


@pytest.mark.slow
def test_the_command_writes_the_same_with_any_processes_and_killed_at_any_moment(data, tmp_path):
    def run(output, processes, check=True):
        arguments = command(data, output, processes=processes)
        return subprocess.run(arguments, capture_output=True, text=True, check=check)

    text = run(tmp_path / "one", 1).stdout
    assert "bytes per token" in text and "--config.data.source=tokens" in text
    run(tmp_path / "two", 2)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    killed = tmp_path / "killed"
    for delay in (0.0, 0.3, 0.01):  # after it has begun
        process = subprocess.Popen(
            command(data, killed, processes=2), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        while (
            process.poll() is None and not (killed / "train-00000-of-00008.array_record").exists()
        ):
            time.sleep(0.01)
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    again = run(killed, 2, check=False)
    assert again.returncode == 0 or "this one is finished" in again.stderr
    assert contents(killed) == contents(tmp_path / "one")
    refused = run(tmp_path / "one", 1, check=False)
    assert refused.returncode == 1
    assert refused.stderr.splitlines()[-1].startswith("tokenize.py: output=")


def test_mixed_in_sources_are_not_tokenized_and_that_is_said(data, tmp_path, caplog):
    data = dataclasses.replace(data, mixed_in=(SourceConfig(path="elsewhere"),))
    tokenize.tokenize(data, tmp_path / "out", shards=1, processes=1)
    assert "data.mixed_in is not tokenized" in caplog.text
