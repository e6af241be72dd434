"""Text on disk as documents: files, lines of JSONL, members of tar archives, compressed or not.

Every document is a byte range of an uncompressed file (`archives.py` unpacks what is compressed),
so that any of them is read at once. Names say where it comes from:

    sub/a.txt   sub/a.txt.gz          a file
    sub/x.jsonl#12                    a line, counted from 1
    x.tar.xz/sub/a.txt                a member; sub/a.txt if the path is that of the archive
    sub/a.txt[0]                      a part of a document longer than data.longest_document

Whole documents go to one split or the other, by a hash of their names: a document stays where it is
when others come or go, or the folder moves. Text passes through unchanged, byte for byte.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import NamedTuple, SupportsIndex

import numpy as np
from jaxtyping import Bool, Int, Shaped

from bmojo_jax.config import DataConfig, SourceConfig
from bmojo_jax.data import sources, text_files
from bmojo_jax.data.documents import BadDocument, Split
from bmojo_jax.data.text_files import Place


class _Row(NamedTuple):
    """Where a document lies, or a part of one; the row of a source's table."""

    place: int  # the file or member, by its number
    line: int  # counted from 1; 0: not a line
    part: int  # counted from 0; -1: the whole document
    offset: int
    length: int
    behind: int  # bytes of the document behind this part


_ROW = np.dtype(
    [
        (name, np.int64 if name in ("offset", "length", "behind") else np.int32)
        for name in _Row._fields
    ]
)
_LONGEST_TAIL = 3  # bytes of a UTF-8 character after its first


class TextDocuments:
    """Documents of text: a `documents.Source` of bytes and BadDocuments."""

    def __init__(
        self, places: Sequence[Place], rows_N: Shaped[np.ndarray, " N"], *, data: DataConfig,
        text_field: str,
    ) -> None:  # fmt: skip
        used, place_N = np.unique(rows_N["place"], return_inverse=True)
        self._places = [places[i] for i in used]  # so that reader processes get no others
        self._rows_N = rows_N.copy()
        self._rows_N["place"] = place_N
        self._not_utf8 = data.not_utf8
        self._text_field = text_field

    def __len__(self) -> int:
        return len(self._rows_N)

    def __getitem__(self, index: SupportsIndex) -> bytes | BadDocument:
        row = self._row(index)
        try:
            raw = self._read(row)
        except OSError:
            return BadDocument(self.name(index), "unreadable")
        if row.line and raw and not raw.isspace():
            return self._of_line(raw, index)
        return checked(raw, self.name(index), self._not_utf8)

    def name(self, index: SupportsIndex) -> str:
        row = self._row(index)
        name = _name(self._places[row.place], row.line)
        return name if row.part < 0 else f"{name}[{row.part}]"

    @property
    def names(self) -> list[str]:
        return [self.name(index) for index in range(len(self))]

    def fingerprint(self) -> str:
        """Changes with the names, sizes and order of the documents, not with where they lie."""
        digest = hashlib.sha256("\0".join(place.name for place in self._places).encode(*_ANY_NAME))
        for field in ("place", "line", "part", "length"):
            digest.update(np.ascontiguousarray(self._rows_N[field]).tobytes())
        return digest.hexdigest()

    def __repr__(self) -> str:
        return f"TextDocuments(documents={len(self)}, files={len(self._places)})"

    def _row(self, index: SupportsIndex) -> _Row:
        return _Row(*self._rows_N[index].item())

    def _read(self, row: _Row) -> bytes:
        wanted = row.length + min(_LONGEST_TAIL, row.behind)
        # Opened anew for each document: an open file cannot be handed to a reader process.
        with open(self._places[row.place].path, "rb", buffering=0) as file:
            file.seek(row.offset)
            raw = file.read(wanted)
            while len(raw) < wanted and (more := file.read(wanted - len(raw))):
                raw += more
        if len(raw) != wanted:
            raise OSError("the file is shorter than it was")
        if row.part < 0:
            return raw
        start = _tail(raw) if row.part else 0
        return raw[start : row.length + _tail(raw[row.length :])]

    def _of_line(self, raw: bytes, index: SupportsIndex) -> bytes | BadDocument:
        name = self.name(index)
        try:
            text = raw.decode("utf-8", "strict" if self._not_utf8 == "skip" else "replace")
            value = json.loads(text)
        except UnicodeDecodeError:
            return BadDocument(name, "not UTF-8")
        except (ValueError, RecursionError):
            return BadDocument(name, "not JSON")
        if not isinstance(value, dict) or self._text_field not in value:
            return BadDocument(name, f"no field {self._text_field!r}")
        document = value[self._text_field]
        if not isinstance(document, str):
            return BadDocument(name, f"field {self._text_field!r} is not a string")
        # JSON can escape half a surrogate pair, which UTF-8 cannot say.
        return checked(document.encode("utf-8", "surrogatepass"), name, self._not_utf8)


_ANY_NAME = ("utf-8", "surrogateescape")  # names of files may be any bytes


def checked(document: bytes, name: str, not_utf8: str) -> bytes | BadDocument:
    """The document as data.not_utf8 wants it, or why it cannot be used."""
    if not document or document.isspace():
        return BadDocument(name, "empty")
    try:
        document.decode("utf-8")
    except UnicodeDecodeError:
        if not_utf8 == "skip":
            return BadDocument(name, "not UTF-8")
        return document.decode("utf-8", "replace").encode("utf-8")
    return document


def open_text(source: SourceConfig, data: DataConfig, split: Split) -> TextDocuments:
    """The documents of a split, in the order of their names.

    A source of `data.mixed_in` is all for training, but for what lies in the validation split of
    the main source.

    Raises:
      ValueError: the path does not exist, or holds too few documents that can be used.
    """
    field = sources.prefix(source, data)
    if isinstance(source, DataConfig):
        places, rows_N, held_N, trained_N = _split(source)
        # Held-out documents alone are enough to evaluate on.
        if split == "train" and not trained_N.any():
            raise ValueError(
                f"data.include={data.include!r}: must match files below data.path={data.path!r} "
                f"that data.validation_include={data.validation_include!r} does not match"
            )
        rows_N = rows_N[held_N if split == "validation" else trained_N]
    elif split == "validation":
        raise ValueError(f"{field}source: must be that of training; only data.source is held out")
    else:
        places = text_files.find(source, field=field, held_out="")
        rows_N = _rows(places)
        apart_N = ~_held_out_of_main(places, rows_N, data)
        if not apart_N.all():
            sources.log_once(
                f"{field}path={source.path!r}: left out {(~apart_N).sum()} of {len(rows_N)} "
                "documents, which are in the validation split of data.path"
            )
        rows_N = rows_N[apart_N]
    if not len(rows_N):
        raise ValueError(
            f"{field}path={source.path!r}: must hold documents that the main source does not "
            "hold out for validation"
        )
    sources.log_once(f"{field}path={source.path!r}: {len(rows_N)} documents for {split}")
    rows_N = _cut(rows_N, data.longest_document, f"{field}path={source.path!r}")
    return TextDocuments(places, rows_N, data=data, text_field=source.text_field)


class _Split(NamedTuple):
    places: list[Place]
    rows_N: Shaped[np.ndarray, " N"]
    held_N: Bool[np.ndarray, " N"]
    trained_N: Bool[np.ndarray, " N"]


def _split(data: DataConfig) -> _Split:
    """All documents of the main source, and which of them are held out."""
    places = text_files.find(data, field="data.", held_out=data.validation_include)
    rows_N = _rows(places)
    if data.validation_include:
        held_N = np.array([place.held_out for place in places])[rows_N["place"]]
        trained_N = np.array([place.included for place in places])[rows_N["place"]] & ~held_N
        if not held_N.any():
            raise ValueError(
                f"data.validation_include={data.validation_include!r}: must match files below "
                f"data.path={data.path!r} that can be used"
            )
        return _Split(places, rows_N, held_N, trained_N)
    if len(rows_N) == 1:
        raise ValueError(
            f"data.path={data.path!r}: must hold at least 2 usable documents, one to train on and "
            f"one to validate on; data.include={data.include!r} matches only "
            f"{_name(places[0], rows_N['line'].item())!r}"
        )
    pairs = zip(rows_N["place"].tolist(), rows_N["line"].tolist(), strict=True)
    fraction_N = np.array([_hash_fraction(_name(places[place], line)) for place, line in pairs])
    held_N = fraction_N < data.validation_fraction
    # A split that would be empty gets the document whose hash is nearest to belonging there.
    held_N[fraction_N.argmin()] = True
    held_N[fraction_N.argmax()] = False
    return _Split(places, rows_N, held_N, ~held_N)


def _hash_fraction(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode(*_ANY_NAME)).digest()[:6]) / 2**48


def _held_out_of_main(
    places: Sequence[Place], rows_N: Shaped[np.ndarray, " N"], data: DataConfig
) -> Bool[np.ndarray, " N"]:
    """Whether a document of another source is one that the main source holds out."""
    if data.source not in ("text", "needles") or not data.path:
        return np.zeros(len(rows_N), bool)
    main = _split(data)
    held_N = main.rows_N[main.held_N]
    # A file of several members is several places: documents are compared by file and offset.
    paths = {path: i for i, path in enumerate(sorted({place.path for place in main.places}))}

    def keys(places: Sequence[Place], rows_N: Shaped[np.ndarray, " N"]) -> Int[np.ndarray, " N"]:
        number_P = np.array([paths.get(place.path, -1) for place in places], np.int64)
        return number_P[rows_N["place"]] * 2**42 + rows_N["offset"]

    return np.isin(keys(places, rows_N), keys(main.places, held_N))


def _rows(places: Sequence[Place]) -> Shaped[np.ndarray, " N"]:
    """A row for each document, in the order of the names of their places and of lines."""
    tables = []
    for number, place in enumerate(places):
        ends_N = text_files.lines(place)
        rows_N = np.zeros(1 if ends_N is None else len(ends_N), _ROW)
        rows_N["place"], rows_N["part"] = number, -1
        rows_N["offset"], rows_N["length"] = place.offset, place.length
        if ends_N is not None:
            starts_N = np.append(0, ends_N[:-1] + 1)
            rows_N["line"] = np.arange(1, len(ends_N) + 1)
            rows_N["offset"] = place.offset + starts_N
            rows_N["length"] = ends_N - starts_N
        tables.append(rows_N)
    return np.concatenate(tables)


def _cut(rows_N: Shaped[np.ndarray, " N"], longest: int, origin: str) -> Shaped[np.ndarray, " P"]:
    """Long documents as several rows; lines of JSONL stay whole."""
    # A last part that could lie within one character goes to the one before.
    parts_N = np.maximum(-(-(rows_N["length"] - _LONGEST_TAIL) // longest), 1)
    parts_N[rows_N["line"] > 0] = 1
    cut = parts_N > 1
    if not cut.any():
        return rows_N
    rows_P = np.repeat(rows_N, parts_N)
    first_P = np.repeat(np.cumsum(parts_N) - parts_N, parts_N)
    part_P = np.arange(len(rows_P)) - first_P
    of_cut_P = np.repeat(cut, parts_N)
    start_P = part_P * longest
    is_last_P = part_P == np.repeat(parts_N, parts_N) - 1
    length_P = np.where(is_last_P, rows_P["length"] - start_P, longest)
    rows_P["behind"] = rows_P["length"] - start_P - length_P
    rows_P["part"] = np.where(of_cut_P, part_P, -1)
    rows_P["offset"] += start_P
    rows_P["length"] = length_P
    noun = "document" if cut.sum() == 1 else "documents"
    sources.log_once(
        f"{origin}: {cut.sum()} {noun} longer than data.longest_document={longest} (bytes): "
        f"cut into {of_cut_P.sum()}"
    )
    return rows_P


def _name(place: Place, line: int) -> str:
    return f"{place.name}#{line}" if line else place.name


def _tail(raw: bytes) -> int:
    """How many bytes at the start belong to a character that began before them."""
    count = 0
    while count < min(_LONGEST_TAIL, len(raw)) and raw[count] & 0xC0 == 0x80:
        count += 1
    return count
