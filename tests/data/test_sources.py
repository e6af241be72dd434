"""Folders of text: which files are documents, and which split they belong to."""

import dataclasses
import os
import pickle

import pytest
from absl import logging

from bmojo_jax.config import DataConfig, SourceConfig
from bmojo_jax.data import sources
from bmojo_jax.data.documents import BadDocument, Source


def write(root, files):
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)


@pytest.fixture
def folder(tmp_path):
    write(
        tmp_path / "texts", {f"{n % 3}/{n}.txt": b"%d\r\n\xc3\xa9 and more" % n for n in range(40)}
    )
    return tmp_path / "texts"


def names_of(data):
    return {split: sources.open_source(data, split).names for split in ("train", "validation")}


def all_names(data):
    names = names_of(data)
    return sorted(names["train"] + names["validation"])


def test_splits_are_whole_disjoint_and_complete(folder):
    data = DataConfig(path=str(folder), validation_fraction=0.3)
    names = names_of(data)
    together = names["train"] + names["validation"]
    assert sorted(together) == sorted(f"{n % 3}/{n}.txt" for n in range(40))
    assert 4 <= len(names["validation"]) <= 20
    for split, of_split in names.items():
        assert of_split == sorted(of_split)
        assert sources.read_split(data, split) == [(folder / n).read_bytes() for n in of_split]


def test_split_is_stable_when_files_come_and_the_folder_moves(folder):
    data = DataConfig(path=str(folder), validation_fraction=0.3)
    before = names_of(data)
    write(folder, {f"new/{n}.txt": b"x" for n in range(40)})
    moved = folder.rename(folder.with_name("moved"))
    after = names_of(DataConfig(path=str(moved), validation_fraction=0.3))
    for split in before:
        assert set(before[split]) == {p for p in after[split] if not p.startswith("new/")}
        assert len(after[split]) > len(before[split])


def test_split_does_not_change_between_versions(folder):
    # Recorded: whoever changes the hash moves files from validation into training.
    names = names_of(DataConfig(path=str(folder), validation_fraction=0.1))
    assert names["validation"] == ["0/6.txt"]


@pytest.mark.parametrize("fraction", [1e-9, 0.5, 1 - 1e-9])
@pytest.mark.parametrize("count", [2, 3])
def test_no_split_is_empty(tmp_path, fraction, count):
    write(tmp_path, {f"{n}.txt": b"x" for n in range(count)})
    names = names_of(DataConfig(path=str(tmp_path), validation_fraction=fraction))
    assert names["train"] and names["validation"]
    assert len(names["train"] + names["validation"]) == count
    assert names == names_of(DataConfig(path=str(tmp_path), validation_fraction=fraction))


def test_fingerprint_is_of_names_and_sizes(folder):
    def fingerprint(root=folder, **settings):
        source = sources.open_source(DataConfig(path=str(root), **settings), "train")
        assert isinstance(source, Source)
        assert pickle.loads(pickle.dumps(source)).fingerprint() == source.fingerprint()
        return source.fingerprint()

    first = fingerprint()
    assert fingerprint(include="0/*.txt") != first
    assert fingerprint(longest_document=4) != first
    moved = folder.rename(folder.with_name("moved"))
    assert fingerprint(moved) == first
    path = moved / sources.open_source(DataConfig(path=str(moved)), "train").names[0]
    path.write_bytes(path.read_bytes() + b"x")
    longer = fingerprint(moved)
    assert longer != first
    path.rename(moved / "another.txt")
    assert fingerprint(moved) not in (longer, first)


def test_include_and_exclude(folder):
    write(folder, {"1/deep/a.md": b"m", "skip/b.md": b"m", "1/skip/c.md": b"m", "d.md": b"m"})
    write(folder, {"skip.md": b"a file of an excluded folder's name"})
    data = DataConfig(path=str(folder), include="**/*.md", exclude=("skip",))
    assert all_names(data) == ["1/deep/a.md", "d.md", "skip.md"]
    assert all_names(dataclasses.replace(data, include="1/**", exclude=("skip", "deep"))) == sorted(
        f"1/{n}.txt" for n in range(1, 40, 3)
    )


def test_a_glob_says_what_is_held_out(folder):
    # 4.txt and 22.txt match both globs.
    data = DataConfig(path=str(folder), include="1/*", validation_include="**/*[24].txt")
    names = names_of(data)
    assert names["validation"] == sorted(f"{n % 3}/{n}.txt" for n in range(40) if n % 10 in (2, 4))
    in_folder = {f"1/{n}.txt" for n in range(1, 40, 3)}
    assert set(names["train"]) == in_folder - set(names["validation"])
    assert len(names["train"]) == len(in_folder) - 3
    names = names_of(DataConfig(path=str(folder), validation_include="1/*"))
    assert set(names["validation"]) == in_folder
    assert len(names["train"]) == 40 - len(in_folder)


def test_mixed_in_sources_hold_nothing_that_is_held_out(folder):
    main = DataConfig(path=str(folder), validation_fraction=0.3)
    held = names_of(main)["validation"]
    (folder.parent / "link").symlink_to(folder / "1")
    mixed = (
        SourceConfig(path=str(folder)),
        SourceConfig(path=str(folder.parent / "link")),
        SourceConfig(path=str(folder), include="2/*"),
    )
    opened = sources.open_mixed_in(dataclasses.replace(main, mixed_in=mixed))
    assert opened[0].names == names_of(main)["train"]
    assert opened[1].names == [n[2:] for n in opened[0].names if n.startswith("1/")]
    assert opened[2].names == [n for n in opened[0].names if n.startswith("2/")]
    assert {name[0] for name in held} == {"0", "1", "2"}
    write(folder.parent, {"other/a.txt": b"x"})
    mixed = (SourceConfig(path=str(folder.parent / "other")),)
    (other,) = sources.open_mixed_in(dataclasses.replace(main, mixed_in=mixed))
    assert other.names == ["a.txt"]
    mixed = (*mixed, SourceConfig(path="nowhere"))
    with pytest.raises(ValueError, match=r"data\.mixed_in\[1\]\.path='nowhere': must be"):
        sources.open_mixed_in(dataclasses.replace(main, mixed_in=mixed))


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

    found = all_names(DataConfig(path=str(tmp_path), exclude=("out",)))
    # Of two names of one file the first counts.
    expected = {"1.txt", "2.txt", "3.txt", "4.txt", "folder.txt/inner.txt"}
    assert set(found) - {"again.txt", "0.txt"} == expected
    assert len(found) == 6
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
    write(tmp_path, {"a.txt": b"", "b.md": b"x", "c/c.md": b"y"})
    refuse(r"data\.path='.*a\.txt': must be a file .*\(empty\)", path=path + "/a.txt")
    refuse(r"data\.path='.*b\.md': must hold at least 2 .*'b\.md'", path=path + "/b.md")
    refuse(r"data\.include='.*txt': must match files .*matches 1 names", path=path, include="*.txt")
    refuse(r"data\.path='.*: must hold at least 2 .*'b\.md'", path=path, include="*.md")
    refuse(r"data\.include='/etc/\*': must be a glob relative", path=path, include="/etc/*")
    refuse(r"data\.include='\*\*a': must be a glob", path=path, include="**a")
    held = "validation_include"
    refuse(r"data\.validation_include='\*\*a': must be a glob", path=path, **{held: "**a"})
    refuse(r"data\.validation_include='\*\.txt': must match files", path=path, **{held: "*.txt"})
    refuse(r"data\.include='': must match files .* not match", path=path, **{held: "**/*.md"})
    everything = DataConfig(path=path, validation_include="**/*.md")
    assert sources.open_source(everything, "validation").names == ["b.md", "c/c.md"]


def test_without_a_glob_every_text_file_counts(tmp_path):
    write(tmp_path, {f"{n}.any": b"caf\xe9" for n in range(4)})
    write(tmp_path, {"late.txt": b"x" * 9000 + b"\0", "binary.txt": b"ab\0c"})
    found = all_names(DataConfig(path=str(tmp_path)))
    assert found == ["0.any", "1.any", "2.any", "3.any", "late.txt"]
    assert all_names(DataConfig(path=str(tmp_path), include="*.txt")) == ["binary.txt", "late.txt"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"caf\xe9", "not UTF-8"), (b"\xed\xa0\x80", "not UTF-8"), (b" \r\n\t", "empty")],
)
def test_documents_that_cannot_be_used_are_named(folder, content, reason):
    write(folder, {"bad.txt": content})
    data = DataConfig(path=str(folder), validation_include="0/*")
    source = sources.open_source(data, "train")
    documents = [source[index] for index in range(len(source))]
    bad = [document for document in documents if isinstance(document, BadDocument)]
    assert bad == [BadDocument("bad.txt", reason)]
    good = [document for document in documents if isinstance(document, bytes)]
    assert sources.read_split(data, "train") == good
    assert len(good) == len(documents) - 1
    replaced = sources.read_split(dataclasses.replace(data, not_utf8="replace"), "train")
    if reason == "empty":
        assert replaced == good
    else:
        index = source.names.index("bad.txt")
        assert replaced[index] == content.decode("utf-8", "replace").encode()
        assert replaced[:index] + replaced[index + 1 :] == good


def test_files_that_go_away_or_shrink_are_named(folder):
    data = DataConfig(path=str(folder), validation_include="0/*")
    source = sources.open_source(data, "train")
    (folder / source.names[3]).unlink()
    write(folder, {source.names[5]: b"x"})
    bad = [i for i in range(len(source)) if isinstance(source[i], BadDocument)]
    assert bad == [3, 5]
    assert source[3] == BadDocument(source.names[3], "unreadable")
    with pytest.raises(IndexError):
        source[len(source)]


def test_links_are_told(tmp_path, monkeypatch):
    write(tmp_path / "texts", {f"{n}.txt": b"x" for n in range(3)})
    write(tmp_path / "elsewhere", {"inner.txt": b"x"})
    (tmp_path / "texts/folder").symlink_to(tmp_path / "elsewhere")
    os.link(tmp_path / "texts/0.txt", tmp_path / "texts/hard.txt")
    messages = []
    monkeypatch.setattr(logging, "info", messages.append)
    assert all_names(DataConfig(path=str(tmp_path / "texts"))) == ["0.txt", "1.txt", "2.txt"]
    assert any("1 of 5 files (a link to a folder), e.g. 'folder'" in text for text in messages)
    assert any("1 of 5 files (the same file again), e.g. 'hard.txt'" in text for text in messages)
