"""Where arrays live on a mesh of devices, and the kernel operations on such a mesh.

Three mesh axes. A batch is cut over `data` and `fsdp`. Parameters are cut over `fsdp` along the
model width D (or the other side of a matrix without D) and gathered where they are used (fully
sharded data parallelism, arXiv 1910.02054), and over `tensor` along heads, SSM channels, MLP
hidden units and vocabulary (arXiv 1909.08053). Vectors over D are replicated.

Everything but the kernels is left to XLA's partitioner: axes are of type Auto, placements of
parameters and batches are given at the borders of a jitted function and `constrain` hints inside.
A kernel is opaque to the partitioner, so `selective_scan` and `memory_attention` run under
shard_map here: each device calls the kernel with its own rows and its own channels or heads,
which need nothing of each other.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

import pallas_kernels
from bmojo_jax import paths
from bmojo_jax.config import MeshConfig, TrainConfig

P = PartitionSpec
AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # the axes that cut a batch
_BLOCK = r"groups/[^/]+/"
_SSM = _BLOCK + r"mixer/(ssm/)?"
_ATTENTION = _BLOCK + r"mixer/(attention/)?"

# Every parameter matches exactly one rule. The entries are its last dimensions; the depth axis in
# front of everything below groups/ is never cut.
PARAM_RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"embedding/table", P("tensor", "fsdp")),
    (r"head/kernel", P("fsdp", "tensor")),
    (r"norm/scale", P(None)),
    (_BLOCK + r"(norm|mlp_norm|mixer/fading_norm)/scale", P(None)),
    (_BLOCK + r"mlp/(gate|up)_proj/kernel", P("fsdp", "tensor")),
    (_BLOCK + r"mlp/down_proj/kernel", P("tensor", "fsdp")),
    (_SSM + r"in_proj/kernel", P("fsdp", None, "tensor")),
    (_SSM + r"conv/kernel", P(None, "tensor")),
    (_SSM + r"conv/bias", P("tensor")),
    (_SSM + r"x_proj/kernel", P(("tensor", "fsdp"), None)),
    (_SSM + r"dt_proj/kernel", P(None, ("tensor", "fsdp"))),
    (_SSM + r"dt_proj/bias", P("tensor")),
    (_SSM + r"a_log", P("tensor", None)),
    (_SSM + r"skip", P("tensor")),
    (_SSM + r"norm/scale", P("tensor")),
    (_SSM + r"out_proj/kernel", P("tensor", "fsdp")),
    (_ATTENTION + r"(fading_)?[qkv]_proj/kernel", P("fsdp", "tensor", None)),
    (_ATTENTION + r"o_proj/kernel", P("tensor", None, "fsdp")),
    (_ATTENTION + r"[qk]_norm/scale", P(None)),
    (_ATTENTION + r"eidetic_gate", P("tensor")),
)


def make_mesh(mesh: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over `devices` (all by default); an axis of size -1 takes what the others leave.

    Raises:
      ValueError: the sizes do not fit the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {axis: getattr(mesh, axis) for axis in AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    given = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
    if -1 in sizes.values() and len(devices) % fixed:
        raise ValueError(f"{given}: {fixed} must divide the number of devices, {len(devices)}")
    if -1 not in sizes.values() and fixed != len(devices):
        raise ValueError(
            f"{given}: the product, {fixed}, must be the number of devices, {len(devices)} "
            "(-1 fills an axis)"
        )
    shape = tuple(len(devices) // fixed if size == -1 else size for size in sizes.values())
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def check_divisible(config: TrainConfig, mesh: Mesh) -> None:
    """Checks, before anything is compiled, that the mesh cuts batch and model evenly.

    A vocabulary is given by its tokenizer, so one that `tensor` does not divide is replicated
    over that axis instead.

    Raises:
      ValueError: a size is no multiple of the mesh axes that cut it.
    """
    model, size = config.model, mesh.shape
    mixers = {block.mixer for block in model.blocks}
    rows = config.data.batch_size // config.optim.accumulate
    checks = [
        ("data.batch_size / optim.accumulate", rows, BATCH),
        ("model.width", model.width, ("fsdp",)),
    ]
    if mixers != {"mamba"}:
        checks.append(("model.num_heads", model.num_heads, ("tensor",)))
        checks.append(("model.num_kv_heads", model.num_kv_heads, ("tensor",)))
    if mixers & {"mamba", "bmojo_f", "bmojo"}:
        checks.append(("model.ssm_expand * model.width", model.ssm_inner, ("tensor",)))
    if any(block.mlp for block in model.blocks):
        checks.append(("model.mlp_width", model.mlp_width, ("tensor",)))
    for name, value, axes in checks:
        cut = math.prod(size[axis] for axis in axes)
        if value % cut:
            wanted = " * ".join(f"mesh.{axis}" for axis in axes)
            raise ValueError(f"{name}={value} must be a multiple of {wanted}={cut}")


def _fit(mesh: Any, axes: Sequence[Any], shape: Sequence[int]) -> PartitionSpec:
    """The spec `axes` without the mesh axes that do not divide their dimension of `shape`."""
    spec = []
    for entry, length in zip(axes, shape, strict=True):
        names = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
        while names and length % math.prod(mesh.shape[name] for name in names):
            names = names[:-1]
        spec.append(names[0] if len(names) == 1 else names or None)
    return P(*spec)


def _param_sharding(mesh: Mesh, path: str, shape: tuple[int, ...]) -> NamedSharding:
    rule = paths.only_match(PARAM_RULES, path)
    axes = (None, *rule) if path.startswith("groups/") else tuple(rule)
    if len(axes) != len(shape):
        raise ValueError(f"{path!r} has shape {shape}; its rule {rule} is for {len(axes)} axes")
    return NamedSharding(mesh, _fit(mesh, axes, shape))


def param_shardings(mesh: Mesh, params_or_shapes: Any) -> Any:
    """The placement of every parameter, as a tree like `params_or_shapes`.

    Raises:
      ValueError: a parameter matches no rule, or several, or has another number of axes.
    """
    return jax.tree_util.tree_map_with_path(
        lambda key_path, leaf: _param_sharding(mesh, paths.path_of(key_path), leaf.shape),
        params_or_shapes,
    )


def state_shardings(mesh: Mesh, params_or_shapes: Any, state: Any) -> Any:
    """The placement of any tree that holds parameters or slots of the optimizer.

    A leaf whose path ends in a parameter's path, e.g. "opt_state/1/mu/groups/0/norm/scale", is
    placed like that parameter; scalars and random keys are replicated.

    Raises:
      ValueError: an array with more than one axis belongs to no parameter.
    """
    shapes = {path: leaf.shape for path, leaf in paths.flatten_paths(params_or_shapes).items()}

    def placement(key_path: Sequence[Any], leaf: Any) -> NamedSharding:
        # The longest suffix that is a parameter: "norm/scale" also ends "groups/0/norm/scale".
        for start in range(len(key_path)):
            path = paths.path_of(key_path[start:])
            if shapes.get(path) == leaf.shape:
                return _param_sharding(mesh, path, leaf.shape)
        if leaf.ndim > 1:
            raise ValueError(
                f"{paths.path_of(key_path)!r} of shape {leaf.shape} belongs to no parameter"
            )
        return NamedSharding(mesh, P())

    return jax.tree_util.tree_map_with_path(placement, state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The placement of every array of a batch: rows cut over `data` and `fsdp`."""
    return NamedSharding(mesh, P(BATCH))


def place_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, Array]:
    """Global arrays of the rows that each process has read."""
    placement = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(placement, rows)
        for name, rows in batch.items()
    }


def _ambient_mesh() -> Any:
    """The mesh of jax.set_mesh; None without one, and inside a shard_map (arrays are local)."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.manual_axes else mesh


def constrain(x: Array, *axes: str | tuple[str, ...] | None) -> Array:
    """Hints how `x` is cut: mesh axes per dimension. Does nothing without an ambient mesh.

    A mesh axis that does not divide its dimension is left out.
    """
    mesh = _ambient_mesh()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, _fit(mesh, axes, x.shape))


# Which mesh axes cut the dimension of a letter; rows of the batch, channels and heads alone.
_CUTS: Mapping[str, Any] = {"B": BATCH, "E": "tensor", "H": "tensor", "G": "tensor"}


def _per_device(
    operation: Callable[..., Any], outputs: Sequence[str], arrays: dict[str, Array | None]
) -> Any:
    """Calls `operation(**arrays)` with per-device arrays, cut by the letters of their names.

    Rows that `data * fsdp` does not divide (batch 1 when decoding) are computed by every device
    alike, and so are channels or heads that `tensor` does not divide.

    check_vma is off: with it, the types of all values in a kernel would have to say over which
    mesh axes they vary, and kernels know of no mesh. Gradients need it only where the function
    communicates, which these do not: the transposed shard_map divides the cotangent of an output
    by the number of devices that hold a copy and sums that of an input over those it was
    replicated on.
    """
    mesh = _ambient_mesh()
    if mesh is None or mesh.size == 1:
        return operation(**arrays)
    present = {name: array for name, array in arrays.items() if array is not None}
    sizes: dict[str, list[int]] = {}
    for name, array in present.items():
        for letter, length in zip(name.rsplit("_", 1)[1], array.shape, strict=True):
            sizes.setdefault(letter, []).append(length)
    if "H" in sizes:  # query and key heads are cut together or not at all
        sizes["H"] = sizes["G"] = sizes["H"] + sizes["G"]
    cuts = {
        letter: _fit(mesh, [axes], [math.gcd(*sizes[letter])])[0]
        for letter, axes in _CUTS.items()
        if letter in sizes
    }

    def spec(name: str) -> PartitionSpec:
        return P(*(cuts.get(letter) for letter in name.rsplit("_", 1)[1]))

    return jax.shard_map(
        lambda arrays: tuple(operation(**arrays)),
        in_specs=({name: spec(name) for name in present},),
        out_specs=tuple(spec(name) for name in outputs),
        check_vma=False,
    )(present)


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
    """`pallas_kernels.selective_scan`, on the ambient mesh if there is one."""
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

    def operation(**arrays: Any) -> pallas_kernels.ScanOutput:
        return pallas_kernels.selective_scan(**arrays, implementation=implementation)

    return pallas_kernels.ScanOutput(*_per_device(operation, ("y_BLE", "h_BEN"), arrays))


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

    def operation(**arrays: Any) -> pallas_kernels.AttentionOutput:
        return pallas_kernels.memory_attention(
            **arrays,
            window=window,
            fading_window=fading_window,
            chunk=chunk,
            scale=scale,
            implementation=implementation,
        )

    return pallas_kernels.AttentionOutput(*_per_device(operation, ("o_BLHK", "lse_BLH"), arrays))
