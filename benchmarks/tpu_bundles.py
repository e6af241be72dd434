"""Bundles of instructions of TPU kernels, out of what libtpu writes while it compiles for a chip
that is not here.

A TensorCore issues one bundle per cycle, so the bundles that run are a count of cycles that can be
repeated; waiting for memory is not in it. What is counted of which kernel: `tpu_scan_bundles`,
`tpu_attention_bundles`.
"""

import contextlib
import os
import pathlib
import re
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

TOPOLOGIES: Mapping[str, str] = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
}


class Bundle(NamedTuple):
    """How many loops are around it, as far as the dump says (not of empty bundles); whether a
    loop's body starts with it; the numbers of the regions that start with it; the region to which
    it may branch."""

    depth: int
    starts: bool
    regions: tuple[int, ...]
    target: int | None


@contextlib.contextmanager
def dumping() -> Iterator[pathlib.Path]:
    """The folder where libtpu, not yet loaded, will write the bundles of all that it compiles."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LIBTPU_INIT_ARGS"] = (
            f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
            " --xla_jf_dump_llo_pass_label_regex=final_bundles"
        )
        yield pathlib.Path(folder)


def of_kernel(traced: Any, name: str, dump: pathlib.Path) -> str:
    """Compiles a program, and returns the dump of the one kernel in it whose name starts so."""
    known = set(dump.iterdir())
    traced.lower(lowering_platforms=("tpu",)).compile()
    new = [
        path
        for path in set(dump.iterdir()) - known
        if re.search(rf"-{name}\w*\.\d+-\d+-final_bundles\.txt$", path.name)
    ]
    if len(new) != 1:
        raise ValueError(f"{name=}: {new} should be one file of bundles")
    return new[0].read_text()


def parse(text: str) -> list[Bundle]:
    """Of a `final_bundles.txt`."""
    heads = re.compile(
        r"^\s*(?:0x[0-9a-f]+|0)\s+(?P<label>L[HBE]|P[BF]|CT)?\s*:\s*(?P<depth>>*)\s*\{", re.M
    )
    found = list(heads.finditer(text))
    ends = [head.start() for head in found[1:]] + [len(text)]
    bundles = []
    for head, end in zip(found, ends, strict=True):
        body = text[head.end() : end]
        regions = re.findall(r"(?:Start|Start/End empty) region (\d+)", body)
        target = re.search(r"sbr\.rel .*?target = \$region(\d+)", body)
        bundles.append(
            Bundle(
                depth=len(head["depth"]),
                starts=head["label"] == "LB",
                regions=tuple(map(int, regions)),
                target=None if target is None else int(target[1]),
            )
        )
    return bundles
