"""Which tiles of queries and keys meet, in the kernels of `tpu_kernels.py`.

All three streams are bands over tokens. Key number s of a stream stands at token s // per * step,
and query i sees it where near <= i - token <= far:

    in-context   near = 0, far = W - 1         per = step = 1
    fading       near = W, far = W + F - 1     per = step = 1
    eidetic      near = 0, far = C - 1         per = M slots at the first of step = C tokens

so one rule says which tiles of keys a tile of queries meets, which queries a tile of keys meets,
and what is masked at the borders. A tile that a border cuts is one of few: first query less first
key can only be a multiple of the tiles' sizes. For each of them what is seen is known in advance,
to the row; what is not seen is left out in pieces of 128 x 128.

Steps follow the bands: step t of a tile is its t-th visible tile; where a stream has no more of
them its index stands still, nothing is moved and nothing is computed.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

LANES = 128
# Rows of a tile that are handled at once.
ROWS = 128

Specs = Mapping[str, pl.BlockSpec]


def quotient(a: Any, b: int) -> Any:
    """a // b, rounded down; of NumPy and JAX integers. Where it can be, a shift: `//` is slow."""
    return a // b if b & (b - 1) else a >> (b.bit_length() - 1)


@dataclass(frozen=True)
class Stream:
    """Keys of one kind, `tiles` tiles of `keys`; `name` is the prefix of the arrays' names."""

    name: str
    near: int
    far: int
    tiles: int
    keys: int
    per: int = 1
    step: int = 1

    @property
    def memory(self) -> bool:
        return self.name == "memory_"

    def key_tiles(self, tile: Any, queries: int) -> tuple[Any, Any]:
        """The first and the last tile of keys that tile number `tile` of queries sees."""
        oldest = (tile * queries - self.far).clip(0)
        newest = tile * queries + queries - 1 - self.near
        first = quotient(oldest + self.step - 1, self.step) * self.per
        last = quotient(newest, self.step) * self.per + self.per - 1
        return quotient(first, self.keys), quotient(last, self.keys).clip(max=self.tiles - 1)

    def query_tiles(self, tile: Any, queries: int, count: int) -> tuple[Any, Any]:
        """The first and the last tile of queries, of `count`, that see this tile of keys."""
        oldest = quotient(tile * self.keys, self.per) * self.step
        newest = quotient(tile * self.keys + self.keys - 1, self.per) * self.step
        last = quotient(newest + self.far, queries).clip(max=count - 1)
        return quotient(oldest + self.near, queries), last

    def inside(self, offset: Any, queries: int) -> Any:
        """Whether a tile lies inside the band, of its first query less its first key."""
        return (offset - (self.keys - 1) >= self.near) & (offset + queries - 1 <= self.far)

    def borders(self, queries: int, count: int) -> list[int]:
        """These differences, of the tiles that a border of the band cuts."""
        step = math.gcd(queries, self.keys)
        least = -quotient(queries - 1 - self.near, step) * step
        most = min(self.far + self.keys - 1, (count - 1) * queries)
        return [n for n in range(least, most + 1, step) if not self.inside(n, queries)]

    def has_inside(self, queries: int) -> bool:
        return queries + self.keys - 1 <= self.far - self.near + 1


class Piece(NamedTuple):
    """Columns [begin, end) of a strip, seen where low <= row - column <= high; None: anyway."""

    begin: int
    end: int
    low: int | None
    high: int | None


class Strip(NamedTuple):
    """Some rows of a tile of logits, and what they see of its columns."""

    rows: slice
    columns: slice
    pieces: tuple[Piece, ...]


def cut(rows: int, columns: int, low: int, high: int) -> list[Strip]:
    """Of a tile that is seen where low <= row - column <= high: what is not seen is left out."""
    strips = []
    for row in range(0, rows, ROWS):
        end_row = min(row + ROWS, rows)
        begin = max(0, row - high) // LANES * LANES
        end = min(columns, -(-(end_row - low) // LANES) * LANES)
        pieces: list[Piece] = []
        for column in range(begin, end, LANES):
            last = column + LANES - 1
            piece = Piece(
                column,
                column + LANES,
                None if row - last >= low else low,
                None if end_row - 1 - column <= high else high,
            )
            if pieces and pieces[-1][2:] == piece[2:] == (None, None):
                piece = piece._replace(begin=pieces.pop().begin)
            pieces.append(piece)
        if pieces:
            strips.append(Strip(slice(row, end_row), slice(begin, end), tuple(pieces)))
    return strips


def whole(rows: int, columns: int) -> list[Strip]:
    return cut(rows, columns, -columns, rows)


@dataclass(frozen=True)
class Plan:
    """Static sizes: `tiles` tiles of `queries`; `group` query heads per key/value head; factor on
    the logits in units of log 2; steps of the grid's last axis for one tile and head."""

    tiles: int
    queries: int
    group: int
    scale: float
    exact: bool
    steps: int
    streams: tuple[Stream, ...]

    def product(self, a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
        """float32, of two tiles over one axis of each."""
        return lax.dot_general(
            a,
            b,
            (((axis_a,), (axis_b,)), ((), ())),
            precision=lax.Precision.HIGHEST if self.exact else lax.Precision.DEFAULT,
            preferred_element_type=jnp.float32,
        )


def _follow(tiles: tuple[Any, Any], step: Any) -> Any:
    """The tile of this step; where there are no more of them the last one, which is not moved."""
    first, last = tiles
    return jnp.maximum(jnp.minimum(first + step, last), 0)


def by_queries(arrays: Mapping[str, Any], plan: Plan) -> Specs:
    """Blocks of the grid (row of the batch, query head, tile of queries, step)."""
    rows = _row_specs(plan, arrays, lambda h, i, t: (h, i))

    def of_stream(stream: Stream) -> Specs:
        def tile(i: Any, t: Any) -> Any:
            return _follow(stream.key_tiles(i, plan.queries), t)

        return _key_specs(
            stream,
            arrays,
            lambda h, i, t: (quotient(h, plan.group), h, tile(i, t)),
        )

    for stream in plan.streams:
        rows |= of_stream(stream)
    return rows


def by_keys(arrays: Mapping[str, Any], plan: Plan) -> Specs:
    """Blocks of the grid (row of the batch, key/value head, tile of keys, step)."""
    (stream,) = plan.streams

    def of_queries(g: Any, j: Any, t: Any) -> tuple[Any, Any]:
        head = quotient(t, plan.steps)
        tiles = stream.query_tiles(j, plan.queries, plan.tiles)
        return g * plan.group + head, _follow(tiles, t - head * plan.steps)

    def of_keys(g: Any, j: Any, t: Any) -> tuple[Any, Any, Any]:
        return g, g * plan.group + quotient(t, plan.steps), j

    return {**_row_specs(plan, arrays, of_queries), **_key_specs(stream, arrays, of_keys)}


def _row_specs(
    plan: Plan, arrays: Mapping[str, Any], place: Callable[..., tuple[Any, Any]]
) -> dict[str, pl.BlockSpec]:
    """place: head and tile of queries."""
    Q = plan.queries
    specs: dict[str, pl.BlockSpec] = {}
    for name in ("q", "do", "o", "dq"):
        if name in arrays:
            block = (1, 1, Q, arrays[name].shape[3])
            specs[name] = pl.BlockSpec(block, lambda b, h, i, t: (b, *place(h, i, t), 0))

    def number(b: Any, h: Any, i: Any, t: Any) -> tuple[Any, ...]:
        head, tile = place(h, i, t)
        return b, head, 0, tile

    for name in ("lse", "delta"):
        specs[name] = pl.BlockSpec((1, 1, 1, Q), number)
    documents = pl.BlockSpec((1, 1, Q), lambda b, h, i, t: (b, 0, place(h, i, t)[1]))
    return specs | {"query_documents": documents}


def _key_specs(
    stream: Stream, arrays: Mapping[str, Any], place: Callable[..., tuple[Any, Any, Any]]
) -> dict[str, pl.BlockSpec]:
    """place: key/value head, query head and tile of keys."""
    S, prefix = stream.keys, stream.name

    def array(b: Any, h: Any, i: Any, t: Any) -> tuple[Any, ...]:
        head, _, tile = place(h, i, t)
        return b, head, tile, 0

    def documents(b: Any, h: Any, i: Any, t: Any) -> tuple[Any, ...]:
        return b, 0, place(h, i, t)[2]

    k = pl.BlockSpec((1, 1, S, arrays[f"{prefix}k"].shape[3]), array)
    specs = {f"{prefix}{kind}": k for kind in "kv"} | {"dk": k, "dv": k}
    specs[f"{prefix}documents"] = pl.BlockSpec((1, 1, S), documents)
    if stream.memory:
        biased = arrays["memory_bias"].shape[1] > 1

        def bias(b: Any, h: Any, i: Any, t: Any) -> tuple[Any, ...]:
            _, head, tile = place(h, i, t)
            return b, head if biased else 0, 0, tile

        specs |= {"memory_bias": pl.BlockSpec((1, 1, 1, S), bias)}
        specs |= {"dbias": specs["memory_bias"]}
        specs["memory_tokens"] = pl.BlockSpec((1, S), lambda b, h, i, t: (0, place(h, i, t)[2]))
    return specs
