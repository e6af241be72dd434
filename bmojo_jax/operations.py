"""Operations on a mesh that XLA's partitioner cannot cut, or not well.

A kernel is opaque to the partitioner, so the scan, the attention, the convolution, the innovation
and the norm and rotation of heads run under shard_map: each device calls the kernel with its own
rows and its own channels or heads, which need nothing of each other. Where the mesh cuts rows along
their tokens, they and the memory need something of the pieces before: `context.py` has what.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

import pallas_kernels
from bmojo_jax import context, memory, sharding
from bmojo_jax.sharding import BATCH, CONTEXT
from pallas_kernels import dispatch
from pallas_kernels.innovation.api import TAPS

P = PartitionSpec

# Which mesh axes cut the dimension of a letter: rows, channels, heads. Tokens, L, and chunks, Z,
# are cut where the operation knows of it.
_CUTS: Mapping[str, Any] = {"B": BATCH, "E": "tensor", "H": "tensor", "G": "tensor"}


class Memory(NamedTuple):
    """What every chunk remembers, slots ordered by time, empty slots first."""

    index_BZM: Int[Array, "B Z M"]  # token in the row; 0 in an empty slot
    valid_BZM: Bool[Array, "B Z M"]
    tokens: dict[str, Array]  # [B, Z, M, ...], by the names they had before


def _pieces(length: int, multiple: int = 1) -> int:
    """In how many pieces, of a multiple of `multiple` tokens each, the mesh cuts rows."""
    mesh = sharding.ambient_mesh()
    pieces = 1 if mesh is None else mesh.shape[CONTEXT]
    return 1 if length % (pieces * multiple) else pieces


def _per_device(
    operation: Callable[..., Any],
    outputs: Sequence[str],
    arrays: Mapping[str, Array | None],
    *,
    pieces: int,
) -> Any:
    """Calls `operation(**arrays)` with per-device arrays, cut by the letters of their names.

    Rows that `data * fsdp` does not divide (batch 1 when decoding) are computed by every device
    alike, and so are channels or heads that `tensor` does not divide, and whole rows if `pieces`
    is 1.

    check_vma is off: with it, the types of all values in a kernel would have to say over which
    mesh axes they vary, and kernels know of no mesh. The transposed shard_map then divides the
    cotangent of an output by the number of devices that hold a copy and sums that of an input over
    those it was replicated on; what is exchanged along `context` (ppermute, all_gather) transposes
    as if the copies were parts of one sum.
    """
    mesh = sharding.ambient_mesh()
    present = {name: array for name, array in arrays.items() if array is not None}
    if mesh is None or mesh.size == 1:
        return operation(**present)
    sizes: dict[str, list[int]] = {}
    for name, array in present.items():
        for letter, length in zip(name.rsplit("_", 1)[1], array.shape, strict=True):
            sizes.setdefault(letter, []).append(length)
    if "H" in sizes and "G" in sizes:  # queries and keys are cut together or not at all
        sizes["H"] = sizes["G"] = sizes["H"] + sizes["G"]
    cuts = {
        letter: sharding.fit(mesh, [axes], [math.gcd(*sizes[letter])])[0]
        for letter, axes in _CUTS.items()
        if letter in sizes
    }
    if pieces > 1:  # `_pieces` has seen to it that they are even
        cuts |= {"L": CONTEXT, "Z": CONTEXT}

    def spec(name: str) -> PartitionSpec:
        return P(*(cuts.get(letter) for letter in name.rsplit("_", 1)[1]))

    return jax.shard_map(
        lambda arrays: tuple(operation(**arrays)),
        in_specs=({name: spec(name) for name in present},),
        out_specs=tuple(spec(name) for name in outputs),
        check_vma=False,
    )(present)


@jax.named_scope("causal_conv")
def causal_convs(
    x_BLE: Float[Array, "B L E"],
    kernel_TE: Float[Array, "T E"],
    bias_E: Float[Array, " E"],
    positions_BL: Int[Array, "B L"],
    *,
    uses: int,
) -> tuple[Float[Array, "B L E"], ...]:
    """`pallas_kernels.causal_convs` of whole rows."""
    arrays = {
        "x_BLE": x_BLE,
        "kernel_TE": kernel_TE,
        "bias_E": bias_E,
        "positions_BL": positions_BL,
    }
    pieces = _pieces(x_BLE.shape[1])

    def operation(x_BLE: Array, kernel_TE: Array, **others: Any) -> Any:
        taps, tail_BSE = kernel_TE.shape[0], None
        if pieces > 1 and taps > 1:
            tail_BSE = context.halo(x_BLE, taps - 1)
        return pallas_kernels.causal_convs(x_BLE, kernel_TE, tail_BSE=tail_BSE, uses=uses, **others)

    return _per_device(operation, ["y_BLE"] * uses, arrays, pieces=pieces)


@jax.named_scope("innovation")
def innovation(
    s_BLD: Float[Array, "B L D"], positions_BL: Int[Array, "B L"]
) -> Float[Array, "B L"]:
    """`pallas_kernels.innovation` of whole rows."""
    arrays = {"s_BLD": s_BLD, "positions_BL": positions_BL}
    pieces = _pieces(s_BLD.shape[1])

    def operation(s_BLD: Array, positions_BL: Array) -> tuple[Array]:
        tail_BSD = context.halo(s_BLD, TAPS) if pieces > 1 else None
        return (pallas_kernels.innovation(s_BLD, positions_BL, tail_BSD),)

    return _per_device(operation, ["e_BL"], arrays, pieces=pieces)[0]


@jax.named_scope("norm_rotary")
def norm_rotary(
    x_BLHK: Float[Array, "B L H K"],
    scale_K: Float[Array, " K"] | None,
    positions_BL: Int[Array, "B L"],
    *,
    theta: float,
    eps: float,
) -> Float[Array, "B L H K"]:
    """`pallas_kernels.norm_rotary`, on the ambient mesh if there is one."""
    arrays = {"x_BLHK": x_BLHK, "scale_K": scale_K, "positions_BL": positions_BL}

    def operation(x_BLHK: Array, positions_BL: Array, scale_K: Array | None = None) -> tuple[Array]:
        return (pallas_kernels.norm_rotary(x_BLHK, scale_K, positions_BL, theta=theta, eps=eps),)

    return _per_device(operation, ["y_BLHK"], arrays, pieces=_pieces(x_BLHK.shape[1]))[0]


@jax.named_scope("remember")
def remember(
    e_BL: Float[Array, "B L"],
    start_BL: Int[Array, "B L"],
    tokens: Mapping[str, Array],
    *,
    window: int,
    chunk: int,
    size: int,
) -> Memory:
    """The eidetic memory of every chunk: `memory.select` of whole rows, and what is kept.

    Args:
      e_BL: innovations; start_BL: index of the first token of each token's document.
      tokens: what is to be kept of a token, arrays [B, L, ...] with names like "k_BLGK".
      window, chunk, size: W, C and M.
    """
    options = {"window": window, "chunk": chunk, "size": size}
    pieces = _pieces(e_BL.shape[1], chunk)
    if pieces == 1:
        chosen = memory.select(e_BL, start_BL, **options)
        return Memory(*chosen, memory.recall(tokens, chosen))

    names = list(tokens)  # their order is another one inside

    def operation(innovation_BL: Array, start_BL: Array, **tokens: Array) -> tuple[Array, ...]:
        index_BZM, valid_BZM, kept = context.remember(innovation_BL, start_BL, tokens, **options)
        return index_BZM, valid_BZM, *(kept[name] for name in names)

    arrays = {"innovation_BL": e_BL, "start_BL": start_BL, **tokens}
    outputs = ["index_BZM", "valid_BZM", *(name.replace("_BL", "_BZM") for name in names)]
    index_BZM, valid_BZM, *kept = _per_device(operation, outputs, arrays, pieces=pieces)
    return Memory(index_BZM, valid_BZM, dict(zip(names, kept, strict=True)))


@jax.named_scope("selective_scan")
def selective_scan(
    x_BLE: Float[Array, "B L E"],
    dt_BLE: Float[Array, "B L E"],
    a_EN: Float[Array, "E N"],
    b_BLN: Float[Array, "B L N"],
    c_BLN: Float[Array, "B L N"],
    d_E: Float[Array, " E"],
    *,
    z_BLE: Float[Array, "B L E"] | None = None,
    dt_bias_E: Float[Array, " E"] | None = None,
    reset_BL: Bool[Array, "B L"] | None = None,
    h0_BEN: Float[Array, "B E N"] | None = None,
    implementation: str | None = None,
) -> pallas_kernels.ScanOutput:
    """`pallas_kernels.selective_scan`, on the ambient mesh if there is one.

    Rows that go on from a state, h0_BEN, are not cut along their tokens.
    """
    arrays = {
        "x_BLE": x_BLE,
        "dt_BLE": dt_BLE,
        "a_EN": a_EN,
        "b_BLN": b_BLN,
        "c_BLN": c_BLN,
        "d_E": d_E,
        "z_BLE": z_BLE,
        "dt_bias_E": dt_bias_E,
        "reset_BL": reset_BL,
        "h0_BEN": h0_BEN,
    }

    scan = functools.partial(pallas_kernels.selective_scan, implementation=implementation)
    pieces = _pieces(x_BLE.shape[1]) if h0_BEN is None else 1

    def operation(**arrays: Any) -> tuple[Array, Array]:
        return context.selective_scan(scan, arrays) if pieces > 1 else scan(**arrays)

    outputs = _per_device(operation, ["y_BLE", "h_BEN"], arrays, pieces=pieces)
    return pallas_kernels.ScanOutput(*outputs)


@jax.named_scope("memory_attention")
def memory_attention(
    q_BLHK: Float[Array, "B L H K"],
    k_BLGK: Float[Array, "B L G K"],
    v_BLGK: Float[Array, "B L G K"],
    *,
    window: int,
    fading_k_BLGK: Float[Array, "B L G K"] | None = None,
    fading_v_BLGK: Float[Array, "B L G K"] | None = None,
    fading_window: int = 0,
    eidetic_k_BZMGK: Float[Array, "B Z M G K"] | None = None,
    eidetic_v_BZMGK: Float[Array, "B Z M G K"] | None = None,
    eidetic_valid_BZM: Bool[Array, "B Z M"] | None = None,
    eidetic_bias_BZHM: Float[Array, "B Z H M"] | None = None,
    chunk: int | None = None,
    segment_ids_BL: Int[Array, "B L"] | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> pallas_kernels.AttentionOutput:
    """`pallas_kernels.memory_attention`, on the ambient mesh if there is one."""
    arrays = {
        "q_BLHK": q_BLHK,
        "k_BLGK": k_BLGK,
        "v_BLGK": v_BLGK,
        "fading_k_BLGK": fading_k_BLGK,
        "fading_v_BLGK": fading_v_BLGK,
        "eidetic_k_BZMGK": eidetic_k_BZMGK,
        "eidetic_v_BZMGK": eidetic_v_BZMGK,
        "eidetic_valid_BZM": eidetic_valid_BZM,
        "eidetic_bias_BZHM": eidetic_bias_BZHM,
        "segment_ids_BL": segment_ids_BL,
    }

    options = {"window": window, "fading_window": fading_window, "chunk": chunk}
    attend = functools.partial(
        pallas_kernels.memory_attention, **options, scale=scale, implementation=implementation
    )
    length = q_BLHK.shape[1]
    remembers = eidetic_k_BZMGK is not None
    pieces = _pieces(length, chunk if remembers and chunk is not None else 1)

    def operation(**arrays: Any) -> pallas_kernels.AttentionOutput:
        if pieces == 1:
            return attend(**arrays)
        if window >= length and not remembers:
            return context.full_attention(arrays, scale=scale)
        return context.memory_attention(attend, arrays, **options)

    outputs = _per_device(operation, ["o_BLHK", "lse_BLH"], arrays, pieces=pieces)
    return pallas_kernels.AttentionOutput(*outputs)


def waits_at_branches() -> bool:
    """Whether a branch costs time: for a GPU, XLA's host reads the condition before it goes on."""
    return dispatch.platform() == "gpu"


@jax.named_scope("write_keys")
def write_keys(
    rings: Sequence[pallas_kernels.KeyRing],
    keys_values: Sequence[tuple[Float[Array, "B L G K"], Float[Array, "B L G K"]]],
    time_BL: Int[Array, "B L"],
    real_BL: Bool[Array, "B L"],
    scale_K: Float[Array, " K"] | None,
    *,
    eps: float,
) -> tuple[pallas_kernels.KeyRing, ...]:
    """`pallas_kernels.write_keys`; on a mesh of several devices XLA cuts it."""
    return pallas_kernels.write_keys(
        rings, keys_values, time_BL, real_BL, scale_K, eps=eps, implementation=_cut_by_xla()
    )


@jax.named_scope("cached_attention")
def cached_attention(
    q_BLHK: Float[Array, "B L H K"], streams: list[pallas_kernels.KeyStream], *, theta: float
) -> Float[Array, "B L H K"]:
    """`pallas_kernels.cached_attention`; on a mesh of several devices XLA cuts it."""
    return pallas_kernels.cached_attention(
        q_BLHK, streams, theta=theta, implementation=_cut_by_xla()
    )


def _cut_by_xla() -> str | None:
    """The implementation that the partitioner understands, where there is something to cut."""
    mesh = sharding.ambient_mesh()
    return None if mesh is None or mesh.size == 1 else "xla"
