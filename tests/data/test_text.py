"""Text in JSONL, tar and compressed files, and documents too long for memory."""

import concurrent.futures
import dataclasses
import gzip
import io
import json
import lzma
import os
import pickle
import tarfile
import time
import tracemalloc

import numpy as np
import pytest
import zstandard
from absl import logging

from bmojo_jax.config import DataConfig
from bmojo_jax.data import archives, sources, text
from bmojo_jax.data.documents import BadDocument

COMPRESS = {
    "": lambda content: content,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "bmojo_jax" / "unpacked"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "texts").mkdir()
    return tmp_path / "texts"


def jsonl(texts, field="text"):
    return "".join(json.dumps({"id": 1, field: text}) + "\n" for text in texts).encode()


def tar(files, **options):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", **options) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
                content = b""
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def both(data):
    """Names and documents of both splits."""
    result = {}
    for split in ("train", "validation"):
        source = sources.open_source(data, split)
        assert isinstance(source, text.TextDocuments)
        result |= {name: source[index] for index, name in enumerate(source.names)}
    return result


@pytest.mark.parametrize("suffix", COMPRESS)
def test_lines_are_documents(folder, suffix):
    texts = ["one\ntwo", "é \u2028 in a line", "", "\U0001f600" * 30, "last"]
    content = jsonl(texts).removesuffix(b"\n").replace(b"\n", b"\r\n", 1) + b"\n \n\n{}"
    (folder / "sub").mkdir()
    (folder / f"sub/a.jsonl{suffix}").write_bytes(COMPRESS[suffix](content))
    found = both(DataConfig(path=str(folder)))
    name = f"sub/a.jsonl{suffix}"
    wanted = {f"{name}#{i}": text.encode() for i, text in enumerate(texts, 1)}
    for line in (3, 6, 7):
        wanted[f"{name}#{line}"] = BadDocument(f"{name}#{line}", "empty")
    wanted[f"{name}#8"] = BadDocument(f"{name}#8", "no field 'text'")
    assert found == wanted
    alone = both(DataConfig(path=str(folder / name)))
    assert list(alone.values()) != [] and {n.removeprefix("sub/") for n in wanted} == set(alone)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a"', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'["text"]', "no field 'text'"),
        (b'{"Text": "a"}', "no field 'text'"),
        (b'{"text": 3}', "field 'text' is not a string"),
        (b'{"text": " \\n"}', "empty"),
        (b'{"text": "caf\xe9"}', "not UTF-8"),
        (b'{"text": "half \\ud800 a pair"}', "not UTF-8"),
    ],
)
def test_bad_lines_say_why(folder, line, reason):
    (folder / "a.jsonl").write_bytes(jsonl(["good", "too"]) + line + b"\n" + jsonl(["again"]))
    data = DataConfig(path=str(folder))
    found = both(data)
    assert found["a.jsonl#3"] == BadDocument("a.jsonl#3", reason)
    assert found["a.jsonl#4"] == b"again" and len(found) == 4
    replaced = both(dataclasses.replace(data, not_utf8="replace"))["a.jsonl#3"]
    if reason == "not UTF-8":
        assert isinstance(replaced, bytes) and "\ufffd" in replaced.decode()
    else:
        assert replaced == found["a.jsonl#3"]


def test_another_field_can_hold_the_text(folder):
    (folder / "a.jsonl").write_bytes(jsonl(["x", "y"], field="content"))
    found = both(DataConfig(path=str(folder), text_field="content"))
    assert found == {"a.jsonl#1": b"x", "a.jsonl#2": b"y"}


@pytest.mark.parametrize("ending", [".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.zst"])
@pytest.mark.parametrize("format_", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_members_are_documents(folder, ending, format_):
    long = "long/" * 40 + "name.txt"
    content = tar(
        {
            "./b/train/1.txt": b"one",
            "b/held/2.txt": b"two" * 400,
            long: "naïve".encode(),
            "b/c.jsonl": jsonl(["x", "y"]),
            "b/empty.txt": b"",
            "b/binary.bin": b"a\0b",
            "b/link.txt": "2.txt",
            "b/packed.txt.gz": gzip.compress(b"x"),
        },
        format=format_,
    )
    kind = archives.kind_of("a" + ending)
    (folder / f"a{ending}").write_bytes(COMPRESS[kind.compression](content))
    (folder / "plain.txt").write_bytes(b"plain")
    members = {
        "b/train/1.txt": b"one",
        "b/held/2.txt": b"two" * 400,
        long: "naïve".encode(),
        "b/c.jsonl#1": b"x",
        "b/c.jsonl#2": b"y",
    }
    assert both(DataConfig(path=str(folder / f"a{ending}"))) == members
    below = {f"a{ending}/{name}": content for name, content in members.items()}
    data = DataConfig(path=str(folder))
    assert both(data) == below | {"plain.txt": b"plain"}
    assert both(dataclasses.replace(data, exclude=("b",))).keys() == {
        f"a{ending}/{long}",
        "plain.txt",
    }
    data = DataConfig(path=str(folder), include="**/train/*", validation_include="**/held/*")
    assert sources.open_source(data, "train").names == [f"a{ending}/b/train/1.txt"]
    assert sources.open_source(data, "validation").names == [f"a{ending}/b/held/2.txt"]
    data = DataConfig(path=str(folder), include=f"a{ending}", validation_include="plain.txt")
    assert {name for name in both(data) if "bin" not in name} == {*below, "plain.txt"}
    data = DataConfig(path=str(folder), include="*.txt", validation_include="a.t*/b/c.*")
    assert sources.open_source(data, "train").names == ["plain.txt"]
    assert len(sources.open_source(data, "validation")) == 2


def test_of_members_with_one_name_the_last_counts(folder, monkeypatch):
    messages = []
    monkeypatch.setattr(logging, "info", messages.append)
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for content in (b"old", b"other", b"new"):
            info = tarfile.TarInfo("b.txt" if content == b"other" else "a.txt")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    (folder / "x.tar").write_bytes(file.getvalue())
    assert both(DataConfig(path=str(folder))) == {"x.tar/a.txt": b"new", "x.tar/b.txt": b"other"}
    assert any("left out 1 of 3 files (the same file again)" in text for text in messages)


@pytest.mark.parametrize(
    "name", ["a.txt.gz", "a.txt.xz", "a.txt.zst", "a.tar", "a.tar.xz", "a.jsonl.zst"]
)
@pytest.mark.parametrize("damage", ["truncated", "overwritten"])
def test_damaged_files_are_left_out_and_named(folder, name, damage, monkeypatch, cache):
    texts = [str(n) for n in np.random.default_rng(0).integers(0, 10**9, 2000)]
    whole = jsonl(texts)
    if ".tar" in name:
        whole = tar({f"{i}.txt": "".join(texts[i:]).encode() for i in range(20)})
    packed = COMPRESS[archives.kind_of(name).compression](whole)
    (folder / name).write_bytes(packed)
    (folder / "b.txt").write_bytes(b"b")
    (folder / "c.txt").write_bytes(b"c")
    assert len(both(DataConfig(path=str(folder)))) > 2

    middle = len(packed) // 2 // 512 * 512  # a border of blocks in a tar archive
    assert middle > 0
    broken = packed[:middle] if damage == "truncated" else packed[:middle] + b"\x07" * 600
    (folder / name).write_bytes(broken)
    warnings, messages = [], []
    monkeypatch.setattr(logging, "warning", warnings.append)
    monkeypatch.setattr(logging, "info", messages.append)
    assert both(DataConfig(path=str(folder))).keys() == {"b.txt", "c.txt"}
    assert f"left out {name!r}, which is damaged: " in warnings[0]
    assert any(f"left out 1 of 3 files (damaged), e.g. {name!r}" in text for text in messages)
    assert not list(cache.glob("*.part"))
    with pytest.raises(ValueError, match=r"data\.path='.*': must be a file .*\(damaged\)"):
        sources.open_source(DataConfig(path=str(folder / name)), "train")


@pytest.mark.parametrize("tail", [b"", b"\x07" * 512, b"\x07" * 1024, bytes(100)])
def test_an_archive_must_have_an_end(folder, tail):
    """What stands where a member's header should be is not taken for the end."""
    whole = tar({f"{i}.txt": b"x" * 100 for i in range(3)})
    path = folder / "x.tar"
    path.write_bytes(whole)
    assert len(archives.members(str(path), 0)) == 3
    path.write_bytes(whole[: 2 * 1024] + tail)
    with pytest.raises(archives.DamagedError, match="truncated or not a tar archive"):
        archives.members(str(path), 1)


def test_files_of_several_streams_are_whole(folder):
    for suffix in (".gz", ".xz", ".zst"):
        parts = [COMPRESS[suffix](part * 50_000) for part in (b"abc", b"", b"xyz")]
        (folder / f"a.txt{suffix}").write_bytes(b"".join(parts))
    wanted = b"abc" * 50_000 + b"xyz" * 50_000
    assert both(DataConfig(path=str(folder))) == {f"a.txt{s}": wanted for s in list(COMPRESS)[1:]}


def test_a_file_is_unpacked_once_and_anew_when_it_changes(folder, cache, monkeypatch):
    for n in range(3):
        (folder / f"{n}.txt.gz").write_bytes(gzip.compress(b"text %d" % n))
    data = DataConfig(path=str(folder))
    before = both(data)
    assert before == {f"{n}.txt.gz": b"text %d" % n for n in range(3)}
    times = {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert both(data) == before
    assert {path.name: path.stat().st_mtime_ns for path in cache.iterdir()} == times
    path = folder / "1.txt.gz"
    changed, size = path.stat().st_mtime_ns, path.stat().st_size
    path.write_bytes(gzip.compress(b"text 7"))
    os.utime(path, ns=(changed + 10**9, changed + 10**9))
    assert path.stat().st_size == size
    assert both(data) == before | {"1.txt.gz": b"text 7"}
    path.write_bytes(gzip.compress(b"another text"))
    assert both(data) == before | {"1.txt.gz": b"another text"}
    moved = folder.rename(folder.with_name("moved"))
    assert both(DataConfig(path=str(moved))) == before | {"1.txt.gz": b"another text"}


def test_whoever_comes_while_a_file_is_unpacked_waits(folder, cache, monkeypatch):
    (folder / "a.txt.gz").write_bytes(gzip.compress(b"a text"))
    (folder / "b.txt").write_bytes(b"b")
    begun = []
    streams = archives._streams

    def slow(packed, compression):
        begun.append(compression)
        time.sleep(0.3)
        yield from streams(packed, compression)

    monkeypatch.setattr(archives, "_streams", slow)
    # A lock is of an open file, so that threads stand for processes.
    with concurrent.futures.ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda _: both(DataConfig(path=str(folder))), range(3)))
    assert found == [{"a.txt.gz": b"a text", "b.txt": b"b"}] * 3
    assert begun == [".gz"]
    assert len([path for path in cache.iterdir() if path.suffix != ".lock"]) == 1


def test_what_a_killed_process_left_is_not_taken_for_the_file(folder, cache):
    (folder / "a.txt.gz").write_bytes(gzip.compress(b"a whole text"))
    (folder / "b.txt.gz").write_bytes(gzip.compress(b"another"))
    cache.mkdir(parents=True)
    part = archives.unpacked_path(folder / "a.txt.gz").with_suffix(".part")
    part.write_bytes(b"a wh")
    assert both(DataConfig(path=str(folder)))["a.txt.gz"] == b"a whole text"
    assert not part.exists()


def test_a_full_disk_is_told(folder, cache, monkeypatch):
    (folder / "a.txt.gz").write_bytes(gzip.compress(b"a" * 100_000))
    (folder / "b.txt").write_bytes(b"b")

    def full(fd):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(archives.os, "fsync", full)
        with pytest.raises(
            ValueError, match=r"unpacked': must be .* \(No space .*\); .* XDG_CACHE_HOME moves it"
        ) as error:
            sources.open_source(DataConfig(path=str(folder)), "train")
    assert str(cache) in str(error.value)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]
    assert len(both(DataConfig(path=str(folder)))) == 2


@pytest.mark.parametrize("longest", [4, 5, 7, 64])
def test_long_documents_are_cut_between_characters(folder, longest, rng, monkeypatch):
    messages = []
    monkeypatch.setattr(logging, "info", messages.append)
    letters = np.array(["a", "é", "€", "\U0001f600"])
    documents = {f"{n}.txt": "".join(rng.choice(letters, 30 + n)).encode() for n in range(4)}
    documents["short.txt"] = b"abcd"
    (folder / "x.tar").write_bytes(tar(documents))
    (folder / "a.jsonl").write_bytes(jsonl(["long line " * 20, "another " * 20]))
    data = DataConfig(path=str(folder), validation_include="a.jsonl", longest_document=longest)
    source = sources.open_source(data, "train")
    parts = {name: [] for name in documents}
    for index, name in enumerate(source.names):
        whole, bracket, number = name.removeprefix("x.tar/").partition("[")
        assert number == (f"{len(parts[whole])}]" if bracket else "")
        assert source[index].decode() and len(source[index]) <= longest + 3
        parts[whole].append(source[index])
    assert {name: b"".join(pieces) for name, pieces in parts.items()} == documents
    assert parts["short.txt"] == [b"abcd"]
    for name in list(documents)[:4]:
        assert len(parts[name]) == max(1, -(-(len(documents[name]) - 3) // longest))
    cut = sum(len(pieces) for pieces in parts.values() if len(pieces) > 1)
    count = sum(len(pieces) > 1 for pieces in parts.values())
    note = f"{count} documents longer than data.longest_document={longest} (bytes): cut into {cut}"
    assert any(note in message for message in messages)
    assert [document.decode() for document in both(data).values()][-2:] == [
        "long line " * 20,
        "another " * 20,
    ]


def test_bytes_that_are_no_text_are_cut_too(folder):
    content = bytes(np.random.default_rng(0).integers(128, 256, 1000, np.uint8))
    (folder / "a.txt").write_bytes(content)
    (folder / "b.txt").write_bytes(b"b")
    data = DataConfig(path=str(folder), validation_include="b.txt", longest_document=10)
    source = sources.open_source(data, "train")
    assert len(source) == 100
    assert {source[index].reason for index in range(100)} == {"not UTF-8"}
    assert b"".join(source._read(source._row(index)) for index in range(100)) == content


def test_a_document_of_100_MB(folder):
    pattern = "Ein Satz für die Länge: 😀 €.\n".encode()
    size = 100 * 10**6 // len(pattern) * len(pattern)
    with (folder / "long.txt").open("wb") as file:
        for _ in range(size // (len(pattern) * 1000)):
            file.write(pattern * 1000)
    (folder / "b.txt").write_bytes(b"b")
    size = (folder / "long.txt").stat().st_size
    longest = 2**20 + 1
    data = DataConfig(path=str(folder), validation_include="b.txt", longest_document=longest)
    tracemalloc.start()
    source = sources.open_source(data, "train")
    assert len(source) == -(-(size - 3) // longest) > 90
    with (folder / "long.txt").open("rb") as file:
        for index in range(len(source)):
            part = source[index]
            assert abs(len(part) - longest) < 4 or index == len(source) - 1
            assert part.decode() and part == file.read(len(part))
        assert not file.read()
    assert tracemalloc.get_traced_memory()[1] < 16 * longest
    tracemalloc.stop()


def test_many_lines_are_found_at_once_and_read_anywhere(folder):
    line = jsonl(["a text of some length, é, " * 4])
    (folder / "a.jsonl").write_bytes(line * 20_000)
    data = DataConfig(path=str(folder), validation_fraction=0.5)
    train, held = (sources.open_source(data, split) for split in ("train", "validation"))
    assert len(train) + len(held) == 20_000 and abs(len(held) - 10_000) < 500
    again = pickle.loads(pickle.dumps(train))
    for index in (0, 17, -1):
        assert again[index] == ("a text of some length, é, " * 4).encode()
    assert again.fingerprint() == train.fingerprint() != held.fingerprint()
