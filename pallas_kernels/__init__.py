"""The operations of a B'MOJO layer, each with interchangeable implementations.

Knows jax, numpy and absl only: no Flax, no meshes, no configs.

* `causal_conv`, `causal_convs`: the short convolution before the scan, with SiLU.
* `innovation`: how badly the mean of the states before it predicts a state.
* `norm_rotary`: norm and rotary positions of queries and keys.
* `selective_scan`: the fading memory, a Mamba-1 scan with softplus, skip and gate fused.
* `memory_attention`: one softmax over in-context, fading and eidetic keys.
* `cached_attention`: the same of a few new tokens, over the keys that decoding caches.
* `write_keys`: the keys and values of new tokens into those caches.

`Unsupported` is what a named implementation raises when it cannot take an input.
"""

from pallas_kernels.cached_attention.api import KeyStream, cached_attention
from pallas_kernels.causal_conv.api import causal_conv, causal_convs
from pallas_kernels.dispatch import Unsupported
from pallas_kernels.innovation.api import innovation
from pallas_kernels.memory_attention.api import AttentionOutput, memory_attention
from pallas_kernels.norm_rotary.api import norm_rotary
from pallas_kernels.selective_scan.api import ScanOutput, selective_scan
from pallas_kernels.write_keys.api import KeyRing, write_keys

__all__ = [
    "AttentionOutput",
    "KeyRing",
    "KeyStream",
    "ScanOutput",
    "Unsupported",
    "cached_attention",
    "causal_conv",
    "causal_convs",
    "innovation",
    "memory_attention",
    "norm_rotary",
    "selective_scan",
    "write_keys",
]
