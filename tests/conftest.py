"""Test-run settings: 8 CPU devices, strict broadcasting, annotations of shapes checked."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

from jaxtyping import install_import_hook

# jaxtyping annotations of the public boundaries are enforced here and cost nothing elsewhere.
install_import_hook(["bmojo_jax", "pallas_kernels"], "beartype.beartype")

import jax
import numpy as np
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
