"""Tokenizes the documents of a run beforehand, into a folder of token files (`tokens.py`).

    python -m bmojo_jax.data.tokenize --config configs/lm.py:bmojo,130m \\
        --config.data.path=DIR --config.data.tokenizer=FILE --output TOKENS
    python train.py --config configs/lm.py:bmojo,130m --workdir RUN \\
        --config.data.source=tokens --config.data.path=TOKENS

The settings are those of training, so that the documents, their split and their tokens are the ones
that the run would make; of them only the main source counts, not `data.mixed_in`. The folder
depends on the documents and the settings and not on `--processes`. A command that was killed goes
on when it is given again: shards that are finished are kept. Nothing is overwritten.
"""

import contextlib
import dataclasses
import fcntl
import json
import multiprocessing
import os
import re
import signal
from collections.abc import Callable, Generator, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
import tqdm
from absl import app, flags, logging
from array_record.python import array_record_module
from ml_collections import config_flags

from bmojo_jax import config, console
from bmojo_jax.config import DataConfig, SourceConfig
from bmojo_jax.data import packing, sources, tokenizers, tokens
from bmojo_jax.data.documents import BadDocument, Source, Split
from bmojo_jax.data.tokenizers import Tokenizer

# Measured on English text as bytes: 0.28 of the size, read at 670 million tokens per second; a
# level of 3 takes longer and saves nothing. Groups would have to be unpacked for each record.
_WRITER = "group_size:1,zstd:1"
_SPLITS: tuple[Split, ...] = ("train", "validation")
# What decides on the documents and their tokens; the tokenizer by its fingerprint.
_SETTINGS = (
    *(field.name for field in dataclasses.fields(SourceConfig) if field.name != "weight"),
    *("validation_include", "validation_fraction", "validation_split"),
    *("not_utf8", "longest_document", "seed"),
)


class Job(NamedTuple):
    """A shard: documents [first, end) of a split, in the order that they are written in."""

    split: Split
    name: str
    first: int
    end: int


@dataclasses.dataclass(frozen=True)
class Work:
    """What all shards have in common; it goes to the processes by pickling."""

    output: Path
    documents: dict[Split, Source]
    tokenizer: Tokenizer
    seed: int

    def order(self, split: Split) -> Any:
        """Numbers of documents, by place: training in a random order, validation as it is."""
        numbers = grain.MapDataset.range(len(self.documents[split]))
        return numbers.shuffle(seed=self.seed) if split == "train" else numbers


def tokenize(
    data: DataConfig, output: str | os.PathLike[str], *, shards: int, processes: int
) -> dict[str, Any]:
    """Writes the folder `output`, or what it lacks; returns the content of its tokens.json.

    Args:
      shards: files of the training split (fewer if there are fewer documents).
      processes: how many work at once; the result does not depend on it.

    Raises:
      ValueError: the settings do not fit, or `output` is another folder's, finished, or in use.
    """
    output = Path(output)
    if data.source == "tokens":
        raise ValueError("data.source='tokens': must be documents that are not tokenized yet")
    if (output / tokens.DESCRIPTION).exists():
        raise ValueError(f"output={str(output)!r}: must be a new folder; this one is finished")
    if data.mixed_in:
        logging.warning("data.mixed_in is not tokenized: give a command of its own for each source")
    tokenizer = tokenizers.make_tokenizer(data)
    documents = {split: sources.open_source(data, split) for split in _SPLITS}
    jobs = _jobs({split: len(documents[split]) for split in _SPLITS}, shards)
    begun = {
        "settings": {f"data.{name}": getattr(data, name) for name in _SETTINGS},
        "tokenizer_fingerprint": tokenizer.fingerprint(),
        "shards": len([job for job in jobs if job.split == "train"]),
        "documents": {split: documents[split].fingerprint() for split in _SPLITS},
    }
    output.mkdir(parents=True, exist_ok=True)
    with _alone(output):
        _begin(output, begun)
        left = [job for job in jobs if not (output / job.name).exists()]
        total = sum(job.end - job.first for job in jobs)
        with tqdm.tqdm(
            total=total,
            initial=total - sum(job.end - job.first for job in left),
            unit="doc",
            unit_scale=True,
            mininterval=0.5,
            smoothing=0.1,
            disable=None,
        ) as bar:
            _write(Work(output, documents, tokenizer, data.seed), left, processes, bar)
        return _finish(output, jobs, begun, tokenizer)


def _jobs(documents: dict[Split, int], shards: int) -> list[Job]:
    jobs = []
    for split, size in documents.items():
        count = max(min(shards, size), 1) if split == "train" else 1
        for shard in range(count):
            name = f"{split}-{shard:05}-of-{count:05}.array_record"
            jobs.append(Job(split, name, shard * size // count, (shard + 1) * size // count))
    return jobs


@contextlib.contextmanager
def _alone(output: Path) -> Generator[None]:
    """Two commands in one folder would undo each other's work."""
    folder = os.open(output, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ValueError(
            f"output={str(output)!r}: must not be in use; another command writes there"
        ) from None
    finally:
        os.close(folder)


def _is_part(path: Path) -> bool:
    """Whether it is an unfinished file of this command."""
    return bool(re.fullmatch(r"[\w-]+(\.array_record)?(\.json)?\.part-\d+", path.name))


def _begin(output: Path, begun: dict[str, Any]) -> None:
    """Notes what the folder is of, or compares it with what was noted."""
    note = output / tokens.UNFINISHED
    wanted = json.loads(json.dumps(begun))
    if not note.exists():
        others = sorted(path.name for path in output.iterdir() if not _is_part(path))
        if others:
            raise ValueError(
                f"output={str(output)!r}: must be a new or empty folder; it holds {others[0]!r}"
            )
        _write_json(note, wanted)
        return
    noted = json.loads(note.read_text(encoding="utf-8"))
    other = {**noted["settings"], **{k: v for k, v in noted.items() if k != "settings"}}
    this = {**wanted["settings"], **{k: v for k, v in wanted.items() if k != "settings"}}
    for name, value in this.items():
        if other.get(name) != value:
            raise ValueError(
                f"output={str(output)!r}: was begun with {name}={other.get(name)!r} and not "
                f"{value!r}: give the same settings and documents, or another folder"
            )


def _write(work: Work, jobs: Sequence[Job], processes: int, bar: tqdm.tqdm) -> None:
    if processes == 1 or len(jobs) < 2:
        for job in jobs:
            _write_shard(work, job, lambda documents: bar.update(documents))
        return
    context = multiprocessing.get_context("spawn")
    written, stop = context.Value("q", 0), context.Event()
    shown = 0
    with futures.ProcessPoolExecutor(
        min(processes, len(jobs)),
        mp_context=context,
        initializer=_start_process,
        initargs=(work, written, stop, os.getpid()),
    ) as executor:
        try:
            # The longest first, so that no process ends long after the others.
            by_size = sorted(jobs, key=lambda job: job.first - job.end)
            pending = {executor.submit(_write_shard_in_process, job) for job in by_size}
            while pending:
                ended, pending = futures.wait(
                    pending, timeout=0.5, return_when=futures.FIRST_EXCEPTION
                )
                bar.update(written.value - shown)
                shown = written.value
                for future in ended:
                    future.result()
        except BaseException:
            stop.set()
            executor.shutdown(cancel_futures=True)
            raise


_process: dict[str, Any] = {}  # of a process that writes shards


def _start_process(work: Work, written: Any, stop: Any, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process tells when to stop
    _process.update(work=work, written=written, stop=stop, parent=parent)


def _write_shard_in_process(job: Job) -> None:
    def advance(documents: int) -> None:
        if _process["stop"].is_set() or os.getppid() != _process["parent"]:
            os._exit(1)
        with _process["written"].get_lock():
            _process["written"].value += documents

    _write_shard(_process["work"], job, advance)


def _write_shard(work: Work, job: Job, advance: Callable[[int], Any]) -> None:
    """Writes a shard and then, by renaming, makes it a finished one."""
    part = work.output / f"{job.name}.part-{os.getpid()}"
    shard = _Shard(part, work.tokenizer)
    source, order = work.documents[job.split], work.order(job.split)
    for place in range(job.first, job.end):
        number = order[place]
        shard.add(source[number], f"document {number} of {source!r}")
        advance(1)
    facts = {"name": job.name, **shard.close()}
    _synced(part)
    _write_json(work.output / f"{job.name}.json", facts)
    os.replace(part, work.output / job.name)


class _Shard:
    """A file of records, and what is in it."""

    def __init__(self, path: Path, tokenizer: Tokenizer) -> None:
        self._path = path
        self._tokenizer = tokenizer
        self._dtype = tokens.dtype_of(tokenizer.vocab_size)
        self._token_bytes_V = tokenizer.token_bytes_V()
        self._writer = array_record_module.ArrayRecordWriter(str(path), _WRITER)
        self._open: list[np.ndarray] = []  # documents of the next record, from | to before the next
        self._open_tokens = 0
        self._facts = {"records": 0, "documents": 0, "tokens": 0, "text_bytes": 0}
        self._left_out: dict[str, int] = {}
        self._examples: dict[str, str] = {}

    def add(self, document: Any, name: str) -> None:
        text_bytes = None
        if isinstance(document, bytes):
            text_bytes = len(document)
            document = packing.framed_ids(document, tokenizer=self._tokenizer)
        if not isinstance(document, BadDocument) and len(document) < 3:
            document = BadDocument(name, "empty")
        if isinstance(document, BadDocument):
            reason = document.reason
            self._left_out[reason] = self._left_out.get(reason, 0) + 1
            self._examples.setdefault(reason, document.name)
            return
        if document.min() < 0 or document.max() >= self._tokenizer.vocab_size:
            raise ValueError(
                f"{name}: ids from {document.min()} to {document.max()}: must be in "
                f"[0, {self._tokenizer.vocab_size})"
            )
        if text_bytes is None:
            text_bytes = int(self._token_bytes_V[document].sum())
        size = len(document) - 1
        if self._open and self._open_tokens + size > tokens.RECORD_TOKENS:
            self._write_record()
        self._open.append(document[:-1])
        self._open_tokens += size
        boundaries = int(np.count_nonzero(document == self._tokenizer.boundary_id))
        self._facts["documents"] += boundaries - 1
        self._facts["tokens"] += size
        self._facts["text_bytes"] += text_bytes

    def _write_record(self) -> None:
        record = np.concatenate([*self._open, [self._tokenizer.boundary_id]])
        self._writer.write(record.astype(self._dtype).tobytes())
        self._facts["records"] += 1
        self._open, self._open_tokens = [], 0

    def close(self) -> dict[str, Any]:
        if self._open:
            self._write_record()
        self._writer.close()
        # A full disk shows here, if it has not before.
        reader = array_record_module.ArrayRecordReader(str(self._path))
        if reader.num_records() != self._facts["records"]:
            raise OSError(f"{self._path}: has not been written to its end")
        reader.close()
        counts = {"left_out": dict(sorted(self._left_out.items())), "examples": self._examples}
        return {"bytes": self._path.stat().st_size, **self._facts, **counts}


def _finish(
    output: Path, jobs: Sequence[Job], begun: dict[str, Any], tokenizer: Tokenizer
) -> dict[str, Any]:
    splits = {}
    for split in _SPLITS:
        names = [job.name for job in jobs if job.split == split]
        facts = [json.loads((output / f"{name}.json").read_text("utf-8")) for name in names]
        left_out: dict[str, int] = {}
        for shard in facts:
            for reason, count in shard["left_out"].items():
                left_out[reason] = left_out.get(reason, 0) + count
        for reason, count in sorted(left_out.items()):
            example = next(s["examples"][reason] for s in facts if reason in s["examples"])
            logging.warning("%s: left out %d (%s), e.g. %s", split, count, reason, example)
        totals = {
            name: sum(shard[name] for shard in facts)
            for name in ("documents", "records", "tokens", "text_bytes")
        }
        if not totals["documents"]:
            path = begun["settings"]["data.path"]
            raise ValueError(
                f"data.path={path!r}: must hold {split} documents that can be used; left out: "
                f"{left_out}"
            )
        splits[split] = {
            **totals,
            "left_out": dict(sorted(left_out.items())),
            "shards": [
                {name: shard[name] for name in ("name", "records", "bytes")} for shard in facts
            ],
        }
    description = {
        "format": tokens.FORMAT,
        "dtype": tokens.dtype_of(tokenizer.vocab_size).str,
        "vocab_size": tokenizer.vocab_size,
        "boundary_id": tokenizer.boundary_id,
        **begun,
        "splits": splits,
        "tokenizer": tokenizer.to_dict(),
    }
    description = json.loads(json.dumps(description))
    _write_json(output / tokens.DESCRIPTION, description)
    for path in output.iterdir():
        if path.name == tokens.UNFINISHED or _is_part(path):
            path.unlink()
        elif path.name.endswith(".array_record.json"):
            path.unlink()
    return description


def _write_json(path: Path, values: dict[str, Any]) -> None:
    part = path.with_name(f"{path.name}.part-{os.getpid()}")
    part.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    _synced(part)
    os.replace(part, path)


def _synced(path: Path) -> None:
    """Its bytes are on the disk before its name says that it is finished."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _report(description: dict[str, Any], output: str) -> None:
    for split, facts in description["splits"].items():
        size = sum(shard["bytes"] for shard in facts["shards"])
        print(
            f"{split}: {facts['documents']:,} documents, {facts['tokens']:,} tokens, "
            f"{facts['text_bytes'] / facts['tokens']:.2f} bytes per token, "
            f"{size / 2**20:,.1f} MiB in {len(facts['shards'])} files"
        )
    print(f"train on it: --config.data.source=tokens --config.data.path={output}")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"not understood: {' '.join(argv[1:])}")
    console.show_messages(logging.INFO)
    values = flags.FLAGS
    try:
        settings = config.from_config_dict(values.config)
        description = tokenize(
            settings.data,
            values.output,
            shards=values.shards,
            processes=values.processes or os.cpu_count() or 1,
        )
    except (OSError, ValueError) as error:
        console.fail(error)
    except KeyboardInterrupt:
        console.fail(InterruptedError("stopped; the same command goes on with what is left"))
    _report(description, values.output)


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "The settings of the run.")
    flags.DEFINE_string("output", None, "The folder to write.")
    flags.DEFINE_integer("shards", 16, "Files of the training split.", lower_bound=1)
    flags.DEFINE_integer("processes", 0, "How many; 0: as many as processors.", lower_bound=0)
    flags.mark_flags_as_required(["config", "output"])
    app.run(main, flags_parser=console.parse_config_flags)
