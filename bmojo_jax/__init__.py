"""B'MOJO (arXiv 2407.06324) in JAX: fading, short-term and long-term eidetic memory in one layer.

Dimension key, used as suffixes of array names (`x_BLD`) and as letters of einsum strings:

    B  batch                        L  tokens of a row
    D  model width                  V  vocabulary
    H  query heads                  G  key and value heads
    K  head width                   E  inner width of the SSM (2 D)
    N  SSM state per channel        R  rank of dt
    T  taps of a convolution        F  hidden width of the MLP; keys of the fading window
    W  keys of the window           M  tokens in the eidetic memory
    C  tokens of a chunk            Z  chunks of a row
    S  key positions                A  asked positions of a row
    P  replicas of a sweep
"""
