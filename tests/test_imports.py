"""Imports go one way: entry points -> trainer, evaluate -> model -> mixers -> kernels -> jax."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
# Of our own modules, what each may import; a name stands for everything below it.
LAYERS = [
    {"bmojo_jax.settings", "bmojo_jax.processes", "bmojo_jax.records", "bmojo_jax.hlo"},
    {
        "bmojo_jax.config",
        "bmojo_jax.console",
        "bmojo_jax.paths",
        "bmojo_jax.lock",
        "bmojo_jax.topologies",
    },
    {"bmojo_jax.manifest"},
    {"bmojo_jax.inventory"},
    {"bmojo_jax.sharding", "bmojo_jax.layers"},
    {"bmojo_jax.embedding"},
    {"bmojo_jax.memory"},
    {"bmojo_jax.context"},
    {"bmojo_jax.operations"},
    {"bmojo_jax.cache"},
    {"bmojo_jax.ssm", "bmojo_jax.attention"},
    {"bmojo_jax.bmojo"},
    {"bmojo_jax.model", "bmojo_jax.presets", "bmojo_jax.losses", "bmojo_jax.optim"},
    {"bmojo_jax.data", "bmojo_jax.metrics", "bmojo_jax.checkpoint", "bmojo_jax.checks"},
    {"bmojo_jax.evaluate", "bmojo_jax.generate"},
    {"bmojo_jax.trainer"},
    {"bmojo_jax.closing", "bmojo_jax.sweep", "bmojo_jax.aot"},
    {"train", "eval"},
]


def modules():
    files = [*ROOT.glob("bmojo_jax/**/*.py"), *ROOT.glob("pallas_kernels/**/*.py")]
    files += [*ROOT.glob("configs/*.py"), ROOT / "train.py", ROOT / "eval.py"]
    for path in sorted(files):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        yield name.removesuffix(".__init__"), path


def own_imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] in ("bmojo_jax", "pallas_kernels", "configs", "train", "eval"):
                yield name


def layer_of(name):
    for level, layer in enumerate(LAYERS):
        if any(name == entry or name.startswith(entry + ".") for entry in layer):
            return level
    return None


@pytest.mark.parametrize(("name", "path"), [pytest.param(*m, id=m[0]) for m in modules()])
def test_imports_go_one_way(name, path):
    for imported in own_imports(path):
        package = imported.split(".")[0]
        if name.startswith("pallas_kernels"):
            assert package == "pallas_kernels", f"{name} imports {imported}"
        elif name.startswith("configs"):
            allowed = ("bmojo_jax.config", "bmojo_jax.settings", "bmojo_jax.presets", "configs")
            assert imported.startswith(allowed), f"{name} imports {imported}"
        elif package == "bmojo_jax" and name != "bmojo_jax":
            level, lower = layer_of(name), layer_of(imported)
            assert level is not None, f"{name} has no layer: add it to LAYERS"
            assert lower is not None and lower <= level, f"{name} imports {imported}"


# By the first word of a backend's files.
BACKENDS = {
    "selective_scan": ("reference", "xla", "pallas_tpu", ("pallas_triton", "triton_")),
    "memory_attention": ("reference", "xla"),
}


@pytest.mark.parametrize("op", BACKENDS)
def test_backends_do_not_import_each_other(op):
    for backend in BACKENDS[op]:
        files = [f for f in ROOT.glob(f"pallas_kernels/{op}/*.py") if f.stem.startswith(backend)]
        assert files, backend
        for file in files:
            for imported in own_imports(file):
                name = imported.removeprefix(f"pallas_kernels.{op}.")
                others = [b for b in (*BACKENDS[op], "api") if b != backend]
                assert not any(name.startswith(other) for other in others), (file, imported)


@pytest.mark.parametrize("name", ["flax", "ml_collections", "orbax", "grain", "optax"])
def test_kernels_know_jax_only(name):
    for path in ROOT.glob("pallas_kernels/**/*.py"):
        text = path.read_text()
        assert f"import {name}" not in text and f"from {name}" not in text


def test_no_file_says_nothing_by_its_name():
    vague = {"utils.py", "util.py", "common.py", "helpers.py", "misc.py", "base.py"}
    assert not [path for _, path in modules() if path.name in vague]
