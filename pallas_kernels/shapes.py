"""Named cases of both operations, shared by tests, benchmarks and tuning."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class ScanShape:
    """Sizes of one selective scan: batch B, tokens L, channels E, states per channel N."""

    B: int
    L: int
    E: int
    N: int


SCAN_CASES: Mapping[str, ScanShape] = {
    # Small and odd: one step, primes, L beyond several chunks and no multiple of anything.
    "one_step": ScanShape(B=2, L=1, E=3, N=2),
    "one_state": ScanShape(B=1, L=5, E=4, N=1),
    "primes": ScanShape(B=3, L=37, E=5, N=7),
    "many_chunks": ScanShape(B=2, L=131, E=8, N=4),
    # The sizes that training and prefill run.
    "b8_l2048_e4096": ScanShape(B=8, L=2048, E=4096, N=16),
    "b1_l2048_e4096": ScanShape(B=1, L=2048, E=4096, N=16),
    "b1_l16384_e4096": ScanShape(B=1, L=16384, E=4096, N=16),
    "b8_l2048_e1536": ScanShape(B=8, L=2048, E=1536, N=16),
    "b64_l256_e1536": ScanShape(B=64, L=256, E=1536, N=16),
}


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of one attention call: batch B, tokens L, H query and G key/value heads of width K."""

    B: int
    L: int
    H: int
    G: int
    K: int
    window: int
    fading_window: int
    eidetic: int
    chunk: int


ATTENTION_CASES: Mapping[str, AttentionShape] = {
    # Small and odd. In turn: nothing to see but oneself; shorter than the window; every size
    # different and prime; several chunks in a block; a chunk longer than the sequence; full
    # attention (no token ever gets old); window, memory or chunk of the least size; each stream
    # alone; a window that the last tokens alone outgrow.
    "one_token": AttentionShape(2, 1, 1, 1, 4, 1, 1, 2, 1),
    "short": AttentionShape(1, 5, 4, 2, 4, 7, 3, 2, 2),
    "primes": AttentionShape(2, 29, 6, 2, 3, 5, 7, 3, 11),
    "many_chunks": AttentionShape(1, 41, 2, 2, 4, 6, 4, 3, 3),
    "long_chunk": AttentionShape(2, 23, 4, 1, 4, 5, 6, 4, 100),
    "full": AttentionShape(1, 37, 4, 2, 4, 1000, 9, 5, 8),
    "least": AttentionShape(2, 19, 2, 2, 1, 1, 1, 1, 1),
    "window_only": AttentionShape(2, 31, 4, 2, 4, 6, 0, 0, 1),
    "fading_only": AttentionShape(1, 31, 4, 4, 4, 1, 13, 0, 1),
    "eidetic_only": AttentionShape(1, 31, 4, 4, 4, 1, 0, 7, 4),
    "wide": AttentionShape(1, 43, 2, 1, 4, 30, 40, 50, 13),
    # What a small model trains with on a CPU.
    "b8_l512_g4_k64": AttentionShape(8, 512, 4, 4, 64, 128, 128, 32, 64),
    # The sizes that the 1.4B model runs, with grouped and with full heads.
    **{
        f"b1_l{L}_g{G}_k{K}": AttentionShape(1, L, 16, G, K, 512, 512, 64, 256)
        for L in (2048, 8192, 32768)
        for G in (4, 16)
        for K in (64, 128)
    },
}
