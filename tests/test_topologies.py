"""TPUs that are not here."""

import importlib.util
import os
import subprocess
import sys

import pytest

from bmojo_jax import topologies

without_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, which compiles for TPUs, is not installed",
)

HOLD = """
import sys
from bmojo_jax import topologies
print(len(topologies.devices("v5e:2x2")), flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
@without_libtpu
def test_several_processes_compile_at_a_time() -> None:
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(
        [sys.executable, "-c", HOLD],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "4\n"
        assert len(topologies.devices("v5e:16x16")) == 256
        other.communicate("")
    assert other.returncode == 0


@pytest.mark.slow
@without_libtpu
@pytest.mark.parametrize("name", ["v5e:3x3", "v5", "h100:2x2"])
def test_unknown_topologies_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"topology='{name}' must be like v5e:2x2, "):
        topologies.devices(name)


def test_without_libtpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"'v5e:2x2' needs libtpu .*make install-aot"):
        topologies.devices("v5e:2x2")
