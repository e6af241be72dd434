"""Tokenizers: documents to ids and back.

    bytes          ids 0..255 are the bytes themselves, 256 is the boundary between documents
    Hugging Face   a tokenizer.json of the `tokenizers` library
    SentencePiece  a *.model

Every id stands for a fixed string of bytes, so that decoding is joining and bits per byte can be
counted from targets alone. With bytes and with byte-level BPE without a normaliser the joined bytes
are the document, whatever it is. Other tokenizers lose what they normalise (runs of spaces, say, or
characters that they do not know), and the count is of the text as they see it. Those that put a
space before every text count it with the first token; decoding leaves it out.

What documents say is text: "<|endoftext|>" in a document is encoded like any other characters, and
never as the token of that name.
"""

import base64
import codecs
import json
import pathlib
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int
from numpy.typing import ArrayLike

from bmojo_jax.config import DataConfig
from bmojo_jax.data.word_tokenizers import (
    BoundaryError,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    checked_ids,
)

_VALID = (
    '"bytes", or the path of a tokenizer.json (Hugging Face tokenizers) or a SentencePiece *.model'
)


@runtime_checkable
class Tokenizer(Protocol):
    """What the rest of the code asks of a tokenizer. It can be pickled, and saved as JSON."""

    vocab_size: int
    boundary_id: int  # stands between documents, and for no text

    def encode(self, document: bytes | str) -> Int[np.ndarray, " L"]:
        """Ids (int32) of a document, boundaries not included; bytes are UTF-8."""
        ...

    def decode_bytes(self, ids: ArrayLike, *, continued: bool = False) -> bytes:
        """The bytes that the ids stand for; boundaries stand for none.

        Args:
          continued: text stands before them, so that a space at their beginning is one.
        """
        ...

    def decode(self, ids: ArrayLike) -> str:
        """Text of the ids; bytes that are not UTF-8 become U+FFFD."""
        ...

    def token_bytes_V(self) -> Int[np.ndarray, " V"]:
        """How many bytes each id stands for: turns nats per token into bits per byte."""
        ...

    def fingerprint(self) -> str:
        """The same for two tokenizers exactly if they are defined alike: they give the same ids."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON: what `from_dict` makes it of again."""
        ...


class ByteTokenizer:
    """One id per byte, and one for the document boundary."""

    boundary_id = 256
    vocab_size = 257

    def encode(self, document: bytes | str) -> Int[np.ndarray, " L"]:
        if isinstance(document, str):
            document = document.encode("utf-8")
        return np.frombuffer(document, np.uint8).astype(np.int32)

    def decode_bytes(self, ids: ArrayLike, *, continued: bool = False) -> bytes:
        del continued
        ids_L = checked_ids(ids, self.vocab_size)
        return ids_L[ids_L != self.boundary_id].astype(np.uint8).tobytes()

    def decode(self, ids: ArrayLike) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_bytes_V(self) -> Int[np.ndarray, " V"]:
        counts_V = np.ones(self.vocab_size, np.int32)
        counts_V[self.boundary_id] = 0
        return counts_V

    def fingerprint(self) -> str:
        return "bytes"

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "bytes"}


class StreamingDecoder:
    """Decodes ids as they come; holds back the bytes of an unfinished character.

    The pieces joined equal `tokenizer.decode` of all the ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._begun = False

    def push(self, ids: ArrayLike) -> str:
        """The text that these ids complete, possibly none."""
        text = self._tokenizer.decode_bytes(ids, continued=True)
        if text and not self._begun:
            text = self._tokenizer.decode_bytes(ids)
            self._begun = True
        return self._decoder.decode(text)

    def finish(self) -> str:
        """What is left at the end: U+FFFD for a character that was never finished."""
        return self._decoder.decode(b"", final=True)


def make_tokenizer(data: DataConfig) -> Tokenizer:
    """The tokenizer that the settings name; of token files, the one that made them.

    Raises:
      ValueError: names data.tokenizer or data.boundary_token, or, of token files, data.path.
    """
    if data.source == "tokens":
        from bmojo_jax.data import tokens  # here: it imports this module

        return tokens.tokenizer_of(data)
    if data.tokenizer == "bytes":
        if data.boundary_token:
            raise ValueError(
                f"data.boundary_token={data.boundary_token!r}: must be empty with "
                'data.tokenizer="bytes", which has a boundary of its own'
            )
        return ByteTokenizer()
    try:
        content = pathlib.Path(data.tokenizer).read_bytes()
        if data.tokenizer.endswith(".model"):
            return SentencePieceTokenizer(content, data.boundary_token)
        return HuggingFaceTokenizer(json.loads(content), data.boundary_token)
    except BoundaryError:
        raise
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(
            f"data.tokenizer={data.tokenizer!r}: must be {_VALID} ({reason})"
        ) from error


def from_dict(values: dict[str, Any]) -> Tokenizer:
    """The tokenizer of which `to_dict` made `values`."""
    kind = values["kind"]
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "huggingface":
        return HuggingFaceTokenizer(values["definition"], values["boundary_token"])
    if kind == "sentencepiece":
        return SentencePieceTokenizer(base64.b64decode(values["model"]), values["boundary_token"])
    raise ValueError(f"{kind=}: must be 'bytes', 'huggingface' or 'sentencepiece'")
