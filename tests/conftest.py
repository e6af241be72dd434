"""Test-run settings: 8 CPU devices, strict broadcasting, annotations of shapes checked."""

import os
from collections.abc import Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        # The suite spends its time compiling: LLVM's expensive passes double it, and a program's
        # modules, compiled side by side, each have a start of their own.
        "--xla_cpu_parallel_codegen_split_count=1",
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
    ]
)

from jaxtyping import install_import_hook

import tests.typechecker  # noqa: F401  (the hook takes it by name and does not import it)

# jaxtyping annotations of the public boundaries are enforced here and cost nothing elsewhere.
install_import_hook(["bmojo_jax", "pallas_kernels"], "tests.typechecker.check")

import jax
import jaxtyping
import numpy as np
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def annotations_off() -> Iterator[None]:
    """Lets a wrong value reach the library's own checks, past those of the annotations."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
