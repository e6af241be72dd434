"""Tokenizers of two libraries: a fixed string of bytes for every id, whatever the library decodes.

See `tokenizers.py` for what they promise.
"""

import base64
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import sentencepiece
import tokenizers as huggingface
from jaxtyping import Int
from numpy.typing import ArrayLike

# Tokens that stand between documents, the likeliest first.
_USUAL_BOUNDARIES = (
    *("<|endoftext|>", "<|end_of_text|>", "<|end▁of▁sentence|>", "</s>", "<eos>", "<|eos|>"),
    *("[EOS]", "[SEP]", "<s>", "<bos>", "<|begin_of_text|>", "[BOS]"),
)
_SPACE = "▁"  # how many tokenizers write a space
# Characters encoded at a time: the libraries take hundreds of bytes for each, and more time in all
# for longer texts (measured: with 2^20 characters 1.8 times as long as with 2^14).
_PIECE = 2**14
# A space between a word and a letter: a word of every pre-tokenisation in use begins there.
_BORDER = re.compile(r"(?<=\w) (?=[^\W\d_])")
_ESCAPED = re.compile("([\udc80-\udcff]+)")  # bytes that are not UTF-8, after surrogateescape


def checked_ids(ids: ArrayLike, vocab_size: int) -> Int[np.ndarray, " L"]:
    ids_L = np.asarray(ids, np.int64)
    if ids_L.size and not 0 <= ids_L.min() <= ids_L.max() < vocab_size:
        raise ValueError(f"ids from {ids_L.min()} to {ids_L.max()}: must be in [0, {vocab_size})")
    return ids_L


class _WordTokenizer:
    """What tokenizers of a library have in common: a string of bytes for every id.

    A long document is encoded in pieces, which bounds time and memory. It is cut between two words,
    before the space; that gives the ids of the whole document with every tokenizer whose words do
    not reach across a space (byte-level BPE as of GPT-2 and later, SentencePiece and WordPiece as
    they usually are). A document without such a border within a piece is cut anywhere.
    """

    vocab_size: int
    boundary_id: int

    def _encode_piece(self, text: str) -> Sequence[int]:
        raise NotImplementedError

    def _finish(self, token_bytes: list[bytes], special: dict[str, int]) -> None:
        """The last of __init__. `special`: the tokens that stand for no text."""
        self._bytes_of = token_bytes
        self._byte_ids = {word[0]: i for i, word in enumerate(token_bytes) if len(word) == 1}
        self.vocab_size = len(token_bytes)
        self._special_ids = np.array(sorted(special.values()), np.int64)
        # Between the first and the second character: such a token is no word of either part.
        names = sorted((name for name in special if len(name) > 1), key=len, reverse=True)
        alternatives = "|".join(f"(?<={re.escape(n[0])})(?={re.escape(n[1:])})" for n in names)
        self._within_special = re.compile(alternatives or "(?!)")
        self._leading_space = self._joined(self._encode_piece("a")).startswith(b" ")
        # A space at the border of two pieces may be the one that is put before every text.
        apart = [self._encode_piece(text) for text in ("one", "two", " two")]
        whole = list(self._encode_piece("one two"))
        self._border_width = 1 if whole == [*apart[0], *apart[1]] else 0

    def encode(self, document: bytes | str) -> Int[np.ndarray, " L"]:
        ids_L = self._encode_any(document)
        # A normaliser can make the boundary's name of other characters. It would end the document.
        return ids_L[ids_L != self.boundary_id]

    def _encode_any(self, document: bytes | str) -> Int[np.ndarray, " L"]:
        if isinstance(document, str):
            return self._encode_text(document)
        try:
            return self._encode_text(document.decode("utf-8"))
        except UnicodeDecodeError:
            text = document.decode("utf-8", errors="surrogateescape")
        if not self._knows_all_bytes or self._leading_space:  # which each part would begin with
            return self._encode_text(document.decode("utf-8", errors="replace"))
        parts = []
        for i, part in enumerate(_ESCAPED.split(text)):
            if i % 2 == 0:
                parts.append(self._encode_text(part))
            else:
                raw = part.encode("utf-8", errors="surrogateescape")
                parts.append(np.array([self._byte_ids[byte] for byte in raw], np.int32))
        return np.concatenate(parts)

    @property
    def _knows_all_bytes(self) -> bool:
        return len(self._byte_ids) == 256

    def _encode_text(self, text: str) -> Int[np.ndarray, " L"]:
        parts = [np.zeros(0, np.int32)]
        for piece in cut(text, self._border_width):
            ids_L = np.array(self._encode_piece(piece), np.int32)
            if np.isin(ids_L, self._special_ids).any():
                borders = [0, *(m.start() for m in self._within_special.finditer(piece)), None]
                ids_L = np.concatenate(
                    [
                        np.array(self._encode_piece(piece[first:last]), np.int32)
                        for first, last in itertools.pairwise(borders)
                    ]
                )
            parts.append(ids_L)
        return np.concatenate(parts)

    def _joined(self, ids: Sequence[int]) -> bytes:
        return b"".join([self._bytes_of[i] for i in ids])

    def decode_bytes(self, ids: ArrayLike, *, continued: bool = False) -> bytes:
        text = self._joined(checked_ids(ids, self.vocab_size).tolist())
        return text[1:] if self._leading_space and not continued and text[:1] == b" " else text

    def decode(self, ids: ArrayLike) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_bytes_V(self) -> Int[np.ndarray, " V"]:
        return np.array([len(word) for word in self._bytes_of], np.int32)

    def to_dict(self) -> dict[str, Any]:
        raise NotImplementedError

    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()


def cut(text: str, border_width: int) -> Iterator[str]:
    """Pieces of at most `_PIECE` characters; `border_width` of the space between is left out."""
    start = 0
    while len(text) - start > _PIECE:
        end = start + _PIECE
        # Nearly always in the last few characters: all of them are searched where there is none.
        for first in (max(end - 1000, start + 1), start + 1):
            if borders := [m.start() for m in _BORDER.finditer(text, first, end)]:
                yield text[start : borders[-1]]
                start = borders[-1] + border_width
                break
        else:
            yield text[start:end]
            start = end
    yield text[start:]


class HuggingFaceTokenizer(_WordTokenizer):
    """A tokenizer.json.

    Of the file is left out what would lose text or make encoding random: truncation, padding,
    dropout, tokens that are added to every text, and a space put before it by byte-level ones.
    """

    def __init__(self, definition: Any, boundary_token: str = "") -> None:
        """
        Args:
          definition: the content of the file.
          boundary_token: empty: the first of the usual ones that there is.

        Raises:
          ValueError: this is no such file, or one that cannot be decoded id by id.
        """
        # Its threads and a later fork do not go together; documents are read in parallel anyway.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._definition = definition
        self._tokenizer = _load(definition)
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        added = self._tokenizer.get_added_tokens_decoder()
        special = {token.content: i for i, token in added.items() if token.special}
        self._boundary_token = _boundary_token(boundary_token, vocabulary, special)
        self.boundary_id = vocabulary[self._boundary_token]
        special[self._boundary_token] = self.boundary_id
        self._tokenizer.add_special_tokens([self._boundary_token])
        self._tokenizer.encode_special_tokens = True  # i.e. their names are text
        token_bytes = [b""] * (max(vocabulary.values()) + 1)
        if _is_byte_level(definition):
            for token, i in vocabulary.items():
                token_bytes[i] = _byte_level(token) if i not in added else token.encode()
        else:
            for i, word in self._words(vocabulary).items():
                token_bytes[i] = word
        for i in special.values():
            token_bytes[i] = b""
        self._finish(token_bytes, special)
        _check_boundary(self, self._boundary_token)
        if _is_byte_level(definition) and not self._knows_all_bytes:
            raise ValueError(f"it knows {len(self._byte_ids)} of 256 bytes and drops the others")
        example = self._encode_piece("It's a test, e.g. of 3 words")
        if self.decode(example) != self._tokenizer.decode(example):
            raise ValueError(f"the decoder {self._tokenizer.decoder} does not decode id by id")

    def _words(self, vocabulary: dict[str, int]) -> dict[int, bytes]:
        """What each id adds to a text that it follows."""
        before = self._encode_piece("a")[-1:]
        ids = list(vocabulary.values())
        head = self._tokenizer.decode(before, skip_special_tokens=False)
        texts = self._tokenizer.decode_batch([[*before, i] for i in ids], skip_special_tokens=False)
        words = {i: text.removeprefix(head).encode() for i, text in zip(ids, texts, strict=True)}
        if self._definition["model"].get("byte_fallback"):
            words |= {i: bytes([n]) for n in range(256) if (i := vocabulary.get(f"<0x{n:02X}>"))}
        return words

    def _encode_piece(self, text: str) -> list[int]:
        try:
            # Unlike `encode` it lets other threads run (measured with two: 1.8 times the tokens).
            return self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except Exception as error:  # e.g. no token for what is unknown; no type of its own
            raise ValueError(str(error)) from error

    def __reduce__(self) -> tuple[Any, ...]:
        return HuggingFaceTokenizer, (self._definition, self._boundary_token)

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": "huggingface",
            "boundary_token": self._boundary_token,
            "definition": self._definition,
        }


def _load(definition: Any) -> huggingface.Tokenizer:
    changed = json.loads(json.dumps(definition))
    if not isinstance(changed, dict) or not isinstance(changed.get("model"), dict):
        raise ValueError("it has no model")
    changed["model"]["dropout"] = None
    for part in _parts(changed.get("pre_tokenizer")):
        if part["type"] == "ByteLevel":
            part["add_prefix_space"] = False
    try:
        tokenizer = huggingface.Tokenizer.from_str(json.dumps(changed))
    except Exception as error:  # the library raises nothing more special
        raise ValueError(str(error)) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _parts(section: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The parts of a section of a tokenizer.json, which may be a sequence of them."""
    if section is None:
        return []
    nested = next((value for value in section.values() if isinstance(value, list)), None)
    if section.get("type") != "Sequence" or nested is None:
        return [section]
    return [part for item in nested for part in _parts(item)]


def _is_byte_level(definition: dict[str, Any]) -> bool:
    sections = (definition.get("pre_tokenizer"), definition.get("normalizer"))
    return any(part["type"] == "ByteLevel" for section in sections for part in _parts(section))


def _byte_characters() -> dict[str, int]:
    """Byte-level BPE writes a byte as a character: itself if it is visible, else from 256 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF = _byte_characters()


def _byte_level(token: str) -> bytes:
    if all(character in _BYTE_OF for character in token):
        return bytes(_BYTE_OF[character] for character in token)
    return token.encode()


class SentencePieceTokenizer(_WordTokenizer):
    """A SentencePiece *.model; its boundary is the end or the beginning of a sentence."""

    def __init__(self, model: bytes, boundary_token: str = "") -> None:
        """
        Args:
          model: the content of the file.
          boundary_token: empty: the model's eos or bos, or the first of the usual ones.

        Raises:
          ValueError: this is no such file.
        """
        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise ValueError(str(error)) from error
        pieces = [self._processor.IdToPiece(i) for i in range(len(self._processor))]
        vocabulary = {piece: i for i, piece in enumerate(pieces)}
        own = [i for i in (self._processor.eos_id(), self._processor.bos_id()) if i >= 0]
        if not boundary_token and own:
            boundary_token = pieces[own[0]]
        special = {p: i for i, p in enumerate(pieces) if self._processor.IsControl(i)}
        self._boundary_token = _boundary_token(boundary_token, vocabulary, special)
        self.boundary_id = vocabulary[self._boundary_token]
        special[self._boundary_token] = self.boundary_id
        self._finish([self._bytes(i, piece) for i, piece in enumerate(pieces)], special)
        _check_boundary(self, self._boundary_token)

    def _bytes(self, i: int, piece: str) -> bytes:
        if i == self.boundary_id or self._processor.IsControl(i):
            return b""
        if self._processor.IsByte(i):
            return bytes([int(piece[3:5], 16)])  # "<0xE6>"
        if self._processor.IsUnknown(i):
            return " ⁇ ".encode()  # as the library itself decodes it
        return piece.replace(_SPACE, " ").encode()

    def _encode_piece(self, text: str) -> list[int]:
        return self._processor.EncodeAsIds(text)

    def __reduce__(self) -> tuple[Any, ...]:
        return SentencePieceTokenizer, (self._model, self._boundary_token)

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": "sentencepiece",
            "boundary_token": self._boundary_token,
            "model": base64.b64encode(self._model).decode("ascii"),
        }


class BoundaryError(ValueError):
    """Names data.boundary_token."""


def _boundary_token(wanted: str, vocabulary: dict[str, int], special: dict[str, int]) -> str:
    known = [token for token in _USUAL_BOUNDARIES if token in vocabulary]
    if (wanted and wanted not in vocabulary) or not (wanted or known):
        few = known or [*special, "(it has none)"][:3]
        raise BoundaryError(
            f"data.boundary_token={wanted!r}: must be a token of the tokenizer that stands for no "
            f"text, e.g. {', '.join(map(repr, few))}"
        )
    return wanted or known[0]


def _check_boundary(tokenizer: _WordTokenizer, token: str) -> None:
    if tokenizer.boundary_id in tokenizer._encode_text(f"{token} {token}"):
        raise BoundaryError(
            f"data.boundary_token={token!r}: must be a token that stands for no text; this "
            "tokenizer gives it for text"
        )
