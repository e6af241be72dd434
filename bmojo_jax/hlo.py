"""What the devices of a compiled program send each other, read from its text (HLO)."""

import collections
import math
import re
from collections.abc import Iterator
from typing import Literal, NamedTuple

Kind = Literal["all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all"]
KINDS: tuple[Kind, ...] = (
    *("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all"),
)
_WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
_WIDTHS |= {"s64": 8, "u64": 8, "f64": 8}
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\((.*)")
_CALLS = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")

_NO_TRAFFIC = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while"}


class Collective(NamedTuple):
    """One collective of a program."""

    kind: Kind
    received: float  # bytes that come to a device from others each time it runs
    runs: int  # in one run of the program, as far as the bounds of its loops can be read


def collectives(text: str) -> list[Collective]:
    """Those of `compiled.as_text()` that reach another device.

    A collective that the compiler has cut up to run beside other work, in several computations
    under one channel, counts once. How often a loop runs is read from the number that its
    condition compares with.
    """
    bodies, runs, _ = _program(text)
    found: dict[object, Collective] = {}
    for name, lines in bodies.items():
        here: collections.Counter[object] = collections.Counter()
        for line in lines:
            match = _COLLECTIVE.search(line)
            if match is None or name not in runs:
                continue
            result, kind, start, rest = match.groups()
            assert kind in KINDS
            group = _group(kind, rest)
            if group == 1:
                continue
            channel, origin = (
                re.search(r"channel_id=\d+", rest),
                re.search(r'op_name="[^"]*"', rest),
            )
            shapes = tuple(re.findall(r"\w+\[[\d,]*\]", result))
            alike = (kind, shapes, channel and channel[0], origin and origin[0])
            here[alike] += 1
            key = (*alike, here[alike])
            sizes = _results(kind, result) if start else _sizes(result)
            if "all-reduce-scatter" in name:  # so libtpu calls the sum of which a part is kept
                kind, sizes = "reduce-scatter", [size / group for size in sizes]
            received = _received(kind, sizes, group)
            found[key] = Collective(kind, received, runs[name])
    return list(found.values())


def _program(text: str) -> tuple[dict[str, list[str]], dict[str, int], dict[str, int]]:
    """Of every computation its instructions, how often it runs, and trips of the loop around it."""
    parsed = dict(_computations(text))
    bodies = {name: lines for name, (lines, _) in parsed.items()}
    runs: dict[str, int] = {}
    trips: dict[str, int] = {}
    entry = next(name for name, (_, is_entry) in parsed.items() if is_entry)

    def count(name: str, times: int, around: int) -> None:
        runs[name] = runs.get(name, 0) + times
        trips[name] = around
        for line in bodies.get(name, []):
            condition = re.search(r" while\(.*condition=%?([\w.\-]+)", line)
            bound = _bound(bodies, condition[1]) if condition else 1
            for other in _CALLS.findall(line):
                count(other, times * bound, bound if condition else around)

    count(entry, 1, 1)
    return bodies, runs, trips


def _computations(text: str) -> Iterator[tuple[str, tuple[list[str], bool]]]:
    """Name, instructions, and whether the program starts there."""
    name, lines, is_entry = "", [], False
    for line in text.splitlines():
        start = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
        if start and not line.startswith(" "):
            name, lines, is_entry = start[2], [], bool(start[1])
        elif line.startswith("}") and name:
            yield name, (lines, is_entry)
            name = ""
        elif name:
            lines.append(line)


def _bound(bodies: dict[str, list[str]], condition: str) -> int:
    """The largest number in a loop's condition, what it calls included."""
    numbers = [1]
    for line in bodies.get(condition, []):
        numbers += [int(n) for n in re.findall(r"s32\[\]\S* constant\((\d+)\)", line)]
        numbers += [_bound(bodies, other) for other in _CALLS.findall(line)]
    return max(numbers)


def _sizes(result: str) -> list[float]:
    return [
        _WIDTHS.get(dtype, 4) * math.prod(int(n) for n in dims.split(",") if n)
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", result)
    ]


def _results(kind: str, result: str) -> list[float]:
    """Of what is begun asynchronously, which gives its operands, its results, marks of its state.

    A sum gives its results alone.
    """
    sizes = _sizes(re.sub(r"[su]32\[\]", "", result))
    return sizes if kind == "all-reduce" or len(sizes) < 2 else sizes[len(sizes) // 2 :]


def _received(kind: str, sizes: list[float], group: int) -> float:
    total = sum(sizes)
    match kind:
        case "all-gather" | "all-to-all":  # a device's own part comes from nowhere
            return total * (group - 1) / group
        case "all-reduce":  # a reduce-scatter and an all-gather
            return 2 * total * (group - 1) / group
        case "reduce-scatter":
            return total * (group - 1)
        case _:
            return total


def _group(kind: str, rest: str) -> int:
    """How many devices take part."""
    if kind == "collective-permute":
        return 2
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
    if groups := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
        return int(groups[2])
    if groups := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(groups[1].split(","))
    return 2


def traffic(text: str) -> float:
    """Bytes of memory that the program writes and reads: a rough estimate from above.

    Every result of an instruction outside fusions is taken to be written once and read once, but
    for what the compiler keeps on the chip. Of an array that has an entry for each trip of the loop
    around it, a trip writes that entry. Buffers that pieces of a collective hand on count each
    time.
    """
    bodies, runs, trips = _program(text)
    fused = set(re.findall(r"calls=%?([\w.\-]+)", text)) | set(
        re.findall(r"to_apply=%?([\w.\-]+)", text)
    )
    total = 0.0
    for name, lines in bodies.items():
        if name in fused or name not in runs:
            continue
        for line in lines:
            match = re.match(r"\s*(?:ROOT )?%?\S+ = (.*?) ([\w\-]+)\(", line)
            if match is None or match[2] in _NO_TRAFFIC or match[2].endswith("-start"):
                continue
            in_memory = re.sub(r"\w+\[[\d,]*\]\{[^}]*S\(1\)[^}]*\}", "", match[1])
            if trips[name] > 1:
                in_memory = re.sub(rf"\[{trips[name]}\b", "[1", in_memory)
            total += 2 * sum(_sizes(in_memory)) * runs[name]
    return total
