"""Trains a byte-level BPE on the training documents of a folder.

    python -m bmojo_jax.data.train_tokenizer --path DIR --vocab_size 8192 --output tokenizer.json

The tokenizer is one of the Hugging Face `tokenizers` library (`data.tokenizer=tokenizer.json`).
Its words are the 256 bytes, the boundary "<|endoftext|>", and what is merged of them within the
parts that `_PARTS` cuts a text into. Nothing is normalised, so every document is decoded to what it
was. The same documents and settings give the same file.
"""

import collections
import json
import os
import pathlib
import tempfile
import time
from collections.abc import Iterator
from typing import NamedTuple

import tokenizers as huggingface
import tqdm
from absl import app, flags, logging
from tokenizers import decoders, models, pre_tokenizers, trainers

from bmojo_jax import console
from bmojo_jax.config import DataConfig
from bmojo_jax.data import sources, tokenizers, word_tokenizers
from bmojo_jax.data.documents import Split

BOUNDARY = "<|endoftext|>"
# Words, punctuation and spaces as of GPT-2, a word taking the space before it along, and
#   - a digit is a part of its own, without the space: numbers of n digits are n tokens, the same
#     ones wherever the number stands, so that looking one up is copying it digit by digit;
#   - an ending behind an apostrophe is short and follows a letter, in any language ('s, 't, 'll);
#   - line ends are apart from the spaces around them, so that indentation is a part of its own;
#   - accents that are characters of their own stay with their letter.
_PARTS = (
    r"(?<=\p{L})['\x{2019}]\p{L}{1,2}(?![\p{L}\p{M}])"
    r"| ?[\p{L}\p{M}]+"
    r"|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+"
    r"|[\r\n]+"
    r"|[^\S\r\n]+(?!\S)"
    r"|\s+"
)
_SMALLEST = 257  # every byte, and the boundary
_LEAST_COUNT = 2  # of a pair that becomes a word
_COUNTED = 2**24  # bytes of a split on which bytes per token are counted


class Compression(NamedTuple):
    """Of documents of one split."""

    documents: int
    bytes: int
    tokens: int

    def __str__(self) -> str:
        return (
            f"{self.bytes / max(self.tokens, 1):.3f} bytes per token "
            f"({self.documents:,} documents, {self.bytes:,} bytes)"
        )


def train(data: DataConfig, *, vocab_size: int) -> huggingface.Tokenizer:
    """A byte-level BPE of the training documents of `data`.

    Args:
      vocab_size: of all words, the boundary among them; fewer if the documents have no more pairs
        that occur twice.

    Raises:
      ValueError: `vocab_size` is too small, or no documents can be read.
    """
    if vocab_size < _SMALLEST:
        raise ValueError(
            f"{vocab_size=}: must be at least {_SMALLEST}, which are every byte and {BOUNDARY!r}"
        )
    tokenizer = huggingface.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(huggingface.Regex(_PARTS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=_LEAST_COUNT,
        special_tokens=[BOUNDARY],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # nothing is forked here
    try:
        tokenizer.train_from_iterator(_texts(data), trainer)
    finally:
        del os.environ["TOKENIZERS_PARALLELISM"]
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before
    return tokenizer


def _documents(data: DataConfig, split: Split) -> Iterator[bytes]:
    """The good documents, with progress; the others are counted."""
    source = sources.open_source(data, split)
    left_out = collections.Counter()
    for i in tqdm.trange(
        len(source), desc=f"{split} documents", unit="document", leave=False, disable=None
    ):
        document = source[i]
        if isinstance(document, bytes):
            yield document
        else:
            left_out[getattr(document, "reason", "no text")] += 1
    for reason, count in left_out.items():
        logging.warning("%d of %d %s documents left out: %s", count, len(source), split, reason)


def _texts(data: DataConfig) -> Iterator[list[str]]:
    """Pieces of the documents: a whole one would take hundreds of bytes for each of its own."""
    found = False
    for document in _documents(data, "train"):
        found = True
        yield list(word_tokenizers.cut(document.decode("utf-8"), 0))
    if not found:
        raise ValueError(f"data.path={data.path!r}: must hold documents of text to train on")
    logging.info("all documents read; merging")


def compression(tokenizer: tokenizers.Tokenizer, data: DataConfig, split: Split) -> Compression:
    """Counted on the first documents of a split, as many as make some 16 MB."""
    documents = size = tokens = 0
    for document in _documents(data, split):
        documents += 1
        size += len(document)
        tokens += len(tokenizer.encode(document))
        if size >= _COUNTED:
            break
    return Compression(documents, size, tokens)


def write_new(text: str, path: pathlib.Path) -> None:
    """Writes a file that is there as a whole or not at all.

    Raises:
      FileExistsError: it exists; it is left as it is.
    """
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=f".{path.name}.", encoding="utf-8"
    ) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
        os.fchmod(file.fileno(), 0o644)
        os.link(file.name, path)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"not understood: {' '.join(argv[1:])}")
    console.show_messages(logging.INFO)
    values = flags.FLAGS
    output = pathlib.Path(values.output)
    started = time.monotonic()
    try:
        data = DataConfig(
            path=values.path,
            include=values.include,
            exclude=tuple(values.exclude),
            text_field=values.text_field,
            validation_include=values.validation_include,
            validation_fraction=values.validation_fraction,
        )
        _check_output(output)
        trained = train(data, vocab_size=values.vocab_size)
        text = trained.to_str(pretty=True)
        tokenizer = word_tokenizers.HuggingFaceTokenizer(json.loads(text), BOUNDARY)
        write_new(text, output)
    except (OSError, ValueError) as error:
        console.fail(error)
    print(f"{output}: {tokenizer.vocab_size:,} words in {time.monotonic() - started:.0f} s")
    if tokenizer.vocab_size < values.vocab_size:
        print(f"fewer than --vocab_size={values.vocab_size}: no other pair occurs twice")
    print(f"training: {compression(tokenizer, data, 'train')}")
    print(f"held out: {compression(tokenizer, data, 'validation')}")


def _check_output(output: pathlib.Path) -> None:
    """Before the work rather than after it."""
    if output.exists():
        raise ValueError(f"--output={str(output)!r}: must be a new file; this one exists")
    if not os.access(output.parent, os.W_OK):
        raise ValueError(f"--output={str(output)!r}: must be in an existing folder to write to")


if __name__ == "__main__":
    defaults = DataConfig()
    flags.DEFINE_string("path", None, "A folder, or a file, of documents.")
    flags.DEFINE_string("include", defaults.include, "A glob of the documents; empty: all.")
    flags.DEFINE_list("exclude", list(defaults.exclude), "Names of folders to leave out.")
    flags.DEFINE_string("text_field", defaults.text_field, "JSONL: what holds a document.")
    flags.DEFINE_string("validation_include", defaults.validation_include, "Held-out documents.")
    flags.DEFINE_float("validation_fraction", defaults.validation_fraction, "Else, held out.")
    flags.DEFINE_integer("vocab_size", 8192, "Words, the boundary among them.")
    flags.DEFINE_string("output", None, "The tokenizer.json to write.")
    flags.mark_flags_as_required(["path", "output"])
    app.run(main)
