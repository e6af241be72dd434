"""Where arrays live on a mesh of devices.

Four mesh axes. A batch is cut over `data` and `fsdp`, and its rows over `context` along their
tokens. Parameters are cut over `fsdp` and `context` along the model width D (or the other side of
a matrix without D) and gathered where they are used (fully sharded data parallelism, arXiv
1910.02054), and over `tensor` along heads, SSM channels, MLP hidden units and vocabulary (arXiv
1909.08053). Vectors over D are replicated.

Most is left to XLA's partitioner: axes are of type Auto, placements of parameters and batches are
given at the borders of a jitted function and `constrain` hints inside. What it cannot cut, or not
well, is in `operations.py`.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from bmojo_jax import paths
from bmojo_jax.config import MeshConfig, TrainConfig

P = PartitionSpec
AXES = ("data", "fsdp", "context", "tensor")
BATCH = ("data", "fsdp")  # the axes that cut a batch
CONTEXT = "context"  # the axis that cuts its rows
FULLY = ("fsdp", "context")  # the axes that cut parameters and not what is computed with them
_BLOCK = r"groups/[^/]+/"
_SSM = _BLOCK + r"mixer/(ssm/)?"
_ATTENTION = _BLOCK + r"mixer/(attention/)?"

# Every parameter matches exactly one rule. The entries are its last dimensions; the depth axis in
# front of everything below groups/ is never cut.
PARAM_RULES: tuple[tuple[str, PartitionSpec], ...] = (
    # Cut over `context`, it would have devices exchange tokens instead of rows of the table.
    (r"embedding/table", P("tensor", "fsdp")),
    (r"head/kernel", P(FULLY, "tensor")),
    (r"norm/scale", P(None)),
    (_BLOCK + r"(norm|mlp_norm|mixer/fading_norm)/scale", P(None)),
    (_BLOCK + r"mlp/(gate|up)_proj/kernel", P(FULLY, "tensor")),
    (_BLOCK + r"mlp/down_proj/kernel", P("tensor", FULLY)),
    (_SSM + r"in_proj/kernel", P(FULLY, None, "tensor")),
    (_SSM + r"conv/kernel", P(None, "tensor")),
    (_SSM + r"conv/bias", P("tensor")),
    (_SSM + r"x_proj/kernel", P(("tensor", *FULLY), None)),
    (_SSM + r"dt_proj/kernel", P(None, ("tensor", *FULLY))),
    (_SSM + r"dt_proj/bias", P("tensor")),
    (_SSM + r"a_log", P("tensor", None)),
    (_SSM + r"skip", P("tensor")),
    (_SSM + r"norm/scale", P("tensor")),
    (_SSM + r"out_proj/kernel", P("tensor", FULLY)),
    (_ATTENTION + r"(fading_)?[qkv]_proj/kernel", P(FULLY, "tensor", None)),
    (_ATTENTION + r"o_proj/kernel", P("tensor", None, FULLY)),
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
    # An axis of the mesh may be a part of an axis of the machine, e.g. 32 of a pod of 8 x 8.
    placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


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
    pieces = size[CONTEXT]
    length = config.data.sequence_length
    multiple, wanted = pieces, "mesh.context"
    if pieces > 1 and "bmojo" in mixers and model.eidetic_tokens:
        multiple, wanted = pieces * model.chunk, "mesh.context * model.chunk"
    if length % multiple:
        raise ValueError(f"data.sequence_length={length} must be a multiple of {wanted}={multiple}")
    for name, value, axes in checks:
        cut = math.prod(size[axis] for axis in axes)
        if value % cut:
            wanted = " * ".join(f"mesh.{axis}" for axis in axes)
            raise ValueError(f"{name}={value} must be a multiple of {wanted}={cut}")


def fit(mesh: Any, axes: Sequence[Any], shape: Sequence[int]) -> PartitionSpec:
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
    return NamedSharding(mesh, fit(mesh, axes, shape))


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
    """The placement of arrays [B, L] of a batch: rows over `data` and `fsdp`, tokens `context`."""
    return NamedSharding(mesh, P(BATCH, CONTEXT))


@dataclasses.dataclass(frozen=True)
class Readers:
    """Who reads which rows: processes whose devices hold the same rows are one reader."""

    index: int  # which reader this process is
    count: int


def readers(mesh: Mesh) -> Readers:
    """How the rows of a batch are shared out among the processes.

    The devices of a row (along `context` and `tensor`) may be of several processes, which then read
    the same rows.

    Raises:
      ValueError: processes would need some rows in common and some not.
    """
    of_rows = mesh.devices.reshape(mesh.shape["data"] * mesh.shape["fsdp"], -1)
    rows: dict[int, list[int]] = {}
    for row, devices in enumerate(of_rows):
        for process in sorted({device.process_index for device in devices}):
            rows.setdefault(process, []).append(row)
    distinct = sorted({tuple(own) for own in rows.values()})
    if sum(map(len, distinct)) != len(of_rows) or len({len(own) for own in distinct}) > 1:
        sizes = ", ".join(f"mesh.{axis}={mesh.shape[axis]}" for axis in AXES)
        raise ValueError(
            f"{sizes}: mesh.context * mesh.tensor must divide the number of devices of a process, "
            f"{jax.local_device_count()}, or be a multiple of it"
        )
    return Readers(distinct.index(tuple(rows[jax.process_index()])), len(distinct))


def place_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, Array]:
    """Global arrays [B, L] of the rows that each reader has read."""
    placement, count = batch_sharding(mesh), readers(mesh).count

    def place(array: np.ndarray) -> Array:
        shape = (len(array) * count, *array.shape[1:])
        indices = placement.addressable_devices_indices_map(shape).values()
        # The reader's rows need not be next to each other in the batch.
        bounds = sorted({index[0].indices(shape[0])[:2] for index in indices if index is not None})
        first = {}
        for begin, _ in bounds:
            first[begin] = sum(e - b for b, e in bounds if e <= begin)

        def part(index: Any) -> np.ndarray:
            begin, end, _ = index[0].indices(shape[0])
            return array[first[begin] : first[begin] + end - begin, *index[1:]]

        return jax.make_array_from_callback(shape, placement, part)

    return {name: place(array) for name, array in batch.items()}


def ambient_mesh() -> Any:
    """The mesh of jax.set_mesh; None without one, and inside a shard_map (arrays are local)."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.manual_axes else mesh


def constrain(x: Array, *axes: str | tuple[str, ...] | None) -> Array:
    """Hints how `x` is cut: mesh axes per dimension. Does nothing without an ambient mesh.

    A mesh axis that does not divide its dimension is left out.
    """
    mesh = ambient_mesh()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, fit(mesh, axes, x.shape))
