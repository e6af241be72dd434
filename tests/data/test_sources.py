"""Text folders: which files are documents, and which split they belong to."""

import os

import pytest
from absl import logging

from bmojo_jax.config import DataConfig
from bmojo_jax.data import sources


def write(root, files):
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)


@pytest.fixture
def folder(tmp_path):
    write(tmp_path, {f"{n % 3}/{n}.txt": b"%d\r\n\xff" % n for n in range(40)})
    return tmp_path


def paths_of(data):
    return {split: sources.open_source(data, split).paths for split in ("train", "validation")}


def test_splits_are_whole_disjoint_and_complete(folder):
    data = DataConfig(path=str(folder), validation_fraction=0.3)
    paths = paths_of(data)
    together = paths["train"] + paths["validation"]
    assert sorted(together) == sorted(f"{n % 3}/{n}.txt" for n in range(40))
    assert 4 <= len(paths["validation"]) <= 20
    for split, names in paths.items():
        assert list(names) == sorted(names)
        assert sources.read_split(data, split) == [(folder / n).read_bytes() for n in names]


def test_split_is_stable_when_files_come_and_the_folder_moves(folder):
    data = DataConfig(path=str(folder), validation_fraction=0.3)
    before = paths_of(data)
    write(folder, {f"new/{n}.txt": b"x" for n in range(40)})
    moved = folder.rename(folder.with_name("moved"))
    after = paths_of(DataConfig(path=str(moved), validation_fraction=0.3))
    for split in before:
        assert set(before[split]) == {p for p in after[split] if not p.startswith("new/")}
        assert len(after[split]) > len(before[split])


def test_split_does_not_change_between_versions(folder):
    # Recorded: whoever changes the hash moves files from validation into training.
    paths = paths_of(DataConfig(path=str(folder), validation_fraction=0.1))
    assert paths["validation"] == ("0/6.txt",)


@pytest.mark.parametrize("fraction", [1e-9, 0.5, 1 - 1e-9])
@pytest.mark.parametrize("count", [2, 3])
def test_no_split_is_empty(tmp_path, fraction, count):
    write(tmp_path, {f"{n}.txt": b"x" for n in range(count)})
    paths = paths_of(DataConfig(path=str(tmp_path), validation_fraction=fraction))
    assert paths["train"] and paths["validation"]
    assert len(paths["train"] + paths["validation"]) == count
    assert paths == paths_of(DataConfig(path=str(tmp_path), validation_fraction=fraction))


def test_include_and_exclude(folder):
    write(folder, {"1/deep/a.md": b"m", "skip/b.md": b"m", "1/skip/c.md": b"m", "d.md": b"m"})
    write(folder, {"skip.md": b"a file of an excluded folder's name"})
    data = DataConfig(path=str(folder), include="**/*.md", exclude=("skip",))
    paths = paths_of(data)
    assert sorted(paths["train"] + paths["validation"]) == ["1/deep/a.md", "d.md", "skip.md"]


def test_what_is_left_out_is_logged(tmp_path, monkeypatch):
    write(tmp_path, {f"{n}.txt": b"x" for n in range(5)})
    write(tmp_path, {"empty.txt": b"", "folder.txt/inner.txt": b"x", "locked.txt": b"x"})
    write(tmp_path, {"out/a.txt": b"x", "out/b.txt": b"x"})
    (tmp_path / "broken.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "again.txt").symlink_to(tmp_path / "0.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    access = os.access
    monkeypatch.setattr(os, "access", lambda p, m: p.name != "locked.txt" and access(p, m))
    messages = []
    monkeypatch.setattr(logging, "info", messages.append)

    paths = paths_of(DataConfig(path=str(tmp_path), exclude=("out",)))
    # Of two names of one file the first counts.
    expected = {"1.txt", "2.txt", "3.txt", "4.txt", "folder.txt/inner.txt"}
    assert set(paths["train"] + paths["validation"]) - {"again.txt", "0.txt"} == expected
    assert len(paths["train"] + paths["validation"]) == 6
    messages = [message for message in messages if "left out" in message]
    assert len(messages) == 4  # said once, though there are two splits
    assert "1 of 13 files (empty), e.g. 'empty.txt'" in messages[1]
    assert "3 of 13 files (unreadable), e.g. 'broken.txt'" in messages[2]
    assert "1 of 13 files (the same file again)" in messages[3]
    assert "2 of 13 files (in a folder of data.exclude), e.g. 'out/a.txt'" in messages[0]


def test_errors_name_the_setting(tmp_path):
    def refuse(match, **settings):
        with pytest.raises(ValueError, match=match):
            sources.open_source(DataConfig(**settings), "train")

    path = str(tmp_path)
    refuse(r"data\.path='': must be the path of an existing folder")
    refuse(r"data\.path='.*missing': must be", path=path + "/missing")
    refuse(r"data\.include='': must match files", path=path)
    write(tmp_path, {"a.txt": b"", "b.md": b"x"})
    refuse(r"data\.path='.*a\.txt': must be", path=path + "/a.txt")
    refuse(r"data\.include='.*txt': must match files .*matches 1 names", path=path, include="*.txt")
    refuse(r"data\.path='.*: must hold at least 2 .*'b\.md'", path=path, include="*.md")
    refuse(r"data\.include='/etc/\*': must be a glob relative", path=path, include="/etc/*")
    refuse(r"data\.include='\*\*a': must be a glob", path=path, include="**a")


def test_without_a_glob_every_text_file_counts(tmp_path):
    write(tmp_path, {f"{n}.any": b"caf\xe9" for n in range(4)})
    write(tmp_path, {"late.txt": b"x" * 9000 + b"\0", "binary.txt": b"ab\0c"})
    paths = paths_of(DataConfig(path=str(tmp_path)))
    found = {*paths["train"], *paths["validation"]}
    assert found == {"0.any", "1.any", "2.any", "3.any", "late.txt"}
    named = paths_of(DataConfig(path=str(tmp_path), include="*.txt"))
    assert {*named["train"], *named["validation"]} == {"late.txt", "binary.txt"}
