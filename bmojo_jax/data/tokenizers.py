"""Tokenizers: documents to ids and back.

`bytes`: ids 0..255 are the bytes themselves, 256 is the boundary between documents. Every byte
string has exactly one sequence of ids, so nothing is unknown and nothing is normalised.
"""

import codecs
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int
from numpy.typing import ArrayLike

from bmojo_jax.config import DataConfig


@runtime_checkable
class Tokenizer(Protocol):
    """What the rest of the code asks of a tokenizer. It can be pickled, and saved as JSON."""

    vocab_size: int
    boundary_id: int  # stands between documents, and for no text

    def encode(self, document: bytes | str) -> Int[np.ndarray, " L"]:
        """Ids (int32) of a document, boundaries not included; bytes are UTF-8."""
        ...

    def decode_bytes(self, ids: ArrayLike) -> bytes: ...

    def decode(self, ids: ArrayLike) -> str: ...

    def token_bytes_V(self) -> Int[np.ndarray, " V"]: ...

    def fingerprint(self) -> str:
        """The same for two tokenizers exactly if they give the same ids."""
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

    def decode_bytes(self, ids: ArrayLike) -> bytes:
        """The bytes that the ids stand for; boundaries stand for none."""
        ids_L = np.asarray(ids, np.int64)
        if ids_L.size and not 0 <= ids_L.min() <= ids_L.max() < self.vocab_size:
            raise ValueError(
                f"ids from {ids_L.min()} to {ids_L.max()}: must be in [0, {self.vocab_size})"
            )
        return ids_L[ids_L != self.boundary_id].astype(np.uint8).tobytes()

    def decode(self, ids: ArrayLike) -> str:
        """Text of the ids; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def fingerprint(self) -> str:
        return "bytes"

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "bytes"}

    def token_bytes_V(self) -> Int[np.ndarray, " V"]:
        """How many bytes each id stands for: turns nats per token into bits per byte."""
        counts_V = np.ones(self.vocab_size, np.int32)
        counts_V[self.boundary_id] = 0
        return counts_V


class StreamingDecoder:
    """Decodes ids as they come; holds back the bytes of an unfinished character.

    The pieces joined equal `tokenizer.decode` of all the ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: ArrayLike) -> str:
        """The text that these ids complete, possibly none."""
        return self._decoder.decode(self._tokenizer.decode_bytes(ids))

    def finish(self) -> str:
        """What is left at the end: U+FFFD for a character that was never finished."""
        return self._decoder.decode(b"", final=True)


def make_tokenizer(data: DataConfig) -> Tokenizer:
    """The tokenizer that the settings name."""
    if data.tokenizer == "bytes":
        return ByteTokenizer()
    raise ValueError(f"data.tokenizer={data.tokenizer!r}: must be 'bytes'")


def from_dict(values: dict[str, Any]) -> Tokenizer:
    """The tokenizer of which `to_dict` made `values`."""
    if values["kind"] == "bytes":
        return ByteTokenizer()
    raise ValueError(f"kind={values['kind']!r}: must be 'bytes'")
